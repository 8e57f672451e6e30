"""The learning rate of a run that continues elsewhere: its scheduler, and what the report says of it."""
import math
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

import numpy

from ..schedules import Schedule, after, rate, schedule_of
from ..schedules.catalog import base_lr_of
from ..schema import Values
from ..states.model import OptimizerStates, ParameterInfo

__all__ = ['Carried', 'carried', 'carried_states', 'continues', 'file_entry', 'function_of_time', 'is_scheduler', 'next_rate',
           'rate_at', 'restore', 'waits_for_a_metric', 'what_becomes_of_it']


class Carried(NamedTuple):
    """A scheduler that continues elsewhere.

    ``record``      ``{'class': path, 'attributes': {...}}``
    ``num_update``  the number of updates done, as MXNet counts them for the scheduler; None where the source does not say
    ``begin``       how many of these no parameter has counted: MXNet's ``begin_num_update``
    ``counting``    whether ``num_update`` is also the number of calls of the scheduler, which then is the one to believe
    ``moved``       whether the record may be older than ``num_update``
    """

    record: Dict[str, Any]
    num_update: Optional[int] = None
    begin: int = 0
    counting: bool = False
    moved: bool = False

    def at(self, counts: Sequence[int]) -> int:
        """The number of updates done where parameters have seen ``counts`` of them: it may be later than the record."""
        known = self.num_update or 0
        return known if self.counting else max(known, max(counts, default=0) + self.begin)


def carried(given: Any) -> Carried:
    """What ``given`` says of a scheduler.

    ``given`` is an MXNet scheduler, its record, one with the update at which it continues (as `file_entry` writes it), what
    ``state_dict()`` of `gluon_optim.torch.scheduler` returned, or `OptimizerStates`.

    Raises ValueError or TypeError if it is none of these; `schedule_of` says whether its class is known here.

    >>> half = {'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': dict(
    ...     step=10, factor=0.5, stop_factor_lr=1e-8, count=20, base_lr=0.1, warmup_steps=0, warmup_begin_lr=0,
    ...     warmup_final_lr=0.4, warmup_mode='linear')}
    >>> carried({**half, 'num_update': 30, 'begin_num_update': 5})[1:3]
    (30, 5)
    """
    if isinstance(given, OptimizerStates):
        found = carried_states(given, given.parameters)
        if found is None:
            raise ValueError('`schedule` must be states with a scheduler. Received: states without one: their rate is constant, '
                             f'{given.hypers.get("learning_rate")!r}.')
    elif isinstance(given, Mapping):
        found = _from_mapping(given)
    elif hasattr(given, '__dict__') and callable(given):
        found = Carried(_plain(given))
    else:
        raise TypeError(f'`schedule` must be a scheduler, its record, or states. Received: {type(given).__name__}.')
    return found


def is_scheduler(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of somebody's file is a scheduler that `carried` knows."""
    try:
        return bool(carried(entry))
    except (TypeError, ValueError, KeyError):
        return False


def carried_states(states: OptimizerStates, chosen: Sequence[ParameterInfo]) -> Optional[Carried]:
    """The scheduler of ``states``, of which the parameters ``chosen`` continue; None if there is none."""
    if states.scheduler is None:
        return None
    counted = max((states.counts.get(info.name, 0) for info in chosen), default=0)
    return Carried(states.scheduler, states.num_update, max(states.num_update - counted, 0))


def file_entry(states: OptimizerStates, chosen: Sequence[ParameterInfo]) -> Dict[str, Any]:
    """The scheduler as an entry of a file that has no other place for it; `carried` reads it. Plain values only."""
    found = carried_states(states, chosen)
    return {} if found is None else dict(found.record, num_update=found.num_update, begin_num_update=found.begin)


def restore(states: OptimizerStates, found: Carried) -> None:
    """Give ``states``, which come back from elsewhere, their scheduler, brought to the update at which they are."""
    moved = found.moved or states.num_update != found.num_update
    states.scheduler = after(found.record, states.num_update) if moved else found.record
    base = base_lr_of(states.scheduler)
    if isinstance(base, (int, float)):
        states.hypers['learning_rate'] = float(base)  # as in Gluon's own states


def _from_mapping(given: Mapping[str, Any]) -> Carried:
    try:
        if 'num_bad_epochs' in given and 'carried' in given:
            return _of_plateau(given)
        if 'lr_lambdas' in given:
            return _of_lambdas(given)
    except (KeyError, TypeError, IndexError, ArithmeticError) as error:
        raise ValueError('The state of the scheduler must be that of one made by `gluon_optim.torch.scheduler`, complete. Received:'
                         f' one with an error at {error}.') from error
    if not {'class', 'attributes'} <= set(given) or not isinstance(given['attributes'], Mapping):
        raise ValueError("The record of a scheduler must have 'class' and 'attributes', as `OptimizerStates.scheduler` has. "
                         f'Received: a dictionary with {sorted(map(str, given))[:8]}.')
    numbers = {key: given.get(key) for key in ('num_update', 'begin_num_update')}
    wrong = [key for key, value in numbers.items() if value is not None and (type(value) is not int or value < 0)]
    if wrong:
        raise ValueError(f'`{wrong[0]}` of the scheduler must be a number of updates, 0 or more. Received: {numbers[wrong[0]]!r}.')
    record = {'class': str(given['class']), 'attributes': dict(given['attributes'])}
    return Carried(record, numbers['num_update'], numbers['begin_num_update'] or 0)


def _of_lambdas(given: Mapping[str, Any]) -> Carried:
    """From the state of a LambdaLR."""
    held = next((entry for entry in given['lr_lambdas'] if isinstance(entry, Mapping) and 'schedule' in entry), None)
    if held is None:
        raise ValueError('The state of the scheduler must be that of one made by `gluon_optim.torch.scheduler`. Received: that '
                         'of a LambdaLR with functions of your own. Pass the schedule.')
    found = _from_mapping(dict(held['schedule'], num_update=given['last_epoch'], begin_num_update=held['begin']))
    return found._replace(counting=True, moved=True)


def _of_plateau(given: Mapping[str, Any]) -> Carried:
    """A Plateau from the state of the ReduceLROnPlateau into which it was made, with what has been observed since."""
    kept = given['carried']
    record = {'class': kept['class'], 'attributes': dict(kept['attributes'])}
    now, best = given['_last_lr'][0] / kept['lr_mult'], given['best']
    if now != kept['rate']:  # reduced at updates that PyTorch does not know: from here on, the rate it has is the first
        record['attributes'].update(base_lr=now, reduced=[])
    record['attributes'].update(best=None if math.isinf(best) else best, bad=given['num_bad_epochs'],
                                cooling=given['cooldown_counter'])
    return _from_mapping({**record, **{key: kept[key] for key in ('num_update', 'begin_num_update')}})._replace(moved=True)


def _plain(scheduler: Any) -> Any:
    """A scheduler object, or an attribute of one, as values that JSON has."""
    if isinstance(scheduler, numpy.generic):
        return scheduler.item()
    if isinstance(scheduler, (list, tuple)):
        return [_plain(value) for value in scheduler]
    if scheduler is None or isinstance(scheduler, (bool, int, float, str, dict)):
        return scheduler
    cls = type(scheduler)
    return {'class': f'{cls.__module__}.{cls.__qualname__}',
            'attributes': {name: _plain(value) for name, value in getattr(scheduler, '__dict__', {}).items()}}


# What is said

def next_rate(states: OptimizerStates) -> Optional[float]:
    """The rate of the next update, None without a scheduler or where it is not known here.

    >>> half = {'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': dict(
    ...     step=10, factor=0.5, stop_factor_lr=1e-8, count=20, base_lr=0.1, warmup_steps=0, warmup_begin_lr=0,
    ...     warmup_final_lr=0.4, warmup_mode='linear')}
    >>> next_rate(OptimizerStates('adam', {}, 30, [], {}, {}, scheduler=half))
    0.05
    """
    return None if states.scheduler is None else rate_at(states.scheduler, states.num_update + 1)


def waits_for_a_metric(schedule: Type[Schedule], h: Values) -> bool:
    """Whether rates to come depend on what the schedule, or one within it, has yet to observe."""
    within = [part for value in h.asdict().values() if isinstance(value, tuple) for part in _pairs(value)]
    return bool(schedule.history) or any(waits_for_a_metric(*part) for part in within)


def _pairs(value: Tuple[Any, ...]) -> Iterator[Tuple[Type[Schedule], Values]]:
    """The schedules in an attribute: it is one, or has one for each number of updates."""
    if len(value) == 2 and isinstance(value[1], Values):
        yield value
    else:
        yield from (part[1] for part in value if isinstance(part, tuple) and len(part) == 2 and isinstance(part[1], tuple))


def function_of_time(found: Carried) -> Tuple[Type[Schedule], Values]:
    """The schedule, whose rates depend on nothing but the number of the update. Raises ValueError for another, and what
    `schedule_of` raises."""
    schedule, h = schedule_of(found.record)
    if waits_for_a_metric(schedule, h):
        raise ValueError(f'The rates of the schedule must follow from the number of the update. Received: {found.record["class"]}, '
                         'which depends on a metric. Continue in PyTorch, or feed each rate: that of the next update is '
                         'go.rate(schedule, num_update + 1).')
    return schedule, h


def rate_at(record: Mapping[str, Any], update: int) -> Optional[float]:
    """The rate of an update, None where it is not known here.

    >>> rate_at({'class': 'somebody.Else', 'attributes': {}}, 1)
    """
    try:
        with numpy.errstate(all='raise'):
            return float(rate(record, update))
    except (TypeError, ValueError, ArithmeticError):  # of another class, or not one that MXNet could have made
        return None


def continues(states: OptimizerStates) -> bool:
    """Whether the states have a scheduler with rates that are known here, and depend on nothing but the number of the update."""
    return next_rate(states) is not None and not waits_for_a_metric(*schedule_of(states.scheduler))


def what_becomes_of_it(states: OptimizerStates, how: str, otherwise: str, metrics: bool = False) -> List[str]:
    """What the report says of the scheduler, if there is one: ``how`` it continues, or what to do ``otherwise``.

    ``metrics`` says whether one that depends on a metric continues, too.
    """
    if states.scheduler is None:
        return []
    path, update, found = states.scheduler.get('class'), states.num_update + 1, next_rate(states)
    if found is None:
        base = states.scheduler.get('attributes', {}).get('base_lr', states.hypers.get('learning_rate'))
        rates = f': its base_lr is {base!r}' if isinstance(base, (int, float)) else ''
        return [f'the scheduler {path} is not carried over, because its rates are not known here: {otherwise}, starting with '
                f'update {update}{rates}']
    if not metrics and not continues(states):
        return [f'the scheduler {path} is not carried over, because its rates depend on a metric: {otherwise}; that of update '
                f'{update} is {found:.6g}']
    return [f'the scheduler {path} continues: {how}; the rate of update {update} is {found:.6g}']
