"""Where every conversion starts: the states under the rule that runs them, and the parameters to convert."""
import difflib
from typing import Dict, Iterable, List, Optional, Sequence, Tuple, Type

from .. import rules
from ..rules import Rule
from ..schedules.catalog import base_lr_of
from ..schema import Values, check_known, one_of
from ..states.model import STATISTICS, OptimizerStates, ParameterInfo, has_rule
from ..states.mxnet_files import mxnet2
from .classes import Foreign

__all__ = ['groups', 'normalize', 'own_hypers', 'select', 'split']


def select(states: OptimizerStates, names: Optional[Iterable[str]] = None, frozen: bool = True) -> List[ParameterInfo]:
    """The parameters ``names`` in that order; for None, all except running statistics, in trainer order, and without ``frozen``
    also except those that get no gradient and have no state.

    Unknown and repeated names are refused.
    """
    if names is None:  # running statistics are parameters in Gluon, but no optimizer handles them
        names = [info.name for info in states.parameters if info.name in states.slots or not (
            info.name.endswith(STATISTICS) or (info.grad_req == 'null' and not frozen))]
    if isinstance(names, str):
        raise TypeError(f'`params` must be a list of names. Received: {names!r}. Write [{names!r}].')
    known = {info.name: info for info in states.parameters}
    shared = {name: first for name, first in (states.facts or {}).get('shared', {}).items() if name not in known}
    names = [shared.get(name, name) if isinstance(name, str) else name for name in names]
    for name in names:
        check_known('parameter', name, known, ValueError)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f'`params` must name each parameter once. Received twice: {one_of(repeated)}.')
    if not names:
        raise ValueError('Nothing to convert. Omit `params` to convert all parameters.')
    return [known[name] for name in names]


def normalize(states: OptimizerStates, allow_lossy: bool = False, target: str = 'mirror'
              ) -> Tuple[OptimizerStates, Type[Rule], Values]:
    """The first step of all converters: the states (MXNet 2.x's under a rule that computes the same), that rule, and the
    hyper-parameters with which the run continues, at the scheduler's rate, which in MXNet's own files is not the optimizer's.

    A mirror keeps the variant of MXNet 2.x's drop-ins. Classes of other projects have none: they compute what a rule without a
    variant does, where there is one.

    Raises what `mxnet2.as_rule` raises, and ValueError or TypeError if the hyper-parameters are not the rule's.
    """
    states = mxnet2.as_rule(states if target == 'mirror' else mxnet2.as_written(states), allow_lossy)
    if states.optimizer and not has_rule(states):
        near = difflib.get_close_matches(states.optimizer, rules.names(drop_ins=True, samplers=True), n=1)
        hint = f' Did you mean {near[0]!r}?' if near else ''
        raise ValueError('The optimizer must be one of gluon_optim.list_optimizers(), or it is unknown what its arrays mean. '
                         f'Received: {states.optimizer!r}.{hint} If it computes what one of them does, say which: '
                         "states.as_rule('adamw'). If it is your own rule, import the module that registers it first.")
    rule = rules.get(states.optimizer)
    h = rule.hyperparameters(**states.hypers)
    base_lr = base_lr_of(states.scheduler or {})
    return states, rule, h.replace(learning_rate=float(base_lr)) if isinstance(base_lr, (int, float)) else h


def own_hypers(h: Values, info: ParameterInfo) -> Values:
    """The hyper-parameters of one parameter: with its multipliers applied, for gradients that need no rescaling."""
    return h.replace(learning_rate=h.learning_rate * info.lr_mult, wd=h.wd * info.wd_mult, rescale_grad=1.0)


def groups(chosen: Sequence[ParameterInfo]) -> Dict[Tuple[float, float], List[int]]:
    """Positions in ``chosen`` by (lr_mult, wd_mult), in order of first appearance.

    >>> weight, bias = [ParameterInfo(name, name, (2,), 'float32', wd_mult=mult) for name, mult in (('w', 1.0), ('b', 0.0))]
    >>> groups([weight, bias, weight])
    {(1.0, 1.0): [0, 2], (1.0, 0.0): [1]}
    """
    found: Dict[Tuple[float, float], List[int]] = {}
    for position, info in enumerate(chosen):
        found.setdefault((info.lr_mult, info.wd_mult), []).append(position)
    return found


def split(foreign: Foreign, states: OptimizerStates, chosen: Sequence[ParameterInfo]) -> List[List[int]]:
    """Positions in ``chosen``, one list for each param group."""
    split = list(groups(chosen).values())
    if foreign.pack:
        counts = [states.counts.get(info.name, 0) for info in chosen]
        split = [[position for position in positions if counts[position] == count]
                 for positions in split for count in dict.fromkeys(counts[position] for position in positions)]
    return split
