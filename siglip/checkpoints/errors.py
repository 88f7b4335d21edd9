"""What goes wrong with the files of a model."""


class CheckpointError(ValueError):
    """A file cannot be read, is not what it claims to be, or does not fit. One line for people."""
