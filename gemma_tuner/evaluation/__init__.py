"""Answers of a fine-tuned model, and their scores beside those of its base."""
