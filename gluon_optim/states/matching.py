"""Which saved parameter is which present one: by name, and said where names had to be interpreted."""
import re
from collections import Counter
from typing import Dict, Hashable, List, NamedTuple, Optional, Sequence, Tuple

from .model import ParameterInfo

__all__ = ['Match', 'completes', 'match']

_AUTOMATIC = re.compile(r'([A-Za-z_]*[A-Za-z])(\d+)_')  # what MXNet 1.x makes up: dense2_, hybridsequential0_


class Match(NamedTuple):
    """The outcome of `match`."""

    pairs: Dict[int, int]   # position in the present list -> position in the saved list
    note: str               # what was interpreted, '' where names simply agree


def match(saved: Sequence[ParameterInfo], present: Sequence[ParameterInfo]) -> Match:
    """Pair saved with present parameters.

    By their names (structural where the net was given), or by their full names, whichever pairs more. When no name
    agrees: saved numbers ('0', '1', ...) are positions in the trainer; else names may differ in the numbers that MXNet counts
    through a process (a second ``Dense`` is ``dense1_``), in order, if all shapes agree.

    Raises ValueError that lists both sides when nothing pairs.
    """
    by_name = _by_key([p.name for p in saved], [p.name for p in present])
    by_full_name = _by_key([p.full_name for p in saved], [p.full_name for p in present])
    best = by_full_name if len(by_full_name) > len(by_name) else by_name
    if best or not saved or not present:
        return Match(best, '')
    if all(p.name.isdecimal() for p in saved):
        pairs = {int(p.name): j for j, p in enumerate(saved) if int(p.name) < len(present)}
        return Match(pairs, 'The file holds no names: its states go to the parameters by position in the trainer.')
    pairs = _without_numbers(saved, present)
    if not pairs:
        raise ValueError(f'No name in the file is one of this trainer. In the file: {_some(saved)}. '
                         f'In the trainer: {_some(present)}. Pass net= on both sides, so that parameters have the names of '
                         'their places in the net.')
    first = saved[pairs[0]].full_name
    return Match(pairs, f'The names in the file differ from the present ones in their automatic numbers ({first!r} is now '
                        f'{present[0].full_name!r}); they were paired in order. Pass net= on both sides to have names that stay.')


def completes(shape: Sequence[int], partly: Optional[Sequence[int]]) -> bool:
    """Whether ``shape`` is what a parameter of MXNet may have whose shape is only ``partly`` known: 0 or -1 stands for any size.

    >>> completes((3, 4), (3, 0)), completes((3, 4), None), completes((3, 4), (4, 0)), completes((3, 4), (3,))
    (True, True, False, False)
    """
    return not partly or (len(shape) == len(partly) and all(known in (0, -1, size) for known, size in zip(partly, shape)))


def _by_key(saved: Sequence[Hashable], present: Sequence[Hashable]) -> Dict[int, int]:
    """Pairs of equal keys; a key that stands twice on one side pairs with nothing."""
    in_saved, in_present = Counter(saved), Counter(present)
    places = {key: j for j, key in enumerate(saved) if in_saved[key] == 1}
    return {i: places[key] for i, key in enumerate(present) if key in places and in_present[key] == 1}


def _without_numbers(saved: Sequence[ParameterInfo], present: Sequence[ParameterInfo]) -> Dict[int, int]:
    # in the order in which MXNet counted: trainers sort names as text, where dense10 comes before dense2
    old, new = _counted(saved), _counted(present)
    if [name for (name, _), _ in old] != [name for (name, _), _ in new] or not all(
            completes(theirs, mine) for ((_, theirs), _), ((_, mine), _) in zip(old, new)):
        return {}
    return {i: j for (_, j), (_, i) in zip(old, new)}


def _counted(parameters: Sequence[ParameterInfo]) -> List[Tuple[Tuple[str, Tuple[int, ...]], int]]:
    """(name without its numbers, shape) and position of each parameter, in the order of creation of each kind of layer."""
    def order(i: int) -> Tuple[str, List[int]]:
        name = parameters[i].full_name
        return _AUTOMATIC.sub(r'\1#_', name), [int(number) for _, number in _AUTOMATIC.findall(name)]

    return [((order(i)[0], tuple(parameters[i].shape)), i) for i in sorted(range(len(parameters)), key=order)]


def _some(parameters: Sequence[ParameterInfo]) -> str:
    names = [repr(p.name) for p in parameters]
    return ', '.join(names[:8]) + (f', ... ({len(names)} names)' if len(names) > 8 else '')
