"""Averaged SGD (Polyak and Juditsky, SIAM J. Control Optim. 30, 1992) as torch.optim.ASGD computes it.

As in PyTorch, the weight itself is not the average. The average is the slot `average`: use it for evaluation at the end.
"""
from ..schema import Hyper, Slot
from .base import Rule, scalar


class ASGD(Rule):
    """SGD with a decaying rate that also keeps a running average of its weights.

        u   = g + wd w
        w   = (1 - lambd eta) w - eta u             eta is learning_rate at the first update
        a  += mu (w - a)                            mu is 1 at the first update
        eta = learning_rate / (1 + lambd learning_rate t)^alpha
        mu  = 1 / max(1, t - t0)

    eta and mu are used one update after they are computed, so a change of the learning rate takes effect one update late.
    """

    name = 'asgd'
    summary = 'SGD that also keeps a running average of its weights'
    paper = 'Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992'
    peers = ('torch.optim.ASGD',)
    exceptions = {'wd_mult=0': '`lambd` is a separate decay that wd_mult does not affect'}
    hypers = (
        Hyper('learning_rate', 0.01, '[0, inf)', 'step size of the first update'),
        Hyper('wd', 0.0, '[0, inf)', 'weight decay, added to the gradient'),
        Hyper('lambd', 1e-4, '[0, inf)', 'how fast the step size falls; also acts as a weight decay'),
        Hyper('alpha', 0.75, '[0, inf)', 'exponent with which the step size falls'),
        Hyper('t0', 1e6, '[0, inf)', 'update at which averaging starts; until then the average is the weight'),
    )

    @staticmethod
    def slots(h):
        return (Slot('average', torch='ax', doc='average of the weights since update t0'),
                Slot('eta', 'scalar', torch='eta', doc='step size of the next update'),
                Slot('mu', 'scalar', 1.0, torch='mu', doc='share of the next weight in the average'))

    @staticmethod
    def coefficients(xp, h, t):
        first = xp.where(t == 1, 1.0, 0.0)
        return dict(first_eta=first * h.learning_rate, later=1 - first, wd=h.wd + h.lambd,
                    next_eta=h.learning_rate * xp.exp(-h.alpha * xp.log(1 + h.lambd * h.learning_rate * t)),
                    next_mu=1 / xp.maximum(1.0, t - h.t0))

    @staticmethod
    def step(xp, h, c, w, g, s):
        eta = c.first_eta + c.later * s.eta
        w = w - eta * (g + c.wd * w)
        average = (1 - s.mu) * s.average + s.mu * w  # exactly w while mu is 1
        return w, dict(average=average, eta=scalar(c.next_eta, like=eta), mu=scalar(c.next_mu, like=s.mu))
