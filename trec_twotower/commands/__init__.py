"""The command line: options of each command, and what it prints."""
