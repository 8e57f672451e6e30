"""MXNet's `adamax` (Kingma and Ba, arXiv:1412.6980, section 7)."""
from ...schema import Hyper, Slot
from ..base import divided
from ..moments import MEAN
from .base import BETA1, BETA2, VARIANT, WD, DecayedFirst, correction, rate


class Adamax(DecayedFirst):
    """Adam with the infinity norm, MXNet's convention. Only MXNet 2.x has an epsilon.

        g  = clip(rescale_grad g + wd w)
        m  = beta1 m + (1 - beta1) g
        u  = max(beta2 u, |g|)
        w -= learning_rate / (1 - beta1^t) m / (u + epsilon)

    variant='2.x', as MXNet 2.0: g = clip(rescale_grad g) + wd w.

    Without epsilon u is 0 until a nonzero gradient has been seen; MXNet's 0/0 is then NaN, here the weight does not change.
    """

    name = 'adamax'
    summary = "Adam with the infinity norm, MXNet's convention: no epsilon"
    paper = 'arXiv:1412.6980'
    peers = ('mxnet.optimizer.Adamax',)
    hypers = (rate(2e-3), WD, BETA1, BETA2,
              Hyper('epsilon', 0.0, '[0, inf)', 'added to the largest gradient; MXNet 1.x has none'), VARIANT)
    operator = False

    @staticmethod
    def slots(h):
        return MEAN, Slot('var', doc='decayed largest gradient')

    @staticmethod
    def coefficients(xp, h, t):
        return dict(lr=h.learning_rate / correction(xp, h.beta1, t), wd=h.wd, b1=h.beta1, a1=1 - h.beta1, b2=h.beta2,
                    eps=h.epsilon)

    @staticmethod
    def step(xp, h, c, w, g, s):
        mean = c.b1 * s.mean + c.a1 * g
        largest = xp.maximum(c.b2 * s.var, xp.abs(g))
        return w - divided(xp, c.lr * mean, largest + c.eps), dict(mean=mean, var=largest)
