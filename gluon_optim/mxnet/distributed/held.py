"""What a server does for `Channel.tell` and `Channel.ask`: it says what it holds, and takes what a checkpoint holds."""
import json
import pickle
from typing import Any, Dict, List, Mapping

import numpy

# submodules, not attributes of `mxnet`: a parameter server imports this file while `mxnet` is still being imported
from mxnet.ndarray.ndarray import NDArray, empty

from ...states.nesting import put_together, take_apart
from ..native import Native
from ..scheduler_states import export_scheduler
from .pages import BOARD, BOARD_ROWS, memory

__all__ = ['arrive', 'describe', 'echo', 'hold', 'install', 'open_pages', 'post', 'posts', 'read', 'release', 'stage', 'write']

WEIGHT = 'weight'  # the place of what MXNet keeps under the key of a weight


def open_pages(updater: Any, payload: bytes, keys: List[int]) -> None:
    """Take the arrays that are pushed next under ``keys`` for the page and the board."""
    def take(key: int, pushed: Any, stored: Any) -> None:
        if key == BOARD:
            updater.board = stored
        else:
            updater.page.arrays[key] = stored
    updater.special.update(dict.fromkeys(keys, take))


def arrive(updater: Any, payload: bytes, rank: int, values: List[float]) -> None:
    """A worker is at a meeting: its number, what for, and the number again if something failed before."""
    if updater.board is not None:
        memory(updater.board).view('f4').reshape(BOARD_ROWS, -1)[:len(values), rank] = values


def post(updater: Any, payload: bytes, rank: int) -> None:
    """A worker leaves a text for the others."""
    updater.posts[rank] = payload.decode()


def posts(updater: Any, payload: bytes) -> bytes:
    """The last text that each worker left."""
    return json.dumps(updater.posts).encode()


def echo(updater: Any, payload: bytes) -> bytes:
    """Put that on the page."""
    return payload


# Out of a server

def describe(updater: Any, payload: bytes) -> bytes:
    """What this server holds, without the arrays."""
    optimizer = updater.optimizer
    held = {key: _described(updater, key) for key in updater.weights}
    return json.dumps({
        'rank': updater.rank,
        'held': held,
        'num_update': int(optimizer.num_update),
        'begin': int(optimizer.begin_num_update),
        'counts': list(_counts(optimizer).items()),
        'scheduler': export_scheduler(optimizer.lr_scheduler),
    }).encode()


def _described(updater: Any, key: int) -> Dict[str, Any]:
    weight = updater.weights[key]
    record = {'size': weight.size, 'dtype': numpy.dtype(weight.dtype).name}
    if key in updater.states:
        tree, arrays = take_apart(updater.states[key], NDArray)
        record.update(tree=tree, arrays={place: [numpy.dtype(array.dtype).name, array.size] for place, array in arrays.items()})
    return record


def _counts(optimizer: Any) -> Mapping[int, int]:
    """The number of updates of each parameter."""
    counts: Mapping[int, int] = (optimizer if hasattr(optimizer, 'update_counts') else Native(optimizer, ())).update_counts()
    return counts


def read(updater: Any, payload: bytes, key: int, place: str, begin: int, end: int) -> bytes:
    """Bytes of an array."""
    data: bytes = memory(_array(updater, key, place))[begin:end].tobytes()
    return data


def _array(updater: Any, key: int, place: str) -> Any:
    return updater.weights[key] if place == WEIGHT else take_apart(updater.states[key], NDArray)[1][place]


# Into a server

def hold(updater: Any, payload: bytes) -> None:
    """Update nothing: what is pushed next is no gradient."""
    updater.instead = lambda key, pushed, stored: None


def stage(updater: Any, payload: bytes, layout: Dict[str, Dict[str, Any]]) -> None:
    """Make room for new states, and weights, of the keys in ``layout``, as far as they are here."""
    updater.staged = {}
    for key, record in layout.items():
        weight = updater.weights.get(int(key))
        if weight is None:
            continue
        arrays = {place: empty(number or weight.size, dtype=dtype) for place, (dtype, number) in record['arrays'].items()}
        updater.staged[int(key)] = record, arrays


def write(updater: Any, payload: bytes, key: int, place: str, begin: int) -> None:
    """Bytes of one of them."""
    data = numpy.frombuffer(payload, 'u1')
    memory(updater.staged[key][1][place])[begin:begin + data.size] = data


def set_optimizer(updater: Any, payload: bytes) -> None:
    """Go on with another optimizer, as MXNet sends it, and the same states."""
    updater.set_optimizer(pickle.loads(payload))


def install(updater: Any, payload: bytes) -> None:
    """Put them in place of the present ones when their keys are pushed next: MXNet then also rounds the masters."""
    def put(key: int, pushed: Any, stored: Any) -> None:
        if key not in updater.staged:
            return
        record, arrays = updater.staged.pop(key)
        if WEIGHT in arrays:
            arrays[WEIGHT].copyto(stored)
        if record['has_state']:
            updater.states.pop(key, None)
        if record['tree'] is not None:
            updater.set_state(key, put_together(record['tree'], lambda place, kind: arrays[place]))
    updater.instead = put


def release(updater: Any, payload: bytes) -> bytes:
    """Update again."""
    updater.instead, updater.staged = None, {}
    return b''
