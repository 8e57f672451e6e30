"""The optimizers, one file each, as mathematics. `get` finds one by its registered name."""
from typing import Dict, List, Type

from ..schema import check_known
from .adamw import AdamW
from .base import Rule
from .novograd import NovoGrad
from .sgd_torch import SGDTorch

__all__ = ['Rule', 'get', 'names']

_RULES: Dict[str, Type[Rule]] = {rule.name: rule for rule in (AdamW, NovoGrad, SGDTorch)}


def get(name: str) -> Type[Rule]:
    """The rule registered as ``name`` (case does not matter).

    >>> get('novograd')
    <class 'gluon_optim.rules.novograd.NovoGrad'>
    >>> get('novogard')
    Traceback (most recent call last):
      ...
    ValueError: Unknown optimizer 'novogard'. Did you mean 'novograd'? Known: 'adamw', 'novograd', 'sgd_torch'.
    """
    check_known('optimizer', name.lower(), _RULES, ValueError)
    return _RULES[name.lower()]


def names() -> List[str]:
    """All registered names, sorted."""
    return sorted(_RULES)


def add(rule: Type[Rule]) -> None:
    """Add a user's own rule under ``rule.name``; a name that is taken is refused."""
    if rule.name in _RULES and _RULES[rule.name] is not rule:
        raise ValueError(f'The name {rule.name!r} is taken by {_RULES[rule.name]!r}. Give the rule another `name`.')
    _RULES[rule.name] = rule
