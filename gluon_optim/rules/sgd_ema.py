"""SGD on a running average of gradients: the non-standard parametrization of momentum (McAllester's lectures).

The length of a step does not depend on `momentum`: learning_rate here corresponds to learning_rate (1 - momentum) in
`sgd_torch`.
"""
from ..schema import Hyper, Slot
from .base import Rule, bias_correction


class SGDEMA(Rule):
    """Momentum as an average.

        u  = g + wd w
        m  = momentum m + (1 - momentum) u
        n  = m                                      bias_correction: m / (1 - momentum^t)
        w -= learning_rate n                        nesterov: learning_rate ((1 - momentum) u + momentum n)

    With nesterov, w is the lecture's lookahead point, where gradients are taken, as in PyTorch.
    """

    name = 'sgd_ema'
    summary = 'SGD on a running average of gradients, so the step length does not depend on the momentum'
    paper = 'D. McAllester, Fundamentals of Deep Learning (TTIC 31230, 2018): SGD, momentum in a non-standard parametrization'
    peers = ('torch.optim.SGD (learning_rate (1 - momentum))',)
    hypers = (
        Hyper('learning_rate', 0.01, '[0, inf)', 'step size'),
        Hyper('wd', 0.0, '[0, inf)', 'weight decay, added to the gradient'),
        Hyper('momentum', 0.9, '[0, 1)', 'decay of the average; 0 keeps none'),
        Hyper('nesterov', False, (False, True), "Nesterov's momentum"),
        Hyper('bias_correction', False, (False, True), 'divide the average by the sum of its weights'),
    )

    @staticmethod
    def slots(h):
        return (Slot('mean', torch='exp_avg', doc='decayed mean of gradients'),) if h.momentum > 0 else ()

    @staticmethod
    def coefficients(xp, h, t):
        lr = h.learning_rate / bias_correction(xp, h.momentum, t) if h.bias_correction else h.learning_rate
        return dict(wd=h.wd, mu=h.momentum, a=1 - h.momentum, lr=h.learning_rate, lr_mean=lr,
                    lr_ahead=lr * h.momentum, lr_gradient=h.learning_rate * (1 - h.momentum))

    @staticmethod
    def step(xp, h, c, w, g, s):
        u = g + c.wd * w
        if 'mean' not in s:
            return w - c.lr * u, {}
        mean = c.mu * s.mean + c.a * u
        update = c.lr_gradient * u + c.lr_ahead * mean if h.nesterov else c.lr_mean * mean
        return w - update, dict(mean=mean)
