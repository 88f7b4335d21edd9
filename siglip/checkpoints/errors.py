"""The error for files of models."""

from base.errors import UserError


class CheckpointError(UserError):
    """A file cannot be read, is not what it claims to be, or does not fit. One line."""
