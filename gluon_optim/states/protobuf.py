"""As much of Protocol Buffers as large arrays need: their bytes go straight from array to file and back.

The protobuf package keeps a message, its serialized form and its arrays in memory at once. Here a message is written around
arrays that stay where they are, and read without the arrays, giving only their positions.
"""
from typing import Any, BinaryIO, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

from .errors import UnreadableFile

__all__ = ['Place', 'header', 'skim']


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


def skim(file: BinaryIO, place: Place, path: Mapping[int, Optional[Dict[int, Any]]], found: List[Optional[Place]]) -> bytes:
    """The message at ``place`` without the arrays in it.

    ``path`` says which fields lead to them: number -> the same for the message in that field, or None for an array. For
    each message that may have an array, one entry is appended to ``found``: its place, or None if it has none.

    Raises UnreadableFile if the file is not a message.
    """
    pieces, array = [], None
    for field, whole, body in _fields(file, place):
        if field in path and body is not None:
            inner = path[field]
            if inner is None:
                array = body
                continue
            data = skim(file, body, inner, found)
            pieces += [header(field, len(data)), data]
        else:
            file.seek(whole.begin)
            pieces.append(file.read(whole.size))
    if None in path.values():
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
