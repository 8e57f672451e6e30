"""What a server does for checkpoints: it says what it holds, and takes what a file holds.

`pages.Channel` asks, by the names of the methods of `Desk`.
"""
import functools
import gc
import json
import pickle
import sys
import traceback
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy

# submodules, not attributes of `mxnet`: a parameter server imports this file while `mxnet` is still being imported
from mxnet.ndarray.ndarray import NDArray, empty

from ...states.nesting import put_together, take_apart
from ..scheduler_states import export_scheduler
from .pages import BOARD, BOARD_ROWS, Page, memory

__all__ = ['WEIGHT', 'Desk', 'execute', 'update_counts']

WEIGHT = 'weight'  # the place of what MXNet keeps under the key of a parameter


def execute(server: Any, about: str, payload: bytes) -> None:
    """Do what `Channel.tell` or `Channel.ask` says. An error is kept for the next question: training may go on."""
    desk: Desk = server.desk
    arguments = json.loads(about)
    name, number, addressed = arguments.pop('call'), arguments.pop('number', None), arguments.pop('server', None)
    if addressed is not None and addressed != server.store.rank:
        return
    if name == 'more':
        desk.page.more(number, **arguments)
        return
    answer = None
    try:
        answer = getattr(desk, name)(payload, **arguments)
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        desk.failure = desk.failure or f'{type(error).__name__}: {error}\n{traceback.format_exc()}'
    if number is not None:
        desk.page.answer(number, desk.failure.encode() or answer or b'', bool(desk.failure))
        desk.failure = ''


class Desk:
    """What it takes on a `Server`.

    ``instead``
        function(key, stored) in place of updates, while a checkpoint is loaded.
    """

    def __init__(self, server: Any):
        self.server = server
        self.page = Page()
        self.instead: Optional[Callable[[int, Any], None]] = None
        self.failure = ''
        self.is_open = False
        self._board: Any = None                     # as MXNet keeps it, on the server that has it
        self._posts: Dict[int, str] = {}            # what each worker has left for another
        self._staged: Dict[int, Tuple[Mapping[str, Any], Dict[str, Any]]] = {}  # of each key: what `stage` got, and the new arrays

    # -- pages, and what workers tell each other --------------------------------------------------------------------

    def open_pages(self, payload: bytes, keys: List[int]) -> None:
        """Take the arrays that are pushed next under ``keys`` for the page and the board."""
        self.server.special.update((key, functools.partial(self._take, key)) for key in keys)
        self.is_open = True
        self.server.take_updates()

    def _take(self, key: int, pushed: Any, stored: Any) -> None:
        if key == BOARD:
            self._board = stored
        else:
            self.page.arrays[key] = stored

    def arrive(self, payload: bytes, rank: int, values: List[float]) -> None:
        """A worker is at a meeting: its number, what for, and the number again if something failed before."""
        if self._board is not None:
            memory(self._board).view('f4').reshape(BOARD_ROWS, -1)[:len(values), rank] = values

    def post(self, payload: bytes, rank: int) -> None:
        """A worker leaves a text for the first one."""
        self._posts[rank] = payload.decode()

    def posts(self, payload: bytes) -> bytes:
        """The last text that each worker left."""
        return json.dumps(self._posts).encode()

    def echo(self, payload: bytes) -> bytes:
        return payload

    # -- out of here ------------------------------------------------------------------------------------------------

    def describe(self, payload: bytes, variables: Sequence[str] = ()) -> bytes:
        """What this server holds, without the arrays. ``variables`` are what an optimizer of MXNet shares between parameters."""
        optimizer = self.server.updater.optimizer
        return json.dumps({
            'held': {key: self._describe_one(key, weight) for key, weight in self.server.weights.items()},
            'num_update': int(optimizer.num_update),
            'begin': int(optimizer.begin_num_update),
            'counts': list(update_counts(optimizer).items()),
            'shared': {**self.server.shared_state(), **{name: getattr(optimizer, name) for name in variables}},
            'scheduler': export_scheduler(optimizer.lr_scheduler),
        }).encode()

    def _describe_one(self, key: int, weight: Any) -> Dict[str, Any]:
        record = {'size': weight.size, 'dtype': numpy.dtype(weight.dtype).name}
        if key in self.server.updater.states:
            tree, arrays = take_apart(self.server.updater.states[key], NDArray)
            kinds = {place: [numpy.dtype(array.dtype).name, array.size] for place, array in arrays.items()}
            record.update(tree=tree, arrays=kinds)
        return record

    def read(self, payload: bytes, key: int, place: str, begin: int, end: int) -> bytes:
        """Bytes of an array."""
        array = self.server.weights[key] if place == WEIGHT else take_apart(self.server.updater.states[key], NDArray)[1][place]
        data: bytes = memory(array)[begin:end].tobytes()
        return data

    # -- into here --------------------------------------------------------------------------------------------------

    def hold(self, payload: bytes) -> None:
        """Update nothing: what is pushed next is no gradient."""
        self.instead = lambda key, stored: None

    def stage(self, payload: bytes, layout: Dict[str, Dict[str, Any]]) -> None:
        """Make room for the new arrays of the keys in ``layout``, as far as they are here."""
        self._staged = {}
        for key, record in layout.items():
            weight = self.server.weights.get(int(key))
            if weight is not None:
                arrays = {place: empty(size or weight.size, dtype=dtype) for place, (dtype, size) in record['arrays'].items()}
                self._staged[int(key)] = record, arrays

    def write(self, payload: bytes, key: int, place: str, begin: int) -> None:
        """Bytes of one of them."""
        memory(self._staged[key][1][place])[begin:begin + len(payload)] = numpy.frombuffer(payload, 'u1')

    def set_optimizer(self, payload: bytes) -> None:
        self.server.replace_optimizer(pickle.loads(payload))

    def install(self, payload: bytes) -> None:
        """Put the new arrays in place of the present ones when their keys are pushed next: MXNet then also rounds masters."""
        self.instead = self._install_one

    def _install_one(self, key: int, stored: Any) -> None:
        if key not in self._staged:
            return
        record, arrays = self._staged.pop(key)
        states, synced = self.server.updater.states, self.server.updater.states_synced
        if WEIGHT in arrays:
            arrays[WEIGHT].copyto(stored)
        if record['has_state']:
            states.pop(key, None)
        if record['tree'] is not None:
            states[key], synced[key] = put_together(record['tree'], lambda place, kind: arrays[place]), True

    def release(self, payload: bytes) -> None:
        """Update again."""
        self.instead, self._staged = None, {}
        gc.collect()  # what was replaced: the optimizer, which is in a cycle, has the states


def update_counts(optimizer: Any) -> Mapping[int, int]:
    """The number of updates of each parameter; MXNet's own optimizers have it for each device, of which a server has one."""
    if hasattr(optimizer, 'update_counts'):
        counts: Mapping[int, int] = optimizer.update_counts()
        return counts
    return {key: count - optimizer.begin_num_update for counts in optimizer._all_index_update_counts.values()
            for key, count in counts.items()}
