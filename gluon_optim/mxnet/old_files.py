"""MXNet's own `.states` files as a trainer's states: they identify parameters by index and hold no weights."""
import os
from typing import List, Optional, Sequence

from ..states import container, mxnet_files
from ..states.files import Kind, open_once
from ..states.model import OptimizerStates, ParameterInfo
from ..states.mxnet_files.names import renumbered
from ..states.reader import check_no_part
from .native import is_stranger, path_of
from .typing import TrainerLike

__all__ = ['read_for']


def read_for(path: container.Path, trainer: TrainerLike, present: List[ParameterInfo], part: Optional[str] = None
             ) -> OptimizerStates:
    """The states in one of our files or, named like ``present``, the parameters of ``trainer``, in one of MXNet 1.x or 2.x.

    Raises StateFileError for a damaged file, ValueError for one that does not fit or does not contain its optimizer.
    """
    optimizer = trainer._optimizer  # its class may be named, and so may its scheduler's: their attributes are read
    allow = [path_of(value) for value in (optimizer, optimizer.lr_scheduler) if value]
    with open_once(path) as file:
        if file.kind is not Kind.MXNET_STATES:
            return container.read(file, part)
        check_no_part(file, part)
        nested = path_of(optimizer) if is_stranger(optimizer) else ''  # then the trainer's states have no names either
        states = mxnet_files.read_states(file, [info.name for info in present], allow, nested=nested)
        fresh = renumbered([info.full_name for info in present])
        if fresh and states.producer.get('mxnet') == '1.x':
            other = mxnet_files.read_states(file, [present[place].name for place in fresh], allow, nested=nested)
            states = _of_one_order(os.fspath(path), states, other, present)
    if not states.optimizer:
        raise ValueError(f'Cannot load {os.fspath(path)!r}: it was saved without its optimizer, so that update counts and '
                         'hyper-parameters are not in it. Use trainer.load_states, which restarts the counts.')
    known = {info.name: info for info in states.parameters}
    # an untrained parameter has an index but nothing in the file
    silent = [info for info, parameter in zip(present, trainer._params)
              if info.name not in known and (parameter.grad_req == 'null' or not known)]
    states.parameters = [_described(info, states) for info in present if info.name in known or info in silent]
    states.counts.update((info.name, 0) for info in silent)
    return states


def _of_one_order(path: str, states: OptimizerStates, other: OptimizerStates, present: List[ParameterInfo]
                  ) -> OptimizerStates:
    """The states as the trainer sorts its names, or as one that counted them from 0 did. ValueError where both fit."""
    if not any(states.slots.values()) and len(set(states.counts.values())) < 2:
        return states  # nothing that could go to another layer
    fits, other_fits = _fit(states, present), _fit(other, present)
    if fits and other_fits:
        raise ValueError(
            f'The order of the parameters in {path!r} must be known: MXNet files have no names, and trainers sort names as text.'
            f' Received: a trainer of {present[0].full_name!r} and others, which are in another order where their numbers count '
            'from 0, as in a new process, so that states could go to other layers. If the file is of a new process, make the net '
            'again inside `with mx.name.NameManager():`, where names count from 0 too. If it is of a net with these very names, '
            'call trainer.load_states, and then gluon_optim.save_states, which writes a file with names.')
    if other_fits:
        other.report.append('The states were given to parameters in the order in which names are sorted where their numbers count '
                            'from 0; only so all shapes agree.')
    return other if other_fits else states


def _fit(states: OptimizerStates, present: List[ParameterInfo]) -> bool:
    """Whether each state has the shape of its parameter, as far as both are known."""
    shapes = {info.name: info.shape for info in present}
    return all(_agree(shapes[info.name], info.shape) for info in states.parameters if states.slots.get(info.name))


def _agree(weight: Sequence[int], state: Sequence[int]) -> bool:
    return len(weight) == len(state) and all(a in (b, 0, -1) for a, b in zip(weight, state))


def _described(present: ParameterInfo, states: OptimizerStates) -> ParameterInfo:
    """What the file has of the parameter: a name that was given to it, and the shape, but not the type, of its state.

    Nor its multipliers: MXNet does not save those of Gluon's parameters, which keep theirs.
    """
    found = next((info for info in states.parameters if info.name == present.name), present)
    stateless = not states.slots.get(present.name) and present.name not in states.master
    silent = stateless or bool(states.trees)  # slots of optimizers without a rule may have any shape
    return ParameterInfo(present.name, present.full_name, present.shape if silent else found.shape, present.dtype,
                         present.lr_mult, present.wd_mult, present.grad_req)
