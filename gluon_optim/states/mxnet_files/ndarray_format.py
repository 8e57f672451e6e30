"""MXNet's bytes for arrays, read without MXNet: one NDArray, the list of `mx.nd.save`, the zip file of `npx.savez`.

Sizes that a file claims are compared with the bytes that are there, and with an allowance of memory (see `FilePart`), before
anything is allocated.
"""
import re
import zlib
from typing import Dict, List, Sequence, Tuple

import numpy

from ..file_part import FilePart, converted, octets, product
from ..zip_files import STREAMED, Member, check_stored, directory

__all__ = ['read_list', 'read_ndarray', 'read_npz']

LIST_MAGIC = 0x112
LEGACY, STORAGE_TYPES, NUMPY_SHAPES = 0xF993FAC8, 0xF993FAC9, 0xF993FACA  # older files begin with the number of dimensions
BFLOAT16 = 12
DTYPES = {0: '<f4', 1: '<f8', 2: '<f2', 3: 'u1', 4: '<i4', 5: 'i1', 6: '<i8', 7: '?', 8: '<i2', 9: '<u2', 10: '<u4', 11: '<u8',
          BFLOAT16: 'bfloat16'}  # by mshadow's type flags
DEVICES = {1: 'cpu', 2: 'gpu', 3: 'cpu_pinned', 5: 'cpu_shared'}
ROW_SPARSE, CSR = 1, 2
MAX_DIMENSIONS = 32  # NumPy 1 has no more
MAX_ARRAYS = 30_000  # a network has some thousand; so many take about half a second


# One NDArray

def read_ndarray(source: FilePart) -> numpy.ndarray:
    """One array as MXNet's `NDArray::Save` writes it, of any version, storage type and device; sparse ones become dense."""
    begin = source.at()
    magic, = source.unpack('I', 'the beginning of an array')
    if magic in (STORAGE_TYPES, NUMPY_SHAPES):
        storage, = source.unpack('i', 'a storage type')
        if storage not in (0, ROW_SPARSE, CSR):
            source.fail(f'the storage type must be 0 (dense), 1 (row_sparse) or 2 (csr). Received: {storage}.', begin + 4)
        if storage:
            _shape(source, 'q')  # of the stored values, but MXNet may write it too early; their number follows from the indices
        shape = _shape(source, 'q')
    else:
        if magic != LEGACY and magic > MAX_DIMENSIONS:
            source.fail(f'an array of MXNet cannot begin with {magic:#x}.', begin)
        storage = 0
        shape = _shape(source, 'q') if magic == LEGACY else source.unpack(f'{magic}I', 'a shape')
    if not shape and magic != NUMPY_SHAPES:
        source.fail('this entry is an NDArray without data (its parameter was never initialized).', begin)
    device, _ = source.unpack('ii', 'a device')
    if device not in DEVICES:
        source.fail(f'the device must be one of {DEVICES}. Received: {device}.', source.at() - 8)
    dtype = _dtype(source)
    if not storage:
        return source.array(dtype, shape, f'an array of shape {shape}')
    return _sparse(source, storage, dtype, shape)


def _shape(source: FilePart, code: str) -> Tuple[int, ...]:
    ndim, = source.unpack('i', 'a number of dimensions')
    if not -1 <= ndim <= MAX_DIMENSIONS:
        source.fail(f'an array can have up to {MAX_DIMENSIONS} dimensions. Received: {ndim}.', source.at() - 4)
    shape = source.unpack(f'{max(ndim, 0)}{code}', 'a shape')
    if ndim < 0 or min(shape, default=0) < 0:
        source.fail('this entry is an NDArray of unknown shape (its parameter was never initialized).')
    return shape


def _dtype(source: FilePart) -> str:
    flag, = source.unpack('i', 'a data type')
    if flag not in DTYPES:
        source.fail(f'the data type must be one of {DTYPES}. Received: {flag}.', source.at() - 4)
    return DTYPES[flag]


def _sparse(source: FilePart, storage: int, dtype: str, shape: Sequence[int]) -> numpy.ndarray:
    described = []
    for what in ('row numbers',) if storage == ROW_SPARSE else ('row pointers', 'column numbers'):
        index_dtype = _dtype(source)
        if index_dtype not in ('<i8', '<i4'):
            source.fail(f'the {what} of a sparse array must be int64 or int32. Received: {index_dtype}.', source.at() - 4)
        described.append((index_dtype, _shape(source, 'q'), f'{what} of a sparse array'))
    stored = (*described[-1][1], *(shape[1:] if storage == ROW_SPARSE else ()))
    values = source.array(dtype, stored, f'stored values of shape {stored}')
    return dense(source, shape, values, *[source.array(*description) for description in described])


def dense(source: FilePart, shape: Sequence[int], values: numpy.ndarray, *indices: numpy.ndarray) -> numpy.ndarray:
    """The dense form of row_sparse data (values, row numbers) or csr data (values, row pointers, column numbers)."""
    columns = indices[-1]
    expected = (*columns.shape, *shape[1:]) if len(indices) == 1 else columns.shape
    if not shape or columns.ndim != 1 or values.shape != tuple(expected) or any(x.dtype.kind != 'i' for x in indices):
        source.fail(f'a sparse array of shape {tuple(shape)} cannot have values of shape {values.shape} '
                    f'and indices of shape {columns.shape}.')
    if columns.size and not 0 <= columns.min() <= columns.max() < shape[len(indices) - 1]:
        source.fail(f'a sparse array of shape {tuple(shape)} has indices outside it.')
    size = values.itemsize * product(max(1, dimension) for dimension in shape)
    source.charge(size)
    array = numpy.zeros(shape, values.dtype)
    if len(indices) == 1:
        array[columns] = values
    elif columns.size:
        pointers = indices[0]
        lengths = numpy.diff(pointers)
        if (len(shape) != 2 or pointers.shape != (shape[0] + 1,) or pointers[0] != 0 or pointers[-1] != columns.size
                or lengths.min() < 0):
            source.fail(f'the row pointers do not divide {columns.size} values among the rows of shape {tuple(shape)}.')
        array[numpy.repeat(numpy.arange(shape[0]), lengths), columns] = values
    return array


# Files of arrays

def read_list(source: FilePart) -> Tuple[List[numpy.ndarray], List[str]]:
    """The arrays and names of a file of `mx.nd.save`; no names where it was given a list."""
    magic, reserved, count = source.unpack('QQQ', 'the beginning of the file')
    if magic != LIST_MAGIC or reserved != 0:
        source.fail(f'the file must begin with the numbers {LIST_MAGIC} and 0. Received: {magic} and {reserved}.', 0)
    _check_count(source, count, 24)
    arrays = [read_ndarray(source) for _ in range(count)]
    named, = source.unpack('Q', 'the number of names')
    if named not in (0, count):
        source.fail(f'there must be as many names as arrays ({count}), or none. Received: {named}.', source.at() - 8)
    names = []
    for _ in range(named):
        size, = source.unpack('Q', 'the length of a name')
        names.append(_text(source, source.take(size, 'a name')))
    if source.left():
        source.fail(f'{source.left()} bytes follow the end of the data.')
    return arrays, names


def _check_count(source: FilePart, count: int, each: int) -> None:
    if count > MAX_ARRAYS or count * each > source.left():
        source.fail(f'the file claims {count} arrays; {source.left()} bytes follow, and {MAX_ARRAYS} arrays are the limit.')


def _text(source: FilePart, data: bytes) -> str:
    source.charge(4 * len(data))
    try:
        return data.decode('utf-8')
    except UnicodeDecodeError:
        source.fail('a name is not UTF-8 text.')


_NPY = re.compile(rb"\{'descr': (?:'[<|](?P<code>[fiu][1248]|b1)'|\[\('(?P<bfloat16>bfloat16)', '<u2'\)\]), "
                  rb"'fortran_order': False, 'shape': \((?P<shape>(?:\d{1,18}(?:, \d{1,18})*,?)?)\), \} *\n")


def read_npz(source: FilePart) -> Dict[str, numpy.ndarray]:
    """The arrays of a zip file of .npy members, as MXNet 2's `npx.savez` and NumPy's `savez` write it.

    Members must be stored, not compressed, and fill the file without gap or overlap: no bomb can be built so.
    """
    members, end_of_members = directory(source, MAX_ARRAYS)
    ends = [member.offset for member in members[1:]] + [end_of_members]
    found: Dict[str, numpy.ndarray] = {}
    position = 0
    for member, end in zip(members, ends):
        check_stored(source, member)
        if member.offset != position:
            source.fail(f'a zip member should begin here, but the directory says {member.offset}.', position)
        name = _text(source, member.name)
        if not name.endswith('.npy') or name[:-4] in found:
            source.fail(f'the zip member {name!r} is not an array, or is there twice.', position)
        found[name[:-4]] = _member(source, member, end)
        position = end
    if position != end_of_members:
        source.fail('the zip members do not fill the file.', position)
    return _join_sparse(source, found)


def _member(source: FilePart, member: Member, end: int) -> numpy.ndarray:
    """The array of one member, which ends at ``end``; the header before it and the checksum must agree with the directory."""
    part = source.part(member.offset, end - member.offset)
    magic, flags, method, crc, size, name_size, extra_size = part.unpack('4s2x2H4xI4xI2H', 'a zip member')
    name = part.take(name_size, 'a name')
    part.take(extra_size, 'extra fields')
    begin, streamed = part.at(), member.flags & STREAMED
    agree = (magic, flags, method, name) == (b'PK\3\4', member.flags, 0, member.name)
    if not agree or not (streamed or (crc == member.crc and size in (member.size, 0xFFFFFFFF))):
        part.fail('a zip member differs from its entry in the directory.', member.offset)
    rest = end - begin - member.size
    if rest not in ((16, 24) if streamed else (0,)):
        part.fail(f'a zip member of {member.size} bytes does not fill its place.', begin)
    data = source.part(begin, member.size)
    # MXNet 2.0 writes the storage type of a sparse array with a garbled header; the other members tell it too
    is_format = member.name.endswith(b'/format.npy') and member.size < 1024
    header = data.take(member.size, 'a storage type') if is_format else _npy_header(data)
    dtype, shape = ('?', (0,)) if is_format else _npy_type(data, header)
    array = data.raw(dtype, shape, f'an array of shape {shape}')
    if data.left():
        data.fail(f'{data.left()} bytes follow an array of shape {shape}.')
    if zlib.crc32(octets(array), zlib.crc32(header)) != member.crc:
        part.fail(f'the bytes of {member.name!r} do not have its checksum.', begin)
    described = b'PK\7\x08', member.crc, member.size, member.size
    if streamed and source.part(begin + member.size, rest).unpack('4s3I' if rest == 16 else '4sI2Q', 'a checksum') != described:
        part.fail('a zip member differs from its entry in the directory.', begin + member.size)
    return converted(array, dtype)


def _npy_header(data: FilePart) -> bytes:
    start = data.take(8, 'the beginning of an array')
    if start not in (b'\x93NUMPY\1\0', b'\x93NUMPY\2\0', b'\x93NUMPY\3\0'):
        data.fail(f'a zip member must be a NumPy array. Received: {start!r}.', data.at() - 8)
    length = data.take(2 if start[6] == 1 else 4, 'the length of a header')
    return start + length + data.take(min(int.from_bytes(length, 'little'), 4096), 'the header of an array')


def _npy_type(data: FilePart, header: bytes) -> Tuple[str, Tuple[int, ...]]:
    match = _NPY.fullmatch(header, 10 if header[6] == 1 else 12)
    if match is None:
        data.fail(f'the header of an array must give a numeric type, C order and a shape. Received: {header[10:110]!r}.')
    shape = tuple(int(dimension) for dimension in re.findall(rb'\d+', match['shape']))
    if len(shape) > MAX_DIMENSIONS:
        data.fail(f'an array can have up to {MAX_DIMENSIONS} dimensions. Received: {len(shape)}.')
    code = 'bfloat16' if match['bfloat16'] else match['code'].decode()
    return {'b1': '?', 'bfloat16': 'bfloat16'}.get(code, '<' + code), shape


def _join_sparse(source: FilePart, found: Dict[str, numpy.ndarray]) -> Dict[str, numpy.ndarray]:
    """Sparse arrays are spread over several members: name/format, /data, /shape, /indices, and /indptr of a csr."""
    for name in [key[:-len('/format')] for key in found if key.endswith('/format')]:
        _, values, sizes, columns, pointers = (
            found.pop(f'{name}/{part}', None) for part in ('format', 'data', 'shape', 'indices', 'indptr'))
        if values is None or columns is None or sizes is None or sizes.dtype != '<i8' or sizes.size > MAX_DIMENSIONS:
            source.fail(f'the sparse array {name!r} is incomplete.', 0)
        shape = tuple(int(size) for size in sizes.reshape(-1))
        if min(shape, default=0) < 0 or name in found:
            source.fail(f'the sparse array {name!r} has the shape {shape}, or is there twice.', 0)
        found[name] = dense(source, shape, values, *([columns] if pointers is None else [pointers, columns]))
    return found
