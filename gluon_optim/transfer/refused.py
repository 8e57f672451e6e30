"""The error of a refused conversion: the file that was read is intact."""
import contextlib
from typing import Iterator

from ..schema import error_text
from ..states.errors import StateFileError

__all__ = ['Refused', 'refusing']


class Refused(ValueError):
    """The conversion would lose something, does not fit, or cannot be done here; no file was written.

    ``reading`` says whether this was found while reading the input or while making the output.
    """

    exit_code = 1

    def __init__(self, message: str, reading: bool = False):
        super().__init__(message)
        self.reading = reading


@contextlib.contextmanager
def refusing(reading: bool = False) -> Iterator[None]:
    """Errors inside are not the input file's fault, so they become `Refused`; with ``reading``, except a damaged file's."""
    try:
        yield
    except Refused:
        raise
    except (StateFileError, OSError) as error:
        if reading:
            raise
        raise Refused(error_text(error)) from error
    except (ImportError, ValueError, TypeError, KeyError) as error:
        raise Refused(error_text(error), reading) from error
