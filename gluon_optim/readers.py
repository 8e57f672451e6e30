"""One way into every file that a conversion can begin with: ours and MXNet's, and what we have written for others."""
import importlib
import os
import zipfile
from typing import Any, Collection, Dict, List, Mapping, Optional

from . import optax_states
from .schema import one_of
from .states import inspection, legacy
from .states.errors import UnreadableFile
from .states.inspection import Contents

__all__ = ['NAMELESS', 'NO_NAMES', 'kind', 'read']

NO_NAMES = 'the names are the numbers of the parameters in PyTorch, as the file has no others'
NAMELESS = ('states', 'PyTorch states')  # kinds of files whose parameters are named from outside


def kind(path: Any) -> str:
    """'optax states', 'PyTorch states', 'ONNX model', or what `legacy.kind` says."""
    if not os.path.isfile(path) or not os.path.getsize(path):
        return 'unknown'
    found = legacy.kind(path)
    if found == 'npz':
        if optax_states.is_file(path):
            return 'optax states'
        if _is_torch(path):
            return 'PyTorch states'
    return 'ONNX model' if found == 'unknown' and os.path.splitext(path)[1] == '.onnx' else found


def read(path: Any, params: Any = None, optimizer: Optional[str] = None, source: Optional[str] = None,
         allow_lossy: bool = False, allow: Collection[str] = ()) -> Contents:
    """Read a file of states or parameters; nothing in it is executed.

    Parameters
    ----------
    path : str
    params : list of str, dict, or path of a ``.params`` file, optional
        Names, for MXNet's ``.states`` as in `gluon_optim.read_states`, for PyTorch's as in `gluon_optim.from_torch`.
    optimizer, source : str, optional
        For PyTorch's files, which do not say it unless they are our own optimizers': the registered name, and the target of
        `gluon_optim.to_torch` that is the class which wrote it (``torch`` if left out).
    allow_lossy : bool
        Read PyTorch's states although something is lost.
    allow : collection of str
        Further classes in MXNet's ``.states``, as in `gluon_optim.read_states`.

    Raises
    ------
    UnreadableFile (a ValueError)
        For a file that is damaged or foreign.
    ValueError, ImportError
        Where the file does not fit the other arguments, or the package that reads it is missing.
    OSError
        Where it cannot be opened.
    """
    found = kind(path)
    if found == 'optax states':
        return Contents(os.fspath(path), found, optax_states.read(path)[0])
    if found == 'PyTorch states':
        return Contents(os.fspath(path), found, _read_torch(path, params, optimizer, source, allow_lossy))
    if found == 'ONNX model':
        states, weights = _module('onnx').read(path)
        return Contents(os.fspath(path), found, states, parameters=weights)
    return inspection.read(path, params if found == 'states' else None, allow)


def _is_torch(path: Any) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith('/data.pkl') for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _read_torch(path: Any, params: Any, optimizer: Optional[str], source: Optional[str], allow_lossy: bool) -> Any:
    mirror = _module('torch')
    try:
        value = mirror.torch.load(path, map_location='cpu', weights_only=True)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # torch.load raises anything for a damaged pickle, and UnpicklingError for one that would run code
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
        raise UnreadableFile(f'Cannot read {os.fspath(path)!r}: it must be a state_dict of an optimizer, which torch.load('
                             f'weights_only=True) reads. Received: {reason}') from None
    state_dict = _optimizer_in(value, os.fspath(path))
    groups = state_dict['param_groups']
    if isinstance(params, (str, os.PathLike)):
        params = legacy.read_params(params)
    if isinstance(params, Mapping):
        params = _of_the_optimizer(params, groups)
    own = bool(groups) and 'optimizer' in groups[0]
    target = source or ('mirror' if own else 'torch')
    states = mirror.from_torch(state_dict, optimizer, target, params, allow_lossy=allow_lossy, copy=False)
    if params is None and not all('param_names' in group for group in groups):
        states.report.append(NO_NAMES)
    return states


def _optimizer_in(value: Any, path: str) -> Mapping[str, Any]:
    """The state_dict of an optimizer: the value itself, or the only one in a dictionary of several."""
    known: List[Any] = [value, *(value.values() if isinstance(value, Mapping) else ())]
    found = [entry for entry in known if isinstance(entry, Mapping) and {'state', 'param_groups'} <= set(entry)]
    if len(found) != 1:
        raise UnreadableFile(f'Cannot read {path!r}: it must hold the `state_dict` of one optimizer. '
                             f'Received: {len(found)} of them. Save `optimizer.state_dict()` alone.')
    return found[0]


def _of_the_optimizer(params: Mapping[str, Any], groups: Any) -> Dict[str, Any]:
    """Those of ``params`` that the optimizer has, where it knows names: files of parameters have running statistics too."""
    names = {name for group in groups for name in group.get('param_names', ())}
    missing = sorted(names - set(params))
    if names & set(params) and missing:
        raise ValueError(f'params= must hold every parameter of the state. Received: a file without {one_of(missing)}. '
                         'Give the parameters of the same run.')
    return {name: value for name, value in params.items() if name in names} if names & set(params) else dict(params)


def _module(name: str) -> Any:
    return importlib.import_module(f'{__package__}.{name}')
