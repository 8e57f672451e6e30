"""How MXNet nests values that no rule describes: the states of optimizers of its own or of other people, and their attributes.

A tree, as JSON has it, says how to rebuild a value, and the arrays in it are kept under their places: '0' is the whole value or
the first element of a tuple, '1.0' the first element of the second.

>>> take_apart((None, [1.5, numpy.zeros(2)]), numpy.ndarray)
({'tuple': ['none', {'list': [{'value': 1.5}, 'array']}]}, {'1.1': array([0., 0.])})

The tree is one of

    "none"                        None
    "array"                       an array of the framework
    "numpy", "number"             an array of NumPy, and one number of it
    {"value": x}                  a text, true, false or a finite number
    {"float": "inf"}              or "-inf" or "nan"
    {"tuple": [tree, ...]}, {"list": [tree, ...]}
    {"dict": [[key, tree], ...]}  with texts and whole numbers for keys, which differ
"""
import math
from typing import Any, Callable, Dict, Iterator, Tuple, Union

import numpy

from .errors import StateFileError

__all__ = ['leaves', 'put_together', 'take_apart']

Tree = Any
DEPTH = 16  # of a tree; deeper ones are refused
FLOATS = {'inf': math.inf, '-inf': -math.inf, 'nan': math.nan}
ARRAYS = ('array', 'numpy', 'number')


def take_apart(value: Any, array: Union[type, Tuple[type, ...]]) -> Tuple[Tree, Dict[str, Any]]:
    """The tree of ``value``, and its arrays by place; ``array`` is the type, or types, of the framework's arrays.

    Raises TypeError, naming the place, for a value that no tree can hold.
    """
    arrays: Dict[str, Any] = {}

    def tree_of(value: Any, place: Tuple[int, ...]) -> Tree:
        if len(place) >= DEPTH:
            raise TypeError(f'it must be nested at most {DEPTH} deep. Received: more at {_name(place)}')
        if value is None:
            return 'none'
        if isinstance(value, (array, numpy.ndarray, numpy.generic)):
            arrays[_name(place)] = value
            return 'array' if isinstance(value, array) else 'numpy' if isinstance(value, numpy.ndarray) else 'number'
        if type(value) is float and not math.isfinite(value):
            return {'float': str(value)}
        if type(value) in (bool, int, float, str):
            return {'value': value}
        if type(value) in (tuple, list):
            return {type(value).__name__: [tree_of(item, (*place, k)) for k, item in enumerate(value)]}
        if type(value) is dict and all(type(key) in (str, int) for key in value):
            return {'dict': [[key, tree_of(item, (*place, k))] for k, (key, item) in enumerate(value.items())]}
        where = f' at {_name(place)}' if place else ''
        raise TypeError('it must consist of None, numbers, texts, arrays, tuples, lists, and dictionaries with texts or whole '
                        f'numbers for keys. Received: {type(value).__name__}{where}')

    return tree_of(value, ()), arrays


def put_together(tree: Tree, array: Callable[[str, str], Any]) -> Any:
    """The value of a checked ``tree``; ``array`` gives the one at a place, of the kind 'array', 'numpy' or 'number'."""
    def value_of(tree: Tree, place: Tuple[int, ...]) -> Any:
        if tree == 'none':
            return None
        if isinstance(tree, str):
            return array(_name(place), tree)
        (kind, content), = tree.items()
        if kind == 'value':
            return content
        if kind == 'float':
            return FLOATS[content]
        if kind == 'dict':
            return {key: value_of(item, (*place, k)) for k, (key, item) in enumerate(content)}
        items = [value_of(item, (*place, k)) for k, item in enumerate(content)]
        return tuple(items) if kind == 'tuple' else items

    return value_of(tree, ())


def leaves(tree: Tree) -> Dict[str, str]:
    """The places of the arrays in ``tree``, in order, with their kinds. Raises StateFileError for what is not a tree."""
    return dict(_leaves(tree, ()))


def _leaves(tree: Tree, place: Tuple[int, ...]) -> Iterator[Tuple[str, str]]:
    if len(place) >= DEPTH:
        raise StateFileError(f'a tree must be nested at most {DEPTH} deep. Received: a deeper one.')
    if isinstance(tree, str) and tree in ARRAYS:
        yield _name(place), tree
    elif isinstance(tree, dict) and len(tree) == 1:
        (kind, content), = tree.items()
        items = _items(kind, content)
        for k, item in enumerate(items):
            yield from _leaves(item, (*place, k))
    elif tree != 'none':
        raise StateFileError("a tree must be 'none', 'array', 'numpy', 'number', or an object of one key. "
                             f'Received: {str(tree)[:40]!r}.')


def _items(kind: str, content: Any) -> Any:
    """The trees within a tree of that kind, when its content has been checked."""
    if kind in ('tuple', 'list') and isinstance(content, list):
        return content
    if kind == 'value' and type(content) in (bool, int, float, str):
        return ()
    if kind == 'float' and isinstance(content, str) and content in FLOATS:
        return ()
    if kind == 'dict' and isinstance(content, list) and all(
            isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int) for pair in content) and (
            len({pair[0] for pair in content}) == len(content)):
        return [item for _, item in content]
    raise StateFileError(f'the content of {str(kind)[:40]!r} in a tree must be what docs/FORMAT.md says. '
                         f'Received: {str(content)[:40]!r}.')


def _name(place: Tuple[int, ...]) -> str:
    return '.'.join(map(str, place)) or '0'

