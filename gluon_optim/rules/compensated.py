"""Half-precision weights without float32 masters: `compensated` is a rule around any rule that keeps their rounding error.

With ``multi_precision='kahan'`` a float16 or bfloat16 weight has one more slot, `COMPENSATION`, of the weight's own type: the
part of the exact weight that the rounded one lacks, as in Kahan's summation. An update is

    x = float32(weight) + float32(compensation)                        the exact weight
    x, slots = the rule's update of x, in float32
    weight = round(x);  compensation = round(x - float32(weight))      to nearest even

That takes 2 bytes per weight where a master takes 4. Slots are float32, as they are with masters. How exact it is:

- bfloat16: the pair has 17 significant bits. An update below 2^-17 = 8e-6 of the weight may be rounded away.
- float16: 23 significant bits, one less than float32, and nothing below 2^-25 = 3e-8, because the compensation is a multiple of
  2^-24, the smallest float16. Of weights below 0.125 it is subnormal. At a weight of 0.01, an update below 3e-6 of it may be lost.

A weight that overflows is infinite, and continues as one without a master would: its compensation is 0, and so is that of a NaN.

Because all of this is in the rule, every runtime that can round a number to the type has it; nothing else is needed of a printer
of kernels.
"""
from typing import Any, Dict, Iterable, Mapping, Tuple, Type

import numpy

from ..schema import Hyper, Slot, Values, compute_type
from .base import ROUND, KernelKey, Rule, rounded_to

__all__ = ['COMPENSATION', 'KAHAN', 'MULTI_PRECISION', 'check_multi_precision', 'compensated', 'exact_weight', 'is_compensated',
           'mode_of', 'slot_type', 'with_compensation']

KAHAN = 'kahan'
COMPENSATION = Slot('compensation', torch='compensation', doc="what the rounded weight lacks, of the weight's type")
MULTI_PRECISION = Hyper('multi_precision', True, (False, True, KAHAN),
                        "keep float32 masters of float16 and bfloat16 parameters, or with 'kahan' their rounding errors")
FINITE = 1e38  # no rounding error is that large


def check_multi_precision(value: Any) -> Any:
    """`MULTI_PRECISION` in MXNet, where anything that is not a text may stand for True or False."""
    return MULTI_PRECISION._replace(default=False).check(value if isinstance(value, str) else bool(value))


def mode_of(multi_precision: Any, dtype: str) -> Any:
    """What a weight of type ``dtype`` has besides its slots: True, a float32 master; 'kahan', a compensation; False, neither."""
    return dtype in ROUND and (KAHAN if multi_precision == KAHAN else bool(multi_precision))


def is_compensated(slots: Iterable[str]) -> bool:
    """Whether the compensation is among the names ``slots``."""
    return COMPENSATION.name in slots


def with_compensation(slots: Tuple[Slot, ...]) -> Tuple[Slot, ...]:
    """The slots of a rule that has ``slots`` where it runs `compensated`."""
    return (*slots, COMPENSATION)


def slot_type(slot: Slot, dtype: str) -> str:
    """The type of ``slot`` of a weight of type ``dtype``."""
    return dtype if slot.name == COMPENSATION.name else compute_type(dtype)


def exact_weight(weight: numpy.ndarray, slots: Mapping[str, numpy.ndarray]) -> numpy.ndarray:
    """The float32 weight of which ``weight`` is the rounded one, and the compensation in ``slots`` the rest."""
    return numpy.asarray(weight.astype('float32') + slots[COMPENSATION.name].astype('float32'))


_made: Dict[Tuple[Type[Rule], str], Type[Rule]] = {}


def compensated(rule: Type[Rule], dtype: str) -> Type[Rule]:
    """``rule`` for weights of type ``dtype``, 'float16' or 'bfloat16', that keeps what rounding them loses. A second call returns
    the same class, as kernels are kept by it."""
    if (rule, dtype) not in _made:
        _made[rule, dtype] = _around(rule, dtype)
    return _made[rule, dtype]


def _around(rule: Any, dtype: str) -> Type[Rule]:
    class Compensated(rule):  # type: ignore[misc]
        @staticmethod
        def slots(h: Values) -> Tuple[Slot, ...]:
            return with_compensation(rule.slots(h))

        @classmethod
        def apply(cls, xp: Any, static: KernelKey, c: Mapping[str, Any], w: Any, g: Any, slots: Mapping[str, Any]
                  ) -> Tuple[Any, Dict[str, Any]]:
            own = {name: slot for name, slot in slots.items() if name != COMPENSATION.name}
            inner = static._replace(slots=tuple(slot for slot in static.slots if slot.name in own))
            new, new_slots = rule.apply(xp, inner, c, w + slots[COMPENSATION.name], g, own)
            rounded = rounded_to(xp, dtype, new)
            lost = new - rounded
            rest = rounded_to(xp, dtype, xp.where(xp.abs(lost) < FINITE, lost, 0.0))
            return rounded, {**new_slots, COMPENSATION.name: rest}

    made: Type[Rule] = Compensated
    made.__name__, made.__doc__ = rule.__name__, rule.__doc__
    return made
