"""The error for a user's mistake."""


class UserError(ValueError):
    """One line: what is wrong, where, what to do. main.py prints it without a traceback."""
