"""The training loop and what it needs: optimizer, sharding, checkpoints."""
