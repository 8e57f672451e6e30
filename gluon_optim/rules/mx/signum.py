"""MXNet's `signum` (Bernstein et al., arXiv:1802.04434)."""
from ...schema import Hyper, Slot
from .base import MOMENTUM, VARIANT, WD, ScaledByRate, factor, parameter, parameters, rate, working


class Signum(ScaledByRate):
    """The sign of the momentum.

        m = momentum m - (1 - momentum) (g + wd w)
        w = (1 - learning_rate wd_lh) w + learning_rate sign(m)

    Without momentum it is signSGD, which in MXNet ignores rescale_grad, clip_gradient and wd_lh:

        w = (1 - learning_rate wd) w - learning_rate sign(g)

    variant='2.x', as MXNet 2.0: wd + wd_lh takes the place of that wd.
    """

    name = 'signum'
    summary = 'the sign of the momentum, or of the gradient'
    paper = 'arXiv:1802.04434'
    peers = ('mxnet.optimizer.Signum',)
    hypers = (
        rate(0.01),
        WD,
        MOMENTUM._replace(default=0.9),
        Hyper('wd_lh', 0.0, '(-inf, inf)', 'decoupled weight decay, multiplied by the learning rate; with momentum only'),
        VARIANT,
    )

    @staticmethod
    def slots(h):
        return (Slot('momentum', doc='decayed mean of gradients, negated'),) if h.momentum > 0 else ()

    @staticmethod
    def coefficients(xp, h, t):
        p = parameters(xp, h, 'learning_rate', 'wd', 'momentum', 'wd_lh')
        a = working(xp, 1 - p.momentum)
        decay = p.wd_lh if h.momentum > 0 else parameter(xp, h.wd + h.wd_lh) if h.variant == '2.x' else p.wd
        return dict(lr=p.learning_rate, mu=p.momentum, a=factor(h, a), a_wd=a * p.wd,
                    keep=working(xp, 1 - working(xp, p.learning_rate * decay)))

    @staticmethod
    def step(xp, h, c, w, g, s):
        if 'momentum' not in s:
            return c.keep * w - c.lr * xp.sign(g), {}
        momentum = c.mu * s.momentum - c.a_wd * w - c.a * g
        return c.keep * w + c.lr * xp.sign(momentum), dict(momentum=momentum)
