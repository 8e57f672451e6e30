"""AdaBelief (Zhuang et al., arXiv:2010.07468) as MXNet 2.0 computes it.

Epsilon enters twice: it is added to the variance at every update, where it accumulates, and to the variance's root. The
decay is part of the clipped gradient, unlike in the other rules here.
"""
from ..schema import Hyper
from .base import Rule, bias_correction, clipped
from .moments import BETA1, MEAN, VAR, averaging


class AdaBelief(Rule):
    """Adam with a second moment that measures how far gradients are from their mean.

        u  = clip(rescale_grad g + wd w, clip_gradient)
        m  = beta1 m + (1 - beta1) u
        v  = beta2 v + (1 - beta2) (u - m)^2 + epsilon
        w -= learning_rate sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + epsilon)
    """

    name = 'adabelief'
    summary = 'Adam that takes longer steps where gradients agree with their running mean, as in MXNet 2.0'
    paper = 'arXiv:2010.07468'
    peers = ('mxnet 2.0 AdaBelief',)
    hypers = (
        Hyper('learning_rate', 1e-3, '[0, inf)', 'step size'),
        Hyper('wd', 0.0, '[0, inf)', 'weight decay, added to the gradient before clipping'),
        BETA1,
        Hyper('beta2', 0.999, '[0, 1)', 'decay of the variance of gradients'),
        Hyper('epsilon', 1e-6, '[0, inf)', 'added to the variance at each update, and to its root'),
    )

    @staticmethod
    def slots(h):
        return MEAN, VAR._replace(torch='exp_avg_var', doc='decayed variance of gradients around their mean')

    @classmethod
    def prepare(cls, xp, c, static, w, g):
        return c.rescale_grad * g  # `step` clips

    @staticmethod
    def coefficients(xp, h, t):
        correction1, correction2 = bias_correction(xp, h.beta1, t), bias_correction(xp, h.beta2, t)
        return dict(averaging(h), wd=h.wd, step_size=h.learning_rate * xp.sqrt(correction2) / correction1)

    @staticmethod
    def step(xp, h, c, w, g, s):
        u = clipped(xp, c, g + c.wd * w)
        mean = c.b1 * s.mean + c.a1 * u
        surprise = u - mean
        var = c.b2 * s.var + c.a2 * (surprise * surprise) + c.eps
        return w - c.step_size * mean / (xp.sqrt(var) + c.eps), dict(mean=mean, var=var)
