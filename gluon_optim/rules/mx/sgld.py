"""MXNet's `sgld` (Patterson and Teh, Stochastic gradient Riemannian Langevin dynamics, NIPS 2013)."""
from ..base import NOISE, TEMPERATURE, standard_normal
from .base import WD, MXRule, rate


class SGLD(MXRule):
    """SGD with just enough added noise to turn its path into samples from the posterior.

        g  = clip(rescale_grad g)
        w += -learning_rate / 2 (g + wd w) + sqrt(temperature learning_rate) x

    x is a standard normal sample for each element. With noise='mxnet' MXNet runs it and draws them, parameter by parameter: with
    the same seed, the same samples as MXNet's own optimizer. That has no temperature: it samples at 1.

    noise='philox' draws them from a counter (`gluon_optim.rules.noise`): the key is the optimizer's `seed`, an argument or drawn
    once from MXNet's generator, and the counter is the parameter, the number of its update and the element. It is computed
    in compiled kernels, and the same for all copies of a parameter.
    """

    name = 'sgld'
    summary = 'SGD with added noise: Langevin dynamics'
    paper = 'Patterson and Teh, Stochastic Gradient Riemannian Langevin Dynamics on the Probability Simplex, NIPS 2013'
    peers = ('mxnet.optimizer.SGLD',)
    needs = frozenset({'noise'})
    hypers = (rate(0.01)._replace(domain='[0, inf)'), WD, TEMPERATURE, NOISE._replace(default='mxnet'))
    operator = False

    @staticmethod
    def slots(h):
        return ()

    @staticmethod
    def coefficients(xp, h, t):
        return dict(minus_half_lr=-h.learning_rate / 2, wd=h.wd, deviation=xp.sqrt(h.temperature * h.learning_rate))

    @staticmethod
    def step(xp, h, c, w, g, s):
        return w + c.minus_half_lr * (g + c.wd * w) + c.deviation * standard_normal(xp, w), {}
