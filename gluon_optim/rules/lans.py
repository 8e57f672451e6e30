"""LANS (Zheng et al., arXiv:2006.13484) as MXNet 2.0's fused step computes it, except that it stays finite on zero gradients.

MXNet 2.0 divides a zero gradient by its norm, which leaves weight and state NaN forever; here it stays zero. Unlike in the
other rules here, the gradient is normalized before it is clipped: `clip_gradient` bounds the elements of a unit vector.
"""
import math

from ..schema import Hyper
from .base import Rule, bias_correction, clipped, divided, norm, trust_ratio
from .moments import BETA1, BETA2, MEAN, VAR, averaging, moments


class LANS(Rule):
    """LAMB on normalized gradients, with Nesterov's momentum. |x| is the L2 norm over the whole parameter.

        h  = clip(g / |g|, clip_gradient)           0 where |g| = 0
        m  = beta1 m + (1 - beta1) h
        v  = beta2 v + (1 - beta2) h^2
        d  = sqrt(v / (1 - beta2^t)) + epsilon
        p  = (m / (1 - beta1^t)) / d + wd w
        q  = h / d + wd w
        r  = |w|, not below lower_bound, not above upper_bound
        w -= learning_rate (beta1 (r / |p|) p + (1 - beta1) (r / |q|) q)

    A ratio is 1 where r or its denominator is 0. |g| is the norm of the rescaled gradient, so `rescale_grad` cancels.
    """

    name = 'lans'
    summary = "LAMB on normalized gradients with Nesterov's momentum, as in MXNet 2.0"
    paper = 'arXiv:2006.13484'
    peers = ('mxnet 2.0 LANS (fused, no gradient of zeros)',)
    hypers = (
        Hyper('learning_rate', 1e-3, '[0, inf)', 'length of a step, in units of the norm of the weight'),
        Hyper('wd', 0.0, '[0, inf)', 'weight decay, added to the normalized step'),
        BETA1,
        BETA2,
        Hyper('epsilon', 1e-6, '[0, inf)', 'added to the root of the corrected second moment'),
        Hyper('lower_bound', None, '(0, inf)', 'smallest norm of the weight that the ratios use', optional=True),
        Hyper('upper_bound', None, '(0, inf)', 'largest norm of the weight that the ratios use', optional=True),
    )

    @staticmethod
    def check(h):
        if (h.lower_bound or 0.0) > (h.upper_bound or math.inf):
            raise ValueError(f'`lower_bound` must not be above `upper_bound`. Received: lower_bound={h.lower_bound}, '
                             f'upper_bound={h.upper_bound}. Swap them, or leave one out.')

    @staticmethod
    def slots(h):
        return MEAN._replace(doc='decayed mean of normalized gradients'), VAR._replace(doc='decayed mean of their squares')

    @classmethod
    def prepare(cls, xp, c, static, w, g):
        return c.rescale_grad * g  # `step` clips

    @staticmethod
    def coefficients(xp, h, t):
        return dict(averaging(h), lr1=h.learning_rate * h.beta1, lr2=h.learning_rate * (1 - h.beta1), wd=h.wd,
                    correction1=bias_correction(xp, h.beta1, t), root_correction2=xp.sqrt(bias_correction(xp, h.beta2, t)),
                    lower=h.lower_bound or 0.0, upper=h.upper_bound or math.inf)

    @staticmethod
    def step(xp, h, c, w, g, s):
        g = clipped(xp, c, divided(xp, g, norm(xp, g)))
        mean, var = moments(c, s, g)
        denominator = xp.sqrt(var) / c.root_correction2 + c.eps
        p = mean / c.correction1 / denominator + c.wd * w
        q = g / denominator + c.wd * w
        size = xp.minimum(xp.maximum(norm(xp, w), c.lower), c.upper)
        update = c.lr1 * trust_ratio(xp, size, norm(xp, p)) * p + c.lr2 * trust_ratio(xp, size, norm(xp, q)) * q
        return w - update, dict(mean=mean, var=var)
