"""Errors in files that hold optimizer states."""
import contextlib
from typing import Any, Iterator, Tuple, Type

__all__ = ['StateFileError', 'UnreadableFile', 'reading']


class StateFileError(ValueError):
    """A file of optimizer states is damaged, incomplete or of an unexpected kind; nothing was changed."""


class UnreadableFile(StateFileError):
    """A file is not in a format that can be read safely: neither ours nor MXNet's, or it asks for code to be run."""


@contextlib.contextmanager
def reading(path: Any, *keep: Type[Exception]) -> Iterator[None]:
    """Whatever a reader raises inside is the fault of the file at ``path`` and becomes an UnreadableFile, except those to ``keep``.

    ValueError, OSError, ImportError and MemoryError say what is wrong themselves. The readers check what they read; this is for
    what nobody has thought of.
    """
    kept: Tuple[Type[Exception], ...] = (ValueError, OSError, ImportError, MemoryError, *keep)
    try:
        yield
    except Exception as error:
        if isinstance(error, kept) and not isinstance(error, UnicodeError):
            raise
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
        raise UnreadableFile(f'Cannot read {path!r}: it is damaged, or of an unknown form. Received: {reason}') from error
