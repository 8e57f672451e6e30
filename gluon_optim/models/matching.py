"""Match Gluon's arrays with those of a PyTorch module: by name, in order, by shape."""
import dataclasses
import itertools
import math
from typing import Any, Collection, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import numpy

from ..schema import one_of
from .gluon import Source
from .names import SUGGEST, conventional, rnn_like, split
from .plan import Plan, Shape, Take, channels_first, pointwise, unpacked
from .pytorch import COUNTER, Target

__all__ = ['MOST', 'check_layouts', 'led_by', 'matched', 'mismatch', 'one_for_tied', 'rests_on_order', 'settled', 'sources_of',
           'wanted_names', 'with_tied', 'without_named']


MOST = 100  # layers of the same sizes, or pairs of tied ones, that are tried


def matched(found: Source, target: Target, given: Optional[Plan] = None, dropped: Collection[str] = ()) -> Tuple[Plan, Source]:
    """Match by name if all names agree, else in order or by shapes that occur once. Shared parameters may occur once or twice.

    What a map gives and drops is taken from both sides first; the plan includes what is ``given``. Also returns the source, with
    what is shared filled in, including parameters tied in ``target``.
    """
    given = given or {}
    left, wanting = _without_used(given, dropped, found), without_named(given, target)
    tries = _tries(left, wanting)
    for match in (_by_name, _by_layers):
        for source, wanted in tries:
            plan = match(source, wanted)
            if plan is not None:
                return one_for_tied({**given, **plan}, found, target)
        ties = [] if given else list(itertools.islice(_ties(found, target), MOST + 1))  # more leave a choice anyway
        guesses = [plan for wanted in ties if len(ties) <= MOST for plan in [match(found, wanted)] if plan is not None]
        if len(guesses) == 1:
            return one_for_tied(guesses[0], found, target)
    raise ValueError(_why_not(*tries[1], 'besides those in the map, ' if given or dropped else ''))


def sources_of(plan: Plan) -> Set[str]:
    """Names of the arrays that ``plan`` converts."""
    return {take.source for take in plan.values() if not take.zeros}


def _without_used(given: Plan, dropped: Collection[str], found: Source) -> Source:
    """What a map leaves of ``found``; other names of what it uses are left, as shared with that."""
    used = sources_of(given)
    gone = {*used, *dropped}
    arrays = {name: array for name, array in found.arrays.items() if name not in gone}
    return dataclasses.replace(found, arrays=arrays, shared=led_by(used, found.shared), alike=led_by(used, found.alike))


def without_named(given: Plan, target: Target) -> Target:
    """What a map leaves of ``target``; parameters tied to what it names are left, as tied to that."""
    shapes = {name: shape for name, shape in target.shapes.items() if name not in given}
    return dataclasses.replace(target, shapes=shapes, tied=led_by(given, target.tied))


def led_by(chosen: Collection[str], same: Mapping[str, str]) -> Dict[str, str]:
    """``same`` (name -> the first name of the same parameter), with those that are ``chosen`` as the first."""
    leaders = {same.get(name, name): name for name in chosen}
    names = {**{name: leaders.get(first, first) for name, first in same.items()},
             **{first: leaders[first] for first in same.values() if first in leaders}}
    return {name: first for name, first in names.items() if name != first and name not in chosen}


def _tries(found: Source, target: Target) -> List[Tuple[Source, Target]]:
    """Each shared parameter under all its names; under one name on either side; and equal values only once."""
    once = _without(found, found.shared)
    tries = [(found, dataclasses.replace(target, tied={})), (once, target)]
    if target.tied:
        tries.append((once, dataclasses.replace(target, tied=_with_last_names(target.tied))))
    perhaps = _perhaps_shared(once)
    return [*tries, (_without(once, perhaps), target)] if perhaps else tries


def _with_last_names(tied: Mapping[str, str]) -> Dict[str, str]:
    last = {first: name for name, first in tied.items()}
    return {name: last[first] for other, first in tied.items() for name in (first, other) if name != last[first]}


def _perhaps_shared(found: Source) -> Dict[str, str]:
    """Arrays with the values of another layer's. Two arrays of one layer are never the same parameter."""
    dotted = bool(found.dotted)
    return {name: first for name, first in found.alike.items() if split(name, dotted)[0] != split(first, dotted)[0]}


def _ties(found: Source, target: Target) -> Iterator[Target]:
    """A Gluon layer has no bias without a weight: if its weight is another layer's, a checkpoint has only its bias."""
    bare = [layer for layer in _layers_of(found, target) if 'bias' in layer.leaves and 'weight' not in layer.leaves]
    if not found.once or target.tied or len(bare) != 1:
        return
    weights = [name for name in target.shapes if name.rpartition('.')[2] == 'weight' and len(target.shapes[name]) > 1]
    biased: Dict[Shape, List[str]] = {}
    for name in weights:
        if f'{name.rpartition(".")[0]}.bias' in target.shapes:
            biased.setdefault(target.shapes[name], []).append(name)
    for first in weights:
        for name in biased.get(target.shapes[first], ()):
            if name != first:
                yield dataclasses.replace(target, tied={name: first})


def one_for_tied(plan: Plan, found: Source, target: Target) -> Tuple[Plan, Source]:
    """``plan`` with one array, by its first name in Gluon, for each tensor in PyTorch. ValueError if there are several."""
    shared, plan, order = dict(found.shared), dict(plan), list(found.arrays)
    for first in dict.fromkeys(target.tied.values()):
        names = [first, *(name for name, other in target.tied.items() if other == first)]
        takes = [plan[name] for name in names if name in plan]
        if not takes:
            continue
        one = min(takes, key=lambda take: order.index(take.source))
        value = one.of(found.arrays[one.source])
        for name in names:
            other = plan.get(name, one)
            same = other == one or found.shared.get(other.source, other.source) == found.shared.get(one.source, one.source)
            if not same and not numpy.array_equal(other.of(found.arrays[other.source]), value):
                both = ' and '.join(map(repr, names))
                raise ValueError(f'{both} are one tensor in {target.what}, so they need one array. Received: '
                                 f'{one.source!r} and {other.source!r} of {found.what}, which differ. Untie them in the module.')
            if other.source != one.source and shared.get(one.source) != other.source:
                shared.setdefault(other.source, one.source)
            plan[name] = one
    return {name: plan[name] for name in target.shapes if name in plan}, dataclasses.replace(found, shared=shared)


def _without(found: Source, shared: Mapping[str, str]) -> Source:
    return dataclasses.replace(found, arrays={name: array for name, array in found.arrays.items() if name not in shared})


def wanted_names(target: Target) -> List[str]:
    return [name for name in target.shapes if not name.endswith(COUNTER) and name not in target.tied]


def with_tied(plan: Plan, target: Target) -> Plan:
    tied = {name: plan[first] for name, first in target.tied.items() if first in plan}
    return {name: {**plan, **tied}[name] for name in target.shapes if name in plan or name in tied}


def _by_name(found: Source, target: Target) -> Optional[Plan]:
    plan = conventional(found, target)
    if set(plan) != set(wanted_names(target)):
        return None
    return with_tied({name: _fitted(name, plan[name], found, target) for name in wanted_names(target)}, target)


def _by_layers(found: Source, target: Target) -> Optional[Plan]:
    fits = _pairs(_layers_of(found, target), _wanted(target), found, target)
    return None if fits is None else with_tied({name: take for fit in fits for name, take in fit.items()}, target)


def _fitted(name: str, take: Take, found: Source, target: Target) -> Take:
    """``take`` with the layout that gives PyTorch's shape. ValueError if there is none."""
    fit = _fit(name, take, found, target)
    if fit is None:
        raise ValueError(mismatch(name, take.source, take.of(found.arrays[take.source]).shape, target))
    return fit


def _fit(name: str, take: Take, found: Source, target: Target) -> Optional[Take]:
    shape, wanted = take.of(found.arrays[take.source]).shape, target.shapes[name]
    if shape == wanted:
        return take
    plain = take.rnn is None and take.transpose is None
    if plain and len(shape) > 2 and not found.facts.order and tuple(shape[k] for k in channels_first(len(shape))) == wanted:
        return take._replace(transpose=channels_first(len(shape)))
    groups = target.groups.get(name.rpartition('.')[0])
    if plain and len(shape) == len(wanted) == 1 and groups == shape[0]:
        return take._replace(repeat=wanted[0] // shape[0])
    if take.rnn is None and name.rpartition('.')[2] == 'weight' and pointwise(shape, wanted):
        return take._replace(shape=wanted)
    return None


def mismatch(name: str, source: str, shape: Shape, target: Target) -> str:
    wanted = target.shapes[name]
    message = f'{name!r} of {target.what} must have shape {wanted}. Received: {source!r} of shape {tuple(shape)}'
    if len(shape) > 1 and sorted(shape) == sorted(wanted):
        order, left = [], list(shape)
        for size in wanted:
            order.append(left.index(size))
            left[order[-1]] = -1
        return (f'{message}, which is its transpose. If its axes are {order}, map it: "{name}": {{"from": "{source}", '
                f'"transpose": {order}}}.')
    if len(shape) == len(wanted) == 1 and shape[0] and wanted[0] % shape[0] == 0:
        return (f'{message}. If it belongs to a GroupNorm of MXNet 1.x, map it: "{name}": {{"from": "{source}", '
                f'"repeat": {wanted[0] // shape[0]}}}.')
    return f'{message}. Does it belong to another net, or must it be mapped to another name?'


# Layers

class Layer(NamedTuple):
    """Parameters of one layer: leaf -> name of PyTorch's parameter, or how to convert Gluon's."""

    prefix: str
    leaves: Dict[str, Any]


def _grouped(items: Iterator[Tuple[str, Any]]) -> List[Layer]:
    layers: Dict[str, Dict[str, Any]] = {}
    for name, value in items:
        prefix, _, leaf = name.rpartition('.')
        layers.setdefault(prefix, {})[leaf] = value
    return [Layer(prefix, leaves) for prefix, leaves in layers.items()]


def _layers_of(found: Source, target: Target) -> List[Layer]:
    return _grouped(iter(conventional(found, target).items()))


def _wanted(target: Target) -> List[Layer]:
    return _grouped((name, name) for name in wanted_names(target))


def _fit_layer(layer: Layer, wanted: Layer, found: Source, target: Target) -> Optional[Plan]:
    """How ``layer`` becomes the module's ``wanted``, or None if it cannot."""
    if list(layer.leaves) == ['*']:  # a packed vector
        take, prefix = layer.leaves['*'], f'{wanted.prefix}.' if wanted.prefix else ''
        rnn, size = rnn_like(target, prefix), found.arrays[take.source].size
        if rnn is None or size != sum(math.prod(target.shapes[name]) for name in wanted.leaves.values()):
            return None
        return unpacked(prefix, take._replace(rnn=rnn), size)
    leaves = _with_bias(layer, wanted, found, target)
    if set(leaves) != set(wanted.leaves):
        return None
    fits = {name: _fit(name, leaves[leaf], found, target) for leaf, name in wanted.leaves.items()}
    return None if None in fits.values() else {name: take for name, take in fits.items() if take is not None}


def _with_bias(layer: Layer, wanted: Layer, found: Source, target: Target) -> Dict[str, Any]:
    """The leaves of ``layer``; for a convolution without bias where a linear layer with one is wanted, with a bias of zeros."""
    if set(layer.leaves) != {'weight'} or set(wanted.leaves) != {'weight', 'bias'}:
        return layer.leaves
    source = layer.leaves['weight'].source
    linear = found.arrays[source].ndim > 2 and len(target.shapes[wanted.leaves['weight']]) == 2
    return {**layer.leaves, 'bias': Take(source, zeros=True)} if linear else layer.leaves


def _pairs(layers: List[Layer], wanted: List[Layer], found: Source, target: Target) -> Optional[List[Plan]]:
    """The layer for each wanted one: by name, by position, or the only possible one; None if that leaves a choice."""
    if len(layers) != len(wanted):
        return None
    named, layers, wanted = _named(layers, wanted, found, target)
    if found.ordered and target.ordered:
        fits = [_fit_layer(layer, place, found, target) for layer, place in zip(layers, wanted)]
        if None not in fits:
            return [*named.values(), *(fit for fit in fits if fit is not None)]
    candidates, chosen = Candidates(layers, found, target), {}
    for place in wanted:
        fitting = candidates.of(place)
        fit = _fit_layer(fitting[0], place, found, target) if len(fitting) == 1 and fitting[0].prefix not in chosen else None
        if fit is None:
            return None
        chosen[fitting[0].prefix] = fit
    return [*named.values(), *chosen.values()]


class Candidates:
    """Finds the layers that fit a place. Only those whose arrays have the same sizes in some order are tried."""

    def __init__(self, layers: List[Layer], found: Source, target: Target):
        self.layers, self.found, self.target = layers, found, target
        self.by_sizes: Dict[Any, List[Layer]] = {}
        self.known: Dict[Any, List[Layer]] = {}
        for layer in layers:
            self.by_sizes.setdefault(_sizes(_arrays(layer, found, target)), []).append(layer)

    def of(self, place: Layer) -> List[Layer]:
        """The layers that fit ``place``; only those with its own shapes if there are any."""
        shapes = {leaf: self.target.shapes[name] for leaf, name in place.leaves.items()}
        grouped = place.prefix in self.target.groups  # its arrays may be repeated
        key = (*shapes.items(), place.prefix if grouped else None)
        if key not in self.known:
            arrays = _arrays(place, self.found, self.target)
            unbiased = {leaf: array for leaf, array in arrays.items() if leaf != 'bias'}
            packed = sum(math.prod(shape) for shape in shapes.values())
            keys = dict.fromkeys([_sizes(arrays), _sizes(unbiased), packed])
            near = self.layers if grouped else [layer for sizes in keys for layer in self.by_sizes.get(sizes, ())]
            tried = [(layer, _fit_layer(layer, place, self.found, self.target)) for layer in near]
            fits = [(layer, fit) for layer, fit in tried if fit is not None]
            own = [layer for layer, fit in fits if not any(take.shape for take in fit.values())]
            self.known[key] = own or [layer for layer, _ in fits]
        return self.known[key]


def _sizes(arrays: Mapping[str, Tuple[str, Shape]]) -> Any:
    """Equal for layers that fit one another, apart from what is repeated; of a packed vector, its size."""
    if list(arrays) == ['*']:
        return math.prod(arrays['*'][1])
    return tuple(sorted((leaf, *sorted(size for size in shape if size != 1)) for leaf, (_, shape) in arrays.items()))


def _named(layers: List[Layer], wanted: List[Layer], found: Source,
           target: Target) -> Tuple[Dict[str, Plan], List[Layer], List[Layer]]:
    """Layers matched by name and shapes, and the others. Numbers do not identify a layer; other nets count differently."""
    by_name = {layer.prefix: layer for layer in layers}
    fits = {place.prefix: _fit_layer(by_name[place.prefix], place, found, target) for place in wanted
            if place.prefix in by_name and not any(letter.isdigit() for letter in place.prefix)}
    named = {prefix: fit for prefix, fit in fits.items() if fit is not None}
    return (named, [layer for layer in layers if layer.prefix not in named],
            [place for place in wanted if place.prefix not in named])


def settled(found: Source, target: Target) -> Plan:
    """What names, and the order up to the first difference, determine about a net that cannot be matched as a whole."""
    plan: Plan = {}
    tries = _tries(found, target)
    fits = [(wanted, _named(_layers_of(source, wanted), _wanted(wanted), source, wanted)[0].values())
            for source, wanted in tries[:3 if target.tied else 2]]
    for wanted, some in [*fits, (tries[1][1], _parting(*tries[1]).fits)]:
        both = with_tied({name: take for fit in some for name, take in fit.items()}, wanted)
        plan.update({name: take for name, take in both.items() if name not in plan})
    return plan


# What prevents a match

class Parting(NamedTuple):
    """Where two nets part: what fits before, in order or by name, and the first layers that do not; None where a net ends."""

    fits: List[Plan]
    layer: Optional[Layer]
    place: Optional[Layer]


def _parting(found: Source, target: Target) -> Parting:
    named, layers, wanted = _named(_layers_of(found, target), _wanted(target), found, target)
    fits = list(named.values())
    if not (found.ordered and target.ordered):
        return Parting(fits, None, None)
    for layer, place in itertools.zip_longest(layers, wanted):
        fit = None if layer is None or place is None else _fit_layer(layer, place, found, target)
        if fit is None:
            return Parting(fits, layer, place)
        fits.append(fit)
    return Parting(fits, None, None)




def _why_not(found: Source, target: Target, among: str) -> str:
    """The first difference, and what to do; ``among`` says which parameters are compared."""
    plan, wanted = conventional(found, target), wanted_names(target)
    known = set(wanted)
    missing, extra = [name for name in wanted if name not in plan], [name for name in plan if name not in known]
    if 2 * len(missing) <= len(wanted):  # most names agree: the others are the problem
        lines = [f'{name!r} has no parameter in {found.what}{_alike(name, found, target)}{_more(missing)}' for name in missing[:1]]
        lines += [f'{plan[name].source!r} is left over{_more(extra)}' for name in extra[:1]]
        difference = '; '.join(lines)
    else:
        difference = (_first_in_order if found.ordered and target.ordered else _first_by_shape)(found, target)
    return (f'The parameters of {found.what} must be those of {target.what}, by name, by order or by shape. Received: '
            f'{among}{difference}. {SUGGEST}. The map may leave out what matches without it.')


def _more(some: Sequence[Any], what: str = '') -> str:
    return f' (the first of {len(some)}{what and " " + what})' if len(some) > 1 else ''


def _alike(name: str, found: Source, target: Target) -> str:
    shape = target.shapes[name]
    alike = [other for other, array in found.arrays.items() if array.shape == shape]
    return f' (of its shape {shape}: {one_of(alike[:3])})' if alike else f' (none has its shape {shape})'


def _first_in_order(found: Source, target: Target) -> str:
    fits, layer, place = _parting(found, target)
    places = [other.prefix for other in _wanted(target)]
    ours, theirs = _arrays(layer, found, target), _arrays(place, found, target)
    number = len(places) + 1 if place is None else places.index(place.prefix) + 1
    begin = (f'{len(fits)} of {len(places)} layers fit; the first difference in order is ' if fits else '') + f'at place {number}: '
    if layer is not None and place is not None and set(ours) == set(theirs):
        leaf = next(leaf for leaf, name in place.leaves.items() if _fit(name, layer.leaves[leaf], found, target) is None)
        (source, shape), (name, wanted) = ours[leaf], theirs[leaf]
        if sorted(shape) == sorted(wanted):
            return begin + mismatch(name, source, shape, target)[:-1]
        ours, theirs = {leaf: ours[leaf]}, {leaf: theirs[leaf]}
    return (begin + (f"Gluon's {_words(ours)}, " if ours else 'Gluon has no more, ')
            + (f"PyTorch's {_words(theirs)}" if theirs else 'PyTorch has no more'))


def _first_by_shape(found: Source, target: Target) -> str:
    """Where an order is not known: the first layer without a counterpart, else the first with several."""
    _, layers, wanted = _named(_layers_of(found, target), _wanted(target), found, target)
    candidates = Candidates(layers, found, target)
    fits = [(place, candidates.of(place)) for place in wanted]
    used = {layer.prefix for fitting in candidates.known.values() for layer in fitting}
    lines = [f"PyTorch's {_words(_arrays(place, found, target))} fits none" for place, fitting in fits if not fitting]
    lines += [f"Gluon's {_words(_arrays(layer, found, target))} fits none" for layer in layers if layer.prefix not in used]
    lines += [f'{_name(place)} may be {" or ".join(map(_name, fitting[:2]))}{" or ..." if len(fitting) > 2 else ""}'
              for place, fitting in fits if len(fitting) > 1]
    only: Dict[str, List[str]] = {}
    for place, fitting in fits:
        for layer in fitting if len(fitting) == 1 else ():
            only.setdefault(_name(layer), []).append(_name(place))
    lines += [f'only {layer} fits {" and ".join(places[:2])}' for layer, places in only.items() if len(places) > 1]
    return f'{lines[0]}{_more(lines, "such layers")}'


def _arrays(layer: Optional[Layer], found: Source, target: Target) -> Dict[str, Tuple[str, Shape]]:
    """leaf -> name and shape, of a layer of either side."""
    if layer is None:
        return {}
    return {leaf: (part, target.shapes[part]) if isinstance(part, str) else (part.source, part.of(found.arrays[part.source]).shape)
            for leaf, part in layer.leaves.items()}


def _words(arrays: Mapping[str, Tuple[str, Shape]]) -> str:
    words = [f'{name!r} {tuple(shape)}' for name, shape in arrays.values()]
    return ' and '.join(words[:2]) + (f' and {len(words) - 2} more' if len(words) > 2 else '')


def _name(layer: Layer) -> str:
    return repr(layer.prefix or next(iter(layer.leaves)))


def rests_on_order(plan: Plan, found: Source, target: Target) -> List[str]:
    """A line for the report if layers of equal shapes could only be distinguished by their order."""
    arrays = {take.source: found.arrays[take.source] for take in plan.values()}
    conventional_plan = conventional(dataclasses.replace(found, arrays=arrays), target)
    moved = [name for name, take in plan.items() if name not in conventional_plan or conventional_plan[name].source != take.source]
    shapes = [target.shapes[name] for name in moved if name.rpartition('.')[2] == 'weight']
    alike = sum(shapes.count(shape) > 1 for shape in shapes)
    if not alike:
        return []
    return [f'{alike} layers have other names in {target.what} and the same shape as another: they were matched by the order in '
            'which the nets define them. Check that both nets give the same output for one input']


def check_layouts(plan: Plan, found: Source, target: Target) -> None:
    """If some convolutions are known to be channels last, those that could be either must not be guessed."""
    last = [name for name, take in plan.items() if take.transpose and take.transpose == channels_first(len(take.transpose))]
    if not last or found.facts.order:
        return
    asked = [name for name, take in plan.items() if not (take.transpose or take.rnn or take.view or take.shape)
             and len(target.shapes[name]) > 2 and _last_too(found.arrays[take.source].shape)]
    if asked:
        order = list(channels_first(len(target.shapes[asked[0]])))
        raise ValueError(f'{one_of(asked)} of {target.what} could be channels first or last: the shape is the same, and '
                         f'{last[0]!r} was channels last. Specify it in a map: "transpose": {order}, or "view" and its shape.')


def _last_too(shape: Shape) -> bool:
    return tuple(shape[k] for k in channels_first(len(shape))) == tuple(shape)
