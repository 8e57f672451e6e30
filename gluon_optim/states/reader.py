"""A single entry point for every file of optimizer states, ours or MXNet's; nothing in it is executed."""
from typing import Any, Collection, Optional, Union

from . import container, mxnet_files
from .files import OpenFile, Path, open_once
from .model import OptimizerStates

__all__ = ['check_no_part', 'read_states']


def read_states(path: Union[Path, OpenFile], params: Any = None, allow: Collection[str] = (),
                limit: Optional[int] = None, part: Optional[str] = None) -> OptimizerStates:
    """Read optimizer states without MXNet.

    Parameters
    ----------
    path : str or path
        A file of `gluon_optim.save_states`, or a ``.states`` file of MXNet 1.x or 2.x (``Trainer.save_states``).
    params : list of str, dict, or path of a ``.params`` file, optional
        Names for MXNet's files, which identify parameters only by index: names in trainer order, names with arrays or
        shapes, or the file in which the parameters were saved. Without it they are called '0', '1', ...
    allow : collection of str, optional
        Import paths of your own classes in MXNet's files, such as a scheduler: their attributes are read, nothing is imported.
    limit : int, optional
        Bytes of memory that the arrays of MXNet's files may take; by default twice the file size, or 32 MiB if that is more.
    part : str, optional
        Which trainer, by the name it was saved under, of a checkpoint that holds several.

    Returns
    -------
    OptimizerStates
        ``report`` says what was assumed.

    Raises
    ------
    StateFileError
        (a ValueError) if the file is damaged, of another kind, or names anything that is not an optimizer's state.
    ValueError
        if ``part`` is not a name in the file, or is missing for a checkpoint that holds several.
    OSError
        if it cannot be opened.

    >>> import tempfile, gluon_optim as go
    >>> from gluon_optim.states import container
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     container.write(folder + '/trainer.states', go.OptimizerStates('adamw', {'wd': 0.1}, 7, [], {}, {}))
    ...     go.read_states(folder + '/trainer.states')
    <OptimizerStates: adamw at update 7, 0 parameters>
    """
    with open_once(path) as file:
        if not file.kind.is_ours:
            check_no_part(file, part)
            return mxnet_files.read_states(file, params, allow, limit)
        if params is not None:
            raise ValueError(f"`params` names the parameters of MXNet's own files. Received: params={type(params).__name__} for "
                             f'{file.path!r}, which already holds names. Leave `params` out.')
        return container.read(file, part)


def check_no_part(file: OpenFile, part: Optional[str]) -> None:
    """Raise ValueError where a part is asked of a file that is no checkpoint."""
    if part is not None:
        raise ValueError(f'`part` chooses one of several nets or trainers in a checkpoint. Received: part={part!r} for '
                         f'{file.path!r}, a file of kind {file.kind.value!r}. Leave `part` out.')
