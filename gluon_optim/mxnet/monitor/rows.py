"""A CSV file with rows by update, which a resumed run continues where it stands."""
import csv
import io
import logging
import os
from typing import Any, Iterable, List, Optional, Sequence, Tuple

from ...states.atomic import Path

__all__ = ['RowFile']

log = logging.getLogger('gluon_optim')


class RowFile:
    """Rows that begin with the number of an update, in ascending order.

    Each call of `write` adds whole lines at once. What a killed run wrote of updates that are now made again is cut off first, and
    so is a line that it left unfinished. Of an update that it had begun the rows from before the checkpoint stay: ``end`` says how
    many these are.
    """

    def __init__(self, path: Path, columns: Sequence[str], once: bool):
        """``once``: an update has the rows of one call only."""
        self.path, self.columns, self.once = os.fspath(path), list(columns), once
        self._last: Optional[int] = None    # the update that was written last; None: by another process, or before a restore
        self.end: Optional[Tuple[int, int]] = None  # the update that was written last, also before a restore, and its rows
        os.makedirs(os.path.dirname(self.path) or '.', exist_ok=True)  # that of a new run comes with its first checkpoint
        with open(self.path, 'a+b') as file:  # raises where there is no permission
            file.seek(0)
            first = file.readline()
        if first.endswith(b'\n') and first != self._lines([self.columns]):
            raise ValueError(f'Cannot continue {self.path!r}: its first line must be {",".join(self.columns)}. Received: '
                             f'{first.decode(errors="replace").strip()[:200]!r}. Pass another path.')

    def write(self, update: int, rows: Iterable[Sequence[Any]]) -> None:
        """Add ``rows``, without their first column. Raises OSError where the file system refuses."""
        present = self.end[1] if self.end and self.end[0] == update and not self.once else 0
        if self._last is None or update < self._last + self.once:
            present = self._cut(update, present)
        lines: List[Sequence[Any]] = [[update, *('' if value is None else value for value in row)] for row in rows]
        text = self._lines(lines)
        with open(self.path, 'ab', buffering=0) as file:
            if not file.tell():
                text = self._lines([self.columns]) + text
            while text:  # in one call, unless the disk is full
                text = text[file.write(text):]
        self._last, self.end = update, (update, present + len(lines))

    def restart(self, end: Optional[Tuple[int, int]]) -> None:
        """Cut off what is to come when it is made again: the run was set back to where ``end`` was this."""
        self._last, self.end = None, end

    def _cut(self, update: int, present: int) -> int:
        """Cut off the rows of ``update`` but for the first ``present``, those of later ones, and an unfinished line. Returns how
        many of ``update`` there are now."""
        stay = 0
        with open(self.path, 'r+b') as file:
            keep = self._end_of_line(file.readline())
            while True:
                line = file.readline()
                if not line.endswith(b'\n') or self._update_of(line) > update:
                    break
                if self._update_of(line) == update:
                    if stay == present:
                        break
                    stay += 1
                keep += len(line)
            gone = [line, *file]
            rows = [line for line in gone if line.endswith(b'\n')]
            if rows:
                log.warning('%s: cut off %d rows of updates %d to %d, which are made again', self.path, len(rows),
                            self._update_of(rows[0]), self._update_of(rows[-1]))
            file.truncate(keep)
        return stay

    def _end_of_line(self, line: bytes) -> int:
        return len(line) if line.endswith(b'\n') else 0

    def _update_of(self, line: bytes) -> int:
        try:
            return int(line.split(b',', 1)[0])
        except ValueError:
            raise ValueError(f'Cannot continue {self.path!r}: each row must begin with the number of an update. Received: '
                             f'{line.decode(errors="replace").strip()[:200]!r}. Pass another path.') from None

    @staticmethod
    def _lines(rows: List[Sequence[Any]]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator='\n').writerows(rows)
        return text.getvalue().encode()
