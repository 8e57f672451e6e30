"""The directory of a zip file, read with bounds: nothing in it is believed that the file has no room for."""
import struct
from typing import List, NamedTuple, Tuple

from .file_part import FilePart

__all__ = ['STREAMED', 'Member', 'check_stored', 'directory']

STREAMED, UTF8 = 0x8, 0x800  # flags of a member: its sizes follow the data; the name is UTF-8
LEAST = 30 + 46  # bytes that each member takes, before and in the directory


class Member(NamedTuple):
    offset: int
    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int


def directory(source: FilePart, most: int) -> Tuple[List[Member], int]:
    """The members in file order, up to ``most``, and where the directory begins. There may be no comment."""
    source.need(22, 'a zip file')
    end = source.end - 22
    magic, _, _, _, count, size, offset, comment = source.part(end, 22).unpack('4s4H2IH', 'the end of the zip directory')
    if magic != b'PK\5\6' or comment:
        source.fail('the zip file is truncated: its directory should end here.', end)
    if end >= 76 and source.part(end - 20, 4).take(4, 'a locator') == b'PK\6\7':
        end -= 76
        magic, count, size, offset, locator, where = source.part(end, 76).unpack('4s28xQQQ4s4xQ4x', 'the zip64 directory')
        if magic != b'PK\6\6' or locator != b'PK\6\7' or where != end:
            source.fail('the zip64 directory should end here.', end)
    if offset + size != end or count > most or LEAST * count > source.end:
        source.fail(f'the zip directory claims {count} members, of which {most} are the limit, and {size} bytes from {offset} on.',
                    end)
    part = source.part(offset, size)
    members = sorted(_entry(part) for _ in range(count))
    if part.left():
        part.fail('bytes follow the last entry of the zip directory.')
    return members, offset


def _entry(part: FilePart) -> Member:
    begin = part.at()
    (magic, flags, method, crc, packed, size, name_size, extra_size, comment,
     offset) = part.unpack('4s4x2H4x3I3H8xI', 'an entry of the zip directory')
    if magic != b'PK\1\2' or comment:
        part.fail('an entry of the zip directory should begin here, without a comment.', begin)
    name, extra = part.take(name_size, 'a name'), part.take(extra_size, 'extra fields')
    wide = [size, packed, offset]
    if 0xFFFFFFFF in wide:
        values = iter(_zip64(part, extra))
        wide = [next(values, -1) if value == 0xFFFFFFFF else value for value in wide]
    if min(wide) < 0:
        part.fail('an entry of the zip directory lacks the sizes of a large file.', begin)
    return Member(wide[2], name, flags, method, crc, wide[1], wide[0])


def _zip64(part: FilePart, extra: bytes) -> Tuple[int, ...]:
    kind, size = struct.unpack('<HH', extra[:4]) if len(extra) >= 4 else (0, 0)
    if kind != 1 or size != len(extra) - 4 or size % 8 not in (0, 4):
        part.fail('an entry of the zip directory lacks the sizes of a large file.')
    return struct.unpack(f'<{size // 8}Q', extra[4:4 + size // 8 * 8])


def check_stored(source: FilePart, member: Member) -> None:
    """Refuse a member that is not simply there: a compressed one can become a thousand times as large."""
    if member.flags & ~(STREAMED | UTF8) or member.method or member.packed != member.size:
        source.fail(f'the zip member {member.name[:60]!r} must be stored without compression and encryption. Received: method '
                    f'{member.method}, flags {member.flags:#x}, {member.packed} bytes for {member.size}.', member.offset)
