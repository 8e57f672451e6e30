"""Check that a class is a valid rule before it is registered, by running it once with NumPy and once on symbols."""
import numbers
from typing import Any, Callable, NoReturn, Optional, Type

import numpy

from ..schema import SHAPES, Hyper, Slot, one_of
from .base import BASE_HYPERS, Rule, initial_slot, scalars
from .compensated import COMPENSATION
from .graph import trace

__all__ = ['validate']

RESERVED = ('weight', 'master', COMPENSATION.name)  # other arrays of a parameter
TRIED = 1, 2, 50  # updates: the first, one with a past, and one of a run that has settled
ADVICE = ('xp has sum, sqrt, abs, sign, exp, minimum, maximum, where; arrays have + - * / and comparisons; nothing may work in '
          'place or branch on values. A rule that needs more must set lowerable = False. ')


def validate(rule: Type[Rule], name: str) -> None:
    """Raise TypeError, saying what is expected, for a rule that would fail at a trainer's first step.

    If the rule is not ``lowerable``, its step is not run, because it may need MXNet's arrays.
    """
    trial = _Trial(name)
    trial.hypers(getattr(rule, 'hypers', None))
    h = trial.attempt('hypers', 'with defaults that are allowed', rule.hyperparameters)
    for what in ('slots', 'coefficients', 'step'):
        trial.expect(callable(getattr(rule, what, None)), what, 'a function', repr(getattr(rule, what, None)))

    expected = (f"a function of h that returns a tuple of Slots: names other than {one_of(RESERVED)}, like='weight' or 'scalar', "
                'or where lowerable is False one of ' + one_of(SHAPES))
    slots = trial.attempt('slots', expected, lambda: rule.slots(h))
    sound = isinstance(slots, tuple) and all(map(_is_slot, slots)) and len({slot.name for slot in slots}) == len(slots)
    trial.expect(sound, 'slots', expected, repr(slots))

    if rule.lowerable:
        sound = all(slot.like in ('weight', 'scalar') for slot in slots)
        trial.expect(sound, 'slots', "like='weight' or 'scalar', or the rule must set lowerable = False", repr(slots))

    expected = 'a function of (xp, h, t) that returns a dictionary of names and numbers, the same names for every t'
    first: Any = None
    for t in TRIED:
        c = trial.attempt('coefficients', expected, lambda: rule.coefficients(scalars, h, t))  # noqa: B023 called here
        sound = isinstance(c, dict) and all(isinstance(key, str) and isinstance(value, numbers.Real) for key, value in c.items())
        trial.expect(sound, 'coefficients', expected, repr(c))
        first = first or c
        trial.expect(set(c) == set(first), 'coefficients', expected, f'{one_of(first)} for t=1, {one_of(c)} for t={t}')

    if rule.lowerable:
        expected = ('a function of (xp, h, c, w, g, s) that returns the new weight and a dictionary of the new slots '
                    f'({one_of(slot.name for slot in slots) or "none"}), each with its own shape')
        trial.attempt('step', expected, lambda: _run(rule, h, slots))
        trial.attempt('step', expected, lambda: trace(rule, rule.static(h), tuple(rule.all_coefficients(scalars, h, 1))))


class _Trial:
    def __init__(self, name: str):
        self.name = name

    def refuse(self, what: str, expected: str, received: str, error: Optional[Exception] = None) -> NoReturn:
        raise TypeError(f'`{what}` of the rule {self.name!r} must be {expected}. Received: {received.rstrip(".")}. '
                        f'{ADVICE if what == "step" else ""}See help(gluon_optim.Rule).') from error

    def expect(self, sound: bool, what: str, expected: str, received: str) -> None:
        if not sound:
            self.refuse(what, expected, received)

    def attempt(self, what: str, expected: str, function: Callable[[], Any]) -> Any:
        try:
            with numpy.errstate(all='ignore'):
                return function()
        except Exception as error:  # the user's code may raise anything
            self.refuse(what, expected, f'{type(error).__name__}: {error}', error)

    def hypers(self, hypers: Any) -> None:
        names = [hyper.name for hyper in hypers if isinstance(hyper, Hyper)] if isinstance(hypers, tuple) else []
        reserved = sorted(hyper.name for hyper in BASE_HYPERS)
        different = len({*names, *reserved}) == len(hypers or ()) + len(reserved)
        self.expect(different and {'learning_rate', 'wd'} <= set(names), 'hypers', 'a tuple of Hypers with different names, '
                    f"including 'learning_rate' and 'wd' but not {one_of(reserved)}", repr(hypers))


def _is_slot(slot: Any) -> bool:
    if not isinstance(slot, Slot) or slot.like not in SHAPES:
        return False
    named = isinstance(slot.name, str) and slot.name.isidentifier() and slot.name not in RESERVED
    return named and (slot.init == 'weight' or isinstance(slot.init, numbers.Real))


def _run(rule: Type[Rule], h: Any, slots: Any) -> None:
    """One step on read-only arrays. Raises whatever the step raises, and TypeError for results of the wrong form."""
    weight, gradient = numpy.linspace(-1, 1, 6).reshape(2, 3), numpy.linspace(2, 3, 6).reshape(2, 3)
    old = {slot.name: initial_slot(slot, weight) for slot in slots}
    for array in (weight, gradient, *old.values()):
        array.flags.writeable = False
    new = rule.run(numpy, h, 1, weight, gradient, old)
    if not (isinstance(new, tuple) and len(new) == 2 and isinstance(new[1], dict)):
        raise TypeError(f'it returned {type(new).__name__}')
    shapes = {'the weight': weight.shape, **{name: array.shape for name, array in old.items()}}
    found = {'the weight': numpy.shape(new[0]), **{name: numpy.shape(value) for name, value in new[1].items()}}
    if found != shapes:
        raise TypeError(f'shapes were {shapes}, it returned {found}')
