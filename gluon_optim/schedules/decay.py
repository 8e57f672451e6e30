"""Schedules without an end: the rate falls by epoch, by step, or a little at every update."""
from typing import Any, Optional, Type

from ..schema import REQUIRED, Hyper, Values
from .base import Count, Numbers, Schedule, Steps, completed, stepwise

__all__ = ['BASE_LR', 'Constant', 'Exponential', 'IntervalInverseTime', 'InverseSqrt', 'InverseTime', 'MultiStep', 'Piecewise',
           'Step', 'SumToInfinity']

BASE_LR = Hyper('base_lr', 0.01, '[0, inf)', 'the first rate')
FIRST = BASE_LR._replace(default=REQUIRED)
DECAY = Hyper('decay', REQUIRED, '[0, inf)', 'how fast the rate falls')
FACTOR = Hyper('factor', 0.1, '[0, 1]', 'of the rate, at each change')
MILESTONES = Steps('step', REQUIRED, '1', 'the updates after which it changes')


class Constant(Schedule):
    """The same rate for all updates; to be warmed up, or part of a chain.

        rate(t) = base_lr
    """

    name = 'constant'
    summary = 'the same rate throughout'
    counterpart = 'ConstantLR(factor=1)'
    hypers = (BASE_LR,)

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        return h.base_lr + 0.0 * t

    @staticmethod
    def length(h: Values) -> Optional[int]:
        return 1


class InverseTime(Schedule):
    """1 / (1 + decay epoch), the same throughout an epoch; epochs count from 0.

        rate(t) = base_lr / (1 + decay epoch),   epoch = floor((t - 1) / steps_per_epoch)

    Source: the blog on optimization of the documents, "learning rate decay": alpha / (1 + decay_rate epoch_num), applied to the
    first rate, not to the one before.
    """

    name = 'inverse_time'
    summary = 'base_lr / (1 + decay epoch)'
    counterpart = 'LambdaLR'
    hypers = (FIRST, DECAY, Count('steps_per_epoch', REQUIRED, '1', 'updates per epoch'))

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        return h.base_lr / (1 + h.decay * completed(xp, t - 1, h.steps_per_epoch))


class IntervalInverseTime(Schedule):
    """1 / (1 + decay k), where k grows by 1 at every update that ``interval`` divides.

        rate(t) = base_lr / (1 + decay floor(t / interval))

    Source: the blog on optimization of the documents, "scheduled learning rate decay", with updates for its epochs.
    """

    name = 'interval_inverse_time'
    summary = 'base_lr / (1 + decay floor(t / interval))'
    counterpart = 'LambdaLR'
    hypers = (FIRST, DECAY, Count('interval', REQUIRED, '1', 'updates between two changes'))

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        return h.base_lr / (1 + h.decay * completed(xp, t, h.interval))


class Step(Schedule):
    """Multiplied by ``factor`` after every ``step`` updates.

        rate(t) = base_lr factor^floor((t - 1) / step)

    Source: torch.optim.lr_scheduler.StepLR. MXNet's FactorScheduler also has a smallest rate.
    """

    name = 'step'
    summary = 'multiplied by a factor after every so many updates'
    counterpart = 'StepLR'
    hypers = (Count('step', REQUIRED, '1', 'updates between two changes'), FACTOR, BASE_LR)

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        return h.base_lr * h.factor ** completed(xp, t - 1, h.step)


class MultiStep(Schedule):
    """Multiplied by ``factor`` after each of the updates in ``step``.

        rate(t) = base_lr factor^k,   k = how many entries of step are below t

    Source: torch.optim.lr_scheduler.MultiStepLR, and MXNet's MultiFactorScheduler.
    """

    name = 'multi_step'
    summary = 'multiplied by a factor after given updates'
    counterpart = 'MultiStepLR'
    hypers = (MILESTONES, FACTOR, BASE_LR)

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        return stepwise(xp, t, h.step, [h.base_lr * h.factor ** k for k in range(len(h.step) + 1)])

    @staticmethod
    def length(h: Values) -> Optional[int]:
        return int(h.step[-1]) + 1


class Exponential(Schedule):
    """Falls by ``factor`` in every ``step`` updates, a little at each.

        rate(t) = base_lr factor^((t - 1) / step)

    Source: torch.optim.lr_scheduler.ExponentialLR, where step is 1.
    """

    name = 'exponential'
    summary = 'falls by a factor in every so many updates, a little at each'
    counterpart = 'ExponentialLR'
    hypers = (Hyper('factor', REQUIRED, '(0, 1]', 'of the rate, after step updates'), BASE_LR,
              Count('step', 1, '1', 'updates in which it falls by factor'))

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        return h.base_lr * h.factor ** ((t - 1) / h.step)


class InverseSqrt(Schedule):
    """Falls with the square root of the number of updates.

        rate(t) = base_lr / sqrt(1 + (t - 1) / step)

    ``Warmup(InverseSqrt(base_lr, step=w), steps=w)`` is the schedule of the Transformer: base_lr min(t / w, sqrt(w / t)).

    Source: Vaswani et al., Attention is all you need, arXiv:1706.03762, section 5.3.
    """

    name = 'inverse_sqrt'
    summary = 'base_lr / sqrt(1 + (t - 1) / step)'
    counterpart = 'LambdaLR'
    hypers = (BASE_LR, Count('step', 1, '1', 'three times as many updates as this halve the first rate'))

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        return h.base_lr / xp.sqrt(1 + (t - 1) / h.step)


class Gamma(Hyper):
    """The exponent of `SumToInfinity`. Its error says what a wrong one breaks."""

    __slots__ = ()

    def _refuse(self, error: Type[Exception], value: Any) -> Exception:
        return error(f'{super()._refuse(error, value)} Above 1 the sum of all rates is finite, and a run may stop short of the '
                     'optimum; at 0.5 or below that of their squares is infinite, and the noise does not average out.')


class SumToInfinity(Schedule):
    """Falls to 0, but so slowly that the rates add up to infinity while their squares do not.

        rate(t) = base_lr (b + t)^-gamma

    The lecture's convergence theorem (Bertsekas and Tsitsiklis, Neuro-Dynamic Programming, proposition 3.5) asks for rates above 0
    that tend to 0 with an infinite sum: gamma in (0, 1]. Langevin dynamics also needs a finite sum of squares, or its noise
    never averages out: gamma above 0.5.

    Source: Welling and Teh, Bayesian learning via stochastic gradient Langevin dynamics, ICML 2011, equation 2 and section 4.
    """

    name = 'sum_to_infinity'
    summary = 'base_lr (b + t)^-gamma: to 0, with an infinite sum; for SGLD'
    counterpart = 'LambdaLR'
    hypers = (BASE_LR._replace(doc='the rate where b + t is 1'), Hyper('b', 0.0, '[0, inf)', 'updates by which it is ahead'),
              Gamma('gamma', 0.55, '(0.5, 1]', 'the exponent: up to 1 the sum is infinite, above 0.5 that of squares is not'))

    @staticmethod
    def check(h: Values) -> None:
        if not h.base_lr > 0:
            raise ValueError('`base_lr` of sum_to_infinity must be above 0, or the rates do not add up to infinity. '
                             f'Received: base_lr={h.base_lr!r}.')

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        return h.base_lr * (h.b + t) ** -h.gamma


class Piecewise(Schedule):
    """Given rates, as factors of ``base_lr``: one until ``step[0]``, one until ``step[1]``, ..., one after the last.

        rate(t) = base_lr factor[k],   k = how many entries of step are below t
        kind='linear': lines between the points (updates done, rate) = (0, base_lr factor[0]), (step[k], base_lr factor[k + 1])

    With ``base_lr=1.0`` the factors are the rates. Updates done before update t are t - 1.

    Source: torch.optim.lr_scheduler.LambdaLR with such a function.
    """

    name = 'piecewise'
    summary = 'given rates between given updates, constant or joined by lines'
    counterpart = 'LambdaLR'
    hypers = (MILESTONES, Numbers('factor', REQUIRED, '[0, inf)', 'rates in units of base_lr, one more than there are steps'),
              BASE_LR, Hyper('kind', 'constant', ('constant', 'linear'), 'constant between the updates, or lines'))

    @staticmethod
    def check(h: Values) -> None:
        if len(h.factor) != len(h.step) + 1:
            raise ValueError('`factor` must have one entry more than `step`: what holds before its first update, and after each. '
                             f'Received: {len(h.factor)} factors, {len(h.step)} steps.')

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        if h.kind == 'constant':
            return stepwise(xp, t, h.step, [h.base_lr * factor for factor in h.factor])
        value = h.base_lr * h.factor[-1] + 0.0 * t
        points = list(zip((0, *h.step), h.factor))
        for (begin, low), (end, high) in reversed(list(zip(points, points[1:]))):
            line = low + (high - low) * ((t - 1 - begin) / (end - begin))
            value = xp.where(t - 1 < end, h.base_lr * line, value)
        return value

    @staticmethod
    def length(h: Values) -> Optional[int]:
        return int(h.step[-1]) + 1
