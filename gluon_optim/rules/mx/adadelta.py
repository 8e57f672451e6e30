"""MXNet's `adadelta` (Zeiler, arXiv:1212.5701): no learning rate, and decay by wd alone."""
from ...schema import Hyper, Slot
from .base import VARIANT, WD, MXRule, rate


class AdaDelta(MXRule):
    """AdaDelta, MXNet's convention.

        g  = clip(rescale_grad g)
        a  = rho a + (1 - rho) g^2
        d  = sqrt(b + epsilon) / sqrt(a + epsilon) g
        b  = rho b + (1 - rho) d^2
        w -= d + wd w

    variant='2.x', as MXNet 2.0, where decay is part of the gradient, and there is a rate:

        g  = clip(rescale_grad g) + wd w
        w -= learning_rate d

    MXNet rescales the caller's gradient in place; here it is left unchanged.
    """

    name = 'adadelta'
    summary = "steps in the units of the weight, with no learning rate, MXNet's convention"
    paper = 'arXiv:1212.5701'
    peers = ('mxnet.optimizer.AdaDelta',)
    exceptions = {'lr_mult=0': 'there is no learning rate: the argument has no effect, as in MXNet'}
    hypers = (rate(0.01)._replace(doc="has no effect, except with variant='2.x'"),
              WD._replace(doc='share of the weight that each step removes'), Hyper('rho', 0.9, '[0, 1)', 'decay of both means'),
              Hyper('epsilon', 1e-5, '[0, inf)', 'added to both means, inside the roots'), VARIANT)
    operator = False

    @staticmethod
    def slots(h):
        return Slot('acc_g', doc='decayed mean of squared gradients'), Slot('acc_delta', doc='decayed mean of squared steps')

    @staticmethod
    def coefficients(xp, h, t):
        c = dict(wd=h.wd, rho=h.rho, a=1 - h.rho, eps=h.epsilon)
        return dict(c, lr=h.learning_rate) if h.variant == '2.x' else c

    @staticmethod
    def step(xp, h, c, w, g, s):
        g = g + c.wd * w if h.variant == '2.x' else g
        acc_g = c.rho * s.acc_g + c.a * g * g
        delta = xp.sqrt(s.acc_delta + c.eps) / xp.sqrt(acc_g + c.eps) * g
        acc_delta = c.rho * s.acc_delta + c.a * delta * delta
        return w - (c.lr * delta if h.variant == '2.x' else delta + c.wd * w), dict(acc_g=acc_g, acc_delta=acc_delta)
