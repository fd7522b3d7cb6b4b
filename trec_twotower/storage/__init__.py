"""Files on disk: atomic writes, manifests with digests, array store, cache directory."""
