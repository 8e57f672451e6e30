"""States of MXNet 2.x's own optimizers in the words of the rules here, which keep to MXNet 1.9.1 where the two differ."""
import dataclasses
from typing import List, Optional

from ..model import OptimizerStates
from .builtins import BUILTINS, Equal

__all__ = ['as_rule', 'differences', 'not_in_rule', 'wrote']


# an optimizer of 2.x that is another one with an option
CENTERED_RMSPROP = Equal('rmsprop', hypers={'rho': 'gamma1', 'momentum': 'gamma2'})
PLAIN_RMSPROP = Equal('rmsprop_torch', {'n': 'mean_sq'}, unused={'clip_weights': None, 'momentum': ...})


def wrote(states: OptimizerStates) -> bool:
    """Whether the states are those of an optimizer of MXNet 2.x."""
    return states.producer.get('mxnet', '').startswith('2') and 'gluon_optim' not in states.producer


def as_rule(states: OptimizerStates, allow_lossy: bool = False) -> OptimizerStates:
    """The same states under the name of the rule that goes on from them as MXNet did; those of others as they are.

    ValueError where there is no such rule, or where it would not go on quite so; with ``allow_lossy`` that is only reported.

    >>> as_rule(OptimizerStates('adagrad', dict(wd=0.1, epsilon=1e-6), 0, [], {}, {}, producer={'mxnet': '2.x'})).optimizer
    'adagrad_torch'
    """
    equal, lost = _equal(states), not_in_rule(states)
    if lost and not allow_lossy:
        raise ValueError(f'The optimizers here are those of MXNet 1.x, which would lose {"; ".join(lost)}. '
                         'Pass allow_lossy=True to go on without.')
    if not wrote(states):
        return states
    lines = ['lost: ' + line for line in lost]
    if equal is not None and equal.rule != states.optimizer:
        lines.append(f'the {states.optimizer} of MXNet 2.x computes what {equal.rule!r} does here')
    states.report.extend(line for line in lines if line not in states.report)
    states = dataclasses.replace(states, producer={**states.producer, 'gluon_optim': 'as_rule'})
    if equal is None:
        return states
    hypers = {equal.hypers.get(name, name): value for name, value in states.hypers.items() if name not in equal.unused}
    slots = {name: {equal.slots.get(slot, slot): array for slot, array in own.items()} for name, own in states.slots.items()}
    return dataclasses.replace(states, optimizer=equal.rule, hypers={**hypers, **equal.fixed}, slots=slots)


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
    """What the rule of `as_rule` does otherwise than the optimizer of MXNet 2.x that wrote the states, one phrase each."""
    equal = _equal(states)
    lost = [] if equal is None else [
        f'{name}={states.hypers[name]!r}, which {equal.rule} lacks' for name, value in equal.unused.items()
        if value is not ... and states.hypers.get(name, value) != value]
    same = not wrote(states) or (equal is not None and equal.rule != states.optimizer)
    return lost if same else lost + differences(states)


def differences(states: OptimizerStates) -> List[str]:
    """How the optimizers of this name in MXNet 1.x and 2.x go on differently from the same state, as seen by running both."""
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
        lost.append(f'the meaning of wd={decay!r}: 1.x clips the gradient and the decay together, 2.x the gradient alone')
    return lost
