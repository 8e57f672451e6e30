"""`OptimizerStates` without their arrays, as JSON: what files of other formats carry so that a run can be converted back."""
import dataclasses
from typing import Any, Dict, Mapping, Sequence

import numpy

from ..schedules import after
from ..schema import Slot, one_of
from .errors import StateFileError
from .manifest import INFO, RECORD, check_record, plain
from .model import OptimizerStates, ParameterInfo

__all__ = ['later', 'record_of', 'states_of', 'take']


def record_of(states: OptimizerStates, chosen: Sequence[ParameterInfo]) -> Dict[str, Any]:
    """Everything except the arrays, for the parameters ``chosen``; ``fresh`` lists those without a state yet."""
    parts = {key: plain(getattr(states, key), key) for key in ('hypers', 'num_update', 'scheduler', 'loss_scaler')}
    return dict(parts, optimizer=states.optimizer, producer=states.producer,
                parameters=[dataclasses.asdict(info) for info in chosen],
                counts={info.name: states.counts.get(info.name, 0) for info in chosen},
                fresh=[info.name for info in chosen if info.name not in states.slots])


def states_of(record: Mapping[str, Any], updates: int = 0) -> OptimizerStates:
    """The inverse of `record_of`, ``updates`` later; `take` adds the arrays.

    Raises StateFileError if the record was not made by `record_of`.
    """
    check_record(record, RECORD, 'the record of the states')
    infos = [{'grad_req': None, **info} if isinstance(info, dict) else info for info in record['parameters']]  # once it had none
    for info in infos:
        check_record(info, INFO, 'a parameter of the record')
    try:
        parameters = [ParameterInfo(**dict(info, shape=tuple(info['shape']))) for info in infos]
        counts = {info.name: record['counts'][info.name] + updates for info in parameters}
        known = {key: record[key] for key in ('optimizer', 'hypers', 'num_update', 'scheduler', 'loss_scaler', 'producer')}
    except (KeyError, TypeError) as error:
        raise StateFileError(f'the record of the states must be complete. Received: a record with an error at {error}. '
                             'Convert again.') from error
    states = OptimizerStates(parameters=parameters, counts=counts, slots={}, **known)
    later(states, updates)
    return states


def later(states: OptimizerStates, updates: int) -> None:
    """Let ``states`` be ``updates`` updates later, with the scheduler as it is then."""
    states.num_update += updates
    if states.scheduler and updates:
        states.scheduler = after(states.scheduler, states.num_update)


def take(states: OptimizerStates, record: Mapping[str, Any], slots: Sequence[Slot], arrays: Dict[str, numpy.ndarray],
         updates: int = 0) -> None:
    """Move ``arrays``, called ``<name>/<slot>`` and ``<name>/master``, to their places in ``states``, checked.

    Parameters without a state when the record was made get none, unless they have been updated since.
    """
    fresh = set(record['fresh'])
    for info in states.parameters:
        shapes = {f'{info.name}/{slot.name}': slot.shape(info.shape) for slot in slots}
        missing = [key for key in shapes if key not in arrays]
        if missing:
            raise StateFileError(f'the arrays {one_of(missing)} must be there. Received: a file without them. Convert again.')
        wrong = [key for key, shape in shapes.items() if arrays[key].shape != shape]
        if wrong:
            raise StateFileError(f'{wrong[0]!r} must have the shape {shapes[wrong[0]]}. Received: {arrays[wrong[0]].shape}. '
                                 'Convert again.')
        own = {slot.name: arrays.pop(key) for slot, key in zip(slots, shapes)}
        master = arrays.pop(f'{info.name}/master', None)
        if info.name in fresh and not updates:
            continue
        states.slots[info.name] = own
        if master is not None:
            states.master[info.name] = master
