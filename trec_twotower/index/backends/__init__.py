"""FAISS indexes of each kind, on CPU and GPU."""
