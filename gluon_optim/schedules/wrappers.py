"""Schedules around others: warmed up, one after another, scaled by the batch size."""
from typing import Any, List, Mapping, Optional, Tuple, Type

from ..schema import REQUIRED, Hyper, Values
from .base import Count, Inner, Schedule, Segments, Wrapper

__all__ = ['Chain', 'Scaled', 'Warmup']

SCHEDULE = Inner('schedule', REQUIRED, (), 'one of this module, or of mxnet.lr_scheduler')


class Warmup(Wrapper):
    """A rise to the first rate of another schedule, which begins at update ``steps``.

        rate(t) = begin + (first - begin) f(t / steps)      for t < steps
        rate(t) = schedule(t - steps + 1)                   from t = steps on; first = schedule(1)
        f(s)    = s ('linear'), 0 ('constant'), s^2 ('power2'), sqrt(s) ('sqrt')

    As in MXNet, update 1 is already one step above ``begin``, and the first rate is that of update ``steps``:
    ``Warmup(Cosine(n, base_lr), w)`` is ``mx.lr_scheduler.CosineScheduler(n + w, base_lr, warmup_steps=w)``.
    ``base_lr`` is that of the schedule.

    Source: MXNet 1.9.1, LRScheduler.get_warmup_lr, and LBSGD._get_lbmult for 'power2' and 'sqrt'; Goyal et al.,
    arXiv:1706.02677, section 2.2.
    """

    name = 'warmup'
    summary = 'a rise to the first rate of another schedule'
    counterpart = 'SequentialLR'
    hypers = (SCHEDULE, Count('steps', REQUIRED, '0', 'the update from which on the schedule holds'),
              Hyper('begin', 0.0, '[0, inf)', 'the rate from which it rises'),
              Hyper('kind', 'linear', ('linear', 'constant', 'power2', 'sqrt'), 'the form of the rise'))

    @staticmethod
    def within(attributes: Mapping[str, Any]) -> List[Tuple[Any, int, Optional[int]]]:
        return [(attributes['schedule'], max(attributes['steps'] - 1, 0), None)]

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        schedule, inner = h.schedule
        if not h.steps:
            return schedule.rate(xp, inner, t)
        rate = schedule.rate(xp, inner, xp.maximum(t - h.steps + 1, 1))  # its first one before it begins
        share = xp.minimum(t / h.steps, 1)
        risen = {'constant': 0.0, 'linear': share, 'power2': share * share, 'sqrt': xp.sqrt(share)}[h.kind]
        return xp.where(t < h.steps, h.begin + (rate - h.begin) * risen, rate)

    @staticmethod
    def length(h: Values) -> Optional[int]:
        schedule, inner = h.schedule
        length = schedule.length(inner)
        return None if length is None else length + max(int(h.steps) - 1, 0)


class Chain(Wrapper):
    """Schedules one after another, each from its own first update on.

        rate(t) = schedule_k(min(t, end) - begin_k),   begin_k < t <= begin_k + steps_k

    ``begin_k`` is the sum of the steps before. After the last one's steps its last rate stays; None is for no end. ``base_lr``
    is that of the first schedule.

    Source: torch.optim.lr_scheduler.SequentialLR, whose milestones are the sums of the steps.
    """

    name = 'chain'
    summary = 'schedules one after another'
    counterpart = 'SequentialLR'
    hypers = (Segments('segments', REQUIRED, (), 'how many updates each schedule holds'),)

    @staticmethod
    def first(h: Values) -> Tuple[Type[Schedule], Values]:
        schedule, inner = h.segments[0][1]
        return schedule, inner

    @staticmethod
    def within(attributes: Mapping[str, Any]) -> List[Tuple[Any, int, Optional[int]]]:
        found, before = [], 0
        for steps, scheduler in attributes['segments']:
            found.append((scheduler, before, steps))
            before += steps or 0
        return found

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        begin, value = 0, None
        for steps, (schedule, inner) in h.segments:
            own = xp.maximum(t - begin, 1) if begin else t
            rate = schedule.rate(xp, inner, own if steps is None else xp.minimum(own, steps))
            value = rate if value is None else xp.where(t > begin, rate, value)
            begin += steps or 0
        return value

    @staticmethod
    def length(h: Values) -> Optional[int]:
        *before, (last, (schedule, inner)) = h.segments
        ends = [end for end in (last, schedule.length(inner)) if end is not None]
        length: int = sum(steps for steps, _ in before) + min(ends, default=0)
        return length if ends else None


class Scaled(Wrapper):
    """Linear scaling: a batch that is so many times larger takes steps that are so many times larger.

        rate(t) = schedule(t) batch_size / reference

    ``schedule`` has the rates for batches of ``reference`` samples, ``base_lr`` too.

    Source: the lecture, "relating batch size to learning rate": eta_B = B eta_1; Goyal et al., arXiv:1706.02677.
    """

    name = 'scaled'
    summary = 'the rates of another schedule, times the batch size'
    counterpart = 'LambdaLR'
    hypers = (SCHEDULE, Count('batch_size', REQUIRED, '1', 'samples in a batch'),
              Count('reference', 1, '1', 'samples in a batch for which the schedule was made'))

    @staticmethod
    def within(attributes: Mapping[str, Any]) -> List[Tuple[Any, int, Optional[int]]]:
        return [(attributes['schedule'], 0, None)]

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        schedule, inner = h.schedule
        return schedule.rate(xp, inner, t) * (h.batch_size / h.reference)

    @staticmethod
    def length(h: Values) -> Optional[int]:
        schedule, inner = Scaled.first(h)
        return schedule.length(inner)
