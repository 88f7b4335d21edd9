"""The error for a user's mistake."""


class UserError(ValueError):
    """A mistake in a command, a config or data, on one line: what is wrong, where, what to do.

    Programs print it without a traceback, see command_line.run.
    """
