"""What fits: a step traced without weights, and the plan chosen from it."""
