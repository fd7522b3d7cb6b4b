"""Checkpoints of a run: writing, verifying and restoring them, and starting from the weights of another run."""
