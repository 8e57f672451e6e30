"""MXNet's `lbsgd`: SGD that emulates large batches by summing gradients, with a learning rate warm-up."""
from ...schema import Hyper
from .base import MOMENTUM, WD, rate, rescaled
from .sgd import SGD

SMALLEST, LARGEST = 0.01, 100.0   # bounds of the ratio with warmup_strategy='lars'
TINY = 1e-18                      # added to its divisor


def progress(xp, h, update):
    """The completed fraction of the warm-up, 0 to 1; ``update`` counts gradients."""
    length = h.warmup_epochs * h.updates_per_epoch
    return xp.minimum(update / length, 1.0) if length > 1 else 1.0


class LBSGD(SGD):
    """SGD on the mean of every batch_scale gradients; `g` stands for that mean.

        r  = min(n / (warmup_epochs updates_per_epoch), 1)               n: gradients seen, including those before begin_epoch
        f  = 1 + (batch_scale - 1) r                                     'power2': r^2, 'sqrt': sqrt(r)
        m  = momentum m - learning_rate f (g + wd w)
        w += m

    warmup_strategy='lars': f = sqrt(|w|^2 / (|g|^2 + wd |w|^2)), from 0.01 to 100, throughout; |g| before rescaling.

    MXNet runs it, and the mean is kept on the optimizer. MXNet reads the rate before it counts the update. It keeps the first
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
        factor = 1.0 if h.warmup_strategy == 'lars' else 1 + (h.batch_scale - 1) * grown
        return dict(super().coefficients(xp, h.replace(learning_rate=factor * h.learning_rate), t), wd=h.wd)

    @classmethod
    def prepare(cls, xp, c, static, w, g):
        return g  # `step` rescales, after the norm

    @classmethod
    def step(cls, xp, h, c, w, g, s):
        if h.warmup_strategy == 'lars':
            w_sq, g_sq = xp.sum(w * w), xp.sum(g * g)
            ratio = xp.sqrt(w_sq / (g_sq + c.wd * w_sq + TINY))
            ratio = xp.minimum(xp.maximum(ratio, SMALLEST), LARGEST)
            c = c.replace(lr=ratio * c.lr, lr_wd=ratio * c.lr_wd)
        return super().step(xp, h, c, w, rescaled(xp, c, g) if 'clip_gradient' in c else g, s)
