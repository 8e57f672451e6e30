"""Multipliers of learning rate and weight decay, by the names and kinds of a net's parameters.

>>> import gluon_optim as go
>>> from mxnet.gluon import nn
>>> net = nn.HybridSequential()
>>> net.add(nn.Dense(8, in_units=4), nn.BatchNorm(in_channels=8), nn.Dense(2, in_units=8))
>>> go.param_groups(net, [('*', go.groups.layer_decay(net, 0.5)), *go.groups.NO_DECAY])
<ParamGroups: 6 parameters in 5 groups>
  lr_mult  wd_mult  parameters  values  rules    names
      0.5        1           1      32  *        0.weight
      0.5        0           1       8  *, bias  0.bias
      0.5        0           2      16  *, norm  1.gamma, 1.beta
        1        1           1      16  *        2.weight
        1        0           1       2  *, bias  2.bias
"""
import bisect
import fnmatch
import itertools
import json
import math
import re
import warnings
import weakref
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from mxnet import gluon

from ..display import columns, columns_table
from ..schema import Hyper, check_known, one_of, some_of
from ..states.model import MULTIPLIERS, STATISTICS
from .optimizer import Runner
from .trainer import shape_of
from .typing import BlockLike, ParameterLike

__all__ = ['KINDS', 'NO_DECAY', 'Group', 'ParamGroups', 'fan_in', 'layer_decay', 'param_groups']

Multipliers = Mapping[str, float]                             # 'lr_mult', 'wd_mult', or both
Factors = Callable[[str, ParameterLike], Multipliers]         # the multipliers of a parameter, from its name and itself
Rule = Tuple[str, Union[Multipliers, Factors]]

KINDS = ('bias', 'norm', 'embedding', 'matrix')


class _WherePresent(Dict[str, float]):
    """The multipliers of a ready-made rule, for any net: it may match nothing."""


NO_DECAY: Tuple[Rule, ...] = (('bias', _WherePresent(wd_mult=0.0)), ('norm', _WherePresent(wd_mult=0.0)))

_MULTIPLIERS = {name: Hyper(name, 1.0, '[0, inf)') for name in MULTIPLIERS}
_HEADS = ('lr_mult', 'wd_mult', 'parameters', 'values', 'rules', 'names')


class Group(NamedTuple):
    """Parameters with the same multipliers, matched by the same rules.

    ``lr_mult``, ``wd_mult``; ``rules`` are the patterns and kinds that matched, in order; ``names`` those of the parameters;
    ``values`` is how many numbers they hold, None where a shape is not known yet. Raises nothing.

    >>> Group(1.0, 0.0, ('bias',), ('0.bias', '1.bias'), 10).wd_mult
    0.0
    """

    lr_mult: float
    wd_mult: float
    rules: Tuple[str, ...]
    names: Tuple[str, ...]
    values: Optional[int]


class ParamGroups:
    """What `param_groups` set: a sequence of `Group`, printed as a table.

    ``groups`` are in the order of the net's parameters. Raises nothing.

    >>> ParamGroups([Group(1.0, 0.0, ('bias',), ('0.bias', '1.bias'), 10)])
    <ParamGroups: 2 parameters in 1 group>
      lr_mult  wd_mult  parameters  values  rules  names
            1        0           2      10  bias   0.bias, 1.bias
    """

    def __init__(self, groups: Sequence[Group]):
        self.groups = list(groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __repr__(self) -> str:
        return columns(f'<{self._title()}>', _HEADS, self._rows())

    def _repr_html_(self) -> str:
        return columns_table(self._title(), _HEADS, self._rows())

    def _title(self) -> str:
        parameters, groups = sum(len(group.names) for group in self.groups), len(self.groups)
        return f'ParamGroups: {parameters} parameters in {groups} group{"" if groups == 1 else "s"}'

    def _rows(self) -> List[Tuple[Any, ...]]:
        return [(group.lr_mult, group.wd_mult, len(group.names), '?' if group.values is None else group.values,
                 ', '.join(group.rules) or '-', ', '.join(group.names)) for group in self.groups]


def param_groups(net: BlockLike, rules: Sequence[Rule]) -> ParamGroups:
    """Set ``lr_mult`` and ``wd_mult`` of parameters by rules.

    The rate of a parameter is learning_rate * lr_mult, its decay wd * wd_mult.

    Parameters
    ----------
    net : gluon.Block
        Before or after it is initialized, and before or after its Trainer is made: the next step applies them.
    rules : list of (str, dict or function)
        Each is a kind or a pattern, and the multipliers of the parameters that it matches, ``dict(lr_mult=, wd_mult=)`` with one
        or both, numbers of at least 0; or a function of a parameter's name and the `Parameter` that returns such a dictionary.

        Kinds: ``'bias'``; ``'norm'``, which is gamma and beta of a normalization; ``'embedding'``; ``'matrix'``, everything else
        with two or more axes. Any other string is a pattern of `fnmatch` (``*``, ``?``, ``[seq]``) for the whole structural name
        (``features.0.weight``, as in ``net.save_parameters``; ``*`` matches dots too) or `Parameter.name`.

        All rules that match a parameter apply, in order: of two that set the same multiplier the later one holds. They replace what
        was set before, and what no rule sets stays. An empty list sets nothing, and shows what is set.

    Returns
    -------
    ParamGroups
        A table of multipliers, numbers of parameters, and the rules that matched them.

    Multipliers are saved with the states, and become the param groups of PyTorch (`to_torch`) and the arguments ``lr_mult`` and
    ``wd_mult`` in JAX (`gluon_optim.optax.arguments`). Running means and variances, which no optimizer updates, are left out. A
    shared parameter is of the kind of its first layer; patterns are compared with all of its names. To freeze a parameter set
    ``grad_req = 'null'``: ``lr_mult`` 0 leaves it in the optimizer.

    Recipes: `NO_DECAY` for biases and normalizations, of which a net may have none, `layer_decay`, `fan_in`.

    Raises ValueError for a rule that matches nothing, an empty one, a multiplier below 0, infinite or NaN, and where they would not
    reach the optimizer on a parameter server; TypeError for another key or type. Nothing has been set then.
    Warns of a rule that has no effect, because later ones set the same.

    >>> import gluon_optim as go
    >>> from mxnet.gluon import nn
    >>> net = nn.HybridSequential()
    >>> net.add(nn.Embedding(100, 8), nn.Dense(8, in_units=8), nn.Dense(2, in_units=8))
    >>> go.param_groups(net, [('bias', dict(wd_mult=0)), ('2.*', dict(lr_mult=10)), ('embedding', dict(lr_mult=0.1, wd_mult=0))])
    <ParamGroups: 5 parameters in 5 groups>
      lr_mult  wd_mult  parameters  values  rules      names
          0.1        0           1     800  embedding  0.weight
            1        1           1      64  -          1.weight
            1        0           1       8  bias       1.bias
           10        1           1      16  2.*        2.weight
           10        0           1       2  bias, 2.*  2.bias
    >>> net[2].bias.lr_mult, net[2].bias.wd_mult
    (10.0, 0.0)
    """
    places = _places(net)
    found = [(selector, values, _matching(selector, places)) for selector, values in _checked(rules)]
    unmatched = [selector for (selector, _, matching), (_, values) in zip(found, rules)
                 if not matching and not isinstance(values, _WherePresent)]
    if unmatched:
        raise ValueError(f'Each rule must match a parameter that is trained. Received: {one_of(unmatched)}, which match none. '
                         f'Kinds: {one_of(KINDS)}; names: {some_of([place.names[0] for place in places])}.')
    found = [rule for rule in found if rule[2]]
    if found:
        _check_reached(places)
    plan = [_Plan(place, {}, {}, []) for place in places]
    for number, (selector, values, matching) in enumerate(found):
        for position in matching:
            plan[position].add(number, selector, values)
    holding = {number for each in plan for number in each.holds.values()}
    for number, (selector, _, _) in enumerate(found):
        if number not in holding:
            warnings.warn(f'The rule {selector!r} has no effect: later ones set the same multipliers for all its parameters. Of '
                          'several rules the last holds, so put general ones first.', stacklevel=2)
    for each in plan:
        for name, value in each.values.items():
            setattr(each.place.parameter, name, value)
    return _groups(plan)


class _Place(NamedTuple):
    """A parameter of a net, and what it is in its layer."""

    names: List[str]            # structural, a shared parameter's first one first
    parameter: ParameterLike
    kind: str                   # one of KINDS, or ''
    layer: int                  # the number of the Block that has it
    groups: Optional[int]       # of a transposed convolution, whose weight has the inputs on its first axis


class _Plan(NamedTuple):
    """What a parameter gets."""

    place: _Place
    values: Dict[str, float]    # the multipliers that rules set
    holds: Dict[str, int]       # each one's rule, by number
    rules: List[str]            # all that match

    def add(self, number: int, selector: str, values: Union[Multipliers, Factors]) -> None:
        name = self.place.names[0]
        multipliers = _multipliers(selector, values(name, self.place.parameter), name) if callable(values) else values
        self.values.update(multipliers)
        self.holds.update(dict.fromkeys(multipliers, number))
        self.rules.append(selector)


def _groups(plan: Sequence[_Plan]) -> ParamGroups:
    """Of parameters that have got what was planned."""
    found: Dict[Any, List[_Place]] = {}
    for place, _, _, rules in plan:
        found.setdefault((float(place.parameter.lr_mult), float(place.parameter.wd_mult), tuple(rules)), []).append(place)
    return ParamGroups([Group(lr_mult, wd_mult, rules, tuple(place.names[0] for place in places), _count(places))
                        for (lr_mult, wd_mult, rules), places in found.items()])


def _count(places: Sequence[_Place]) -> Optional[int]:
    shapes = [shape_of(place.parameter) for place in places]
    return sum(math.prod(shape) for shape in shapes) if all(map(_is_known, shapes)) else None


def _is_known(shape: Sequence[int]) -> bool:
    return len(shape) > 0 and min(shape) > 0  # 0 and -1 stand for what the first forward pass will tell


# Checks

def _checked(rules: Any) -> List[Tuple[str, Union[Multipliers, Factors]]]:
    advice = "Write [('bias', dict(wd_mult=0)), ('output.*', dict(lr_mult=10))]."
    if not isinstance(rules, (list, tuple)):
        raise TypeError(f'`rules` must be a list of rules. Received: {type(rules).__name__}. {advice}')
    checked = []
    for rule in rules:
        if not (isinstance(rule, (list, tuple)) and len(rule) == 2 and isinstance(rule[0], str)
                and (isinstance(rule[1], Mapping) or callable(rule[1]))):
            raise TypeError('A rule must be a kind or pattern, and a dictionary of multipliers or a function that returns one. '
                            f'Received: {rule!r}. {advice}')
        selector, values = rule
        if not selector:
            raise ValueError(f'The pattern of a rule must not be empty. Received: {rule!r}. Write {"*"!r} for all parameters.')
        checked.append((selector, values if callable(values) else _multipliers(selector, values)))
    return checked


def _multipliers(selector: str, values: Any, name: str = '') -> Dict[str, float]:
    """The multipliers that a rule gives, to the parameter ``name`` where it is a function."""
    if not isinstance(values, Mapping):
        raise TypeError(f'The function of the rule {selector!r} must return a dictionary of multipliers. Received for {name}: '
                        f'{values!r}. Return dict(lr_mult=0.1), for example.')
    for key in values:
        check_known('multiplier', key, _MULTIPLIERS, owner=f'the rule {selector!r}')
    if not values:
        raise ValueError(f'The rule {selector!r} must set a multiplier. Received: none{name and f" for {name}"}. Write '
                         'dict(lr_mult=0.1), dict(wd_mult=0), or both.')
    try:
        return {key: float(_MULTIPLIERS[key].check(value)) for key, value in values.items()}
    except (TypeError, ValueError) as error:
        raise type(error)(f'In the rule {selector!r}{name and f" for {name}"}: {error}') from None


def _check_reached(places: Sequence[_Place]) -> None:
    """ValueError where weights are updated on parameter servers, and the optimizer there would not get the multipliers."""
    for trainer in {place.parameter._trainer for place in places} - {None}:
        why = _not_reached(trainer)
        if why:
            raise ValueError('The multipliers must reach the optimizer. Received: a trainer that updates weights on parameter '
                             f'servers, {why}, or create the trainer with update_on_kvstore=False.')


def _not_reached(trainer: Any) -> str:
    if isinstance(trainer._optimizer, Runner):
        return ''
    if trainer._kv_initialized:
        on_servers = trainer._distributed and trainer._update_on_kvstore
    else:
        store = trainer._kvstore_params['kvstore']
        on_servers = 'dist' in str(getattr(store, 'type', store)) and trainer._kvstore_params['update_on_kvstore'] is not False
    return 'to which MXNet sends its own optimizers without multipliers. Use one of gluon_optim' if on_servers else ''


# The net

def _matching(selector: str, places: Sequence[_Place]) -> List[int]:
    """The positions of what the kind or pattern matches."""
    return [position for position, place in enumerate(places) if (
        place.kind == selector if selector in KINDS
        else any(fnmatch.fnmatchcase(name, selector) for name in (*place.names, place.parameter.name)))]


def _places(net: Any) -> List[_Place]:
    """The parameters that are trained, or may be, in the net's order."""
    if not isinstance(net, gluon.Block):
        raise TypeError(f'`net` must be a gluon.Block. Received: {type(net).__name__}.')
    uses: Dict[Any, _Use] = {}
    for use in _uses(net, itertools.count()):
        uses.setdefault(use.parameter, use)
    names: Dict[Any, List[str]] = {}
    collect = getattr(net, '_collect_params_with_prefix', None) or net.collect_params  # MXNet 1.x, 2.x
    for name, parameter in collect().items():
        names.setdefault(parameter, []).append(name)
    for parameter in net.collect_params().values():  # one that is in no attribute of its Block has its full name only
        names.setdefault(parameter, [parameter.name])
    return [_Place(names[parameter], *(uses.get(parameter) or _use(parameter, parameter.name, layer=-1)))
            for parameter in names if not names[parameter][0].endswith(STATISTICS)]


class _Use(NamedTuple):
    """A parameter, and what its layer says about it: the fields of `_Place`."""

    parameter: Any
    kind: str
    layer: int
    groups: Optional[int]


def _use(parameter: Any, leaf: str, layer: int, op: str = '', groups: Any = 1) -> _Use:
    """``leaf`` is the layer's name for the parameter, ``op`` what it does with it, if that matters here."""
    if re.fullmatch('(.*_)?bias', leaf):
        kind = 'bias'
    elif re.fullmatch('(.*_)?(gamma|beta)', leaf):
        kind = 'norm'
    elif op == 'embedding':
        kind = 'embedding'
    elif parameter.shape is None and parameter._data is None:
        raise ValueError('The number of axes of parameters must be known. Received: '
                         f'{parameter.name}, a parameter of a SymbolBlock. Load its parameters first.')
    else:
        kind = 'matrix' if len(shape_of(parameter)) > 1 else ''
    return _Use(parameter, kind, layer, int(groups) if op == 'deconvolution' else None)


def _uses(block: Any, numbers: Iterator[int]) -> Iterator[_Use]:
    """All parameters of ``block``, layer by layer; a shared one comes again."""
    classes = {cls.__name__ for cls in type(block).__mro__}
    if 'SymbolBlock' in classes:
        yield from _uses_in_symbol(block, numbers)
        return
    layer = next(numbers)
    op = 'embedding' if classes & {'Embedding', 'SparseEmbedding'} else str(getattr(block, '_op_name', '')).lower()
    groups = (getattr(block, '_kwargs', None) or {}).get('num_group', 1)
    for leaf, parameter in block._reg_params.items():
        yield _use(parameter, leaf, layer, op, groups)
    for child in block._children.values():
        yield from _uses(child() if isinstance(child, weakref.ref) else child, numbers)


def _uses_in_symbol(block: Any, numbers: Iterator[int]) -> Iterator[_Use]:
    named = {parameter.name: parameter for parameter in block._reg_params.values()}
    nodes = json.loads(block._cached_graph[1].tojson())['nodes']
    for node in nodes:
        layer, inputs = next(numbers), [nodes[entry[0]]['name'] for entry in node['inputs']]
        for name in inputs:
            if name in named:
                yield _use(named[name], name, layer, node['op'].lower(), node.get('attrs', {}).get('num_group', 1))


# Recipes

def layer_decay(net: BlockLike, decay: float, layers: Optional[Sequence[str]] = None) -> Factors:
    """For a rule of `param_groups`: rates that fall from layer to layer, away from the output.

        lr_mult = decay ** (n - 1 - k)      in layer k = 0 .. n - 1 of n

    Parameters
    ----------
    net : gluon.Block
    decay : float
        Above 0, at most 1: the rate of a layer is ``decay`` times that of the next one. The last keeps the full rate.
    layers : list of str, optional
        Patterns of names, as in `param_groups`, from the input to the output: a parameter is of the layer that it matches
        first. Without it each Block with a matrix or embedding of its own is a layer, in the order in which the net has them,
        and what follows it without one, such as a normalization, is part of it.

    Used for fine-tuning: Howard, Ruder, Universal language model fine-tuning, arXiv:1801.06146, 3.2, with 1 / 2.6; Bao et al.,
    BEiT, arXiv:2106.08254, with 0.65 to 0.85 and one layer for each transformer block.

    Raises ValueError for a decay out of range, parameters that match none of ``layers``, and one that matches no parameter.

    >>> import gluon_optim as go
    >>> from mxnet.gluon import nn
    >>> net = nn.HybridSequential()
    >>> net.add(nn.Conv2D(8, 3), nn.BatchNorm(), nn.Dense(16), nn.Dense(2))
    >>> [group.lr_mult for group in go.param_groups(net, [('*', go.groups.layer_decay(net, 0.5))])]
    [0.25, 0.5, 1.0]
    >>> go.param_groups(net, [('*', go.groups.layer_decay(net, 0.5, ['[012].*', '3.*']))])
    <ParamGroups: 8 parameters in 2 groups>
      lr_mult  wd_mult  parameters values  rules  names
          0.5        1           6      ?  *      0.weight, 0.bias, 1.gamma, 1.beta, 2.weight, 2.bias
            1        1           2      ?  *      3.weight, 3.bias
    """
    Hyper('decay', 1.0, '(0, 1]').check(decay)
    places = _places(net)
    depth = _depth(places) if layers is None else _depth_by(layers, places)
    last = max(depth.values(), default=0)
    return lambda name, parameter: {'lr_mult': decay ** (last - _known(depth, name, parameter))}


def _depth(places: Sequence[_Place]) -> Dict[ParameterLike, int]:
    """The number of each parameter's layer."""
    holders = sorted({place.layer for place in places if place.kind in ('matrix', 'embedding')})
    return {place.parameter: max(bisect.bisect_right(holders, place.layer) - 1, 0) for place in places}


def _depth_by(layers: Sequence[str], places: Sequence[_Place]) -> Dict[ParameterLike, int]:
    depth: Dict[ParameterLike, int] = {}
    for number, pattern in enumerate(layers):
        matching = _matching(pattern, places)
        if not matching:
            raise ValueError(f'Each of `layers` must match a parameter. Received: {pattern!r}, which matches none. Names: '
                             f'{some_of([place.names[0] for place in places])}.')
        for position in matching:
            depth.setdefault(places[position].parameter, number)
    left = [place.names[0] for place in places if place.parameter not in depth]
    if left:
        raise ValueError(f'`layers` must have a pattern for each parameter. Received: none that matches {some_of(left)}.')
    return depth


def fan_in(net: BlockLike) -> Factors:
    """For a rule of `param_groups` on matrices: the rate divided by the root of the number of inputs of a unit.

        lr_mult = 1 / sqrt(n)               fully connected, n inputs
        lr_mult = 1 / (sqrt(c) k)           convolution, c input channels, k x k kernel

    In general 1 / sqrt(c k_1 k_2 ...), with the channels of one group for c where there are several.

    Source: LeCun, Bottou, Orr, Mueller, Efficient BackProp, 1998, 4.7, and the page on LARC in the documentation of NVIDIA's
    OpenSeq2Seq, which has both formulas. For ``net``, a gluon.Block.

    Raises ValueError, out of `param_groups`, for parameters of another kind than ``'matrix'``, and for one with a shape that is not
    known yet.

    >>> import gluon_optim as go
    >>> from mxnet.gluon import nn
    >>> net = nn.HybridSequential()
    >>> net.add(nn.Conv2D(8, 3, in_channels=4), nn.Dense(2, in_units=100))
    >>> groups = go.param_groups(net, [('matrix', go.groups.fan_in(net))])
    >>> net[0].weight.lr_mult == 1 / (2 * 3), net[1].weight.lr_mult
    (True, 0.1)
    """
    places = {place.parameter: place for place in _places(net)}

    def factors(name: str, parameter: ParameterLike) -> Multipliers:
        place, shape = _known(places, name, parameter), shape_of(parameter)
        if place.kind != 'matrix':
            raise ValueError(f'`fan_in` is for matrices. Received: {name}, of kind {place.kind or "none"!r}. Use it in a rule for '
                             "'matrix'.")
        if not _is_known(shape):
            raise ValueError(f'Shapes of parameters must be known. Received: {name} with shape {shape}. Run one forward pass '
                             'first: net(batch).')
        inputs = math.prod(shape[1:]) if place.groups is None else shape[0] // place.groups * math.prod(shape[2:])
        return {'lr_mult': 1 / math.sqrt(inputs)}

    return factors


def _known(table: Mapping[ParameterLike, Any], name: str, parameter: ParameterLike) -> Any:
    """What a recipe knows about the parameter."""
    if parameter not in table:
        raise ValueError(f'The net given to a recipe must have the parameters of the rule. Received: another net, without {name}.')
    return table[parameter]
