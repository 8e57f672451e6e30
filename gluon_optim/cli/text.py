"""Everything that the command line prints, with `say`: names in files may hold anything, and a terminal obeys much of it."""
import itertools
import json
import re
import shutil
import sys
import textwrap
from typing import Any, Dict, Iterator, List, Optional, Sequence, TextIO

__all__ = ['dumps', 'escaped', 'in_options', 'pairs', 'shape_text', 'say', 'say_json', 'short', 'table']

ARGUMENT = re.compile(r'(?<![\w.])(?:`(params|target|optimizer|names|like|weights|part)`|'
                      r'(params|target|optimizer|names|like|part)=)')
OPTIONS = {'`names`': 'params', '`weights`': 'params', 'names=': 'map'}  # options with names that differ from the argument's
PHRASES = (('allow_lossy=True', '--allow-lossy'), ('suggest_names', '--map suggest'), ('like= the module or a', '--like a'),
           ('`params` as a dictionary of names to weights', '--params a .params file with the weights'),
           ("states.as_rule('adamw')", '--as adamw'), ('gluon_optim.list_optimizers()', '`gluon-optim list`'),
           ('import the module that registers it first', 'pass --import MODULE, the module that registers it'),
           ('Set states.', 'In Python, set states.'), ('update_on_kvstore=False', '--update-on-kvstore no'),
           ('multi_precision=True', '--multi-precision'))


def say(line: str = '', stream: Optional[TextIO] = None) -> None:
    """Print one line, to standard output if ``stream`` is left out."""
    stream = stream or sys.stdout
    if stream is not None:  # a shell has closed it: >&-
        print(escaped(line, getattr(stream, 'encoding', None) or 'utf-8'), file=stream)


def escaped(text: str, encoding: str = 'utf-8') -> str:
    """``text`` with Python's escapes for what does not print: control characters, line ends, marks of direction, halves of pairs.

    >>> escaped('größe\\x1b[2J\\n\\u202eabc')
    'größe\\\\x1b[2J\\\\n\\\\u202eabc'
    """
    if not text.isprintable():
        text = ''.join(letter if letter.isprintable() else letter.encode('unicode_escape').decode() for letter in text)
    return text.encode(encoding, 'backslashreplace').decode(encoding)


def in_options(message: str, reading: bool = False) -> str:
    """A message with command-line options in place of function arguments; ``reading`` selects --source instead of --target.

    >>> in_options("Leave `params` out, or pass target='mirror' or allow=['lions.Lion'].")
    "Leave --params out, or pass --target 'mirror' or --allow lions.Lion."
    >>> in_options("Received: params=0. Pass params= a file, or part='gen'.")
    "Received: --params 0. Pass --params a file, or --part 'gen'."
    """
    def option(match: Any) -> str:
        name = OPTIONS.get(match[0], match[1] or match[2])
        name = 'source' if reading and name == 'target' else name
        following = message[match.end():match.end() + 1]   # a value, or punctuation
        return f'--{name}' + (' ' if match[0].endswith('=') and re.match(r'[\w\'"/~-]', following) else '')

    for argument, phrase in PHRASES:
        message = message.replace(argument, phrase)
    message = re.sub(r'(?<!in Python, )set states\.', 'in Python, set states.', message)
    message = re.sub(r"\ballow=\['([^']*)'\]", r'--allow \1', message)
    return ARGUMENT.sub(option, message)


def shape_text(shape: Sequence[int], known: bool) -> str:
    return 'x'.join(map(str, shape)) or ('()' if known else '')


def pairs(values: Dict[str, Any]) -> str:
    return ', '.join(f'{name} {value!r}' for name, value in values.items() if value is not None)


def short(value: Any, length: int = 60) -> str:
    text = '-' if value is None else str(value)
    return text if len(text) <= length else text[:length - 3] + '...'


def dumps(value: Any) -> str:
    """Strict JSON in printable ASCII: infinities and NaN, which it does not have, become null. A function in ``value`` stands for
    what it returns."""
    return ''.join(_json(value))


def say_json(value: Any) -> None:
    """Print what `dumps` returns piece by piece, as there may be a lot of it."""
    if sys.stdout is not None:   # as in `say`
        sys.stdout.writelines(_json(value))
        sys.stdout.write('\n')


def _json(value: Any) -> Iterator[str]:
    encoder = json.JSONEncoder(indent=2, allow_nan=False, default=lambda entry: _finite(entry()) if callable(entry) else str(entry))
    pieces = encoder.iterencode(_finite(value))
    for text in iter(lambda: ''.join(itertools.islice(pieces, 1000)), ''):
        yield text.replace('\x7f', '\\u007f')


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value.item() if hasattr(value, 'item') and getattr(value, 'size', 2) == 1 else value


def table(rows: Sequence[Sequence[str]], stream: Optional[TextIO] = None) -> None:
    """Print columns, wrapped at spaces to the width of the terminal, or to 100; the first row is a heading if there are more."""
    rows = [[escaped(cell) for cell in row] for row in rows]
    widths = _widths(rows, shutil.get_terminal_size((100, 24)).columns)
    for row in rows:
        cells = [[cell] if len(cell) <= width else textwrap.wrap(cell, width) for cell, width in zip(row, widths)]
        for line in itertools.zip_longest(*cells, fillvalue=''):
            say('  ' + '  '.join(f'{cell:{width}}' for cell, width in zip(line, widths)).rstrip(), stream)


def _widths(rows: Sequence[Sequence[str]], room: int) -> List[int]:
    """The width of each column. The widest shrink, but no word is cut: names must stay whole."""
    columns = list(zip(*rows))
    widths = [max(map(len, column)) for column in columns]
    words = [max((len(word) for cell in column for word in cell.split()), default=1) for column in columns]
    while sum(widths) + 2 * len(widths) > room:
        wide = [k for k, width in enumerate(widths) if width > words[k]]
        if not wide:
            break
        widths[max(wide, key=widths.__getitem__)] -= 1
    return [max(width, 1) for width in widths]
