"""Negatives: samplers, mined lists and the candidates of a step."""
