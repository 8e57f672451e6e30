"""States as a ``state_dict``, and back. Arrays here are NumPy's; a converter replaces them with its own.

The classes that compute the same, and the state they keep, are declared in `gluon_optim.mapping.classes`.
"""
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Type

import numpy

from ..rules import Rule
from ..rules.base import ROUND, initial_slot
from ..rules.compensated import COMPENSATION
from ..schema import Slot, Values, compute_type, one_of
from ..states.model import STATISTICS, OptimizerStates, ParameterInfo
from .classes import APPROXIMATE, EXACT, VANISHED, Foreign
from .losses import how_far, label_of, listed
from .selection import own_hypers, split

__all__ = ['check_entry', 'fresh_entry', 'from_state_dict', 'to_state_dict', 'weight_of']


def common_hypers(rule: Type[Rule], given: Sequence[Mapping[str, Any]], mults: Optional[Sequence[Tuple[float, float]]] = None,
                  lr_mults: Optional[Sequence[float]] = None) -> Tuple[Values, List[Tuple[float, float]]]:
    """One set of hyper-parameters for all groups, and each group's (lr_mult, wd_mult): the inverse of `groups`.

    ``given`` holds our hyper-parameters of each group, ``mults`` its multipliers if known, ``lr_mults`` those of the rate if only
    these are. Others are relative to the first group with a nonzero value. Groups that differ in more than rate and decay are
    refused.

    >>> from gluon_optim import rules
    >>> common_hypers(rules.get('sgd_torch'), [dict(learning_rate=.5, wd=.5), dict(learning_rate=1., wd=0.)])[1]
    [(1.0, 1.0), (2.0, 0.0)]
    """
    checked = [rule.hyperparameters(**group) for group in given]
    lr_mults = lr_mults if mults is None else [x for x, _ in mults]
    lr, lr_mults = _factors('learning_rate', [h.learning_rate for h in checked], lr_mults)
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
    if 1.0 in mults:  # then it can be read off exactly
        base = values[list(mults).index(1.0)]
    else:
        base = next((value / mult for value, mult in zip(values, mults) if mult), 0.0)
    if any(abs(base * mult - value) > 1e-9 * abs(value) for value, mult in zip(values, mults)):
        raise ValueError(f'`{name}` of the param groups must be one value times the multipliers {list(mults)!r}. '
                         f'Received: {list(values)!r}. Pass `params` as names only: the multipliers then follow from the groups.')
    return base, mults


def check_entry(foreign: Foreign, slots: Sequence[Slot], where: str, shape: Sequence[int], dtype: str, entry: Mapping[str, Any]
                ) -> Dict[str, str]:
    """Check one parameter's entry of a state_dict; return which of its arrays are the rule's, and the type each must have.

    ``dtype`` is the type of the slots. Keys unknown to the class are ignored. ValueError if an array is missing, has another
    shape, or would lose digits.
    """
    shapes = {foreign.slot_key(slot): slot.shape(shape) for slot in slots}
    missing = [key for key in [*shapes, *(['step'] if foreign.counts else [])] if key not in entry]
    if missing:
        raise ValueError(f'The state of {where} must hold {one_of(missing)}. Received: only {one_of(entry)}. '
                         'Does the state belong to another optimizer or other hyper-parameters?')
    arrays = [*shapes, *(['master'] if foreign.masters else []), *([COMPENSATION.torch] if foreign.compensations else [])]
    for key in arrays:
        if key in entry and not hasattr(entry[key], 'dtype'):
            raise ValueError(f'{key!r} of {where} must be an array. Received: {type(entry[key]).__name__} {entry[key]!r:.50}. '
                             'Keep it as the optimizer has made it.')
    types = dict.fromkeys(shapes, dtype)
    if foreign.masters and 'master' in entry:
        shapes['master'], types['master'] = tuple(shape), 'float32'
    if foreign.compensations and COMPENSATION.torch in entry:
        shapes[COMPENSATION.torch], types[COMPENSATION.torch] = tuple(shape), type_name(entry[COMPENSATION.torch])
        if types[COMPENSATION.torch] not in ROUND:
            raise ValueError(f'{COMPENSATION.torch!r} of {where} must be of the type of the parameter, one of {one_of(ROUND)}. '
                             f'Received: {types[COMPENSATION.torch]}. Keep it as the optimizer has made it.')
    for key, wanted in shapes.items():
        if tuple(entry[key].shape) != wanted:
            raise ValueError(f'{key!r} of {where} must have shape {wanted}. Received: {tuple(entry[key].shape)}. '
                             'Are the parameters in the same order?')
        if type_name(entry[key]) == 'float64' and types[key] == 'float32':
            raise ValueError(f'{key!r} of {where} must be float32, or it would lose digits. Received: float64. '
                             'Keep the parameter in float64 too, or round the state yourself.')
    if foreign.counts and not (float(entry['step']) >= 0 and float(entry['step']) % 1 == 0):
        raise ValueError(f"'step' of {where} must be a number of updates, 0 or more. Received: {float(entry['step'])}.")
    return types


def weight_of(info: ParameterInfo, weights: Mapping[str, Any]) -> numpy.ndarray:
    """The parameter's weight; ValueError if it cannot be from the same run as the states."""
    weight = numpy.asarray(weights[info.name])
    if (weight.shape, weight.dtype.name) != (tuple(info.shape), info.dtype):
        raise ValueError(f'The weight {info.name!r} must be {info.dtype} of shape {tuple(info.shape)}, as in the states. '
                         f'Received: {weight.dtype.name} of shape {weight.shape}. Pass the weights of the same run.')
    return weight


def fresh_entry(slots: Iterable[Slot], info: ParameterInfo, weight: Optional[numpy.ndarray]) -> Dict[str, Any]:
    """The entry of a parameter without any update, in ONNX and optax; ValueError if it needs a weight and that is None."""
    if weight is None and (info.dtype == 'float16' or any(slot.init == 'weight' for slot in slots)):
        raise ValueError(f'{info.name!r} has not been updated yet, and its state starts from its weight. Pass `weights`.')
    start = numpy.zeros(info.shape, info.dtype) if weight is None else weight
    master = {'master': start.astype('float32')} if info.dtype == 'float16' else {}
    return {**{slot.name: initial_slot(slot, master.get('master', start)) for slot in slots}, **master}


def type_name(array: Any) -> str:
    """The name of an array's type, NumPy's or PyTorch's.

    >>> type_name(numpy.zeros(1, 'float32'))
    'float32'
    """
    return str(array.dtype).split('.')[-1]


def to_state_dict(foreign: Foreign, rule: Type[Rule], h: Values, states: OptimizerStates, chosen: Sequence[ParameterInfo]
                  ) -> Dict[str, Any]:
    """The states as ``foreign`` keeps them: ids are positions in ``chosen``, one param group for each (lr_mult, wd_mult).

    Also one for each number of updates, if the class counts in its groups.
    """
    if foreign.divisors and 'learning_rate' not in states.hypers:
        raise ValueError(f"`learning_rate` of the last update must be known for {foreign.path}. Received: states without it. "
                         "Set states.hypers['learning_rate'].")
    entries = {position: _entry(foreign, rule, own_hypers(h, info), states, info) for position, info in enumerate(chosen)}
    param_groups = [dict(foreign.group(own_hypers(h, chosen[positions[0]])), params=positions)
                    for positions in split(foreign, states, chosen)]
    state_dict = {'state': {position: entry for position, entry in entries.items() if entry}, 'param_groups': param_groups}
    return foreign.pack(state_dict) if foreign.pack else state_dict


def _entry(foreign: Foreign, rule: Type[Rule], own: Values, states: OptimizerStates, info: ParameterInfo) -> Dict[str, Any]:
    """One parameter's entry, empty where the class starts fresh. ValueError if the states are not those of the rule."""
    name, count, held = info.name, states.counts.get(info.name, 0), states.slots.get(info.name)
    slots, dtype = rule.slots(own), compute_type(info.dtype)
    if held is None and count:
        raise ValueError(f'{name!r} has seen {count} updates but has no slots: the states are incomplete. '
                         'Leave it out: list the names to convert in `params`.')
    if not count and foreign.eager:
        held = {slot.name: initial_slot(slot, numpy.zeros(info.shape, dtype)) for slot in slots}
    elif held is None or not (count or foreign.counts) or (foreign.pack and not count):
        return {}
    strangers = set(held) - {slot.name for slot in slots} - {COMPENSATION.name}   # whose loss `what_is_lost` has said
    if strangers:
        raise ValueError(f'{name!r} must have the slots {one_of(slot.name for slot in slots)} of {foreign.rule}. '
                         f'Received: {one_of(held)}. Do the states belong to other hyper-parameters?')
    entry = {foreign.slot_key(slot): held[slot.name] for slot in slots if slot.name in held}
    if foreign.counts:
        entry['step'] = count if foreign.counts == 'number' else numpy.array(count, 'float32')
    if foreign.masters and name in states.master:
        entry['master'] = states.master[name]
    if foreign.compensations and COMPENSATION.name in held:
        entry[COMPENSATION.torch] = held[COMPENSATION.name]
    check_entry(foreign, slots, repr(name), info.shape, dtype, entry)
    entry.update({key: numpy.array(0, dtype) for key in foreign.vanished.values()})
    for slot in slots:
        divisor = _divisor(foreign, slot, own, name)
        if divisor != 1:
            key = foreign.slot_key(slot)
            entry[key] = numpy.asarray(numpy.divide(entry[key], divisor, dtype='float64'), dtype)
    return entry


def _divisor(foreign: Foreign, slot: Slot, own: Values, name: str) -> float:
    """The factor between our slot and theirs."""
    divisor = foreign.divisors[slot.name](own) if slot.name in foreign.divisors else 1.0
    if divisor == 0:
        raise ValueError(f'The learning rate of {name!r} must not be 0: its {slot.name!r} is the rate times that of '
                         f'{foreign.path}. Set `learning_rate` to that of the last update, or leave the parameter out.')
    return divisor


def from_state_dict(foreign: Foreign, rule: Type[Rule], state_dict: Mapping[str, Any], params: Any, num_update: Optional[int],
                    allow_lossy: bool = False, copy: bool = True, lr_mults: Optional[Sequence[float]] = None) -> OptimizerStates:
    """The inverse of `to_state_dict`; ``params`` as `gluon_optim.torch.from_torch` describes them, ``lr_mults`` of groups."""
    state_dict = foreign.unpack(dict(state_dict)) if foreign.unpack else state_dict
    given = list(state_dict['param_groups'])
    likes = _likes(given, params)
    known = _known_mults(given, likes)
    ours = [_checked(foreign, rule, group) for group in given]
    if known and 'learning_rate' not in foreign.held:  # and so it does not give a group's rate either
        ours = [dict(hypers, learning_rate=rule.hyper('learning_rate').default * lr_mult)
                for hypers, (lr_mult, _) in zip(ours, known)]
    h, mults = common_hypers(rule, ours, known, lr_mults)
    mults_of = {key: pair for group, pair in zip(given, mults) for key in group['params']}
    states = OptimizerStates(rule.name, h.asdict(), num_update or 0, [], {}, {})
    for key, (name, like) in likes.items():
        entry = {word: value for word, value in state_dict['state'].get(key, {}).items() if value is not None}
        shape, dtype = _shape_and_type(name, like, foreign, rule.slots(h), entry)
        states.parameters.append(ParameterInfo(name, getattr(like, 'full_name', name), shape, dtype, *mults_of[key]))
        _take(states, foreign, rule, own_hypers(h, states.parameters[-1]), states.parameters[-1], entry, copy)
    if num_update is None:
        states.num_update = max(states.counts.values())
    if not foreign.counts:
        states.report.append(f'{foreign.path} keeps no counts: parameters with a state get {states.num_update}')
    if foreign.build:
        states.report.append(f'the state of {foreign.path} does not record its constructor arguments; assumed: '
                             + listed(foreign.made_with(h)))
    label = label_of(foreign, h, states, states.parameters)
    if label == APPROXIMATE and not allow_lossy:
        far = how_far(foreign, h, states, states.parameters)
        raise ValueError(f'{rule.name!r} would lose the exact step: {foreign.path} is {far}. '
                         'Pass allow_lossy=True to convert anyway.')
    if label != EXACT or foreign.condition:
        states.report.append('; '.join(filter(None, [f'{foreign.path}: {label}', foreign.condition])))
    if any(like is None for _, like in likes.values()):
        states.report.append('no `params` given: shapes and types of weights are taken from the slots')
    return states


def _checked(foreign: Foreign, rule: Type[Rule], group: Mapping[str, Any]) -> Dict[str, Any]:
    """Our hyper-parameters of a param group, of which ``foreign`` computes what stands there."""
    hypers = foreign.hypers(group)
    foreign.check(rule.hyperparameters(**hypers), group)
    return hypers


def _take(states: OptimizerStates, foreign: Foreign, rule: Type[Rule], own: Values, info: ParameterInfo, entry: Mapping[str, Any],
          copy: bool) -> None:
    """Add one parameter's ``entry`` of a state_dict to ``states``."""
    states.counts[info.name], slots = 0, rule.slots(own)
    if not entry and (foreign.counts or slots):  # a class with neither counts nor slots has no entry at all
        return
    types = check_entry(foreign, slots, repr(info.name), info.shape, compute_type(info.dtype), entry)
    if types.get(COMPENSATION.torch, info.dtype) != info.dtype:
        raise ValueError(f'The compensation of {info.name!r} must be of the type of its weight. Received: '
                         f'{types[COMPENSATION.torch]} for a weight of {info.dtype}. Add it to the weight, and remove it from the '
                         'state.')
    for name, key in foreign.vanished.items():
        if not abs(float(entry.get(key, 1.0))) < VANISHED:
            raise ValueError(f'{key!r} of {info.name!r} must be below {VANISHED:g}: {rule.name} has one for all parameters. '
                             f'Received: {float(entry.get(key, 1.0)):.2g}. Continue in PyTorch until it has vanished.')
        states.variables[name] = numpy.array(0.0)
    if foreign.eager and foreign.counts and not int(entry['step']):  # present only because it has to be
        return
    make = numpy.array if copy else numpy.asarray
    arrays = {key: make(entry[key], dtype) for key, dtype in types.items()}
    states.counts[info.name] = int(entry['step']) if foreign.counts else states.num_update or 1
    states.slots[info.name] = {slot.name: arrays[foreign.slot_key(slot)] for slot in slots}
    for slot in slots:
        divisor = _divisor(foreign, slot, own, info.name)
        if divisor != 1:
            array = states.slots[info.name][slot.name]
            states.slots[info.name][slot.name] = numpy.asarray(numpy.multiply(array, divisor, dtype='float64'), array.dtype)
    if 'master' in arrays:
        states.master[info.name] = arrays['master']
    if COMPENSATION.torch in arrays:
        states.slots[info.name][COMPENSATION.name] = arrays[COMPENSATION.torch]


def _likes(given: Sequence[Mapping[str, Any]], params: Any) -> Dict[Any, Tuple[str, Any]]:
    """Id -> name and something with the weight's shape and type (or None), in the order of the resulting states."""
    ids = [key for group in given for key in group['params']]
    names = [name for group in given for name in group.get('param_names', ())]
    own = dict(zip(names, ids)) if len(set(names)) == len(ids) else {}
    if params is None:
        name_of = {key: name for name, key in own.items()} or {key: str(key) for key in ids}
        return {key: (name_of[key], None) for key in sorted(ids)}
    if isinstance(params, Mapping):
        likes = dict(params)
        if len(likes) > len(ids):  # a file of weights also has running statistics
            likes = {name: like for name, like in likes.items() if not name.endswith(STATISTICS)}
    else:
        likes = {like.name if isinstance(like, ParameterInfo) else like: like if isinstance(like, ParameterInfo) else None
                 for like in params}
    if len(likes) != len(ids):
        raise ValueError(f'`params` must name the {len(ids)} parameters of the state. Received: {len(likes)}.')
    if set(likes) == set(own):
        return {own[name]: (name, like) for name, like in likes.items()}
    if set(likes) & set(own):
        raise ValueError(f'`params` must have either the same names as the state or entirely different ones. Only in `params`: '
                         f'{one_of(sorted(set(likes) - set(own)))}. Only in the state: {one_of(sorted(set(own) - set(likes)))}.')
    return dict(zip(sorted(ids), likes.items()))


def _known_mults(given: Sequence[Mapping[str, Any]], likes: Mapping[Any, Tuple[str, Any]]) -> Optional[List[Tuple[float, float]]]:
    """Each group's (lr_mult, wd_mult), if `ParameterInfo` objects give them."""
    if not all(isinstance(like, ParameterInfo) for _, like in likes.values()):
        return None
    found = [sorted({(likes[key][1].lr_mult, likes[key][1].wd_mult) for key in group['params']}) for group in given]
    mixed = [position for position, pairs in enumerate(found) if len(pairs) != 1]
    if mixed:
        raise ValueError(f'The parameters of a param group must have one lr_mult and wd_mult. Received: group {mixed[0]} with '
                         f'{found[mixed[0]]!r}. Pass `params` as names only: the multipliers then follow from the groups.')
    return [pairs[0] for pairs in found]


def _shape_and_type(name: str, like: Any, foreign: Foreign, slots: Sequence[Slot], entry: Mapping[str, Any]
                    ) -> Tuple[Tuple[int, ...], str]:
    """Shape and type of a weight, from ``like`` if given, else from its state."""
    if like is not None:
        shape, dtype = tuple(like.shape), like.dtype if isinstance(like.dtype, str) else type_name(like)
    else:
        alike = [foreign.slot_key(slot) for slot in slots if slot.like == 'weight']
        held = [entry[key] for key in ['master', COMPENSATION.torch, *alike] if key in entry]
        if not held:
            raise ValueError(f'The state does not give the shape of {name!r}. Pass `params` as a dictionary of names to weights.')
        half = 'master' in entry or COMPENSATION.torch in entry
        shape, dtype = tuple(held[0].shape), 'float16' if half else type_name(held[0])
    if dtype not in ('float16', 'float32', 'float64'):
        raise ValueError(f'{name!r} must be float16, float32 or float64, the types that MXNet trains. Received: {dtype}. '
                         'Pass `params` with the type that the weight is to have in MXNet.')
    return shape, dtype
