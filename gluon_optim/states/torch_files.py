"""PyTorch's own files, of `torch.save`, read without PyTorch and without executing anything.

`read` makes plain values of a file, with a `Tensor` for each tensor; `arrays` makes NumPy's arrays of these, as long as the file
is open. The bytes of tensors stay in the file until then. Both forms can be read: the zip file, and what PyTorch wrote before
version 1.6.
"""
import re
from typing import Any, Dict, NamedTuple, NoReturn, Optional, Tuple

import numpy

from .errors import UnreadableFile
from .file_part import FilePart, converted, product, stored_type
from .files import MAX_MEMBERS, TORCH_MAGIC, ZIP_MAGIC, OpenFile
from .mxnet_files.inert_pickle import NAMES, Machine, Name
from .zip_files import STREAMED, Member, check_stored, directory

__all__ = ['Tensor', 'arrays', 'read']

MAX_STEPS = 2_000_000   # instructions of a pickle: some 60 000 tensors
MAX_VALUES = 500_000    # that `arrays` walks through
MAX_DIMENSIONS = 32     # NumPy 1 has no more
MAX_DEPTH = 50

# types that can be read: PyTorch's name, and NumPy's as `FilePart.raw` takes it; and the types of its storages
TYPES = {'float32': '<f4', 'float64': '<f8', 'float16': '<f2', 'bfloat16': 'bfloat16', 'int64': '<i8', 'int32': '<i4',
         'int16': '<i2', 'int8': 'i1', 'uint8': 'u1', 'bool': '?', 'uint16': '<u2', 'uint32': '<u4', 'uint64': '<u8'}
STORAGES = {'Float': 'float32', 'Double': 'float64', 'Half': 'float16', 'BFloat16': 'bfloat16', 'Long': 'int64', 'Int': 'int32',
            'Short': 'int16', 'Char': 'int8', 'Byte': 'uint8', 'Bool': 'bool', 'Untyped': ''}


class Storage(NamedTuple):
    """Memory that tensors look at."""

    archive: '_Archive'
    key: str
    dtype: str      # '' for bytes
    size: int       # in elements


class Tensor:
    """Stands for a tensor of the type that PyTorch calls ``dtype``; without ``storage`` it has no values."""

    __slots__ = ('dtype', 'offset', 'shape', 'storage', 'stride')

    def __init__(self, dtype: str, shape: Tuple[int, ...], stride: Tuple[int, ...] = (), offset: int = 0,
                 storage: Optional[Storage] = None):
        self.dtype, self.shape, self.stride, self.offset, self.storage = dtype, shape, stride, offset, storage

    def data_ptr(self) -> Any:
        """What tensors that begin at the same place have in common, 0 for one without values."""
        return (self.storage.key, self.offset) if self.storage is not None and product(self.shape) else 0


def read(file: OpenFile) -> Any:
    """The value in a file of `torch.save`: None, bool, int, float, str, list, tuple, dict, and `Tensor`.

    Raises UnreadableFile for a file that is damaged, is something else, or names anything besides tensors.
    """
    source = file.part()
    if file.head.startswith(ZIP_MAGIC):
        return _Zipped(source).value
    if file.head.startswith(TORCH_MAGIC):
        return _Sequence(source).value
    source.fail(f'the file must be one of torch.save. Received: one that begins with {file.head[:16]!r}.', 0)


def arrays(value: Any, file: OpenFile) -> Any:
    """``value``, of ``file``, with an array in place of each `Tensor` in it; bfloat16, which NumPy lacks, becomes float32."""
    visits = 0

    def fail(message: str) -> NoReturn:
        raise UnreadableFile(f'Cannot read {file.path!r}: {message}')

    def walk(value: Any, depth: int) -> Any:
        nonlocal visits
        visits += 1
        if visits > MAX_VALUES or depth > MAX_DEPTH:  # one list can be there very often, or in itself
            fail(f'there must be up to {MAX_VALUES} values, nested up to {MAX_DEPTH} levels. Received: more.')
        if isinstance(value, Tensor):
            if value.storage is None:
                fail('a tensor has no values: it was on the meta device when it was saved.')
            return value.storage.archive.array(value, value.storage)
        if isinstance(value, dict):
            return {key: walk(entry, depth + 1) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([walk(entry, depth + 1) for entry in value])
        return value.path if isinstance(value, Name) else value
    return walk(value, 0)


# Where the bytes are

class _Archive:
    """A file, and where in it the storages are: key -> first byte and number of bytes."""

    value: Any

    def __init__(self, source: FilePart):
        self.source, self.places = source, {}  # type: FilePart, Dict[str, Tuple[int, int]]

    def array(self, tensor: Tensor, storage: Storage) -> numpy.ndarray:
        what = f'a tensor of shape {tensor.shape}'
        if tensor.dtype not in TYPES:
            self.source.fail(f'{what} must be of one of the types {", ".join(TYPES)}. Received: {tensor.dtype}.')
        if storage.key not in self.places:
            self.source.fail(f'the values {storage.key[:60]!r} of {what} are not there.')
        begin, size = self.places[storage.key]
        dtype, width = TYPES[tensor.dtype], stored_type(TYPES[tensor.dtype]).itemsize
        elements = product(tensor.shape)
        span = 1 + sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride)) if elements else 0
        if (tensor.offset + span) * width > size:
            self.source.fail(f'{what} reaches to element {tensor.offset + span} of {size // width}.', begin)
        part = self.source.part(begin + tensor.offset * width, span * width)
        flat = converted(part.raw(dtype, (span,), what), dtype)
        if tensor.stride == _contiguous(tensor.shape) or not elements:
            return flat.reshape(tensor.shape)
        self.source.charge(elements * flat.itemsize)
        steps = [step * flat.itemsize for step in tensor.stride]
        return numpy.ascontiguousarray(numpy.lib.stride_tricks.as_strided(flat, tensor.shape, steps)).reshape(tensor.shape)


def _contiguous(shape: Tuple[int, ...]) -> Tuple[int, ...]:
    steps, step = [], 1
    for length in reversed(shape):
        steps.append(step)
        step *= length
    return tuple(reversed(steps))


class _Zipped(_Archive):
    """The zip file of PyTorch 1.6 and later: data.pkl, and data/<key> for each storage."""

    def __init__(self, source: FilePart):
        super().__init__(source)
        members, end = directory(source, MAX_MEMBERS)
        found: Dict[str, Tuple[int, int]] = {}
        for member, limit in zip(members, [member.offset for member in members[1:]] + [end]):
            name = member.name.decode('utf-8', 'replace')
            if name in found:
                source.fail(f'the zip member {name!r} is there twice.', member.offset)
            found[name] = _place(source, member, limit)
        pickles = [name for name in found if name.endswith('/data.pkl')]
        if len(pickles) != 1:
            source.fail(f'the zip file must be one of torch.save, with one data.pkl. Received: {len(pickles)}.', 0)
        folder = pickles[0][:-len('data.pkl')]
        begin, size = found.get(folder + 'byteorder', (0, 0))
        order = source.part(begin, min(size, 16)).take(min(size, 16), 'the byte order')
        if order not in (b'', b'little'):
            source.fail(f'the byte order must be little. Received: {order!r}.', begin)
        prefix = folder + 'data/'
        self.places = {name[len(prefix):]: place for name, place in found.items() if name.startswith(prefix)}
        self.value = TorchMachine(source.part(*found[pickles[0]]), self).run()


def _place(source: FilePart, member: Member, limit: int) -> Tuple[int, int]:
    """Where the bytes of a member are, which must not reach to the byte ``limit``, where the next one begins."""
    check_stored(source, member)
    part = source.part(member.offset, limit - member.offset)
    magic, method, name_size, extra_size = part.unpack('4s4xH16x2H', 'a zip member')
    if (magic, method, part.take(name_size, 'a name')) != (b'PK\3\4', 0, member.name):
        part.fail('a zip member differs from its entry in the directory.', member.offset)
    part.take(extra_size, 'extra fields')
    begin = part.at()
    if begin + member.size + (16 if member.flags & STREAMED else 0) > limit:
        part.fail(f'a zip member of {member.size} bytes reaches into the next.', begin)
    return begin, member.size


class _Sequence(_Archive):
    """What PyTorch wrote before: four pickles, the keys of the storages as a fifth, then each with the number of its elements."""

    def __init__(self, source: FilePart):
        super().__init__(source)
        source.file.seek(len(TORCH_MAGIC))
        version, system = self._next(), self._next()
        if version != 1001 or not isinstance(system, dict) or system.get('little_endian') is not True:
            source.fail('the file must be one of torch.save, of version 1001, and little-endian.', 0)
        machine = TorchMachine(self._rest(), self)
        self.value = machine.run(alone=False)
        keys = self._next()
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            source.fail('the keys of the storages must be a list of texts.')
        for key in keys:
            count, = source.unpack('q', 'the size of a storage')
            width = machine.widths.get(key, 0)
            size = count * width
            source.need(size, 'a storage')
            if count < 0 or not width:
                source.fail('a storage must belong to a tensor, and have a size.')
            self.places[key] = source.at(), size
            source.file.seek(source.at() + size)

    def _rest(self) -> FilePart:
        return self.source.part(self.source.at(), self.source.end - self.source.at())

    def _next(self) -> Any:
        return TorchMachine(self._rest(), self).run(alone=False)


# The pickle

class TorchMachine(Machine):
    """A pickle of `torch.save`: the names below are what PyTorch itself writes for state_dicts and what stands beside them."""

    origin = 'torch.save'
    max_steps = MAX_STEPS
    names = {
        **{name: kind for name, kind in NAMES.items() if kind in ('dtype', 'scalar', 'encode')},
        'collections.OrderedDict': 'dictionary', 'collections.Counter': 'dictionary',
        'torch.Size': 'size',
        'torch.device': 'device',
        **{f'torch._utils._rebuild_tensor{version}': 'tensor' for version in ('', '_v2', '_v3')},
        'torch._utils._rebuild_meta_tensor_no_storage': 'meta', 'torch._tensor._rebuild_from_type_v2': 'subclass',
        'torch._utils._rebuild_parameter': 'parameter', 'torch._utils._rebuild_parameter_with_state': 'parameter',
        'torch.Tensor': 'type', 'torch.nn.parameter.Parameter': 'type',
        **{f'torch.{name}Storage': 'storage' for name in STORAGES}, 'torch.storage.UntypedStorage': 'storage',
    }

    def __init__(self, source: FilePart, archive: _Archive):
        super().__init__(source, ())
        self.archive = archive
        self.widths: Dict[str, int] = {}  # bytes of an element of each storage that was named

    def kind_of_class(self, path: str) -> str:
        return 'type' if re.fullmatch(r'torch\.[a-z]+\d+\w{0,9}|torch\.bool', path, re.ASCII) else ''

    def fail_name(self, path: str) -> NoReturn:
        self.fail(f'the file names {path!r}, which a state_dict does not contain. Nothing was imported or run. Save the state_dict '
                  'alone: torch.save(optimizer.state_dict(), path), or that of the model.')

    def make_dictionary(self, arguments: Tuple[Any, ...]) -> Optional[Dict[Any, Any]]:
        """OrderedDict() and Counter({...}); OrderedDict([[key, value], ...]) of Python 2."""
        if not arguments:
            return {}
        if len(arguments) != 1 or not isinstance(arguments[0], (dict, list)):
            return None
        pairs = arguments[0].items() if isinstance(arguments[0], dict) else arguments[0]
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], (str, int)) for pair in pairs):
            return None
        self.charge(2 * 40 * len(pairs))
        return dict(pairs)

    def make_size(self, arguments: Tuple[Any, ...]) -> Optional[Tuple[int, ...]]:
        return tuple(arguments[0]) if len(arguments) == 1 and _whole(arguments[0]) else None

    def make_device(self, arguments: Tuple[Any, ...]) -> Optional[str]:
        return ':'.join(map(str, arguments)) if arguments and all(isinstance(x, (str, int)) for x in arguments) else None

    def make_tensor(self, arguments: Tuple[Any, ...]) -> Optional[Tensor]:
        """(storage, offset, shape, stride, ...), in version 3 with the type as the seventh, as its storage is bytes."""
        storage, offset, shape, stride = arguments[:4] if len(arguments) > 3 else (None,) * 4
        if not isinstance(storage, Storage) or not _whole((offset,)) or not _whole(shape) or not _whole(stride):
            return None
        dtype = storage.dtype
        if not dtype:
            dtype = _type_of(arguments[6]) if len(arguments) > 6 else ''
        return self._tensor(dtype, shape, stride, offset, storage)

    def make_meta(self, arguments: Tuple[Any, ...]) -> Optional[Tensor]:
        if len(arguments) < 3 or not _whole(arguments[1]) or not _whole(arguments[2]):
            return None
        return self._tensor(_type_of(arguments[0]), arguments[1], arguments[2], 0, None)

    def _tensor(self, dtype: str, shape: Any, stride: Any, offset: int, storage: Optional[Storage]) -> Optional[Tensor]:
        if not dtype or len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
            return None
        return Tensor(dtype, tuple(shape), tuple(stride), offset, storage)

    def make_parameter(self, arguments: Tuple[Any, ...]) -> Optional[Tensor]:
        return arguments[0] if arguments and isinstance(arguments[0], Tensor) else None

    def make_subclass(self, arguments: Tuple[Any, ...]) -> Optional[Tensor]:
        """(function, type, its arguments, attributes) of a tensor with attributes of its own."""
        if len(arguments) != 4 or not isinstance(arguments[0], Name) or arguments[0].kind not in ('tensor', 'parameter', 'meta'):
            return None
        return self.calls[arguments[0].kind](self, arguments[2]) if isinstance(arguments[2], tuple) else None

    def persistent(self) -> None:
        """('storage', type, key, device, number of elements): one in another file, which for us is in this one."""
        given = self.pop()
        kinds = [type(part) for part in given] if isinstance(given, tuple) else []
        if (kinds[:5] != [str, Name, str, str, int] or given[0] != 'storage' or given[1].kind != 'storage' or given[4] < 0
                or given[5:] not in ((), (None,))):
            self.fail('the pickle refers to something else than the values of a tensor.')
        dtype = STORAGES[re.sub(r'.*\.|Storage$', '', given[1].path)]
        self.widths[given[2]] = stored_type(TYPES[dtype]).itemsize if dtype else 1
        self.push(Storage(self.archive, given[2], dtype, given[4]), 100)

    def build(self) -> None:
        """A dictionary can have attributes too, ``_metadata`` of a state_dict for one: nothing is made of them."""
        if isinstance(self.stack[-2] if len(self.stack) > self.bottom + 1 else None, (dict, Tensor)):
            self.pop()
        else:
            super().build()


def _whole(values: Any) -> bool:
    return isinstance(values, (tuple, list)) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _type_of(value: Any) -> str:
    return value.path.rpartition('.')[2] if isinstance(value, Name) and value.kind == 'type' else ''


TorchMachine.calls = {
    **{kind: call for kind, call in Machine.calls.items() if kind in ('dtype', 'scalar', 'encode')},
    'dictionary': TorchMachine.make_dictionary, 'size': TorchMachine.make_size, 'device': TorchMachine.make_device,
    'tensor': TorchMachine.make_tensor, 'meta': TorchMachine.make_meta, 'parameter': TorchMachine.make_parameter,
    'subclass': TorchMachine.make_subclass,
}
TorchMachine.instructions = {**Machine.instructions, b'Q': TorchMachine.persistent, b'b': TorchMachine.build}
