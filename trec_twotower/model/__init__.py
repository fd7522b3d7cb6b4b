"""The two towers: tables, layers, loss."""
