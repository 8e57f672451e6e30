"""Learning-rate schedulers for MXNet: each is its arguments and one formula, so any update may be asked for in any order.

>>> from mxnet import gluon
>>> import gluon_optim as go
>>> schedule = go.lr_scheduler.Warmup(go.lr_scheduler.Cosine(max_update=900, base_lr=0.4), steps=100)
>>> [round(schedule(update), 3) for update in (1, 50, 100, 550, 1000, 2000)]
[0.004, 0.2, 0.4, 0.2, 0.0, 0.0]
>>> net = gluon.nn.Dense(2, in_units=3)
>>> net.initialize()
>>> trainer = gluon.Trainer(net.collect_params(), 'adamw', {'lr_scheduler': schedule})

The formulas are those of `gluon_optim.schedules`, which runs them in PyTorch and JAX too.
"""
import inspect
from typing import Any, ClassVar, Dict, List, Optional, Sequence, Tuple, Type

import numpy

# submodules, not attributes of `mxnet`: a parameter server imports this file while `mxnet` is still being imported
from mxnet import lr_scheduler as mx
from mxnet import ndarray as nd

from ..schedules import annealing, base, decay, plateau, wrappers
from ..schedules.base import Inner, Schedule, Segments
from ..schedules.catalog import checked, kept, rate_of, schedule_of
from ..schema import REQUIRED, Hyper, Values, check_int, check_known

__all__ = ['Chain', 'Constant', 'Cosine', 'CosineRestarts', 'Exponential', 'IntervalInverseTime', 'InverseSqrt', 'InverseTime',
           'Linear', 'MultiStep', 'OneCycle', 'Piecewise', 'Plateau', 'Polynomial', 'Step', 'SumToInfinity', 'Warmup', 'scaled']


class Scheduler(mx.LRScheduler):
    """Base class of the schedulers here: the arguments of a schedule, which are its attributes, and its rate.

    A subclass names the ``formula``; its docstring holds an example, and gets the rest from the declarations.

    ``scheduler(num_update)`` is the rate of that update, 1 or more; for 0, as MXNet asks before the first one, that of update 1. An
    attribute can be changed at any time, as MXNet changes ``base_lr``, and is checked.
    """

    formula: ClassVar[Type[Schedule]]
    # MXNet's base class has these; here `Warmup` warms up
    warmup_steps = 0
    warmup_begin_lr = 0.0
    warmup_mode = 'linear'

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if 'formula' in vars(cls):
            cls.__doc__ = _documentation(cls)

    def __init__(self, **arguments: Any):
        h = checked(self.formula, arguments)
        self.__dict__.update({hyper.name: _attribute(hyper, arguments.get(hyper.name), h) for hyper in self._declared()})

    @classmethod
    def _declared(cls) -> Tuple[Hyper, ...]:
        return cls.formula.hypers + cls.formula.history

    def _checked(self, **changed: Any) -> Values:
        return checked(self.formula, {**{hyper.name: vars(self)[hyper.name] for hyper in self._declared()}, **changed})

    def _values(self) -> Values:
        """The hyper-parameters, checked when they were set."""
        return Values(**{hyper.name: _value(hyper, vars(self)[hyper.name]) for hyper in self._declared()})

    def __setattr__(self, name: str, value: Any) -> None:
        declared = {hyper.name: hyper for hyper in self._declared()}
        if name in declared:
            value = _attribute(declared[name], value, self._checked(**{name: value}))
        elif type(self).__module__ == __name__ and not isinstance(getattr(type(self), name, None), property):
            check_known('attribute', name, declared, AttributeError, owner=type(self).__name__)
        super().__setattr__(name, value)

    def __call__(self, num_update: int) -> float:
        """The rate of update ``num_update`` = 1, 2, ...; for 0 that of the first. ValueError for anything else."""
        update = check_int('num_update', num_update)
        self._asked(update)
        rate: float = rate_of(self.formula, self._values(), max(update, 1))
        return rate

    def _asked(self, update: int) -> None:
        """Called with every update for which a rate is asked."""

    def __repr__(self) -> str:
        return f'{type(self).__name__}({", ".join(f"{hyper.name}={vars(self)[hyper.name]!r}" for hyper in self.formula.hypers)})'


class Wrapper(Scheduler):
    """Base class of schedulers around others. `base_lr` is that of the first one within."""

    formula: ClassVar[Type[base.Wrapper]]

    def _inner(self) -> List[Tuple[Any, int, Optional[int]]]:
        """The schedulers within, the number of updates before the first one of each, and how many it has."""
        return self.formula.within(vars(self))

    @property
    def base_lr(self) -> float:
        rate: float = self._inner()[0][0].base_lr
        return rate

    @base_lr.setter
    def base_lr(self, rate: float) -> None:
        inner, before = self._inner()[0][0], self.base_lr
        inner.base_lr = rate
        try:
            self._checked()
        except (TypeError, ValueError):  # of a scheduler of MXNet, which checks nothing
            inner.base_lr = before
            raise

    def _asked(self, update: int) -> None:
        for inner, before, steps in self._inner():
            if isinstance(inner, Scheduler) and update > before:
                inner._asked(update - before if steps is None else min(update - before, steps))

    def observe(self, metric: Any, num_update: Optional[int] = None) -> float:
        """Hand a metric to the one `Plateau` within, after update ``num_update`` of this scheduler: the number of the trainer's.

        It counts only while the Plateau gives the rate, not during a warm-up. ``num_update`` is by default the last update in that
        time that was asked for. Returns the rate of the update after it. Raises TypeError if there is no Plateau within, or more
        than one, and what `Plateau.observe` raises.
        """
        found = self._plateaus()
        if len(found) != 1:
            raise TypeError(f'`observe` needs exactly one Plateau within. Received: {len(found) or "none"} in {self!r:.200}.'
                            + ' Call observe of each of them, with numbers that count from its own first update.' * bool(found))
        (plateau, before, steps), value = found[0], _number(metric)
        own = plateau.num_update if num_update is None else check_int('num_update', num_update) - before
        if (own > 0 or before == 0) and (steps is None or own < steps):
            plateau._observe(value, own, before)
        rate: float = rate_of(self.formula, self._values(), before + own + 1)
        return rate

    def _plateaus(self) -> List[Tuple['Plateau', int, Optional[int]]]:
        """As `_inner`, each Plateau at any depth."""
        found: List[Tuple[Plateau, int, Optional[int]]] = []
        for inner, before, steps in self._inner():
            if isinstance(inner, Plateau):
                found.append((inner, before, steps))
            elif isinstance(inner, Wrapper):
                for plateau, more, its in inner._plateaus():
                    ends = [end for end in (its, None if steps is None else steps - more) if end is not None]
                    found.append((plateau, before + more, min(ends, default=None)))
        return found


def _number(metric: Any) -> float:
    """A metric, which may be an array of one element."""
    value = metric.asnumpy() if isinstance(metric, nd.NDArray) else metric
    if isinstance(value, numpy.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, (tuple, list, numpy.ndarray)):
        received = repr(value)[:80] if isinstance(value, (tuple, list)) else f'an array of {value.size}'
        raise TypeError(f'`metric` must be one number. Received: {received}. Of a metric of MXNet pass metric.get()[1].')
    return float(value)


def _attribute(hyper: Hyper, given: Any, h: Values) -> Any:
    """What a scheduler keeps of a checked argument."""
    within = [given] if isinstance(hyper, Inner) else [part[1] for part in given] if isinstance(hyper, Segments) else []
    for scheduler in within:
        if not isinstance(scheduler, mx.LRScheduler):
            raise TypeError(f'A schedule within another must be an object, such as Cosine(100). Received: {scheduler!r:.80}.')
    return kept(hyper, given, h)


def _value(hyper: Hyper, kept: Any) -> Any:
    """An attribute as `Schedule.rate` takes it: schedulers as pairs (schedule, its hyper-parameters)."""
    if isinstance(hyper, Inner):
        return _pair(kept)
    return [(steps, _pair(scheduler)) for steps, scheduler in kept] if isinstance(hyper, Segments) else kept


def _pair(scheduler: Any) -> Tuple[Type[Schedule], Values]:
    return (scheduler.formula, scheduler._values()) if isinstance(scheduler, Scheduler) else schedule_of(scheduler)


def _documentation(cls: Type[Scheduler]) -> str:
    """What the schedule says of itself, its arguments, its errors, and the example in the docstring of the class."""
    lines = [inspect.cleandoc(cls.formula.__doc__ or ''), '', 'Parameters', '----------']
    for hyper in cls.formula.hypers:
        default = '' if hyper.default is REQUIRED else f', by default {hyper.default!r}'
        kind = 'number ' if hyper.allowed.startswith('in ') else ''
        lines += [f'{hyper.name} : {kind}{hyper.allowed}{default}', f'    {hyper.doc[0].upper()}{hyper.doc[1:]}.']
    lines += ['', 'Raises ValueError for an argument that is out of range, TypeError for one of another kind.', '',
              inspect.cleandoc(cls.__doc__ or '')]
    return '\n'.join(lines)


class Constant(Scheduler):
    """
    >>> import gluon_optim as go
    >>> go.lr_scheduler.Constant(base_lr=0.4)(7)
    0.4
    """

    formula = decay.Constant

    def __init__(self, base_lr: float = 0.01):
        super().__init__(base_lr=base_lr)


class InverseTime(Scheduler):
    """
    >>> import gluon_optim as go
    >>> schedule = go.lr_scheduler.InverseTime(base_lr=0.4, decay=1.0, steps_per_epoch=100)
    >>> [schedule(update) for update in (1, 100, 101, 301)]
    [0.4, 0.4, 0.2, 0.1]
    """

    formula = decay.InverseTime

    def __init__(self, base_lr: float, decay: float, steps_per_epoch: int):
        super().__init__(base_lr=base_lr, decay=decay, steps_per_epoch=steps_per_epoch)


class IntervalInverseTime(Scheduler):
    """
    >>> import gluon_optim as go
    >>> schedule = go.lr_scheduler.IntervalInverseTime(base_lr=0.4, decay=1.0, interval=100)
    >>> [schedule(update) for update in (1, 99, 100, 300)]
    [0.4, 0.4, 0.2, 0.1]
    """

    formula = decay.IntervalInverseTime

    def __init__(self, base_lr: float, decay: float, interval: int):
        super().__init__(base_lr=base_lr, decay=decay, interval=interval)


class Step(Scheduler):
    """
    >>> import gluon_optim as go
    >>> schedule = go.lr_scheduler.Step(step=100, factor=0.5, base_lr=0.4)
    >>> [schedule(update) for update in (1, 100, 101, 201)]
    [0.4, 0.4, 0.2, 0.1]
    """

    formula = decay.Step

    def __init__(self, step: int, factor: float = 0.1, base_lr: float = 0.01):
        super().__init__(step=step, factor=factor, base_lr=base_lr)


class MultiStep(Scheduler):
    """
    >>> import gluon_optim as go
    >>> schedule = go.lr_scheduler.MultiStep(step=[100, 500], factor=0.5, base_lr=0.4)
    >>> [schedule(update) for update in (1, 100, 101, 501)]
    [0.4, 0.4, 0.2, 0.1]
    """

    formula = decay.MultiStep

    def __init__(self, step: Sequence[int], factor: float = 0.1, base_lr: float = 0.01):
        super().__init__(step=step, factor=factor, base_lr=base_lr)


class Exponential(Scheduler):
    """
    >>> import gluon_optim as go
    >>> schedule = go.lr_scheduler.Exponential(factor=0.5, base_lr=0.4, step=100)
    >>> [round(schedule(update), 3) for update in (1, 51, 101)]
    [0.4, 0.283, 0.2]
    """

    formula = decay.Exponential

    def __init__(self, factor: float, base_lr: float = 0.01, step: int = 1):
        super().__init__(factor=factor, base_lr=base_lr, step=step)


class Polynomial(Scheduler):
    """
    >>> import gluon_optim as go
    >>> schedule = go.lr_scheduler.Polynomial(max_update=100, base_lr=0.4)
    >>> [round(schedule(update), 3) for update in (1, 51, 101, 500)]
    [0.4, 0.1, 0.0, 0.0]
    """

    formula = annealing.Polynomial

    def __init__(self, max_update: int, base_lr: float = 0.01, pwr: float = 2.0, final_lr: float = 0.0):
        super().__init__(max_update=max_update, base_lr=base_lr, pwr=pwr, final_lr=final_lr)


class Linear(Scheduler):
    """
    >>> import gluon_optim as go
    >>> schedule = go.lr_scheduler.Linear(max_update=100, base_lr=0.4)
    >>> [schedule(update) for update in (1, 51, 101, 500)]
    [0.4, 0.2, 0.0, 0.0]
    """

    formula = annealing.Linear

    def __init__(self, max_update: int, base_lr: float = 0.01, final_lr: float = 0.0):
        super().__init__(max_update=max_update, base_lr=base_lr, final_lr=final_lr)


class Cosine(Scheduler):
    """
    >>> import gluon_optim as go
    >>> schedule = go.lr_scheduler.Cosine(max_update=100, base_lr=0.4)
    >>> [round(schedule(update), 3) for update in (1, 51, 101, 500)]
    [0.4, 0.2, 0.0, 0.0]
    """

    formula = annealing.Cosine

    def __init__(self, max_update: int, base_lr: float = 0.01, final_lr: float = 0.0):
        super().__init__(max_update=max_update, base_lr=base_lr, final_lr=final_lr)


class CosineRestarts(Scheduler):
    """
    >>> import gluon_optim as go
    >>> schedule = go.lr_scheduler.CosineRestarts(step=100, base_lr=0.4, step_mult=2)
    >>> [round(schedule(update), 3) for update in (1, 51, 101, 201, 301)]
    [0.4, 0.2, 0.4, 0.2, 0.4]
    """

    formula = annealing.CosineRestarts

    def __init__(self, step: int, base_lr: float = 0.01, final_lr: float = 0.0, step_mult: int = 1):
        super().__init__(step=step, base_lr=base_lr, final_lr=final_lr, step_mult=step_mult)


class OneCycle(Scheduler):
    """
    >>> import gluon_optim as go
    >>> schedule = go.lr_scheduler.OneCycle(max_update=100, base_lr=0.4)
    >>> [round(schedule(update), 4) for update in (1, 30, 65, 100)]
    [0.016, 0.4, 0.2, 0.0]
    """

    formula = annealing.OneCycle

    def __init__(self, max_update: int, base_lr: float = 0.01, pct_start: float = 0.3, anneal_strategy: str = 'cos',
                 div_factor: float = 25.0, final_div_factor: float = 1e4, three_phase: bool = False):
        super().__init__(max_update=max_update, base_lr=base_lr, pct_start=pct_start, anneal_strategy=anneal_strategy,
                         div_factor=div_factor, final_div_factor=final_div_factor, three_phase=three_phase)


class InverseSqrt(Scheduler):
    """
    >>> import gluon_optim as go
    >>> schedule = go.lr_scheduler.InverseSqrt(base_lr=0.4, step=100)
    >>> [schedule(update) for update in (1, 301, 1501)]
    [0.4, 0.2, 0.1]
    """

    formula = decay.InverseSqrt

    def __init__(self, base_lr: float = 0.01, step: int = 1):
        super().__init__(base_lr=base_lr, step=step)


class SumToInfinity(Scheduler):
    """
    >>> import gluon_optim as go
    >>> schedule = go.lr_scheduler.SumToInfinity(base_lr=0.4, b=3, gamma=1.0)
    >>> [schedule(update) for update in (1, 5, 13)]
    [0.1, 0.05, 0.025]
    """

    formula = decay.SumToInfinity

    def __init__(self, base_lr: float = 0.01, b: float = 0.0, gamma: float = 0.55):
        super().__init__(base_lr=base_lr, b=b, gamma=gamma)


class Piecewise(Scheduler):
    """
    >>> import gluon_optim as go
    >>> schedule = go.lr_scheduler.Piecewise(step=[100, 500], factor=[0.25, 1, 0.5], base_lr=0.4)
    >>> [schedule(update) for update in (1, 100, 101, 501)]
    [0.1, 0.1, 0.4, 0.2]
    """

    formula = decay.Piecewise

    def __init__(self, step: Sequence[int], factor: Sequence[float], base_lr: float = 0.01, kind: str = 'constant'):
        super().__init__(step=step, factor=factor, base_lr=base_lr, kind=kind)


class Plateau(Scheduler):
    """
    After each evaluation, call ``observe``. What it has seen is saved with the states.

    >>> import gluon_optim as go
    >>> schedule = go.lr_scheduler.Plateau(base_lr=0.4, factor=0.5, patience=1)
    >>> [schedule.observe(loss, num_update) for num_update, loss in ((10, 0.9), (20, 0.8), (30, 0.8), (40, 0.81))]
    [0.4, 0.4, 0.4, 0.2]
    >>> schedule(40), schedule(41)
    (0.4, 0.2)
    """

    formula = plateau.Plateau

    def __init__(self, base_lr: float = 0.01, mode: str = 'min', factor: float = 0.1, patience: int = 10, threshold: float = 1e-4,
                 threshold_mode: str = 'rel', cooldown: int = 0, final_lr: float = 0.0, epsilon: float = 1e-8):
        super().__init__(base_lr=base_lr, mode=mode, factor=factor, patience=patience, threshold=threshold,
                         threshold_mode=threshold_mode, cooldown=cooldown, final_lr=final_lr, epsilon=epsilon)

    def observe(self, metric: Any, num_update: Optional[int] = None) -> float:
        """Take note of a metric after update ``num_update``, by default the last one that was asked for.

        ``metric`` is a number, or an array of one. Returns the rate of the next update. NaN counts as no improvement. Raises
        ValueError for an infinitely good metric, or an update before the last reduction, TypeError for more than one number.

        Within another scheduler, call that one's ``observe``: the updates here count from the first one of this schedule.
        """
        return self._observe(_number(metric), self.num_update if num_update is None else check_int('num_update', num_update))

    def _observe(self, metric: float, update: int, before: int = 0) -> float:
        """``before``: how many updates of what is around it come before its own first one, for the numbers in an error."""
        history: Dict[str, Any] = plateau.Plateau.observed(self._checked(), metric, update, before)
        self.__dict__.update({name: list(value) if isinstance(value, tuple) else value for name, value in history.items()})
        rate: float = rate_of(self.formula, self._values(), update + 1)
        return rate

    def _asked(self, update: int) -> None:
        self.__dict__['num_update'] = max(update, self.num_update)


class Warmup(Wrapper):
    """
    >>> import gluon_optim as go
    >>> schedule = go.lr_scheduler.Warmup(go.lr_scheduler.Step(step=10, factor=0.5, base_lr=0.4), steps=4)
    >>> [schedule(update) for update in (1, 2, 4, 13, 14)]
    [0.1, 0.2, 0.4, 0.4, 0.2]
    """

    formula = wrappers.Warmup

    def __init__(self, schedule: Any, steps: int, begin: float = 0.0, kind: str = 'linear'):
        super().__init__(schedule=schedule, steps=steps, begin=begin, kind=kind)
        first = rate_of(self.formula, self._values(), max(self.steps, 1))  # a Plateau within must not take it for an update
        if self.begin > first:  # as in MXNet, here alone: a rate that is lowered later is no mistake
            raise ValueError(f'`begin` must not be above the first rate of the schedule, {first!r}. Received: begin={begin!r}.')


class Chain(Wrapper):
    """
    >>> import gluon_optim as go
    >>> s = go.lr_scheduler
    >>> schedule = s.Chain([(100, s.Linear(100, base_lr=0.1, final_lr=0.4)), (None, s.Cosine(200, base_lr=0.4))])
    >>> [round(schedule(update), 3) for update in (1, 51, 101, 201, 500)]
    [0.1, 0.25, 0.4, 0.2, 0.0]
    """

    formula = wrappers.Chain

    def __init__(self, segments: Sequence[Tuple[Optional[int], Any]]):
        super().__init__(segments=segments)


class Scaled(Wrapper):
    """
    >>> import gluon_optim as go
    >>> go.lr_scheduler.scaled(go.lr_scheduler.Constant(0.01), batch_size=64)
    Scaled(schedule=Constant(base_lr=0.01), batch_size=64, reference=1)
    """

    formula = wrappers.Scaled

    def __init__(self, schedule: Any, batch_size: int, reference: int = 1):
        super().__init__(schedule=schedule, batch_size=batch_size, reference=reference)


def scaled(schedule: Any, batch_size: int, reference: int = 1) -> Scaled:
    """The scheduler with the rates of ``schedule`` times ``batch_size`` / ``reference``: eta_B = B eta_1.

    ``schedule`` is made for batches of ``reference`` samples, one by default; ``base_lr`` and a trainer's ``learning_rate`` are
    also for those. Source: the lecture, "relating batch size to learning rate".

    Raises ValueError or TypeError for sizes that are not whole numbers, 1 or more, and for other objects than schedulers.

    >>> import gluon_optim as go
    >>> schedule = go.lr_scheduler.scaled(go.lr_scheduler.Step(step=100, factor=0.5, base_lr=0.01), batch_size=64, reference=16)
    >>> schedule(1), schedule(101), schedule.base_lr
    (0.04, 0.02, 0.01)
    """
    return Scaled(schedule, batch_size, reference)
