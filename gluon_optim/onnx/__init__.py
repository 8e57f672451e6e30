"""ONNX: an optimizer's update as a model of standard operators, and the states of a Gluon run to and from ONNX files.

>>> import gluon_optim.onnx
>>> model = gluon_optim.onnx.export_step('sgd_torch', {'weight': (3,)}, momentum=0.9)
>>> [x.name for x in model.graph.input]
['learning_rate', 't', 'weight', 'weight/grad', 'weight/momentum_buffer']
>>> [x.name for x in model.graph.output]
['weight/new', 'weight/momentum_buffer/new']

Works with onnx 1.13 and later; the models run on ONNX Runtime 1.15 and later.
"""
from ..requirements import missing

try:
    import onnx as onnx  # `from gluon_optim.onnx import onnx` says what to install
except ImportError as error:
    raise missing('gluon_optim.onnx', 'the package onnx', 'onnx', error) from error

from .schedules import export_schedule
from .states import from_onnx, read, to_onnx, unpack, write
from .step import export_step, initial_slots

__all__ = ['export_schedule', 'export_step', 'from_onnx', 'initial_slots', 'read', 'to_onnx', 'unpack', 'write']
