"""Watching the progress of reading or writing, for progress bars: files are opened with `opened` and `written`."""
import contextlib
import contextvars
import io
import os
from typing import Any, BinaryIO, Callable, Dict, Iterator, Optional

__all__ = ['opened', 'watched', 'written']

Watcher = Optional[Callable[[int], Any]]
_watchers: 'Dict[str, contextvars.ContextVar[Watcher]]' = {
    way: contextvars.ContextVar(way, default=None) for way in ('read', 'write')}


@contextlib.contextmanager
def watched(watcher: Callable[[int], Any], way: str = 'read') -> Iterator[None]:
    """Inside the block, ``watcher`` is called with the number of bytes of each read from a state file, or each 'write'."""
    token = _watchers[way].set(watcher)
    try:
        yield
    finally:
        _watchers[way].reset(token)


def opened(path: Any) -> BinaryIO:
    """``open(path, 'rb')`` that does not wait if ``path`` is a pipe; watched if there is a watcher."""
    watcher = _watchers['read'].get()
    if watcher is None:
        return open(path, 'rb', opener=_without_waiting)
    return io.BufferedReader(_Watched(path, 'rb', watcher, opener=_without_waiting))


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, 'O_NONBLOCK', 0))


def written(descriptor: int, buffer: int) -> BinaryIO:
    """``os.fdopen(descriptor, 'wb', buffer)``, watched if there is a watcher."""
    watcher = _watchers['write'].get()
    raw = io.FileIO(descriptor, 'wb') if watcher is None else _Watched(descriptor, 'wb', watcher)
    return io.BufferedWriter(raw, buffer)


class _Watched(io.FileIO):
    def __init__(self, file: Any, mode: str, watcher: Callable[[int], Any], **options: Any):
        super().__init__(file, mode, **options)
        self._watcher = watcher

    def readinto(self, buffer: Any) -> Optional[int]:
        size = super().readinto(buffer)
        self._watcher(size or 0)
        return size

    def write(self, data: Any) -> int:
        size = super().write(data) or 0
        self._watcher(size)
        return size
