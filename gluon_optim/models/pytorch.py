"""The names and shapes of a PyTorch module, from it or its file, and a safetensors file of weights. PyTorch is not imported."""
import os
from dataclasses import dataclass, field
from typing import Any, Collection, Dict, List, Mapping, Optional, Union

from ..schema import one_of
from ..states import safetensors_files, torch_files
from ..states.errors import UnreadableFile, reading
from ..states.files import OpenFile, Path, open_once
from .plan import Shape

__all__ = ['COUNTER', 'Target', 'target_of']

COUNTER = 'num_batches_tracked'


@dataclass
class Target:
    """The names that a PyTorch module has, with shapes, in its order."""

    what: str
    shapes: Dict[str, Shape]
    ordered: bool = True
    halves: Collection[str] = ()                             # names of half-precision parameters
    trained: Optional[List[str]] = None                      # names of parameters; None: cannot be told from buffers
    tied: Dict[str, str] = field(default_factory=dict)       # name -> another name of the same parameter
    groups: Dict[str, int] = field(default_factory=dict)     # group norm -> number of groups


def target_of(like: Any) -> Optional[Target]:
    """Names and shapes of a module, a ``state_dict``, or a file of one."""
    if like is None or isinstance(like, Target):
        return like
    if isinstance(like, (str, os.PathLike, OpenFile)):
        return _of_saved(like)
    if hasattr(like, 'named_parameters') and hasattr(like, 'state_dict'):
        target = _of_state_dict(f'the {type(like).__name__}', like.state_dict(keep_vars=True))
        names = [name for name, _ in like.named_parameters()]
        target.trained = names
        target.groups = {name: module.num_groups for name, module in like.named_modules()
                         if isinstance(getattr(module, 'num_groups', None), int)}
        return target
    if isinstance(like, Mapping):
        return _of_state_dict('the state_dict', like)
    raise TypeError('`like` must be a torch.nn.Module, a state_dict, or the path of a .pt or .safetensors file of one. '
                    f'Received: {type(like).__name__}.')


def _of_state_dict(what: str, state_dict: Mapping[str, Any]) -> Target:
    strange = [name for name, value in state_dict.items() if not hasattr(value, 'shape') or not isinstance(name, str)]
    if strange:
        raise TypeError(f'`like` must hold arrays under their names, as model.state_dict() does. Received: {what} with '
                        f'{one_of(strange[:4])}. Save the state_dict of the model alone.')
    target = Target(what, {name: tuple(map(int, value.shape)) for name, value in state_dict.items()})
    target.halves = {name for name, value in state_dict.items() if str(value.dtype).split('.')[-1] in ('float16', 'bfloat16')}
    first: Dict[Any, str] = {}
    for name, value in state_dict.items():
        address = value.data_ptr() if hasattr(value, 'data_ptr') else 0  # 0: on the meta device, or empty
        key = (address, target.shapes[name]) if address else id(value)
        if first.setdefault(key, name) != name:
            target.tied[name] = first[key]
    return target


def _of_saved(path: Union[Path, OpenFile]) -> Target:
    with open_once(path) as file, reading(file.path):
        name = repr(file.path)
        if file.head[8:9] == b'{':  # whose arrays are in an order of their own
            entries = safetensors_files.read_header(file)
            return Target(name, {key: entry.shape for key, entry in entries.items()}, ordered=False,
                          halves={key for key, entry in entries.items() if entry.code in ('F16', 'BF16')})
        value = torch_files.read(file)
    if not isinstance(value, Mapping):
        raise UnreadableFile(f'{name} must be the state_dict of a model. Received: a {type(value).__name__}.')
    return _of_state_dict(name, value)
