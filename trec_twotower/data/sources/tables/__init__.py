"""Readers of CSV, JSON and Parquet as DuckDB tables. Types are inferred from all values."""
