"""MXNet's `sgd`: the learning rate is inside the momentum, which is the next step including its sign.

`sgd_torch` keeps the learning rate outside. The two differ whenever it changes.
"""
from ...schema import Slot
from .base import LAZY_UPDATE, MOMENTUM, WD, ScaledByRate, factor, parameter, rate, rounded


class SGD(ScaledByRate):
    """Stochastic gradient descent, MXNet's convention.

        m  = momentum m - learning_rate wd w - learning_rate g
        w += m
    """

    name = 'sgd'
    summary = "SGD with momentum in MXNet's convention: the learning rate is inside the momentum"
    paper = 'Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013'
    peers = ('mxnet.optimizer.SGD',)
    hypers = (rate(0.01), WD, MOMENTUM, LAZY_UPDATE)

    @staticmethod
    def slots(h):
        return (Slot('momentum', doc='the last step'),) if h.momentum > 0 else ()

    @staticmethod
    def coefficients(xp, h, t):
        lr = rounded(xp, h.learning_rate)
        return dict(lr=factor(h, lr), lr_wd=lr * rounded(xp, h.wd), mu=parameter(xp, h.momentum))

    @staticmethod
    def step(xp, h, c, w, g, s):
        if 'momentum' not in s:
            return w - (c.lr_wd * w + c.lr * g), {}
        momentum = c.mu * s.momentum - c.lr_wd * w - c.lr * g
        return w + momentum, dict(momentum=momentum)
