"""An event log as a dataset: histories, splits, summaries."""
