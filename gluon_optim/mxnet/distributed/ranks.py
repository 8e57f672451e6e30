"""What several workers do together: they meet, with a deadline, and tell each other what they know.

MXNet's barrier waits in C, for ever and silently, for a worker that does not come. Here each says that it has arrived, by a
command to the servers, and looks at their board until all have.
"""
import contextlib
import json
import time
import zlib
from typing import Any, Iterator, List, Optional

import numpy
from mxnet import ndarray as nd

from .lookout import give_up
from .pages import DEADLINE, Channel, deadline

__all__ = ['Ranks', 'Shared', 'agreeing', 'sharing']

LONGEST = 0.05  # seconds between two looks at the board


class Ranks:
    """The workers of a store; ``first`` in the one that reads and writes files."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.rank, self.number = channel.rank, channel.workers
        self.first = channel.rank == 0
        self._met = 0

    def meet(self, what: str, failed: bool = False) -> List[int]:
        """Wait until all workers are here, for the same purpose; those that say that they ``failed``.

        TimeoutError after the deadline, ValueError where another worker does something else.
        """
        self._met += 1
        code = float(zlib.crc32(what.encode()) >> 8)  # float32 holds so many bits
        self.channel.tell('arrive', rank=self.rank, values=[self._met, code, *[self._met] * failed])
        end, pause = time.monotonic() + deadline(), 0.0005
        while True:
            numbers, codes, failures = self.channel.board()
            if any((numbers == self._met) & (codes != code)):
                raise ValueError(f'All workers must make the same calls. Received: {what} of worker {self.rank}, another call of '
                                 f'{_words(numpy.flatnonzero((numbers == self._met) & (codes != code)))}. Nothing was changed.')
            missing = numpy.flatnonzero(numbers < self._met)
            if not missing.size:
                return [int(rank) for rank in numpy.flatnonzero(failures == self._met)]
            if time.monotonic() > end:
                give_up()
                raise TimeoutError(
                    f'All {self.number} workers must call {what}. Received: no call of {_words(missing)} within {deadline():g} s. '
                    f'Let each worker make the call, not only the first. {DEADLINE} sets the number of seconds.')
            time.sleep(pause)
            pause = min(2 * pause, LONGEST)

    def gather(self, what: str, value: Any) -> List[Any]:
        """The ``value`` of each worker, which JSON must hold, on the first; nothing on the others."""
        self.channel.tell('post', json.dumps(value).encode(), rank=self.rank)
        self.meet(what)
        if not self.first:
            return []
        posts = json.loads(self.channel.ask('posts', 0))
        return [json.loads(posts[str(rank)]) for rank in range(self.number)]

    def broadcast(self, what: str, data: bytes = b'', sender: int = 0) -> bytes:
        """The ``data`` of the worker ``sender``, on all of them."""
        received: List[bytes] = []
        size, at = len(data), 0
        while True:
            if self.rank == sender:
                piece = size.to_bytes(8, 'little') + data[at:at + self.channel.room - 8]
                self.channel.ask('echo', 0, piece)
            self.meet(what)
            if self.rank != sender:
                piece = self.channel.answer(0)
            self.meet(what)
            size, at = int.from_bytes(piece[:8], 'little'), at + len(piece) - 8
            received.append(piece[8:])
            if at >= size:
                return b''.join(received)

    def agree(self, what: str, error: Optional[BaseException] = None) -> None:
        """Raise ValueError here if another worker has an ``error``; a worker raises its own."""
        failed = self.meet(what, error is not None)
        if failed:
            text = self.broadcast(what, str(error).encode(), failed[0]).decode()
            if error is None:
                raise ValueError(f'Worker {failed[0]} refused {what}: {text}')


def _words(ranks: Any) -> str:
    return f'worker {", ".join(map(str, ranks))}'


class Shared:
    """What workers do together: ``first`` is true for one of them, and what it leaves as ``result``, which JSON must hold, all of
    them get."""

    def __init__(self, ranks: Optional[Ranks]):
        self.ranks = ranks
        self.first = ranks is None or ranks.first
        self.result: Any = None


@contextlib.contextmanager
def sharing(ranks: Optional[Ranks], what: str) -> Iterator[Shared]:
    """Where there are several workers: all enter the block and leave it together, or raise. ``what`` is the call that they make."""
    shared = Shared(ranks)
    if ranks is None:
        yield shared
        return
    nd.waitall()
    ranks.meet(what)
    with agreeing(ranks, what):
        yield shared
    shared.result = json.loads(ranks.broadcast(what, json.dumps(shared.result).encode()))


@contextlib.contextmanager
def agreeing(ranks: Optional[Ranks], what: str) -> Iterator[None]:
    """Leave the block when all workers have, and raise where one has raised."""
    try:
        yield
    except Exception as error:
        if ranks is not None:
            with contextlib.suppress(Exception):  # the first error says more
                ranks.agree(what, error)
        raise
    if ranks is not None:
        ranks.agree(what)
