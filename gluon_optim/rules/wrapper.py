"""A rule that wraps another rule: `Wrapper` has the base's hyper-parameters and slots, and adds its own."""
from typing import Any, ClassVar, Dict, Iterator, Mapping, Tuple, Type

from ..schema import Hyper, Slot, Values
from . import registry
from .base import Rule

__all__ = ['Bases', 'Wrapper']


class Bases:
    """The names of all rules that the wrapper named ``but`` can wrap, including a user's rules registered later."""

    def __init__(self, but: str):
        self.but = but

    def __iter__(self) -> Iterator[str]:
        return (name for name in registry.names() if name != self.but)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(x == name for x in self)


class Wrapper(Rule):
    """Base class of rules that wrap a rule.

    ``own``
        The wrapper's hyper-parameters; the first is its ``base``, over `Bases`.
    ``takes_over``
        Hyper-parameters of the base that the wrapper handles: ``takes_over(h)`` gives the values passed to the base.
    ``own_coefficients(xp, h, t)``
        The wrapper's coefficients. ``step`` finds them under ``wrapper_<name>``, next to the base's.

    An argument of the base with the same name as one of the wrapper's is passed as ``base_<name>``. A subclass sets
    ``hypers = Wrapper.around(own, base.hypers)`` for the default base, and defines ``step``, which calls `inside` to get the
    base and its hyper-parameters.
    """

    own: ClassVar[Tuple[Hyper, ...]]

    @staticmethod
    def around(own: Tuple[Hyper, ...], theirs: Tuple[Hyper, ...]) -> Tuple[Hyper, ...]:
        """The hyper-parameters for a base that has ``theirs``: its rate and decay, the wrapper's own, the base's others."""
        taken = {hyper.name for hyper in own}
        renamed = tuple(hyper._replace(name='base_' + hyper.name) if hyper.name in taken else hyper for hyper in theirs)
        return renamed[:2] + own + renamed[2:]

    @classmethod
    def _of_the_base(cls, given: Mapping[str, Any]) -> Dict[str, Any]:
        """The values in ``given`` that belong to the base, under the base's names."""
        taken = {hyper.name for hyper in cls.own}
        return {name[len('base_'):] if name.startswith('base_') and name[len('base_'):] in taken else name: value
                for name, value in given.items() if name not in taken}

    @classmethod
    def declared(cls, given: Mapping[str, Any]) -> Tuple[Hyper, ...]:
        switch = cls.own[0]
        base = registry.get(switch.check(given.get(switch.name, switch.default)))
        return cls.around(cls.own, base.declared(cls._of_the_base(given)))

    @classmethod
    def takes_over(cls, h: Values) -> Mapping[str, Any]:
        """Values passed to the base in place of those in ``h``."""
        return {}

    @classmethod
    def inside(cls, h: Values) -> Tuple[Type[Rule], Values]:
        """The base, and those of its hyper-parameters that ``h`` holds, under the base's names."""
        values = cls._of_the_base(h.asdict())
        values.update((name, value) for name, value in cls.takes_over(h).items() if name in values)
        return registry.get(h.base), Values(**values)

    @classmethod
    def check(cls, h: Values) -> None:
        base, values = cls.inside(h)
        base.check(values)

    # a class method for a function; mypy 1.14, the last for Python 3.8, does not mind
    @classmethod
    def slots(cls, h: Values) -> Tuple[Slot, ...]:  # type: ignore[override,unused-ignore]
        base, values = cls.inside(h)
        return base.slots(values)

    @classmethod
    def prepare(cls, xp: Any, c: Values, static: Any, w: Any, g: Any) -> Any:
        base, _ = cls.inside(Values(**dict(static.switches)))
        return base.prepare(xp, c, static, w, g)

    @classmethod
    def coefficients(cls, xp: Any, h: Values, t: Any) -> Dict[str, Any]:  # type: ignore[override,unused-ignore]
        base, values = cls.inside(h)
        own = {f'{cls.name}_{name}': value for name, value in cls.own_coefficients(xp, h, t).items()}
        return {**base.coefficients(xp, values, t), **own}

    @classmethod
    def own_coefficients(cls, xp: Any, h: Values, t: Any) -> Dict[str, Any]:
        return {}

