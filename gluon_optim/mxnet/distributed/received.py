"""What a file holds, for the workers that do not read it."""
import json
from typing import Any, Callable, Mapping, Optional, Tuple

import numpy

from ...states.container import outline
from ...states.manifest import key_in, parts_of, weight_keys
from ...states.model import Parts
from . import remote
from .ranks import Ranks, agreeing

__all__ = ['hollow', 'is_hollow', 'received']

SMALL = 64  # bytes: of an array that is sent whatever it is


def hollow(shape: Tuple[int, ...], dtype: Any) -> numpy.ndarray:
    """What stands for an array that is on servers: without memory."""
    return numpy.broadcast_to(numpy.zeros((), dtype), shape)


def is_hollow(array: Any) -> bool:
    return isinstance(array, numpy.ndarray) and array.nbytes > SMALL and not any(array.strides)


def received(ranks: Optional[Ranks], what: str, trainers: Mapping[str, Any], read: Callable[[], Tuple[Optional[Parts], str]]
             ) -> Tuple[Any, str]:
    """What ``read`` gives, the parts of a file or None, and its path; only the first worker calls it, and all get it.

    Slots, masters and weights of a trainer on servers come from there: on the other workers they are `hollow`.
    """
    if ranks is None:
        return read()
    ranks.meet(what)
    parts, path = None, ''
    with agreeing(ranks, what):
        if ranks.first:
            parts, path = read()
    if not ranks.first:
        return _take(ranks, what)
    manifest, arrays = outline(parts) if parts is not None else (None, {})
    there = _on_servers(parts, trainers)
    sent = [key for key, array in arrays.items() if key not in there or array.nbytes <= SMALL]
    about = {'path': path, 'manifest': manifest, 'sent': sent,
             'arrays': {key: [array.dtype.name, array.shape] for key, array in arrays.items()}}
    ranks.broadcast(what, json.dumps(about).encode())
    if parts is not None:
        ranks.broadcast(what, b''.join(numpy.ascontiguousarray(arrays[key]).tobytes() for key in sent))
    return parts, path


def _take(ranks: Ranks, what: str) -> Tuple[Any, str]:
    about = json.loads(ranks.broadcast(what))
    if about['manifest'] is None:
        return None, about['path']
    arrays = {key: hollow(tuple(shape), dtype) for key, (dtype, shape) in about['arrays'].items()}
    data, at = ranks.broadcast(what), 0
    for key in about['sent']:
        array = arrays[key]
        arrays[key] = numpy.frombuffer(data, array.dtype, array.size, at).reshape(array.shape)
        at += array.nbytes
    return parts_of(about['manifest'], arrays), about['path']


def _on_servers(parts: Optional[Parts], trainers: Mapping[str, Any]) -> Any:
    """The keys of arrays that workers get from servers: of parameters of a trainer that is there."""
    keys = set()
    for name, trainer in trainers.items():
        if parts is None or trainer is None or name not in parts or not remote.on_servers(trainer):
            continue
        states, run = parts[name]
        for parameter in states.names:
            keys |= {key_in(name, f'{parameter}/{slot}') for slot in (*states.slots.get(parameter, ()), 'master')}
        for weight in run.weights if run else ():
            if weight.name in set(states.names):
                keys |= {key_in(name, key) for key in weight_keys(weight.name, len(weight.copies))}
    return keys
