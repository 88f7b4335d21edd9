"""Programs that people start beside main.py."""
