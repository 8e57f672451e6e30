"""MXNet's own `.states` files as the states of a trainer: they know parameters by their index, and no weights."""
import os
from typing import List

from ..states import container, mxnet_files
from ..states.files import Kind, open_once
from ..states.model import OptimizerStates, ParameterInfo
from .typing import TrainerLike

__all__ = ['read_for']


def read_for(path: container.Path, trainer: TrainerLike, present: List[ParameterInfo]) -> OptimizerStates:
    """The states in a file of ours or, named as the parameters ``present`` of ``trainer``, in one of MXNet 1.x or 2.x.

    Raises StateFileError for a damaged file, ValueError for one that does not fit or does not contain its optimizer.
    """
    optimizer = trainer._optimizer  # its class may be named, and so may its scheduler's: their attributes are read
    allow = [f'{type(value).__module__}.{type(value).__qualname__}' for value in (optimizer, optimizer.lr_scheduler) if value]
    with open_once(path) as file:
        if file.kind is not Kind.MXNET_STATES:
            return container.read(file)
        states = mxnet_files.read_states(file, [info.name for info in present], allow)
    if not states.optimizer:
        raise ValueError(f'Cannot load {os.fspath(path)!r}: it was saved without its optimizer, so that update counts and '
                         'hyper-parameters are not in it. Use trainer.load_states, which begins to count anew.')
    known = {info.name: info for info in states.parameters}
    # a parameter that is not trained has an index, and nothing in the file
    silent = [info for info, parameter in zip(present, trainer._params)
              if info.name not in known and (parameter.grad_req == 'null' or not known)]
    states.parameters = [_described(info, states) for info in present if info.name in known or info in silent]
    states.counts.update((info.name, 0) for info in silent)
    return states


def _described(present: ParameterInfo, states: OptimizerStates) -> ParameterInfo:
    """What the file has of the parameter: a name that was given to it, and the shape, but not the type, of its state."""
    found = next((info for info in states.parameters if info.name == present.name), present)
    stateless = not states.slots.get(present.name) and present.name not in states.master
    silent = stateless or bool(states.trees)  # slots of optimizers without a rule may have any shape
    return ParameterInfo(present.name, present.full_name, present.shape if silent else found.shape, present.dtype,
                         found.lr_mult, found.wd_mult, present.grad_req)
