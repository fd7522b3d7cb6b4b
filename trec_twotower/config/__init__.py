"""Every setting, one file per section, and how a config is loaded."""
