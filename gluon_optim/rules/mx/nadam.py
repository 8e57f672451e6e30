"""MXNet's `nadam` (Dozat, Incorporating Nesterov momentum into Adam, ICLR workshop 2016)."""
import math
from typing import Any

from ...schema import Hyper, Values
from ..moments import MEAN, VAR, averaging, moments
from .base import BETA1, BETA2, VARIANT, WD, DecayedFirst, correction, rate


def momentum(xp: Any, h: Values, t: Any) -> Any:
    """The momentum that update ``t`` uses."""
    return h.beta1 * (1 - 0.5 * xp.exp(t * (h.schedule_decay * math.log(0.96))))


class Nadam(DecayedFirst):
    """Adam with Nesterov's momentum, MXNet's convention.

        g    = clip(rescale_grad g + wd w)
        mu_t = beta1 (1 - 0.96^(t schedule_decay) / 2)
        M    = M mu_t                                                    (`m_schedule`, 1 before the first update)
        m    = beta1 m + (1 - beta1) g
        v    = beta2 v + (1 - beta2) g^2
        w   -= learning_rate ((1 - mu_t) g / (1 - M) + mu_{t+1} m / (1 - M mu_{t+1}))
               / (sqrt(v / (1 - beta2^t)) + epsilon)

    variant='2.x', as MXNet 2.0: g = clip(rescale_grad g) + wd w.

    MXNet has one M for the whole optimizer and multiplies it at every parameter's update, so it soon vanishes. That is kept
    here. With several devices MXNet also multiplies it once for each, so replicas drift apart; here each device has its own.
    """

    name = 'nadam'
    summary = "Adam with Nesterov's momentum, MXNet's convention: one schedule for all parameters"
    paper = 'Dozat, Incorporating Nesterov Momentum into Adam, ICLR 2016 workshop'
    peers = ('mxnet.optimizer.Nadam',)
    hypers = (
        rate(1e-3),
        WD,
        BETA1,
        BETA2,
        Hyper('epsilon', 1e-8, '[0, inf)', 'added to the root of the corrected second moment'),
        Hyper('schedule_decay', 4e-3, '[0, inf)', 'how fast the momentum grows from beta1/2 to beta1, per update'),
        VARIANT,
    )
    operator = False
    supplied = ('m_schedule',)

    @staticmethod
    def slots(h):
        return MEAN, VAR

    @staticmethod
    def coefficients(xp, h, t):
        mu, mu_next = momentum(xp, h, t), momentum(xp, h, t + 1)
        product = h.m_schedule if 'm_schedule' in h else math.prod(momentum(xp, h, i) for i in range(1, t + 1))
        return dict(averaging(h), lr=h.learning_rate, wd=h.wd, share=1 - mu, mu_next=mu_next, rest=1 - product,
                    rest_next=1 - product * mu_next, correction2=correction(xp, h.beta2, t))

    @staticmethod
    def step(xp, h, c, w, g, s):
        mean, var = moments(c, s, g)
        ahead = c.share * (g / c.rest) + c.mu_next * (mean / c.rest_next)
        return w - c.lr * ahead / (xp.sqrt(var / c.correction2) + c.eps), dict(mean=mean, var=var)
