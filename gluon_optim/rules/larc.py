"""LARC, layer-wise adaptive rate control (Ginsburg, Gitman and You, 2018), around any other rule.

NVIDIA's two implementations differ where weights decay and where a norm is zero; each is a variant here.
"""
from typing import Iterator, Tuple, Type

from ..schema import Hyper, Values
from .base import BASE_HYPERS, Rule, divided, norm
from .sgd_torch import SGDTorch

TINY = 1e-30  # in place of a learning rate of 0, which would divide by zero


class _Bases:
    """The names of all other rules, a user's registered later included."""

    def __iter__(self) -> Iterator[str]:
        from . import names
        return (name for name in names() if name != LARC.name)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(x == name for x in self)


OWN = (
    Hyper('base', 'sgd_torch', _Bases(), 'the rule that takes the scaled gradient; its arguments are passed along'),
    Hyper('trust_coefficient', 0.02, '(0, inf)', 'largest step, in units of the norm of the weight'),
    Hyper('clip', True, (False, True), 'never exceed the learning rate; False multiplies the two instead'),
    Hyper('epsilon', 1e-8, '[0, inf)', 'added to the norm of the gradient'),
    Hyper('min_update', 0.0, '[0, inf)', "smallest ratio; variant='openseq2seq' only"),
    Hyper('variant', 'apex', ('apex', 'openseq2seq'), 'whose LARC'),
)


def passed_as(name: str) -> str:
    """What an argument of the base is called here: ``base_epsilon`` where LARC has an ``epsilon`` of its own."""
    return 'base_' + name if any(x.name == name for x in OWN) else name


def around(base: Type[Rule]) -> Tuple[Hyper, ...]:
    """The hyper-parameters of LARC around ``base``: the base's rate and decay, LARC's own, the base's others."""
    theirs = tuple(x._replace(name=passed_as(x.name)) for x in base.hypers)
    return theirs[:2] + OWN + theirs[2:]


def inside(h: Values) -> Tuple[Type[Rule], Values]:
    """The base, and as many of its hyper-parameters as ``h`` holds, under the base's names. LARC takes over the decay."""
    from . import get
    base = get(h.base)
    values = {x.name: getattr(h, passed_as(x.name)) for x in base.hypers + BASE_HYPERS if passed_as(x.name) in h}
    if h.variant == 'apex' and 'wd' in values:
        values['wd'] = 0.0
    return base, Values(**values)


class LARC(Rule):
    """LARC: keeps steps small beside the weight. |x| is the L2 norm over the whole parameter.

        a = trust_coefficient |w| / (|g| + wd |w| + epsilon)
        u = min(a / learning_rate, 1) (g + wd w)                         clip=False: a (g + wd w)

    and the base updates w with u in place of g, and with wd=0. Where |w| or |g| is 0, u = g, undecayed. That is
    `variant='apex'`. The other changes:

        openseq2seq  a = trust_coefficient |w| / (|g| + epsilon); u = min(max(a / learning_rate, min_update), 1) g,
                     clip=False: max(a, min_update) g; wd is the base's and not scaled

    With sgd_torch and without decay, clipped, that is a rate of min(learning_rate, trust_coefficient |w| / |g|). An
    argument of the base that LARC has too is passed as base_NAME: base_epsilon, base_variant.
    """

    name = 'larc'
    summary = 'around any rule: a step is at most trust_coefficient times as long as the weight, layer by layer'
    paper = 'Ginsburg, Gitman and You, Large batch training of convolutional networks with LARC, 2018'
    peers = ('NVIDIA apex.parallel.LARC', 'NVIDIA OpenSeq2Seq larc_params')
    hypers = around(SGDTorch)

    @classmethod
    def declared(cls, given):
        from . import get
        switch = OWN[0]
        return around(get(switch.check(given.get('base', switch.default))))

    @staticmethod
    def check(h):
        if h.min_update and h.variant == 'apex':
            raise ValueError(f"`min_update` is not defined for variant='apex'. Received: min_update={h.min_update!r}. "
                             "Leave it out, or use variant='openseq2seq', which defines it.")
        base, values = inside(h)
        base.check(values)

    @staticmethod
    def slots(h):
        base, values = inside(h)
        return base.slots(values)

    @classmethod
    def prepare(cls, xp, c, static, w, g):
        base, _ = inside(Values(**dict(static.switches)))
        return base.prepare(xp, c, static, w, g)

    @staticmethod
    def coefficients(xp, h, t):
        base, values = inside(h)
        own = dict(trust=h.trust_coefficient, eps=h.epsilon, lr=xp.maximum(h.learning_rate, TINY), wd=h.wd,
                   min_update=h.min_update)
        return {**base.coefficients(xp, values, t), **{'larc_' + name: value for name, value in own.items()}}

    @staticmethod
    def step(xp, h, c, w, g, s):
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
        base, values = inside(h)
        if not apex:
            return base.step(xp, values, c, w, ratio * g, s)
        # a weight of zeros takes the gradient as it is, a gradient of zeros brings no decay
        ratio = xp.where(w_norm == 0, 1.0, ratio)
        decay = xp.where(g_norm == 0, 0.0, ratio * c.larc_wd)
        return base.step(xp, values, c, w, ratio * g + decay * w, s)
