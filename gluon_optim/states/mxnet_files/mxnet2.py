"""States of MXNet 2.x's own optimizers in terms of the rules here, which follow MXNet 1.9.1 where the two differ."""
import dataclasses
from typing import Any, Dict, List, Mapping, Optional

from ...rules.mx import DROP_INS
from ...rules.mx.base import VARIANT
from ..model import OptimizerStates
from .builtins import BUILTINS, Equal

__all__ = ['as_drop_in', 'as_rule', 'differences', 'not_in_rule', 'wrote']


# an optimizer of 2.x that is another one with an option
CENTERED_RMSPROP = Equal('rmsprop')
PLAIN_RMSPROP = Equal('rmsprop_torch', {'n': 'mean_sq'}, unused={'clip_weights': None, 'momentum': ...})


def wrote(states: OptimizerStates) -> bool:
    """Whether MXNet 2.x wrote the states."""
    return states.producer.get('mxnet', '').startswith('2') and 'gluon_optim' not in states.producer


def as_rule(states: OptimizerStates, allow_lossy: bool = False) -> OptimizerStates:
    """The same states under the name of the rule that continues from them as MXNet 2.x would; other states are unchanged.

    ValueError if there is no such rule, or if it would not continue in exactly the same way; with ``allow_lossy`` the latter
    is only reported.

    >>> as_rule(OptimizerStates('adagrad', dict(wd=0.1, epsilon=1e-6), 0, [], {}, {}, producer={'mxnet': '2.x'})).optimizer
    'adagrad_torch'
    """
    equal, lost = _equal(states), not_in_rule(states)
    if lost and not allow_lossy:
        raise ValueError(f'The optimizers here are those of MXNet 1.x, which would lose {"; ".join(lost)}. '
                         'Pass allow_lossy=True to convert anyway.')
    if not wrote(states):
        return states
    lines = ['lost: ' + line for line in lost]
    if equal is not None and equal.rule != states.optimizer:
        lines.append(f"MXNet 2.x's {states.optimizer} computes what {equal.rule!r} does here")
    states.report.extend(line for line in lines if line not in states.report)
    states = dataclasses.replace(states, producer={**states.producer, 'gluon_optim': 'as_rule'})
    if equal is None:
        return states
    hypers = {name: value for name, value in states.hypers.items() if name not in equal.unused}
    if equal.rule == states.optimizer:
        hypers = _renamed(hypers, BUILTINS[equal.rule].names_2)
    slots = {name: {equal.slots.get(slot, slot): array for slot, array in own.items()} for name, own in states.slots.items()}
    return dataclasses.replace(states, optimizer=equal.rule, hypers={**hypers, **equal.fixed}, slots=slots)


def as_drop_in(states: OptimizerStates) -> OptimizerStates:
    """The states of one of MXNet 2.x's optimizers as its drop-in on MXNet 2.x has them: nothing is lost. Others are unchanged.

    >>> as_drop_in(OptimizerStates('adagrad', dict(wd=0.1, epsilon=1e-6), 0, [], {}, {}, producer={'mxnet': '2.x'})).hypers
    {'wd': 0.1, 'eps': 1e-06, 'variant': '2.x'}
    """
    builtin = BUILTINS.get(states.optimizer)
    if builtin is None or states.optimizer not in DROP_INS or not wrote(states):
        return states
    fixed = constants_2(states.optimizer)
    return dataclasses.replace(states, hypers={**_renamed(states.hypers, builtin.names_2), **fixed},
                               producer={**states.producer, 'gluon_optim': 'as_drop_in'})


def constants_2(name: str) -> Dict[str, Any]:
    """The hyper-parameters of the rule ``name`` that MXNet 2.x's optimizer of that name does not have, and what they are there."""
    equal, rule = BUILTINS[name].equal_2, DROP_INS[name]
    fixed = dict(equal.fixed) if equal is not None and equal.rule == name else {}
    return dict(fixed, variant='2.x') if VARIANT in rule.hypers else fixed


def as_written(states: OptimizerStates) -> OptimizerStates:
    """States of a drop-in on MXNet 2.x as MXNet's own optimizer would have written them, for those who convert them. They stay as
    they are where no rule without a variant continues in exactly the same way, and so do all others."""
    if states.hypers.get('variant') != '2.x' or states.optimizer not in DROP_INS:
        return states
    theirs = {rule: name for name, rule in BUILTINS[states.optimizer].names_2.items()}
    hypers = {name: value for name, value in states.hypers.items() if name not in constants_2(states.optimizer)}
    written = dataclasses.replace(states, hypers=_renamed(hypers, theirs), producer={'mxnet': '2.x'})
    return states if not_in_rule(written) else written


def _renamed(hypers: Mapping[str, Any], names: Mapping[str, str]) -> Dict[str, Any]:
    return {names.get(name, name): value for name, value in hypers.items()}


def _equal(states: OptimizerStates) -> Optional[Equal]:
    if not wrote(states):
        return None
    if states.optimizer == 'mxnet.adamw':
        raise ValueError("MXNet 2.x's adamw is not supported here: it multiplies the decay by the bias correction too. Convert "
                         "with --to mxnet --mxnet-version 2, or give its moments to 'adamw' yourself, which is not the same.")
    if states.optimizer == 'rmsprop':
        return CENTERED_RMSPROP if states.hypers.get('centered') else PLAIN_RMSPROP
    builtin = BUILTINS.get(states.optimizer)
    return None if builtin is None else builtin.equal_2


def not_in_rule(states: OptimizerStates) -> List[str]:
    """How the rule of `as_rule` differs from the MXNet 2.x optimizer that wrote the states, one phrase each."""
    equal = _equal(states)
    lost = [] if equal is None else [
        f'{name}={states.hypers[name]!r}, which {equal.rule} lacks' for name, value in equal.unused.items()
        if value is not ... and states.hypers.get(name, value) != value]
    same = not wrote(states) or (equal is not None and equal.rule != states.optimizer)
    return lost if same else lost + differences(states)


def differences(states: OptimizerStates) -> List[str]:
    """How MXNet 1.x's and 2.x's optimizers of this name continue differently from the same state, found by running both."""
    optimizer, hypers = states.optimizer, states.hypers
    decay, plain = hypers.get('wd'), not hypers.get('centered')
    epsilon = next((hypers[name] for name in ('epsilon', 'eps') if hypers.get(name)), 0.0)
    lost = []
    if optimizer == 'adadelta':
        lost.append('the meaning of the learning rate: 2.x multiplies the step by it, 1.x does not')
    if epsilon and (optimizer == 'adagrad' or (optimizer == 'rmsprop' and plain)):
        lost.append(f'the meaning of epsilon={epsilon!r}: 1.x adds it inside the root, 2.x outside')
    if decay and optimizer in ('adagrad', 'adadelta', 'dcasgd', 'nag'):
        lost.append(f'the meaning of wd={decay!r}: 1.x and 2.x add the decay in different places')
    if decay and hypers.get('clip_gradient') and optimizer in ('adam', 'adamax', 'ftml', 'nadam', 'rmsprop'):
        lost.append(f'the meaning of wd={decay!r}: 1.x clips the gradient and the decay together, 2.x only the gradient')
    return lost
