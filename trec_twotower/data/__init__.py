"""From Parquet to batches: datasets, features, negatives, loading and sources."""
