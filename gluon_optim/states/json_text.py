"""JSON in files, read in the same way everywhere, with bounds on everything it can contain."""
import collections
import json
import math
import re
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

from ..schema import one_of
from .errors import StateFileError, UnreadableFile
from .file_part import SMALL
from .files import OpenFile, Path, open_once

__all__ = ['loads', 'read']

MAX_DEPTH = 100    # the manifests here need a tenth of that
MAX_DIGITS = 32    # of a number: converting a million digits takes seconds
LONGEST = 32 << 20  # bytes of a file of JSON
# the memory, at most, that comes with each of these, of which there is at least one per value
COSTS = {'{': 250, '[': 80, ',': 40}


def read(path: Union[Path, OpenFile], what: str) -> Any:
    """The value in a JSON file, called ``what`` in errors. Raises UnreadableFile, or OSError if it cannot be opened."""
    with open_once(path) as file:
        text = file.file.read(min(file.size, LONGEST) + 1)
        try:
            if len(text) > LONGEST:
                raise StateFileError(f'{what} may have at most {LONGEST} bytes. Received: {file.size}.')
            return loads(text, what)
        except StateFileError as error:
            raise UnreadableFile(f'Cannot read {file.path!r}: {error}') from None


def loads(text: Union[bytes, str], what: str, finished: Optional[Callable[[Dict[str, Any]], Any]] = None) -> Any:
    """The value of a JSON text, in linear time and at most twice the text's memory plus 32 MiB.

    ``finished`` gets each object as soon as it has been read and returns what takes its place, which may need less memory.

    Refuses, with a StateFileError that calls the text ``what``: encodings other than UTF-8, repeated keys, NaN and infinities,
    numbers beyond 64 bits, nesting beyond 100 levels, and anything that would take more memory.

    >>> loads(b'{"a": [1, 2.5, null]}', 'the map')
    {'a': [1, 2.5, None]}
    >>> loads(b'{"a": 1, "a": 2}', 'the map')
    Traceback (most recent call last):
      ...
    gluon_optim.states.errors.StateFileError: the map must have each key once. Received twice: 'a'.
    """
    def unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            twice = [key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1]
            raise StateFileError(f'{what} must have each key once. Received twice: {_some(twice)}.')
        return values if finished is None else finished(values)

    def number(kind: Callable[[str], Any]) -> Callable[[str], Any]:
        def parse(digits: str) -> Any:
            value = kind(digits) if len(digits) <= MAX_DIGITS else math.inf
            if not -2**63 <= value < 2**63 and (kind is int or math.isinf(value)):
                raise StateFileError(f'numbers in {what} must be finite and fit into 64 bits. Received: {digits[:40]}.')
            return value
        return parse

    def constant(name: str) -> None:
        raise StateFileError(f'numbers in {what} must be finite. Received: {name}.')

    width = _check_memory(text, what)
    try:
        text = text if isinstance(text, str) else text.decode('utf-8')
        value = json.loads(text, object_pairs_hook=unique, parse_int=number(int), parse_float=number(float),
                           parse_constant=constant)
        if width == 4:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is not text
    except StateFileError:
        raise
    except RecursionError:
        raise StateFileError(_too_deep(what)) from None
    except ValueError as error:
        raise StateFileError(f'{what} must be JSON in UTF-8. Received: {type(error).__name__}: {str(error)[:200]}.') from None
    _check_depth(value, what)
    return value


def _check_memory(text: Any, what: str) -> int:
    """The bytes of the widest letter in a text. Refuses one of which the values would take too much memory."""
    kind, width = type(text), 1
    escape, wide = _ESCAPES[kind]
    if not text.isascii() or escape in text:
        width = 4 if wide.search(text) else 2
    values = sum(text.count(mark if kind is str else mark.encode()) * cost for mark, cost in COSTS.items())
    if values + 2 * (width - 1) * len(text) > 2 * len(text) + SMALL:
        raise StateFileError(f'{what} must not take more memory than twice its {len(text)} bytes and {SMALL}. Received: '
                             f'{text.count("," if kind is str else b",")} commas.')
    return width


# what begins the number of a letter, and what finds letters that take four bytes
_ESCAPES: Dict[type, Tuple[Any, Any]] = {
    bytes: (b'\\u', re.compile(rb'[\xf0-\xff]|\\u[dD][89abAB]')),
    str: ('\\u', re.compile('[\U00010000-\U0010ffff]|\\\\u[dD][89abAB]'))}


def _check_depth(value: Any, what: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return
    raise StateFileError(_too_deep(what))


def _too_deep(what: str) -> str:
    return f'{what} must be JSON nested up to {MAX_DEPTH} levels. Received: more.'


def _some(names: List[str]) -> str:
    """The first of ``names``, cut, as an error lists them."""
    return one_of(name if len(name) <= 60 else name[:57] + '...' for name in names[:4]) + ', ...' * (len(names) > 4)
