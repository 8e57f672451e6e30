"""As much of Protocol Buffers as large arrays need: their bytes go straight from array to file and back.

The protobuf package keeps a message, its serialized form and its arrays in memory at once. Here a message is written around
arrays that stay where they are, and read without the arrays, giving only their positions.
"""
from typing import Any, BinaryIO, Iterator, List, Mapping, NamedTuple, Optional, Tuple

from .errors import UnreadableFile

__all__ = ['NUMBERS', 'WHOLE', 'Place', 'header', 'skim']

WHOLE, NUMBERS = 'whole', 'whole numbers'


class Place(NamedTuple):
    """The position of something in a file."""

    begin: int
    size: int


def varint(number: int) -> bytes:
    """An integer, seven bits per byte.

    >>> varint(300).hex()
    'ac02'
    """
    data = bytearray()
    while number > 0x7f:
        data.append(number & 0x7f | 0x80)
        number >>= 7
    return bytes(data + bytes([number]))


def header(field: int, size: int) -> bytes:
    """The bytes that precede a field of ``size`` bytes."""
    return varint(field << 3 | 2) + varint(size)


Fields = Mapping[int, Any]  # what is in a field, by its number: WHOLE, NUMBERS, Fields of the message in it, or None for an array


class Room:
    """How much may still become of a file: messages and packed numbers are many times as large in memory."""

    def __init__(self) -> None:
        self.messages, self.numbers = 50_000, 4 << 20

    def take(self, messages: int, numbers: int) -> None:
        self.messages, self.numbers = self.messages - messages, self.numbers - numbers
        if min(self.messages, self.numbers) < 0:
            raise UnreadableFile('the file has too many parts: the limits are 50000 arrays, and 4 MiB of whole numbers that are '
                                 'not stored as arrays are.')


def skim(file: BinaryIO, place: Place, fields: Fields, found: List[Optional[Place]], room: Optional[Room] = None) -> bytes:
    """Of the message at ``place`` those of its ``fields`` that are named, without the arrays in it.

    For each message that may have an array, one entry is appended to ``found``: its place, or None if it has none.

    Raises UnreadableFile if the file is not a message, or would become much larger in memory than it is.
    """
    pieces, array, room = [], None, room or Room()
    for field, whole, body in _fields(file, place):
        inner = fields.get(field, '')
        if inner is None and body is not None:
            array = body
        elif isinstance(inner, dict) and body is not None:
            room.take(1, 0)
            data = skim(file, body, inner, found, room)
            pieces += [header(field, len(data)), data]
        elif inner in (WHOLE, NUMBERS):
            room.take(0, whole.size if inner == NUMBERS else 0)
            file.seek(whole.begin)
            pieces.append(file.read(whole.size))
    if None in fields.values():
        found.append(array)
    return b''.join(pieces)


def _fields(file: BinaryIO, place: Place) -> Iterator[Tuple[int, Place, Optional[Place]]]:
    """Each field's number, place, and place of its content; None for the content of numbers."""
    position, end = place.begin, place.begin + place.size
    while position < end:
        begin = position
        file.seek(begin)
        key, position = _number(file, position)
        field, kind = key >> 3, key & 7
        body = None
        if kind == 2:
            size, position = _number(file, position)
            body = Place(position, size)
            position += size
        elif kind == 0:
            _, position = _number(file, position)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            raise UnreadableFile(f'at byte {begin}: a field must have a wire type of Protocol Buffers. Received: {kind}.')
        if position > end or not field:
            raise UnreadableFile(f'at byte {begin}: a field must end before byte {end}. Received: one that ends at {position}.')
        yield field, Place(begin, position - begin), body


def _number(file: BinaryIO, position: int) -> Tuple[int, int]:
    """A number, and the position after it."""
    number = 0
    for k in range(10):
        byte = file.read(1)
        if not byte:
            break
        number |= (byte[0] & 0x7f) << 7 * k
        if not byte[0] & 0x80:
            return number, position + k + 1
    raise UnreadableFile(f'at byte {position}: a number must end. The file is truncated, or not of this kind.')
