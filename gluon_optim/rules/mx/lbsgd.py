"""MXNet's `lbsgd`: SGD that emulates large batches by summing gradients, with a learning rate warm-up."""
from ...schema import Hyper
from ..base import Rule
from .base import MOMENTUM, WD, factor, parameter, rate, rescaled, working
from .sgd import SGD

SMALLEST, LARGEST = 0.01, 100.0   # bounds of the ratio with warmup_strategy='lars'
TINY = 1e-18                      # added to its divisor


def progress(xp, h, update):
    """The completed fraction of the warm-up, 0 to 1; ``update`` counts gradients."""
    length = h.warmup_epochs * h.updates_per_epoch
    return xp.minimum(update / length, 1.0) if length > 1 else 1.0


class LBSGD(SGD):
    """SGD on the mean of every batch_scale gradients; the rule's gradient is their sum G.

        g  = clip(rescale_grad G / batch_scale)
        r  = min(n / (warmup_epochs updates_per_epoch), 1)               n: gradients seen, including those before begin_epoch
        f  = 1 + (batch_scale - 1) r                                     'power2': r^2, 'sqrt': sqrt(r)
        m  = momentum m - learning_rate f (g + wd w)
        w += m

    warmup_strategy='lars': f = sqrt(|w|^2 / (|g|^2 + wd |w|^2)), from 0.01 to 100, throughout; |g| of G / batch_scale.

    The sum is kept on the optimizer. MXNet reads the rate before it counts the update. It keeps the first
    of batch_scale gradients by reference, so the next backward pass overwrites it; here it is copied. With several devices
    MXNet accumulates all their gradients in one place; here each device has its own sum.
    """

    name = 'lbsgd'
    summary = 'SGD for large batches: averages several gradients and warms up the learning rate'
    paper = 'Goyal et al., arXiv:1706.02677; lars: arXiv:1708.03888'
    peers = ('mxnet.optimizer.LBSGD',)
    exceptions = {'rescaling': "warmup_strategy='lars' takes the norm of the gradient before rescaling, as in MXNet"}
    needs = frozenset({'several gradients'})
    hypers = (  # type: ignore[assignment]
        rate(0.01),
        WD,
        MOMENTUM,
        Hyper('warmup_strategy', 'linear', ('linear', 'power2', 'sqrt', 'lars'), "how the rate grows; 'lars': layer by layer"),
        Hyper('warmup_epochs', 5, '[0, inf)', 'epochs until the rate is batch_scale times the learning rate'),
        Hyper('batch_scale', 1, '[1, inf)', 'gradients per update'),
        Hyper('updates_per_epoch', 32, '(0, inf)', 'gradients per epoch'),
        Hyper('begin_epoch', 0, '[0, inf)', 'epochs already completed'),
        Hyper('num_epochs', 60, '[0, inf)', 'has no effect'),
    )

    @classmethod
    def coefficients(cls, xp, h, t):
        grown = progress(xp, h, h.begin_epoch * h.updates_per_epoch + t)
        grown = grown * grown if h.warmup_strategy == 'power2' else xp.sqrt(grown) if h.warmup_strategy == 'sqrt' else grown
        multiple = 1.0 if h.warmup_strategy == 'lars' else 1 + (h.batch_scale - 1) * grown
        lr, wd = parameter(xp, multiple * h.learning_rate), parameter(xp, h.wd)
        return dict(lr=factor(h, lr), lr_wd=lr * wd, rest=working(xp, 1 - working(xp, lr * wd)), mu=parameter(xp, h.momentum),
                    wd=h.wd, scale=h.batch_scale)

    @classmethod
    def prepare(cls, xp, c, static, w, g):
        return g / c.scale  # `step` rescales, after the norm

    @classmethod
    def step(cls, xp, h, c, w, g, s):
        if h.warmup_strategy == 'lars':
            w_sq, g_sq = xp.sum(w * w), xp.sum(g * g)
            ratio = xp.sqrt(w_sq / (g_sq + c.wd * w_sq + TINY))
            ratio = xp.minimum(xp.maximum(ratio, SMALLEST), LARGEST)
            c = c.replace(lr=ratio * c.lr, lr_wd=ratio * c.lr_wd, rest=1.0 - ratio * c.lr_wd)
        g = rescaled(xp, c, g) if 'clip_gradient' in c else g
        if 'momentum' not in s:
            return c.rest * w - c.lr * g, {}  # as MXNet's operator for one parameter, which rounds otherwise than that for lists
        return super().step(xp, h, c, w, g, s)


class Accumulation(Rule):
    """The sum of gradients in the place of the weight: the first of them, or one more."""

    name = 'accumulation'
    hypers = (Hyper('learning_rate', 0.0, '[0, 0]'), Hyper('wd', 0.0, '[0, 0]'),
              Hyper('first', False, (False, True), 'whether the sum starts with this gradient'))

    @staticmethod
    def slots(h):
        return ()

    @staticmethod
    def coefficients(xp, h, t):
        return {}

    @classmethod
    def prepare(cls, xp, c, static, w, g):
        return g

    @staticmethod
    def step(xp, h, c, w, g, s):
        return g if h.first else w + g, {}
