"""The rules by name. `gluon_optim.rules.catalog` registers this package's own, `add` a user's."""
from typing import Any, Dict, List, Optional, Type, Union

from ..schema import check_known, lower_name
from .base import Rule
from .validate import validate

__all__ = ['DROP_INS', 'RULES', 'SAMPLERS', 'add', 'get', 'names', 'register']

RULES: Dict[str, Type[Rule]] = {}
DROP_INS: Dict[str, Type[Rule]] = {}  # the rules of MXNet's own optimizers
SAMPLERS: Dict[str, Type[Rule]] = {}  # rules that draw samples: no list of optimizers has them


def get(name: str) -> Type[Rule]:
    """The rule registered as ``name`` (case does not matter).

    Raises ValueError for an unknown name, TypeError for one that is not a string.

    >>> from gluon_optim.rules import get
    >>> get('novograd')
    <class 'gluon_optim.rules.novograd.NovoGrad'>
    >>> get('novogard')
    Traceback (most recent call last):
      ...
    ValueError: Unknown optimizer 'novogard'. Did you mean 'novograd'? Known: 'adabelief', ...
    """
    known = {**DROP_INS, **SAMPLERS, **RULES}
    check_known('optimizer', lower_name(name), known, ValueError)
    return known[name.lower()]


def names(drop_ins: bool = False, samplers: bool = False) -> List[str]:
    """All registered names, sorted; with ``drop_ins`` those of MXNet's own optimizers too, with ``samplers`` those of
    samplers such as psgld.

    Raises nothing.

    >>> 'novograd' in names(), 'adam' in names(), 'adam' in names(drop_ins=True)
    (True, False, True)
    """
    return sorted({*RULES, *(DROP_INS if drop_ins else ()), *(SAMPLERS if samplers else ())})


def add(rule: Type[Rule], name: Optional[str] = None) -> None:
    """Add a user's rule under ``name``, or under the rule's own name. A name that is taken is refused; the same class may be
    added again, as in a notebook. The rule is run once to check that it is valid.

    Raises TypeError for a class that does not work as a rule, ValueError for a name that is taken or not in lower case.

    >>> from gluon_optim import rules
    >>> rules.add(type('Nothing', (rules.Rule,), {'name': 'Nothing'}))
    Traceback (most recent call last):
      ...
    ValueError: The name of an optimizer must be in lower case, as MXNet looks it up. Received: 'Nothing'. Use 'nothing'.
    """
    name = str(name or getattr(rule, 'name', rule.__name__.lower()))
    taken: Type[Rule] = {**DROP_INS, **SAMPLERS, **RULES}.get(name, rule)
    if (taken.__module__, taken.__qualname__) != (rule.__module__, rule.__qualname__):
        raise ValueError(f'The name {name!r} is taken by {taken!r}. Register under another: @register({name + "2"!r}).')
    if name != name.lower():
        raise ValueError(f'The name of an optimizer must be in lower case, as MXNet looks it up. Received: {name!r}. '
                         f'Use {name.lower()!r}.')
    validate(rule, name)
    rule.name = name
    RULES[name] = rule


def register(what: Union[str, Type[Rule]]) -> Any:
    """Class decorator for your own rule where MXNet is not installed; see `gluon_optim.mxnet.registry.register`.

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
