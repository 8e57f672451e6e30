"""What a worker asks the servers of its store, and what they answer: commands in, pages out.

A command is text. MXNet sends it to every server and waits until each of them has executed it. The answer lies on the server's
*page*, a few small arrays of the store with keys of their own, from where the worker pulls it. Neither needs the other workers,
in dist_sync either, and neither is compressed as gradients may be. Only `Channel`, made at the start of a run, is collective: each
page is pushed once, so that Python on the server sees the array that MXNet keeps there.
"""
import base64
import ctypes
import json
import os
import pickle
import struct
import threading
import weakref
from typing import Any, Dict, Iterator, List, Optional

import numpy

# submodules, not attributes of `mxnet`: a parameter server imports this file while `mxnet` is still being imported
from mxnet import base as mx_base
from mxnet import ndarray as nd

from .lookout import give_up
from .protocol import ServerError, bound, number_of_servers

__all__ = ['BOARD', 'BOARD_ROWS', 'Channel', 'DEADLINE', 'FIRST', 'LAST', 'PIECE', 'Page', 'channel', 'deadline', 'is_open',
           'memory']

# MXNet multiplies a key by 9973 in 32 bits to choose its server, so keys end at 215 330
FIRST, LAST = 200_000, 209_999
BOARD = FIRST               # the key of what workers tell each other, see ranks.py
BOARD_ROWS = 3              # of each worker: the number of its last meeting, what for, and that of the last one with an error
PAGE = 1 << 20              # bytes of a page, at least, where MXNet does not divide small arrays
KEYS = 64                   # that one page may have
PIECE = 1 << 20             # bytes of an array that one command carries
DEADLINE = 'GLUON_OPTIM_DEADLINE'  # the environment variable with the seconds for which workers wait for each other
HEADER = struct.Struct('<qqq')  # the number of the question, whether the answer is an error, and its length


class Channel:
    """The way from this worker to the servers of ``store``; `channel` makes one, on all workers at the same time."""

    def __init__(self, store: Any):
        self.store = weakref.proxy(store)
        self.servers = number_of_servers()
        self.workers, self.rank = int(store.num_workers), int(store.rank)
        self.asynchronous = 'async' in store.type
        divided = bound()
        if divided <= BOARD_ROWS * self.workers:
            raise ValueError('MXNET_KVSTORE_BIGARRAY_BOUND must be larger than three times the number of workers. Received: '
                             f'{divided}, with {self.workers} workers. Unset it, or choose a larger one.')
        size = min(PAGE // 4, divided - 1)
        number = min(-(-PAGE // 4 // size), KEYS, max((LAST - FIRST) // self.servers, 1))
        keys = range(FIRST + 1, FIRST + 1 + self.servers * number)
        self._keys = [[key for key in keys if key * 9973 % self.servers == server] for server in range(self.servers)]
        self._page = [nd.zeros(size) for _ in range(number)]
        self.room = 4 * size * number - HEADER.size
        self._asked = 0
        self.ranks: Any = None      # of ranks.py
        opening = threading.Thread(target=self._open, args=(list(keys), size), daemon=True)  # it waits in C for all workers
        opening.start()
        opening.join(deadline())
        if opening.is_alive():
            give_up()
            raise TimeoutError(f'All {self.workers} workers must start together, in a step, or by saving or loading. Received: '
                               f'only some of them within {deadline():g} s. {DEADLINE} sets the number of seconds.')

    def _open(self, keys: List[int], size: int) -> None:
        keys = [BOARD, *keys]
        arrays = [nd.zeros(BOARD_ROWS * self.workers if key == BOARD else size) for key in keys]
        self.tell('open_pages', keys=keys)
        self.store.init(keys, arrays)  # which waits for all workers
        if self.rank == 0 or not self.asynchronous:
            self.store.push(keys, [[array] for array in arrays])
            nd.waitall()
        self.store._barrier()

    def tell(self, name: str, payload: Any = b'', **arguments: Any) -> None:
        """Have each server execute a function of held.py. It keeps an error for the next question."""
        packed = base64.b64encode(pickle.dumps((json.dumps(dict(arguments, call=name)), bytes(payload)), 4)).decode()
        # what pickle would make of a `server.Command`, in a hundredth of the time: its protocol 0 looks at each letter
        self.store._send_command_to_servers(0, f'c{__package__}.server\nreceive\n(Vask\nV{packed}\ntR.')

    def ask(self, name: str, server: Optional[int] = None, payload: Any = b'', **arguments: Any) -> Any:
        """What a function of held.py answers on ``server``, as bytes; the answers of all, in a list, where there is none.

        ServerError where one fails, or failed before.
        """
        self._asked += 1
        number = self._asked * self.workers + self.rank
        self.tell(name, payload, number=number, server=server, **arguments)
        if server is not None:
            return self._answer(server, number)
        return [self._answer(server, number) for server in range(self.servers)]

    def _answer(self, server: int, number: int) -> bytes:
        page = self.pull(server)
        found, failed, length = HEADER.unpack_from(page)
        if found != number:
            raise ServerError(f'Server {server} must answer the question {number}. Received: an answer to {found}. Its output on '
                              'stderr says why.')
        answer = [page[HEADER.size:HEADER.size + length].tobytes()]
        received = len(answer[0])
        while received < length:
            self.tell('more', server=server, number=number, begin=received)
            answer.append(self.pull(server)[HEADER.size:HEADER.size + length - received].tobytes())
            received += len(answer[-1])
        if failed:
            raise ServerError(b''.join(answer).decode())
        return b''.join(answer)

    def answer(self, server: int) -> bytes:
        """The answer, to whomever, that is on the page of ``server``, as much of it as there is room for."""
        page = self.pull(server)
        data: bytes = page[HEADER.size:HEADER.size + HEADER.unpack_from(page)[2]].tobytes()
        return data

    def pull(self, server: int) -> numpy.ndarray:
        """The page of ``server`` as it is now, as bytes."""
        self.store.pull(self._keys[server], out=self._page)
        return numpy.concatenate([array.asnumpy() for array in self._page]).view('u1')

    def board(self) -> numpy.ndarray:
        """What workers tell each other, see ranks.py."""
        board = nd.zeros(BOARD_ROWS * self.workers)
        self.store.pull(BOARD, out=board)
        return board.asnumpy().reshape(BOARD_ROWS, -1)

    def pieces(self, size: int) -> Iterator[slice]:
        """Parts of ``size`` bytes, each of which a page can hold."""
        room = self.room // 8 * 8
        for begin in range(0, size, room):
            yield slice(begin, min(begin + room, size))


_CHANNELS: 'weakref.WeakKeyDictionary[Any, Channel]' = weakref.WeakKeyDictionary()


def channel(store: Any) -> Channel:
    """The `Channel` of ``store``. The first call is collective: all workers must make it."""
    if store not in _CHANNELS:
        _CHANNELS[store] = Channel(store)
    return _CHANNELS[store]


def is_open(store: Any) -> bool:
    """Whether `channel` has been called for ``store``."""
    return store in _CHANNELS


def deadline() -> float:
    """For how many seconds a worker waits for the others."""
    given = os.environ.get(DEADLINE, '600')
    try:
        seconds = float(given)
        if seconds > 0:
            return seconds
    except ValueError:
        pass
    raise ValueError(f'{DEADLINE} must be a number of seconds above 0. Received: {given!r}.')


# On a server

def memory(array: Any) -> numpy.ndarray:
    """The bytes of a dense array on the CPU, in place, once everything that is to be done to it has been done."""
    mx_base.check_call(mx_base._LIB.MXNDArrayWaitToWrite(array.handle))
    address = ctypes.c_void_p()
    mx_base.check_call(mx_base._LIB.MXNDArrayGetData(array.handle, ctypes.byref(address)))
    size = array.size * numpy.dtype(array.dtype).itemsize
    return numpy.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (size,))


class Page:
    """The page of one server."""

    def __init__(self) -> None:
        self.arrays: Dict[int, Any] = {}    # as MXNet keeps them, by key
        self._answer = b''

    def answer(self, number: int, answer: bytes, failed: bool = False) -> None:
        """Put ``answer`` on the page, as much of it as there is room for."""
        self._answer = answer
        self._put(HEADER.pack(number, failed, len(answer)), answer)

    def more(self, number: int, begin: int) -> None:
        """Put the answer from there on the page."""
        self._put(HEADER.pack(number, 0, len(self._answer)), self._answer[begin:])

    def _put(self, head: bytes, answer: bytes) -> None:
        data, at = numpy.frombuffer(head + answer[:PAGE], 'u1'), 0
        for _, array in sorted(self.arrays.items()):
            place = memory(array)
            part = data[at:at + place.size]
            place[:part.size] = part
            at += place.size
