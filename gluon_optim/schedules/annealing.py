"""Schedules with an end, after which they keep their last rate, and the cosine that begins anew."""
import math
from typing import Any, Optional

from ..schema import REQUIRED, Hyper, Values
from .base import LARGEST, Count, Schedule, completed
from .decay import BASE_LR

__all__ = ['Cosine', 'CosineRestarts', 'Linear', 'OneCycle', 'Polynomial']

MAX_UPDATE = Count('max_update', REQUIRED, '1', 'updates until the final rate')
FINAL_LR = Hyper('final_lr', 0.0, '[0, inf)', 'the final rate')


class Polynomial(Schedule):
    """A power of what is left of the run.

        rate(t) = final_lr + (base_lr - final_lr) (1 - s)^pwr,   s = min((t - 1) / max_update, 1)

    Source: torch.optim.lr_scheduler.PolynomialLR, where final_lr is 0. MXNet's PolyScheduler is one update ahead: t / max_update.
    """

    name = 'polynomial'
    summary = 'a power of what is left of the run'
    counterpart = 'PolynomialLR'
    hypers = (MAX_UPDATE, BASE_LR, Hyper('pwr', 2.0, '[0, inf)', 'the exponent'), FINAL_LR)

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        left = (h.max_update - xp.minimum(t - 1, h.max_update)) / h.max_update  # never below 0, as 1 - s may be
        return h.final_lr + (h.base_lr - h.final_lr) * left ** h.pwr

    @staticmethod
    def length(h: Values) -> Optional[int]:
        return int(h.max_update) + 1


class Linear(Schedule):
    """A line from ``base_lr`` to ``final_lr``, which may be the larger one.

        rate(t) = base_lr + (final_lr - base_lr) s,   s = min((t - 1) / max_update, 1)

    Source: torch.optim.lr_scheduler.LinearLR.
    """

    name = 'linear'
    summary = 'a line from the first to the final rate'
    counterpart = 'LinearLR'
    hypers = (MAX_UPDATE, BASE_LR, FINAL_LR)

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        return h.base_lr + (h.final_lr - h.base_lr) * (xp.minimum(t - 1, h.max_update) / h.max_update)

    @staticmethod
    def length(h: Values) -> Optional[int]:
        return int(h.max_update) + 1


class Cosine(Schedule):
    """Half a wave of the cosine, from ``base_lr`` down to ``final_lr``.

        rate(t) = final_lr + (base_lr - final_lr) (1 + cos(pi s)) / 2,   s = min((t - 1) / max_update, 1)

    Source: torch.optim.lr_scheduler.CosineAnnealingLR, which rises again after its end; Loshchilov and Hutter, arXiv:1608.03983.
    MXNet's CosineScheduler is one update ahead: t / max_update.
    """

    name = 'cosine'
    summary = 'half a wave of the cosine'
    counterpart = 'CosineAnnealingLR'
    hypers = (MAX_UPDATE, BASE_LR, FINAL_LR)

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        done = xp.minimum(t - 1, h.max_update) / h.max_update
        return h.final_lr + (h.base_lr - h.final_lr) * (1 + xp.cos(math.pi * done)) / 2

    @staticmethod
    def length(h: Values) -> Optional[int]:
        return int(h.max_update) + 1


class CosineRestarts(Schedule):
    """``Cosine`` that begins anew at the end of each cycle; a cycle is ``step_mult`` times as long as the one before.

        rate(t) = final_lr + (base_lr - final_lr) (1 + cos(pi (t - 1 - begin) / length)) / 2

    The first cycle begins at 0 and has the length step, the next one begins at step and has the length step_mult step.

    Source: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts; Loshchilov and Hutter, SGDR, arXiv:1608.03983, equation 5.
    """

    name = 'cosine_restarts'
    summary = 'waves of the cosine, each beginning at the first rate'
    counterpart = 'CosineAnnealingWarmRestarts'
    hypers = (Count('step', REQUIRED, '1', 'updates in the first cycle'), BASE_LR, FINAL_LR,
              Count('step_mult', 1, '1', 'by how much each cycle is longer than the one before'))

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        done = t - 1
        if h.step_mult == 1:
            position = (done - h.step * completed(xp, done, h.step)) / h.step
        else:
            begin, length = 0.0, float(h.step)
            position = done / length
            while begin + length <= LARGEST:  # exact, being whole numbers, where a logarithm is not
                begin, length = begin + length, length * h.step_mult
                position = xp.where(done >= begin, (done - begin) / length, position)
        return h.final_lr + (h.base_lr - h.final_lr) * (1 + xp.cos(math.pi * position)) / 2


class OneCycle(Schedule):
    """Up to ``base_lr`` and down to almost nothing, once.

        rate(t) = b + (a - b) (1 + cos(pi s)) / 2, or b + (a - b) (1 - s) ('linear');   s: how much of the part is over at t - 1

        part of the run          ends at t - 1 =                 a                      b
        rise                     pct_start max_update - 1        base_lr / div_factor   base_lr
        fall                     max_update - 1                  base_lr                base_lr / (div_factor final_div_factor)

    With ``three_phase`` the fall ends at 2 pct_start max_update - 2 with the first rate, and a third part leads to the final one.
    The highest rate is ``base_lr``. PyTorch's class also moves the momentum, against the rate; this does not.

    Source: torch.optim.lr_scheduler.OneCycleLR; Smith and Topin, Super-convergence, arXiv:1708.07120.
    """

    name = 'one_cycle'
    summary = 'up to the highest rate, and down to almost nothing'
    counterpart = 'OneCycleLR(cycle_momentum=False)'
    hypers = (Count('max_update', REQUIRED, '2', 'updates in the cycle'), BASE_LR._replace(doc='the highest rate'),
              Hyper('pct_start', 0.3, '(0, 1)', 'how much of the cycle is the rise'),
              Hyper('anneal_strategy', 'cos', ('cos', 'linear'), 'the form of rise and fall'),
              Hyper('div_factor', 25.0, '(0, inf)', 'base_lr in units of the first rate'),
              Hyper('final_div_factor', 1e4, '(0, inf)', 'the first rate in units of the final one'),
              Hyper('three_phase', False, (False, True), 'fall as far as it rose, then to the final rate'))

    @staticmethod
    def check(h: Values) -> None:
        rise, last = h.pct_start * h.max_update - 1, h.max_update - 1
        if not 0 < rise < last:
            raise ValueError('`pct_start` max_update must be above 1 and below max_update, for a rise and a fall. '
                             f'Received: pct_start={h.pct_start!r}, max_update={h.max_update!r}.')
        if h.three_phase and not 2 * rise < last:
            raise ValueError('`pct_start` must leave room for a third part: 2 (pct_start max_update - 1) below max_update - 1. '
                             f'Received: pct_start={h.pct_start!r}, max_update={h.max_update!r}.')

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        begin, rise, last = h.base_lr / h.div_factor, h.pct_start * h.max_update - 1, h.max_update - 1
        final = begin / h.final_div_factor
        parts = [(0, rise, begin, h.base_lr), (rise, last, h.base_lr, final)]
        if h.three_phase:
            parts[1:] = [(rise, 2 * rise, h.base_lr, begin), (2 * rise, last, begin, final)]
        done = t - 1
        value = final + 0.0 * done
        for start, end, a, b in reversed(parts):
            share = (done - start) / (end - start)
            left = (1 + xp.cos(math.pi * share)) / 2 if h.anneal_strategy == 'cos' else 1 - share
            value = xp.where(done <= end, b + (a - b) * left, value)
        return value

    @staticmethod
    def length(h: Values) -> Optional[int]:
        return int(h.max_update)
