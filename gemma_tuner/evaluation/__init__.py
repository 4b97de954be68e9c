"""Generation with a fine-tuned model, and what its answers score beside those of its base."""
