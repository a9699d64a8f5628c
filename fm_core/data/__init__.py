"""Sources, shards with a manifest, an exact global order, batches."""
