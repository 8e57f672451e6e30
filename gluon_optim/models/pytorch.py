"""The names and shapes of a PyTorch module, from it or its file, and a safetensors file of weights. PyTorch is not imported."""
import json
import os
import reprlib
import struct
from dataclasses import dataclass, field
from typing import Any, Collection, Dict, List, Mapping, Optional, Union

import numpy

from ..schema import one_of
from ..states import container, json_text, torch_files
from ..states.atomic import replacing
from ..states.errors import UnreadableFile, reading
from ..states.files import OpenFile, Path, open_once
from ..states.model import chunks
from .plan import Shape

__all__ = ['COUNTER', 'Target', 'target_of', 'write_safetensors']

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
        if file.head[8:9] == b'{':
            return _of_header(file)
        value = torch_files.read(file)
    if not isinstance(value, Mapping):
        raise UnreadableFile(f'{name} must be the state_dict of a model. Received: a {type(value).__name__}.')
    return _of_state_dict(name, value)


def _of_header(file: OpenFile) -> Target:
    """The header of a safetensors file, which has its arrays in an order of its own."""
    name, size = repr(file.path), int.from_bytes(file.head[:8], 'little')
    if size > container.MAX_HEADER:
        raise UnreadableFile(f'{name} must be a safetensors file with a header of up to {container.MAX_HEADER} bytes. '
                             f'Received: {size}.')
    try:
        header = json_text.loads(file.file.read(8 + size)[8:], 'its header')
        tensors = {name: entry for name, entry in header.items() if name != '__metadata__'}
        shapes = {name: _shape(entry['shape']) for name, entry in tensors.items()}
        halves = {name for name, entry in tensors.items() if entry['dtype'] in ('F16', 'BF16')}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableFile(f'{name} must be a safetensors file. Received: a header that cannot be read ({error}).') from error
    return Target(name, shapes, ordered=False, halves=halves)


def _shape(sizes: Any) -> Shape:
    if not isinstance(sizes, list) or len(sizes) > 64 or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f'a shape must be a list of up to 64 whole numbers. Received: {reprlib.repr(sizes)}')
    return tuple(sizes)


# Writing

CODES = {'float64': 'F64', 'float32': 'F32', 'float16': 'F16', 'int64': 'I64', 'int32': 'I32', 'int16': 'I16', 'int8': 'I8',
         'uint64': 'U64', 'uint32': 'U32', 'uint16': 'U16', 'uint8': 'U8', 'bool': 'BOOL'}


def write_safetensors(path: Path, arrays: Mapping[str, numpy.ndarray]) -> None:
    """Write ``path``, whole or not at all, array by array: nothing is copied as a whole."""
    header: Dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    end = 0
    order = sorted(arrays, key=lambda name: -arrays[name].itemsize)  # wide elements first, so that each array is aligned
    for name in order:
        begin, end = end, end + arrays[name].nbytes
        header[name] = {'dtype': CODES[arrays[name].dtype.name], 'shape': list(arrays[name].shape), 'data_offsets': [begin, end]}
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack('<Q', len(text)) + text)
        for name in order:
            for chunk in chunks(arrays[name]):
                file.write(chunk)
