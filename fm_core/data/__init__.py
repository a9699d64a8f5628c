"""Image sources, shards with a manifest, samplers with an exact global order, and batches."""
