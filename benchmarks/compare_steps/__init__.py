"""LoRA steps of plain transformers + PEFT, of TRL and of ours, beside each other."""
