"""What converting a run needs, whatever the framework: what would be lost, and how states become a ``state_dict`` and come
back.

Which classes compute the same, and what they keep, is declared in `gluon_optim.foreign`. Arrays here are NumPy's; a converter
exchanges them for its own.
"""
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Type

import numpy

from . import rules
from .foreign import APPROXIMATE, CONSTANT_RATE, EXACT, FOREIGN, VANISHED, Foreign, find, mirror, mirrored
from .rules import Rule
from .rules.base import initial_slot
from .rules.mx.base import DecayedFirst
from .schema import Slot, Values, check_known, one_of, some_of
from .states import mxnet2
from .states.neutral import STATISTICS, OptimizerStates, ParameterInfo

__all__ = ['FOREIGN', 'Foreign', 'check_entry', 'find', 'from_state_dict', 'groups', 'mirror', 'mirrored', 'own_hypers',
           'select', 'started', 'to_state_dict', 'understood', 'weight_of', 'what_is_lost', 'what_to_say']


def select(states: OptimizerStates, names: Optional[Iterable[str]] = None) -> List[ParameterInfo]:
    """The parameters ``names`` in that order; for None all in trainer order, but for running statistics.

    Unknown and repeated names are refused.
    """
    if names is None:  # running statistics are parameters in Gluon, and no optimizer's business anywhere
        names = [info.name for info in states.parameters if info.name in states.slots or not info.name.endswith(STATISTICS)]
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
        raise ValueError('There must be a parameter to convert. Received: none. Leave `params` out to convert all of them.')
    return [known[name] for name in names]


def understood(states: OptimizerStates, allow_lossy: bool = False) -> Tuple[OptimizerStates, Type[Rule], Values]:
    """What all converters begin with: the states, those of MXNet 2.x under the rule that computes the same; that rule; and the
    hyper-parameters with which the run goes on, at the scheduler's rate, which in MXNet's own files is not the optimizer's.

    Raises as `mxnet2.as_rule` does, and where the hyper-parameters are not the rule's.
    """
    states = mxnet2.as_rule(states, allow_lossy)
    rule = rules.get(states.optimizer)
    h = rule.hyperparameters(**states.hypers)
    base_lr = (states.scheduler or {}).get('attributes', {}).get('base_lr')
    return states, rule, h.replace(learning_rate=float(base_lr)) if isinstance(base_lr, (int, float)) else h


def own_hypers(h: Values, info: ParameterInfo) -> Values:
    """The hyper-parameters of one parameter: with its multipliers, and for gradients that are not to be rescaled."""
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


def common_hypers(rule: Type[Rule], given: Sequence[Mapping[str, Any]], mults: Optional[Sequence[Tuple[float, float]]] = None
                  ) -> Tuple[Values, List[Tuple[float, float]]]:
    """One set of hyper-parameters for all groups, and each group's (lr_mult, wd_mult): the inverse of `groups`.

    ``given`` holds our hyper-parameters of each group, ``mults`` what its multipliers are known to be. Without ``mults`` they
    are relative to the first group whose value is not 0. Groups that differ in more than rate and decay are refused.

    >>> from gluon_optim import rules
    >>> common_hypers(rules.get('sgd_torch'), [dict(learning_rate=.5, wd=.5), dict(learning_rate=1., wd=0.)])[1]
    [(1.0, 1.0), (2.0, 0.0)]
    """
    checked = [rule.hyperparameters(**group) for group in given]
    lr, lr_mults = _factors('learning_rate', [h.learning_rate for h in checked], None if mults is None else [x for x, _ in mults])
    wd, wd_mults = _factors('wd', [h.wd for h in checked], None if mults is None else [x for _, x in mults])
    common = checked[0].replace(learning_rate=lr, wd=wd)
    for position, h in enumerate(checked):
        differing = [name for name, value in h.replace(learning_rate=lr, wd=wd).asdict().items() if value != getattr(common, name)]
        if differing:
            raise ValueError('All param groups must agree in everything but rate and decay, because a Gluon Trainer has one value '
                             f'for all parameters. Received: group {position} differs from group 0 in {one_of(differing)}.')
    return common, list(zip(lr_mults, wd_mults))


def _factors(name: str, values: Sequence[float], mults: Optional[Sequence[float]]) -> Tuple[float, Sequence[float]]:
    """``base, mults`` such that ``values[i] = base * mults[i]``."""
    if mults is None:
        base = next((value for value in values if value), 0.0)
        return base, [value / base if base else 1.0 for value in values]
    if 1.0 in mults:  # there it can be read off exactly
        base = values[list(mults).index(1.0)]
    else:
        base = next((value / mult for value, mult in zip(values, mults) if mult), 0.0)
    if any(abs(base * mult - value) > 1e-9 * abs(value) for value, mult in zip(values, mults)):
        raise ValueError(f'`{name}` of the param groups must be one value times the multipliers {list(mults)!r}. '
                         f'Received: {list(values)!r}. Pass `params` as names only, and the multipliers follow from the groups.')
    return base, mults


def check_entry(form: Foreign, slots: Sequence[Slot], where: str, shape: Sequence[int], dtype: str, entry: Mapping[str, Any]
                ) -> Dict[str, str]:
    """Check one parameter's entry of a state_dict; return which of its arrays are the rule's, and of which type they must be.

    ``dtype`` is the type of the slots. Keys that the class does not know are left alone. ValueError where an array is missing, has
    another shape, or would lose digits.
    """
    shapes = {form.slot_key(slot): tuple(shape) if slot.like == 'weight' else () for slot in slots}
    missing = [key for key in [*shapes, *(['step'] if form.counts else [])] if key not in entry]
    if missing:
        raise ValueError(f'The state of {where} must hold {one_of(missing)}. Received: only {one_of(entry)}. '
                         'Is it the state of another optimizer, or of other hyper-parameters?')
    types = dict.fromkeys(shapes, dtype)
    if form.masters and 'master' in entry:
        shapes['master'], types['master'] = tuple(shape), 'float32'
    for key, wanted in shapes.items():
        if tuple(entry[key].shape) != wanted:
            raise ValueError(f'{key!r} of {where} must have shape {wanted}. Received: {tuple(entry[key].shape)}. '
                             'Are the parameters in the same order?')
        if type_name(entry[key]) == 'float64' and types[key] == 'float32':
            raise ValueError(f'{key!r} of {where} must be float32, or it would lose digits. Received: float64. '
                             'Keep the parameter in float64 too, or round the state yourself.')
    if form.counts and not (float(entry['step']) >= 0 and float(entry['step']) % 1 == 0):
        raise ValueError(f"'step' of {where} must be a number of updates, 0 or more. Received: {float(entry['step'])}.")
    return types


def weight_of(info: ParameterInfo, weights: Mapping[str, Any]) -> numpy.ndarray:
    """The parameter's weight; ValueError where it is not of the run of the states."""
    weight = numpy.asarray(weights[info.name])
    if (weight.shape, weight.dtype.name) != (tuple(info.shape), info.dtype):
        raise ValueError(f'The weight {info.name!r} must be {info.dtype} of shape {tuple(info.shape)}, as in the states. '
                         f'Received: {weight.dtype.name} of shape {weight.shape}. Pass the weights of the same run.')
    return weight


def started(slots: Iterable[Slot], info: ParameterInfo, weight: Optional[numpy.ndarray]) -> Dict[str, Any]:
    """The entry of a parameter that has seen no update, in ONNX and optax; ValueError where it takes a weight that is None."""
    if weight is None and (info.dtype == 'float16' or any(slot.init == 'weight' for slot in slots)):
        raise ValueError(f'{info.name!r} has seen no update, and its state begins with its weight. Pass `weights`.')
    start = numpy.zeros(info.shape, info.dtype) if weight is None else weight
    master = {'master': start.astype('float32')} if info.dtype == 'float16' else {}
    return {**{slot.name: initial_slot(slot, master.get('master', start)) for slot in slots}, **master}


def type_name(array: Any) -> str:
    """The name of an array's type, NumPy's or PyTorch's.

    >>> type_name(numpy.zeros(1, 'float32'))
    'float32'
    """
    return str(array.dtype).split('.')[-1]


def to_state_dict(form: Foreign, rule: Type[Rule], h: Values, states: OptimizerStates, chosen: Sequence[ParameterInfo]
                  ) -> Dict[str, Any]:
    """The states as ``form`` keeps them: ids are positions in ``chosen``, one param group for each (lr_mult, wd_mult).

    Also one for each number of updates, if the class counts in its groups.
    """
    if form.divisors and 'learning_rate' not in states.hypers:
        raise ValueError(f"`learning_rate` of the last update must be known for {form.path}. Received: states without. "
                         "Set states.hypers['learning_rate'].")
    entries = {position: _entry(form, rule, own_hypers(h, info), states, info) for position, info in enumerate(chosen)}
    param_groups = [dict(form.group(own_hypers(h, chosen[positions[0]])), params=positions)
                    for positions in _split(form, states, chosen)]
    state_dict = {'state': {position: entry for position, entry in entries.items() if entry}, 'param_groups': param_groups}
    return form.pack(state_dict) if form.pack else state_dict


def _split(form: Foreign, states: OptimizerStates, chosen: Sequence[ParameterInfo]) -> List[List[int]]:
    """Positions in ``chosen``, one list for each param group."""
    split = list(groups(chosen).values())
    if form.pack:
        counts = [states.counts.get(info.name, 0) for info in chosen]
        split = [[position for position in positions if counts[position] == count]
                 for positions in split for count in dict.fromkeys(counts[position] for position in positions)]
    return split


def _entry(form: Foreign, rule: Type[Rule], own: Values, states: OptimizerStates, info: ParameterInfo) -> Dict[str, Any]:
    """One parameter's entry, empty where the class starts afresh. ValueError where the states are not those of the rule."""
    name, count, held = info.name, states.counts.get(info.name, 0), states.slots.get(info.name)
    slots, dtype = rule.slots(own), slot_type(info.dtype)
    if held is None and count:
        raise ValueError(f'{name!r} has seen {count} updates but has no slots: the states are incomplete. '
                         'Leave it out by `params`, which lists the names to convert.')
    if not count and form.eager:
        held = {slot.name: initial_slot(slot, numpy.zeros(info.shape, dtype)) for slot in slots}
    elif held is None or not (count or form.counts) or (form.pack and not count):
        return {}
    strangers = set(held) - {slot.name for slot in slots}
    if strangers:
        raise ValueError(f'{name!r} must have the slots {one_of(slot.name for slot in slots)} of {form.rule}. '
                         f'Received: {one_of(held)}. Are the states those of other hyper-parameters?')
    entry = {form.slot_key(slot): held[slot.name] for slot in slots if slot.name in held}
    if form.counts:
        entry['step'] = count if form.counts == 'number' else numpy.array(count, 'float32')
    if form.masters and name in states.master:
        entry['master'] = states.master[name]
    check_entry(form, slots, repr(name), info.shape, dtype, entry)
    entry.update({key: numpy.array(0, dtype) for key in form.vanished.values()})
    for slot in slots:
        divisor = _divisor(form, slot, own, name)
        if divisor != 1:
            entry[form.slot_key(slot)] = numpy.asarray(numpy.divide(entry[form.slot_key(slot)], divisor, dtype='float64'), dtype)
    return entry


def _divisor(form: Foreign, slot: Slot, own: Values, name: str) -> float:
    """Our slot is so many times that of ``form``."""
    divisor = form.divisors[slot.name](own) if slot.name in form.divisors else 1.0
    if divisor == 0:
        raise ValueError(f'The learning rate of {name!r} must not be 0, or its {slot.name!r}, which is the rate times that of '
                         f'{form.path}, tells nothing. Set `learning_rate` to that of the last update, or leave the parameter out.')
    return divisor


def slot_type(dtype: str) -> str:
    """The type of the slots of a weight of type ``dtype``: double for double, single for all others."""
    return 'float64' if dtype == 'float64' else 'float32'


def from_state_dict(form: Foreign, rule: Type[Rule], state_dict: Mapping[str, Any], params: Any, num_update: Optional[int],
                    allow_lossy: bool = False, copy: bool = True) -> OptimizerStates:
    """The inverse of `to_state_dict`; ``params`` as `gluon_optim.torch.from_torch` describes them."""
    state_dict = form.unpack(dict(state_dict)) if form.unpack else state_dict
    given = list(state_dict['param_groups'])
    likes = _likes(given, params)
    known = _known_mults(given, likes)
    ours = [_checked(form, rule, group) for group in given]
    if known and 'learning_rate' not in form.held:  # nor can it tell that of a group
        ours = [dict(hypers, learning_rate=rule.hyper('learning_rate').default * lr_mult)
                for hypers, (lr_mult, _) in zip(ours, known)]
    h, mults = common_hypers(rule, ours, known)
    mults_of = {key: pair for group, pair in zip(given, mults) for key in group['params']}
    states = OptimizerStates(rule.name, h.asdict(), num_update or 0, [], {}, {})
    for key, (name, like) in likes.items():
        entry = {word: value for word, value in state_dict['state'].get(key, {}).items() if value is not None}
        shape, dtype = _shape_and_type(name, like, form, rule.slots(h), entry)
        states.parameters.append(ParameterInfo(name, getattr(like, 'full_name', name), shape, dtype, *mults_of[key]))
        _take(states, form, rule, own_hypers(h, states.parameters[-1]), states.parameters[-1], entry, copy)
    if num_update is None:
        states.num_update = max(states.counts.values())
    if not form.counts:
        states.report.append(f'{form.path} keeps no counts: parameters with a state are given {states.num_update}')
    if form.build:
        states.report.append(f'the state of {form.path} does not tell with which arguments it was made; they are taken to be '
                             + _listed(form.made_with(h)))
    label = _label(form, h, states, states.parameters)
    if label == APPROXIMATE and not allow_lossy:
        raise ValueError(f'{rule.name!r} would lose the exact step: {form.path} is {_how_far(form, h, states, states.parameters)}. '
                         'Pass allow_lossy=True to go on.')
    if label != EXACT or form.condition:
        states.report.append('; '.join(filter(None, [f'{form.path}: {label}', form.condition])))
    if any(like is None for _, like in likes.values()):
        states.report.append('shapes and types of weights are those of the slots, for want of `params` that tell them')
    return states


def _checked(form: Foreign, rule: Type[Rule], group: Mapping[str, Any]) -> Dict[str, Any]:
    """Our hyper-parameters of a param group, of which ``form`` computes what stands there."""
    hypers = form.hypers(group)
    form.check(rule.hyperparameters(**hypers), group)
    return hypers


def _take(states: OptimizerStates, form: Foreign, rule: Type[Rule], own: Values, info: ParameterInfo, entry: Mapping[str, Any],
          copy: bool) -> None:
    """Add one parameter's ``entry`` of a state_dict to ``states``."""
    states.counts[info.name], slots = 0, rule.slots(own)
    if not entry and (form.counts or slots):  # a class that keeps neither counts nor slots has no entry at all
        return
    types = check_entry(form, slots, repr(info.name), info.shape, slot_type(info.dtype), entry)
    for name, key in form.vanished.items():
        if not abs(float(entry.get(key, 1.0))) < VANISHED:
            raise ValueError(f'{key!r} of {info.name!r} must be below {VANISHED:g}: {rule.name} has one for all parameters. '
                             f'Received: {float(entry.get(key, 1.0)):.2g}. Go on in PyTorch until it has vanished.')
        states.variables[name] = numpy.array(0.0)
    if form.eager and form.counts and not int(entry['step']):  # there only because it has to be
        return
    make = numpy.array if copy else numpy.asarray
    arrays = {key: make(entry[key], dtype) for key, dtype in types.items()}
    states.counts[info.name] = int(entry['step']) if form.counts else states.num_update or 1
    states.slots[info.name] = {slot.name: arrays[form.slot_key(slot)] for slot in slots}
    for slot in slots:
        divisor = _divisor(form, slot, own, info.name)
        if divisor != 1:
            array = states.slots[info.name][slot.name]
            states.slots[info.name][slot.name] = numpy.asarray(numpy.multiply(array, divisor, dtype='float64'), array.dtype)
    if 'master' in arrays:
        states.master[info.name] = arrays['master']


def _likes(given: Sequence[Mapping[str, Any]], params: Any) -> Dict[Any, Tuple[str, Any]]:
    """Id -> name, and what has the weight's shape and type (or None), in the order that the states shall have."""
    ids = [key for group in given for key in group['params']]
    names = [name for group in given for name in group.get('param_names', ())]
    own = dict(zip(names, ids)) if len(set(names)) == len(ids) else {}
    if params is None:
        name_of = {key: name for name, key in own.items()} or {key: str(key) for key in ids}
        return {key: (name_of[key], None) for key in sorted(ids)}
    if isinstance(params, Mapping):
        likes = dict(params)
        if len(likes) > len(ids):  # a file of weights has running statistics too
            likes = {name: like for name, like in likes.items() if not name.endswith(STATISTICS)}
    else:
        likes = {like.name if isinstance(like, ParameterInfo) else like: like if isinstance(like, ParameterInfo) else None
                 for like in params}
    if len(likes) != len(ids):
        raise ValueError(f'`params` must name the {len(ids)} parameters of the state. Received: {len(likes)}.')
    if set(likes) == set(own):
        return {own[name]: (name, like) for name, like in likes.items()}
    if set(likes) & set(own):
        raise ValueError(f'`params` must be the parameters of the state, or all have other names. Only in `params`: '
                         f'{one_of(sorted(set(likes) - set(own)))}. Only in the state: {one_of(sorted(set(own) - set(likes)))}.')
    return dict(zip(sorted(ids), likes.items()))


def _known_mults(given: Sequence[Mapping[str, Any]], likes: Mapping[Any, Tuple[str, Any]]) -> Optional[List[Tuple[float, float]]]:
    """Each group's (lr_mult, wd_mult), if `ParameterInfo` tell them."""
    if not all(isinstance(like, ParameterInfo) for _, like in likes.values()):
        return None
    found = [sorted({(likes[key][1].lr_mult, likes[key][1].wd_mult) for key in group['params']}) for group in given]
    mixed = [position for position, pairs in enumerate(found) if len(pairs) != 1]
    if mixed:
        raise ValueError(f'The parameters of a param group must have one lr_mult and wd_mult. Received: group {mixed[0]} with '
                         f'{found[mixed[0]]!r}. Pass `params` as names only, and the multipliers follow from the groups.')
    return [pairs[0] for pairs in found]


def _shape_and_type(name: str, like: Any, form: Foreign, slots: Sequence[Slot], entry: Mapping[str, Any]
                    ) -> Tuple[Tuple[int, ...], str]:
    """Shape and type of a weight, from ``like`` or else from its state."""
    if like is not None:
        shape, dtype = tuple(like.shape), like.dtype if isinstance(like.dtype, str) else type_name(like)
    else:
        held = [entry[key] for key in ['master', *(form.slot_key(slot) for slot in slots if slot.like == 'weight')] if key in entry]
        if not held:
            raise ValueError(f'The state does not tell the shape of {name!r}. Pass `params` as a dictionary of names to weights.')
        shape, dtype = tuple(held[0].shape), 'float16' if 'master' in entry else type_name(held[0])
    if dtype not in ('float16', 'float32', 'float64'):
        raise ValueError(f'{name!r} must be float16, float32 or float64, the types that MXNet trains. Received: {dtype}. '
                         'Pass `params` with the type that the weight shall have in MXNet.')
    return shape, dtype


def _listed(arguments: Mapping[str, Any]) -> str:
    return ', '.join(f'{key}={value!r}' for key, value in arguments.items())


def what_is_lost(foreign: Foreign, rule: Type[Rule], h: Values, states: OptimizerStates, chosen: Sequence[ParameterInfo]
                 ) -> List[str]:
    """What ``foreign`` cannot hold of these states, and what to do about it: one line each, none where the conversion is whole."""
    lines = list(dict.fromkeys(line for info in chosen for line in _not_held(foreign, rule, own_hypers(h, info))))
    if 'clip_gradient' not in foreign.held and h.clip_gradient is not None:
        remedy = 'MXNet bounds the sum of gradient and decay, which cannot be done from outside' if (
            issubclass(rule, DecayedFirst) and h.wd) else 'bound each element of the gradients yourself'
        lines.append(f'clip_gradient={h.clip_gradient!r}, which {foreign.path} lacks: {remedy}')
    if foreign.doubt:
        doubts = {info.name: foreign.doubt(h, states.slots[info.name]) for info in chosen
                  if states.counts.get(info.name) and info.name in states.slots}
        lines += [f'{doubt}: {name!r}' for name, doubt in doubts.items() if doubt]
    label = _label(foreign, h, states, chosen)
    if label == APPROXIMATE:
        lines.append(f'the exact step: {foreign.path} is {_how_far(foreign, h, states, chosen)}')
    if label == CONSTANT_RATE and states.scheduler:
        lines.append(f'the momentum: it contains the learning rate of the last update, which the scheduler '
                     f"{states.scheduler.get('class')} changes; set states.hypers['learning_rate'] to that rate and "
                     'states.scheduler to None')
    halves = [info.name for info in chosen if info.dtype == 'float16']
    if halves and not foreign.masters:
        lines.append(f'float32 masters and slots of the float16 parameters {one_of(halves)}, which {foreign.path} lacks: '
                     'make the parameters float32, from `states.master` where there are masters')
    for name in foreign.vanished:
        value = float(states.variables.get(name, 1.0))
        if not abs(value) < VANISHED:
            lines.append(f'{name}={value:.2g}, which {foreign.path} has for each parameter on its own: go on in MXNet until it is '
                         f'below {VANISHED:g}')
    variables = [name for name in states.variables if name not in foreign.vanished]
    if variables:
        lines.append(f'the variables {one_of(variables)} of the optimizer as a whole')
    return lines


def _not_held(foreign: Foreign, rule: Type[Rule], own: Values) -> List[str]:
    """The hyper-parameters of one parameter that ``foreign`` has not, with values that make a difference."""
    needs, lines = {need.hyper: need for need in foreign.needs}, []
    for hyper in rule.declared(own.asdict()):
        value, need = getattr(own, hyper.name), needs.get(hyper.name)
        if need is None and hyper.name not in foreign.held and value != hyper.default:
            lines.append(f'{hyper.name}={value!r}, which {foreign.path} lacks')
        if need is not None and not need.holds(own):
            lines.append(f'{hyper.name}={value!r}, which {foreign.path} lacks' + (f': {need.remedy}' if need.remedy else ''))
    return lines


def _label(foreign: Foreign, h: Values, states: OptimizerStates, chosen: Sequence[ParameterInfo]) -> str:
    """How good the conversion is for all of ``chosen``."""
    return foreign.label(h, min((states.counts.get(info.name, 0) for info in chosen), default=0))


def _how_far(foreign: Foreign, h: Values, states: OptimizerStates, chosen: Sequence[ParameterInfo]) -> str:
    """By how much the steps of elements differ, at the last update of each parameter."""
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


def what_to_say(foreign: Foreign, h: Values, states: OptimizerStates, chosen: Sequence[ParameterInfo]) -> List[str]:
    """What goes on outside the optimizer and so is not in the converted state: lines for the report."""
    label = _label(foreign, h, states, chosen)
    label = _how_far(foreign, h, states, chosen) if label == APPROXIMATE else label
    lines = [f'{foreign.path}: {label}; {len(chosen)} parameters, update {states.num_update}; in this order: '
             + ', '.join([info.name for info in chosen[:8]] + ['...'] * (len(chosen) > 8))]
    left_out = [name for name in states.names if name in states.slots and name not in {info.name for info in chosen}]
    if left_out:
        lines.append(f'left out, although they have a state: {some_of(left_out)}')
    if foreign.condition:
        lines.append(f'{foreign.path}: {foreign.condition}')
    if foreign.build:
        lines.append(f'make {foreign.path} with {_listed(foreign.made_with(h))}: no state can set that')
    frozen = [info.name for info in chosen if info.grad_req == 'null']
    if frozen:
        lines.append(f'not trained in Gluon: {some_of(frozen)}; do not train them here either: requires_grad_(False) in PyTorch')
    fresh = [info.name for info in chosen if info.name not in states.slots and info.grad_req != 'null']
    if fresh:
        advice = '' if all(info.grad_req for info in chosen) else (
            '. If Gluon did not train them (a frozen layer, scale=False), do not train them here either: requires_grad_(False) in '
            'PyTorch')
        lines.append(f'no state yet, as in the file: {some_of(fresh)}' if len(fresh) == len(chosen) else
                     f'without one update in {states.num_update}: {some_of(fresh)}{advice}')
    if h.rescale_grad != 1:
        lines.append(f'rescale_grad={h.rescale_grad!r} is not carried over: MXNet multiplied gradients of the summed loss by it; '
                     'give those of the mean loss')
    if states.scheduler and 'learning_rate' in foreign.held:
        lines.append(f"the scheduler {states.scheduler.get('class')} is not carried over: the param groups have its base_lr, "
                     f'{h.learning_rate!r}; set the rate at each step, beginning with that of update {states.num_update + 1}')
    if states.loss_scaler:
        lines.append(f'the loss scaler {states.loss_scaler!r} is not carried over: give its scale to the new one')
    if foreign.masters and any(info.name in states.master for info in chosen):
        lines.append("float32 masters are in the state as 'master': half-precision parameters follow them from the next step on")
    split, by = _split(foreign, states, chosen), list(groups(chosen))
    if len(split) > 1:
        lines.append(f"{len(split)} param groups, by (lr_mult, wd_mult) {by}{' and number of updates' * (len(split) > len(by))}: "
                     'build the optimizer from `param_groups(state_dict, params)`')
    return lines
