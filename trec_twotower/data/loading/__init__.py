"""Reads Parquet row groups into training batches."""
