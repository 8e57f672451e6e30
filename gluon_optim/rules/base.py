"""How an optimizer's mathematics is written: once, as pure functions on an array namespace.

A rule is independent of any framework. ``coefficients`` turns hyper-parameters and the step number into scalars (float64, once per
step); ``step`` turns weight, gradient and slots into new ones. Everything else is derived: kernels for MXNet's CPU
and GPU contexts and updates on ``mx.nd`` (`gluon_optim.mxnet`), PyTorch, ONNX and optax mirrors, and float64 NumPy for people
and tests.

>>> import numpy as np
>>> from gluon_optim import rules
>>> rule = rules.get('sgd_torch')
>>> h = rule.hyperparameters(learning_rate=0.5, momentum=0.9)
>>> w, slots = rule.run(np, h, t=1, weight=np.ones(2), gradient=np.array([1.0, 2.0]))
>>> w, slots['momentum_buffer']
(array([0.5, 0. ]), array([1., 2.]))
"""
import math
from typing import Any, Callable, ClassVar, Dict, FrozenSet, Mapping, NamedTuple, Optional, Tuple, Type

import numpy

from ..schema import Hyper, Slot, Values, check_known, compute_type

__all__ = ['BASE_HYPERS', 'NOISE', 'ROUND', 'TEMPERATURE', 'KernelKey', 'Rule', 'bias_correction', 'clipped', 'divided',
           'initial_slot', 'norm', 'rounded_to', 'scalar', 'scalars', 'standard_normal', 'trust_ratio']

BASE_HYPERS = (
    Hyper('rescale_grad', 1.0, '(-inf, inf)', 'factor on the gradient; `Trainer.step(batch_size)` sets it to 1/batch_size'),
    Hyper('clip_gradient', None, '(0, inf)', 'bound on each element of the rescaled gradient', optional=True),
)
TEMPERATURE = Hyper('temperature', 1.0, '(0, inf)', 'samplers draw from exp(-U / temperature); 1 is the posterior')
ROUND = {'float16': 'half', 'bfloat16': 'bfloat'}   # type of half precision -> the function of array namespaces that rounds to it
NOISE = Hyper('noise', 'philox', ('philox', 'mxnet'), "who draws: a counter, inside compiled kernels, or MXNet's generator")


class _Scalars:
    """The array namespace on Python floats: the part of it that `Rule.coefficients` needs."""

    sqrt = staticmethod(math.sqrt)
    exp = staticmethod(math.exp)
    expm1 = staticmethod(math.expm1)
    log = staticmethod(math.log)
    minimum = staticmethod(min)
    maximum = staticmethod(max)

    @staticmethod
    def where(condition: Any, x: float, y: float) -> float:
        return x if condition else y


scalars = _Scalars()


def bias_correction(xp: Any, beta: float, t: Any) -> Any:
    """1 - beta**t, accurate even where ``t`` is traced in single precision (written naively, float32 is off by 1e-5).

    >>> bias_correction(scalars, 0.9, 1)  # doctest: +ELLIPSIS
    0.0999999999999999...
    """
    return -xp.expm1(t * math.log(beta)) if beta > 0 else 1.0


def norm(xp: Any, x: Any) -> Any:
    """The L2 norm over the whole tensor."""
    return xp.sqrt(xp.sum(x * x))


def divided(xp: Any, x: Any, size: Any) -> Any:
    """``x / size``, and ``x`` itself where ``size`` is 0: a tensor of zeros stays zero."""
    return x / xp.where(size == 0, 1.0, size)


def trust_ratio(xp: Any, numerator: Any, denominator: Any) -> Any:
    """``numerator / denominator`` of two norms, and 1 where either is 0 (LARC, LARS, LAMB, LANS)."""
    return xp.where(numerator == 0, 1.0, xp.where(denominator == 0, 1.0, divided(xp, numerator, denominator)))


def standard_normal(xp: Any, like: Any) -> Any:
    """Samples of the standard normal distribution in the form of ``like``; NumPy's come from its global generator. For those of
    a trainer pass `gluon_optim.rules.noise.Noise(numpy, ...)` as ``xp``."""
    if xp is numpy:
        return numpy.random.standard_normal(like.shape).astype(like.dtype)  # noqa: NPY002
    return xp.standard_normal(like)


def rounded_to(xp: Any, dtype: str, x: Any) -> Any:
    """``x`` rounded to 'float16' or 'bfloat16', to nearest even, in the type that it has.

    >>> rounded_to(numpy, 'float16', numpy.float32([1.0001, 1.001])), rounded_to(numpy, 'bfloat16', numpy.float32([1.001, 1.01]))
    (array([1.       , 1.0009766], dtype=float32), array([1.       , 1.0078125], dtype=float32))
    """
    own = getattr(xp, ROUND[dtype], None)
    if own is None or isinstance(own, type):   # NumPy has no such function, and its `half` is a type
        return _ROUND_IN_NUMPY[dtype](x)
    return own(x)


def _bfloat(x: numpy.ndarray) -> numpy.ndarray:
    """``x`` rounded to bfloat16, the first half of a float32."""
    bits = x.astype('float32').view('uint32')
    bits = (bits + 0x7fff + (bits >> 16 & 1) & 0xffff0000).astype('uint32')
    return numpy.where(numpy.isnan(x), x, bits.view('float32').astype(x.dtype))


_ROUND_IN_NUMPY: Mapping[str, Callable[[numpy.ndarray], numpy.ndarray]] = {
    'float16': lambda x: x.astype('float16').astype(x.dtype), 'bfloat16': _bfloat}


def scalar(value: Any, like: Any) -> Any:
    """A coefficient as a scalar array, which a scalar slot can hold; ``like`` is another such array."""
    return 0 * like + value


def clipped(xp: Any, c: Values, x: Any) -> Any:
    """``x`` within +-clip_gradient, if that is set."""
    return xp.minimum(xp.maximum(x, -c.clip_gradient), c.clip_gradient) if 'clip_gradient' in c else x


class KernelKey(NamedTuple):
    """The hyper-parameters that change the computation itself, and so select a compiled kernel."""

    switches: Tuple[Tuple[str, Any], ...]
    slots: Tuple[Slot, ...]
    clip: bool


class Rule:
    """Base class of all rules. A subclass holds declarations and functions; it is never instantiated.

    ``name``, ``summary``, ``paper``
        The key in the registry, one line for tables, and where the algorithm comes from.
    ``hypers``
        Tuple of `Hyper`, ``learning_rate`` and ``wd`` first. `BASE_HYPERS` are added to every rule.
    ``slots(h)``
        Tuple of `Slot`; may depend on the hyper-parameters (for example, no slot without momentum).
    ``coefficients(xp, h, t)``
        Dictionary of scalars for the update number ``t`` = 1, 2, ... of a parameter, with the same keys for every ``t``.
        ``h.learning_rate``, ``h.wd`` and ``t`` may be traced (JAX, ONNX), so do not use Python's ``if`` on them; all others
        are Python numbers.
    ``step(xp, h, c, w, g, s)``
        The update: weight ``w``, gradient ``g``, slots ``s.<name>``, coefficients ``c.<name>``, and only the switches
        of ``h``. Returns the new weight and a dictionary of new slots. Pure: nothing in place, no branch on an
        array's values (use ``xp.where``). ``xp`` has sum, sqrt, abs, sign, exp, minimum, maximum, where.
    ``check(h)``
        Optional: raise ValueError on combinations that no implementation defines.
    ``lowerable``
        False where ``step`` does more than elementwise functions and sums over the tensor, so that it cannot be traced.
    ``needs``
        What else a runtime must have; `gluon_optim.rules.runtimes` lists the possible values.
    ``supplied``
        Values other than hyper-parameters that belong to the optimizer as a whole; ``h`` has them where they are kept.
    ``older``
        Hyper-parameters that came later, and the values of which states from before are.
    ``peers``
        Names of implementations that compute the same, as tests prove.

    `register` tries a rule and raises TypeError where it does not work; `hyperparameters` raises TypeError for an unknown
    argument, ValueError for a value out of range.

    >>> import numpy, gluon_optim as go
    >>> rule = go.rules.get('sgd_torch')
    >>> h = rule.hyperparameters(learning_rate=0.5)
    >>> rule.run(numpy, h, t=1, weight=numpy.ones(2), gradient=numpy.array([1.0, 2.0]))
    (array([0.5, 0. ]), {})
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ''
    paper: ClassVar[str] = ''
    hypers: ClassVar[Tuple[Hyper, ...]]
    peers: ClassVar[Tuple[str, ...]] = ()
    exceptions: ClassVar[Mapping[str, str]] = {}
    lowerable: ClassVar[bool] = True
    needs: ClassVar[FrozenSet[str]] = frozenset()
    supplied: ClassVar[Tuple[str, ...]] = ()
    older: ClassVar[Mapping[str, Any]] = {}

    slots: ClassVar[Callable[[Values], Tuple[Slot, ...]]]
    coefficients: ClassVar[Callable[[Any, Values, Any], Dict[str, Any]]]
    step: ClassVar[Callable[..., Tuple[Any, Dict[str, Any]]]]

    @staticmethod
    def check(h: Values) -> None:
        """Refuse invalid combinations of hyper-parameters; by default, none."""

    @classmethod
    def declared(cls, given: Mapping[str, Any]) -> Tuple[Hyper, ...]:
        """The hyper-parameters that go with the values ``given``; `BASE_HYPERS` are added to them.

        They are ``hypers``, unless one value determines which others there are, as larc's ``base`` does.
        """
        return cls.hypers

    @classmethod
    def hyper(cls, name: str) -> Hyper:
        """The declaration of one hyper-parameter."""
        return next(x for x in cls.hypers + BASE_HYPERS if x.name == name)

    @classmethod
    def hyperparameters(cls, **given: Any) -> Values:
        """Check ``given`` and fill in the defaults.

        Raises TypeError for an unknown name or a value of the wrong type, ValueError for one out of range.

        >>> from gluon_optim import rules
        >>> rules.get('adamw').hyperparameters(beta3=0.9)
        Traceback (most recent call last):
          ...
        TypeError: Unknown argument of adamw 'beta3'. Did you mean 'beta2' or 'beta1'? Known: 'amsgrad', 'beta1', 'beta2', \
'bias_correction', 'clip_gradient', 'epsilon', 'learning_rate', 'rescale_grad', 'wd'.
        """
        declared = {hyper.name: hyper for hyper in cls.declared(given) + BASE_HYPERS}
        for name in given:
            check_known('argument', name, declared, owner=cls.name)
        h = Values(**{name: hyper.check(given.get(name, hyper.default)) for name, hyper in declared.items()})
        cls.check(h)
        return h

    @classmethod
    def static(cls, h: Values) -> KernelKey:
        """The part of ``h`` that changes the computation itself."""
        switches = tuple((x.name, getattr(h, x.name)) for x in cls.declared(h.asdict()) if x.is_switch)
        return KernelKey(switches, cls.slots(h), h.clip_gradient is not None)

    @classmethod
    def prepare(cls, xp: Any, c: Values, static: KernelKey, w: Any, g: Any) -> Any:
        """The gradient as the rule sees it: rescaled, then clipped. Drop-ins have MXNet's own order."""
        return clipped(xp, c, g * c.rescale_grad)

    @classmethod
    def on_masters(cls) -> 'Type[Rule]':
        """The rule for float32 masters of float16 weights: this one, or another with the same hyper-parameters and slots."""
        return cls

    @classmethod
    def numbers(cls, xp: Any, precision: str) -> Any:
        """The namespace in which the rule computes coefficients for weights of that precision; by default ``xp`` itself."""
        return xp

    @classmethod
    def all_coefficients(cls, xp: Any, h: Values, t: Any) -> Dict[str, Any]:
        """The rule's ``coefficients`` plus those that `prepare` needs."""
        c = dict(cls.coefficients(xp, h, t), rescale_grad=h.rescale_grad)
        if h.clip_gradient is not None:
            c['clip_gradient'] = h.clip_gradient
        return c

    @classmethod
    def apply(cls, xp: Any, static: KernelKey, c: Mapping[str, Any], w: Any, g: Any, slots: Mapping[str, Any]
              ) -> Tuple[Any, Dict[str, Any]]:
        """`prepare` and `step` on arrays of one namespace: what every runtime calls."""
        coefficients = Values(**c)
        g = cls.prepare(xp, coefficients, static, w, g)
        return cls.step(xp, Values(**dict(static.switches)), coefficients, w, g, Values(**slots))

    @classmethod
    def run(cls, xp: Any, h: Values, t: int, weight: Any, gradient: Any, slots: Optional[Mapping[str, Any]] = None,
            exact: bool = False) -> Tuple[Any, Dict[str, Any]]:
        """One complete update with a NumPy-like ``xp``; ``slots=None`` starts fresh. For interactive use and tests.

        ``exact`` uses hyper-parameters as they are, even where `numbers` would round them as MXNet does.
        """
        if slots is None:
            slots = {slot.name: initial_slot(slot, weight) for slot in cls.slots(h)}
        c = cls.all_coefficients(scalars if exact else cls.numbers(scalars, compute_type(weight.dtype)), h, t)
        return cls.apply(xp, cls.static(h), c, weight, gradient, slots)


def initial_slot(slot: Slot, weight: Any) -> Any:
    """The NumPy array that ``slot`` holds before the first update of ``weight``."""
    if slot.init == 'weight':
        return numpy.array(weight)
    dtype = numpy.result_type(numpy.asarray(weight).dtype, numpy.float32)  # from the dtype: NumPy 1 lets float32 win over shape ()
    return numpy.full(slot.shape(numpy.shape(weight)), slot.init, dtype)
