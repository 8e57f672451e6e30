"""What a conversion to another class would lose, and what is left for the user to do."""
from typing import Any, List, Mapping, Sequence, Type

import numpy

from ..rules import Rule
from ..rules.compensated import is_compensated
from ..rules.mx.base import DecayedFirst
from ..schema import Values, one_of, some_of
from ..states.model import STATISTICS, OptimizerStates, ParameterInfo, is_accumulated, what_was_accumulated
from .classes import APPROXIMATE, CONSTANT_RATE, VANISHED, Foreign
from .selection import groups, own_hypers, split

__all__ = ['LEAVE_OUT', 'how_far', 'label_of', 'listed', 'what_is_lost', 'what_to_say']

LEAVE_OUT = 'leave them out with params='  # where an optimizer updates all that it is given


def listed(arguments: Mapping[str, Any]) -> str:
    return ', '.join(f'{key}={value!r}' for key, value in arguments.items())


def what_is_lost(foreign: Foreign, rule: Type[Rule], h: Values, states: OptimizerStates, chosen: Sequence[ParameterInfo]
                 ) -> List[str]:
    """What ``foreign`` cannot hold of these states, and what to do about it: one line each, none if nothing is lost."""
    lines = list(dict.fromkeys(line for info in chosen for line in _not_held(foreign, rule, own_hypers(h, info))))
    if 'clip_gradient' not in foreign.held and h.clip_gradient is not None:
        remedy = 'MXNet clips the sum of gradient and decay, which cannot be done from outside' if (
            issubclass(rule, DecayedFirst) and h.wd) else 'clip each element of the gradients yourself'
        lines.append(f'clip_gradient={h.clip_gradient!r}, which {foreign.path} lacks: {remedy}')
    if foreign.doubt:
        doubts = {info.name: foreign.doubt(h, states.slots[info.name]) for info in chosen
                  if states.counts.get(info.name) and info.name in states.slots}
        lines += [f'{doubt}: {name!r}' for name, doubt in doubts.items() if doubt]
    label = label_of(foreign, h, states, chosen)
    if label == APPROXIMATE:
        lines.append(f'the exact step: {foreign.path} is {how_far(foreign, h, states, chosen)}')
    if label == CONSTANT_RATE and states.scheduler:
        lines.append(f'the momentum: it contains the learning rate of the last update, which the scheduler '
                     f"{states.scheduler.get('class')} changes; set states.hypers['learning_rate'] to that rate and "
                     'states.scheduler to None')
    halves = [info.name for info in chosen if info.dtype == 'float16']
    compensated = [info.name for info in chosen if is_compensated(states.slots.get(info.name, {}))]
    if compensated and not foreign.compensations:
        lines.append(f'the compensations of the float16 parameters {some_of(compensated)}, which {foreign.path} lacks: make the '
                     "parameters float32, weight.astype('float32') + compensation.astype('float32')")
    halves = [name for name in halves if name not in compensated]
    if halves and not foreign.masters:
        lines.append(f'float32 masters and slots of the float16 parameters {one_of(halves)}, which {foreign.path} lacks: '
                     'make the parameters float32, from `states.master` where there are masters')
    for name in foreign.vanished:
        value = float(states.variables.get(name, 1.0))
        if not abs(value) < VANISHED:
            lines.append(f'{name}={value:.2g}, which {foreign.path} has separately for each parameter: continue in MXNet until '
                         f'it is below {VANISHED:g}')
    variables = [name for name in states.variables if name not in foreign.vanished and not is_accumulated(name)]
    if variables:
        lines.append(f'the variables {one_of(variables)} of the optimizer as a whole')
    lines += what_was_accumulated(states)
    return lines


def _not_held(foreign: Foreign, rule: Type[Rule], own: Values) -> List[str]:
    """The hyper-parameters of one parameter that ``foreign`` lacks, if their values make a difference."""
    needs, lines = {need.hyper: need for need in foreign.needs}, []
    for hyper in rule.declared(own.asdict()):
        value, need = getattr(own, hyper.name), needs.get(hyper.name)
        if need is None and hyper.name not in foreign.held and value != hyper.default:
            lines.append(f'{hyper.name}={value!r}, which {foreign.path} lacks')
        if need is not None and not need.holds(own):
            lines.append(f'{hyper.name}={value!r}, which {foreign.path} lacks' + (f': {need.remedy}' if need.remedy else ''))
    return lines


def label_of(foreign: Foreign, h: Values, states: OptimizerStates, chosen: Sequence[ParameterInfo]) -> str:
    """How good the conversion is for all of ``chosen``."""
    return foreign.label(h, min((states.counts.get(info.name, 0) for info in chosen), default=0))


def how_far(foreign: Foreign, h: Values, states: OptimizerStates, chosen: Sequence[ParameterInfo]) -> str:
    """By how much the steps of individual elements differ, at the last update of each parameter."""
    worst = total = size = 0.0
    for info in chosen:
        count, held = states.counts.get(info.name, 0), states.slots.get(info.name)
        if foreign.denominators and count and held:
            ours, theirs = foreign.denominators(own_hypers(h, info), count, {
                name: numpy.asarray(array, 'float64') for name, array in held.items()})
            far = numpy.abs(numpy.divide(ours, theirs, out=numpy.ones_like(ours), where=ours != theirs) - 1)
            worst, total, size = max(worst, far.max(initial=0.0)), total + far.sum(), size + far.size
    return (f'{APPROXIMATE} (steps of elements differ by up to {worst:.2g} of their length, {total / max(size, 1):.2g} on average, '
            f'at update {states.num_update})')


def what_to_say(foreign: Foreign, h: Values, states: OptimizerStates, chosen: Sequence[ParameterInfo],
                untrained: str = 'requires_grad_(False) in PyTorch') -> List[str]:
    """What happens outside the optimizer and so is not in the converted state: lines for the report.

    ``untrained`` is what to do with parameters that Gluon did not train; for `LEAVE_OUT` they are left out by default.
    """
    label = label_of(foreign, h, states, chosen)
    label = how_far(foreign, h, states, chosen) if label == APPROXIMATE else label
    lines = [f'{foreign.path}: {label}; {len(chosen)} parameters, update {states.num_update}; in this order: '
             + ', '.join([info.name for info in chosen[:8]] + ['...'] * (len(chosen) > 8))]
    here = {info.name for info in chosen}
    left_out = [name for name in states.names if name in states.slots and name not in here]
    if left_out:
        lines.append(f'left out, although they have a state: {some_of(left_out)}')
    if foreign.condition:
        lines.append(f'{foreign.path}: {foreign.condition}')
    if foreign.build:
        lines.append(f'make {foreign.path} with {listed(foreign.made_with(h))}: the state cannot set them')
    frozen = [info.name for info in chosen if info.grad_req == 'null']
    if frozen:
        lines.append(f'not trained in Gluon: {some_of(frozen)}; do not train them here either: {untrained}')
    without = [info.name for info in states.parameters if info.grad_req == 'null' and info.name not in here
               and info.name not in states.slots and not info.name.endswith(STATISTICS)]
    if without and untrained is LEAVE_OUT:
        lines.append(f'left out, because Gluon does not train them: {some_of(without)}; name them in params= to include them')
    fresh = [info.name for info in chosen if info.name not in states.slots and info.grad_req != 'null']
    if fresh:
        advice = '' if all(info.grad_req for info in chosen) else (
            f'. If Gluon did not train them (a frozen layer, scale=False), do not train them here either: {untrained}')
        lines.append(f'no state yet, as in the file: {some_of(fresh)}' if len(fresh) == len(chosen) else
                     f'never updated in {states.num_update} steps: {some_of(fresh)}{advice}')
    if h.rescale_grad != 1:
        lines.append(f'rescale_grad={h.rescale_grad!r} is not carried over: MXNet multiplied gradients of the summed loss by it; '
                     'use gradients of the mean loss')
    if foreign.masters and any(info.name in states.master for info in chosen):
        lines.append("float32 masters are in the state as 'master': half-precision parameters follow them from the next step on")
    if foreign.compensations and any(is_compensated(states.slots.get(info.name, {})) for info in chosen):
        lines.append("compensations are in the state as 'compensation': they go with the float16 weights of this run only")
    param_groups, by = split(foreign, states, chosen), list(groups(chosen))
    if len(param_groups) > 1:
        counted = ' and number of updates' * (len(param_groups) > len(by))
        lines.append(f'{len(param_groups)} param groups, by (lr_mult, wd_mult) {by}{counted}: '
                     'build the optimizer from `param_groups(state_dict, params)`')
    return lines
