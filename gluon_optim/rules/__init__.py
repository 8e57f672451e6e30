"""The optimizers, one file each, as mathematics. `get` finds one by its registered name."""
from typing import Dict, List, Type

from ..schema import check_known
from .adabelief import AdaBelief
from .adadelta_torch import AdadeltaTorch
from .adagrad_torch import AdagradTorch
from .adam_torch import AdamTorch
from .adamax_torch import AdamaxTorch
from .adamw import AdamW
from .asgd import ASGD
from .base import Rule
from .lans import LANS
from .larc import LARC
from .mx import DROP_INS
from .nadam_torch import NAdamTorch
from .noise_adaptive_sgd import NoiseAdaptiveSGD
from .novograd import NovoGrad
from .radam import RAdam
from .rmsprop_torch import RMSpropTorch
from .rprop import Rprop
from .sgd_ema import SGDEMA
from .sgd_torch import SGDTorch
from .sngd import SNGD

__all__ = ['Rule', 'get', 'names']

_RULES: Dict[str, Type[Rule]] = {rule.name: rule for rule in (
    AdaBelief, AdadeltaTorch, AdagradTorch, AdamTorch, AdamaxTorch, AdamW, ASGD, LANS, LARC, NAdamTorch, NoiseAdaptiveSGD,
    NovoGrad, RAdam, RMSpropTorch, Rprop, SGDEMA, SGDTorch, SNGD)}


def get(name: str) -> Type[Rule]:
    """The rule registered as ``name`` (case does not matter).

    >>> get('novograd')
    <class 'gluon_optim.rules.novograd.NovoGrad'>
    >>> get('novogard')
    Traceback (most recent call last):
      ...
    ValueError: Unknown optimizer 'novogard'. Did you mean 'novograd'? Known: 'adabelief', ...
    """
    known = {**DROP_INS, **_RULES}
    check_known('optimizer', name.lower(), known, ValueError)
    return known[name.lower()]


def names(drop_ins: bool = False) -> List[str]:
    """All registered names, sorted; with ``drop_ins`` those of MXNet's own optimizers too."""
    return sorted({**DROP_INS, **_RULES} if drop_ins else _RULES)


def add(rule: Type[Rule]) -> None:
    """Add a user's own rule under ``rule.name``; a name that is taken is refused."""
    taken = _RULES.get(rule.name, DROP_INS.get(rule.name, rule))
    if taken is not rule:
        raise ValueError(f'The name {rule.name!r} is taken by {taken!r}. Give the rule another `name`.')
    _RULES[rule.name] = rule
