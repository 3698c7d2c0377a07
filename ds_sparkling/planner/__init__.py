"""What a growth will cost and save, told before the run: compute, memory, bytes moved, pause. Needs no DeepSpeed."""
