"""AdaDelta (Zeiler, arXiv:1212.5701) in PyTorch's convention (torch.optim.Adadelta).

MXNet's own `adadelta` has no learning rate and keeps the decay out of the averages.
"""
from ..schema import Hyper, Slot
from .base import Rule


class AdadeltaTorch(Rule):
    """Steps in the units of the weight: the root mean square of past steps over that of gradients.

        u     = g + wd w
        v     = rho v + (1 - rho) u^2
        delta = sqrt(x + epsilon) / sqrt(v + epsilon) u
        x     = rho x + (1 - rho) delta^2
        w    -= learning_rate delta
    """

    name = 'adadelta_torch'
    summary = "steps in the units of the weight, PyTorch's convention"
    paper = 'arXiv:1212.5701'
    peers = ('torch.optim.Adadelta',)
    hypers = (
        Hyper('learning_rate', 1.0, '[0, inf)', 'factor on the step'),
        Hyper('wd', 0.0, '[0, inf)', 'weight decay, added to the gradient'),
        Hyper('rho', 0.9, '[0, 1]', 'decay of the two means of squares'),
        Hyper('epsilon', 1e-6, '[0, inf)', 'added to the two means of squares'),
    )

    @staticmethod
    def slots(h):
        return (Slot('mean_sq', torch='square_avg', doc='decayed mean of squared gradients'),
                Slot('mean_sq_delta', torch='acc_delta', doc='decayed mean of squared steps'))

    @staticmethod
    def coefficients(xp, h, t):
        return dict(lr=h.learning_rate, wd=h.wd, rho=h.rho, a=1 - h.rho, eps=h.epsilon)

    @staticmethod
    def step(xp, h, c, w, g, s):
        u = g + c.wd * w
        mean_sq = c.rho * s.mean_sq + c.a * (u * u)
        delta = xp.sqrt(s.mean_sq_delta + c.eps) / xp.sqrt(mean_sq + c.eps) * u
        mean_sq_delta = c.rho * s.mean_sq_delta + c.a * (delta * delta)
        return w - c.lr * delta, dict(mean_sq=mean_sq, mean_sq_delta=mean_sq_delta)
