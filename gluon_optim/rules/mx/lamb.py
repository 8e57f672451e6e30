"""MXNet's `lamb` (You et al., arXiv:1904.00962)."""
from ...schema import Hyper
from ..base import norm, trust_ratio
from ..moments import MEAN, VAR, averaging, moments
from .base import BETA1, BETA2, VARIANT, WD, MXRule, half_norm, operator_correction, parameters, rate


class LAMB(MXRule):
    """Adam with steps proportional to the norm of the weight, layer by layer. |x| is the L2 norm over the whole parameter.

        g  = clip(rescale_grad g)
        m  = beta1 m + (1 - beta1) g
        v  = beta2 v + (1 - beta2) g^2
        u  = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon) + wd w
        w -= learning_rate |w| / |u| u                                   the ratio is 1 where a norm is 0

    With float32 masters, |w| is the norm of the float16 weight, with squares in float16, as in MXNet 1.9.1 (when it updates lists;
    for a single parameter it takes the norm of the master). variant='2.x', as MXNet 2.0: it is the norm of the master. That counts
    each update twice where its aggregate_num is 1; here it is counted once.

    bias_correction=False omits the two divisors. lower_bound and upper_bound limit |w|.
    """

    name = 'lamb'
    summary = 'Adam with steps proportional to the norm of the weight, layer by layer'
    paper = 'arXiv:1904.00962'
    peers = ('mxnet.optimizer.LAMB', 'optax.lamb')
    hypers = (
        rate(1e-3),
        WD._replace(doc='weight decay, added to the update'),
        BETA1,
        BETA2,
        Hyper('epsilon', 1e-6, '[0, inf)', 'added to the root of the second moment'),
        Hyper('lower_bound', None, '(0, inf)', 'smallest norm of the weight that the ratio uses', optional=True),
        Hyper('upper_bound', None, '(0, inf)', 'largest norm of the weight that the ratio uses', optional=True),
        Hyper('bias_correction', True, (False, True), 'divide the moments by the sums of their weights'),
        VARIANT,
    )

    @classmethod
    def on_masters(cls):
        return MasterLAMB

    @staticmethod
    def slots(h):
        return MEAN, VAR

    @staticmethod
    def coefficients(xp, h, t):
        p = parameters(xp, h, 'learning_rate', 'wd', 'beta1', 'beta2', 'epsilon')
        c = dict(averaging(p), lr=p.learning_rate, wd=p.wd, correction1=operator_correction(xp, h.beta1, t),
                 correction2=operator_correction(xp, h.beta2, t))
        c.update({name: getattr(h, name) for name in ('lower_bound', 'upper_bound') if getattr(h, name) is not None})
        return c

    @classmethod
    def step(cls, xp, h, c, w, g, s):
        mean, var = moments(c, s, g)
        corrected = (mean / c.correction1, var / c.correction2) if h.bias_correction else (mean, var)
        update = corrected[0] / (xp.sqrt(corrected[1]) + c.eps) + c.wd * w
        size = cls.size(xp, h, w)
        if 'lower_bound' in c:
            size = xp.maximum(size, c.lower_bound)
        if 'upper_bound' in c:
            size = xp.minimum(size, c.upper_bound)
        return w - c.lr * trust_ratio(xp, size, norm(xp, update)) * update, dict(mean=mean, var=var)

    @staticmethod
    def size(xp, h, w):
        return norm(xp, w)


class MasterLAMB(LAMB):
    """`LAMB` on float32 masters: MXNet 1.x takes the norm of the float16 weight, in float16."""

    @staticmethod
    def size(xp, h, w):
        return norm(xp, w) if h.variant == '2.x' else half_norm(xp, w)
