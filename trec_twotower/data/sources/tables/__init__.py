"""Files as tables of DuckDB: CSV, JSON and Parquet, with types from all values."""
