"""Reduce on plateau: the rate follows from what was observed, which is kept."""
import math
from typing import Any, Dict, List, Mapping

from ..schema import Hyper, Values
from .base import Count, Schedule, Steps, stepwise
from .decay import BASE_LR

__all__ = ['Plateau']


class Plateau(Schedule):
    """Reduced when a metric has not improved for more than ``patience`` observations.

        rate(t) = the first rate, reduced once for each entry of reduced below t
        reduced once: max(factor rate, final_lr), where that lowers it by more than epsilon

        at an observation
            better: metric < best (1 - threshold)    ('rel'; 'abs': best - threshold; 'max': > best (1 + threshold))
            bad = 0 if better, else bad + 1;  0 throughout the cooldown, of as many observations after each reduction
            bad > patience: reduced gets the number of the update, bad = 0

    NaN is not better. Between two observations the rate depends on t alone.

    Source: torch.optim.lr_scheduler.ReduceLROnPlateau, with MXNet's words for its min_lr (final_lr) and eps (epsilon).
    """

    name = 'plateau'
    summary = 'reduced when a metric stops improving'
    counterpart = 'ReduceLROnPlateau'
    hypers = (BASE_LR,
              Hyper('mode', 'min', ('min', 'max'), 'whether a smaller or a larger metric is better'),
              Hyper('factor', 0.1, '[0, 1)', 'of the rate, at each reduction'),
              Count('patience', 10, '0', 'observations without improvement that are tolerated'),
              Hyper('threshold', 1e-4, '[0, inf)', 'how much better counts as an improvement'),
              Hyper('threshold_mode', 'rel', ('rel', 'abs'), 'whether threshold is a share of the best metric'),
              Count('cooldown', 0, '0', 'observations after a reduction that do not count'),
              Hyper('final_lr', 0.0, '[0, inf)', 'the smallest rate'),
              Hyper('epsilon', 1e-8, '[0, inf)', 'a smaller reduction is left out'))
    history = (Count('num_update', 0, '0', 'the last update for which the rate was asked'),
               Hyper('best', None, '(-inf, inf)', 'the best metric', optional=True),
               Count('bad', 0, '0', 'observations without improvement since'),
               Count('cooling', 0, '0', 'observations until the end of the cooldown'),
               Steps('reduced', (), '0', 'the updates after which the rate was reduced', optional=True))

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        return stepwise(xp, t, h.reduced, _rates(h))

    @staticmethod
    def after(attributes: Mapping[str, Any], num_update: int) -> Dict[str, Any]:
        return dict(attributes, num_update=max(attributes['num_update'], num_update))

    @classmethod
    def observed(cls, h: Values, metric: float, num_update: int, before: int = 0) -> Dict[str, Any]:
        """The history after one more observation, after update ``num_update``, to which an error adds ``before``.

        Raises ValueError for an infinitely good metric, and for an update before the last reduction.
        """
        if h.reduced and num_update < h.reduced[-1]:
            raise ValueError(f'`num_update` must not be below {h.reduced[-1] + before}, the update after which the rate was last '
                             f'reduced. Received: num_update={num_update + before}.')
        better = _better(h, metric)
        if better and math.isinf(metric):
            raise ValueError(f'`metric` must be finite, or nothing will ever be better. Received: metric={metric!r}.')
        best, bad, cooling, reduced = (metric, 0, h.cooling, h.reduced) if better else (h.best, h.bad + 1, h.cooling, h.reduced)
        if cooling:
            bad, cooling = 0, cooling - 1
        if bad > h.patience:
            bad, cooling = 0, h.cooldown
            rates = _rates(h.replace(reduced=(*reduced, num_update)))
            reduced = (*reduced, num_update) if rates[-1] != rates[-2] else reduced
        return dict(num_update=max(h.num_update, num_update), best=best, bad=bad, cooling=cooling, reduced=reduced)


def _better(h: Values, metric: float) -> bool:
    if math.isnan(metric):
        return False
    if h.best is None:
        return metric != (math.inf if h.mode == 'min' else -math.inf)
    sign = 1 if h.mode == 'max' else -1
    bound: float = h.best * (1 + sign * h.threshold) if h.threshold_mode == 'rel' else h.best + sign * h.threshold
    return metric > bound if h.mode == 'max' else metric < bound


def _rates(h: Values) -> List[float]:
    """The first rate, and that after each reduction."""
    rates = [h.base_lr]
    for _ in h.reduced:
        lower = max(rates[-1] * h.factor, h.final_lr)
        rates.append(lower if rates[-1] - lower > h.epsilon else rates[-1])
    return rates
