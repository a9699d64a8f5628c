"""Images from a checkpoint, by index."""
