"""What an optimizer declares about itself: hyper-parameters and slots, and the error messages derived from them.

Everything that needs a name, a default, a range or a shape reads it from here: the constructors, the checkpoint manifest, the
converters, the command line and the tables in the README. Nothing here imports a framework.

>>> from gluon_optim.schema import Hyper
>>> Hyper('momentum', 0.9, '[0, 1)').check(0.5)
0.5
"""
import difflib
import inspect
import math
import numbers
import operator
from typing import Any, Callable, Collection, Dict, Iterable, NamedTuple, Optional, Sequence, Tuple, Type, Union

__all__ = ['Hyper', 'Slot', 'Values', 'check_int', 'check_known', 'compute_type', 'error_text', 'lower_name', 'one_of',
           'same_objects', 'some_of']


REQUIRED: Any = inspect.Parameter.empty  # the default of an argument without one


class Interval(NamedTuple):
    """A range of real numbers, parsed from mathematical notation such as ``'[0, 1)'``."""

    text: str
    low: float
    high: float
    low_closed: bool
    high_closed: bool

    @classmethod
    def parse(cls, text: str) -> 'Interval':
        low, high = text[1:-1].split(',')
        return cls(text, float(low), float(high), text[0] == '[', text[-1] == ']')

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, (int, float)) or math.isnan(value):
            return False
        above = value >= self.low if self.low_closed else value > self.low
        below = value <= self.high if self.high_closed else value < self.high
        return above and below


class Hyper(NamedTuple):
    """One hyper-parameter of a rule.

    Parameters
    ----------
    name : str
        MXNet's name for it (``learning_rate``, ``wd``, ``beta1``, ``epsilon``).
    default : number, bool, str or None
        `REQUIRED` for an argument that must be given.
    domain : str or collection
        For a number, an interval in mathematical notation (``'[0, 1)'``); for a switch, a tuple of allowed values.
    doc : str
        A phrase for the tables: what it is, and its unit.
    optional : bool
        Whether None is also allowed.

    A switch is static: rules branch on it with Python's ``if``. A number reaches the arrays only through
    ``Rule.coefficients``, so one compiled kernel serves all its values.

    `check` raises ValueError for a value that is not allowed, TypeError for one of another type.

    >>> Hyper('beta1', 0.95, '[0, 1)').check(1.2)
    Traceback (most recent call last):
      ...
    ValueError: `beta1` must be in [0, 1). Received: beta1=1.2. Pass a number in that range, or leave it out for the default 0.95.
    """

    name: str
    default: Any
    domain: Union[str, Collection[Any]]
    doc: str = ''
    optional: bool = False

    @property
    def is_switch(self) -> bool:
        return not isinstance(self.domain, str)

    @property
    def allowed(self) -> str:
        """The domain in words, as error messages and tables print it."""
        text = 'in ' + self.domain if isinstance(self.domain, str) else 'one of ' + one_of(self.domain)
        return text + (' or None' if self.optional else '')

    def check(self, value: Any) -> Any:
        """Return ``value`` as a Python number or switch, or raise an error that says what is allowed."""
        if value is None and self.optional:
            return None
        if self.is_switch:
            # `in` would let 0 pass for False and 1.0 for True
            if any(value is choice or (type(value) is type(choice) and value == choice) for choice in self.domain):
                return value
            raise self._refuse(ValueError if isinstance(value, (bool, str, int, float)) else TypeError, value)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise self._refuse(TypeError, value)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if number not in Interval.parse(str(self.domain)):
            raise self._refuse(ValueError, value)
        return number

    def _refuse(self, error: Type[Exception], value: Any) -> Exception:
        advice = 'one of them' if self.is_switch else 'a number in that range'
        off = ', None to switch it off' if self.optional else ''
        left_out = '' if self.default is REQUIRED else f', or leave it out for the default {self.default!r}'
        return error(f'`{self.name}` must be {self.allowed}. Received: {self.name}={value!r}. Pass {advice}{off}{left_out}.')


SHAPES: Dict[str, Callable[[Sequence[int]], Tuple[int, ...]]] = {
    'weight': lambda shape: tuple(shape),
    'scalar': lambda shape: (),
    'rows': lambda shape: tuple(shape[:1]),
    'columns': lambda shape: tuple(shape[1:]),
}


class Slot(NamedTuple):
    """One array that a rule keeps per parameter.

    Parameters
    ----------
    name : str
        The key under which it is saved (``<parameter>/<name>``).
    like : str
        How its shape follows from the weight's: 'weight', the same; 'scalar', one number (shape (1,) in MXNet, () elsewhere);
        'rows', one for each entry of the first axis; 'columns', one for each position along the others. Compiled kernels
        support the first two.
    init : float or 'weight'
        What it holds before the first update: a number, or the weight itself.
    torch : str
        The key that PyTorch's state_dict uses for this quantity.
    doc : str

    Raises nothing: `register` tries a rule before it accepts it, and raises TypeError where its slots do not work.

    >>> Slot('row_sums', 'rows').shape((3, 4)), Slot('norm', 'scalar').shape((3, 4))
    ((3,), ())
    """

    name: str
    like: str = 'weight'
    init: Union[float, str] = 0.0
    torch: str = ''
    doc: str = ''

    def shape(self, weight: Sequence[int]) -> Tuple[int, ...]:
        """The shape of the slot of a weight of shape ``weight``."""
        return SHAPES[self.like](weight)


class Values:
    """Named values, read as attributes: hyper-parameters ``h.beta1``, coefficients ``c.lr``, slots ``s.mean``.

    Raises AttributeError for a name that is not there, with those that are.

    >>> h = Values(beta1=0.9, amsgrad=False)
    >>> h.beta1, 'beta2' in h, h
    (0.9, False, Values(beta1=0.9, amsgrad=False))
    """

    def __init__(self, **values: Any):
        self.__dict__.update(values)

    def replace(self, **values: Any) -> 'Values':
        """A copy with some values replaced."""
        return Values(**{**self.__dict__, **values})

    def asdict(self) -> Dict[str, Any]:
        return dict(self.__dict__)

    def __getattr__(self, name: str) -> Any:  # reached only when the attribute is missing
        raise AttributeError(f'no `{name}` here; available: {one_of(self.__dict__)}')

    def __contains__(self, name: str) -> bool:
        return name in self.__dict__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self.__dict__ == other.__dict__

    def __repr__(self) -> str:
        return 'Values(' + ', '.join(f'{k}={v!r}' for k, v in self.__dict__.items()) + ')'


def one_of(names: Iterable[Any]) -> str:
    """Names as an error message lists them.

    ``names`` may be any objects; raises nothing.

    >>> one_of(['a', 'b', None])
    "'a', 'b', None"
    """
    return ', '.join(map(repr, names))


def some_of(names: Collection[Any], most: int = 6) -> str:
    """Names as `one_of` lists them, and of more than ``most`` the first ones and how many there are.

    Raises nothing.

    >>> some_of('abcdef', most=3)
    "'a', 'b', 'c', ... (6)"
    """
    shown = one_of(list(names)[:most])
    return shown if len(names) <= most else f'{shown}, ... ({len(names)})'


# other frameworks' names -> MXNet's
_WORDS = {'lr': ('learning_rate',), 'weight_decay': ('wd',), 'eps': ('epsilon',), 'betas': ('beta1', 'beta2'), 'b1': ('beta1',),
          'b2': ('beta2',)}


def lower_name(name: Any) -> Any:
    """``name`` lower-cased; other objects are returned unchanged.

    Raises nothing.

    >>> lower_name('AdamW'), lower_name(3)
    ('adamw', 3)
    """
    return name.lower() if isinstance(name, str) else name


def compute_type(dtype: Any) -> str:
    """The type in which a weight of type ``dtype`` is updated, and of its slots: float64 for float64, otherwise float32.

    Raises nothing.

    >>> compute_type('float64'), compute_type('float16')
    ('float64', 'float32')
    """
    return 'float64' if str(dtype).endswith('float64') else 'float32'


def same_objects(old: Sequence[Any], new: Sequence[Any]) -> bool:
    """Whether ``new`` has the very objects of ``old``, in their order. Raises nothing for two sequences.

    >>> same_objects(['a', None], ('a', None)), same_objects([[]], [[]])
    (True, False)
    """
    return len(old) == len(new) and all(map(operator.is_, old, new))


def check_int(name: str, value: Any, least: int = 0) -> int:
    """``value``, a Python or NumPy integer, as a Python one; ValueError for anything else, or a value below ``least``.

    ``name`` is what the error calls it, ``least`` the smallest that is allowed. Raises ValueError.

    >>> check_int('step', -1)
    Traceback (most recent call last):
      ...
    ValueError: `step` must be a whole number, 0 or more. Received: step=-1.
    """
    try:
        if not isinstance(value, bool) and operator.index(value) >= least:
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f'`{name}` must be a whole number, {least} or more. Received: {name}={value!r}.')


def error_text(error: BaseException) -> str:
    """An error's message, without the numbers and quotes that Python adds.

    ``error`` is any exception; raises nothing.

    >>> error_text(KeyError('no such name'))
    'no such name'
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f': {error.filename!r}' if error.filename else '')
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error) or type(error).__name__


def check_known(what: str, name: Any, known: Iterable[str], error: Type[Exception] = TypeError, owner: Optional[str] = None
                ) -> None:
    """Raise ``error``, suggesting close matches, unless ``name`` is one of ``known``. TypeError if it is not a string.

    ``what`` says in the message what is named, and ``owner`` of what.

    >>> check_known('optimizer', 'novgrad', ['novograd', 'adamw'], ValueError)
    Traceback (most recent call last):
      ...
    ValueError: Unknown optimizer 'novgrad'. Did you mean 'novograd'? Known: 'adamw', 'novograd'.
    >>> check_known('argument', 'lr', ['learning_rate', 'wd'], owner='adamw')
    Traceback (most recent call last):
      ...
    TypeError: Unknown argument of adamw 'lr'. Did you mean 'learning_rate'? Known: 'learning_rate', 'wd'.
    """
    known = known if isinstance(known, Collection) else list(known)
    if isinstance(name, str) and name in known:
        return
    known = sorted(known)
    of = f' of {owner}' if owner else ''
    if not isinstance(name, str):
        raise TypeError(f'The name of the {what}{of} must be a string. Received: {name!r}. Known: {one_of(known)}.')
    near = [word for word in _WORDS.get(name, ()) if word in known]
    near = near or difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)
    hint = f' Did you mean {" or ".join(map(repr, near))}?' if near else ''
    raise error(f'Unknown {what}{of} {name!r}.{hint} Known: {one_of(known)}.')
