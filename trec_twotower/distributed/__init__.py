"""Ranks and collectives, launcher, signals, watchdog."""
