"""What a conversion can write: one `Program` for each that reads the result, and the `Job` that it gets."""
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

from ..mapping import optax_file
from ..mapping.classes import FOREIGN
from ..mapping.selection import select
from ..states import atomic, container
from ..states.files import Kind
from ..states.inspection import Contents
from ..states.model import OptimizerStates
from ..states.mxnet_files import writer
from .read import NO_NAMES
from .refused import Refused

__all__ = ['CLASS_TARGETS', 'PROGRAMS', 'Job', 'Program']


class Job(NamedTuple):
    """One conversion: options of the command line, and what was read."""

    contents: Contents
    states: OptimizerStates
    output: str
    target: str = 'mirror'                  # class of the other framework, as in `gluon_optim.to_torch`
    names: Optional[List[str]] = None       # parameters, in the order to write them
    mxnet_version: Optional[int] = None     # 1 or 2: MXNet's own file of that version; None: ours
    allow_lossy: bool = False
    verify: int = 0                         # steps to replay on both sides before the file gets its final name


class Program(NamedTuple):
    """One program to write for."""

    ending: str
    write: Callable[[Job, str], None]
    classes: Tuple[str, ...] = ('mirror',)   # allowed values of --target


def _to_torch(job: Job, path: str) -> None:
    from ..torch import to_torch, torch
    state_dict = to_torch(job.states, target=job.target, params=job.names, allow_lossy=job.allow_lossy, copy=False)
    with atomic.replacing(path) as file:
        torch.save(state_dict, file)


def _to_onnx(job: Job, path: str) -> None:
    from .. import onnx
    onnx.write(path, job.states, job.target, job.names, job.contents.parameters or None, job.allow_lossy)


def _to_optax(job: Job, path: str) -> None:
    chosen = select(job.states, job.names)
    optax_file.write(path, job.states, chosen, job.contents.parameters, job.allow_lossy)


def _to_mxnet(job: Job, path: str) -> None:
    if job.mxnet_version is not None:
        writer.write_states(path, job.states, job.mxnet_version, job.names, job.allow_lossy)
        return
    if job.contents.kind is Kind.STATES:
        raise Refused(f'{job.contents.path!r} is already a gluon_optim file. Choose the MXNet version: --mxnet-version 1 or 2.')
    nameless = all(name.isdecimal() for name in job.states.names)
    if NO_NAMES in job.states.report:
        raise Refused(f'{job.contents.path!r} has no parameter names, and their numbers in PyTorch are not those of a Gluon '
                      'trainer. Pass the names as --params, in the order of the optimizer.')
    container.write(path, job.states)
    if nameless:
        job.states.report.append('the names in the new file are the indices of an old one: load_states assigns the states to the '
                                 'parameters at these positions in the trainer. Convert with params= to get real names')


CLASS_TARGETS = tuple(dict.fromkeys(['mirror', 'torch', *(foreign.target for foreign in FOREIGN)]))
PROGRAMS: Dict[str, Program] = {
    'torch': Program('.pt', _to_torch, CLASS_TARGETS),
    'onnx': Program('.onnx', _to_onnx, ('mirror', 'preview')),
    'optax': Program('.npz', _to_optax),
    'mxnet': Program('.safetensors', _to_mxnet),
}
