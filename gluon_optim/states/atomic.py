"""Files that appear whole or not at all: written under another name in the same folder, synchronised, and renamed."""
import contextlib
import errno
import os
import re
import secrets
import stat
from types import ModuleType
from typing import BinaryIO, Iterator, List, Optional, Tuple

from .errors import StateFileError
from .files import Path
from .progress import written

fcntl: Optional[ModuleType]
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ['Path', 'numbers_in', 'remove_leftovers', 'replacing', 'set_aside']

_BUFFER = 1 << 20


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends, and vanishes when it fails.

    Raises OSError where the file system refuses. One that says that the file is in its place is about its folder, which could not
    be synchronised.
    """
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    mode = _mode_of(path)
    claim: Optional[int] = None
    temporary = path
    try:
        temporary, descriptor, claim = _created(folder, name, 0o666 if mode is None else mode)
        with written(descriptor, _BUFFER) as file:
            if mode is not None:
                os.chmod(temporary, mode)  # the umask may have taken some of it away
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and str(error.filename or '.tmp').endswith('.tmp'):
            error.filename = path  # 'No space left on device', and where
        if temporary != path:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise
    finally:
        if claim is not None:
            os.close(claim)
    try:
        _sync_folder(folder)
    except OSError as error:
        raise OSError(error.errno, f'{error.strerror}: the file is in its place, whole, but its folder could not be synchronised: '
                      'a power cut may bring the old one back', path) from error


def _created(folder: str, name: str, mode: int) -> Tuple[str, int, Optional[int]]:
    """A new temporary file, at most as open as ``mode``: its path, descriptor and claim."""
    while True:
        temporary = os.path.join(folder, f'.{name[:64]}.{secrets.token_hex(8)}.tmp')
        # not tempfile.mkstemp: the kernel applies the umask to this one
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, 'O_BINARY', 0), mode)
        claim, taken = _claim(descriptor)
        if not taken and (fcntl is None or os.fstat(descriptor).st_nlink):
            return temporary, descriptor, claim
        # somebody who cleans up saw the file before it was claimed, and deletes it
        os.close(descriptor)
        if claim is not None:
            os.close(claim)


def _claim(descriptor: int) -> Tuple[Optional[int], bool]:
    """A second descriptor, which marks a temporary file as its writer's until it is closed, or the writer dies; and whether
    somebody else has it.

    None where the file system knows no locks, and on Windows, which keeps files that are open.
    """
    if fcntl is None:
        return None, False
    claim = os.dup(descriptor)
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(claim)
        return None, error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return claim, False


def numbers_in(folder: Path, of: 're.Pattern[str]') -> List[int]:
    """The numbers, in ascending order, in the names of the files in ``folder`` that match ``of``; none if there is no folder."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_file()]
    except FileNotFoundError:
        return []
    return sorted({int(match[1]) for match in map(of.fullmatch, names) if match})


def set_aside(path: str) -> None:
    """Rename a file so that its number is not found any more, if it is still there; nothing deletes it."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, path + '.abandoned')


def remove_leftovers(folder: Path, of: 're.Pattern[str]') -> None:
    """Delete what killed writers left of files in ``folder`` whose names match ``of``; what a living one writes stays."""
    for name in os.listdir(folder):
        match = re.fullmatch(r'\.(.*)\.[0-9a-f]{16}\.tmp', name)
        if match is None or not of.fullmatch(match[1]):
            continue
        with contextlib.suppress(OSError):  # its writer may finish, or another process clean up, at this moment
            temporary = os.path.join(folder, name)
            with open(temporary, 'r+b') as file:
                claim, _ = _claim(file.fileno())
            if claim is not None or fcntl is None:
                os.unlink(temporary)
            if claim is not None:
                os.close(claim)


def _mode_of(path: str) -> Optional[int]:
    """The permission bits of the file at ``path``, None if there is none."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise StateFileError(f'Cannot write {path!r}: it must be a file or not exist. Received: a folder or a device.')
    return stat.S_IMODE(mode)


def _sync_folder(folder: str) -> None:
    """Make the renaming durable, where folders can be synchronised."""
    if not hasattr(os, 'O_DIRECTORY'):
        return  # Windows
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
