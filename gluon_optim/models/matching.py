"""Match Gluon's arrays with those of a PyTorch module: by name, in order, by shape."""
import dataclasses
import itertools
import math
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import numpy

from ..schema import one_of
from .gluon import Source
from .names import SUGGEST, conventional, rnn_like, split
from .plan import Plan, Shape, Take, channels_first, unpacked
from .pytorch import COUNTER, Target

__all__ = ['MOST', 'check_layouts', 'matched', 'mismatch', 'one_for_tied', 'rests_on_order', 'settled', 'wanted_names', 'with_tied']


def matched(found: Source, target: Target) -> Tuple[Plan, Source]:
    """Match by name if all names agree, else in order or by shapes that occur once. Shared parameters may occur once or twice.

    Also returns the source, with what is shared filled in, including parameters tied in ``target``.
    """
    tries = _tries(found, target)
    for match in (_by_name, _by_layers):
        for source, wanted in tries:
            plan = match(source, wanted)
            if plan is not None:
                return one_for_tied(plan, found, target)
        ties = list(itertools.islice(_ties(found, target), MOST + 1))  # so many would leave a choice anyway
        guesses = [plan for wanted in ties if len(ties) <= MOST for plan in [match(found, wanted)] if plan is not None]
        if len(guesses) == 1:
            return one_for_tied(guesses[0], found, target)
    raise ValueError(_why_not(*tries[1]))


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
    dotted = any('.' in name for name in found.arrays)
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

SHOWN = 8  # differences that an error lists


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
    if set(layer.leaves) != set(wanted.leaves):
        return None
    fits = {name: _fit(name, layer.leaves[leaf], found, target) for leaf, name in wanted.leaves.items()}
    return None if None in fits.values() else {name: take for name, take in fits.items() if take is not None}


def _pairs(layers: List[Layer], wanted: List[Layer], found: Source, target: Target) -> Optional[List[Plan]]:
    """The layer for each wanted one: by name, by position, or the only possible one; None if that leaves a choice."""
    if len(layers) != len(wanted):
        return None
    named = _named(layers, wanted, found, target)
    layers = [layer for layer in layers if layer.prefix not in named]
    wanted = [place for place in wanted if place.prefix not in named]
    if found.ordered and target.ordered:
        fits = [_fit_layer(layer, place, found, target) for layer, place in zip(layers, wanted)]
        if None not in fits:
            return [*named.values(), *(fit for fit in fits if fit is not None)]
    chosen: Dict[str, Plan] = {}
    similar = _by_sizes(layers, found, target)
    for place in wanted:
        fitting = _fitting(place, similar, found, target)
        if fitting is None or len(fitting) != 1 or fitting[0][0].prefix in chosen:
            return None
        chosen[fitting[0][0].prefix] = fitting[0][1]
    return [*named.values(), *chosen.values()]


MOST = 100  # layers of the same sizes that are tried for one place: a net can have thousands

Sizes = Tuple[Tuple[str, Any], ...]  # of a layer: what it has in common with every place that it can become


def _by_sizes(layers: List[Layer], found: Source, target: Target) -> Dict[Sizes, List[Layer]]:
    similar: Dict[Sizes, List[Layer]] = {}
    for layer in layers:
        if list(layer.leaves) == ['*']:
            sizes: Sizes = (('*', found.arrays[layer.leaves['*'].source].size),)
        else:
            sizes = _sizes({leaf: take.of(found.arrays[take.source]).shape for leaf, take in layer.leaves.items()}, target)
        similar.setdefault(sizes, []).append(layer)
    return similar


def _sizes(shapes: Mapping[str, Shape], target: Target) -> Sizes:
    """Axes may be moved, and a group norm has fewer elements than its place."""
    return tuple(sorted((leaf, 'any' if len(shape) == 1 and target.groups else tuple(sorted(shape) if len(shape) > 2 else shape))
                        for leaf, shape in shapes.items()))


def _fitting(place: Layer, similar: Mapping[Sizes, List[Layer]], found: Source, target: Target
             ) -> Optional[List[Tuple[Layer, Plan]]]:
    """The first few layers that can become the wanted ``place``, and how; None if too many would have to be tried."""
    shapes = {leaf: target.shapes[name] for leaf, name in place.leaves.items()}
    packed = (('*', sum(math.prod(shape) for shape in shapes.values())),)
    fitting: List[Tuple[Layer, Plan]] = []
    tried = 0
    for layer in [*similar.get(_sizes(shapes, target), ())[:MOST + 1], *similar.get(packed, ())[:MOST + 1]]:
        tried += 1
        fit = _fit_layer(layer, place, found, target) if tried <= MOST else None
        if fit is not None:
            fitting.append((layer, fit))
            if len(fitting) > 4:
                break
    return fitting if tried <= MOST or len(fitting) > 1 else None


def _named(layers: List[Layer], wanted: List[Layer], found: Source, target: Target) -> Dict[str, Plan]:
    """Match layers by name and shapes. Numbers do not identify a layer; other nets count differently."""
    by_name = {layer.prefix: layer for layer in layers}
    fits = {place.prefix: _fit_layer(by_name[place.prefix], place, found, target) for place in wanted
            if place.prefix in by_name and not any(letter.isdigit() for letter in place.prefix)}
    return {prefix: fit for prefix, fit in fits.items() if fit is not None}


def settled(found: Source, target: Target) -> Plan:
    """What convention alone determines about a net that cannot be matched as a whole."""
    plan: Plan = {}
    for source, wanted in _tries(found, target)[:3 if target.tied else 2]:
        for fit in _named(_layers_of(source, wanted), _wanted(wanted), source, wanted).values():
            plan.update({name: take for name, take in with_tied(fit, wanted).items() if name not in plan})
    return plan


def _why_not(found: Source, target: Target) -> str:
    """The layers that prevent a match, and what could be meant."""
    plan, wanted = conventional(found, target), wanted_names(target)
    known = set(wanted)
    missing, extra = [name for name in wanted if name not in plan], [name for name in plan if name not in known]
    lines = []
    if 2 * len(missing) <= len(wanted):  # most names agree: the others are the problem
        lines += [f'{name!r} has no parameter in {found.what}' + (_candidates(name, found, target) if k < SHOWN else '')
                  for k, name in enumerate(missing)]
        lines += [f'{plan[name].source!r} is left over' for name in extra]
    else:
        lines += _unlike(_layers_of(found, target), _wanted(target), found, target)
    more = f'; and {len(lines) - SHOWN} more' if len(lines) > SHOWN else ''
    return (f'The parameters of {found.what} must be those of {target.what}, by name, by order or by shape. Received: '
            f'{"; ".join(lines[:SHOWN])}{more}. {SUGGEST}.')


def _candidates(name: str, found: Source, target: Target) -> str:
    shape = target.shapes[name]
    alike = [other for other, array in found.arrays.items() if array.shape == shape]
    return f' (of its shape {shape}: {one_of(alike[:6])})' if alike else f' (none has its shape {shape})'


def _unlike(layers: List[Layer], wanted: List[Layer], found: Source, target: Target) -> List[str]:
    """Where the layers of two nets diverge: in their order, then those without a counterpart, then those with several."""
    lines, several = [], []
    similar = _by_sizes(layers, found, target)
    fits = [_fitting(place, similar, found, target) for place in wanted]
    parting = [k for k, (place, layer) in enumerate(zip(wanted, layers)) if _fit_layer(layer, place, found, target) is None]
    if parting and found.ordered and target.ordered:
        place, layer = wanted[parting[0]], layers[parting[0]]
        theirs = {leaf: target.shapes[name] for leaf, name in place.leaves.items()}
        ours = {leaf: take.of(found.arrays[take.source]).shape for leaf, take in layer.leaves.items()}
        lines.append(f'in order, {_name(place)} with {_words(theirs)} is where Gluon has {_name(layer)} with {_words(ours)}')
    sizes = {_sizes({leaf: target.shapes[name] for leaf, name in place.leaves.items()}, target) for place, fit in zip(wanted, fits)
             if fit is None or fit}
    usable = {layer.prefix for fit in fits for layer, _ in fit or ()}
    alone = [layer for key, layers in similar.items() for layer in layers if layer.prefix not in usable and key not in sizes]
    for place, fit in zip(wanted, fits):
        candidates = [_name(layer) for layer, _ in fit or ()]
        if fit is None or len(candidates) > 1:
            several.append(f'{_name(place)} may be {" or ".join(candidates[:4])}' + (' or ...' if len(candidates) > 4 else ''))
        elif not candidates:
            lines.append(f'{_name(place)} fits none' + (_nearest(place, alone, found, target) if len(lines) < SHOWN else ''))
    lines += [f'{_name(layer)} in Gluon fits none' for layer in alone]
    return lines + several


def _name(layer: Layer) -> str:
    return repr(layer.prefix or next(iter(layer.leaves)))


def _words(shapes: Mapping[str, Shape]) -> str:
    return ', '.join(f'{leaf} {tuple(shape)}' for leaf, shape in shapes.items())


def _nearest(place: Layer, layers: List[Layer], found: Source, target: Target) -> str:
    """What is wrong with layers that would fit except for a transposed shape."""
    for layer in layers:
        if set(layer.leaves) == set(place.leaves):
            for leaf, name in place.leaves.items():
                shape = layer.leaves[leaf].of(found.arrays[layer.leaves[leaf].source]).shape
                if shape != target.shapes[name] and sorted(shape) == sorted(target.shapes[name]):
                    return f' ({mismatch(name, layer.leaves[leaf].source, shape, target)[:-1]})'
    return ''


def rests_on_order(plan: Plan, found: Source, target: Target) -> List[str]:
    """A line for the report if layers of equal shapes could only be distinguished by their order."""
    conventional_plan = conventional(found, target)
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
    asked = [name for name, take in plan.items() if not (take.transpose or take.rnn or take.view)
             and len(target.shapes[name]) > 2 and _last_too(found.arrays[take.source].shape)]
    if asked:
        order = list(channels_first(len(target.shapes[asked[0]])))
        raise ValueError(f'{one_of(asked)} of {target.what} could be channels first or last: the shape is the same, and '
                         f'{last[0]!r} was channels last. Specify it in a map: "transpose": {order}, or "view" and its shape.')


def _last_too(shape: Shape) -> bool:
    return tuple(shape[k] for k in channels_first(len(shape))) == tuple(shape)
