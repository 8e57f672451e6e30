"""Preconditioned stochastic gradient Langevin dynamics (Li, Chen, Carlson, Carin, AAAI 2016, arXiv:1512.07666), Algorithm 1."""
from ..schema import Hyper, Slot
from .base import NOISE, TEMPERATURE, Rule, standard_normal


class PSGLD(Rule):
    """Langevin dynamics with RMSprop's preconditioner: each element moves, and is shaken, on its own scale.

        V  = rho V + (1 - rho) g^2
        G  = 1 / (epsilon + sqrt(V))
        w += -learning_rate / 2 G (g + wd w) + sqrt(temperature learning_rate G) x

    x is a standard normal sample for each element, g an estimate of the gradient of the sum of the losses of all N examples, wd w
    the gradient of the prior. The path of w samples from a distribution near exp(-U(w) / temperature). Algorithm 1 also adds Gamma,
    the derivative of G. It needs second derivatives and is left out here; docs/SAMPLING.md says what that costs.

    noise='philox' draws x from a counter (`gluon_optim.rules.noise`): the key is the optimizer's `seed`, an argument or drawn once
    from MXNet's generator, and the counter is the parameter, the number of its update and the element. It is computed in
    compiled kernels, and the same for all copies of a parameter. noise='mxnet' draws with MXNet's operator.

    The paper's V is of the mean gradient, g / N: its lambda, 1e-5, is epsilon / N here, and its step size learning_rate / N.
    """

    name = 'psgld'
    summary = "SGLD with RMSprop's preconditioner: samples from the posterior"
    paper = 'Li, Chen, Carlson, Carin, Preconditioned Stochastic Gradient Langevin Dynamics, AAAI 2016, arXiv:1512.07666'
    needs = frozenset({'noise'})
    hypers = (
        Hyper('learning_rate', 1e-3, '[0, inf)', 'step size; twice the rate of gradient descent'),
        Hyper('wd', 0.0, '[0, inf)', 'precision of the Gaussian prior: weight decay, added to the gradient'),
        Hyper('rho', 0.99, '[0, 1)', 'decay of the mean of squared gradients (alpha in the paper)'),
        Hyper('epsilon', 1.0, '(0, inf)', 'added to the root (N lambda in the paper): no element moves faster than 1 / epsilon'),
        TEMPERATURE,
        NOISE,
    )
    older = {'noise': 'mxnet'}

    @staticmethod
    def slots(h):
        return (Slot('mean_sq', torch='square_avg', doc='decayed mean of squared gradients'),)

    @staticmethod
    def coefficients(xp, h, t):
        return dict(half_lr=h.learning_rate / 2, wd=h.wd, rho=h.rho, a=1 - h.rho, eps=h.epsilon,
                    deviation=xp.sqrt(h.temperature * h.learning_rate))

    @staticmethod
    def step(xp, h, c, w, g, s):
        v = c.rho * s.mean_sq + c.a * (g * g)
        scale = 1.0 / (c.eps + xp.sqrt(v))
        drift = c.half_lr * (scale * (g + c.wd * w))
        return w - drift + c.deviation * (xp.sqrt(scale) * standard_normal(xp, w)), dict(mean_sq=v)
