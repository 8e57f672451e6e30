"""LARC, layer-wise adaptive rate control (Ginsburg, Gitman and You, 2018), around any other rule.

NVIDIA's two implementations differ where weights decay and where a norm is zero; each is a variant here.
"""
from ..schema import Hyper
from .base import divided, norm
from .sgd_torch import SGDTorch
from .wrapper import Bases, Wrapper

TINY = 1e-30  # replaces a learning rate of 0, to avoid division by zero

OWN = (
    Hyper('base', 'sgd_torch', Bases(but='larc'), 'the rule that receives the scaled gradient; its arguments are passed on to it'),
    Hyper('trust_coefficient', 0.02, '(0, inf)', 'largest step, in units of the norm of the weight'),
    Hyper('clip', True, (False, True), 'never exceed the learning rate; False multiplies the two instead'),
    Hyper('epsilon', 1e-8, '[0, inf)', 'added to the norm of the gradient'),
    Hyper('min_update', 0.0, '[0, inf)', "smallest ratio; variant='openseq2seq' only"),
    Hyper('variant', 'apex', ('apex', 'openseq2seq'), 'which implementation to follow'),
)


class LARC(Wrapper):
    """LARC: keeps steps small relative to the weight. |x| is the L2 norm over the whole parameter.

        a = trust_coefficient |w| / (|g| + wd |w| + epsilon)
        u = min(a / learning_rate, 1) (g + wd w)                         clip=False: a (g + wd w)

    and the base updates w with u in place of g, and with wd=0. Where |w| or |g| is 0, u = g without decay. This is
    `variant='apex'`. The other variant differs in:

        openseq2seq  a = trust_coefficient |w| / (|g| + epsilon); u = min(max(a / learning_rate, min_update), 1) g,
                     clip=False: max(a, min_update) g; wd goes to the base, unscaled

    With sgd_torch, no decay and clip=True this amounts to a rate of min(learning_rate, trust_coefficient |w| / |g|). An
    argument that both LARC and the base have is passed to the base as base_NAME: base_epsilon, base_variant.
    """

    name = 'larc'
    summary = "wraps any rule and limits each layer's step to trust_coefficient times the norm of its weight"
    paper = 'Ginsburg, Gitman and You, Large batch training of convolutional networks with LARC, 2018'
    peers = ('NVIDIA apex.parallel.LARC', 'NVIDIA OpenSeq2Seq larc_params')
    own = OWN
    hypers = Wrapper.around(OWN, SGDTorch.hypers)

    @classmethod
    def check(cls, h):
        if h.min_update and h.variant == 'apex':
            raise ValueError(f"`min_update` is not defined for variant='apex'. Received: min_update={h.min_update!r}. "
                             "Leave it out, or use variant='openseq2seq', which defines it.")
        super().check(h)

    @classmethod
    def takes_over(cls, h):
        return {'wd': 0.0} if h.variant == 'apex' else {}

    @classmethod
    def own_coefficients(cls, xp, h, t):
        return dict(trust=h.trust_coefficient, eps=h.epsilon, lr=xp.maximum(h.learning_rate, TINY), wd=h.wd,
                    min_update=h.min_update)

    @classmethod
    def step(cls, xp, h, c, w, g, s):
        apex = h.variant == 'apex'
        w_norm, g_norm = norm(xp, w), norm(xp, g)
        size = g_norm + c.larc_eps + c.larc_wd * w_norm if apex else g_norm + c.larc_eps
        ratio = divided(xp, c.larc_trust * w_norm, size)
        if h.clip:
            ratio = ratio / c.larc_lr
        if not apex:
            ratio = xp.maximum(ratio, c.larc_min_update)
        if h.clip:
            ratio = xp.minimum(ratio, 1.0)
        base, values = cls.inside(h)
        if not apex:
            return base.step(xp, values, c, w, ratio * g, s)
        # zero weight: gradient unchanged; zero gradient: no decay
        ratio = xp.where(w_norm == 0, 1.0, ratio)
        decay = xp.where(g_norm == 0, 0.0, ratio * c.larc_wd)
        return base.step(xp, values, c, w, ratio * g + decay * w, s)
