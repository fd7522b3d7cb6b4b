"""From Parquet to a Batch: hashing, transforms, catalogue, interactions, candidates."""
