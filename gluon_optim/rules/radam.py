"""Rectified Adam (Liu et al., arXiv:1908.03265) in PyTorch's convention (torch.optim.RAdam)."""
import math

from ..schema import Hyper
from .base import Rule, bias_correction
from .moments import BETA1, BETA2, DECOUPLED_WD, MEAN, VAR, averaging, decay, decayed, moments

THRESHOLD = 5.0  # PyTorch's and the authors' code; the paper's text says 4
FRACTIONS = 12  # enough to make `langevin` exact up to 2


def langevin(y):
    """coth(y) - 1/y for 0 <= y <= 2, as a continued fraction, free of cancellation."""
    fraction = 2.0 * FRACTIONS + 1
    for odd in range(2 * FRACTIONS - 1, 1, -2):
        fraction = odd + y * y / fraction
    return y / fraction


def length(xp, beta2, t):
    """rho, the number of gradients that the second moment effectively averages: rho_inf - 2 t beta2^t / (1 - beta2^t).

    Early on this is a small difference of large numbers, useless where ``t`` is traced in single precision. With
    a = -log(beta2) / 2 and L(y) = coth(y) - 1/y it equals L(a) + t (1 - L(a t)).

    >>> from gluon_optim.rules.base import scalars
    >>> [round(length(scalars, 0.999, t), 3) for t in (1, 6, 10 ** 5)]
    [1.0, 5.994, 1999.0]
    """
    rho_inf = 2 / (1 - beta2) - 1
    if beta2 == 0:
        return rho_inf
    a = -math.log(beta2) / 2
    early = langevin(min(a, 2.0)) + t * (1 - langevin(xp.minimum(a * t, 2.0)))
    late = rho_inf - 2 * t * xp.exp(-2 * a * t) / bias_correction(xp, beta2, t)
    return xp.where(a * t < 2, early, late)


class RAdam(Rule):
    """Adam that omits its denominator while the second moment averages too few gradients.

        u       = g + wd w                          decoupled_wd: w *= 1 - learning_rate wd instead, u = g
        m       = beta1 m + (1 - beta1) u
        v       = beta2 v + (1 - beta2) u^2
        rho_inf = 2 / (1 - beta2) - 1
        rho     = rho_inf - 2 t beta2^t / (1 - beta2^t)
        r       = sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho))
        w      -= learning_rate m / (1 - beta1^t) times
                  r sqrt(1 - beta2^t) / (sqrt(v) + epsilon)  where rho > 5,  else 1
    """

    name = 'radam'
    summary = 'Adam with the variance of its early steps rectified'
    paper = 'arXiv:1908.03265'
    peers = ('torch.optim.RAdam',)
    hypers = (
        Hyper('learning_rate', 1e-3, '[0, inf)', 'step size'),
        Hyper('wd', 0.0, '[0, inf)', 'weight decay, added to the gradient'),
        BETA1,
        BETA2,
        Hyper('epsilon', 1e-8, '[0, inf)', 'added to the root of the second moment, before its bias correction'),
        DECOUPLED_WD,
    )

    @staticmethod
    def slots(h):
        return MEAN, VAR

    @staticmethod
    def coefficients(xp, h, t):
        correction1, correction2 = bias_correction(xp, h.beta1, t), bias_correction(xp, h.beta2, t)
        rho_inf, rho = 2 / (1 - h.beta2) - 1, length(xp, h.beta2, t)
        # below the threshold the root is unused; these keep its argument positive there
        high, r = max(rho_inf, THRESHOLD), xp.maximum(rho, THRESHOLD)
        rectification = xp.sqrt((r - 4) * (r - 2) * high / ((high - 4) * (high - 2) * r))
        step_size = h.learning_rate / correction1
        return dict(averaging(h), **decay(h),
                    plain=xp.where(rho > THRESHOLD, 0.0, step_size),
                    adaptive=xp.where(rho > THRESHOLD, step_size * rectification * xp.sqrt(correction2), 0.0))

    @staticmethod
    def step(xp, h, c, w, g, s):
        w, u = decayed(h, c, w, g)
        mean, var = moments(c, s, u)
        return w - (c.plain + c.adaptive / (xp.sqrt(var) + c.eps)) * mean, dict(mean=mean, var=var)
