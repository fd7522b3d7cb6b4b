"""Array operations independent of datasets: ragged arrays, hashing, key table, top-k, numba kernels."""
