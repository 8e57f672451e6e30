"""The contents of a file of states, parameters or a whole run: described, compared, and checked for completeness."""
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import numpy

from .. import rules
from ..rules.compensated import COMPENSATION, is_compensated
from .files import Kind
from .model import OptimizerStates, Run, chunks, digest

__all__ = ['Contents', 'Difference', 'Row', 'arrays_of', 'compare', 'missing', 'names_in', 'rows']

WHOLE = '_optimizer'  # the key for arrays of the optimizer as a whole, next to those of parameters


@dataclass
class Contents:
    """What was read from a file: everything known about it is passed on from here, and the file is not opened again."""

    path: str
    kind: Kind
    states: Optional[OptimizerStates] = None
    run: Optional[Run] = None
    parameters: Dict[str, numpy.ndarray] = field(default_factory=dict)  # values, by name

    def about(self) -> Dict[str, Any]:
        """Everything except the arrays, as JSON values."""
        found: Dict[str, Any] = {'path': self.path, 'kind': self.kind.value}
        if self.states is not None:
            states = self.states
            found.update(
                optimizer=states.optimizer, num_update=states.num_update, hypers=states.hypers, scheduler=states.scheduler,
                loss_scaler=states.loss_scaler, producer=states.producer, digest=digest(states), report=states.report,
                parameters=[dict(vars(info), updates=states.counts.get(info.name, 0)) for info in states.parameters])
        if self.run is not None:
            found.update({name: getattr(self.run, name) for name in ('step', 'epoch', 'batch', 'metrics', 'extra')})
        return found


# Description

class Row(NamedTuple):
    """One array, or a parameter without any. Shares are fractions of its elements; the norm covers the finite ones."""

    parameter: str
    array: Optional[str]           # the slot, 'master', or 'weight' for the parameter's value; None: no array
    shape: Tuple[int, ...]
    dtype: str
    updates: Optional[int]         # number of updates the parameter has seen
    norm: float = 0.0
    zeros: float = 0.0
    nonfinite: float = 0.0


def rows(contents: Contents) -> Iterator[Row]:
    """One row for each array, in trainer order, and for each parameter without one."""
    states = contents.states
    counts: Mapping[str, int] = states.counts if states else {}
    infos = {info.name: info for info in states.parameters} if states else {}
    for name, arrays in arrays_of(contents).items():
        if not arrays:
            yield Row(name, None, tuple(infos[name].shape), infos[name].dtype, counts.get(name))
        for key, array in arrays.items():
            yield Row(name, key, tuple(array.shape), array.dtype.name, counts.get(name), *_measures(array))


def arrays_of(contents: Contents) -> Dict[str, Dict[str, numpy.ndarray]]:
    """All arrays by parameter; those of the optimizer as a whole under `WHOLE`."""
    found: Dict[str, Dict[str, numpy.ndarray]] = {}
    states = contents.states
    for weight in contents.run.weights if contents.run else ():  # in the order of the net, not of its trainer, which sorts names
        found[weight.name] = {}
    for name in states.names if states else ():
        found.setdefault(name, {})
    for name, value in contents.parameters.items():
        found.setdefault(name, {})['weight'] = value
    if states:
        for name in states.names:
            found[name].update(states.slots.get(name, {}))
            if name in states.master:
                found[name]['master'] = states.master[name]
        if states.variables:
            found[WHOLE] = dict(states.variables)
    return found


def names_in(contents: Contents) -> List[str]:
    """The parameters in the file."""
    return [name for name in arrays_of(contents) if name != WHOLE]


def _measures(array: numpy.ndarray) -> Tuple[float, float, float]:
    """Norm of the finite elements, share of zeros, share of non-finite elements."""
    squares, zeros, nonfinite = 0.0, 0, 0
    for piece in chunks(array):
        values = piece.astype('float64')
        finite = numpy.isfinite(values)
        zeros += int((values == 0).sum())
        if not finite.all():
            nonfinite += int((~finite).sum())
            values = values[finite]
        squares += float(values @ values)
    size = max(array.size, 1)
    return squares ** 0.5, zeros / size, nonfinite / size


# Comparison

class Difference(NamedTuple):
    """One difference between two files: ``a`` and ``b`` are values, or descriptions of arrays, None where missing."""

    what: str
    a: Any
    b: Any
    largest: Optional[float] = None    # largest absolute difference of two elements
    elements: Optional[int] = None     # how many differ, in any bit


def compare(a: Contents, b: Contents) -> List[Difference]:
    """All differences except in who wrote the files: values first, then arrays."""
    left, right = _values(a), _values(b)
    found = [Difference(key, left.get(key), right.get(key)) for key in {**left, **right} if left.get(key) != right.get(key)]
    one, other = _flat(a), _flat(b)
    for key in {**one, **other}:
        difference = _compare_arrays(key, one.get(key), other.get(key))
        if difference is not None:
            found.append(difference)
    return found


def _values(contents: Contents) -> Dict[str, Any]:
    values: Dict[str, Any] = {}
    states = contents.states
    if states is not None:
        values.update({'optimizer': states.optimizer, 'num_update': states.num_update, 'order': states.names})
        for key in ('hypers', 'scheduler', 'loss_scaler'):
            values.update(_leaves(key, getattr(states, key)))
        for info in states.parameters:
            values[f'{info.name}: weight'] = f'{info.dtype}{list(info.shape)}'
            values[f'{info.name}: updates'] = states.counts.get(info.name, 0)
            values[f'{info.name}: multipliers'] = info.lr_mult, info.wd_mult
    if contents.run is not None:
        for key in ('step', 'epoch', 'batch', 'metrics', 'extra', 'random'):
            values.update(_leaves(key, getattr(contents.run, key)))
    return values


def _leaves(key: str, value: Any) -> Dict[str, Any]:
    """{'hypers.wd': 0.1}: the entries of nested dictionaries under their paths."""
    if not isinstance(value, dict):
        return {key: value}
    found: Dict[str, Any] = {}
    for name, entry in value.items():
        found.update(_leaves(f'{key}.{name}', entry))
    return found


def _flat(contents: Contents) -> Dict[str, numpy.ndarray]:
    found = {f'{name}/{key}': array for name, arrays in arrays_of(contents).items() for key, array in arrays.items()}
    for weight in contents.run.weights if contents.run else ():
        found.update({f'{weight.name}/weight on device {k}': copy for k, copy in enumerate(weight.copies) if k})
    return found


def _compare_arrays(key: str, a: Any, b: Any) -> Optional[Difference]:
    left, right = (None if array is None else f'{array.dtype.name}{list(array.shape)}' for array in (a, b))
    if left != right:
        return Difference(key, left, right)
    elements, largest = 0, 0.0
    for x, y in zip(chunks(a), chunks(b)):
        size = x.dtype.itemsize
        differ = (x.view('u1').reshape(-1, size) != y.view('u1').reshape(-1, size)).any(axis=1)
        if differ.any():
            elements += int(differ.sum())
            with numpy.errstate(invalid='ignore', over='ignore'):
                apart = numpy.abs(x[differ].astype('float64') - y[differ].astype('float64'))
            largest = max(largest, float(numpy.nan_to_num(apart, nan=numpy.inf).max()))
    return Difference(key, left, right, largest, elements) if elements else None


# Completeness

def missing(states: OptimizerStates, names: Optional[List[str]] = None) -> List[str]:
    """What the optimizer needs but the file lacks, for ``names`` or all parameters: one sentence each."""
    found = [f'{name} is not in the file' for name in names or () if name not in states.names]
    if not states.optimizer:
        return [*found, 'the optimizer is not in the file: update counts and hyper-parameters are unknown']
    needed = _needed(states)
    halves = {info.name: info.dtype == 'float16' for info in states.parameters}
    some_master, some_compensated = bool(states.master), any(map(is_compensated, states.slots.values()))
    for info in states.parameters:
        count, slots = states.counts.get(info.name, 0), states.slots.get(info.name)
        if slots is None:
            if count:
                found.append(f'{info.name} has seen {count} updates but has no state')
            continue
        kept = {COMPENSATION.name} if needed is not None and some_compensated and halves[info.name] else set()
        if needed is not None and set(slots) != {*needed, *kept}:
            found.append(f'{info.name} must have the slots {sorted({*needed, *kept})}, but has {sorted(slots)}')
        alike = {*kept, *(slot for slot, like in (needed or {}).items() if like == 'weight')}
        found += [f'{info.name}/{slot} has the shape {list(array.shape)}, but the weight has {list(info.shape)}'
                  for slot, array in slots.items() if slot in alike and array.shape != tuple(info.shape)]
        if some_master and halves[info.name] and info.name not in states.master:
            found.append(f'{info.name} is float16 and has no master, although others have one')
    return found


def _needed(states: OptimizerStates) -> Optional[Dict[str, str]]:
    """The slots that the rule keeps, and what each is like; None for an optimizer that is not one of ours."""
    find: Callable[[str], Any] = rules.get
    try:
        rule = find(states.optimizer)
        return {slot.name: slot.like for slot in rule.slots(rule.hyperparameters(**states.hypers))}
    except (KeyError, TypeError, ValueError):
        return None
