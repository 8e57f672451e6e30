"""The states on servers, as this worker sees them: arrays that are read when they are asked for, and the way back."""
import base64
import copy
import itertools
import json
import os
import pickle
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import mxnet
import numpy
from mxnet import ndarray as nd

from ...schema import Values, some_of
from ...states.model import OptimizerStates, ParameterInfo
from ...states.nesting import put_together, take_apart
from ..native import Stranger, adapted
from ..typing import TrainerLike
from .held import WEIGHT
from .pages import PIECE, Channel, ServerError, channel
from .ranks import Ranks

__all__ = ['Held', 'Remote', 'held_by', 'on_servers', 'ranks_of', 'send', 'store_of']


def on_servers(trainer: Any) -> bool:
    """Whether the weights of ``trainer`` are, or will be, updated on parameter servers."""
    if trainer._kv_initialized:
        return bool(trainer._distributed and trainer._update_on_kvstore)
    if not hasattr(trainer, '_kvstore_params'):
        return False
    store, given = (trainer._kvstore_params.get(name) for name in ('kvstore', 'update_on_kvstore'))
    kind = str(getattr(store, 'type', store))
    if given is None:
        given = 'async' in kind or os.environ.get('MXNET_UPDATE_ON_KVSTORE', '1') != '0'
    return 'dist' in kind and bool(given)


def store_of(trainer: Any) -> Any:
    """The kvstore of a trainer whose weights are on servers: made here where its first step would make it."""
    if trainer._kvstore is not None:
        return trainer._kvstore
    if isinstance(trainer._kvstore_params['kvstore'], str):
        trainer._kvstore_params['kvstore'] = mxnet.kv.create(trainer._kvstore_params['kvstore'])
    return trainer._kvstore_params['kvstore']


def ranks_of(trainers: Iterable[Any]) -> Optional[Ranks]:
    """The workers, where one of ``trainers`` has its weights on servers. ValueError where more than one has."""
    there = [trainer for trainer in trainers if trainer is not None and on_servers(trainer)]
    if not there:
        return None
    if len(there) > 1:
        raise ValueError('At most one trainer may update its weights on parameter servers. Received: several, which would overwrite '
                         'the weights of each other there. Create all but one with update_on_kvstore=False.')
    way = channel(store_of(there[0]))
    if way.ranks is None:
        way.ranks = Ranks(way)
    return way.ranks


# Out of servers

class Part(NamedTuple):
    """What one server has of an array."""

    server: int
    size: int   # in elements


class Remote:
    """An array that is on servers, each of which may have a part of it; read when it is asked for."""

    def __init__(self, way: Channel, key: int, place: str, dtype: str, parts: Sequence[Part], shape: Tuple[int, ...]):
        self.shape, self.dtype = shape, numpy.dtype(dtype)
        self._way, self._key, self._place, self._parts = way, key, place, parts

    def asnumpy(self) -> numpy.ndarray:
        return self.read(0, sum(part.size for part in self._parts)).reshape(self.shape)

    def read(self, begin: int, end: int) -> numpy.ndarray:
        """The elements from ``begin`` to ``end``, flat."""
        values = numpy.empty(end - begin, self.dtype)
        data, width = values.view('u1'), self.dtype.itemsize
        first = at = 0
        for server, size in self._parts:
            for piece in self._way.pieces((min(end, first + size) - max(begin, first)) * width):
                start = (max(begin, first) - first) * width
                answer = self._way.ask('read', server, key=self._key, place=self._place,
                                       begin=start + piece.start, end=start + piece.stop)
                data[at:at + len(answer)] = numpy.frombuffer(answer, 'u1')
                at += len(answer)
            first += size
        return values


class Held(NamedTuple):
    """What servers hold: the optimizer as it is there, and the states by key, in MXNet's form."""

    optimizer: Any
    states: Dict[int, Any]


def held_by(trainer: Any, infos: Sequence[ParameterInfo]) -> Held:
    """The states of ``trainer`` on its servers."""
    way = channel(trainer._kvstore)
    nd.waitall()
    records = [json.loads(answer) for answer in way.ask('describe')]
    optimizer = _as_there(trainer, records)
    h = optimizer.hyperparameters()
    states = {}
    for key, info in enumerate(infos):
        owners = [(server, record['held'][str(key)]) for server, record in enumerate(records)
                  if 'tree' in record['held'].get(str(key), ())]
        if owners:
            states[key] = _state(way, optimizer, key, info, owners, h)
    return Held(optimizer, states)


def _as_there(trainer: Any, records: Sequence[Mapping[str, Any]]) -> Any:
    """The optimizer with what servers have counted: of each parameter one of them is as far as the run is, of the rate all that
    have parameters to update."""
    latest = max(records, key=lambda record: record['num_update'])
    optimizer = adapted(copy.copy(trainer._optimizer), [mxnet.cpu()])
    counts: Dict[int, int] = {}
    for record in records:
        for key, count in record['counts']:
            counts[key] = max(count, counts.get(key, 0))
    optimizer.begin_num_update = latest['begin']
    optimizer.set_update_counts(counts, latest['num_update'])
    return optimizer


def _state(way: Channel, optimizer: Any, key: int, info: ParameterInfo, owners: Sequence[Tuple[int, Any]], h: Values) -> Any:
    """The state of a parameter, as it would be in this process, with a `Remote` for each array."""
    weight = [Part(server, record['size']) for server, record in owners]
    tree = owners[0][1]['tree']
    if any(record['tree'] != tree for _, record in owners):
        raise ServerError(f'The states of {info.name} must nest alike on all servers. Received: {owners!r}.')

    def array(place: str, kind: str) -> Remote:
        parts = [Part(server, record['arrays'][place][1]) for server, record in owners]
        return Remote(way, key, place, owners[0][1]['arrays'][place][0], parts, info.shape if parts == weight else (parts[0].size,))

    nest = put_together(tree, array)
    master = None
    if optimizer.multi_precision and info.dtype == 'float16':
        master = Remote(way, key, WEIGHT, 'float32', weight, info.shape)
    if isinstance(optimizer, Stranger):
        return nest if master is None else (master, nest)
    slots, _ = optimizer.split_state(nest, h, False)
    for slot, remote in zip(optimizer.rule.slots(h), slots):
        if slot.like == 'scalar':
            remote._parts, remote.shape = remote._parts[:1], (1,)
    return optimizer.join_state(slots, master, h)


# Into servers

class _Sent(NamedTuple):
    """An array on its way to the servers."""

    values: numpy.ndarray
    scalar: bool = False


def send(trainer: Any, ranks: Ranks, states: Mapping[int, Any], weights: Mapping[int, numpy.ndarray]) -> None:
    """Put states, in the form of `_Sent`, and weights under their keys on the servers of ``trainer``, and pull all weights.

    All workers call it; the arrays of the first count.
    """
