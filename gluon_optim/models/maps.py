"""Hand-written maps from PyTorch's names to Gluon's."""
import math
import os
from typing import Any, Dict, List, Mapping, Optional

from ..schema import check_known, one_of
from ..states import json_text
from ..states.file_part import SMALL
from .gluon import Source
from .matching import mismatch, sources_of, wanted_names, without_named
from .plan import ENTRY, GATES, RNN_ENTRY, Plan, Rnn, Shape, Take, unpacked
from .pytorch import Target

__all__ = ['check_map', 'from_map', 'read_map', 'take_dropped']

DROP = 'drop'


def read_map(names: Any) -> Dict[str, Any]:
    """A map from a dictionary or a JSON file, with its form checked."""
    if isinstance(names, (str, os.PathLike)):
        names = json_text.read(names, 'the map')
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names):
        raise TypeError("A map must be a dictionary of PyTorch's names to Gluon's. Received: "
                        f'{type(names).__name__}.')
    return dict(names)


def take_dropped(entries: Dict[str, Any], found: Source) -> List[str]:
    """Remove from a map the list of parameters that PyTorch's net lacks, and return it."""
    if not isinstance(entries.get(DROP, []), list):
        return []  # a parameter of that name
    dropped: List[str] = entries.pop(DROP, [])
    for name in dropped:
        check_known('parameter', name, found.arrays, ValueError, found.what)
    return dropped


def from_map(entries: Mapping[str, Any], found: Source) -> Plan:
    """The plan that a map describes; ValueError for invalid entries."""
    plan: Plan = {}
    room = SMALL + 2 * sum(array.nbytes for array in found.arrays.values())
    for name, value in entries.items():
        if isinstance(value, str):
            value = {'from': value}
        if not isinstance(value, Mapping) or not isinstance(value.get('from'), str):
            remedy = ' Put one of these names in its place.' if isinstance(value, Mapping) and 'choose' in value else ''
            raise ValueError(f'{name!r} in the map must be a Gluon name, or {{"from": name, ...}}. Received: {value!r}.{remedy}')
        check_known('parameter', value['from'], found.arrays, ValueError, found.what)
        packed = name == '*' or name.endswith('.*')
        for key in value:
            check_known('key', key, ['from', *(RNN_ENTRY if packed else ENTRY)], ValueError, f'{name!r} in the map')
        parts = _packed_entry(name, value, found) if packed else {name: _entry(name, value, found)}
        twice = [part for part in parts if part in plan]
        if twice:
            raise ValueError(f'The map must name each parameter once. Received twice: {twice[0]!r}.')
        plan.update(parts)
        for take in parts.values():
            room -= found.arrays[take.source].nbytes * take.repeat if take.repeat > 1 or take.ones or take.zeros else 0
        if room < 0:
            raise ValueError('What the map makes by "repeat" and "ones" must fit into twice the memory of '
                             f'{found.what} and {SMALL} bytes. Received: more, at {name!r}.')
    return plan


def _entry(name: str, value: Mapping[str, Any], found: Source) -> Take:
    array = found.arrays[value['from']]
    view, transpose, shape = (_sizes(name, value, key) for key in ('view', 'transpose', 'shape'))
    repeat = _typed(name, value, 'repeat', int, 1)
    ones, zeros = (_typed(name, value, key, bool, False) for key in ('ones', 'zeros'))
    take = Take(value['from'], 0, view, transpose, repeat, shape, ones, zeros)
    if zeros:
        if not array.ndim or take != Take(take.source, zeros=True):
            raise ValueError(f'"zeros" of {name!r} in the map makes the bias of a layer that has none, and needs only "from", its '
                             f'weight. Received: {dict(value)!r} and shape {array.shape}.')
        return take
    try:
        if take.repeat < 1 or (take.repeat > 1 and array.ndim != 1):
            raise ValueError('"repeat" must be an integer, for one-dimensional arrays')
        take._replace(repeat=1, shape=None if take.repeat > 1 else shape).of(array)
        if shape is not None and math.prod(shape) != array.size * take.repeat:
            raise ValueError(f'an array of {array.size * take.repeat} elements cannot have the shape {shape}')
    except ValueError as error:
        raise ValueError(f'{name!r} in the map cannot be made of {take.source!r}, which has shape {array.shape}: {error}. '
                         'Correct "view", "transpose", "repeat" or "shape".') from error
    return take


def _sizes(name: str, value: Mapping[str, Any], key: str) -> Optional[Shape]:
    sizes = value.get(key)
    if sizes is None:
        return None
    if not isinstance(sizes, (list, tuple)) or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f'"{key}" of {name!r} in the map must be a list of integers. Received: {sizes!r}.')
    return tuple(sizes)


def _typed(name: str, value: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    found = value.get(key, default)
    if type(found) is not kind:
        raise ValueError(f'"{key}" of {name!r} in the map must be of type {kind.__name__}. Received: {found!r}.')
    return found


def _packed_entry(name: str, value: Mapping[str, Any], found: Source) -> Plan:
    check_known('rnn', str(value.get('rnn')), GATES, ValueError, f'{name!r} in the map')
    projection = None if value.get('projection') is None else _typed(name, value, 'projection', int, 0)
    rnn = Rnn(value['rnn'], _typed(name, value, 'hidden', int, None), _typed(name, value, 'layers', int, 1),
              _typed(name, value, 'bidirectional', bool, False), projection)
    if min(rnn.hidden, rnn.layers, projection or 1) < 1:
        raise ValueError(f'The sizes of {name!r} in the map must be 1 or more. Received: {dict(value)!r}.')
    return unpacked(name[:-1], Take(value['from'], rnn=rnn), found.arrays[value['from']].size)


def check_map(plan: Plan, dropped: List[str], found: Source, target: Optional[Target]) -> bool:
    """Whether a map is complete. ValueError where it does not fit, or leaves something on one side only."""
    if target is not None:
        for name in plan:
            check_known('parameter', name, target.shapes, ValueError, target.what)
    used, given_up = sources_of(plan), set(dropped)
    kept = [name for name in dropped if name in used]
    if kept:
        raise ValueError(f'The map must name or drop a parameter, not both. Received both: {one_of(kept)}. Take it out of '
                         f'"{DROP}", or out of the map.')
    tied = {} if target is None else target.tied
    both = {**found.shared, **{name: first for name, first in found.alike.items()
                               if {name, first} & {plan[place].source for place in (*tied, *tied.values()) if place in plan}}}
    there = used | {both[name] for name in used if name in both}
    unused = [name for name in found.arrays if name not in there and name not in given_up and both.get(name) not in used]
    missing = [] if target is None else wanted_names(without_named(plan, target))
    if unused and not missing:
        raise ValueError(f'The map must name all parameters of {found.what}. Left over: {one_of(unused)}. Map them, or list them '
                         f'under "{DROP}".')
    if target is None:
        return True
    if missing and not unused:
        raise ValueError(f'The map must name all parameters of {target.what}. Missing: {one_of(missing)}.')
    for name, take in plan.items():
        shape = take.of(found.arrays[take.source]).shape
        if shape != target.shapes[name]:
            raise ValueError(mismatch(name, take.source, shape, target))
    return not missing
