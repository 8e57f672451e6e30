"""The optimizer state file: one safetensors container in which every byte is covered by a checksum.

docs/FORMAT.md describes it for anyone who wants to read it elsewhere. `write` and `read` are inverses; everything `read`
returns has been checked from the first byte to the last, and it refuses anything it cannot vouch for with `StateFileError`.
A checkpoint is such a file that also holds a `Run`, or several of both (docs/CHECKPOINTS.md). This module writes the layout
itself, because the safetensors package can neither stream arrays one at a time, nor sign its own header, nor refuse repeated keys.
The format is the same: ``safetensors.numpy.load_file`` reads these files.
"""
import contextlib
import hashlib
import json
import math
import os
import struct
import zlib
from typing import Any, BinaryIO, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, TypeVar, Union

import numpy

from ..schema import one_of
from . import json_text
from .atomic import replacing
from .errors import StateFileError, UnreadableFile, reading
from .files import CONTAINER_START, OpenFile, Path, open_once
from .manifest import (
    CHECKPOINT,
    CODES,
    DAMAGED,
    DTYPES,
    FORMAT,
    METADATA,
    PARTS,
    TENSOR,
    UNSIGNED,
    VERSION,
    VERSIONS,
    Entry,
    check,
    check_record,
    key_in,
    manifest_of,
    parts_of,
    show,
    weight_keys,
)
from .model import Array, OptimizerStates, Parts, Run, chunks

__all__ = ['CHECKPOINT', 'FORMAT', 'Path', 'VERSION', 'outline', 'read', 'read_checkpoint', 'read_manifest', 'read_parts', 'write',
           'write_parts']

MAX_HEADER = 32 << 20  # about 40 000 parameters; more is refused before parsing

# at a fixed place, so that the header can be checked before any of it is parsed
_SIGNATURE = slice(8 + len(CONTAINER_START), 8 + len(CONTAINER_START) + 64)
_CHUNK = 1 << 19  # small enough to stay in the cache between reading and checksum

T = TypeVar('T')


# Writing

def write(path: Path, states: OptimizerStates, run: Optional[Run] = None) -> None:
    """Write ``states`` to ``path``; with a ``run``, as a checkpoint.

    Afterwards the complete new file is there or, after any error, whatever was there before.
    Arrays are written one by one and copied in pieces of at most 1 MiB. An existing file keeps its permission bits; a
    symbolic link is followed, not replaced.

    Raises StateFileError for states that the format cannot hold, OSError if the file system refuses.

    >>> import tempfile
    >>> empty = OptimizerStates('adamw', {'learning_rate': 0.1}, 0, [], {}, {})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(folder + '/empty.states', empty)
    ...     read(folder + '/empty.states').hypers
    {'learning_rate': 0.1}
    """
    write_parts(path, {'': (states, run)})


def write_parts(path: Path, parts: Parts) -> None:
    """`write` several parts, each with a run, or one called ''."""
    try:
        arrays = _arrays(parts)
        manifest = manifest_of(parts, arrays)
        entries = _entries(arrays)
        header = _header(manifest, entries)
        check(json_text.loads(_dumps(manifest), 'the header', _Shared()), entries)  # anything written can be read
    except (StateFileError, TypeError, ValueError, RecursionError) as error:
        raise StateFileError(f'Cannot write {os.fspath(path)!r}: {error}') from None
    with replacing(path) as file:
        file.seek(len(header))  # the checksums in the header are known only after the arrays have been written
        for key, array in arrays.items():
            crc = 0
            for chunk in chunks(array):
                crc = zlib.crc32(chunk, crc)
                file.write(chunk)
            if file.tell() != len(header) + entries[key][3]:
                raise StateFileError(f'Cannot write {key!r}: its size changed meanwhile. Do not change states during a save.')
            manifest['crc32'][key] = f'{crc:08x}'
        file.seek(0)
        file.write(_header(manifest, entries))


def outline(parts: Parts) -> Tuple[Dict[str, Any], Dict[str, Array]]:
    """What a file of ``parts`` would say of them, and its arrays by key: `manifest.parts_of` makes parts of both."""
    arrays = _arrays(parts)
    return manifest_of(parts, arrays), arrays


def _arrays(parts: Parts) -> Dict[str, Array]:
    """All arrays under their keys, in file order: wide elements first, so that each array is aligned."""
    arrays = {key_in(part, key): array for part, contents in parts.items() for key, array in _arrays_of_one(*contents).items()}
    return dict(sorted(arrays.items(), key=lambda item: -numpy.dtype(item[1].dtype).itemsize))


def _arrays_of_one(states: OptimizerStates, run: Optional[Run]) -> Dict[str, Array]:
    arrays: Dict[str, Array] = {}
    for name in states.names:
        for slot, array in (states.slots.get(name) or {}).items():
            arrays[f'{name}/{slot}'] = array
        if name in states.master:
            arrays[f'{name}/master'] = states.master[name]
    arrays.update((f'_optimizer/{variable}', array) for variable, array in states.variables.items())
    for weight in run.weights if run else ():
        arrays.update(zip(weight_keys(weight.name, len(weight.copies)), weight.copies))
    return arrays


def _entries(arrays: Mapping[str, Array]) -> Dict[str, Entry]:
    entries: Dict[str, Entry] = {}
    end = 0
    for key, array in arrays.items():
        dtype, shape = numpy.dtype(array.dtype), tuple(map(int, array.shape))
        if dtype.name not in CODES:
            raise StateFileError(f'{key!r} must have one of the types {", ".join(CODES)}. Received: {dtype.name}.')
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[key] = dtype.name, shape, begin, end
    return entries


def _header(manifest: Mapping[str, Any], entries: Mapping[str, Entry]) -> bytes:
    """The signed header, preceded by its length and padded so that the arrays start at a multiple of 8."""
    tensors = {key: {'dtype': CODES[dtype], 'shape': list(shape), 'data_offsets': [begin, end]}
               for key, (dtype, shape, begin, end) in entries.items()}
    text = _dumps({'__metadata__': {'gluon_optim': _dumps(manifest)}, **tensors}).encode()
    text += b' ' * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise StateFileError(f'the header may have at most {MAX_HEADER} bytes. {len(entries)} arrays need {len(text)}.')
    return _signed(struct.pack('<Q', len(text)) + text)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':'))


def _signed(header: bytes) -> bytes:
    return header[:_SIGNATURE.start] + _signature_of(header[:8], header[8:]) + header[_SIGNATURE.stop:]


def _signature_of(prefix: bytes, header: bytes) -> bytes:
    signature = hashlib.sha256(prefix)
    for piece in (header[:_SIGNATURE.start - 8], UNSIGNED.encode(), memoryview(header)[_SIGNATURE.stop - 8:]):
        signature.update(piece)
    return signature.hexdigest().encode()


# Reading

def read(path: Union[Path, OpenFile], part: Optional[str] = None) -> OptimizerStates:
    """The states in the file at ``path``, read once and checked to the last byte; raises and takes what `read_checkpoint` does."""
    return read_checkpoint(path, part)[0]


def read_checkpoint(path: Union[Path, OpenFile], part: Optional[str] = None) -> Tuple[OptimizerStates, Optional[Run]]:
    """Everything in a checkpoint, as NumPy arrays, read once and checked to the last byte. MXNet is not needed.

    Parameters
    ----------
    path : str or os.PathLike
        A file of `gluon_optim.save_checkpoint` or of a `CheckpointManager`.
    part : str, optional
        Which net or trainer, by the name it was saved under, of a file that holds several.

    Returns
    -------
    states : OptimizerStates
        The optimizer's name, hyper-parameters, slots, masters and update counts. For a checkpoint saved without a trainer
        ``states.optimizer`` is 'none'.
    run : Run or None
        ``weights``, a list of `Weight` with ``name`` and ``copies`` (one array, or one per device where they differ),
        ``step``, ``epoch``, ``batch``, ``metrics``, ``random``, and the user's ``extra``. None for a file of
        `gluon_optim.save_states`.

    Raises StateFileError (a ValueError) for an incomplete or damaged file, ValueError where ``part`` is not a name in the file,
    or is missing for one that holds several, OSError if it cannot be opened or read.

    >>> import tempfile
    >>> from gluon_optim.states.model import Weight
    >>> saved = Run([Weight('0.bias', 'dense0_bias', [numpy.zeros(2)])], step=7, extra={'fold': 3})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(folder + '/step-7.safetensors', OptimizerStates('adamw', {}, 7, [], {}, {}), saved)
    ...     states, run = read_checkpoint(folder + '/step-7.safetensors')
    >>> states.optimizer, run.step, run.extra, {weight.name: weight.copies[0].tolist() for weight in run.weights}
    ('adamw', 7, {'fold': 3}, {'0.bias': [0.0, 0.0]})
    """
    with open_once(path) as file:
        return _part_of(file.path, read_parts(file), part)


def read_parts(path: Union[Path, OpenFile]) -> Parts:
    """All parts of the file at ``path``, or its only one, which is called ''. Raises what `read_manifest` raises."""
    return _opened(path, _read)


def _part_of(path: str, parts: Parts, name: Optional[str]) -> Tuple[OptimizerStates, Optional[Run]]:
    """The part called ``name`` of a file; None for its only one. Raises ValueError."""
    if '' in parts:
        if name is not None:
            raise ValueError(f'`part` chooses one of several nets or trainers in a checkpoint. Received: part={name!r} for '
                             f'{path!r}, which holds only one. Leave `part` out.')
        return parts['']
    if name is None or name not in parts:
        raise ValueError(f'`part` must be one of those in {path!r}: {one_of(parts)}. Received: {name!r}. '
                         f'Pass part={next(iter(parts))!r}, for example.')
    return parts[name]


def read_manifest(path: Union[Path, OpenFile]) -> Dict[str, Any]:
    """Only the manifest, after checking its signature; the arrays are not read. Raises StateFileError, OSError."""
    return _opened(path, lambda file: _parse(_read_header(file, os.fstat(file.fileno()).st_size))[0])


def _opened(path: Union[Path, OpenFile], reader: Callable[[BinaryIO], T]) -> T:
    with open_once(path) as file:
        try:
            with reading(file.path):
                return reader(file.file)
        except UnreadableFile:
            raise
        except StateFileError as error:
            raise type(error)(f'Cannot read {file.path!r}: {error}') from None


def _read(file: BinaryIO) -> Parts:
    size = os.fstat(file.fileno()).st_size
    manifest, entries = _parse(_read_header(file, size))
    check(manifest, entries)
    _check_layout(entries, size - file.tell())
    arrays = {}
    for key in sorted(entries, key=lambda key: entries[key][2:]):
        arrays[key] = _read_array(file, key, entries.pop(key), manifest['crc32'].pop(key))  # of many small ones these are the most
    if file.read(1):
        raise StateFileError('the file grew while it was being read. Wait for its writer to finish, then read again.')
    return parts_of(manifest, arrays)


def _read_header(file: BinaryIO, size: int) -> List[bytes]:
    """The header, after checking its signature; in a list, out of which `_parse` takes it: it may be most of the file."""
    prefix = file.read(8)
    length = struct.unpack('<Q', prefix)[0] if len(prefix) == 8 else 0
    start = file.read(len(CONTAINER_START)) if length else b''
    if start != CONTAINER_START:
        raise StateFileError('it is not a gluon_optim file: the file must begin with an 8-byte length and '
                             f'{CONTAINER_START.decode()!r}. Received: {(prefix + start)[:16]!r}... in a file of {size} bytes. '
                             f'Read the file with the program that wrote it, or use another copy.')
    if not len(CONTAINER_START) + 64 < length <= min(MAX_HEADER, size - 8):
        raise StateFileError(f'the header must fit into the file, and into {MAX_HEADER} bytes. Received: a header of {length} '
                             f'bytes in a file of {size}. The file is truncated or damaged: use another copy of it.')
    header = start + file.read(length - len(start))
    if len(header) != length or header[_SIGNATURE.start - 8:_SIGNATURE.stop - 8] != _signature_of(prefix, header):
        raise StateFileError(f'the SHA-256 of the header must be the one stored in it. Received: a different one. {DAMAGED}')
    return [header]


def _parse(header: List[bytes]) -> Tuple[Dict[str, Any], Dict[str, Entry]]:
    """The manifest, and what safetensors says about each array."""
    with _damaged():
        entries = json_text.loads(header.pop(), 'the header', _entry_of)
    metadata = entries.pop('__metadata__', None)
    check_record(metadata, METADATA, 'the metadata')
    with _damaged():
        manifest = json_text.loads(metadata.pop('gluon_optim'), 'the header', _Shared())
    if not isinstance(manifest, dict) or manifest.get('format') not in (FORMAT, CHECKPOINT, PARTS):
        raise StateFileError(f'the manifest must have the format {FORMAT!r}, {CHECKPOINT!r} or {PARTS!r}. {DAMAGED}')
    version = manifest.get('version')
    if type(version) is not int or version not in VERSIONS:
        raise StateFileError(f'the format version must be {" or ".join(map(str, VERSIONS))}. Received: {show(version)}. '
                             'Install the gluon_optim that wrote the file, or a newer one.')
    for key, entry in entries.items():
        if not isinstance(entry, tuple):
            check_record(entry, TENSOR, show(key))  # raises
    return manifest, entries


def _entry_of(record: Dict[str, Any]) -> Any:
    """What safetensors says about an array, as an `Entry`; anything else is returned as it is."""
    if set(record) != set(TENSOR) or not all(check(record[key]) for key, check in TENSOR.items()):
        return record
    return (DTYPES[record['dtype']], tuple(record['shape']), *record['data_offsets'])


class _Shared:
    """Makes equal words in the records of parameters one object."""

    def __init__(self) -> None:
        self._words: Dict[str, str] = {}

    def __call__(self, record: Dict[str, Any]) -> Dict[str, Any]:
        for key in ('dtype', 'grad_req'):
            if isinstance(record.get(key), str):
                record[key] = self._words.setdefault(record[key], record[key])
        if isinstance(record.get('slots'), list):
            record['slots'] = [self._words.setdefault(slot, slot) if isinstance(slot, str) else slot for slot in record['slots']]
        return record


@contextlib.contextmanager
def _damaged() -> Iterator[None]:
    try:
        yield
    except StateFileError as error:
        raise StateFileError(f'{error} {DAMAGED}') from None


def _check_layout(entries: Mapping[str, Entry], size: int) -> None:
    """The arrays must follow one another without gaps and fill the rest of the file."""
    position = 0
    for key, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        nbytes = math.prod(shape) * numpy.dtype(dtype).itemsize
        if begin != position or end - begin != nbytes:
            raise StateFileError(f'{show(key)} of shape {shape} and type {dtype} must be at bytes {position} to '
                                 f'{position + nbytes} of the data. Received: {begin} to {end}. {DAMAGED}')
        position = end
    if position != size:
        fault = 'truncated' if size < position else 'longer than when it was written'
        raise StateFileError(f'the data must have {position} bytes. Received: {size}. The file is {fault}: use another copy.')


def _read_array(file: BinaryIO, key: str, entry: Entry, crc32: str) -> numpy.ndarray:
    dtype, shape, begin, end = entry
    flat = numpy.empty(end - begin, numpy.uint8)
    view = memoryview(flat)
    crc = 0
    for i in range(0, len(view), _CHUNK):
        piece = view[i:i + _CHUNK]
        if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise StateFileError('the file became shorter while it was being read. Wait for its writer to finish, then read again.')
        crc = zlib.crc32(piece, crc)
    if f'{crc:08x}' != crc32:
        raise StateFileError(f'the CRC-32 of {show(key)} must be {crc32}. Received: {crc:08x}. {DAMAGED}')
    return flat.view(dtype).reshape(shape)


