"""Which schedule a scheduler is, and its rate at any update."""
from typing import Any, Dict, Mapping, Tuple, Type

import numpy

from ..schema import Values, one_of
from . import mx
from .base import Schedule

__all__ = ['CLASSES', 'rate', 'schedule_of']

# path of the scheduler's class -> schedule
CLASSES: Dict[str, Type[Schedule]] = {
    'mxnet.lr_scheduler.FactorScheduler': mx.Factor,
    'mxnet.lr_scheduler.MultiFactorScheduler': mx.MultiFactor,
    'mxnet.lr_scheduler.PolyScheduler': mx.Poly,
    'mxnet.lr_scheduler.CosineScheduler': mx.Cosine,
}


def schedule_of(scheduler: Any) -> Tuple[Type[Schedule], Values]:
    """The schedule that a scheduler follows, and its hyper-parameters.

    ``scheduler`` is an object of MXNet, or what a file has of one: ``{'class': path, 'attributes': {...}}``, as in
    `OptimizerStates.scheduler`. Raises TypeError for a class whose rate is not known here.
    """
    if isinstance(scheduler, Mapping) and {'class', 'attributes'} <= set(scheduler):
        path, attributes = str(scheduler['class']), scheduler['attributes']
    else:
        path, attributes = f'{type(scheduler).__module__}.{type(scheduler).__qualname__}', getattr(scheduler, '__dict__', {})
    if path not in CLASSES:
        raise TypeError(f'The scheduler must be one of {one_of(CLASSES)}. Received: {path}. Call it yourself, update by update.')
    return CLASSES[path], CLASSES[path].of(attributes)


def rate(schedule: Any, t: Any, xp: Any = numpy) -> Any:
    """The learning rate of update ``t``, a pure function: nothing is remembered, and any update may be asked for in any order.

    Parameters
    ----------
    schedule : mx.lr_scheduler.LRScheduler or dict
        A scheduler of MXNet, also one in the middle of a run, or `OptimizerStates.scheduler`, where MXNet is not installed.
    t : int or array of int
        Numbers of updates, 1 at the first.
    xp : module
        The array namespace: numpy, jax.numpy, torch.

    Returns
    -------
    float or array
        What the scheduler answers in a run that asks it at every update; its last value past its end.

    Raises
    ------
    ValueError
        Where ``t`` is below 1 or not a whole number.
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
            raise ValueError(f'`t` must be the number of an update, 1 or more. Received: t={t!r}.')
        value = found.rate(numpy, h, given.astype('float64'))
        return float(value) if given.ndim == 0 else numpy.asarray(value)
    return found.rate(xp, h, t)
