"""States of a Gluon run as an ONNX model that contains them and the update, and back; also as files."""
import dataclasses
import math
import os
import re
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type, Union

import numpy
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from .. import rules
from ..mapping import loss_scalers, scheduling
from ..mapping.classes import APPROXIMATE, EXACT, Foreign, own_class
from ..mapping.losses import LEAVE_OUT, what_is_lost, what_to_say
from ..mapping.selection import normalize, select
from ..mapping.state_dict import fresh_entry, to_state_dict, weight_of
from ..rules import Rule
from ..schema import Values, check_known, one_of
from ..states import atomic, json_text, protobuf, record
from ..states.errors import StateFileError, reading
from ..states.files import OpenFile, Path, open_once
from ..states.model import OptimizerStates, ParameterInfo, chunks
from ..states.protobuf import NUMBERS, WHOLE
from . import preview
from .operators import Parameter, Step
from .step import MANIFEST, TYPES, infos, model_of, nodes

__all__ = ['from_onnx', 'read', 'to_onnx', 'unpack', 'write']

LARGEST = 2 ** 31 - 2 ** 20  # bytes: Protocol Buffers are limited to 2 GiB
MAX_DIMENSIONS = 32  # NumPy 1 has no more
# what is read of a model, by numbers of fields: its producer_name and metadata_props, and the initializers of its graph and of
# training_info's algorithm, but for their raw_data (9), which stay in the file
TEXTS = {1: WHOLE, 2: WHOLE}
TENSOR = {1: NUMBERS, 2: WHOLE, 4: WHOLE, 5: NUMBERS, 7: NUMBERS, 8: WHOLE, 9: None, 10: WHOLE, 11: NUMBERS, 13: TEXTS, 14: WHOLE}
MODEL = {2: WHOLE, 14: TEXTS, 7: {5: TENSOR}, 20: {2: {5: TENSOR}}}
TARGETS: Dict[str, Type[Step]] = {'mirror': Step, 'preview': preview.PreviewStep}


def to_onnx(states: OptimizerStates, target: str = 'mirror', params: Optional[Iterable[str]] = None,
            weights: Optional[Mapping[str, Any]] = None, allow_lossy: bool = False) -> 'onnx.ModelProto':
    """The state of a Gluon run as an ONNX model that contains it together with the update, so that training can continue.

    Parameters
    ----------
    states : OptimizerStates
    target : str
        'mirror': the operators of `export_step`. 'preview': Adam, Momentum and Adagrad of ``ai.onnx.preview.training``, where
        they compute the same: for adam, sgd_torch with momentum, sgd_ema and adagrad_torch, without clip_gradient. Their
        coefficients are float32: a beta2 of 0.999 is lossy. ONNX Runtime does not run them, but ``onnx.reference`` does.
    params : list of str, optional
        Names of the parameters to convert; by default, all of them but frozen ones (``grad_req='null'``) without a state: the
        step model would want their gradients.
    weights : dict, optional
        Name -> weight. Not needed for parameters with masters.
    allow_lossy : bool
        Convert even if something is lost.

    Returns
    -------
    onnx.ModelProto
        ``graph`` has the weights as initializers. ``training_info[0].algorithm`` is the update, with the slots and ``t`` as
        initializers; ``update_binding`` says which output replaces which initializer. `unpack` turns it into an ordinary model.

    The rate is the input ``learning_rate``; lr_mult, wd_mult and counts of the parameters are part of the model. What was lost
    and what you need to do by hand is appended to ``states.report``.

    Raises
    ------
    ValueError
        If the states do not fit the rule or the weights, something would be lost, or the file would exceed 2 GiB.

    >>> import numpy, gluon_optim as go
    >>> from gluon_optim.states.model import ParameterInfo
    >>> info = ParameterInfo('weight', 'dense0_weight', (2,), 'float32')
    >>> slots = {'mean': numpy.array([0.6, 0.8], 'float32'), 'norm_sq': numpy.array(25, 'float32')}
    >>> states = go.OptimizerStates('novograd', {}, 1, [info], {'weight': 1}, {'weight': slots})
    >>> model = go.to_onnx(states, weights={'weight': numpy.ones(2, 'float32')})
    >>> [tensor.name for tensor in model.training_info[0].algorithm.initializer]
    ['weight/mean', 'weight/norm_sq', 't']
    """
    converted = _converted(states, target, params, weights, allow_lossy)
    model = converted.model
    for graph, arrays in ((model.graph, converted.weights), (model.training_info[0].algorithm, converted.arrays)):
        graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


def write(path: Path, states: OptimizerStates, target: str = 'mirror', params: Optional[Iterable[str]] = None,
          weights: Optional[Mapping[str, Any]] = None, allow_lossy: bool = False) -> None:
    """Write the model of `to_onnx` to a file, completely or not at all, without a second copy of its arrays in memory.

    Raises what `to_onnx` raises, and OSError if the file system refuses.

    The arguments besides ``path`` are those of `to_onnx`.

    >>> import numpy, gluon_optim as go
    >>> from gluon_optim.states.model import ParameterInfo
    >>> info = ParameterInfo('weight', 'dense0_weight', (2,), 'float32')
    >>> slots = {'mean': numpy.array([0.6, 0.8], 'float32'), 'norm_sq': numpy.array(25, 'float32')}
    >>> states = go.OptimizerStates('novograd', {}, 1, [info], {'weight': 1}, {'weight': slots})
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     go.onnx.write(folder + '/run.onnx', states, weights={'weight': numpy.ones(2, 'float32')})
    ...     go.onnx.read(folder + '/run.onnx')
    (<OptimizerStates: novograd at update 1, 1 parameters>, {'weight': array([1., 1.], dtype=float32)})
    """
    converted = _converted(states, target, params, weights, allow_lossy)
    with atomic.replacing(path) as file:
        for piece in _pieces(converted):
            file.write(piece)


def from_onnx(model: 'onnx.ModelProto') -> OptimizerStates:
    """The states in a model of `to_onnx`, including after updates were written back to its initializers.

    Raises
    ------
    ValueError
        If the model was not made by `to_onnx`, or parts of it are missing.

    >>> import numpy, gluon_optim as go
    >>> from gluon_optim.states.model import ParameterInfo
    >>> info = ParameterInfo('weight', 'dense0_weight', (2,), 'float32')
    >>> slots = {'mean': numpy.array([0.6, 0.8], 'float32'), 'norm_sq': numpy.array(25, 'float32')}
    >>> states = go.OptimizerStates('novograd', {}, 1, [info], {'weight': 1}, {'weight': slots})
    >>> model = go.to_onnx(states, weights={'weight': numpy.ones(2, 'float32')})
    >>> go.from_onnx(model).slots['weight']['mean']
    array([0.6, 0.8], dtype=float32)
    """
    return _states(model, {tensor.name: numpy_helper.to_array(tensor) for tensor in _tensors(model)})


def read(path: Union[Path, OpenFile]) -> Tuple[OptimizerStates, Dict[str, numpy.ndarray]]:
    """The states and weights in a file of `to_onnx` or `write`, without a second copy in memory.

    Raises StateFileError (a ValueError) for a damaged file or a different kind of file, OSError if it cannot be opened.

    ``path`` is the file.

    >>> import numpy, gluon_optim as go
    >>> from gluon_optim.states.model import ParameterInfo
    >>> info = ParameterInfo('weight', 'dense0_weight', (2,), 'float32')
    >>> slots = {'mean': numpy.array([0.6, 0.8], 'float32'), 'norm_sq': numpy.array(25, 'float32')}
    >>> states = go.OptimizerStates('novograd', {}, 1, [info], {'weight': 1}, {'weight': slots})
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     go.onnx.write(folder + '/run.onnx', states, weights={'weight': numpy.ones(2, 'float32')})
    ...     read_back, weights = go.onnx.read(folder + '/run.onnx')
    >>> read_back.counts, weights
    ({'weight': 1}, {'weight': array([1., 1.], dtype=float32)})
    """
    with open_once(path) as file, reading(file.path):
        try:
            places: List[Optional[protobuf.Place]] = []
            data = protobuf.skim(file.file, protobuf.Place(0, file.size), MODEL, places)
            model = onnx.ModelProto.FromString(data)
            tensors = _tensors(model)
            arrays = {tensor.name: _array(tensor, file, place) for tensor, place in zip(tensors, places)}
            weights = {tensor.name: arrays[tensor.name] for tensor in model.graph.initializer}
            return _states(model, arrays), weights
        except (DecodeError, ValueError, TypeError, KeyError) as error:
            raise StateFileError(f'Cannot read {file.path!r}: {error}') from None


def unpack(model: 'onnx.ModelProto') -> Tuple['onnx.ModelProto', Dict[str, numpy.ndarray]]:
    """The update in a model of `to_onnx` as an ordinary model, and the contents of the initializers.

    The model runs on ONNX Runtime, which does not train from training_info. Feed it the arrays, ``learning_rate`` and the
    gradients; then replace each array with its ``/new``:

        step, arrays = unpack(model)
        session = onnxruntime.InferenceSession(step.SerializeToString())
        new = session.run(None, {**arrays, **gradients, 'learning_rate': numpy.array(0.1)})
        arrays = {output.name[:-len('/new')]: array for output, array in zip(session.get_outputs(), new)}

    Raises ValueError for a model that `to_onnx` has not made.

    >>> import numpy, gluon_optim as go
    >>> from gluon_optim.states.model import ParameterInfo
    >>> info = ParameterInfo('weight', 'dense0_weight', (2,), 'float32')
    >>> slots = {'mean': numpy.array([0.6, 0.8], 'float32'), 'norm_sq': numpy.array(25, 'float32')}
    >>> states = go.OptimizerStates('novograd', {}, 1, [info], {'weight': 1}, {'weight': slots})
    >>> step, arrays = go.onnx.unpack(go.to_onnx(states, weights={'weight': numpy.ones(2, 'float32')}))
    >>> sorted(arrays)
    ['t', 'weight', 'weight/mean', 'weight/norm_sq']
    """
    if not model.training_info:
        raise ValueError('The model must have training_info. Received: a model without it. Pass a model made by `to_onnx`.')
    training, tensors = model.training_info[0], _tensors(model)
    types = {number: name for name, number in TYPES.items()}
    # including float16 weights, which nothing reads where there are masters: the outputs can be fed back unchanged
    inputs = infos({tensor.name: (types[tensor.data_type], tuple(tensor.dims)) for tensor in tensors})
    graph = helper.make_graph(training.algorithm.node, training.algorithm.name, [*training.algorithm.input, *inputs],
                              training.algorithm.output)
    return model_of(graph, {}), {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}


class Converted(NamedTuple):
    """A model and the arrays that belong in it: ``weights`` are initializers of its graph, ``arrays`` of the algorithm."""

    model: 'onnx.ModelProto'
    weights: Dict[str, numpy.ndarray]
    arrays: Dict[str, numpy.ndarray]


def _converted(states: OptimizerStates, target: str, params: Optional[Iterable[str]], weights: Optional[Mapping[str, Any]],
               allow_lossy: bool) -> Converted:
    """What `to_onnx` makes of ``states``, still sharing the states' arrays."""
    check_known('target', target, TARGETS, ValueError)
    states, rule, h = normalize(states, allow_lossy, target)
    chosen = select(states, params, frozen=False)
    foreign = _as_foreign(rule, h, target)
    lost = what_is_lost(foreign, rule, h, states, chosen)
    entries = to_state_dict(foreign, rule, h, states, chosen)['state']
    held = {info.name: _weight(info, entries.get(position, {}), weights) for position, info in enumerate(chosen)}
    last, parameters, arrays = max(states.counts.get(info.name, 0) for info in chosen), [], {}
    for position, info in enumerate(chosen):
        entry = entries.get(position) or fresh_entry(rule.slots(h), info, held[info.name])
        arrays.update({f'{info.name}/{key}': numpy.asarray(array) for key, array in entry.items() if key != 'step'})
        shape, offset = tuple(info.shape), states.counts.get(info.name, 0) - last
        parameters.append(Parameter(info.name, shape, info.dtype, 'master' in entry, info.lr_mult, info.wd_mult, offset))
    digits = preview.inexact(rule, h, parameters) if target == 'preview' else []
    lost = lost + digits
    if lost and not allow_lossy:
        raise ValueError(f"ONNX would lose {'; '.join(lost)}. Pass allow_lossy=True to convert anyway.")
    arrays['t'] = numpy.array(last + 1, 'int64')
    known = {name: weight for name, weight in held.items() if weight is not None}
    model = _training_model(TARGETS[target](rule, h.replace(rescale_grad=1.0), parameters), known, arrays,
                            record.record_of(states, chosen))
    states.report.extend(line for line in ['lost: ' + line for line in lost] + _say(foreign, h, states, chosen, digits)
                         if line not in states.report)
    return Converted(model, known, arrays)


def _training_model(step: Step, weights: Mapping[str, numpy.ndarray], arrays: Mapping[str, numpy.ndarray],
                    manifest: Mapping[str, Any]) -> 'onnx.ModelProto':
    """The model without its initializers. Anything in neither ``weights`` nor ``arrays`` is an input of the algorithm."""
    size = sum(array.nbytes for array in [*weights.values(), *arrays.values()])
    if size > LARGEST:
        raise ValueError(f'Weights and slots must be below 2 GiB, the limit of an ONNX file. Received: {size / 2 ** 30:.2f} GiB. '
                         'Convert them in parts: list the names to convert in `params`.')
    step.add('Add', ['t', step.constant(1, 'int64')], output='t/new')
    given = {name: kind for name, kind in step.inputs.items() if name not in weights and name not in arrays}
    algorithm = helper.make_graph(nodes(step), step.rule.name, infos(given), infos({**step.outputs, 't/new': step.inputs['t']}))
    shapes = {name: (weight.dtype.name, weight.shape) for name, weight in weights.items()}
    graph = helper.make_graph([], 'weights', [], infos(shapes))
    model = model_of(graph, manifest, algorithm)
    training = model.training_info.add()
    training.algorithm.CopyFrom(algorithm)
    for name in [*weights, *arrays]:
        training.update_binding.add(key=name, value=name + '/new')
    return model


def _pieces(converted: Converted) -> Iterator[Union[bytes, numpy.ndarray]]:
    """The file in pieces, each initializer unchanged; the parts of a message may come in any order."""
    rest, training = onnx.ModelProto(), onnx.TrainingInfoProto()
    rest.CopyFrom(converted.model)
    rest.ClearField('graph')
    rest.ClearField('training_info')
    training.update_binding.extend(converted.model.training_info[0].update_binding)
    bindings = training.SerializeToString()
    yield rest.SerializeToString()
    size, pieces = _graph_pieces(converted.model.graph, converted.weights)
    yield protobuf.header(7, size)
    yield from pieces
    size, pieces = _graph_pieces(converted.model.training_info[0].algorithm, converted.arrays)
    inner = protobuf.header(2, size)
    yield protobuf.header(20, len(inner) + size + len(bindings)) + inner
    yield from pieces
    yield bindings


def _graph_pieces(graph: 'onnx.GraphProto', arrays: Mapping[str, numpy.ndarray]) -> Tuple[int, Iterator[Any]]:
    """A graph with ``arrays`` as its initializers: the number of bytes, and the bytes."""
    start = graph.SerializeToString()
    heads = {}
    for name, array in arrays.items():
        tensor = TensorProto(name=name, dims=array.shape, data_type=TYPES[array.dtype.name]).SerializeToString()
        tensor += protobuf.header(9, array.nbytes)
        heads[name] = protobuf.header(5, len(tensor) + array.nbytes) + tensor

    def pieces() -> Iterator[Any]:
        yield start
        for name, array in arrays.items():
            yield heads[name]
            yield from chunks(array)
    return len(start) + sum(len(heads[name]) + array.nbytes for name, array in arrays.items()), pieces()


def _tensors(model: 'onnx.ModelProto') -> List[Any]:
    """All initializers, in file order."""
    return [*model.graph.initializer, *(tensor for info in model.training_info for tensor in info.algorithm.initializer)]


def _array(tensor: Any, file: OpenFile, place: Optional[protobuf.Place]) -> numpy.ndarray:
    """The array of the initializer in ``file``, whose its bytes at ``place``, or in a file beside it, or in fields of numbers."""
    if len(tensor.dims) > MAX_DIMENSIONS or min(tensor.dims, default=0) < 0:
        raise StateFileError(f'{tensor.name!r} must have up to {MAX_DIMENSIONS} dimensions. Received: {list(tensor.dims[:40])}.')
    if tensor.data_location == TensorProto.EXTERNAL:
        return _external(tensor, file)
    return numpy_helper.to_array(tensor) if place is None else _raw(tensor, file, place)


def _external(tensor: Any, file: OpenFile) -> numpy.ndarray:
    """The array of an initializer that `onnx.save` has put into another file, in the folder of this one."""
    given = {entry.key: entry.value for entry in tensor.external_data}
    name = given.get('location', '')
    if name != os.path.basename(name) or name in ('', '.', '..'):
        raise StateFileError(f'the bytes of {tensor.name!r} must be in the folder of the model. Received: {name!r}. Save the model '
                             'again, as one file.')
    with open_once(os.path.join(os.path.dirname(os.path.abspath(file.path)), name)) as other:
        begin = _bytes(given.get('offset', '0'))
        return _raw(tensor, other, protobuf.Place(begin, _bytes(given.get('length', str(max(other.size - begin, 0))))))


def _bytes(text: str) -> int:
    if not re.fullmatch(r'\d{1,18}', text, re.ASCII):
        raise StateFileError(f'the place of external data must be a whole number. Received: {text[:40]!r}.')
    return int(text)


def _raw(tensor: Any, file: OpenFile, place: protobuf.Place) -> numpy.ndarray:
    names = {number: name for name, number in TYPES.items()}
    if tensor.data_type not in names:
        raise StateFileError(f'{tensor.name!r} must be one of {one_of(TYPES)}. Received: type {tensor.data_type}.')
    dtype = numpy.dtype(names[tensor.data_type]).newbyteorder('<')
    if place.size != dtype.itemsize * math.prod(tensor.dims):
        raise StateFileError(f'{tensor.name!r} must have {math.prod(tensor.dims)} elements. Received: {place.size} bytes.')
    if place.begin + place.size > file.size:
        raise StateFileError(f'{tensor.name!r} must be complete. The file {file.path!r} is cut off: take another copy.')
    array = numpy.empty(tuple(tensor.dims), dtype)
    file.file.seek(place.begin)
    if file.file.readinto(array.reshape(-1).view('uint8')) != place.size:  # type: ignore[attr-defined]
        raise StateFileError(f'{tensor.name!r} must be complete. The file became shorter while it was read.')
    return array.astype(dtype.newbyteorder('='), copy=False)


def _states(model: 'onnx.ModelProto', arrays: Dict[str, numpy.ndarray]) -> OptimizerStates:
    manifest = {entry.key: entry.value for entry in model.metadata_props}.get(MANIFEST)
    if manifest is None or not model.training_info:
        raise StateFileError(f'The model must be made by `to_onnx`, with training_info and {MANIFEST!r} in its metadata. '
                             f'Received: producer {model.producer_name!r} and {len(model.training_info)} training_info. '
                             'Pass the right model.')
    known = json_text.loads(manifest.encode(), f'{MANIFEST!r} in its metadata')
    if 't' not in arrays:
        raise StateFileError("The model must have the initializer 't'. Received: a model without it. Convert again.")
    more = int(arrays['t']) - 1 - max(known['counts'].values())
    states = record.states_of(known, more)
    rule = rules.get(states.optimizer)
    record.take(states, known, rule.slots(rule.hyperparameters(**states.hypers)), arrays, more)
    states.producer['onnx'] = onnx.__version__
    return states


def _as_foreign(rule: Type[Rule], h: Values, target: str) -> Foreign:
    """How a step model stores ``rule``: everything, under our own names."""
    own = {slot.name: slot.name for slot in rule.slots(h)}
    path = 'the ONNX model'
    if target == 'preview':
        path += f' with {preview.check(rule, h).op} of {preview.DOMAIN}'
    return own_class(rule, h.asdict())._replace(path=path, slots=own, compensations=False)


def _weight(info: ParameterInfo, entry: Mapping[str, Any], weights: Optional[Mapping[str, Any]]) -> Optional[numpy.ndarray]:
    """The weight as an initializer: from the master if there is one, None if no weight is known."""
    if 'master' in entry:
        return numpy.asarray(entry['master']).astype(info.dtype)
    if weights is None:
        return None
    if info.name not in weights:
        raise ValueError(f'`weights` must hold all parameters to convert. Received: none for {info.name!r}, only {one_of(weights)}'
                         '. Add it, or list the others in `params`.')
    return weight_of(info, weights)


def _say(foreign: Foreign, h: Values, states: OptimizerStates, chosen: Sequence[ParameterInfo], digits: Sequence[str]) -> List[str]:
    """What the user must do by hand: lines for the report."""
    alike = [dataclasses.replace(info, lr_mult=1.0, wd_mult=1.0) for info in chosen]  # multipliers are in the model
    lines = what_to_say(foreign, h, dataclasses.replace(states, master={}), alike, LEAVE_OUT)
    if digits:
        lines[0] = lines[0].replace(f': {EXACT};', f': {APPROXIMATE};')
    fresh = [info.name for info in chosen if info.name not in states.slots and info.grad_req != 'null']
    if fresh and len(fresh) < len(chosen):
        lines.append(f'the gradients of {one_of(fresh)} are inputs too: use params= to leave out what is not trained, such as '
                     'running statistics')
    lines += loss_scalers.what_becomes_of_it(states.loss_scaler, to_pytorch=False)
    if states.scheduler:
        how = 'go.onnx.export_schedule(model) computes the `learning_rate` of the update from its `t`'
        return lines + scheduling.what_becomes_of_it(states, how, 'feed `learning_rate` at each step')
    return [*lines, f'feed `learning_rate` at each step, starting with update {states.num_update + 1}: {h.learning_rate!r}']
