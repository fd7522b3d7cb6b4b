"""Array operations that know nothing of datasets: ragged arrays, hashing, key table, top-k, numba kernels."""
