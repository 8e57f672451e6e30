"""The file of optimizer states: one safetensors container in which every byte is covered by a checksum.

docs/FORMAT.md describes it for those who want to read it elsewhere. `write` and `read` are each other's inverse; what
`read` returns has been checked from the first byte to the last, and what it cannot vouch for it refuses with
`StateFileError`. A checkpoint is such a file that holds a `Run` too (docs/CHECKPOINTS.md). The layout is written here and
not by the safetensors package, because that package can neither stream arrays one at a time, nor sign its own header, nor
refuse repeated keys. Its files and ours are the same format: ``safetensors.numpy.load_file`` reads them.
"""
import collections
import contextlib
import errno
import hashlib
import json
import math
import os
import re
import reprlib
import secrets
import stat
import struct
import zlib
from types import ModuleType
from typing import Any, BinaryIO, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Union

import numpy

from .errors import StateFileError
from .neutral import Array, OptimizerStates, ParameterInfo, Run, Weight, chunks
from .progress import opened

fcntl: Optional[ModuleType]
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ['CHECKPOINT', 'FORMAT', 'VERSION', 'is_container', 'read', 'read_checkpoint', 'read_manifest', 'remove_leftovers',
           'replacing', 'write']

FORMAT = 'gluon_optim.states'
CHECKPOINT = 'gluon_optim.checkpoint'
VERSION = 1
MAX_HEADER = 32 << 20  # some 40 000 parameters; more is refused before it is parsed

# The signature stands at a fixed place, so that the header can be checked before any of it is parsed.
_START = b'{"__metadata__":{"gluon_optim":"{\\"header_sha256\\":\\"'
_UNSIGNED = b'0' * 64
_SIGNATURE = slice(8 + len(_START), 8 + len(_START) + 64)
_DTYPES = {'F16': 'float16', 'F32': 'float32', 'F64': 'float64', 'I8': 'int8', 'I16': 'int16', 'I32': 'int32',
           'I64': 'int64', 'U8': 'uint8', 'U16': 'uint16', 'U32': 'uint32', 'U64': 'uint64'}
_CODES = {name: code for code, name in _DTYPES.items()}
_WEIGHT_DTYPES = (*_CODES, 'bool', 'bfloat16')  # of weights, which are not in the file: what frameworks can have
_CHUNK = 1 << 20
_DAMAGED = 'The file is damaged or was edited: take another copy of it.'

Entry = Tuple[str, Tuple[int, ...], int, int]  # dtype, shape, begin, end
Path = Union[str, 'os.PathLike[str]']


# Writing

def write(path: Path, states: OptimizerStates, run: Optional[Run] = None) -> None:
    """Write ``states``, with a ``run`` as a checkpoint, to ``path``.

    Afterwards the whole new file is there, or, after any error, what was there before.
    Arrays are written one by one and copied in pieces of at most 1 MiB. An existing file's permission bits are kept; a
    symbolic link keeps pointing to the file that it names.

    Raises StateFileError for states that the format cannot hold, OSError where the file system refuses.

    >>> import tempfile
    >>> empty = OptimizerStates('adamw', {'learning_rate': 0.1}, 0, [], {}, {})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(folder + '/empty.states', empty)
    ...     read(folder + '/empty.states').hypers
    {'learning_rate': 0.1}
    """
    try:
        arrays = _arrays(states, run)
        manifest = _manifest(states, run, arrays)
        entries = _entries(arrays)
        header = _header(manifest, entries)
        _check(_loads(_dumps(manifest).encode()), entries)  # what is written can be read
    except (StateFileError, TypeError, ValueError, RecursionError) as error:
        raise StateFileError(f'Cannot write {os.fspath(path)!r}: {error}') from None
    with replacing(path) as file:
        file.seek(len(header))  # the checksums in the header are known when the arrays have been written
        for key, array in arrays.items():
            crc = 0
            for chunk in chunks(array):
                crc = zlib.crc32(chunk, crc)
                file.write(chunk)
            if file.tell() != len(header) + entries[key][3]:
                raise StateFileError(f'Cannot write {key!r}: its size changed meanwhile. Do not touch states while they are saved.')
            manifest['crc32'][key] = f'{crc:08x}'
        file.seek(0)
        file.write(_header(manifest, entries))


def _arrays(states: OptimizerStates, run: Optional[Run]) -> Dict[str, Array]:
    """All arrays under their keys, in file order: wide elements first, so that each array is aligned."""
    arrays: Dict[str, Array] = {}
    for name in states.names:
        for slot, array in (states.slots.get(name) or {}).items():
            arrays[f'{name}/{slot}'] = array
        if name in states.master:
            arrays[f'{name}/master'] = states.master[name]
    arrays.update((f'_optimizer/{variable}', array) for variable, array in states.variables.items())
    for weight in run.weights if run else ():
        arrays.update(zip(_weight_keys(weight.name, len(weight.copies)), weight.copies))
    return dict(sorted(arrays.items(), key=lambda item: -numpy.dtype(item[1].dtype).itemsize))


def _weight_keys(name: str, copies: int) -> List[str]:
    return [f'_copies/{k}/{name}' if k else f'_parameters/{name}' for k in range(copies)]


def _manifest(states: OptimizerStates, run: Optional[Run], arrays: Mapping[str, Array]) -> Dict[str, Any]:
    strangers = sorted({*states.counts, *states.slots, *states.master} - set(states.names))
    if strangers:
        raise StateFileError(f'counts, slots and masters must belong to parameters. Received: {strangers!r}, '
                             f'which are not among the names {states.names!r}.')
    return {
        'header_sha256': _UNSIGNED.decode(),
        'format': CHECKPOINT if run else FORMAT,
        'version': VERSION,
        'producer': dict(states.producer),
        'optimizer': states.optimizer,
        'hypers': _plain(states.hypers, 'hypers'),
        'num_update': _plain(states.num_update, 'num_update'),
        'scheduler': _plain(states.scheduler, 'scheduler'),
        'loss_scaler': _plain(states.loss_scaler, 'loss_scaler'),
        'parameters': [{
            'name': p.name,
            'full_name': p.full_name,
            'shape': _plain(p.shape, p.name),
            'dtype': p.dtype,
            'lr_mult': _plain(p.lr_mult, p.name),
            'wd_mult': _plain(p.wd_mult, p.name),
            'count': _plain(states.counts.get(p.name, 0), p.name),
            'slots': list(states.slots[p.name]) if p.name in states.slots else None,
            'master': p.name in states.master,
        } for p in states.parameters],
        'variables': list(states.variables),
        'crc32': dict.fromkeys(arrays, '0' * 8),
        **({'run': _run_record(run)} if run else {}),
    }


def _run_record(run: Run) -> Dict[str, Any]:
    record = {name: _plain(getattr(run, name), name) for name in ('step', 'epoch', 'batch', 'metrics', 'random', 'extra')}
    return dict(record, weights=[{'name': w.name, 'full_name': w.full_name, 'copies': len(w.copies)} for w in run.weights])


def _plain(value: Any, where: str) -> Any:
    """``value`` as JSON has it, or an error that names the attribute which JSON cannot hold."""
    if isinstance(value, numpy.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise StateFileError(f'{where} must be a finite number. Received: {value!r}.')
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(x, where) for x in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(x, f'{where}.{key}') for key, x in value.items()}
    raise StateFileError(f'{where} must consist of numbers, strings, lists and dictionaries with string keys. '
                         f'Received: {value!r} of type {type(value).__name__}.')


def _entries(arrays: Mapping[str, Array]) -> Dict[str, Entry]:
    entries: Dict[str, Entry] = {}
    end = 0
    for key, array in arrays.items():
        dtype, shape = numpy.dtype(array.dtype), tuple(map(int, array.shape))
        if dtype.name not in _CODES:
            raise StateFileError(f'{key!r} must have one of the types {", ".join(_CODES)}. Received: {dtype.name}.')
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[key] = dtype.name, shape, begin, end
    return entries


def _header(manifest: Mapping[str, Any], entries: Mapping[str, Entry]) -> bytes:
    """The signed header with its length before it, padded so that the arrays begin at a multiple of 8."""
    tensors = {key: {'dtype': _CODES[dtype], 'shape': list(shape), 'data_offsets': [begin, end]}
               for key, (dtype, shape, begin, end) in entries.items()}
    text = _dumps({'__metadata__': {'gluon_optim': _dumps(manifest)}, **tensors}).encode()
    text += b' ' * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise StateFileError(f'the header may have up to {MAX_HEADER} bytes. {len(entries)} arrays need {len(text)}.')
    return _signed(struct.pack('<Q', len(text)) + text)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':'))


def _signed(header: bytes) -> bytes:
    unsigned = header[:_SIGNATURE.start] + _UNSIGNED + header[_SIGNATURE.stop:]
    return header[:_SIGNATURE.start] + hashlib.sha256(unsigned).hexdigest().encode() + header[_SIGNATURE.stop:]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends, and vanishes when it fails."""
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    mode = _mode_of(path)
    temporary = os.path.join(folder, f'.{name[:64]}.{secrets.token_hex(8)}.tmp')
    claim = None
    try:
        # not tempfile.mkstemp: the kernel applies the umask to this one
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, 'O_BINARY', 0), 0o666)
        with os.fdopen(descriptor, 'wb', _CHUNK) as file:
            claim = _claim(descriptor)
            if mode is not None:
                os.chmod(temporary, mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename in (None, temporary):
            error.filename = path  # 'No space left on device', and where
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        if claim is not None:
            os.close(claim)
    _sync_folder(folder)


def _claim(descriptor: int) -> Optional[int]:
    """A second descriptor, which marks a temporary file as its writer's until it is closed, or the writer dies.

    None where somebody else has it, where the file system knows no locks, and on Windows, which keeps files that are open.
    """
    if fcntl is None:
        return None
    claim = os.dup(descriptor)
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(claim)
        return None
    return claim


def remove_leftovers(folder: Path, of: 're.Pattern[str]') -> None:
    """Delete what killed writers left of files in ``folder`` whose names match ``of``; what a living one writes stays."""
    for name in os.listdir(folder):
        match = re.fullmatch(r'\.(.*)\.[0-9a-f]{16}\.tmp', name)
        if match is None or not of.fullmatch(match[1]):
            continue
        with contextlib.suppress(OSError):  # its writer may finish, or another process clean up, at this moment
            temporary = os.path.join(folder, name)
            with open(temporary, 'r+b') as file:
                claim = _claim(file.fileno())
            if claim is not None or fcntl is None:
                os.unlink(temporary)
            if claim is not None:
                os.close(claim)


def _mode_of(path: str) -> Optional[int]:
    """The permission bits of the file at ``path``, None if there is none."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise StateFileError(f'Cannot write {path!r}: it must be a file or not exist. Received: a folder or a device.')
    return stat.S_IMODE(mode)


def _sync_folder(folder: str) -> None:
    """Make the renaming durable, where folders can be synchronised."""
    if not hasattr(os, 'O_DIRECTORY'):
        return  # Windows
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# Reading

def is_container(path: Path) -> bool:
    """Whether the file begins as ours do. Says nothing about its soundness: `read` does."""
    if not os.path.isfile(path):
        return False
    with open(path, 'rb') as file:
        return file.read(8 + len(_START))[8:] == _START


def read(path: Path) -> OptimizerStates:
    """The states in the file at ``path``, read once and checked to the last byte.

    Raises StateFileError for a file that is not complete and sound, OSError where it cannot be opened or read.
    """
    return _opened(path, _read)[0]


def read_checkpoint(path: Path) -> Tuple[OptimizerStates, Optional[Run]]:
    """The states and the run in a checkpoint; no run in a file of states. Raises as `read` does."""
    return _opened(path, _read)


def read_manifest(path: Path) -> Dict[str, Any]:
    """The manifest alone, after its signature has been checked; the arrays have not been read. Raises as `read` does."""
    return _opened(path, lambda file: _parse(_read_header(file, os.fstat(file.fileno()).st_size))[0])


def _opened(path: Path, reader: Callable[[BinaryIO], Any]) -> Any:
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait forever
        raise StateFileError(f'Cannot read {os.fspath(path)!r}: it must be a file. Received: a folder, a pipe or a device.')
    with opened(path) as file:
        try:
            return reader(file)
        except StateFileError as error:
            raise type(error)(f'Cannot read {os.fspath(path)!r}: {error}') from None


def _read(file: BinaryIO) -> Tuple[OptimizerStates, Optional[Run]]:
    size = os.fstat(file.fileno()).st_size
    header = _read_header(file, size)
    manifest, entries = _parse(header)
    _check(manifest, entries)
    _check_layout(entries, size - len(header))
    arrays = {}
    for key, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        arrays[key] = _read_array(file, key, entry, manifest['crc32'][key])
    if file.read(1):
        raise StateFileError('the file grew while it was read. Wait for its writer, then read again.')
    return _states(manifest, arrays), _run(manifest, arrays)


def _read_header(file: BinaryIO, size: int) -> bytes:
    """The first bytes of the file, length prefix included, after their signature has been checked."""
    prefix = file.read(8)
    length = struct.unpack('<Q', prefix)[0] if len(prefix) == 8 else 0
    start = file.read(len(_START)) if length else b''
    if start != _START:
        raise StateFileError('it is no container of gluon_optim: the file must begin with a length of 8 bytes and '
                             f'{_START.decode()!r}. Received: {(prefix + start)[:16]!r}... in a file of {size} bytes. '
                             f'Read the file with the program that wrote it, or take another copy.')
    if not len(_START) + 64 < length <= min(MAX_HEADER, size - 8):
        raise StateFileError(f'the header must fit into the file, and into {MAX_HEADER} bytes. Received: a header of {length} '
                             f'bytes in a file of {size}. The file is cut off or damaged: take another copy of it.')
    header = prefix + start + file.read(length - len(start))
    if len(header) != 8 + length or _signed(header) != header:
        raise StateFileError(f'the SHA-256 of the header must be the one that it states. Received: another. {_DAMAGED}')
    return header


def _parse(header: bytes) -> Tuple[Dict[str, Any], Dict[str, Entry]]:
    """The manifest, and of each array what safetensors says about it."""
    tensors = _loads(header[8:])
    metadata = tensors.pop('__metadata__', None)
    _check_record(metadata, {'gluon_optim': _text}, 'the metadata')
    manifest = _loads(metadata['gluon_optim'].encode())
    if not isinstance(manifest, dict) or manifest.get('format') not in (FORMAT, CHECKPOINT):
        raise StateFileError(f'the manifest must be of the format {FORMAT!r} or {CHECKPOINT!r}. {_DAMAGED}')
    if manifest.get('version') != VERSION:
        raise StateFileError(f'the version of the format must be {VERSION}. Received: {_show(manifest.get("version"))}. '
                             'Install the gluon_optim that wrote the file, or a newer one.')
    entries = {}
    for key, tensor in tensors.items():
        _check_record(tensor, _TENSOR, _show(key))
        entries[key] = (_DTYPES[tensor['dtype']], tuple(tensor['shape']), *tensor['data_offsets'])
    return manifest, entries


def _loads(text: bytes) -> Any:
    """JSON without repeated keys, NaN, infinities, numbers beyond 64 bits, or text that is not UTF-8."""
    def unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise StateFileError(f'a key of the header stands there twice. {_DAMAGED}')
        return values

    def number(kind: Callable[[str], Any]) -> Callable[[str], Any]:
        def parse(digits: str) -> Any:
            value = kind(digits) if len(digits) <= 32 else math.inf  # converting a million digits takes seconds
            if not -2**63 <= value < 2**63 and (kind is int or math.isinf(value)):
                raise StateFileError('a number in the header must be finite and fit into 64 bits. '
                                     f'Received: {digits[:40]}. {_DAMAGED}')
            return value
        return parse

    def constant(name: str) -> None:
        raise StateFileError(f'a number in the header must be finite. Received: {name}. {_DAMAGED}')

    try:
        value = json.loads(text.decode('utf-8'), object_pairs_hook=unique, parse_int=number(int), parse_float=number(float),
                           parse_constant=constant)
        json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs fail here, and too deep a nesting
    except StateFileError:
        raise
    except (ValueError, RecursionError) as error:
        received = f'{type(error).__name__}: {str(error)[:200]}'
        raise StateFileError(f'the header must be JSON in UTF-8. Received: {received}. {_DAMAGED}') from None
    return value


def _check_layout(entries: Mapping[str, Entry], size: int) -> None:
    """The arrays must follow one another without holes, and fill the rest of the file."""
    position = 0
    for key, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        nbytes = math.prod(shape) * numpy.dtype(dtype).itemsize
        if begin != position or end - begin != nbytes:
            raise StateFileError(f'{_show(key)} of shape {shape} and type {dtype} must be at bytes {position} to '
                                 f'{position + nbytes} of the data. Received: {begin} to {end}. {_DAMAGED}')
        position = end
    if position != size:
        fault = 'cut off' if size < position else 'longer than it was written'
        raise StateFileError(f'the data must have {position} bytes. Received: {size}. The file is {fault}: take another copy.')


def _read_array(file: BinaryIO, key: str, entry: Entry, crc32: str) -> numpy.ndarray:
    dtype, shape, begin, end = entry
    flat = numpy.empty(end - begin, numpy.uint8)
    view = memoryview(flat)
    crc = 0
    for i in range(0, len(view), _CHUNK):
        piece = view[i:i + _CHUNK]
        if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise StateFileError('the file became shorter while it was read. Wait for its writer, then read again.')
        crc = zlib.crc32(piece, crc)
    if f'{crc:08x}' != crc32:
        raise StateFileError(f'the CRC-32 of {_show(key)} must be {crc32}. Received: {crc:08x}. {_DAMAGED}')
    return flat.view(dtype).reshape(shape)


def _states(manifest: Mapping[str, Any], arrays: Mapping[str, numpy.ndarray]) -> OptimizerStates:
    records = manifest['parameters']
    return OptimizerStates(
        optimizer=manifest['optimizer'],
        hypers=manifest['hypers'],
        num_update=manifest['num_update'],
        parameters=[ParameterInfo(r['name'], r['full_name'], tuple(r['shape']), r['dtype'], r['lr_mult'], r['wd_mult'])
                    for r in records],
        counts={r['name']: r['count'] for r in records},
        slots={r['name']: {slot: arrays[f'{r["name"]}/{slot}'] for slot in r['slots']}
               for r in records if r['slots'] is not None},
        master={r['name']: arrays[f'{r["name"]}/master'] for r in records if r['master']},
        scheduler=manifest['scheduler'],
        variables={variable: arrays[f'_optimizer/{variable}'] for variable in manifest['variables']},
        loss_scaler=manifest['loss_scaler'],
        producer=manifest['producer'],
    )


def _run(manifest: Mapping[str, Any], arrays: Mapping[str, numpy.ndarray]) -> Optional[Run]:
    if 'run' not in manifest:
        return None
    record = dict(manifest['run'])
    record['weights'] = [Weight(w['name'], w['full_name'], [arrays[key] for key in _weight_keys(w['name'], w['copies'])])
                         for w in record['weights']]
    return Run(**record)


# What a manifest must look like: checked by the reader, and by the writer before anything is written

def _check(manifest: Any, entries: Mapping[str, Entry]) -> None:
    """Refuse a manifest with missing, unknown or impossible contents, or that lists other arrays than ``entries``."""
    _check_record(manifest, _CHECKPOINT if manifest['format'] == CHECKPOINT else _MANIFEST, 'the manifest')
    listed = [f'_optimizer/{variable}' for variable in manifest['variables']]
    for record in manifest['parameters']:
        _check_record(record, _PARAMETER, 'a parameter of the manifest')
        listed += [f'{record["name"]}/{slot}' for slot in record['slots'] or ()]
        if record['master']:
            listed.append(f'{record["name"]}/master')
            _, shape, _, _ = entries.get(listed[-1], (None, None, 0, 0))
            if shape is not None and shape != tuple(record['shape']):
                raise StateFileError(f'{_show(listed[-1])} must have the shape {record["shape"]} of its parameter. '
                                     f'Received: {list(shape)}.')
    listed += _check_run(manifest['run'], entries) if 'run' in manifest else []
    for what, keys in (('names of parameters', [r['name'] for r in manifest['parameters']]), ('arrays of the manifest', listed)):
        repeated = [key for key, number in collections.Counter(keys).items() if number > 1]
        if repeated:
            raise StateFileError(f'the {what} must differ. Received twice: {_show(repeated)}.')
    for what, given in (('checksums', set(manifest['crc32'])), ('arrays in the file', set(entries))):
        odd = sorted(given ^ set(listed))
        if odd:
            raise StateFileError(f'the {what} must be those that the manifest lists. In one of the two only: {_show(odd)}.')


def _check_run(run: Any, entries: Mapping[str, Entry]) -> List[str]:
    """The keys of the arrays that the run of a checkpoint lists."""
    _check_record(run, _RUN, 'the run')
    listed: List[str] = []
    for record in run['weights']:
        _check_record(record, _WEIGHT, 'a weight of the manifest')
        if len(listed) + record['copies'] > len(entries):
            raise StateFileError(f'the weights must be arrays of the file. Received: more than its {len(entries)}. {_DAMAGED}')
        keys = _weight_keys(record['name'], record['copies'])
        if len({entries[key][:2] for key in keys if key in entries}) > 1:
            raise StateFileError(f'the copies of {_show(record["name"])} must have one shape and type. {_DAMAGED}')
        listed += keys
    return listed


Check = Callable[[Any], bool]
_show = reprlib.Repr().repr  # a corrupt value can be of any size


def _check_record(record: Any, schema: Mapping[str, Check], where: str) -> None:
    if not isinstance(record, dict) or set(record) != set(schema):
        received = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise StateFileError(f'{where} must have the keys {sorted(schema)} and no others. Received: {_show(received)}.')
    for key, check in schema.items():
        if not check(record[key]):
            raise StateFileError(f'{key!r} of {where} must be {(check.__doc__ or "").strip()}. Received: {_show(record[key])}.')


def _one_of(values: Any) -> Check:
    def check(x: Any) -> bool:
        return isinstance(x, str) and x in values
    check.__doc__ = f'one of {", ".join(values)}'
    return check


def _optional(check: Check) -> Check:
    def optional(x: Any) -> bool:
        return x is None or check(x)
    optional.__doc__ = f'{check.__doc__} or null'
    return optional


def _text(x: Any) -> bool:
    """text"""
    return isinstance(x, str)


def _word(x: Any) -> bool:
    """printable text"""
    return isinstance(x, str) and x.isprintable() and x != ''


def _name(x: Any) -> bool:
    """printable text; between slashes neither nothing nor '.' nor '..', before the first one not '_optimizer' or the like"""
    return _word(x) and not {'', '.', '..'} & set(x.split('/')) and x.split('/')[0] not in _RESERVED


def _key(x: Any) -> bool:
    """printable text without a slash"""
    return _word(x) and '/' not in x


def _keys(x: Any) -> bool:
    """a list of printable texts without a slash"""
    return isinstance(x, list) and all(map(_key, x))


def _slots(x: Any) -> bool:
    """a list of printable texts without a slash, none of them 'master'"""
    return _keys(x) and 'master' not in x


def _numbers(x: Any) -> bool:
    """an object of numbers"""
    return isinstance(x, dict) and all(map(_number, x.values()))


def _positive(x: Any) -> bool:
    """a whole number from 1 to 2**53"""
    return _natural(x) and x > 0


def _natural(x: Any) -> bool:
    """a whole number from 0 to 2**53"""
    return type(x) is int and 0 <= x <= 2**53


def _number(x: Any) -> bool:
    """a number"""
    return type(x) in (int, float)


def _flag(x: Any) -> bool:
    """true or false"""
    return type(x) is bool


def _shape(x: Any) -> bool:
    """up to 32 whole numbers"""
    # the product over nonzero sizes too must be one that NumPy can count
    return isinstance(x, list) and len(x) <= 32 and all(map(_natural, x)) and math.prod(max(n, 1) for n in x) <= 2**53


def _range(x: Any) -> bool:
    """two whole numbers"""
    return isinstance(x, list) and len(x) == 2 and all(map(_natural, x))


def _mapping(x: Any) -> bool:
    """an object"""
    return isinstance(x, dict)


def _texts(x: Any) -> bool:
    """an object of printable texts"""
    return isinstance(x, dict) and all(map(_word, x)) and all(map(_word, x.values()))


def _list(x: Any) -> bool:
    """a list"""
    return isinstance(x, list)


def _scheduler(x: Any) -> bool:
    """an object of the two keys 'class', a printable text, and 'attributes', an object"""
    return isinstance(x, dict) and set(x) == {'class', 'attributes'} and _word(x['class']) and _mapping(x['attributes'])


def _signature(x: Any) -> bool:
    """64 lower-case hexadecimal digits"""
    return isinstance(x, str) and len(x) == 64 and set(x) <= set('0123456789abcdef')


def _checksums(x: Any) -> bool:
    """an object of texts of 8 lower-case hexadecimal digits"""
    return isinstance(x, dict) and all(isinstance(v, str) and len(v) == 8 and set(v) <= set('0123456789abcdef') for v in x.values())


_MANIFEST: Dict[str, Check] = {
    'header_sha256': _signature, 'format': _one_of([FORMAT]), 'version': _natural, 'producer': _texts, 'optimizer': _word,
    'hypers': _mapping, 'num_update': _natural, 'scheduler': _optional(_scheduler), 'loss_scaler': _optional(_mapping),
    'parameters': _list, 'variables': _keys, 'crc32': _checksums,
}
_TENSOR: Dict[str, Check] = {'dtype': _one_of(_DTYPES), 'shape': _shape, 'data_offsets': _range}
_PARAMETER: Dict[str, Check] = {
    'name': _name, 'full_name': _word, 'shape': _shape, 'dtype': _one_of(_WEIGHT_DTYPES), 'lr_mult': _number, 'wd_mult': _number,
    'count': _natural, 'slots': _optional(_slots), 'master': _flag,
}
_CHECKPOINT: Dict[str, Check] = {**_MANIFEST, 'format': _one_of([CHECKPOINT]), 'run': _mapping}
_RUN: Dict[str, Check] = {
    'step': _optional(_natural), 'epoch': _optional(_natural), 'batch': _optional(_natural), 'metrics': _numbers,
    'random': _optional(_mapping), 'extra': _mapping, 'weights': _list,
}
_WEIGHT: Dict[str, Check] = {'name': _name, 'full_name': _word, 'copies': _positive}
_RESERVED = ('_optimizer', '_parameters', '_copies', '__metadata__')  # first parts of other keys
