"""The learning rate as an ONNX model."""
from typing import Any, Sequence, Union

import numpy
import onnx
from onnx import helper

from ..mapping.scheduling import carried, function_of_time
from ..rules.graph import Node
from .operators import Coefficients, Operators, Scope
from .states import from_onnx
from .step import TYPES, model_of, nodes

__all__ = ['export_schedule']


class Rate(Node):
    """A value that depends on the number of the update."""

    __slots__ = ()

    def __pow__(self, other: Any) -> Node: return self.graph.apply('pow', self, other)
    def __rpow__(self, other: Any) -> Node: return self.graph.apply('pow', other, self)


class Rates(Coefficients):
    """The namespace in which `Schedule.rate` is traced."""

    kind = Rate

    def apply(self, op: str, *operands: Any) -> Any:
        if any(isinstance(x, Node) for x in operands):
            return super().apply(op, *operands)
        return float(getattr(numpy, op)(*operands))

    def floor(self, x: Any) -> Any: return self.apply('floor', x)
    def cos(self, x: Any) -> Any: return self.apply('cos', x)


def export_schedule(schedule: Any, shape: Sequence[Union[int, str]] = ()) -> 'onnx.ModelProto':
    """The learning rate as an ONNX model of standard operators.

        rate = go.rate(schedule, t)

    Parameters
    ----------
    schedule
        A scheduler of MXNet or of `gluon_optim.lr_scheduler`; its record, as in `OptimizerStates.scheduler`; `OptimizerStates`; or
        a model of `to_onnx`, whose manifest has the record.
    shape : sequence of int or str
        The shape of ``t``; names stand for sizes that vary, as in ``('n',)``.

    Returns
    -------
    onnx.ModelProto
        Input ``t`` (int64): the number of the update, from 1. Output ``rate`` (float64, the same shape), which is the input
        ``learning_rate`` of `export_step` where the shape is (). For states or a model ``t`` is that of the step, which does not
        include MXNet's ``begin_num_update``; the rate takes it into account. Numbers below 1 are not checked in the model.

    Either run both models for each update, or merge them into one, which has the input ``schedule/t`` in place of
    ``learning_rate``: feed both ``t``.

        rates = onnx.compose.add_prefix(go.onnx.export_schedule(model), 'schedule/')
        step = onnx.compose.merge_models(rates, step, io_map=[('schedule/rate', 'learning_rate')])

    Raises
    ------
    ValueError, TypeError
        For a scheduler of a class that is not known here, attributes that are not those of one, states without a scheduler, or one
        that depends on a metric (Plateau).

    >>> half = {'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': dict(
    ...     step=10, factor=0.5, stop_factor_lr=1e-8, count=20, base_lr=0.1, warmup_steps=0, warmup_begin_lr=0,
    ...     warmup_final_lr=0.4, warmup_mode='linear')}
    >>> from onnx.reference import ReferenceEvaluator
    >>> import numpy
    >>> ReferenceEvaluator(export_schedule(half, shape=['n'])).run(None, {'t': numpy.array([1, 10, 11, 25])})[0].tolist()
    [0.4, 0.4, 0.2, 0.1]
    """
    found = carried(from_onnx(schedule) if isinstance(schedule, onnx.ModelProto) else schedule)
    (rule, h), graph, operators = function_of_time(found), Rates(), Operators()
    t = graph.leaf('input', 't', 'scalar')
    traced = 0 * t + rule.rate(graph, h, t + found.begin if found.begin else t)  # of the shape of t, also a constant
    as_double = operators.add('Cast', ['t'], 't', to='float64')
    rate = operators.value(traced, Scope('float64', 'rate', lambda leaf: as_double, {}))
    operators.add('Identity', [rate], output='rate')
    model = helper.make_graph(nodes(operators), 'schedule', [_info('t', 'int64', shape)], [_info('rate', 'float64', shape)])
    return model_of(model, {'scheduler': found.record, 'begin_num_update': found.begin})


def _info(name: str, dtype: str, shape: Sequence[Union[int, str]]) -> Any:
    return helper.make_tensor_value_info(name, TYPES[dtype], list(shape))
