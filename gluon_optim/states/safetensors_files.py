"""Any safetensors file, read and written without the safetensors package: weights of models, say. Ours are `container`'s."""
import json
import struct
from typing import Any, Dict, List, Mapping, NamedTuple, Tuple

import numpy

from . import json_text
from .atomic import replacing
from .errors import StateFileError, UnreadableFile
from .files import OpenFile, Path
from .model import chunks

__all__ = ['Entry', 'read', 'read_header', 'write']

MAX_HEADER = 32 << 20  # bytes; more is refused before it is parsed
# the format's code -> the type as `FilePart.array` takes it
TYPES = {'F64': '<f8', 'F32': '<f4', 'F16': '<f2', 'BF16': 'bfloat16', 'I64': '<i8', 'I32': '<i4', 'I16': '<i2', 'I8': 'i1',
         'U64': '<u8', 'U32': '<u4', 'U16': '<u2', 'U8': 'u1', 'BOOL': '?'}
CODES = {'float64': 'F64', 'float32': 'F32', 'float16': 'F16', 'int64': 'I64', 'int32': 'I32', 'int16': 'I16', 'int8': 'I8',
         'uint64': 'U64', 'uint32': 'U32', 'uint16': 'U16', 'uint8': 'U8', 'bool': 'BOOL'}


class Entry(NamedTuple):
    """What the header says of one array; ``begin`` and ``end`` count from the end of the header."""

    code: str
    shape: Tuple[int, ...]
    begin: int
    end: int


def read_header(file: OpenFile) -> Dict[str, Entry]:
    """The arrays in a file, by name, in the order of the header. Raises UnreadableFile."""
    size = int.from_bytes(file.head[:8], 'little')
    if file.head[8:9] != b'{' or not 2 <= size <= min(MAX_HEADER, file.size - 8):
        raise UnreadableFile(f'{file.path!r} must be a safetensors file with a header of up to {MAX_HEADER} bytes. '
                             f'Received: {size}, in a file of {file.size} bytes.')
    file.file.seek(8)
    try:
        header = json_text.loads(file.file.read(size), 'its header')
    except StateFileError as error:
        raise UnreadableFile(f'Cannot read {file.path!r}: {error}') from None
    if not isinstance(header, dict):
        raise UnreadableFile(f'{file.path!r} must be a safetensors file. Received: a header that is not a dictionary.')
    return {name: _entry(file, name, entry) for name, entry in header.items() if name != '__metadata__'}


def _entry(file: OpenFile, name: str, entry: Any) -> Entry:
    def whole(key: str, most: int) -> List[int]:
        numbers = entry[key]
        if not isinstance(numbers, list) or len(numbers) > most or not all(type(x) is int and x >= 0 for x in numbers):
            raise ValueError(f'{key} must be up to {most} whole numbers')
        return numbers

    try:
        begin, end = whole('data_offsets', 2)
        return Entry(str(entry['dtype']), tuple(whole('shape', 64)), begin, end)
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableFile(f'{file.path!r} must be a safetensors file. Received: a header that cannot be read, at {name!r} '
                             f'({error}).') from error


def read(file: OpenFile) -> Dict[str, numpy.ndarray]:
    """All arrays; bfloat16, which NumPy lacks, becomes float32. Raises UnreadableFile for a damaged file.

    >>> import tempfile
    >>> from gluon_optim.states.files import open_once
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(folder + '/x', {'weight': numpy.ones((1, 2), 'float32')})
    ...     with open_once(folder + '/x') as file:
    ...         read(file)
    {'weight': array([[1., 1.]], dtype=float32)}
    """
    entries, source = read_header(file), file.part()
    start, position, arrays = 8 + int.from_bytes(file.head[:8], 'little'), 0, {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.code not in TYPES:
            raise UnreadableFile(f'{file.path!r}: {name!r} must be of one of the types {", ".join(TYPES)}. '
                                 f'Received: {entry.code!r}.')
        if entry.begin != position or start + entry.end > file.size or entry.end < entry.begin:
            raise UnreadableFile(f'{file.path!r}: {name!r} must begin at byte {position} of the data and end in the file. '
                                 f'Received: bytes {entry.begin} to {entry.end}. The file is damaged: use another copy.')
        part = source.part(start + entry.begin, entry.end - entry.begin)
        arrays[name] = part.array(TYPES[entry.code], entry.shape, repr(name))
        if part.left():
            part.fail(f'{name!r} takes fewer bytes than it should.')
        position = entry.end
    if start + position != file.size:
        raise UnreadableFile(f'{file.path!r} must end with its last array. Received: {file.size - start - position} bytes more.')
    return {name: arrays[name] for name in entries}


def write(path: Path, arrays: Mapping[str, numpy.ndarray]) -> None:
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
