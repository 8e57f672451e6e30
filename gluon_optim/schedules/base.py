"""How a schedule is written: once, as a pure function of the update number t = 1, 2, ..., with declared arguments."""
from typing import Any, ClassVar, Dict, List, Mapping, Optional, Sequence, Tuple, Type

from ..schema import REQUIRED, Hyper, Values, check_int, check_known, one_of

__all__ = ['Count', 'Inner', 'Numbers', 'Schedule', 'Segments', 'Steps', 'Wrapper', 'completed', 'stepwise', 'warmed_up']

LARGEST = 2 ** 53   # up to here float64 holds every whole number
LONGEST = 10 ** 4   # entries of a list: each costs a comparison at every update


# Arguments that are more than a number or a switch

class Count(Hyper):
    """A whole number; ``domain`` is the smallest, as text."""

    __slots__ = ()

    @property
    def allowed(self) -> str:
        return f'a whole number, {self.domain} or more'

    def check(self, value: Any) -> int:
        number = check_int(self.name, value, int(str(self.domain)))
        if number > LARGEST:
            raise ValueError(f'`{self.name}` must be at most 2^53. Received: {self.name}={value!r}.')
        return number


class Numbers(Hyper):
    """A list of numbers, each within ``domain``."""

    __slots__ = ()

    @property
    def allowed(self) -> str:
        return f'a list of numbers in {self.domain}'

    def check(self, value: Any) -> Tuple[float, ...]:
        one = Hyper(self.name, None, self.domain)
        return tuple(float(Hyper.check(one, item)) for item in _entries(self, value))


class Steps(Hyper):
    """A list of update numbers, each above the one before it; ``optional``: it may be empty, and hold a number again."""

    __slots__ = ()

    @property
    def allowed(self) -> str:
        return f'an increasing list of whole numbers, {self.domain} or more'

    def check(self, value: Any) -> Tuple[int, ...]:
        items = () if self.optional and value in ([], ()) else _entries(self, value)
        steps = tuple(Count(self.name, None, self.domain).check(item) for item in items)
        for before, after in zip(steps, steps[1:]):
            if after < before or (after == before and not self.optional):
                raise ValueError(f'`{self.name}` must be {self.allowed}. Received: {before} before {after}.')
        return steps


class Inner(Hyper):
    """A schedule: in an object a scheduler, in a file its record, in ``h`` the pair (schedule, its hyper-parameters)."""

    __slots__ = ()

    @property
    def allowed(self) -> str:
        return 'a scheduler'

    def check(self, value: Any) -> Tuple[Type['Schedule'], Values]:
        if not _is_pair(value):
            raise TypeError(f'`{self.name}` must be {self.allowed}. Received: {self.name}={value!r:.80}.')
        schedule, h = value
        return schedule, h


class Segments(Hyper):
    """A list of pairs (number of updates, schedule); the last number may be None, for no end."""

    __slots__ = ()

    @property
    def allowed(self) -> str:
        return 'a list of pairs (steps, scheduler)'

    def check(self, value: Any) -> Tuple[Tuple[Optional[int], Tuple[Type['Schedule'], Values]], ...]:
        segments: List[Tuple[Optional[int], Any]] = []
        entries = _entries(self, value)
        for place, entry in enumerate(entries):
            if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not _is_pair(entry[1]):
                raise TypeError(f'`{self.name}` must be {self.allowed}. Received at {place}: {entry!r:.80}.')
            last = entry[0] is None and place == len(entries) - 1
            segments.append((None if last else Count(f'{self.name}[{place}]', None, '1').check(entry[0]), tuple(entry[1])))
        Count(f'the sum of {self.name}', None, '1').check(sum(steps or 1 for steps, _ in segments))
        return tuple(segments)


def _entries(hyper: Hyper, value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f'`{hyper.name}` must be {hyper.allowed}. Received: {hyper.name}={value!r:.80}.')
    if not 0 < len(value) <= LONGEST:
        raise ValueError(f'`{hyper.name}` must be {hyper.allowed}, with 1 to {LONGEST} entries. Received: {len(value)}.')
    return value


def _is_pair(value: Any) -> bool:
    return (isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], type)
            and issubclass(value[0], Schedule) and isinstance(value[1], Values))


# The schedules

class Schedule:
    """Base class of all schedules. A subclass holds declarations and functions; it is never instantiated.

    ``name``, ``summary``, ``counterpart``
        The key in the table, a one-line description, and the class of PyTorch that computes the same.
    ``hypers``
        Tuple of `Hyper` under MXNet's words (``base_lr``, ``warmup_steps``, ``final_lr``, ``step``, ``factor``), in the order
        of the constructor's arguments.
    ``history``
        What a scheduler keeps beside them, if it learns of something while it runs.
    ``rate(xp, h, t)``
        The rate of update ``t``; ``t`` is a number or an array of the namespace ``xp``, which has floor, cos, sqrt, minimum,
        maximum, where. No Python ``if`` on ``t``. Past its end a schedule keeps its last value.
    ``of(attributes)``
        The hyper-parameters in the attributes of a scheduler of the class that this schedule describes.
    ``after(attributes, num_update)``
        The attributes that such a scheduler has once it has been asked for every update up to ``num_update``.
    ``length(h)``
        The update from which on the rate does not change any more, None if there is none.

    Raises nothing: `schedule_of` and `gluon_optim.rate` check what they get.

    >>> from gluon_optim.schedules import schedule_of
    >>> schedule, h = schedule_of({'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': dict(
    ...     step=10, factor=0.5, stop_factor_lr=1e-8, count=0, base_lr=0.4, warmup_steps=0, warmup_begin_lr=0,
    ...     warmup_final_lr=0.4, warmup_mode='linear')})
    >>> schedule.name, h.factor
    ('factor', 0.5)
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ''
    counterpart: ClassVar[str] = ''
    hypers: ClassVar[Tuple[Hyper, ...]]
    history: ClassVar[Tuple[Hyper, ...]] = ()

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> Values:
        names = [hyper.name for hyper in cls.hypers + cls.history]
        if set(attributes) != set(names):
            raise KeyError(f'the attributes must be {one_of(names)}')
        return cls.hyperparameters(**attributes)

    @classmethod
    def hyperparameters(cls, **given: Any) -> Values:
        """The arguments ``given``, checked, and the defaults of the others. TypeError for an unknown or a missing one."""
        declared = cls.hypers + cls.history
        for name in given:
            check_known('argument', name, [hyper.name for hyper in declared], owner=cls.name)
        missing = [hyper.name for hyper in declared if hyper.default is REQUIRED and hyper.name not in given]
        if missing:
            raise TypeError(f'{cls.name} needs the arguments {one_of(missing)}.')
        h = Values(**{hyper.name: hyper.check(given.get(hyper.name, hyper.default)) for hyper in declared})
        cls.check(h)
        return h

    @staticmethod
    def check(h: Values) -> None:
        """Refuse invalid combinations of hyper-parameters; by default, none."""

    @staticmethod
    def after(attributes: Mapping[str, Any], num_update: int) -> Dict[str, Any]:
        return dict(attributes)  # most keep nothing of what they are asked

    @staticmethod
    def length(h: Values) -> Optional[int]:
        return None


class Wrapper(Schedule):
    """A schedule around others, which ``h`` holds as pairs (schedule, its hyper-parameters)."""

    @staticmethod
    def first(h: Values) -> Tuple[Type[Schedule], Values]:
        """The one within it that begins: `base_lr` is its."""
        schedule, inner = h.schedule
        return schedule, inner

    @staticmethod
    def within(attributes: Mapping[str, Any]) -> List[Tuple[Any, int, Optional[int]]]:
        """The schedulers among the attributes of one, the number of updates before the first one of each, and how many it has."""
        raise NotImplementedError

    @classmethod
    def hyperparameters(cls, **given: Any) -> Values:
        h = super().hyperparameters(**given)
        return h.replace(base_lr=cls.first(h)[1].base_lr)


# Parts of formulas

def completed(xp: Any, updates: Any, length: float) -> Any:
    """How many times ``length`` updates fit into ``updates``, whole numbers. The half keeps away from whole quotients, on the wrong
    side of which rounding may put them: XLA multiplies by 1 / length."""
    return xp.floor((updates + 0.5) / length)


def stepwise(xp: Any, t: Any, steps: Sequence[int], values: Sequence[float]) -> Any:
    """``values[0]`` up to update ``steps[0]``, then ``values[1]`` up to ``steps[1]``, and so on."""
    value = values[0] + 0.0 * t
    for step, after in zip(steps, values[1:]):
        value = xp.where(t > step, after, value)
    return value


def warmed_up(xp: Any, h: Values, t: Any, rate: Any) -> Any:
    """``rate``, and before update ``h.warmup_steps`` the warm-up of MXNet's schedulers: a line from ``warmup_begin_lr`` to
    ``warmup_final_lr``, or its beginning throughout (``warmup_mode='constant'``)."""
    if not h.warmup_steps:
        return rate
    rise = 0.0 if h.warmup_mode == 'constant' else h.warmup_final_lr - h.warmup_begin_lr
    return xp.where(t < h.warmup_steps, h.warmup_begin_lr + rise * t / h.warmup_steps, rate)
