"""The DeepSpeed engine, the loop, EMA and checkpoints."""
