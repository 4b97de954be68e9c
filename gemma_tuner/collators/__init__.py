"""Lists of examples to padded, labelled batches of tensors."""
