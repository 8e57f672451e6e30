"""What converting a run needs, whatever the framework: which classes compute the same, what would be lost, and how
states become a ``state_dict`` and come back.

Another project's optimizer class is one `Foreign` in `FOREIGN`: how its hyper-parameters are called and what it keeps.
The converters (`gluon_optim.torch` and its siblings), their reports and the table of the documentation read it from there.
Arrays here are NumPy's; a converter exchanges them for its own.
"""
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type, Union

import numpy

from .rules import Rule
from .rules.base import BASE_HYPERS
from .schema import Slot, Values, check_known, one_of
from .states.neutral import OptimizerStates, ParameterInfo

__all__ = ['FOREIGN', 'Foreign', 'check_entry', 'find', 'from_state_dict', 'groups', 'mirror', 'select', 'to_state_dict',
           'what_is_lost', 'what_to_say']


class Foreign(NamedTuple):
    """An optimizer class of another project that computes what a rule computes.

    Parameters
    ----------
    rule, target : str
        The registered name, and the ``target`` under which the converters offer the class.
    path : str
        Where to import the class from.
    keys : dict
        Its hyper-parameter -> ours, or a tuple of ours where it keeps several in one (``betas``).
    label : str
        'exact', or what else the conversion is.
    fixed : dict
        Its switches that must have these values, where it has them; our rule knows no other.
    slots : dict
        Our slot -> its key, where that is not what `Slot` declares.
    counts : bool
        Whether it keeps each parameter's number of updates.
    masters : bool
        Whether it keeps single-precision masters of half-precision parameters.
    """

    rule: str
    target: str
    path: str
    keys: Mapping[str, Union[str, Tuple[str, ...]]]
    label: str = 'exact'
    fixed: Mapping[str, Any] = {}
    slots: Mapping[str, str] = {}
    counts: bool = True
    masters: bool = False

    def group(self, h: Values) -> Dict[str, Any]:
        """Its hyper-parameters, from ours.

        >>> from gluon_optim import rules
        >>> find(rules.get('adamw'), 'torch', {}).group(rules.get('adamw').hyperparameters())['betas']
        (0.9, 0.999)
        """
        return {key: getattr(h, ours) if isinstance(ours, str) else tuple(getattr(h, name) for name in ours)
                for key, ours in self.keys.items()}

    def hypers(self, group: Mapping[str, Any], partly: bool = False) -> Dict[str, Any]:
        """Ours, from its; ``partly`` allows some to be missing. ValueError for a switch that our rule does not know."""
        remedy = 'Is it of another optimizer? Give the right `optimizer` and `target`.'
        for key, value in self.fixed.items():
            if group.get(key, value) != value:
                raise ValueError(f'`{key}` in a group of {self.path} must be {value!r}. Received: {key}={group[key]!r}. {remedy}')
        keys = {key: ours for key, ours in self.keys.items() if key in group or not partly}
        missing = [key for key in keys if key not in group]
        if missing:
            raise ValueError(f'A group of {self.path} has {one_of(self.keys)}. Received: one without {one_of(missing)}. {remedy}')
        hypers: Dict[str, Any] = {}
        for key, ours in keys.items():
            hypers.update({ours: group[key]} if isinstance(ours, str) else zip(ours, group[key]))
        return hypers

    def slot_key(self, slot: Slot) -> str:
        return self.slots.get(slot.name) or slot.torch or slot.name


FOREIGN: Tuple[Foreign, ...] = (
    Foreign('adamw', 'torch', 'torch.optim.AdamW', {'lr': 'learning_rate', 'weight_decay': 'wd', 'betas': ('beta1', 'beta2'),
                                                    'eps': 'epsilon', 'amsgrad': 'amsgrad'},
            fixed={'maximize': False, 'decoupled_weight_decay': True}),
    Foreign('sgd_torch', 'torch', 'torch.optim.SGD', {'lr': 'learning_rate', 'weight_decay': 'wd', 'momentum': 'momentum',
                                                      'dampening': 'dampening', 'nesterov': 'nesterov'},
            fixed={'maximize': False}, counts=False),
)


def mirrored(rule: Type[Rule]) -> bool:
    """Whether the rule alone is the whole update, so that other frameworks can run it."""
    return rule.lowerable and not getattr(rule, 'supplied', ())


def mirror(rule: Type[Rule], given: Mapping[str, Any]) -> Foreign:
    """How our own PyTorch optimizer keeps ``rule``: everything, under MXNet's names but ``lr``."""
    if not mirrored(rule):
        raise ValueError(f'{rule.name!r} has no mirror: its update is more than the state of one parameter and sums over it. '
                         'Continue with another optimizer; its states can still be read.')
    names = [hyper.name for hyper in rule.declared(given) + BASE_HYPERS]
    keys = {'lr' if name == 'learning_rate' else name: name for name in names}
    path = f'gluon_optim.torch.create({rule.name!r})'
    return Foreign(rule.name, 'mirror', path, keys, fixed={'optimizer': rule.name}, masters=True)


def find(rule: Type[Rule], target: str, given: Mapping[str, Any]) -> Foreign:
    """The class that computes ``rule`` in ``target``; ``given`` are hyper-parameters or a param group.

    >>> from gluon_optim import rules
    >>> find(rules.get('novograd'), 'torch', {})
    Traceback (most recent call last):
      ...
    ValueError: 'novograd' has no equal in target='torch'. There is: target='mirror'.
    """
    if target == 'mirror':
        return mirror(rule, given)
    fits = {foreign.target: foreign for foreign in FOREIGN if foreign.rule == rule.name}
    if target not in fits:
        there_is = ', '.join(f'target={name!r}' for name in ['mirror', *sorted(fits)])
        raise ValueError(f'{rule.name!r} has no equal in target={target!r}. There is: {there_is}.')
    return fits[target]


def select(states: OptimizerStates, names: Optional[Iterable[str]] = None) -> List[ParameterInfo]:
    """The parameters ``names`` in that order; all of them in trainer order for None. Unknown and repeated names are refused."""
    if names is None:
        names = states.names
    if isinstance(names, str):
        raise TypeError(f'`params` must be a list of names. Received: {names!r}. Write [{names!r}].')
    known = {info.name: info for info in states.parameters}
    names = list(names)
    for name in names:
        check_known('parameter', name, known, ValueError)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f'`params` must name each parameter once. Received twice: {one_of(repeated)}.')
    if not names:
        raise ValueError('There must be a parameter to convert. Received: none. Leave `params` out to convert all of them.')
    return [known[name] for name in names]


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


def type_name(array: Any) -> str:
    """The name of an array's type, NumPy's or PyTorch's.

    >>> type_name(numpy.zeros(1, 'float32'))
    'float32'
    """
    return str(array.dtype).split('.')[-1]


def to_state_dict(form: Foreign, rule: Type[Rule], h: Values, states: OptimizerStates, chosen: Sequence[ParameterInfo]
                  ) -> Dict[str, Any]:
    """The states as ``form`` keeps them: ids are positions in ``chosen``, one param group for each (lr_mult, wd_mult)."""
    entries = {position: _entry(form, rule.slots(h), states, info) for position, info in enumerate(chosen)}
    param_groups = []
    for (lr_mult, wd_mult), positions in groups(chosen).items():
        own = h.replace(learning_rate=h.learning_rate * lr_mult, wd=h.wd * wd_mult, rescale_grad=1.0)
        param_groups.append(dict(form.group(own), params=positions))
    return {'state': {position: entry for position, entry in entries.items() if entry}, 'param_groups': param_groups}


def _entry(form: Foreign, slots: Sequence[Slot], states: OptimizerStates, info: ParameterInfo) -> Dict[str, Any]:
    """One parameter's entry, empty where the class starts afresh. ValueError where the states are not those of the rule."""
    name, count, held = info.name, states.counts.get(info.name, 0), states.slots.get(info.name)
    if held is None and count:
        raise ValueError(f'{name!r} has seen {count} updates but has no slots: the states are incomplete. '
                         'Leave it out by `params`, which lists the names to convert.')
    if held is None or not (count or form.counts):
        return {}
    strangers = set(held) - {slot.name for slot in slots}
    if strangers:
        raise ValueError(f'{name!r} must have the slots {one_of(slot.name for slot in slots)} of {form.rule}. '
                         f'Received: {one_of(held)}. Are the states those of other hyper-parameters?')
    entry = {form.slot_key(slot): held[slot.name] for slot in slots if slot.name in held}
    if form.counts:
        entry['step'] = numpy.array(count, 'float32')
    if form.masters and name in states.master:
        entry['master'] = states.master[name]
    check_entry(form, slots, repr(name), info.shape, slot_type(info.dtype), entry)
    return entry


def slot_type(dtype: str) -> str:
    """The type of the slots of a weight of type ``dtype``: double for double, single for all others."""
    return 'float64' if dtype == 'float64' else 'float32'


def from_state_dict(form: Foreign, rule: Type[Rule], state_dict: Mapping[str, Any], params: Any, num_update: Optional[int]
                    ) -> OptimizerStates:
    """The inverse of `to_state_dict`; ``params`` as `gluon_optim.torch.from_torch` describes them."""
    given = list(state_dict['param_groups'])
    likes = _likes(given, params)
    h, mults = common_hypers(rule, [form.hypers(group) for group in given], _known_mults(given, likes))
    mults_of = {key: pair for group, pair in zip(given, mults) for key in group['params']}
    states = OptimizerStates(rule.name, h.asdict(), num_update or 0, [], {}, {})
    for key, (name, like) in likes.items():
        entry = {word: value for word, value in state_dict['state'].get(key, {}).items() if value is not None}
        shape, dtype = _shape_and_type(name, like, form, rule.slots(h), entry)
        states.parameters.append(ParameterInfo(name, getattr(like, 'full_name', name), shape, dtype, *mults_of[key]))
        _take(states, form, rule.slots(h), states.parameters[-1], entry)
    if num_update is None:
        states.num_update = max(states.counts.values())
    if not form.counts:
        states.report.append(f'{form.path} keeps no counts: parameters with a state are given {states.num_update}')
    if any(like is None for _, like in likes.values()):
        states.report.append('shapes and types of weights are those of the slots, for want of `params` that tell them')
    return states


def _take(states: OptimizerStates, form: Foreign, slots: Sequence[Slot], info: ParameterInfo, entry: Mapping[str, Any]) -> None:
    """Add one parameter's ``entry`` of a state_dict to ``states``."""
    states.counts[info.name] = 0
    if not entry and (form.counts or slots):  # a class that keeps neither counts nor slots has no entry at all
        return
    types = check_entry(form, slots, repr(info.name), info.shape, slot_type(info.dtype), entry)
    arrays = {key: numpy.array(entry[key], dtype) for key, dtype in types.items()}
    states.counts[info.name] = int(entry['step']) if form.counts else states.num_update or 1
    states.slots[info.name] = {slot.name: arrays[form.slot_key(slot)] for slot in slots}
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


def what_is_lost(foreign: Foreign, rule: Type[Rule], h: Values, states: OptimizerStates, chosen: Sequence[ParameterInfo]
                 ) -> List[str]:
    """What ``foreign`` cannot hold of these states, and what to do about it: one line each, none where the conversion is whole."""
    held = {name for ours in foreign.keys.values() for name in ([ours] if isinstance(ours, str) else ours)}
    lines = []
    for hyper in rule.declared(h.asdict()):
        if hyper.name not in held and getattr(h, hyper.name) != hyper.default:
            lines.append(f'{hyper.name}={getattr(h, hyper.name)!r}, which {foreign.path} lacks')
    if 'clip_gradient' not in held and h.clip_gradient is not None:
        lines.append(f'clip_gradient={h.clip_gradient!r}, which {foreign.path} lacks: bound each element of the gradients yourself')
    halves = [info.name for info in chosen if info.dtype == 'float16']
    if halves and not foreign.masters:
        lines.append(f'float32 masters and slots of the float16 parameters {one_of(halves)}, which {foreign.path} lacks: '
                     'make the parameters float32, from `states.master` where there are masters')
    if states.variables:
        lines.append(f'the variables {one_of(states.variables)} of the optimizer as a whole')
    return lines


def what_to_say(foreign: Foreign, h: Values, states: OptimizerStates, chosen: Sequence[ParameterInfo]) -> List[str]:
    """What goes on outside the optimizer and so is not in the converted state: lines for the report."""
    lines = [f'{foreign.path}: {foreign.label}; {len(chosen)} of {len(states.parameters)} parameters, update {states.num_update}; '
             f"in this order: {', '.join(info.name for info in chosen)}"]
    fresh = [info.name for info in chosen if info.name not in states.slots]
    if fresh:
        lines.append(f'no state yet, as in the file: {one_of(fresh)}')
    if h.rescale_grad != 1:
        lines.append(f'rescale_grad={h.rescale_grad!r} is not carried over: MXNet multiplied gradients of the summed loss by it; '
                     'give those of the mean loss')
    if states.scheduler:
        lines.append(f"the scheduler {states.scheduler.get('class')} is not carried over: the param groups have its base_lr, "
                     f'{h.learning_rate!r}; set the rate at each step, beginning with that of update {states.num_update + 1}')
    if states.loss_scaler:
        lines.append(f'the loss scaler {states.loss_scaler!r} is not carried over: give its scale to the new one')
    if foreign.masters and any(info.name in states.master for info in chosen):
        lines.append("float32 masters are in the state as 'master': half-precision parameters follow them from the next step on")
    split = groups(chosen)
    if len(split) > 1:
        lines.append(f'{len(split)} param groups, by (lr_mult, wd_mult) {list(split)}: build the optimizer from '
                     '`param_groups(state_dict, params)`')
    return lines
