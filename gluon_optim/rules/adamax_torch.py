"""AdaMax (Kingma and Ba, arXiv:1412.6980, Algorithm 2) in PyTorch's convention (torch.optim.Adamax).

MXNet's own `adamax` has no epsilon.
"""
from ..schema import Hyper, Slot
from .base import Rule, bias_correction
from .moments import BETA1, MEAN


class AdamaxTorch(Rule):
    """Adam with a decayed maximum in place of the root mean square.

        u  = g + wd w
        m  = beta1 m + (1 - beta1) u
        n  = max(beta2 n, |u| + epsilon)
        w -= learning_rate m / ((1 - beta1^t) n)
    """

    name = 'adamax_torch'
    summary = "Adam with a decayed maximum in place of the second moment, PyTorch's convention"
    paper = 'arXiv:1412.6980'
    peers = ('torch.optim.Adamax',)
    hypers = (
        Hyper('learning_rate', 2e-3, '[0, inf)', 'step size'),
        Hyper('wd', 0.0, '[0, inf)', 'weight decay, added to the gradient'),
        BETA1,
        Hyper('beta2', 0.999, '[0, 1)', 'decay of the largest gradient'),
        Hyper('epsilon', 1e-8, '[0, inf)', 'added to the absolute value of the gradient'),
    )

    @staticmethod
    def slots(h):
        return MEAN, Slot('largest', torch='exp_inf', doc='decayed maximum of |gradient| + epsilon')

    @staticmethod
    def coefficients(xp, h, t):
        return dict(wd=h.wd, b1=h.beta1, a1=1 - h.beta1, b2=h.beta2, eps=h.epsilon,
                    step_size=h.learning_rate / bias_correction(xp, h.beta1, t))

    @staticmethod
    def step(xp, h, c, w, g, s):
        u = g + c.wd * w
        mean = c.b1 * s.mean + c.a1 * u
        largest = xp.maximum(c.b2 * s.largest, xp.abs(u) + c.eps)
        return w - c.step_size * mean / largest, dict(mean=mean, largest=largest)
