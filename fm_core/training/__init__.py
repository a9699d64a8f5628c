"""Training: DeepSpeed engine, loop, EMA, metrics, validation loss, recovery, hang watchdog."""
