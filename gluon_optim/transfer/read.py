"""A single entry point for every kind of file: ours, MXNet's, and those we wrote for others. Nothing in them is executed."""
from typing import Any, Collection, Dict, List, Mapping, Optional, Union

from .. import rules
from ..mapping import loss_scalers, optax_file
from ..mapping.scheduling import is_scheduler
from ..schema import one_of
from ..states import container, mxnet_files, safetensors_files, torch_files
from ..states.errors import UnreadableFile, reading
from ..states.files import Kind, OpenFile, Path, open_once
from ..states.inspection import Contents
from ..states.model import OptimizerStates, Run
from ..states.reader import check_no_part

__all__ = ['NAMELESS', 'NO_NAMES', 'READABLE', 'read', 'read_parts']

READABLE = ('states and checkpoints of gluon_optim, .states and .params files of MXNet, the .pt, .onnx and .npz files that '
            '`gluon-optim convert` writes, and weights in .pt and .safetensors files')
NO_NAMES = 'the names are the numbers of the parameters in PyTorch, because the file has no others'
NAMELESS = (Kind.MXNET_STATES, Kind.PYTORCH)  # kinds of files that do not name their parameters


def read(source: Union[Path, OpenFile], params: Any = None, optimizer: Optional[str] = None, target: Optional[str] = None,
         allow_lossy: bool = False, allow: Collection[str] = (), part: Optional[str] = None) -> Contents:
    """Read a file of states or parameters.

    Parameters
    ----------
    source : str, or a file that `open_once` has opened
    params : list of str, dict, or path of a ``.params`` file, optional
        Names, for MXNet's ``.states`` as in `gluon_optim.read_states`, for PyTorch's as in `gluon_optim.from_torch`.
    optimizer, target : str, optional
        For PyTorch's files, which do not say it unless they are our own optimizers': the registered name, and the target of
        `gluon_optim.to_torch` that is the class which wrote it (``torch`` if left out).
    allow_lossy : bool
        Read PyTorch's states even if something is lost.
    allow : collection of str
        Further classes in MXNet's ``.states``, as in `gluon_optim.read_states`.
    part : str, optional
        Which net and trainer of a checkpoint that holds several.

    Raises
    ------
    UnreadableFile (a ValueError)
        For a file that is damaged or foreign.
    ValueError, ImportError
        Where the file does not fit the other arguments, or the package that reads it is missing.
    OSError
        Where it cannot be opened.
    """
    with open_once(source) as file, reading(file.path, TypeError, KeyError):  # of `params` and `optimizer`
        if not file.kind.is_ours:
            check_no_part(file, part)
        if file.kind is Kind.OPTAX:
            return Contents(file.path, file.kind, optax_file.read(file)[0])
        if file.kind is Kind.PYTORCH:
            return _read_torch(file, params, optimizer, target, allow_lossy)
        if file.kind is Kind.SAFETENSORS:
            return Contents(file.path, Kind.MODEL, parameters=safetensors_files.read(file))
        if file.kind is Kind.ONNX:
            from .. import onnx
            states, weights = onnx.read(file)
            return Contents(file.path, file.kind, states, parameters=weights)
        if file.kind.holds_parameters:
            return Contents(file.path, file.kind, parameters=mxnet_files.read_params(file))
        if file.kind is Kind.MXNET_STATES:
            return Contents(file.path, file.kind, mxnet_files.read_states(file, params, allow))
        if not file.kind.is_ours:
            raise UnreadableFile(f'Cannot read {file.path!r}: it must be one of these: {READABLE}. Received: {_beginning(file)}.')
        return _of_ours(file, *container.read_checkpoint(file, part))


def read_parts(file: OpenFile) -> Dict[str, Contents]:
    """The parts of one of our files by their names; one without a name is called ''."""
    return {name: _of_ours(file, *part) for name, part in container.read_parts(file).items()}


def _of_ours(file: OpenFile, states: OptimizerStates, run: Optional[Run]) -> Contents:
    weights = {weight.name: weight.copies[0] for weight in run.weights} if run else {}
    return Contents(file.path, Kind.CHECKPOINT if run else Kind.STATES, states, run, weights)


def _beginning(file: OpenFile) -> str:
    """A description of the first bytes of a file."""
    if file.kind is Kind.LFS:
        return 'a Git LFS pointer, which stands for a file that was not downloaded. Run git lfs pull'
    if file.kind is Kind.HTML:
        return 'an HTML page, perhaps the error page of a download. Download the file again'
    head = file.head[:16]
    return f'a file that begins with {head!r}' if head else 'an empty file. Was its writer interrupted? Use another copy'


def _read_torch(file: OpenFile, params: Any, optimizer: Optional[str], target: Optional[str], allow_lossy: bool) -> Contents:
    """The states of an optimizer, or the weights of a model."""
    value = torch_files.read(file)
    if isinstance(value, Mapping) and value and all(isinstance(entry, torch_files.Tensor) for entry in value.values()):
        weights = torch_files.arrays(value, file)
        return Contents(file.path, Kind.MODEL, parameters={str(name): array for name, array in weights.items()})
    from ..torch import from_torch
    optimizer_state = _optimizer_in(value, file.path)
    state_dict = {**torch_files.arrays(optimizer_state, file), **_beside(value, optimizer_state)}
    groups = state_dict['param_groups']
    if optimizer is not None:
        rules.get(optimizer)  # an unknown name is no fault of the file
    with reading(file.path):
        if isinstance(params, Mapping):
            params = _of_the_optimizer(params, groups)
        own = bool(groups) and 'optimizer' in groups[0]
        target = target or ('mirror' if own else 'torch')
        states = from_torch(state_dict, optimizer, target, params, allow_lossy=allow_lossy, copy=False)
    if params is None and not all('param_names' in group for group in groups):
        states.report.append(NO_NAMES)
    return Contents(file.path, file.kind, states)


def _optimizer_in(value: Any, path: str) -> Mapping[str, Any]:
    """The state_dict of an optimizer: the value itself, or the only one in a dictionary of several."""
    known: List[Any] = [value, *(value.values() if isinstance(value, Mapping) else ())]
    found = [entry for entry in known if isinstance(entry, Mapping) and {'state', 'param_groups'} <= set(entry)]
    if len(found) != 1:
        raise UnreadableFile(f'Cannot read {path!r}: it must hold the `state_dict` of one optimizer. '
                             f'Received: {len(found)} of them. Save only `optimizer.state_dict()`.')
    return found[0]


def _beside(value: Mapping[str, Any], state_dict: Mapping[str, Any]) -> Dict[str, Any]:
    """Scheduler and loss scaler, where they were saved beside the optimizer, under any keys: as `from_torch` looks for them."""
    others = [entry for entry in value.values() if isinstance(entry, Mapping)] if value is not state_dict else []
    found = {'scheduler': [entry for entry in others if is_scheduler(entry)],
             'loss_scaler': [entry for entry in others if loss_scalers.from_torch(entry)]}
    return {key: entries[0] for key, entries in found.items() if len(entries) == 1}


def _of_the_optimizer(params: Mapping[str, Any], groups: Any) -> Dict[str, Any]:
    """The entries of ``params`` that the optimizer has, if it knows names: parameter files also have running statistics."""
    names = {name for group in groups for name in group.get('param_names', ())}
    missing = sorted(names - set(params))
    if names & set(params) and missing:
        raise ValueError(f'params= must hold every parameter of the state. Received: a file without {one_of(missing)}. '
                         'Pass the parameters of the same run.')
    return {name: value for name, value in params.items() if name in names} if names & set(params) else dict(params)
