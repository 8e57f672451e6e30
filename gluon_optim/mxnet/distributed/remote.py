"""The states on servers, as this worker sees them: arrays that are read when they are asked for, and the way back."""
import copy
import json
import os
import pickle
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import mxnet
import numpy
from mxnet import ndarray as nd

from ...schema import Slot, Values
from ...states.model import OptimizerStates, ParameterInfo
from ...states.nesting import put_together, take_apart
from ..native import Builtin, Elsewhere, Stranger, adapted
from ..optimizer import Runner
from .held import WEIGHT
from .pages import PIECE, Channel, channel, is_open
from .protocol import ServerError
from .ranks import Ranks
from .worker import session

__all__ = ['Held', 'Load', 'Remote', 'held_by', 'load_of', 'on_servers', 'pull', 'ranks_of', 'send']


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
        raise ValueError('At most one trainer may update its weights on parameter servers. Received: several, which would '
                         'overwrite the weights of each other there. Create all but one with update_on_kvstore=False.')
    trainer, = there
    store = store_of(trainer)
    seen = is_open(store)
    ranks = ranks_on(channel(store))
    if trainer._kv_initialized and not seen:
        _show_weights(trainer, ranks, 'the start')
        _release(ranks, 'the start')
    return ranks


def ranks_on(way: Channel) -> Ranks:
    """The workers that use ``way``: one object, for it counts their meetings."""
    if way.ranks is None:
        way.ranks = Ranks(way)
    ranks: Ranks = way.ranks
    return ranks


# Out of servers

class Part(NamedTuple):
    """What one server has of an array."""

    server: int
    size: int   # in elements


class Remote(Elsewhere):
    """An array that is on servers, each of which may have a part of it; read when it is asked for."""

    def __init__(self, way: Channel, key: int, place: str, dtype: Any, parts: Sequence[Part], shape: Tuple[int, ...],
                 copies: Sequence[Part] = ()):
        self.shape, self.dtype = shape, numpy.dtype(dtype)
        self._way, self._key, self._place, self._parts, self._copies = way, key, place, parts, copies

    def reshape(self, shape: Tuple[int, ...]) -> 'Remote':
        return Remote(self._way, self._key, self._place, self.dtype, self._parts, shape)

    def first_part(self) -> 'Remote':
        """The array of the first server, where each has one of its own."""
        return Remote(self._way, self._key, self._place, self.dtype, self._parts[:1], (self._parts[0].size,), self._parts[1:])

    def check_copies(self, name: str) -> None:
        """Raise ServerError where this is the `first_part`, and other servers have something else."""
        for part in self._copies:
            other = Remote(self._way, self._key, self._place, self.dtype, [part], (part.size,))
            if other.asnumpy().tobytes() != self.asnumpy().tobytes():
                raise ServerError(f'The state of {name} must be divided like the weight, or the same on all servers. Received: '
                                  f'different arrays of {part.size} elements at {self._place} on servers '
                                  f'{self._parts[0].server} and {part.server}. Use one server, or a larger '
                                  'MXNET_KVSTORE_BIGARRAY_BOUND.')

    def chunks(self) -> Iterator[numpy.ndarray]:
        """The elements in pieces, in order."""
        for server, size in self._parts:
            for piece in self._way.pieces(size * self.dtype.itemsize):
                answer = self._way.ask('read', server, key=self._key, place=self._place, begin=piece.start, end=piece.stop)
                yield numpy.frombuffer(answer, self.dtype)

    def asnumpy(self) -> numpy.ndarray:
        return numpy.concatenate(list(self.chunks())).reshape(self.shape)


class Held(NamedTuple):
    """What servers hold."""

    optimizer: Any                          # what `adapted` gives, with their counts
    scheduler: Optional[Dict[str, Any]]     # as `export_scheduler` gives it
    states: Dict[int, Any]                  # by key, in MXNet's form, of `Remote` arrays


def held_by(trainer: Any, infos: Sequence[ParameterInfo]) -> Held:
    """The states of ``trainer`` on its servers."""
    way = channel(trainer._kvstore)
    nd.waitall()
    native = adapted(trainer._optimizer, [mxnet.cpu()])
    variables = native.twin.declared.variables if isinstance(native, Builtin) else ()
    records = [json.loads(answer) for answer in way.ask('describe', variables=variables)]
    counted = {key for record in records for key, _ in record['counts']}
    lost = [info.name for key, info in enumerate(infos) if key in counted and not any(str(key) in one['held'] for one in records)]
    if lost:
        raise ServerError(f'Servers must hold all parameters that they have updated. Received: none that holds {lost[:4]}. '
                          'Nothing was saved. Let all workers save before the first step too.')
    optimizer = _as_there(trainer, records)
    h = optimizer.hyperparameters()
    states = {}
    for key, info in enumerate(infos):
        owners = [(server, record['held'][str(key)]) for server, record in enumerate(records)
                  if 'tree' in record['held'].get(str(key), ())]
        if owners:
            states[key] = _state(way, optimizer, key, info, owners, h)
    return Held(optimizer, max(records, key=_progress)['scheduler'], states)


def _progress(record: Mapping[str, Any]) -> int:
    return int(record['num_update'])


def _as_there(trainer: Any, records: Sequence[Mapping[str, Any]]) -> Any:
    """The optimizer with what servers have counted, each of them for the parameters that it has."""
    latest = max(records, key=_progress)
    optimizer = copy.copy(trainer._optimizer)
    if not isinstance(optimizer, Runner):
        vars(optimizer).update(latest['shared'])
    optimizer = adapted(optimizer, [mxnet.cpu()])
    counts: Dict[int, int] = {}
    for record in records:
        for key, count in record['counts']:
            counts[key] = max(count, counts.get(key, 0))
    optimizer.begin_num_update = latest['begin']
    optimizer.set_update_counts(counts, latest['num_update'])
    if isinstance(optimizer, Runner):
        optimizer.set_shared_state(latest['shared'])
    return optimizer


def _state(way: Channel, optimizer: Any, key: int, info: ParameterInfo, owners: Sequence[Tuple[int, Any]], h: Values) -> Any:
    """The state of a parameter, as it would be in this process, with a `Remote` for each array."""
    weight = [Part(server, record['size']) for server, record in owners]
    tree = owners[0][1]['tree']
    if any(record['tree'] != tree for _, record in owners):
        raise ServerError(f'The states of {info.name} must nest alike on all servers. Received: {owners!r}.')

    def array(place: str, kind: str) -> Remote:
        parts = [Part(server, record['arrays'][place][1]) for server, record in owners]
        remote = Remote(way, key, place, owners[0][1]['arrays'][place][0], parts, info.shape)
        return remote if parts == weight else remote.first_part()

    nest = put_together(tree, array)
    master = None
    if optimizer.multi_precision and info.dtype == 'float16':
        master = Remote(way, key, WEIGHT, 'float32', weight, info.shape)
    if isinstance(optimizer, Stranger):
        for remote in take_apart(nest, Remote)[1].values():
            remote.check_copies(info.name)
        return nest if master is None else (master, nest)
    slots, _ = optimizer.split_state(nest, h, False)
    slots = tuple(remote.first_part() if slot.like == 'scalar' else remote for slot, remote in zip(optimizer.rule.slots(h), slots))
    return optimizer.join_state(slots, master, h)


# Into servers

class Sent(NamedTuple):
    """An array on its way to the servers."""

    values: numpy.ndarray
    scalar: bool = False    # each server gets it, otherwise its part


class Load(NamedTuple):
    """What servers get, under the keys of parameters."""

    states: Dict[int, Any]                  # in MXNet's form, of `Sent`; None for a parameter that has none
    weights: Dict[int, numpy.ndarray]


def load_of(optimizer: Any, states: OptimizerStates, pairs: Mapping[int, ParameterInfo], slots: Sequence[Slot], h: Values) -> Load:
    """The saved ``states`` for servers, where a float32 weight is the master."""
    nests: Dict[int, Any] = {}
    masters: Dict[int, numpy.ndarray] = {}
    for key, info in pairs.items():
        nests[key] = None
        if info.name in states.master:
            masters[key] = states.master[info.name]
        arrays = states.slots.get(info.name)
        if arrays is None:
            continue
        if isinstance(optimizer, Stranger):
            size = int(numpy.prod(info.shape, dtype='int64'))
            given = {place: Sent(array, array.size != size) for place, array in arrays.items()}
            nest = put_together(states.trees[info.name], _From(given))
            if optimizer.multi_precision and info.dtype == 'float16':
                master, nest = nest
                masters[key] = master.values
        else:
            nest = optimizer.join_state(tuple(Sent(arrays[slot.name], slot.like == 'scalar') for slot in slots), None, h)
        nests[key] = nest
    return Load(nests, masters)


class _From(Dict[str, Sent]):
    """Arrays by place, for `put_together`."""

    def __call__(self, place: str, kind: str) -> Sent:
        return self[place]


def send(trainer: Any, load: Load) -> None:
    """Put ``load`` on the servers of ``trainer``, with its optimizer, and pull all weights.

    All workers call it; what the first has counts. Until all of it is on the servers, nothing is changed there.
    """
    ranks, what = ranks_on(channel(trainer._kvstore)), 'the loading of states'
    _show_weights(trainer, ranks, what)
    error = None
    if ranks.first:
        try:
            _stage(trainer, ranks.channel, load)
        except Exception as problem:
            ranks.channel.ask('release')
            error = problem
    ranks.agree(what, error)
    if error is not None:
        raise error
    _push_all(trainer, ranks)
    ranks.meet(what)
    _release(ranks, what)
    pull(trainer)
    servers = session(trainer._kvstore)
    if servers is not None:
        servers.note()


def pull(trainer: Any) -> None:
    """Give this worker the weights that are on the servers of ``trainer``."""
    for key, parameter in _sendable(trainer):
        trainer._kvstore.pull(key, out=parameter.list_data())
    nd.waitall()


def _sendable(trainer: Any) -> List[Tuple[int, Any]]:
    return [(key, parameter) for key, parameter in enumerate(trainer._params) if parameter not in trainer._params_to_init]


def _show_weights(trainer: Any, ranks: Ranks, what: str) -> None:
    """Let servers see the arrays that MXNet keeps, which it may have updated itself so far. They update nothing until 'release'."""
    if ranks.first:
        ranks.channel.tell('hold')
    ranks.meet(what)
    _push_all(trainer, ranks)
    ranks.meet(what)


def _release(ranks: Ranks, what: str) -> None:
    """Let servers update again, before any worker goes on."""
    if ranks.first:
        ranks.channel.ask('release')
    ranks.meet(what)


def _push_all(trainer: Any, ranks: Ranks) -> None:
    """Push something under the key of each weight, which servers take for a signal."""
    if ranks.first or not ranks.channel.asynchronous:
        for key, parameter in _sendable(trainer):
            trainer._kvstore.push(key, parameter.list_data())
        nd.waitall()


def _stage(trainer: Any, way: Channel, load: Load) -> None:
    """Send everything to the servers, for them to take at the next push."""
    held = [json.loads(answer)['held'] for answer in way.ask('describe')]
    layout: Dict[int, Dict[str, Any]] = {}
    sent: Dict[int, Dict[str, Sent]] = {}
    for key in sorted({*load.states, *load.weights}):
        tree, arrays = take_apart(load.states[key], Sent) if load.states.get(key) is not None else (None, {})
        kinds = {place: [numpy.dtype(array.values.dtype).name, 1 if array.scalar else None] for place, array in arrays.items()}
        if key in load.weights:
            dtype = next(record[str(key)]['dtype'] for record in held if str(key) in record)
            arrays[WEIGHT], kinds[WEIGHT] = Sent(load.weights[key].astype(dtype, copy=False)), [dtype, None]
        layout[key], sent[key] = {'has_state': key in load.states, 'tree': tree, 'arrays': kinds}, arrays
    way.tell('stage', layout=layout)
    for key, arrays in sent.items():
        sizes = [record.get(str(key), {'size': 0})['size'] for record in held]
        for place, (values, scalar) in arrays.items():
            data = numpy.ascontiguousarray(values).reshape(-1).view('u1')
            begin = 0
            for server, size in enumerate(sizes):
                end = data.size if scalar else begin + size * values.dtype.itemsize
                for at in range(begin, end if size else begin, PIECE):
                    way.tell('write', data[at:min(at + PIECE, end)], server=server, key=key, place=place, begin=at - begin)
                begin = 0 if scalar else end
    optimizer = trainer._optimizer
    way.tell('set_optimizer', pickle.dumps(optimizer.for_servers() if hasattr(optimizer, 'for_servers') else optimizer))
    way.tell('install')
    way.ask('echo')  # raises what failed on a server
