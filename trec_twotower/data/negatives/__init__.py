"""Negative sampling: samplers, mined lists and candidate sets."""
