"""From Parquet row groups to training batches."""
