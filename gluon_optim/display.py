"""How objects show themselves: some lines of text, and a table in a notebook, whatever their size."""
import html
from typing import Any, Iterable, List, NamedTuple, Sequence, Tuple

__all__ = ['Columns', 'Rows', 'clipped', 'columns', 'columns_table', 'of_part', 'table', 'text', 'without_none']

Rows = Sequence[Tuple[str, Any]]  # a word, and what it stands for
MOST = 16    # rows that are shown
WIDEST = 110  # characters of a value


def clipped(value: Any, widest: int = WIDEST) -> str:
    """The value in at most so many characters, on one line.

    >>> clipped({'a': list(range(100))}, widest=20)
    "{'a': [0, 1, 2, 3..."
    """
    words = ' '.join((value if isinstance(value, str) else repr(value)).split())
    return words if len(words) <= widest else words[:widest - 3] + '...'


def of_part(name: str, line: str) -> str:
    """``line``, about the one of several that is called ``name``; '' where there is only one."""
    return f'{name}: {line}' if name else line


def text(title: str, rows: Rows) -> str:
    """The title, and under it a line for each row.

    >>> print(text('Two', [('one', 1), ('other', 2)]))
    Two
      one    1
      other  2
    """
    width = max((len(word) for word, _ in _shown(rows)), default=0)
    return '\n'.join([clipped(title)] + [f'  {word:{width}}  {clipped(value)}'.rstrip() for word, value in _shown(rows)])


def table(title: str, rows: Rows) -> str:
    """The same in HTML.

    >>> table('A', [('<b>', 1)])
    '<div><b>A</b><table><tr><td>&lt;b&gt;</td><td>1</td></tr></table></div>'
    """
    cells = ''.join(f'<tr><td>{html.escape(word)}</td><td>{html.escape(clipped(value))}</td></tr>' for word, value in _shown(rows))
    return f'<div><b>{html.escape(clipped(title))}</b><table>{cells}</table></div>'


def columns(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The title, and under it the rows in columns with heads; columns with numbers are aligned to the right.

    >>> print(columns('Two', ['name', 'count'], [('one', 1), ('other', 20)]))
    Two
      name   count
      one        1
      other     20
    """
    right = [any(isinstance(row[k], (int, float)) for row in rows) for k in range(len(heads))]
    return _aligned(clipped(title), [list(map(clipped, heads)), *_cells(heads, rows)], right)


def columns_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The same in HTML.

    >>> columns_table('A', ['<b>'], [[1]])
    '<div><b>A</b><table><tr><th>&lt;b&gt;</th></tr><tr><td>1</td></tr></table></div>'
    """
    return Columns(clipped(title), list(map(clipped, heads)), _cells(heads, rows))._repr_html_()


def _aligned(title: str, lines: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """The title, and under it the lines in columns that are aligned to the right or to the left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return '\n'.join([title] + [
        '  ' + '  '.join(f'{cell:{">" if to_right else "<"}{width}}' for cell, width, to_right in zip(line, widths, right)).rstrip()
        for line in lines])


def _cells(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> List[List[str]]:
    left = len(rows) - MOST
    last = [[f'... {left} more'] + [''] * (len(heads) - 1)] if left > 0 else []
    return [[f'{cell:.4g}' if isinstance(cell, float) else clipped(cell, 60) for cell in row] for row in rows[:MOST]] + last


def _shown(rows: Rows) -> List[Tuple[str, Any]]:
    left = len(rows) - MOST
    return [(clipped(word, 60), value) for word, value in rows[:MOST]] + ([('...', f'{left} more')] if left > 0 else [])


def without_none(rows: Iterable[Tuple[str, Any]]) -> Rows:
    """The rows that say something."""
    return [(word, value) for word, value in rows if value not in (None, '', [], {}, ())]


class Columns(NamedTuple):
    """A title and columns under headings, all of them whatever their number: names to the left, figures to the right.

    >>> Columns('Two', ['name', 'size'], [['a', '1'], ['long', '20']])
    Two
      name  size
      a        1
      long    20
    """

    title: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __repr__(self) -> str:
        return _aligned(self.title, [self.heading, *self.rows], [False] + [True] * (len(self.heading) - 1))

    def _repr_html_(self) -> str:
        def line(row: Sequence[str], tag: str) -> str:
            return '<tr>' + ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row) + '</tr>'

        rows = ''.join(line(row, 'td') for row in self.rows)
        return f'<div><b>{html.escape(self.title)}</b><table>{line(self.heading, "th")}{rows}</table></div>'
