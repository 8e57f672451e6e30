"""The error of a conversion that was refused: the file that was read is sound."""
import contextlib
from typing import Iterator

from ..schema import error_text
from ..states.errors import StateFileError

__all__ = ['Refused', 'refusing']


class Refused(ValueError):
    """It would lose something, does not fit, or cannot be done here; no file was written.

    ``reading`` says whether it came up while the input was read, or while the output was made.
    """

    exit_code = 1

    def __init__(self, message: str, reading: bool = False):
        super().__init__(message)
        self.reading = reading


@contextlib.contextmanager
def refusing(reading: bool = False) -> Iterator[None]:
    """What goes wrong inside is not the fault of the file that was read; where it is ``reading``, only what does not fit it."""
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
