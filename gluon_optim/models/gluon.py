"""Gluon parameters, and what files, symbols and Blocks say about their layers. MXNet is not imported."""
import os
import re
import weakref
from dataclasses import dataclass, field, replace
from typing import Any, Collection, Dict, List, Mapping, Optional, Set, Tuple, Union

import numpy

from ..rules.compensated import COMPENSATION, exact_weight, is_compensated
from ..schema import some_of
from ..states import container, json_text, mxnet_files
from ..states.errors import UnreadableFile, reading
from ..states.files import OpenFile, Path, open_once
from ..states.model import OptimizerStates, Run, Weight
from ..states.reader import check_no_part
from .plan import Rnn

__all__ = ['Facts', 'Source', 'facts_of', 'facts_of_symbol', 'of_checkpoint', 'source_of', 'with_states']


@dataclass
class Facts:
    """What is known about layers besides their arrays, by names of parameters; from a symbol, a Block or a checkpoint."""

    ones: Set[str] = field(default_factory=set)              # gammas that are 1 regardless of their arrays: fix_gamma
    epsilon: Dict[str, float] = field(default_factory=dict)  # of the layer of a gamma
    momentum: Dict[str, float] = field(default_factory=dict)  # likewise, MXNet's: PyTorch's is 1 - momentum
    channels_last: Set[str] = field(default_factory=set)     # weights of convolutions in NHWC and the like
    packed: Dict[str, Rnn] = field(default_factory=dict)
    shared: Dict[str, str] = field(default_factory=dict)     # name -> another name of the same parameter
    unknown: List[str] = field(default_factory=list)         # gammas of which nothing is known
    frozen: List[str] = field(default_factory=list)          # parameters that get no gradient
    order: List[str] = field(default_factory=list)           # the order in which the net uses them; empty where there was no net

    def record(self) -> Dict[str, Any]:
        """As a checkpoint has them (docs/FORMAT.md), under the first name of each parameter."""
        def first(name: str) -> str:
            return self.shared.get(name, name)

        return {'fix_gamma': sorted(set(map(first, self.ones))),
                'epsilon': {first(name): value for name, value in self.epsilon.items()},
                'momentum': {first(name): value for name, value in self.momentum.items()},
                'channels_last': sorted(set(map(first, self.channels_last))),
                'packed': {first(name): rnn._asdict() for name, rnn in self.packed.items()},
                'shared': dict(self.shared), 'unknown': list(dict.fromkeys(map(first, self.unknown)))}

    @classmethod
    def of_record(cls, record: Mapping[str, Any], order: Collection[str]) -> 'Facts':
        """The inverse of `record`, for a net whose parameters are used in that ``order``."""
        return cls(set(record['fix_gamma']), dict(record['epsilon']), dict(record['momentum']), set(record['channels_last']),
                   {name: Rnn(**rnn) for name, rnn in record['packed'].items()}, dict(record['shared']), list(record['unknown']),
                   order=list(order))

    def notes(self) -> List[str]:
        """What is to be set in the layers of another framework, and what is not known, for the report."""
        lines = []
        for name in dict.fromkeys([*self.epsilon, *self.momentum]):
            eps, momentum = self.epsilon.get(name, 1e-5), self.momentum.get(name, 0.9)
            words = [f'eps={eps:g}'] if eps != 1e-5 else []
            words += [f'momentum={1 - momentum:g}'] if momentum != 0.9 else []
            if words:
                lines.append(f'give the layer of {re.sub("[._]?gamma$", "", name)!r} {", ".join(words)}')
        if self.unknown:
            lines.append(f'unknown, and taken as Gluon has them by default: fix_gamma, epsilon and layout of the layers of '
                         f'{some_of(self.unknown)}')
        return lines


@dataclass
class Source:
    """Parameters of Gluon."""

    what: str                                                # for messages
    arrays: Dict[str, numpy.ndarray]
    ordered: bool = True                                     # whether their order is that of the layers
    shared: Dict[str, str] = field(default_factory=dict)     # name -> another name of the same parameter
    alike: Dict[str, str] = field(default_factory=dict)      # name -> another name with the same values: perhaps the same parameter
    once: bool = False                                       # whether a shared parameter occurs only under its first name
    facts: Facts = field(default_factory=Facts)
    notes: List[str] = field(default_factory=list)           # for the report
    states: Optional[OptimizerStates] = None
    dotted: Optional[bool] = None                            # whether the names are structural; also of what a map leaves

    def __post_init__(self) -> None:
        if self.dotted is None:
            self.dotted = any('.' in name for name in self.arrays)


def source_of(source: Any, part: Optional[str] = None) -> Source:
    """Parameters in a file, or in that part of a checkpoint, a Block or a dictionary."""
    if isinstance(source, Source):
        return source
    if isinstance(source, (str, os.PathLike, OpenFile)):
        return _of_file(source, part)
    if part is not None:
        raise ValueError(f'`part` chooses one of several nets in a checkpoint. Received: part={part!r} for a '
                         f'{type(source).__name__}. Leave `part` out.')
    if isinstance(source, Mapping):
        strange = [name for name in source if not isinstance(name, str)]
        if strange:
            raise TypeError(f'The names of parameters must be strings. Received: {strange[0]!r}, a {type(strange[0]).__name__}.')
        return _checked(Source('the dictionary', {name: _array(name, value) for name, value in source.items()}))
    if hasattr(source, 'collect_params'):
        return _checked(_of_block(source))
    raise TypeError('`source` must be the path of a .params file or of a checkpoint, a gluon.Block, or a dictionary of names to '
                    f'arrays. Received: {type(source).__name__}.')


def _of_file(path: Union[Path, OpenFile], part: Optional[str]) -> Source:
    with open_once(path) as file, reading(file.path):
        if file.kind.is_ours:
            states, run = container.read_checkpoint(file, part)
            if run is None:
                raise ValueError(f'{file.path!r} holds only optimizer states, no weights. Pass the .params file of the net, or a '
                                 'file of save_checkpoint.')
            return of_checkpoint(repr(file.path), states, run)
        check_no_part(file, part)
        if not file.kind.holds_parameters:
            raise UnreadableFile(f'{file.path!r} must be a .params file of MXNet or a checkpoint of gluon_optim. Received: a '
                                 f'file of kind {file.kind.value!r}.')
        path, found = file.path, Source(repr(file.path), dict(mxnet_files.read_params(file)))
    symbol = re.sub(r'(-\d{4})?\.params$', '', path) + '-symbol.json'
    if os.path.lexists(symbol):
        facts = _of_symbol(symbol)
        if set(found.arrays) <= set(facts.order):  # else it belongs to another net, or the file has structural names
            found.facts = facts
            if list(found.arrays) == sorted(found.arrays):  # by MXNet 2; the order of 1.x is that of the net's definition
                found.arrays = {name: found.arrays[name] for name in facts.order if name in found.arrays}
    elif any(name.endswith('_gamma') for name in found.arrays):
        found.notes.append(f'fix_gamma, epsilon and layout of layers are in their symbol, which is not at {symbol!r}')
    return _checked(found)


def of_checkpoint(what: str, states: OptimizerStates, run: Run) -> Source:
    """What a checkpoint holds that has been read."""
    arrays = {weight.name: _mean(weight) for weight in run.weights}
    found = Source(what, arrays)
    found.once = bool(found.dotted)
    if states.facts is not None:
        found.facts = Facts.of_record(states.facts, list(arrays))
        found.shared = {name: first for name, first in found.facts.shared.items() if first in arrays and name not in arrays}
        arrays.update((name, arrays[first]) for name, first in found.shared.items())
        found.once = False  # what is shared is known
    found.facts.frozen = [weight.name for weight in run.weights if weight.grad_req == 'null']
    devices = max((len(weight.copies) for weight in run.weights if weight.name.endswith(('running_var', 'moving_var'))), default=1)
    if devices > 1:
        found.notes.append(f'batch norm: running statistics are the mean of those of {devices} devices, each of which normalized '
                           'its own part of a batch; for the same losses, pass the parts through the module one after the other')
    return with_states(_checked(found), states)


def with_states(source: Source, states: OptimizerStates) -> Source:
    """``source`` with the states of its optimizer, under its names; float32 masters become the weights, and compensations are
    added to them."""
    states = states.renamed({first: name for name, first in (states.facts or {}).get('shared', {}).items()
                             if name in source.arrays and first not in source.arrays})
    if states.facts is not None and not source.facts.order:
        source = replace(source, facts=Facts.of_record(states.facts, list(source.arrays)))
    frozen = {info.name for info in states.parameters if info.grad_req == 'null' and info.name in source.arrays}
    source.facts.frozen = list(dict.fromkeys([*source.facts.frozen, *(name for name in source.arrays if name in frozen)]))
    arrays = {name: states.master.get(name, array) for name, array in source.arrays.items()}
    for name in [name for name in arrays if is_compensated(states.slots.get(name, {}))]:
        array, compensation = source.arrays[name], states.slots[name][COMPENSATION.name]
        if (array.shape, array.dtype) != (compensation.shape, compensation.dtype):
            raise ValueError(f'The weight {name!r} must have the type and shape of its compensation, {compensation.dtype}'
                             f'{list(compensation.shape)}. Received: {array.dtype}{list(array.shape)}. Pass those of the run.')
        arrays[name] = exact_weight(array, states.slots[name])
    wrong = [name for name, array in arrays.items() if array.shape != source.arrays[name].shape]
    if wrong:
        name, shape = wrong[0], source.arrays[wrong[0]].shape
        raise ValueError(f'The master of {name!r} must have the shape of the weight, {shape}. Received: {arrays[name].shape}. '
                         'Do the states belong to another net?')
    return replace(source, arrays=arrays, states=states)


def _mean(weight: Weight) -> numpy.ndarray:
    """Of running statistics that differ between devices, as MXNet saves them."""
    first = weight.copies[0]
    return first if len(weight.copies) == 1 else numpy.mean(weight.copies, axis=0).astype(first.dtype)


LEAVES = ('weight', 'gamma', 'bias', 'beta')  # as layers define them


def _checked(source: Source) -> Source:
    """``source`` with what follows from names and arrays: whether they are in order, and which may occur twice."""
    if not source.arrays:
        raise ValueError(f'Nothing to convert: there are no parameters in {source.what}.')
    names = list(source.arrays)
    if not source.facts.order and len(names) > 1 and names == sorted(names):
        # MXNet 2 sorts names when it saves; the numbers in a Sequential still give its order
        source.ordered = _numbered(names)
        source.arrays = {name: source.arrays[name] for name in sorted(names, key=_natural)}
    if not source.facts.order:  # no net and no symbol
        source.facts.unknown = [name for name in source.arrays if re.fullmatch('(.*[._])?gamma', name)]
    seen: Dict[Any, str] = {}
    for name, array in source.arrays.items():
        if name in source.shared or not array.size or (array == array.flat[0]).all():
            continue  # two zero arrays need not be the same parameter
        key = array.shape, array.dtype.str, array.reshape(-1)[:8].tobytes()
        first = seen.setdefault(key, name)
        if first != name and numpy.array_equal(array, source.arrays[first]):
            source.alike[name] = first  # perhaps by chance: both biases of an LSTM always have the same gradient
    return source


def _natural(name: str) -> List[Any]:
    """Sorts 2 before 10, and the weight of a layer before its bias."""
    place, _, leaf = name.rpartition('.')
    parts = [(0, int(part), '') if part.isdigit() else (1, 0, part) for part in re.split(r'[._]', place)]
    return [parts, LEAVES.index(leaf) if leaf in LEAVES else len(LEAVES), leaf]


def _numbered(names: Collection[str]) -> bool:
    """Whether all layers of one parent have numbers for names, so that sorting them gives their order."""
    children: Dict[str, List[str]] = {}
    if not any('.' in name for name in names):  # full names: `dense10_weight` comes before `dense2_weight`
        return not any('_' in name for name in names)
    for name in names:
        parts = name.split('.')[:-1]
        for k, part in enumerate(parts):
            children.setdefault('.'.join(parts[:k]), []).append(part)
    return all(len(set(parts)) == 1 or all(part.isdigit() for part in parts) for parts in children.values())


def _array(name: str, value: Any) -> numpy.ndarray:
    """A NumPy array from what may be an MXNet array; bfloat16 becomes float32."""
    array = value.asnumpy() if hasattr(value, 'asnumpy') else numpy.asarray(value)
    if array.dtype.names or array.dtype.name == 'bfloat16':  # MXNet's, or that of ml_dtypes
        return (array.view('<u2').astype('<u4') << 16).view('<f4')
    if array.dtype.kind not in 'fiub':
        raise TypeError(f'Parameters must be arrays of numbers. Received: {name!r} of type {array.dtype}.')
    return array


def _of_block(block: Any) -> Source:
    arrays: Dict[str, numpy.ndarray] = {}
    for name, parameter in _parameters(block).items():
        if getattr(parameter, '_stype', 'default') != 'default':
            raise ValueError(f'Parameters must be dense. Received: {name}, which is {parameter._stype}. Save the net with '
                             'save_parameters and convert the file.')
        if parameter._data is None:
            raise ValueError(f'Parameters must be initialized. Received: {name}, which is not. Call net.initialize() and run one '
                             'forward pass first: net(batch).')
        arrays[name] = _array(name, parameter._reduce())
    facts = facts_of(block)
    return Source(f'the {type(block).__name__}', arrays, shared=dict(facts.shared), facts=facts)


def _parameters(block: Any) -> Dict[str, Any]:
    """The parameters under the names of their places; a shared one has several."""
    collect = getattr(block, '_collect_params_with_prefix', None) or block.collect_params  # MXNet 1.x, 2.x
    return dict(collect())


def facts_of(block: Any) -> Facts:
    """What the layers of a Block know about themselves."""
    parameters = _parameters(block)
    facts = Facts(order=list(parameters))
    first: Dict[int, str] = {}
    for name, parameter in parameters.items():
        if first.setdefault(id(parameter), name) != name:
            facts.shared[name] = first[id(parameter)]
        if parameter.grad_req == 'null':
            facts.frozen.append(name)
    _look(block, '', facts, parameters)
    return facts


def facts_of_symbol(symbol: Any) -> Facts:
    """What an `mx.sym.Symbol` tells about the parameters of its layers."""
    return _read_graph(json_text.loads(symbol.tojson().encode(), 'the symbol'))


def _look(block: Any, prefix: str, facts: Facts, parameters: Mapping[str, Any]) -> None:
    """Add what the layers of ``block`` say about themselves."""
    if any(cls.__name__ == 'SymbolBlock' for cls in type(block).__mro__):
        _look_at_symbol(block, prefix, facts)
        return
    options = getattr(block, '_kwargs', None) or {}
    for leaf in getattr(block, '_reg_params', {}):
        name = prefix + leaf
        if re.fullmatch('(.*_)?gamma', leaf):
            eps = options.get('eps', options.get('epsilon', getattr(block, '_epsilon', None)))
            if leaf != 'gamma' or not isinstance(eps, (int, float)):
                facts.unknown.append(name)
                continue
            facts.epsilon[name] = float(eps)
            if isinstance(options.get('momentum'), (int, float)):
                facts.momentum[name] = float(options['momentum'])
            if options.get('fix_gamma'):
                facts.ones.add(name)
        if leaf == 'weight' and str(options.get('layout', '')).endswith('C') and len(parameters[name].shape or ()) > 2:
            facts.channels_last.add(name)
        if leaf == 'rnn_param':
            facts.packed[name] = Rnn(block._mode, block._hidden_size, block._num_layers, block._dir == 2,
                                     block._projection_size or None)
    for key, child in getattr(block, '_children', {}).items():
        _look(child() if isinstance(child, weakref.ref) else child, f'{prefix}{key}.', facts, parameters)


def _look_at_symbol(block: Any, prefix: str, facts: Facts) -> None:
    """Add what the symbol of a ``SymbolBlock`` tells; there parameters have their full names."""
    places = {name: prefix + leaf for leaf, parameter in block._reg_params.items() for name in (leaf, parameter.name)}
    found = facts_of_symbol(block._cached_graph[1])
    facts.ones.update(places[name] for name in found.ones if name in places)
    facts.channels_last.update(places[name] for name in found.channels_last if name in places)
    facts.epsilon.update((places[name], value) for name, value in found.epsilon.items() if name in places)
    facts.momentum.update((places[name], value) for name, value in found.momentum.items() if name in places)
    facts.packed.update((places[name], rnn) for name, rnn in found.packed.items() if name in places)


# Symbols

EPSILONS = {'BatchNorm': 1e-3, 'InstanceNorm': 1e-3, 'LayerNorm': 1e-5, 'GroupNorm': 1e-5}  # by default


def _of_symbol(path: str) -> Facts:
    """What a symbol says about the parameters of its layers."""
    remedy = 'It is the symbol beside the parameters. Repair it, or move it away: the parameters can be converted without it.'
    try:
        return _read_graph(json_text.read(path, 'the symbol'))
    except UnreadableFile as error:
        raise UnreadableFile(f'{error} {remedy}') from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UnreadableFile(f'Cannot read {path!r}: {type(error).__name__}: {error}. {remedy}') from error


def _read_graph(symbol: Any) -> Facts:
    """What a symbol tells, as its JSON has it."""
    nodes = symbol['nodes']
    return _facts_of([(node['op'], node['name'], dict(node.get('attrs') or node.get('attr') or node.get('param') or {}),
                       [nodes[entry[0]]['name'] for entry in node['inputs']]) for node in nodes])


def _facts_of(graph: List[Tuple[str, str, Dict[str, Any], List[str]]]) -> Facts:
    """From nodes: operator, name, options, names of inputs."""
    facts = Facts(order=[name for op, name, _, _ in graph if op == 'null'])
    variables = set(facts.order)
    for op, _, options, inputs in graph:
        if op in EPSILONS and len(inputs) > 1:
            facts.epsilon[inputs[1]] = float(options.get('eps', EPSILONS[op]))
            if op == 'BatchNorm':
                facts.momentum[inputs[1]] = float(options.get('momentum', 0.9))
                if _true(options.get('fix_gamma', True)):
                    facts.ones.add(inputs[1])
        elif op in ('Convolution', 'Deconvolution') and len(inputs) > 1 and str(options.get('layout', '')).endswith('C'):
            facts.channels_last.add(inputs[1])
        elif op in ('RNN', '_npx_rnn') and len(inputs) > 1 and inputs[1] in variables:
            projection = str(options.get('projection_size', 'None'))
            facts.packed[inputs[1]] = Rnn(
                options['mode'], _whole(options['state_size']), _whole(options['num_layers']), _true(options.get('bidirectional')),
                _whole(projection) if projection not in ('None', '') else None)
    return facts


def _true(value: Any) -> bool:
    return str(value) in ('True', 'true', '1')


def _whole(text: Any) -> int:
    if not 0 < len(str(text)) <= 16:  # converting a million digits takes seconds
        raise ValueError(f'the sizes of a layer must be whole numbers. Received: {str(text)[:40]!r}')
    return int(text)
