"""Gluon parameters, and what files, symbols and Blocks say about their layers. MXNet is not imported."""
import json
import os
import re
import weakref
from dataclasses import dataclass, field, replace
from typing import Any, Collection, Dict, List, Mapping, Optional, Tuple, Union

import numpy

from ..states import container, mxnet_files
from ..states.errors import UnreadableFile
from ..states.files import OpenFile, Path, open_once
from ..states.model import OptimizerStates, Run, Weight
from .plan import Rnn

__all__ = ['Facts', 'Source', 'of_checkpoint', 'source_of', 'with_states']


@dataclass
class Facts:
    """What is known about layers besides their arrays, by names of parameters; from a symbol or a Block."""

    ones: List[str] = field(default_factory=list)            # gammas that are 1 regardless of their arrays: fix_gamma
    channels_last: List[str] = field(default_factory=list)   # weights of convolutions in NHWC and the like
    packed: Dict[str, Rnn] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)
    order: List[str] = field(default_factory=list)           # the order in which the net uses them


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
    states: Optional[OptimizerStates] = None


def source_of(source: Any) -> Source:
    """Parameters in a file, a Block or a dictionary."""
    if isinstance(source, Source):
        return source
    if isinstance(source, (str, os.PathLike, OpenFile)):
        return _of_file(source)
    if isinstance(source, Mapping):
        strange = [name for name in source if not isinstance(name, str)]
        if strange:
            raise TypeError(f'The names of parameters must be strings. Received: {strange[0]!r}, a {type(strange[0]).__name__}.')
        return _checked(Source('the dictionary', {name: _array(name, value) for name, value in source.items()}))
    if hasattr(source, 'collect_params'):
        return _checked(_of_block(source))
    raise TypeError('`source` must be the path of a .params file or of a checkpoint, a gluon.Block, or a dictionary of names to '
                    f'arrays. Received: {type(source).__name__}.')


def _of_file(path: Union[Path, OpenFile]) -> Source:
    with open_once(path) as file:
        if file.kind.is_ours:
            states, run = container.read_checkpoint(file)
            if run is None:
                raise ValueError(f'{file.path!r} holds only optimizer states, no weights. Pass the .params file of the net, or a '
                                 'file of save_checkpoint.')
            return of_checkpoint(repr(file.path), states, run)
        if not file.kind.holds_parameters:
            raise UnreadableFile(f'{file.path!r} must be a .params file of MXNet or a checkpoint of gluon_optim. Received: a '
                                 f'file of kind {file.kind.value!r}.')
        path, found = file.path, Source(repr(file.path), dict(mxnet_files.read_params(file)))
    symbol = re.sub(r'(-\d{4})?\.params$', '', path) + '-symbol.json'
    if os.path.isfile(symbol):
        facts = _of_symbol(symbol)
        if set(found.arrays) <= set(facts.order):  # else it belongs to another net, or the file has structural names
            found.facts = facts
            if list(found.arrays) == sorted(found.arrays):  # by MXNet 2; the order of 1.x is that of the net's definition
                found.arrays = {name: found.arrays[name] for name in facts.order if name in found.arrays}
    elif any(name.endswith('_gamma') for name in found.arrays):
        found.facts.notes.append(f'fix_gamma, epsilon and layout of layers are in their symbol, which is not at {symbol!r}: '
                                 "Gluon's defaults were assumed")
    return _checked(found)


def of_checkpoint(what: str, states: OptimizerStates, run: Run) -> Source:
    """What a checkpoint holds that has been read."""
    arrays = {weight.name: _mean(weight) for weight in run.weights}
    return with_states(_checked(Source(what, arrays, once=any('.' in name for name in arrays))), states)


def with_states(source: Source, states: OptimizerStates) -> Source:
    """``source`` with the states of its optimizer; float32 masters become the weights."""
    arrays = {name: states.master.get(name, array) for name, array in source.arrays.items()}
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
    collect = getattr(block, '_collect_params_with_prefix', None) or block.collect_params  # MXNet 1.x, 2.x
    arrays: Dict[str, numpy.ndarray] = {}
    first: Dict[int, str] = {}
    found = Source(f'the {type(block).__name__}', arrays)
    for name, parameter in collect().items():
        if getattr(parameter, '_stype', 'default') != 'default':
            raise ValueError(f'Parameters must be dense. Received: {name}, which is {parameter._stype}. Save the net with '
                             'save_parameters and convert the file.')
        if parameter._data is None:
            raise ValueError(f'Parameters must be initialized. Received: {name}, which is not. Call net.initialize() and run one '
                             'forward pass first: net(batch).')
        arrays[name] = _array(name, parameter._reduce())
        if first.setdefault(id(parameter), name) != name:
            found.shared[name] = first[id(parameter)]
    found.facts.order = list(arrays)
    _look(block, '', found)
    return found


def _look(block: Any, prefix: str, found: Source) -> None:
    """Add what the layers of ``block`` say about themselves."""
    options = getattr(block, '_kwargs', None) or {}
    for leaf in ('gamma', 'weight', 'rnn_param'):
        name = prefix + leaf
        if name not in found.arrays:
            continue
        if leaf == 'gamma' and options.get('fix_gamma'):
            found.facts.ones.append(name)
        if leaf == 'weight' and str(options.get('layout', '')).endswith('C') and found.arrays[name].ndim > 2:
            found.facts.channels_last.append(name)
        if leaf == 'rnn_param':
            found.facts.packed[name] = Rnn(block._mode, block._hidden_size, block._num_layers, block._dir == 2,
                                           block._projection_size or None)
    _say_constants(found.facts, prefix[:-1], options if prefix + 'gamma' in found.arrays else {})
    for key, child in getattr(block, '_children', {}).items():
        _look(child() if isinstance(child, weakref.ref) else child, f'{prefix}{key}.', found)


def _say_constants(facts: Facts, layer: str, options: Mapping[str, Any]) -> None:
    """Note a layer's epsilon and momentum if they are not PyTorch's defaults."""
    eps, momentum = float(options.get('eps') or options.get('epsilon') or 1e-5), float(options.get('momentum') or 0.9)
    words = [f'eps={eps:g}'] if eps != 1e-5 else []
    words += [f'momentum={1 - momentum:g}'] if momentum != 0.9 else []
    if words:
        facts.notes.append(f'give the layer of {layer!r} {", ".join(words)}')


# Symbols

EPSILONS = {'BatchNorm': 1e-3, 'InstanceNorm': 1e-3, 'LayerNorm': 1e-5, 'GroupNorm': 1e-5}  # by default


def _of_symbol(path: str) -> Facts:
    """What a symbol says about the parameters of its layers."""
    try:
        with open(path, encoding='utf-8') as file:
            nodes = json.load(file)['nodes']
        graph = [(node['op'], node['name'], dict(node.get('attrs') or node.get('attr') or node.get('param') or {}),
                  [nodes[entry[0]]['name'] for entry in node['inputs']]) for node in nodes]
        return _facts_of(graph)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UnreadableFile(f'Cannot read {path!r}, the symbol next to the parameters: {type(error).__name__}: {error}. Repair '
                             'it, or move it away: the parameters can be converted without it.') from error


def _facts_of(graph: List[Tuple[str, str, Dict[str, Any], List[str]]]) -> Facts:
    """From nodes: operator, name, options, names of inputs."""
    facts = Facts(order=[name for op, name, _, _ in graph if op == 'null'])
    for op, _, options, inputs in graph:
        if op in EPSILONS and len(inputs) > 1:
            if op == 'BatchNorm' and _true(options.get('fix_gamma', True)):
                facts.ones.append(inputs[1])
            _say_constants(facts, re.sub('[._]gamma$', '', inputs[1]), {'eps': EPSILONS[op], **options})
        elif op in ('Convolution', 'Deconvolution') and len(inputs) > 1 and str(options.get('layout', '')).endswith('C'):
            facts.channels_last.append(inputs[1])
        elif op in ('RNN', '_npx_rnn') and len(inputs) > 1 and inputs[1] in facts.order:
            projection = str(options.get('projection_size', 'None'))
            facts.packed[inputs[1]] = Rnn(
                options['mode'], int(options['state_size']), int(options['num_layers']), _true(options.get('bidirectional')),
                int(projection) if projection not in ('None', '') else None)
    return facts


def _true(value: Any) -> bool:
    return str(value) in ('True', 'true', '1')
