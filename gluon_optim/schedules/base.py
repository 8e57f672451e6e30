"""How a schedule is written: once, as a pure function of the update number t = 1, 2, ..."""
from typing import Any, ClassVar, Dict, Mapping, Tuple

from ..schema import Hyper, Values

__all__ = ['Schedule', 'warmed_up']


class Schedule:
    """Base class of all schedules. A subclass holds declarations and functions; it is never instantiated.

    ``name``, ``summary``
        The key in the table, and a one-line description.
    ``hypers``
        Tuple of `Hyper` under MXNet's words (``base_lr``, ``warmup_steps``, ``final_lr``, ``step``, ``factor``).
    ``rate(xp, h, t)``
        The rate of update ``t``; ``t`` is a number or an array of the namespace ``xp``, which has floor, cos, sqrt, minimum,
        maximum, where. No Python ``if`` on ``t``. Past its end a schedule keeps its last value.
    ``of(attributes)``
        The hyper-parameters in the attributes of a scheduler of the class that this schedule describes.
    ``after(attributes, num_update)``
        The attributes that such a scheduler has once it has been asked for every update up to ``num_update``.

    Raises nothing: `schedule_of` and `gluon_optim.rate` check what they get.

    >>> from gluon_optim.schedules import schedule_of
    >>> schedule, h = schedule_of({'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': dict(
    ...     step=10, factor=0.5, stop_factor_lr=1e-8, count=0, base_lr=0.4, warmup_steps=0, warmup_begin_lr=0,
    ...     warmup_final_lr=0.4, warmup_mode='linear')})
    >>> schedule.name, h.factor
    ('factor', 0.5)
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ''
    hypers: ClassVar[Tuple[Hyper, ...]]

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        raise NotImplementedError

    @staticmethod
    def of(attributes: Mapping[str, Any]) -> Values:
        raise NotImplementedError

    @staticmethod
    def after(attributes: Mapping[str, Any], num_update: int) -> Dict[str, Any]:
        return dict(attributes)  # what keeps no memory of the updates it was asked for


def warmed_up(xp: Any, h: Values, t: Any, rate: Any) -> Any:
    """``rate``, and before update ``h.warmup_steps`` the warm-up of MXNet's schedulers: a line from ``warmup_begin_lr`` to
    ``warmup_final_lr``, or its beginning throughout (``warmup_mode='constant'``)."""
    if not h.warmup_steps:
        return rate
    rise = 0.0 if h.warmup_mode == 'constant' else (h.warmup_final_lr - h.warmup_begin_lr) / h.warmup_steps
    return xp.where(t < h.warmup_steps, h.warmup_begin_lr + rise * t, rate)
