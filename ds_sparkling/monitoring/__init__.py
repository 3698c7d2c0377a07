"""What tells whether a growth goes well: statistics of tensors, knowing no engine."""
