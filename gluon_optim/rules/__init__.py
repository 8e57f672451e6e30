"""The optimizers, one file each, as mathematics. `get` finds one by its registered name.

>>> from gluon_optim import rules
>>> rules.get('novograd').paper
'arXiv:1905.11286'
"""
from typing import Any, Dict, List, Optional, Type, Union

from ..schema import check_known, folded
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
from .trial import check

__all__ = ['Rule', 'get', 'names']

_RULES: Dict[str, Type[Rule]] = {rule.name: rule for rule in (
    AdaBelief, AdadeltaTorch, AdagradTorch, AdamTorch, AdamaxTorch, AdamW, ASGD, LANS, LARC, NAdamTorch, NoiseAdaptiveSGD,
    NovoGrad, RAdam, RMSpropTorch, Rprop, SGDEMA, SGDTorch, SNGD)}


def get(name: str) -> Type[Rule]:
    """The rule registered as ``name`` (case does not matter).

    Raises ValueError for an unknown name, TypeError for one that is not a string.

    >>> get('novograd')
    <class 'gluon_optim.rules.novograd.NovoGrad'>
    >>> get('novogard')
    Traceback (most recent call last):
      ...
    ValueError: Unknown optimizer 'novogard'. Did you mean 'novograd'? Known: 'adabelief', ...
    """
    known = {**DROP_INS, **_RULES}
    check_known('optimizer', folded(name), known, ValueError)
    return known[name.lower()]


def names(drop_ins: bool = False) -> List[str]:
    """All registered names, sorted; with ``drop_ins`` those of MXNet's own optimizers too.

    Raises nothing.

    >>> 'novograd' in names(), 'adam' in names(), 'adam' in names(drop_ins=True)
    (True, False, True)
    """
    return sorted({**DROP_INS, **_RULES} if drop_ins else _RULES)


def add(rule: Type[Rule], name: Optional[str] = None) -> None:
    """Add a user's own rule under ``name`` or its own. A name that is taken is refused; the same class may come again,
    as it does in a notebook. A class that is no rule is refused: it is run once."""
    name = str(name or getattr(rule, 'name', rule.__name__.lower()))
    taken: Type[Rule] = {**DROP_INS, **_RULES}.get(name, rule)
    if (taken.__module__, taken.__qualname__) != (rule.__module__, rule.__qualname__):
        raise ValueError(f'The name {name!r} is taken by {taken!r}. Register under another: @register({name + "2"!r}).')
    if name != name.lower():
        raise ValueError(f'The name of an optimizer must be in lower case, as MXNet looks it up. Received: {name!r}. '
                         f'Use {name.lower()!r}.')
    check(rule, name)
    rule.name = name
    _RULES[name] = rule


def register(what: Union[str, Type[Rule]]) -> Any:
    """Class decorator for a rule of one's own, where there is no MXNet; see `gluon_optim.mxnet.registry.register`.

    ``what`` is the class, or a name for it. Raises ValueError for a name that is taken, TypeError for what is not a rule:

    >>> register(int)
    Traceback (most recent call last):
      ...
    TypeError: `register` takes a gluon_optim.Rule where MXNet is not installed. Received: <class 'int'>. Derive from it.
    """
    if isinstance(what, str):
        return lambda rule: _registered(rule, what)
    return _registered(what, None)


def _registered(rule: Type[Rule], name: Optional[str]) -> Type[Rule]:
    if not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise TypeError(f'`register` takes a gluon_optim.Rule where MXNet is not installed. Received: {rule!r}. Derive from it.')
    add(rule, name)
    return rule
