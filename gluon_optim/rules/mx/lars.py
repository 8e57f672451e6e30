"""MXNet's `lars` (You, Gitman and Ginsburg, arXiv:1708.03888): rate and ratio are inside the momentum."""
from ...schema import Hyper, Slot
from ..base import divided, norm, rounded_to
from .base import LAZY_UPDATE, MOMENTUM, VARIANT, WD, MXRule, half_norm, parameter, rate, rescaled, rounded


class LARS(MXRule):
    """SGD with steps proportional to the norm of the weight, layer by layer. |x| is the L2 norm over the whole parameter.

        a  = eta |w| / (|g| + wd |w| + eps)                              1 where a norm is 0
        m  = momentum m - learning_rate a wd w - learning_rate a clip(g)
        w += m

    |g| is the norm of the rescaled gradient before clipping. Parameters with names ending in gamma, beta or bias have a = 1.
    With float32 masters, the norms are those of the float16 weight and gradient, with squares in float16, as in MXNet:
    elements below 2e-4 count as 0. variant='2.x', as MXNet 2.0, which calls eps epsilon: with squares in float32.

    momentum_correction: the momentum is multiplied by this call's learning rate divided by the previous call's.

    MXNet updates lists four parameters at a time, and so corrects the momentum of the first four only; here it is
    corrected once for a whole list. With several devices, each keeps its own last rate.
    """

    name = 'lars'
    summary = "SGD with steps proportional to the norm of the weight, layer by layer, MXNet's convention"
    paper = 'arXiv:1708.03888'
    peers = ('mxnet.optimizer.LARS',)
    hypers = (
        rate(0.01),
        WD,
        MOMENTUM,
        LAZY_UPDATE,
        Hyper('eta', 0.001, '(0, inf)', 'length of a step relative to the norm of the weight, at rate 1'),
        Hyper('eps', 0.0, '[0, inf)', 'added to the norm of the gradient'),
        Hyper('momentum_correction', True, (False, True), 'scale the momentum when the learning rate changes'),
        VARIANT,
    )
    supplied = ('correction', 'adapts')  # of the momentum; 1 or 0: whether there is a ratio

    @classmethod
    def on_masters(cls):
        return MasterLARS

    @staticmethod
    def slots(h):
        return (Slot('momentum', doc='the last step'),) if h.momentum > 0 else ()

    @staticmethod
    def coefficients(xp, h, t):
        mu = h.momentum * (h.correction if 'correction' in h else 1.0)
        eta = h.eta * (h.adapts if 'adapts' in h else 1.0)
        return dict(lr=rounded(xp, h.learning_rate), wd=rounded(xp, h.wd), mu=parameter(xp, mu), eta=eta, eps=h.eps)

    @classmethod
    def prepare(cls, xp, c, static, w, g):
        return g  # `step` rescales, after the norm

    @classmethod
    def step(cls, xp, h, c, w, g, s):
        w_norm, g_norm = cls.size(xp, h, w), c.rescale_grad * cls.size(xp, h, g)
        length = c.eta * w_norm
        ratio = divided(xp, length, g_norm + c.wd * w_norm + c.eps)
        ratio = xp.where(length == 0, 1.0, xp.where(g_norm == 0, 1.0, ratio))
        lr = c.lr * ratio
        step = lr * c.wd * w + lr * rescaled(xp, c, g)
        if 'momentum' not in s:
            return w - step, {}
        momentum = c.mu * s.momentum - step
        return w + momentum, dict(momentum=momentum)

    @staticmethod
    def size(xp, h, x):
        return norm(xp, x)


class MasterLARS(LARS):
    """`LARS` on float32 masters: MXNet takes the norms of float16 weight and gradient, 1.x in float16."""

    @staticmethod
    def size(xp, h, x):
        return norm(xp, rounded_to(xp, 'float16', x)) if h.variant == '2.x' else half_norm(xp, x)
