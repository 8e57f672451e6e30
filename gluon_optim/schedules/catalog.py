"""The schedule that a scheduler follows, and its rate at any update."""
import math
import reprlib
from typing import Any, Dict, Mapping, Tuple, Type

import numpy

from ..schema import Values, one_of
from . import mx
from .base import Schedule

__all__ = ['CLASSES', 'after', 'rate', 'schedule_of']

FAULTS = (KeyError, TypeError, ValueError, ArithmeticError)  # of attributes that no object has, as a file may hold them

# path of the scheduler's class -> schedule
CLASSES: Dict[str, Type[Schedule]] = {
    'mxnet.lr_scheduler.FactorScheduler': mx.Factor,
    'mxnet.lr_scheduler.MultiFactorScheduler': mx.MultiFactor,
    'mxnet.lr_scheduler.PolyScheduler': mx.Poly,
    'mxnet.lr_scheduler.CosineScheduler': mx.Cosine,
}


def schedule_of(scheduler: Any) -> Tuple[Type[Schedule], Values]:
    """The schedule that a scheduler follows, and its hyper-parameters.

    ``scheduler`` is an MXNet object, or a file's record of one: ``{'class': path, 'attributes': {...}}``, as in
    `OptimizerStates.scheduler`. Raises TypeError for a class whose rate is not known here, and ValueError for attributes that no
    object of the class has, as a file may hold them.

    >>> from gluon_optim.schedules import schedule_of
    >>> schedule, h = schedule_of({'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': dict(
    ...     step=10, factor=0.5, stop_factor_lr=1e-8, count=0, base_lr=0.4, warmup_steps=0, warmup_begin_lr=0,
    ...     warmup_final_lr=0.4, warmup_mode='linear')})
    >>> schedule.name, h.step
    ('factor', 10)
    """
    if isinstance(scheduler, Mapping) and {'class', 'attributes'} <= set(scheduler):
        path, attributes = str(scheduler['class']), scheduler['attributes']
    else:
        path, attributes = f'{type(scheduler).__module__}.{type(scheduler).__qualname__}', getattr(scheduler, '__dict__', {})
    if path not in CLASSES:
        raise TypeError(f'The scheduler must be one of {one_of(CLASSES)}. Received: {path}. Call it yourself, update by update.')
    try:
        h = CLASSES[path].of(attributes)
        if not 0 <= h.base_lr < math.inf:
            raise ValueError('a rate below zero, or infinite')
        return CLASSES[path], h
    except FAULTS as error:
        raise _refused(path, attributes, error) from error


def _refused(path: str, attributes: Mapping[str, Any], error: Exception) -> ValueError:
    return ValueError(f'The attributes of the scheduler must be those of a {path}. Received: {reprlib.repr(dict(attributes))}, '
                      f'which gives {type(error).__name__}: {error}.')


def after(record: Mapping[str, Any], num_update: int) -> Dict[str, Any]:
    """The record of a scheduler that has been asked for every update up to ``num_update``, also those after the record's own.

    ``record`` is ``{'class': path, 'attributes': {...}}``; that of a class which is not known here is returned as it is. Raises
    ValueError for attributes that no object of the class has.

    >>> record = {'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': dict(
    ...     step=10, factor=0.5, stop_factor_lr=1e-8, count=0, base_lr=0.4, warmup_steps=0, warmup_begin_lr=0,
    ...     warmup_final_lr=0.4, warmup_mode='linear')}
    >>> attributes = after(record, 25)['attributes']
    >>> attributes['count'], attributes['base_lr']
    (20, 0.1)
    """
    path, attributes = record['class'], record['attributes']
    if path not in CLASSES:
        return dict(record)
    try:
        return {'class': path, 'attributes': CLASSES[path].after(attributes, num_update)}
    except FAULTS as error:
        raise _refused(path, attributes, error) from error


def rate(schedule: Any, t: Any, xp: Any = numpy) -> Any:
    """The learning rate of update ``t``, a pure function: it keeps no state, and updates may be queried in any order.

    Parameters
    ----------
    schedule : mx.lr_scheduler.LRScheduler or dict
        An MXNet scheduler, even in the middle of a run, or `OptimizerStates.scheduler`, which does not need MXNet.
    t : int or array of int
        Update numbers, starting at 1.
    xp : module
        The array namespace: numpy, jax.numpy, torch.

    Returns
    -------
    float or array
        What the scheduler returns in a run that calls it at every update; past its end, its last value.

    Raises
    ------
    ValueError
        If ``t`` is below 1 or not an integer, or the attributes are not those of a scheduler of the class.
    TypeError
        For a scheduler of another class.

    >>> half = {'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': dict(
    ...     step=10, factor=0.5, stop_factor_lr=1e-8, count=0, base_lr=0.4, warmup_steps=0, warmup_begin_lr=0,
    ...     warmup_final_lr=0.4, warmup_mode='linear')}
    >>> rate(half, numpy.array([1, 10, 11, 25])).tolist()
    [0.4, 0.4, 0.2, 0.1]
    """
    found, h = schedule_of(schedule)
    if xp is numpy:
        given = numpy.asarray(t)
        if given.dtype.kind not in 'iu' or (given < 1).any():
            raise ValueError(f'`t` must be an update number, 1 or more. Received: t={t!r}.')
        value = found.rate(numpy, h, given.astype('float64'))
        return float(value) if given.ndim == 0 else numpy.asarray(value)
    return found.rate(xp, h, t)
