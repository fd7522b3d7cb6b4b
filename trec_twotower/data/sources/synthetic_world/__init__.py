"""A generated world whose best ranking is known."""
