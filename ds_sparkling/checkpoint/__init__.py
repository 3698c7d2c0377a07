"""The file room: ZeRO checkpoints read, widened, reshaped and written piece by piece. Doesn't import DeepSpeed."""
