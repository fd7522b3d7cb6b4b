"""The two-tower model: embedding tables, towers, losses."""
