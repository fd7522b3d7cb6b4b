"""How each kind of feature becomes ids or numbers."""
