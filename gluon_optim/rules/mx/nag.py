"""MXNet's `nag` (Nesterov's accelerated gradient): the learning rate is inside the momentum, which is the next step."""
from ...schema import Slot
from .base import MOMENTUM, VARIANT, WD, ScaledByRate, factor, parameters, rate, rescaled, working


class NAG(ScaledByRate):
    """Nesterov accelerated gradient, MXNet's convention.

        m' = momentum m - learning_rate (g + wd w)
        w += momentum m' - learning_rate (g + wd w)
        m  = momentum m - learning_rate (g + wd w)

    with the new w in the last line, because MXNet has already overwritten the old one.

    variant='2.x', as MXNet 2.0: with the old w.
    """

    name = 'nag'
    summary = "SGD with Nesterov's momentum in MXNet's convention: the learning rate is inside the momentum"
    paper = 'Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013'
    peers = ('mxnet.optimizer.NAG',)
    hypers = (rate(0.01), WD, MOMENTUM, VARIANT)

    @staticmethod
    def slots(h):
        return (Slot('momentum', doc='the last step, without its look-ahead part'),) if h.momentum > 0 else ()

    @classmethod
    def prepare(cls, xp, c, static, w, g):
        return rescaled(xp, c, g) if static.slots else super().prepare(xp, c, static, w, g)

    @staticmethod
    def coefficients(xp, h, t):
        p = parameters(xp, h, 'learning_rate', 'wd', 'momentum')
        lr = p.learning_rate if h.momentum > 0 else factor(h, p.learning_rate)
        c = dict(lr=lr, wd=p.wd, mu=p.momentum, keep=working(xp, 1 - working(xp, p.learning_rate * p.wd)))
        return c if h.variant == '2.x' else dict(c, ahead=p.momentum + 1)

    @staticmethod
    def step(xp, h, c, w, g, s):
        if 'momentum' not in s:
            return c.keep * w - c.lr * g, {}
        decayed = c.mu * s.momentum
        if h.variant == '2.x':
            momentum = decayed - c.lr * (g + c.wd * w)
            return w + (c.mu * momentum - c.lr * (g + c.wd * w)), dict(momentum=momentum)
        new = w - decayed + c.ahead * (decayed - c.lr * (g + c.wd * w))
        return new, dict(momentum=decayed - c.lr * (g + c.wd * new))
