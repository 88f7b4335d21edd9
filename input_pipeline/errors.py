"""The error for what a user can put right."""


class UserError(ValueError):
    """One line: what is wrong, where, what to do. main.py prints it without a traceback."""
