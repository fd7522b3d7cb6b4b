"""From the column of a feature to ids or numbers."""
