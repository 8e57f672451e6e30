"""Files that appear completely or not at all: written under a temporary name in the same folder, synced, and renamed."""
import contextlib
import errno
import os
import re
import secrets
import stat
from types import ModuleType
from typing import BinaryIO, Iterator, Optional

from .errors import StateFileError
from .files import Path
from .progress import written

fcntl: Optional[ModuleType]
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ['Path', 'remove_leftovers', 'replacing']

_BUFFER = 1 << 20


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces ``path`` when the block ends, or is deleted if the block fails."""
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    mode = _mode_of(path)
    temporary = os.path.join(folder, f'.{name[:64]}.{secrets.token_hex(8)}.tmp')
    claim = None
    try:
        # not tempfile.mkstemp: the kernel applies the umask to this one
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, 'O_BINARY', 0), 0o666)
        with written(descriptor, _BUFFER) as file:
            claim = _claim(descriptor)
            if mode is not None:
                os.chmod(temporary, mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename in (None, temporary):
            error.filename = path  # so that 'No space left on device' says where
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        if claim is not None:
            os.close(claim)
    _sync_folder(folder)


def _claim(descriptor: int) -> Optional[int]:
    """A second descriptor, which marks a temporary file as in use until it is closed or its writer dies.

    None if another process holds it, if the file system has no locks, and on Windows, which does not delete open files.
    """
    if fcntl is None:
        return None
    claim = os.dup(descriptor)
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(claim)
        return None
    return claim


def remove_leftovers(folder: Path, of: 're.Pattern[str]') -> None:
    """Delete the temporary files that killed writers left in ``folder`` for names matching ``of``, but none still being written."""
    for name in os.listdir(folder):
        match = re.fullmatch(r'\.(.*)\.[0-9a-f]{16}\.tmp', name)
        if match is None or not of.fullmatch(match[1]):
            continue
        with contextlib.suppress(OSError):  # its writer may finish, or another process may clean up, at this moment
            temporary = os.path.join(folder, name)
            with open(temporary, 'r+b') as file:
                claim = _claim(file.fileno())
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
        raise StateFileError(f'Cannot write {path!r}: it must be a file, or must not exist. Received: a folder or a device.')
    return stat.S_IMODE(mode)


def _sync_folder(folder: str) -> None:
    """Make the rename durable, where folders can be synced."""
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
