"""MXNet's `dcasgd` (Zheng et al., Asynchronous stochastic gradient descent with delay compensation, arXiv:1609.08326)."""
from ...schema import Hyper, Slot
from .base import MOMENTUM, VARIANT, WD, MXRule, rate


class DCASGD(MXRule):
    """SGD that corrects gradients for how far the weight has moved since.

        g  = clip(rescale_grad g)
        m  = momentum m - learning_rate (g + wd w + lamda g^2 (w - previous))
        previous = w
        w += m

    variant='2.x', as MXNet 2.0: g = clip(rescale_grad g) + wd w in both places, without another wd w.

    MXNet 1.9.1 raises ValueError with momentum ("truth value of an NDArray"); here it works.
    """

    name = 'dcasgd'
    summary = 'SGD with delay compensation, for asynchronous training'
    paper = 'arXiv:1609.08326'
    peers = ('mxnet.optimizer.DCASGD',)
    hypers = (rate(0.01), WD, MOMENTUM, Hyper('lamda', 0.04, '(-inf, inf)', 'strength of the compensation'), VARIANT)
    operator = False

    @staticmethod
    def slots(h):
        previous = Slot('previous_weight', init='weight', doc='the weight before the last step')
        return (Slot('momentum', doc='the last step'), previous) if h.momentum > 0 else (previous,)

    @staticmethod
    def coefficients(xp, h, t):
        return dict(minus_lr=-h.learning_rate, wd=h.wd, mu=h.momentum, lamda=h.lamda)

    @staticmethod
    def step(xp, h, c, w, g, s):
        decayed = g + c.wd * w
        g = decayed if h.variant == '2.x' else g
        step = c.minus_lr * (decayed + c.lamda * g * g * (w - s.previous_weight))
        slots = dict(previous_weight=w)
        if 'momentum' in s:
            step = slots['momentum'] = c.mu * s.momentum + step
        return w + step, slots
