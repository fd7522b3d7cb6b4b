"""What trainings gave before: `python -m tests.golden` makes it anew, where it is meant to change."""
