"""Config files and overrides -> one complete, checked config."""
