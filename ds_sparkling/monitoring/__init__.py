"""Statistics of tensors tell whether a growth goes well. Nothing here knows an engine."""
