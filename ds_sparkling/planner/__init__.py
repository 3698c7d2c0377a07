"""Tell, before the run, what a growth costs and saves: compute, memory, bytes moved, pause. Needs no DeepSpeed."""
