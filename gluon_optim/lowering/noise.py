"""The arithmetic of `rules.noise` as lines of source, in the language that a back end's formats describe."""
import functools
from typing import Any, Callable, List, Mapping, Tuple

from ..rules import noise

__all__ = ['normals']


class _Value:
    """A value with a name in the source, with the operators and methods of NumPy's arrays that `noise` uses."""

    def __init__(self, source: '_Source', name: str, dtype: str):
        self.source, self.name, self.dtype = source, name, dtype

    def _with(self, operator: str, other: '_Value', dtype: str = '') -> '_Value':
        return self.source.assign(f'{self.name} {operator} {other.name}', dtype or self.dtype)

    def __add__(self, other: '_Value') -> '_Value': return self._with('+', other)
    def __sub__(self, other: '_Value') -> '_Value': return self._with('-', other)
    def __mul__(self, other: '_Value') -> '_Value': return self._with('*', other)
    def __and__(self, other: '_Value') -> '_Value': return self._with('&', other)
    def __xor__(self, other: '_Value') -> '_Value': return self._with('^', other)
    def __lshift__(self, other: '_Value') -> '_Value': return self._with('<<', other)
    def __rshift__(self, other: '_Value') -> '_Value': return self._with('>>', other)
    def __ge__(self, other: '_Value') -> '_Value': return self._with('>=', other, 'bool')
    def __invert__(self) -> '_Value': return self.source.assign(f'~{self.name}', self.dtype)
    def __neg__(self) -> '_Value': return self.source.assign(f'-{self.name}', self.dtype)

    def view(self, dtype: str) -> '_Value':
        return self.source.apply('view', self, dtype=dtype)

    def astype(self, dtype: str) -> '_Value':
        return self.source.apply('astype', self, dtype=dtype)


class _Source:
    """The namespace of `_Value`; ``lines`` grow while it computes."""

    def __init__(self, formats: Mapping[str, str]):
        self.formats = formats
        self.lines: List[str] = []

    def assign(self, text: str, dtype: str) -> _Value:
        name = f'n{len(self.lines)}'
        self.lines.append(self.formats['assign'].format(name=name, value=text, T=dtype))
        return _Value(self, name, dtype)

    def apply(self, what: str, *arguments: _Value, dtype: str) -> _Value:
        return self.assign(self.formats[what].format(*(one.name for one in arguments), T=dtype), dtype)

    def __getattr__(self, name: str) -> Callable[[Any], _Value]:
        if name in ('int32', 'uint32', 'uint64', 'float32', 'float64'):   # a number
            return lambda x: _Value(self, self.formats['number'].format(x, T=name), name)
        return functools.partial(self._function, name)

    def _function(self, name: str, x: _Value) -> _Value:
        return self.apply(name if f'{name} {x.dtype}' not in self.formats else f'{name} {x.dtype}', x, dtype=x.dtype)

    def where(self, condition: _Value, x: _Value, y: _Value) -> _Value:
        return self.apply('where', condition, x, y, dtype=x.dtype)


def normals(precision: str, formats: Mapping[str, str]) -> Tuple[List[str], str]:
    """Lines that compute the sample of an element, and the name of the result.

    They read the variables key, stream, update, draw and element, of type uint64. ``formats`` has how the language writes
    'assign' (of {value} to a new variable {name} of type {T}), 'number' {0} of type {T}, 'astype' and 'view' of {0} as {T},
    'where' of {0}, {1} and {2}, and 'sqrt', 'log', 'cos' and 'sin', where needed for one type: 'sqrt float32'.
    """
    xp = _Source(formats)
    key, stream, update, draw, element = (_Value(xp, name, 'uint64') for name in ('key', 'stream', 'update', 'draw', 'element'))

    def number(x: int) -> _Value:
        return xp.uint64(x)

    shift = noise.LANES.bit_length() - 1
    i = ((element >> number(shift + 2)) << number(shift)) + (element & number(noise.LANES - 1))
    words = noise.philox((i, update, stream, draw), (key & number(0xffffffff), key >> number(32)), xp)
    quarter = (element >> number(shift)) & number(3)
    second, odd = quarter >= number(2), (quarter & number(1)) >= number(1)
    b, turn = (xp.where(second, words[k + 2], words[k]) for k in (0, 1))
    cosine, sine = noise.pair(precision, b, turn, xp)
    return xp.lines, xp.where(odd, sine, cosine).name
