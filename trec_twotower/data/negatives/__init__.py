"""Where negatives come from: samplers, mined lists, candidates."""
