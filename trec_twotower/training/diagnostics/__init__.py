"""Failures of a run: divergence, steps that cannot be trained on, repeated crashes; and profiler traces."""
