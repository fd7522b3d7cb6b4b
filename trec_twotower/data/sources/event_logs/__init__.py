"""Conversion of an event log into a dataset: histories, splits, summaries."""
