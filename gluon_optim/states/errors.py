"""What goes wrong with files that hold optimizer states."""

__all__ = ['StateFileError', 'UnreadableFile']


class StateFileError(ValueError):
    """A file of optimizer states is damaged, incomplete or not what its reader expects; nothing was changed."""


class UnreadableFile(StateFileError):
    """A file is in no format that can be read safely: not ours, not MXNet's, or it asks for code to be run."""
