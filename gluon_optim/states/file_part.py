"""A part of a file, read forward: sizes that it claims are compared with what is there, and with an allowance of memory.

Arrays are read straight into their own memory: the file as a whole is never held.
"""
import struct
from typing import Any, BinaryIO, Iterable, NoReturn, Sequence, Tuple

import numpy

from .errors import UnreadableFile

__all__ = ['SMALL', 'Allowance', 'FilePart', 'converted', 'octets', 'product', 'stored_type']

SMALL = 32 << 20  # bytes of memory that anything may become; more than that, and than twice its size, is made of no file


class Allowance:
    """How many bytes of memory may still be taken for what a file holds."""

    def __init__(self, size: int):
        self.size = self.left = size


class FilePart:
    """A part of a binary file, read forward; every error names the file and the byte.

    ``FilePart.charge`` must be told of everything that is made from the file, so that no file becomes more than the
    allowance, however often it refers to the same bytes or however large it says that its arrays are.
    """

    def __init__(self, file: BinaryIO, name: str, begin: int, end: int, allowance: Allowance):
        self.file, self.name, self.end, self.allowance = file, name, end, allowance
        file.seek(begin)

    def at(self) -> int:
        return self.file.tell()

    def left(self) -> int:
        return self.end - self.file.tell()

    def fail(self, message: str, at: int = -1) -> NoReturn:
        raise UnreadableFile(f'Cannot read {self.name}: at byte {self.at() if at < 0 else at}: {message}')

    def part(self, begin: int, size: int) -> 'FilePart':
        """The ``size`` bytes from ``begin`` on."""
        return FilePart(self.file, self.name, begin, begin + size, self.allowance)

    def charge(self, nbytes: int) -> None:
        self.allowance.left -= nbytes
        if self.allowance.left < 0:
            self.fail(f'what the file describes takes more than {self.allowance.size} bytes of memory. '
                      'If you trust the file, pass a larger `limit`.')

    def need(self, size: int, what: str) -> None:
        """Refuse unless ``size`` more bytes are there."""
        if size > self.left():
            self.fail(f'{what} should take {size} bytes, but only {self.left()} are left.')

    def take(self, size: int, what: str) -> bytes:
        """The next ``size`` bytes."""
        self.need(size, what)
        data = self.file.read(size)
        if len(data) != size:
            self.fail(f'{what} ends early; is something else writing to the file?')
        return data

    def unpack(self, layout: str, what: str) -> Tuple[Any, ...]:
        """Little-endian numbers, as `struct` describes them."""
        layout = '<' + layout
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))

    def raw(self, dtype: str, shape: Sequence[int], what: str) -> numpy.ndarray:
        """An array of one of `DTYPES` from its bytes in C order, still as it is stored: see `converted`."""
        stored = stored_type(dtype)
        size = stored.itemsize * product(shape)
        self.need(size, what)
        if stored.itemsize * product(max(1, dimension) for dimension in shape) >= 1 << 62:
            self.fail(f'{what} has no possible size.')
        self.charge(2 * size if dtype == 'bfloat16' else size)
        array = numpy.empty(shape, stored)
        if size and self.file.readinto(octets(array)) != size:  # type: ignore[attr-defined]
            self.fail(f'{what} ends early; is something else writing to the file?')
        return array

    def array(self, dtype: str, shape: Sequence[int], what: str) -> numpy.ndarray:
        return converted(self.raw(dtype, shape, what), dtype)


_STORED = {'bfloat16': '<u2', '?': 'u1'}


def stored_type(dtype: str) -> numpy.dtype:
    """How the elements of an array lie in a file."""
    return numpy.dtype(_STORED.get(dtype, dtype))


def converted(array: numpy.ndarray, dtype: str) -> numpy.ndarray:
    """What `FilePart.raw` read, as NumPy has it: bfloat16, which NumPy lacks, becomes float32, which holds it exactly."""
    if dtype == 'bfloat16':
        return (array.astype('<u4') << 16).view('<f4')
    return array != 0 if dtype == '?' else array


def octets(array: numpy.ndarray) -> numpy.ndarray:
    return array.reshape(-1).view('u1')


def product(numbers: Iterable[int]) -> int:
    """Exact, unlike `numpy.prod` of large numbers."""
    result = 1
    for number in numbers:
        result *= number
    return result
