"""Errors in files that hold optimizer states."""

__all__ = ['StateFileError', 'UnreadableFile']


class StateFileError(ValueError):
    """A file of optimizer states is damaged, incomplete or of an unexpected kind; nothing was changed."""


class UnreadableFile(StateFileError):
    """A file is not in a format that can be read safely: neither ours nor MXNet's, or it asks for code to be run."""
