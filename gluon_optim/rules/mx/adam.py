"""MXNet's `adam` (Kingma and Ba, arXiv:1412.6980): epsilon is added before bias correction."""
from ...schema import Hyper
from ..moments import MEAN, VAR, averaging, moments
from .base import BETA1, BETA2, LAZY_UPDATE, VARIANT, WD, DecayedFirst, correction, parameter, parameters, rate


class Adam(DecayedFirst):
    """Adam, MXNet's convention.

        u  = clip(rescale_grad g + wd w)
        m  = beta1 m + (1 - beta1) u
        v  = beta2 v + (1 - beta2) u^2
        w -= learning_rate sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + epsilon)

    variant='2.x', as MXNet 2.0: u = clip(rescale_grad g) + wd w.

    float16 weights without masters: MXNet computes in float16, where epsilon is 0, and a zero gradient gives NaN.
    Here they are computed in float32 and stay finite.
    """

    name = 'adam'
    summary = "Adam in MXNet's convention: epsilon before bias correction, decay clipped with the gradient"
    paper = 'arXiv:1412.6980'
    peers = ('mxnet.optimizer.Adam',)
    hypers = (
        rate(1e-3),
        WD,
        BETA1,
        BETA2,
        Hyper('epsilon', 1e-8, '[0, inf)', 'added to the root of the second moment'),
        LAZY_UPDATE,
        VARIANT,
    )

    @staticmethod
    def slots(h):
        return MEAN, VAR

    @staticmethod
    def coefficients(xp, h, t):
        lr = h.learning_rate * xp.sqrt(correction(xp, h.beta2, t)) / correction(xp, h.beta1, t)
        numbers = parameters(xp, h, 'beta1', 'beta2', 'epsilon')
        return dict(averaging(numbers), lr=parameter(xp, lr), wd=parameter(xp, h.wd))

    @staticmethod
    def step(xp, h, c, w, g, s):
        mean, var = moments(c, s, g)
        return w - c.lr * mean / (xp.sqrt(var) + c.eps), dict(mean=mean, var=var)
