"""Schedules in the words of PyTorch's own schedulers: what to write where this package is not installed."""
import inspect
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Type

from ..schedules import Schedule, annealing, decay, mx, plateau
from ..schema import Values

__all__ = ['in_pytorch']


class Call(NamedTuple):
    """A scheduler of PyTorch that gives the same rates from here on, ``until`` an update if not for ever.

    ``then`` brings a new one to where ``epoch`` updates are done. Most classes compute a rate from the one before, which the param
    groups have; others compute it from the number of updates, and have to do so once.
    """

    name: str
    arguments: Dict[str, Any]
    epoch: int
    then: str = '; scheduler.last_epoch = {0}'
    until: Optional[int] = None

    def __str__(self) -> str:
        arguments = ''.join(f', {key}={value!r}' for key, value in self.arguments.items())
        made = f'scheduler = torch.optim.lr_scheduler.{self.name}(optimizer{arguments})'
        return made + self.then.format(self.epoch, self.epoch - 1) * (self.epoch > 0)


def _step(h: Values, n: int) -> Optional[Call]:
    return Call('StepLR', dict(step_size=h.step, gamma=h.factor), n)


def _multi_step(h: Values, n: int) -> Optional[Call]:
    return Call('MultiStepLR', dict(milestones=list(h.step), gamma=h.factor), n)


def _exponential(h: Values, n: int) -> Optional[Call]:
    return Call('ExponentialLR', dict(gamma=h.factor ** (1 / h.step)), n)


def _polynomial(h: Values, n: int) -> Optional[Call]:
    return None if h.final_lr else Call('PolynomialLR', dict(total_iters=h.max_update, power=h.pwr), n)


def _linear(h: Values, n: int) -> Optional[Call]:
    falls = h.base_lr and h.final_lr <= h.base_lr
    arguments = dict(start_factor=1.0, end_factor=h.final_lr / h.base_lr, total_iters=h.max_update) if falls else {}
    return Call('LinearLR', arguments, n) if falls else None


def _cosine(h: Values, n: int) -> Optional[Call]:
    return Call('CosineAnnealingLR', dict(T_max=h.max_update, eta_min=h.final_lr), n, until=h.max_update + 1)


def _restarts(h: Values, n: int) -> Optional[Call]:
    return Call('CosineAnnealingWarmRestarts', dict(T_0=h.step, T_mult=h.step_mult, eta_min=h.final_lr), n, '; scheduler.step({0})')


def _one_cycle(h: Values, n: int) -> Optional[Call]:
    words = ('pct_start', 'anneal_strategy', 'div_factor', 'final_div_factor', 'three_phase')
    arguments = dict(max_lr=h.base_lr, total_steps=h.max_update, cycle_momentum=False, **{word: getattr(h, word) for word in words})
    return Call('OneCycleLR', arguments, n, '; scheduler.last_epoch = {1}; scheduler.step()', until=h.max_update)


def _factor(h: Values, n: int) -> Optional[Call]:
    end, rate = None, h.base_lr  # from then on MXNet keeps stop_factor_lr
    for changes in range(1, 10 ** 4) if h.factor < 1 and h.stop_factor_lr else ():
        rate *= h.factor
        if rate < h.stop_factor_lr:
            end = changes * h.step
            break
    return None if h.warmup_steps > n else _step(h, n)._replace(until=end)  # type: ignore[union-attr]


def _multi_factor(h: Values, n: int) -> Optional[Call]:
    return None if h.warmup_steps > n else _multi_step(h, n)


def _poly(h: Values, n: int) -> Optional[Call]:
    """MXNet's is one update ahead: its first rate is the second of PyTorch's."""
    fits = not h.warmup_steps and not h.final_lr
    return Call('PolynomialLR', dict(total_iters=h.max_update, power=h.power), n + 1) if fits else None


def _mx_cosine(h: Values, n: int) -> Optional[Call]:
    return None if h.warmup_steps else _cosine(h, n + 1)._replace(until=h.max_update)  # type: ignore[union-attr]


CALLS: Dict[Type[Schedule], Callable[[Values, int], Optional[Call]]] = {
    decay.Step: _step, decay.MultiStep: _multi_step, decay.Exponential: _exponential, annealing.Polynomial: _polynomial,
    annealing.Linear: _linear, annealing.Cosine: _cosine, annealing.CosineRestarts: _restarts, annealing.OneCycle: _one_cycle,
    mx.Factor: _factor, mx.MultiFactor: _multi_factor, mx.Poly: _poly, mx.Cosine: _mx_cosine}
ABSOLUTE = ('eta_min', 'max_lr')  # arguments that are rates, the same for all param groups


def in_pytorch(schedule: Type[Schedule], h: Values, num_update: int, multipliers: bool) -> str:
    """What continues the schedule after ``num_update`` updates with PyTorch alone, or its formula where no class of it does.

    ``multipliers`` says whether param groups have different rates.

    >>> from gluon_optim.schedules import record, schedule_of
    >>> in_pytorch(*schedule_of(record('Step', step=10, factor=0.5)), 25, False)
    'scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5); scheduler.last_epoch = 25'
    """
    end = schedule.length(h)
    if end is not None and num_update + 1 >= end and not schedule.history:
        return 'the rate does not change any more, and needs no scheduler'
    if schedule is plateau.Plateau:
        return '' if multipliers else _plateau(h)
    call = CALLS[schedule](h, num_update) if schedule in CALLS else None
    over = call is not None and call.until is not None and num_update + 1 >= call.until
    if call is None or over or (multipliers and set(ABSOLUTE) & set(call.arguments)):
        return 'no class of torch.optim.lr_scheduler has these rates: ' + '; '.join(_formula(schedule, h))
    return str(call) + (f', up to update {call.until}: keep that rate' if call.until is not None else '')


def _plateau(h: Values) -> str:
    words = ('mode', 'factor', 'patience', 'threshold', 'threshold_mode', 'cooldown')
    arguments = dict(**{word: getattr(h, word) for word in words}, min_lr=h.final_lr, eps=h.epsilon)
    made = ', '.join(f'{key}={value!r}' for key, value in arguments.items())
    best = '' if h.best is None else f'; scheduler.best = {h.best!r}'
    return (f'scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, {made}){best}; '
            f'scheduler.num_bad_epochs = {h.bad!r}; scheduler.cooldown_counter = {h.cooling!r}')


def _formula(schedule: Type[Schedule], h: Values) -> List[str]:
    """The first formula of the docstring, with the values of its letters, and the same of the schedules within."""
    text = inspect.cleandoc(schedule.__doc__ or '')
    formula = next((line.strip() for line in text.splitlines() if line.startswith('    ')), text.splitlines()[0])
    numbers, inner = {}, []
    for name, value in h.asdict().items():
        parts = [part for _, part in value] if name == 'segments' else [value] if name == 'schedule' else []
        for part in parts:
            inner += _formula(*part)
        if not parts:
            numbers[name] = value
    shown = ', '.join(f'{name}={value!r}' for name, value in numbers.items())
    return [f'{formula}, {shown}' if shown else formula, *inner]
