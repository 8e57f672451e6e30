"""What the rules of MXNet's own optimizers share: how its operators read numbers, and what they do to a gradient first.

MXNet 1.9.1 passes numbers to its operators as text, and reads most of them in single precision, even for float64
weights: for beta2=0.999 its 1 - beta2 is 1.3e-5 too small. These rules do the same wherever they run, so that a run continues
in PyTorch as it would have in MXNet: `MXNumbers` is their namespace for coefficients, `AsRead` the one for symbols.
"""
import contextlib
import functools
from typing import Any, ClassVar, Dict

import numpy

from ...schema import Hyper, Values
from ..base import Rule, _Scalars, bias_correction, clipped, rounded_to, scalars

__all__ = ['BETA1', 'BETA2', 'LAZY_UPDATE', 'MOMENTUM', 'WD', 'DecayedFirst', 'MXNumbers', 'MXRule', 'ScaledByRate', 'VARIANT',
           'correction', 'factor', 'half_norm', 'operator_correction', 'parameter', 'parameters', 'rate', 'rescaled',
           'rounded', 'working']

_REALS: Dict[str, Any] = {'float32': numpy.float32, 'float64': numpy.float64}
_NOTHING = contextlib.nullcontext()  # to be ignored
MOST_DIGITS = 19  # of a fraction; MXNet's parser drops the rest


@functools.lru_cache(maxsize=4096)
def as_parsed(x: float, precision: str = 'float32') -> float:
    """``x`` as MXNet reads it from text: digits in that precision, then multiplied by powers of ten in the same precision.

    >>> as_parsed(0.1) == float(numpy.float32(0.1)), as_parsed(8.49e-06) == float(numpy.float32(8.49e-06))
    (True, False)
    """
    real = _REALS[precision]
    digits, _, exponent = repr(abs(float(x))).partition('e')
    whole, _, fraction = digits.partition('.')
    value, fraction = real(int(whole)), fraction[:MOST_DIGITS]
    if fraction:
        value += real(int(fraction) / 10.0 ** len(fraction))
    if exponent:
        power = abs(int(exponent))
        scale = _power_of_ten(power, precision)
        with numpy.errstate(over='ignore', under='ignore') if power >= 30 else _NOTHING:
            value = value / scale if exponent[0] == '-' else value * scale
    return float(value) if x >= 0 else -float(value)


@functools.lru_cache(maxsize=None)
def _power_of_ten(exponent: int, precision: str) -> Any:
    """10^exponent, as MXNet's parser multiplies it up in that precision."""
    real = _REALS[precision]
    eights, ones = divmod(exponent, 8)
    with numpy.errstate(over='ignore'):
        return functools.reduce(numpy.multiply, [real(1e8)] * eights + [real(10)] * ones, real(1))


class MXNumbers(_Scalars):
    """The namespace of coefficients for MXNet's operators on weights of one precision."""

    parameter = staticmethod(as_parsed)

    def __init__(self, precision: str):
        self.precision = precision

    @staticmethod
    def rounded(x: float) -> float:
        return float(numpy.float32(x))

    def working(self, x: float) -> float:
        return float(numpy.dtype(self.precision).type(x))

    def operand(self, x: float) -> float:
        """A number combined with arrays. In single precision it is rounded once more, so how it was read does not matter."""
        return as_parsed(x, 'float64') if self.precision == 'float64' else x


_NUMBERS = {precision: MXNumbers(precision) for precision in ('float32', 'float64')}


class AsRead:
    """A namespace of coefficients that reads numbers as MXNet's operators do. Symbols, which have no digits, are rounded."""

    def __init__(self, xp: Any):
        self.xp = xp

    def __getattr__(self, name: str) -> Any:
        return getattr(self.xp, name)

    def parameter(self, x: Any) -> Any:
        return as_parsed(x) if isinstance(x, (int, float)) else self.xp.single(x)

    def rounded(self, x: Any) -> Any:
        return MXNumbers.rounded(x) if isinstance(x, (int, float)) else self.xp.single(x)


def parameter(xp: Any, x: Any) -> Any:
    """``x`` as an argument of an operator."""
    return xp.parameter(x) if hasattr(xp, 'parameter') else x


def rounded(xp: Any, x: Any) -> Any:
    """``x`` in single precision, as operators read lists of numbers."""
    return xp.rounded(x) if hasattr(xp, 'rounded') else x


def working(xp: Any, x: Any) -> Any:
    """``x`` rounded to the precision of the weight: an intermediate result of an operator."""
    return xp.working(x) if hasattr(xp, 'working') else x


def parameters(xp: Any, h: Values, *names: str) -> Values:
    """The hyper-parameters ``names`` as arguments of an operator."""
    return Values(**{name: parameter(xp, getattr(h, name)) for name in names})


def correction(xp: Any, beta: float, t: Any) -> Any:
    """1 - beta^t, exactly as MXNet's Python code computes it."""
    return 1.0 - beta ** t if isinstance(xp, MXNumbers) else bias_correction(xp, beta, t)


def operator_correction(xp: Any, beta: float, t: Any) -> Any:
    """1 - beta^t as an operator computes it, in the precision of the weight: in float32 it is off by up to 1e-4."""
    if not isinstance(xp, MXNumbers):
        return bias_correction(xp, parameter(xp, beta), t)
    return working(xp, 1 - working(xp, parameter(xp, beta) ** t))


def half_norm(xp: Any, x: Any) -> Any:
    """The L2 norm of a float16 array as MXNet 1.x computes it: each square is rounded to float16."""
    x = rounded_to(xp, 'float16', x)
    return xp.sqrt(xp.sum(rounded_to(xp, 'float16', x * x)))


def rate(value: float) -> Hyper:
    """The learning rate, with MXNet's default."""
    return Hyper('learning_rate', value, '(-inf, inf)', 'step size')


WD = Hyper('wd', 0.0, '(-inf, inf)', 'weight decay, added to the gradient')
MOMENTUM = Hyper('momentum', 0.0, '[0, inf)', 'decay of the momentum; 0 keeps none')
LAZY_UPDATE = Hyper('lazy_update', True, (False, True), 'row_sparse gradients, which MXNet itself handles, update only their rows')
VARIANT = Hyper('variant', '1.x', ('1.x', '2.x'), "whose numbers: MXNet 1.9.1's, or those of 2.0")
BETA1 = Hyper('beta1', 0.9, '[0, 1)', 'decay of the mean of gradients')
BETA2 = Hyper('beta2', 0.999, '[0, 1)', 'decay of the mean of squared gradients')


class MXRule(Rule):
    """A rule for one of MXNet's own optimizers.

    ``operator``
        Whether MXNet runs it as one operator. Otherwise it is Python code that combines each coefficient with arrays.
    """

    operator: ClassVar[bool] = True

    @classmethod
    def numbers(cls, xp: Any, precision: str) -> Any:
        return _NUMBERS[precision] if xp is scalars else AsRead(xp)

    @classmethod
    def all_coefficients(cls, xp: Any, h: Values, t: Any) -> Dict[str, Any]:
        if h.clip_gradient is not None:
            h = h.replace(clip_gradient=parameter(xp, h.clip_gradient))
        if cls.operator:
            return super().all_coefficients(xp, h.replace(rescale_grad=parameter(xp, h.rescale_grad)), t)
        c = super().all_coefficients(xp, h, t)
        return {name: xp.operand(x) for name, x in c.items()} if hasattr(xp, 'operand') else c


def rescaled(xp: Any, c: Values, g: Any) -> Any:
    """The gradient, rescaled and clipped."""
    return clipped(xp, c, c.rescale_grad * g)


class ScaledByRate(MXRule):
    """Without clipping, learning rate and rescale_grad are one factor of the gradient."""

    @classmethod
    def prepare(cls, xp, c, static, w, g):
        return rescaled(xp, c, g) if static.clip else g


def factor(h: Values, x: Any) -> Any:
    """``x`` as the factor for a gradient prepared by `ScaledByRate`."""
    return x if h.clip_gradient is not None else x * h.rescale_grad


class DecayedFirst(MXRule):
    """The gradient is rescaled, then decay is added, then both are clipped; in variant '2.x' the gradient alone is clipped."""

    @classmethod
    def prepare(cls, xp, c, static, w, g):
        if ('variant', '2.x') in static.switches:
            return rescaled(xp, c, g) + c.wd * w
        return clipped(xp, c, c.rescale_grad * g + c.wd * w)
