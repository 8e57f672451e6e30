"""MXNet's `ftrl` (McMahan et al., Ad click prediction: a view from the trenches, KDD 2013)."""
from ...schema import Hyper, Slot
from .base import WD, MXRule, parameters, rate


class Ftrl(MXRule):
    """Follow the regularized leader; weights that contribute little become exactly 0.

        g  = clip(rescale_grad g)
        z += g - (sqrt(n + g^2) - sqrt(n)) w / learning_rate
        n += g^2
        w  = (sign(z) lamda1 - z) / ((beta + sqrt(n)) / learning_rate + wd)        0 where |z| <= lamda1
    """

    name = 'ftrl'
    summary = 'follow the regularized leader, which makes weights sparse'
    paper = 'McMahan et al., Ad Click Prediction: a View from the Trenches, KDD 2013'
    peers = ('mxnet.optimizer.Ftrl',)
    exceptions = {'lr_mult=0': 'the update divides by the rate: with 0 the weight becomes NaN, as in MXNet'}
    hypers = (
        rate(0.1),
        WD._replace(doc='L2 regularization over all steps together'),
        Hyper('lamda1', 0.01, '[0, inf)', 'L1 regularisation'),
        Hyper('beta', 1.0, '[0, inf)', 'larger values slow the first steps'),
    )

    @staticmethod
    def slots(h):
        return Slot('z', doc='sum of gradients, corrected for the weight'), Slot('n', doc='sum of squared gradients')

    @staticmethod
    def coefficients(xp, h, t):
        p = parameters(xp, h, 'learning_rate', 'wd', 'lamda1', 'beta')
        return dict(lr=p.learning_rate, wd=p.wd, lamda1=p.lamda1, beta=p.beta)

    @staticmethod
    def step(xp, h, c, w, g, s):
        z = s.z + (g - (xp.sqrt(s.n + g * g) - xp.sqrt(s.n)) * w / c.lr)
        n = s.n + g * g
        new = (xp.sign(z) * c.lamda1 - z) / ((c.beta + xp.sqrt(n)) / c.lr + c.wd)
        return new * xp.where(xp.abs(z) > c.lamda1, 1.0, 0.0), dict(z=z, n=n)  # a product, so that NaN is kept
