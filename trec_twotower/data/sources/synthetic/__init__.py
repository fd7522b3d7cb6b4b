"""A generated dataset whose best ranking is known."""
