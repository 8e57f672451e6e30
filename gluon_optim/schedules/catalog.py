"""The schedule that a scheduler follows, and its rate at any update."""
import copy
import math
import re
import reprlib
from typing import Any, Callable, Dict, Mapping, Tuple, Type

import numpy

from ..schema import Hyper, Values, check_known, error_text
from . import annealing, decay, mx, plateau, wrappers
from .base import Inner, Schedule, Segments, Wrapper

__all__ = ['CLASSES', 'OURS', 'SCHEDULES', 'after', 'base_lr_of', 'checked', 'kept', 'named', 'rate', 'rate_of', 'record',
           'schedule_of']

# all schedules of this package, in the order of the tables
SCHEDULES: Tuple[Type[Schedule], ...] = (
    decay.Constant, decay.InverseTime, decay.IntervalInverseTime, decay.Step, decay.MultiStep, decay.Exponential,
    annealing.Polynomial, annealing.Linear, annealing.Cosine, annealing.CosineRestarts, annealing.OneCycle, decay.InverseSqrt,
    decay.SumToInfinity, decay.Piecewise, plateau.Plateau, wrappers.Warmup, wrappers.Chain, wrappers.Scaled)
OURS = 'gluon_optim.mxnet.lr_scheduler'  # the module of their classes for MXNet, as files name it: it never changes
# path of the scheduler's class -> schedule
CLASSES: Dict[str, Type[Schedule]] = {
    'mxnet.lr_scheduler.FactorScheduler': mx.Factor,
    'mxnet.lr_scheduler.MultiFactorScheduler': mx.MultiFactor,
    'mxnet.lr_scheduler.PolyScheduler': mx.Poly,
    'mxnet.lr_scheduler.CosineScheduler': mx.Cosine,
    **{f'{OURS}.{schedule.__name__}': schedule for schedule in SCHEDULES},
}
FAULTS = (KeyError, TypeError, ValueError, ArithmeticError, AttributeError)  # of attributes that no object has
DEEPEST = 16  # schedules within one another


def schedule_of(scheduler: Any) -> Tuple[Type[Schedule], Values]:
    """The schedule that a scheduler follows, and its hyper-parameters.

    ``scheduler`` is an object of MXNet's or ours, or a file's record of one: ``{'class': path, 'attributes': {...}}``, as in
    `OptimizerStates.scheduler`. Schedulers within it are such pairs, too. Raises TypeError for a class whose rate is not known
    here, and ValueError for attributes that no object of the class has, as a file may hold them.

    >>> from gluon_optim.schedules import schedule_of
    >>> schedule, h = schedule_of({'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': dict(
    ...     step=10, factor=0.5, stop_factor_lr=1e-8, count=0, base_lr=0.4, warmup_steps=0, warmup_begin_lr=0,
    ...     warmup_final_lr=0.4, warmup_mode='linear')})
    >>> schedule.name, h.step
    ('factor', 10)
    """
    path, attributes = _parts(scheduler)
    _known(path)
    try:
        return _schedule_of(scheduler, 1)
    except FAULTS as error:
        raise _refused(path, attributes, error) from error


def _refused(path: str, attributes: Any, error: Exception) -> ValueError:
    return ValueError(f'The attributes of the scheduler must be those of a {path}. Received: {reprlib.repr(attributes)}, '
                      f'which gives {type(error).__name__}: {error_text(error)}')


def after(scheduler: Mapping[str, Any], num_update: int) -> Dict[str, Any]:
    """The record of a scheduler that has been asked for every update up to ``num_update``, also those after the record's own.

    ``scheduler`` is the record, ``{'class': path, 'attributes': {...}}``; that of a class which is not known here is returned as it
    is. Raises ValueError for attributes that no object of the class has.

    >>> half = {'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': dict(
    ...     step=10, factor=0.5, stop_factor_lr=1e-8, count=0, base_lr=0.4, warmup_steps=0, warmup_begin_lr=0,
    ...     warmup_final_lr=0.4, warmup_mode='linear')}
    >>> attributes = after(half, 25)['attributes']
    >>> attributes['count'], attributes['base_lr']
    (20, 0.1)
    """
    path = scheduler['class']
    if path not in CLASSES:
        return dict(scheduler)
    schedule_of(scheduler)  # raises an error for what no object has
    try:
        return {'class': path, 'attributes': _after(CLASSES[path], scheduler['attributes'], num_update)}
    except FAULTS as error:
        raise _refused(path, scheduler['attributes'], error) from error


def _after(schedule: Type[Schedule], attributes: Mapping[str, Any], num_update: int) -> Dict[str, Any]:
    moved = copy.deepcopy(schedule.after(attributes, num_update))
    for inner, before, steps in schedule.within(moved) if issubclass(schedule, Wrapper) else ():
        if num_update > before and inner['class'].startswith(OURS):  # MXNet's within ours are not asked
            asked = num_update - before if steps is None else min(num_update - before, steps)
            inner['attributes'] = _after(CLASSES[inner['class']], inner['attributes'], asked)
    return moved


def _parts(scheduler: Any) -> Tuple[str, Any]:
    """The path of the class, and the attributes."""
    if isinstance(scheduler, Mapping) and {'class', 'attributes'} <= set(scheduler):
        return str(scheduler['class']), scheduler['attributes']
    return f'{type(scheduler).__module__}.{type(scheduler).__qualname__}', getattr(scheduler, '__dict__', {})


def _known(path: str) -> Type[Schedule]:
    if path not in CLASSES:
        raise TypeError('The scheduler must be one of gluon_optim.lr_scheduler, or FactorScheduler, MultiFactorScheduler, '
                        f'PolyScheduler or CosineScheduler of MXNet. Received: {path:.200}. Call it yourself, update by update.')
    return CLASSES[path]


def _schedule_of(scheduler: Any, depth: int) -> Tuple[Type[Schedule], Values]:
    if depth > DEEPEST:
        raise ValueError(f'At most {DEEPEST} schedulers may be within one another. Received: more.')
    path, attributes = _parts(scheduler)
    schedule = _known(path)
    h = _checked(schedule, schedule.of, attributes, depth)
    if not 0 <= h.base_lr < math.inf:
        raise ValueError('a rate below zero, or infinite')
    return schedule, h


def base_lr_of(record: Mapping[str, Any]) -> Any:
    """The ``base_lr`` of a scheduler in a file, which a scheduler around others has of the first one within; None if unknown."""
    attributes = record.get('attributes')
    if str(record.get('class')).startswith(OURS + '.'):
        try:
            return schedule_of(record)[1].base_lr
        except (TypeError, ValueError):  # not one that a constructor has made
            return None
    return attributes.get('base_lr') if isinstance(attributes, Mapping) else None


def checked(schedule: Type[Schedule], given: Mapping[str, Any]) -> Values:
    """The hyper-parameters of ``schedule``, with schedulers, or records of them, as the schedules within it.

    Raises what `Schedule.hyperparameters` raises, and what `schedule_of` raises of a scheduler among ``given``.
    """
    return _checked(schedule, lambda attributes: schedule.hyperparameters(**attributes), given, 1)


def _checked(schedule: Type[Schedule], of: Callable[[Mapping[str, Any]], Values], attributes: Mapping[str, Any],
             depth: int) -> Values:
    """What ``of`` makes of the attributes in which the schedulers are replaced by their schedules."""
    attributes = dict(attributes)
    for hyper in schedule.hypers:
        value = attributes.get(hyper.name)
        if isinstance(hyper, Inner) and hyper.name in attributes:
            attributes[hyper.name] = _schedule_of(value, depth + 1)
        elif isinstance(hyper, Segments) and isinstance(value, (list, tuple)):
            attributes[hyper.name] = [_part(part, depth + 1) for part in value]
    return of(attributes)


def _part(part: Any, depth: int) -> Any:
    """One part of a chain, (steps, scheduler); what is none is refused where it is checked."""
    return (part[0], _schedule_of(part[1], depth)) if isinstance(part, (list, tuple)) and len(part) == 2 else part


def kept(hyper: Hyper, given: Any, h: Values) -> Any:
    """What a scheduler keeps of an argument that has been checked: a JSON value, and schedulers as they were ``given``."""
    if isinstance(hyper, Inner):
        return given
    value = getattr(h, hyper.name)
    if isinstance(hyper, Segments):
        return [[steps, part[1]] for part, (steps, _) in zip(given, value)]
    return list(value) if isinstance(value, tuple) else value


def record(name: str, **arguments: Any) -> Dict[str, Any]:
    """A schedule of this package as files hold it, for `gluon_optim.rate` and all that takes such a record; without MXNet.

    ``name`` is that of the class, or the one that `gluon-optim schedule` lists; ``**arguments`` are those of the class, records for
    schedules within it. Raises ValueError for an unknown name, and ValueError or TypeError for arguments that the schedule refuses.

    >>> from gluon_optim.schedules import record
    >>> warm = record('Warmup', schedule=record('Cosine', max_update=100, base_lr=0.4), steps=10)
    >>> rate(warm, 5), rate(warm, 10), round(rate(warm, 60), 3)
    (0.2, 0.4, 0.2)
    """
    schedule = named(name)
    h = checked(schedule, arguments)
    attributes = {hyper.name: kept(hyper, arguments.get(hyper.name), h) for hyper in schedule.hypers + schedule.history}
    return {'class': f'{OURS}.{schedule.__name__}', 'attributes': attributes}


def named(name: str) -> Type[Schedule]:
    """The schedule of that name, in any spelling: 'CosineRestarts', 'cosine_restarts', 'cosine-restarts'. ValueError for none."""
    found = {schedule.name.replace('_', ''): schedule for schedule in SCHEDULES}
    short = re.sub('[_-]', '', name).lower() if isinstance(name, str) else name
    if short not in found:
        check_known('schedule', name, [schedule.name for schedule in SCHEDULES], ValueError)
    return found[short]


def rate(schedule: Any, t: Any, xp: Any = numpy) -> Any:
    """The learning rate of update ``t``, a pure function: it keeps no state, and updates may be queried in any order.

    Parameters
    ----------
    schedule : mx.lr_scheduler.LRScheduler or dict
        A scheduler of MXNet's or of `gluon_optim.lr_scheduler`, even in the middle of a run, or `OptimizerStates.scheduler`, which
        does not need MXNet.
    t : int or array of int
        Update numbers, starting at 1.
    xp : module
        The array namespace: numpy, jax.numpy, torch.

    Returns
    -------
    float or array
        What the scheduler returns in a run that calls it at every update; past its end, its last value. In PyTorch a tensor of
        float64, in JAX an array of its own type.

    Raises
    ------
    ValueError
        If ``t`` is below 1 or not an integer, or the attributes are not those of a scheduler of the class. Inside ``jax.jit``
        the value of ``t`` is not known, and not checked.
    TypeError
        For a scheduler of another class.

    >>> half = {'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': dict(
    ...     step=10, factor=0.5, stop_factor_lr=1e-8, count=0, base_lr=0.4, warmup_steps=0, warmup_begin_lr=0,
    ...     warmup_final_lr=0.4, warmup_mode='linear')}
    >>> rate(half, numpy.array([1, 10, 11, 25])).tolist()
    [0.4, 0.4, 0.2, 0.1]
    """
    found, h = schedule_of(schedule)
    return rate_of(found, h, t, xp)


def rate_of(schedule: Type[Schedule], h: Values, t: Any, xp: Any = numpy) -> Any:
    """`rate` of a schedule and its hyper-parameters. Raises ValueError where ``t`` is known and not 1, 2, ..."""
    try:
        given = numpy.asarray(t)
    except Exception:  # traced, or on another device: whatever the namespace raises
        given = None
    if given is not None and (given.dtype.kind not in 'iu' or (given < 1).any()):
        raise ValueError(f'`t` must be an update number, 1 or more. Received: t={reprlib.repr(t)}.')
    if xp is numpy:
        value = schedule.rate(numpy, h, numpy.asarray(t, 'float64')[()])
        return float(value) if numpy.ndim(t) == 0 else numpy.asarray(value)
    if getattr(xp, '__name__', '') == 'torch':
        return schedule.rate(_Torch(xp), h, xp.as_tensor(t, dtype=xp.float64))
    return schedule.rate(xp, h, xp.asarray(t))


class _Torch:
    """PyTorch as `Schedule.rate` uses it: its own minimum and maximum take two tensors."""

    def __init__(self, torch: Any):
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def minimum(self, x: Any, y: Any) -> Any:
        return self._torch.where(x < y, x, y)

    def maximum(self, x: Any, y: Any) -> Any:
        return self._torch.where(x > y, x, y)
