"""The optimizers that `gluon.Trainer(params, NAME)` finds: each class only sets its rule.

Their import path must not change: saved states and parameter servers refer to it.
"""
from typing import Any, Dict, Optional, Type, Union

# a submodule, not an attribute of `mxnet`: a parameter server imports this file while `mxnet` is still being imported
from mxnet.optimizer.optimizer import Optimizer

from .. import rules
from ..rules.mx import DROP_INS
from ..schema import check_known, lower_name
from .noise import Sampler
from .optimizer import RuleOptimizer

__all__ = ['create', 'register']

_CLASSES: Dict[str, Type[Optimizer]] = {}


def register(what: Union[str, type]) -> Any:
    """Class decorator that makes a rule or an MXNet optimizer available by name, to `gluon.Trainer` and to `create`.

    ``what`` is the class, or its name: ``@register`` uses a `Rule`'s own ``name``, or a class's name in lower case;
    ``@register('name')`` uses that name. A `Rule` is returned unchanged, and gets everything a built-in one has: compiled
    kernels, state files, conversions.

    Raises ValueError if the name is taken, here or by MXNet, TypeError for an invalid rule: the rule is run once to check.

    >>> import gluon_optim as go
    >>> @go.register
    ... class SignDescent(go.Rule):
    ...     name, summary = 'sign_descent', 'the sign of the gradient'
    ...     hypers = (go.Hyper('learning_rate', 0.01, '[0, inf)'), go.Hyper('wd', 0.0, '[0, inf)'))
    ...     slots = staticmethod(lambda h: ())
    ...     coefficients = staticmethod(lambda xp, h, t: dict(lr=h.learning_rate, wd=h.wd))
    ...     @staticmethod
    ...     def step(xp, h, c, w, g, s):
    ...         return w - c.lr * (xp.sign(g) + c.wd * w), {}
    >>> go.create('sign_descent').lr
    0.01
    """
    if isinstance(what, type):
        return _register(what, None)
    return lambda cls: _register(cls, what)


def _register(cls: Any, name: Optional[str]) -> Any:
    if not issubclass(cls, (rules.Rule, Optimizer)):
        raise TypeError(f'`register` takes a gluon_optim.Rule or an mx.optimizer.Optimizer. Received: {cls!r}. '
                        'Derive from one of them.')
    name = str(name or getattr(cls, 'name', cls.__name__.lower()))
    taken = _CLASSES.get(name, Optimizer.opt_registry.get(name))
    if taken is not None and _path(taken) != _path(cls):
        raise ValueError(f'The name {name!r} is taken by {_path(taken)}. Register under another: @register({name + "2"!r}).')
    optimizer: Type[Optimizer] = cls
    if issubclass(cls, rules.Rule):
        rules.add(cls, name)
        path = {'__module__': cls.__module__, '__qualname__': cls.__qualname__}
        bases = (Sampler, UserOptimizer) if 'noise' in cls.needs else (UserOptimizer,)
        optimizer = type(cls.__name__, bases, {'rule': cls, **path})
    _CLASSES[name] = Optimizer.opt_registry[name] = optimizer
    return cls


def _path(cls: type) -> str:
    return f'{cls.__module__}.{cls.__qualname__}'


class UserOptimizer(RuleOptimizer):
    """Base class of the optimizers made from users' rules: pickled as the rule, which has an import path."""

    def __reduce__(self) -> Any:
        return _restore, (self.rule,), self.__getstate__()


def _restore(rule: Type[rules.Rule]) -> Optimizer:
    cls: Any = _CLASSES[rule.name]
    return cls.__new__(cls)


def create(name: str, **hypers: Any) -> Optimizer:
    """An optimizer by name: always this package's, whatever MXNet means by the name.

    Raises ValueError for an unknown name, TypeError for one that is not a string, both for hyper-parameters that the rule
    refuses.

    ``**hypers`` are the optimizer's own arguments and those of MXNet's base class, such as ``lr_scheduler``.

    >>> import gluon_optim as go
    >>> go.create('novograd', beta1=0.9).beta1
    0.9

    For a built-in optimizer's name, the drop-in that computes the same, faster:

    >>> type(go.create('adam')).__mro__[3]
    <class 'mxnet.optimizer.optimizer.Adam'>
    """
    check_known('optimizer', lower_name(name), {*_CLASSES, *DROP_INS}, ValueError)
    if name.lower() in _CLASSES:
        return _CLASSES[name.lower()](**hypers)
    from . import builtin  # only when needed: most programs do without it
    return builtin.create(name, **hypers)


def _ours(cls: Type[RuleOptimizer]) -> Type[RuleOptimizer]:
    """Register one of the classes below; MXNet's own meaning of a name stays (2.0 has its own adamw)."""
    _CLASSES[cls.rule.name] = cls
    Optimizer.opt_registry.setdefault(cls.rule.name, cls)
    return cls


@_ours
class AdaBelief(RuleOptimizer):
    rule = rules.get('adabelief')


@_ours
class AdadeltaTorch(RuleOptimizer):
    rule = rules.get('adadelta_torch')


@_ours
class AdagradTorch(RuleOptimizer):
    rule = rules.get('adagrad_torch')


@_ours
class AdamTorch(RuleOptimizer):
    rule = rules.get('adam_torch')


@_ours
class AdamaxTorch(RuleOptimizer):
    rule = rules.get('adamax_torch')


@_ours
class AdamW(RuleOptimizer):
    rule = rules.get('adamw')


@_ours
class ASGD(RuleOptimizer):
    rule = rules.get('asgd')


@_ours
class LANS(RuleOptimizer):
    rule = rules.get('lans')


@_ours
class LARC(RuleOptimizer):
    rule = rules.get('larc')


@_ours
class NAdamTorch(RuleOptimizer):
    rule = rules.get('nadam_torch')


@_ours
class NoiseAdaptiveSGD(RuleOptimizer):
    rule = rules.get('noise_adaptive_sgd')


@_ours
class NovoGrad(RuleOptimizer):
    rule = rules.get('novograd')


@_ours
class PSGLD(Sampler, RuleOptimizer):
    rule = rules.get('psgld')


@_ours
class RAdam(RuleOptimizer):
    rule = rules.get('radam')


@_ours
class RMSpropTorch(RuleOptimizer):
    rule = rules.get('rmsprop_torch')


@_ours
class Rprop(RuleOptimizer):
    rule = rules.get('rprop')


@_ours
class SGDEMA(RuleOptimizer):
    rule = rules.get('sgd_ema')


@_ours
class SGDTorch(RuleOptimizer):
    rule = rules.get('sgd_torch')


@_ours
class SNGD(RuleOptimizer):
    rule = rules.get('sngd')
