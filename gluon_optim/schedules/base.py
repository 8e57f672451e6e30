"""The form in which a schedule is written: once, as a pure function of the number t = 1, 2, ... of the update."""
from typing import Any, ClassVar, Mapping, Tuple

from ..schema import Hyper, Values

__all__ = ['Schedule', 'warmed_up']


class Schedule:
    """Base of all schedules. A subclass declares and defines; it is never instantiated.

    ``name``, ``summary``
        The key in the table, and one line for people.
    ``hypers``
        Tuple of `Hyper` under MXNet's words (``base_lr``, ``warmup_steps``, ``final_lr``, ``step``, ``factor``).
    ``rate(xp, h, t)``
        The rate of update ``t``; ``t`` is a number or an array of the namespace ``xp``, which has floor, cos, sqrt, minimum,
        maximum, where. No Python ``if`` on ``t``. Past its end a schedule keeps its last value.
    ``of(attributes)``
        The hyper-parameters in the attributes of a scheduler of the class that this schedule describes.
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


def warmed_up(xp: Any, h: Values, t: Any, rate: Any) -> Any:
    """``rate``, and before update ``h.warmup_steps`` what MXNet's schedulers have there: a line from ``warmup_begin_lr`` to
    ``warmup_final_lr``, or its beginning throughout (``warmup_mode='constant'``)."""
    if not h.warmup_steps:
        return rate
    rise = 0.0 if h.warmup_mode == 'constant' else (h.warmup_final_lr - h.warmup_begin_lr) / h.warmup_steps
    return xp.where(t < h.warmup_steps, h.warmup_begin_lr + rise * t, rate)
