"""Image sources, shards with a manifest, samplers of an exact global order, and batches."""
