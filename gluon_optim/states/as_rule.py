"""States of an optimizer without a rule, given to the rule of which the user knows that it computes the same."""
from dataclasses import replace
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type

import numpy

from .. import rules
from ..rules import Rule
from ..rules.base import BASE_HYPERS
from ..schema import Slot, Values, one_of, some_of
from .model import OptimizerStates, ParameterInfo

__all__ = ['as_rule', 'has_rule']


def has_rule(states: OptimizerStates) -> bool:
    """Whether what the slots mean is known here."""
    return not states.trees and states.optimizer in rules.names(drop_ins=True)


def as_rule(states: OptimizerStates, name: str, hypers: Dict[str, Any]) -> OptimizerStates:
    """`OptimizerStates.as_rule`."""
    rule: Type[Rule] = rules.get(name)
    if has_rule(states):
        raise ValueError(f'The states must be of an optimizer without a rule here. Received: those of {states.optimizer!r}, which '
                         'has one. Leave as_rule out.')
    known = {hyper.name for hyper in rule.declared({**states.hypers, **hypers}) + BASE_HYPERS}
    h = rule.hyperparameters(**{**{key: value for key, value in states.hypers.items() if key in known}, **hypers})
    result = replace(states, optimizer=rule.name, hypers=h.asdict(), slots={}, master={}, trees={}, attributes={}, variables={},
                     report=[*states.report, *_said(states, rule, h, hypers)])
    for info in states.parameters:
        if info.name in states.slots:
            result.slots[info.name], master = _slots(states, info, rule.slots(h))
            if master is not None:
                result.master[info.name] = master
    return result


def _slots(states: OptimizerStates, info: ParameterInfo, slots: Sequence[Slot]
           ) -> Tuple[Dict[str, numpy.ndarray], Optional[numpy.ndarray]]:
    """The arrays of one parameter by the names of the rule's slots, and its float32 master: MXNet puts that first."""
    arrays = list(states.slots[info.name].items())
    master = arrays.pop(0)[1] if info.dtype == 'float16' and len(arrays) == len(slots) + 1 else None
    if len(arrays) != len(slots):
        raise ValueError(f'{info.name!r} must have as many arrays as the rule has slots, {len(slots)}: '
                         f'{one_of(slot.name for slot in slots)}. Received: {len(arrays)}. Name another rule.')
    named = {}
    for slot, (place, array) in zip(slots, arrays):
        shape = slot.shape(info.shape)
        if array.shape != shape and not (shape == () and array.size == 1):
            raise ValueError(f'{slot.name!r} of {info.name!r} must have the shape {list(shape)}. Received: {list(array.shape)}, at '
                             f'the place {place} of the state. Name another rule.')
        named[slot.name] = array.reshape(shape)
    if master is not None and master.shape != tuple(info.shape):
        raise ValueError(f'The master of {info.name!r} must have the shape {list(info.shape)}. Received: {list(master.shape)}.')
    return named, master


def _said(states: OptimizerStates, rule: Type[Rule], h: Values, given: Dict[str, Any]) -> List[str]:
    """What was taken on the user's word."""
    names = one_of(slot.name for slot in rule.slots(h))
    lines = [f'{states.optimizer} is taken for {rule.name}, as you say: its arrays are {names}, in this order']
    assumed = {key: value for key, value in h.asdict().items() if key not in states.hypers and key not in given}
    if assumed:
        lines.append(f'not in the file, and taken to be {", ".join(f"{key}={value!r}" for key, value in assumed.items())}')
    left = [key for key in [*states.hypers, *states.attributes] if key not in h]
    if left:
        lines.append(f'{rule.name} has no {some_of(left)}, which {states.optimizer} had')
    return lines
