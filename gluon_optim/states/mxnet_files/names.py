"""Which state of a `.states` file belongs to which parameter: those files hold indices in a trainer, not names."""
import dataclasses
import os
import re
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy

from ...schema import one_of
from ..model import STATISTICS, ParameterInfo

__all__ = ['Assignment', 'Params', 'assign', 'renumbered']

Params = Union[str, 'os.PathLike[str]', Sequence[str], Mapping[str, Any], None]
_REMEDY = ('Pass the names as a list in the order of the trainer, which is [p.name for p in trainer._params] where MXNet runs, or '
           'a file of net.collect_params().save(...), which has the names that the trainer sorts.')
Shape = Optional[Tuple[int, ...]]  # None: unknown


_COUNTED = re.compile(r'([A-Za-z_]*[A-Za-z])(\d+)_')  # dense36_weight: MXNet 1.x counts the layers of a process


class Assignment(NamedTuple):
    infos: List[ParameterInfo]   # in the trainer's order; dtype '' if unknown
    keys: List[Any]              # the key of each one's state in the file, None if it has none
    report: List[str]


def assign(shapes: Mapping[Any, Shape], params: Params, idx2name: Mapping[Any, str], versions: Sequence[int],
           read_params: Callable[[Any], Dict[str, Any]], copies: bool = False) -> Assignment:
    """Assign names to the keys of ``shapes``, the shapes of the weights inferred from their states.

    ``idx2name`` holds names from the file, if any; ``versions`` lists the MXNet versions that may have written it. ``params``
    is as in `read_states`. ``copies``: the file may have one state per device, like Module's files.

    Raises TypeError or ValueError if ``params`` has the wrong type, does not fit, or does not settle the question.
    """
    keys = list(shapes)
    if params is None:
        return _without(keys, shapes, idx2name)
    in_order = isinstance(params, Mapping)  # a parameter file does not have a trainer's order
    if isinstance(params, (str, os.PathLike)):
        params = read_params(params)
    infos = _infos(params)
    if any(isinstance(key, str) for key in keys):
        return _by_name(infos, shapes)
    places, report = _places(keys, len(infos), shapes) if copies else ({key: key for key in keys}, [])
    orders = _orders(infos, versions, in_order) if isinstance(params, Mapping) else [infos]
    fitting = [order for order in orders if not _misfit(order, places, shapes)]
    if not fitting and 1 in versions and isinstance(params, Mapping):
        fitting = [order for order in _from_new_processes(orders) if not _misfit(order, places, shapes)]
    if not fitting:
        raise ValueError(f'`params` must be the parameters of the trainer that wrote the states. Received: {len(infos)} '
                         f'parameters, which do not fit: {_misfit(orders[0], places, shapes)}. {_REMEDY}')
    order = fitting[0]
    rivals = [order[place].name for other in fitting for place in places.values() if other[place].name != order[place].name]
    if rivals:
        raise ValueError(f'`params` must settle which state belongs to which parameter. Received: names among which {rivals[0]!r} '
                         'and others of its shape could be swapped: the states fit both their given order and sorted order. '
                         + _REMEDY)
    if isinstance(params, Mapping) and 1 in versions:
        report += _check_places(infos, shapes)
    at = {place: key for key, place in places.items()}
    report += _from_zero([info.name for info in order]) if 1 in versions else []
    if isinstance(params, Mapping):
        which = 'the order of `params`' if order is infos else 'the order of sorted names, as in trainers'
        report.append(f'States were assigned to parameters in {which}; all shapes agree.')
        return Assignment([info if info.shape is not None else dataclasses.replace(info, shape=shapes.get(at.get(place)) or ())
                           for place, info in enumerate(order)], [at.get(place) for place in range(len(order))], report)
    known = [dataclasses.replace(order[place], shape=shapes[key] or ()) for key, place in places.items()]
    return Assignment(known, list(places), report)


def _from_zero(names: Sequence[str]) -> List[str]:
    """A line for the report if the same layers, counted from 0, would be in another order."""
    if renumbered(names) is None:
        return []
    return [f'{names[0]!r} and the others would be in another order where their numbers count from 0, as in a new process: it was '
            'taken for granted that the trainer which wrote the file had these very names.']


def renumbered(names: Sequence[str]) -> Optional[List[int]]:
    """Which of ``names`` is in which place of the trainer where their numbers count from 0; None if each is where it is now.

    Trainers of MXNet 1.x sort names as text. In a new process a net has dense0_, ..., dense11_, sorted as dense0_, dense10_,
    dense11_, dense1_, ...; the same net later in a process has dense36_, ..., dense47_, in the order of their numbers.

    >>> renumbered([f'dense{number}_weight' for number in (9, 10)])  # a list: in no trainer's order
    >>> renumbered([f'dense{number}_weight' for number in range(20, 31)])
    [0, 10, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    if list(names) != sorted(names):
        return None
    counted = [_COUNTED.match(name) for name in names]
    least: Dict[str, int] = {}
    for match in counted:
        if match and len(match[2]) <= 9:
            least[match[1]] = min(least.get(match[1], 10**9), int(match[2]))
    fresh = [f'{match[1]}{int(match[2]) - least[match[1]]}{name[match.end(2):]}' if match and len(match[2]) <= 9 else name
             for name, match in zip(names, counted)]
    order = sorted(range(len(fresh)), key=fresh.__getitem__)
    return None if order == list(range(len(fresh))) else order


def _without(keys: List[Any], shapes: Mapping[Any, Shape], idx2name: Mapping[Any, str]) -> Assignment:
    named = {key: idx2name.get(key, '') for key in keys}
    report = []
    if any(isinstance(key, str) for key in keys):
        named = {key: key for key in keys}
    elif '' in named.values() or len(set(named.values())) < len(keys):
        named = {key: str(key) for key in keys}
        report = ['The file has no names: parameters are named by their index in the trainer. Pass params= to name them.']
    return Assignment([ParameterInfo(named[key], named[key], shapes[key] or (), '') for key in keys], keys, report)


def _infos(params: Any) -> List[ParameterInfo]:
    if isinstance(params, Mapping):
        items = list(params.items())
    elif isinstance(params, (list, tuple)):
        items = [(name, None) for name in params]
    else:
        raise TypeError('`params` must be a list of names, a dictionary of names to arrays or shapes, or the path of a .params '
                        f'file. Received: {type(params).__name__}.')
    names = [name for name, _ in items]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f'`params` must have distinct names. Received: {one_of(names[:8])}.')
    return [ParameterInfo(name, name, _shape(value), _dtype(value)) for name, value in items]


def _shape(value: Any) -> Any:
    shape = getattr(value, 'shape', value)
    if shape is not None and not (isinstance(shape, (tuple, list)) and all(isinstance(x, (int, numpy.integer)) for x in shape)):
        raise TypeError(f'The values of `params` must be arrays, parameters or shapes. Received: {type(value).__name__}.')
    return shape if shape is None else tuple(int(x) for x in shape)


def _dtype(value: Any) -> str:
    dtype = getattr(value, 'dtype', None)
    return '' if dtype is None else numpy.dtype(dtype).name


def _by_name(infos: List[ParameterInfo], shapes: Mapping[Any, Shape]) -> Assignment:
    """Module stores its states by name."""
    known = {info.name: info for info in infos}
    for name, shape in shapes.items():
        if name not in known or not _agree(known[name].shape, shape):
            raise ValueError(f'`params` must contain those of the file, {one_of(list(shapes)[:8])}, ... '
                             f'Received: no {name!r} of shape {shape}.')
    used = [info for info in infos if info.name in shapes]
    return Assignment(used, [info.name for info in used], [])


def _places(keys: List[int], count: int, shapes: Mapping[Any, Shape]) -> Tuple[Dict[int, int], List[str]]:
    """The parameter that each key refers to, counted in the trainer's order.

    Module on several devices without a kvstore keeps one copy per device, at index * devices + device.
    """
    copies = len(keys) // max(count, 1)
    whole = copies > 1 and keys == list(range(copies * count))
    if whole and all(shapes[key] == shapes[key - key % copies] for key in keys):
        report = [f'The file has the states of {copies} devices: the first was used.']
        return {key: key // copies for key in keys[::copies]}, report
    return {key: key for key in keys}, []


def _orders(infos: List[ParameterInfo], versions: Sequence[int], in_order: bool) -> List[List[ParameterInfo]]:
    """The orders a trainer may have had: sorted by name, or the dictionary's own.

    MXNet 2's trainers sort the same names that `.params` files have (`2.weight`); those of 1.x sort `dense2_weight`, so that
    10 comes not only before 2, but also before 1.
    """
    found = [infos] if in_order else []
    for version in versions:
        order = sorted(infos, key=lambda info: info.name if version == 2 else info.name.replace('.', '_'))
        if order not in found:
            found.insert(0, order)
    return found


def _from_new_processes(orders: Sequence[List[ParameterInfo]]) -> List[List[ParameterInfo]]:
    """The orders of trainers where the numbers in the names count from 0."""
    places = [(order, renumbered([info.name for info in order])) for order in orders]
    return [[order[place] for place in fresh] for order, fresh in places if fresh]


def _check_places(infos: Sequence[ParameterInfo], shapes: Mapping[Any, Shape]) -> List[str]:
    """What must be assumed for names like ``encoder.weight``, if anything; ValueError if that would be a guess.

    They do not determine the order in MXNet 1.x's trainers, which sort names like ``dense3_weight``. Shapes may; and equal
    layers in succession were most probably created, and counted, in that order.
    """
    rivals = _rivals(infos, shapes) if any('.' in info.name for info in infos) else []
    if not rivals:
        return []
    if _equal_layers(infos):
        return [f'{rivals[0]!r} and others have the same shape: it was assumed that MXNet 1.x counted the layers from 0, in the '
                f'order of the net. {_REMEDY}']
    raise ValueError('`params` must settle which state belongs to which parameter. Received: structural names, as written '
                     'by save_parameters, by which MXNet 1.x does not sort, and parameters of the same shape, '
                     f'{rivals[0]!r} and {rivals[1]!r}. {_REMEDY}')


def _rivals(infos: Sequence[ParameterInfo], shapes: Mapping[Any, Shape]) -> List[str]:
    """The first names that could own the same state."""
    trained = [info for info in infos if not info.name.endswith(STATISTICS)]
    fitting = ([info.name for info in trained if _agree(info.shape, shape)] for shape in shapes.values())
    return next((names for names in fitting if len(names) > 1), [])


def _equal_layers(infos: Sequence[ParameterInfo]) -> bool:
    """Whether the names are those of equal layers in a Sequential: 0.weight, 0.bias, 1.weight, ..."""
    layers: Dict[str, List[Tuple[str, int]]] = {}
    for info in infos:
        place, _, leaf = info.name.partition('.')
        layers.setdefault(place, []).append((leaf, len(info.shape or ())))
    return all(place.isdecimal() for place in layers) and len(set(map(tuple, layers.values()))) == 1


def _misfit(order: Sequence[ParameterInfo], places: Mapping[int, int], shapes: Mapping[Any, Shape]) -> str:
    for key, place in places.items():
        if place >= len(order):
            return f'the file has a state for index {key}'
        if not _agree(order[place].shape, shapes[key]):
            return f'index {key} has shape {shapes[key]}, {order[place].name!r} has {order[place].shape}'
    return ''


def _agree(shape: Any, other: Shape) -> bool:
    return shape is None or other is None or shape == other
