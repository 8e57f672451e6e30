"""AdaGrad (Duchi et al., JMLR 12, 2011) in PyTorch's convention (torch.optim.Adagrad).

MXNet's own `adagrad` adds epsilon inside the root and decay outside it.
"""
from ..schema import Hyper, Slot
from .base import Rule


class AdagradTorch(Rule):
    """Gradients divided by the root of the sum of all their squares.

        u  = g + wd w
        v  = v + u^2                                (v is initial_accumulator before the first update)
        w -= learning_rate / (1 + (t - 1) lr_decay) u / (sqrt(v) + epsilon)
    """

    name = 'adagrad_torch'
    summary = "gradients divided by the root of the sum of their squares, PyTorch's convention"
    paper = 'Duchi, Hazan and Singer, Adaptive subgradient methods, JMLR 12, 2011'
    peers = ('torch.optim.Adagrad',)
    hypers = (
        Hyper('learning_rate', 0.01, '[0, inf)', 'step size'),
        Hyper('wd', 0.0, '[0, inf)', 'weight decay, added to the gradient'),
        Hyper('lr_decay', 0.0, '[0, inf)', 'the step size is divided by 1 + (t - 1) lr_decay'),
        Hyper('initial_accumulator', 0.0, '[0, inf)', 'sum of squares before the first update'),
        Hyper('epsilon', 1e-10, '[0, inf)', 'added to the root'),
    )

    @staticmethod
    def slots(h):
        return (Slot('sum_sq', init=h.initial_accumulator, torch='sum', doc='sum of squared gradients'),)

    @staticmethod
    def coefficients(xp, h, t):
        return dict(lr=h.learning_rate / (1 + (t - 1) * h.lr_decay), wd=h.wd, eps=h.epsilon)

    @staticmethod
    def step(xp, h, c, w, g, s):
        u = g + c.wd * w
        sum_sq = s.sum_sq + u * u
        return w - c.lr * u / (xp.sqrt(sum_sq) + c.eps), dict(sum_sq=sum_sq)
