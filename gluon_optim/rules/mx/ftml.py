"""MXNet's `ftml` (Zheng and Kwok, Follow the moving leader in deep learning, ICML 2017)."""
import math

from ...schema import Hyper, Slot
from .base import BETA1, BETA2, VARIANT, WD, DecayedFirst, operator_correction, parameters, rate


class FTML(DecayedFirst):
    """Follow the moving leader, MXNet's convention.

        u  = clip(rescale_grad g + wd w)
        v  = beta2 v + (1 - beta2) u^2
        d' = (1 - beta1^t) / learning_rate (sqrt(v / (1 - beta2^t)) + epsilon)
        z  = beta1 z + (1 - beta1) u - (d' - beta1 d) w
        d  = d'
        w  = -z / d

    variant='2.x', as MXNet 2.0: u = clip(rescale_grad g) + wd w.
    """

    name = 'ftml'
    summary = 'follow the moving leader'
    paper = 'Zheng and Kwok, Follow the Moving Leader in Deep Learning, ICML 2017'
    peers = ('mxnet.optimizer.FTML',)
    exceptions = {'lr_mult=0': 'the update divides by the rate: with 0 the weight becomes NaN, as in MXNet'}
    hypers = (
        rate(0.01),
        WD,
        BETA1._replace(default=0.6),
        BETA2,
        Hyper('epsilon', 1e-8, '[0, inf)', 'added to the root of the corrected second moment'),
        VARIANT,
    )

    @staticmethod
    def slots(h):
        return (Slot('d', doc='divisor of the last step'), Slot('v', doc='decayed mean of squared gradients'),
                Slot('z', doc='weight times -d'))

    @staticmethod
    def coefficients(xp, h, t):
        p = parameters(xp, h, 'learning_rate', 'wd', 'beta1', 'beta2')
        correction1, correction2 = operator_correction(xp, h.beta1, t), operator_correction(xp, h.beta2, t)
        zero = p.learning_rate == 0
        per_rate = xp.where(zero, math.inf, correction1 / xp.where(zero, 1.0, p.learning_rate))
        return dict(per_rate=per_rate, wd=p.wd, b1=p.beta1, a1=1 - p.beta1, b2=p.beta2, a2=1 - p.beta2,
                    correction2=correction2, eps=h.epsilon)

    @staticmethod
    def step(xp, h, c, w, g, s):
        v = c.b2 * s.v + c.a2 * (g * g)
        d = c.per_rate * (xp.sqrt(v / c.correction2) + c.eps)
        z = c.b1 * s.z + c.a1 * g - (d - c.b1 * s.d) * w
        return -z / d, dict(d=d, v=v, z=z)
