"""One update of an optimizer as an ONNX model of standard operators."""
import json
import operator
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Tuple

import numpy
import onnx
from onnx import TensorProto, helper, numpy_helper

from .. import __version__, rules
from ..rules.base import initial_slot
from ..schema import Hyper
from .operators import Kind, Operators, Parameter, Step

__all__ = ['MANIFEST', 'TYPES', 'export_step', 'infos', 'initial_slots', 'model_of', 'nodes']

OPSET, IR_VERSION = 17, 8
MANIFEST = 'gluon_optim'  # the key of our JSON in a model's metadata
DTYPE = Hyper('dtype', 'float32', ('float16', 'float32', 'float64'), 'type of weights and gradients; float16 adds float32 masters')
TYPES = {'float16': TensorProto.FLOAT16, 'float32': TensorProto.FLOAT, 'float64': TensorProto.DOUBLE, 'int64': TensorProto.INT64}


def export_step(name: str, shapes: Mapping[str, Sequence[int]], dtype: str = 'float32', **hypers: Any) -> 'onnx.ModelProto':
    """One update of the optimizer ``name`` as an ONNX model of standard operators.

    Parameters
    ----------
    name : str
        As in `gluon_optim.list_optimizers`.
    shapes : dict
        Name -> shape of each parameter.
    dtype : str
        Type of weights and gradients: 'float32', 'float64', or 'float16', which adds float32 masters. Slots of float64 weights
        are float64, all others float32.
    **hypers
        The optimizer's hyper-parameters under MXNet's names, except for the learning rate, which is an input.

    Returns
    -------
    onnx.ModelProto
        Inputs: ``learning_rate`` (float64, shape ()), ``t`` (int64, shape ()), the number of this update, 1 at the first; for
        each parameter ``<name>``, ``<name>/grad``, ``<name>/<slot>``. Outputs: ``<name>/new`` and ``<name>/<slot>/new``. A
        float16 parameter has ``<name>/master`` in place of ``<name>``, and both outputs. `initial_slots` makes the first slots.

    Coefficients are computed in double precision and rounded once; sums over a tensor are accumulated in double.

    Raises
    ------
    ValueError, TypeError
        For an unknown name or argument, a value out of range, or shapes or names that a model cannot have.

    >>> export_step('adamw', {'w': (2,)}, beta1=1.0)
    Traceback (most recent call last):
      ...
    ValueError: `beta1` must be in [0, 1). Received: beta1=1.0. Pass a number in that range, or leave it out for the default 0.9.
    """
    rule = rules.get(name)
    h, dtype = rule.hyperparameters(**hypers), DTYPE.check(dtype)
    step = Step(rule, h, [Parameter(key, _shape(key, shape), dtype, dtype == 'float16') for key, shape in _items(shapes)])
    graph = helper.make_graph(nodes(step), rule.name, infos(step.inputs), infos(step.outputs))
    return model_of(graph, {'optimizer': rule.name, 'hypers': {k: v for k, v in h.asdict().items() if k != 'learning_rate'}})


def initial_slots(name: str, weights: Mapping[str, Any], **hypers: Any) -> Dict[str, numpy.ndarray]:
    """The slots (and masters of float16 ``weights``) that a step model of `export_step` takes at the first update.

    ``name`` and ``hypers`` are those of `export_step`, which raises the same errors.

    >>> initial_slots('asgd', {'w': numpy.ones(2, 'float32')})['w/mu']
    array(1., dtype=float32)
    """
    rule = rules.get(name)
    slots, arrays = rule.slots(rule.hyperparameters(**hypers)), {}
    for key, weight in weights.items():
        weight = numpy.asarray(weight)
        if weight.dtype == numpy.float16:
            weight = arrays[key + '/master'] = weight.astype('float32')
        arrays.update({f'{key}/{slot.name}': initial_slot(slot, weight) for slot in slots})
    return arrays


def model_of(graph: Any, manifest: Mapping[str, Any], algorithm: Any = None) -> 'onnx.ModelProto':
    """A model that imports what the nodes of ``graph`` or ``algorithm`` need."""
    domains = {node.domain for node in [*graph.node, *(algorithm.node if algorithm else ())]} - {''}
    opsets = [helper.make_opsetid('', OPSET), *(helper.make_opsetid(domain, 1) for domain in sorted(domains))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION,
                              producer_name='gluon_optim', producer_version=__version__)
    if manifest:
        helper.set_model_props(model, {MANIFEST: json.dumps(manifest)})
    return model


def _items(shapes: Any) -> Iterable[Tuple[str, Any]]:
    if not isinstance(shapes, Mapping) or not shapes:
        raise TypeError(f"`shapes` must be a dictionary of names to shapes, such as {{'weight': (3, 4)}}. Received: {shapes!r}.")
    return shapes.items()


def _shape(name: str, shape: Any) -> Tuple[int, ...]:
    try:
        checked = tuple(operator.index(size) for size in shape)
    except TypeError:
        checked = (-1,)
    if any(size < 0 for size in checked):
        raise ValueError(f'The shape of {name!r} must be integers, 0 or more. Received: {shape!r}. Pass `weight.shape`.')
    return checked


def nodes(step: Operators) -> List[Any]:
    return [helper.make_node(op, inputs, outputs, outputs[0], domain=domain,
                             **{key: _attribute(value) for key, value in attributes.items()})
            for op, inputs, outputs, attributes, domain in step.operators]


def _attribute(value: Any) -> Any:
    return numpy_helper.from_array(value) if isinstance(value, numpy.ndarray) else TYPES.get(value, value)


def infos(kinds: Mapping[str, Kind]) -> List[Any]:
    return [helper.make_tensor_value_info(name, TYPES[dtype], shape) for name, (dtype, shape) in kinds.items()]
