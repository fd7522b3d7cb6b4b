"""Export of vectors and towers."""
