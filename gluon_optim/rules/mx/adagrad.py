"""MXNet's `adagrad` (Duchi et al., JMLR 12, 2011): epsilon is inside the root, decay outside the quotient."""
from ...schema import Hyper, Slot
from .base import VARIANT, WD, MXRule, rate


class AdaGrad(MXRule):
    """Gradients divided by the root of the sum of all their squares, MXNet's convention.

        g  = clip(rescale_grad g)
        h  = h + g^2
        w -= learning_rate (g / sqrt(h + eps) + wd w)

    variant='2.x', as MXNet 2.0, which calls eps epsilon:

        u  = clip(rescale_grad g) + wd w
        h  = h + u^2
        w -= learning_rate u / (sqrt(h) + eps)
    """

    name = 'adagrad'
    summary = "gradients divided by the root of the sum of their squares, MXNet's convention"
    paper = 'Duchi, Hazan and Singer, Adaptive subgradient methods, JMLR 12, 2011'
    peers = ('mxnet.optimizer.AdaGrad',)
    hypers = (rate(0.01), WD._replace(doc='weight decay, not divided'),
              Hyper('eps', 1e-7, '[0, inf)', 'added to the sum of squares, inside the root'), VARIANT)
    operator = False

    @staticmethod
    def slots(h):
        return (Slot('history', doc='sum of squared gradients'),)

    @staticmethod
    def coefficients(xp, h, t):
        return dict(minus_lr=-h.learning_rate, wd=h.wd, eps=h.eps)

    @staticmethod
    def step(xp, h, c, w, g, s):
        if h.variant == '2.x':
            g = g + c.wd * w
            history = s.history + g * g
            return w + g / (xp.sqrt(history) + c.eps) * c.minus_lr, dict(history=history)
        history = s.history + g * g
        return w + (g / xp.sqrt(history + c.eps) + w * c.wd) * c.minus_lr, dict(history=history)
