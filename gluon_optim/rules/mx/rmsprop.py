"""MXNet's `rmsprop` (Tieleman and Hinton, 2012; centered: Graves, arXiv:1308.0850): epsilon is inside the root."""
from ...schema import Hyper, Slot
from .base import VARIANT, WD, DecayedFirst, parameter, parameters, rate


class RMSProp(DecayedFirst):
    """Gradients divided by their running root mean square, MXNet's convention.

        u  = clip(rescale_grad g + wd w)
        n  = gamma1 n + (1 - gamma1) u^2
        w -= learning_rate u / sqrt(n + epsilon)

    centered:

        a  = gamma1 a + (1 - gamma1) u                                   (slot `g`)
        d  = gamma2 d - learning_rate u / sqrt(n - a^2 + epsilon)        (slot `delta`)
        w += d

    variant='2.x', as MXNet 2.0: u = clip(rescale_grad g) + wd w, and where it is not centered the divisor is sqrt(n) + epsilon.
    It calls gamma1 rho, and gamma2 momentum.

    clip_weights: w is clipped afterwards. Where rounding makes n - a^2 negative, MXNet's root may be NaN; here it counts as 0.
    """

    name = 'rmsprop'
    summary = "gradients divided by their running root mean square, MXNet's convention: epsilon inside the root"
    paper = 'Tieleman and Hinton, Lecture 6.5, COURSERA: Neural networks for machine learning, 2012; centered: arXiv:1308.0850'
    peers = ('mxnet.optimizer.RMSProp',)
    hypers = (
        rate(1e-3),
        WD,
        Hyper('gamma1', 0.9, '[0, 1)', 'decay of the means'),
        Hyper('gamma2', 0.9, '[0, inf)', 'decay of the momentum; centered only'),
        Hyper('epsilon', 1e-8, '[0, inf)', 'added to the mean square, inside the root'),
        Hyper('centered', False, (False, True), 'subtract the squared mean of gradients, and keep a momentum'),
        Hyper('clip_weights', None, '(0, inf)', 'bound on each element of the weight', optional=True),
        VARIANT,
    )

    @staticmethod
    def slots(h):
        mean_sq = Slot('n', doc='decayed mean of squared gradients')
        mean = Slot('g', doc='decayed mean of gradients')
        delta = Slot('delta', doc='the last step')
        return (mean_sq, mean, delta) if h.centered else (mean_sq,)

    @staticmethod
    def coefficients(xp, h, t):
        p = parameters(xp, h, 'learning_rate', 'wd', 'gamma1', 'gamma2', 'epsilon')
        c = dict(lr=p.learning_rate, wd=p.wd, gamma=p.gamma1, a=1 - p.gamma1, eps=p.epsilon, mu=p.gamma2)
        if h.clip_weights is not None:
            c['clip_weights'] = parameter(xp, h.clip_weights)
        return c

    @staticmethod
    def step(xp, h, c, w, g, s):
        if h.centered:
            slots = dict(n=c.a * g * g + c.gamma * s.n, g=c.a * g + c.gamma * s.g)
            variance = xp.maximum(slots['n'] - slots['g'] * slots['g'], 0.0)
            slots['delta'] = c.mu * s.delta - c.lr * g / xp.sqrt(variance + c.eps)
            w = w + slots['delta']
        else:
            slots = dict(n=c.a * (g * g) + c.gamma * s.n)
            root = xp.sqrt(slots['n']) + c.eps if h.variant == '2.x' else xp.sqrt(slots['n'] + c.eps)
            w = w - c.lr * (g / root)
        return xp.minimum(xp.maximum(w, -c.clip_weights), c.clip_weights) if 'clip_weights' in c else w, slots
