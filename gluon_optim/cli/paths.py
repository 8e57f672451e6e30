"""Where results go, and a check that no output is an input."""
import contextlib
import os
import shutil
import sys
import tempfile
from typing import Callable, Iterator, Mapping, Optional

from ..schema import one_of
from ..transfer.refused import Refused

__all__ = ['PICTURES', 'STANDARD', 'check_absent', 'check_picture', 'keep_apart', 'output_for', 'standard_input', 'standard_output',
           'write_whole']


STANDARD = '-'  # in place of a file: standard input, or output
PICTURES = ('.png', '.svg', '.pdf')


def output_for(path: str, ending: str) -> str:
    """The default output: in the folder where the command runs, called as the input, with the extension ``ending``."""
    if path == STANDARD:
        raise ValueError(f"The output must have a name where the input is standard input. Pass it as --output, or '{STANDARD}'.")
    return os.path.splitext(os.path.basename(path))[0] + ending


def check_picture(path: Optional[str]) -> None:
    """ValueError if a picture is asked for in a format that is not known."""
    if path and os.path.splitext(path)[1].lower() not in PICTURES:
        raise ValueError(f'--plot must end in one of {one_of(PICTURES)}. Received: {path!r}.')


def write_whole(path: str, write: Callable[[str], None]) -> None:
    """``write`` to a temporary name with the same extension, and rename it once it is complete. An OSError names ``path``."""
    root, ending = os.path.splitext(path)
    partial = f'{root}.{os.getpid()}.partial{ending}'
    try:
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        if error.filename != partial:
            raise
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)


def check_absent(output: str) -> None:
    """Refused if a file of that name exists."""
    if output != STANDARD and os.path.isfile(output):
        raise Refused(f'{output!r} exists. Pass another name as --output, or --force to replace it.')


@contextlib.contextmanager
def standard_output() -> Iterator[str]:
    """A temporary file that goes to standard output when the block ends."""
    if sys.stdout is None or sys.stdout.isatty():
        raise ValueError(f"--output '{STANDARD}' is for a pipe or a redirection. Received: a terminal. Pass the name of a file.")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'output')
        yield path
        sys.stdout.flush()
        with open(path, 'rb') as file:
            shutil.copyfileobj(file, sys.stdout.buffer)


@contextlib.contextmanager
def standard_input() -> Iterator[str]:
    """A temporary file with all that comes on standard input."""
    if sys.stdin is None:
        raise ValueError(f"'{STANDARD}' is standard input. Received: none. Pass the name of a file.")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'input')
        with open(path, 'wb') as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield path


def keep_apart(written: Mapping[str, Optional[str]], read: Mapping[str, Optional[str]]) -> None:
    """Refuse if a file to be written, by option, is also read, or if two are the same: one would be lost."""
    others = dict(read)
    for option, path in written.items():
        for other, its in others.items():
            if path and its and STANDARD not in (path, its) and _same_file(path, its):
                raise Refused(f'{option} must be a different file from {other}, which would be lost. Received: {path!r}.')
        others[option] = path


def _same_file(a: str, b: str) -> bool:
    both = os.path.exists(a) and os.path.exists(b)
    return os.path.samefile(a, b) if both else os.path.realpath(a) == os.path.realpath(b)
