"""The schedulers of MXNet 1.9.1 and 2.0, as functions of the number of the update.

MXNet's objects are stateful: ``base_lr`` of a FactorScheduler is what is left of it, and a fresh CosineScheduler that is asked
past its end answers with its first rate. The functions have no memory: they give what an object gives that was asked at every
update. ``of`` finds the first rate again from the attributes of an object in the middle of a run.
"""
import functools
import itertools
import math
import operator
from typing import Any, Callable, Dict, Mapping

from ..schema import Hyper, Values
from .base import Schedule, completed, stepwise, warmed_up

__all__ = ['Cosine', 'Factor', 'MultiFactor', 'Poly']

FEW, CHANGES = 10 ** 4, 10 ** 7  # at most so many are carried out one by one
BASE_LR = Hyper('base_lr', 0.01, '[0, inf)', 'the first rate')
WARMUP = (
    Hyper('warmup_steps', 0, '[0, inf)', 'updates before the schedule begins'),
    Hyper('warmup_begin_lr', 0.0, '[0, inf)', 'the rate from which it warms up'),
    Hyper('warmup_mode', 'linear', ('linear', 'constant'), 'a line to base_lr, or warmup_begin_lr throughout'),
)
FACTOR = Hyper('factor', 1.0, '[0, 1]', 'of the rate, at each change')
MAX_UPDATE = Hyper('max_update', 1, '[1, inf)', 'the update at which the final rate is reached')
FINAL_LR = Hyper('final_lr', 0.0, '[0, inf)', 'the rate from max_update on')


def _common(attributes: Mapping[str, Any], base_lr: float, *names: str) -> Dict[str, Any]:
    warmup = ('warmup_steps', 'warmup_begin_lr', 'warmup_final_lr', 'warmup_mode')
    return {'base_lr': base_lr, **{name: attributes[name] for name in (*warmup, *names)}}


def _first_rate(attributes: Mapping[str, Any], changes: int) -> float:
    """``base_lr`` before it was multiplied by ``factor`` so many times."""
    factor, now = attributes['factor'], attributes['base_lr']
    if not changes or now == attributes.get('stop_factor_lr') or not factor:
        return float(attributes['warmup_final_lr'] if changes else now)
    given = attributes['warmup_final_lr']  # by the constructor: the first rate, unless an optimizer has set another
    if changes <= FEW and functools.reduce(operator.mul, [factor] * changes, given) == now:
        return float(given)
    return float(now / factor ** changes)


def _arrived(attributes: Mapping[str, Any], num_update: int, rate: Callable[[Mapping[str, Any], int], float]) -> Dict[str, Any]:
    """The attributes of an object that keeps its last rate, by MXNet's own expression, so that they are equal bit for bit."""
    done = min(num_update, attributes['max_update']) - attributes['warmup_steps']
    if num_update < max(attributes['warmup_steps'], 1) or done < 0:
        return dict(attributes)
    return dict(attributes, base_lr=rate(attributes, done))


class Factor(Schedule):
    """base_lr factor^floor((t - 1) / step), and not below stop_factor_lr once it has changed."""

    name = 'factor'
    summary = 'multiplied by a factor after every so many updates'
    hypers = (Hyper('step', 1, '[1, inf)', 'updates between two changes'), FACTOR,
              Hyper('stop_factor_lr', 1e-8, '[0, inf)', 'the smallest rate'), BASE_LR, *WARMUP)

    @staticmethod
    def of(attributes: Mapping[str, Any]) -> Values:
        first = _first_rate(attributes, attributes['count'] // attributes['step'])
        return Values(**_common(attributes, first, 'step', 'factor', 'stop_factor_lr'))

    @staticmethod
    def after(attributes: Mapping[str, Any], num_update: int) -> Dict[str, Any]:
        held = dict(attributes)
        if num_update < held['warmup_steps'] or num_update <= held['count']:
            return held
        changes = max(math.ceil((num_update - held['count']) / held['step']) - 1, 0)
        for done in range(min(changes, CHANGES)):
            rate = max(held['base_lr'] * held['factor'], held['stop_factor_lr'])
            if rate == held['base_lr']:  # it has arrived
                return dict(held, count=held['count'] + (changes - done) * held['step'])
            held.update(count=held['count'] + held['step'], base_lr=rate)
        if changes > CHANGES:
            raise ValueError(f'{changes} decays, where at most {CHANGES} are carried out')
        return held

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        changes = completed(xp, t - 1, h.step)
        changed = xp.maximum(h.base_lr * h.factor ** changes, h.stop_factor_lr)
        return warmed_up(xp, h, t, xp.where(changes > 0, changed, h.base_lr))


class MultiFactor(Schedule):
    """base_lr factor^k, where k is how many entries of step are below t."""

    name = 'multifactor'
    summary = 'multiplied by a factor after given updates'
    hypers = (Hyper('step', (), (), 'the updates after which it changes'), FACTOR, BASE_LR, *WARMUP)

    @staticmethod
    def of(attributes: Mapping[str, Any]) -> Values:
        return Values(**_common(attributes, _first_rate(attributes, attributes['cur_step_ind']), 'step', 'factor'))

    @staticmethod
    def after(attributes: Mapping[str, Any], num_update: int) -> Dict[str, Any]:
        held = dict(attributes)
        while num_update >= held['warmup_steps'] and held['cur_step_ind'] < len(held['step']) and (
                num_update > held['step'][held['cur_step_ind']]):
            held.update(count=held['step'][held['cur_step_ind']], cur_step_ind=held['cur_step_ind'] + 1,
                        base_lr=held['base_lr'] * held['factor'])
        return held

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        rates = itertools.accumulate([h.base_lr, *[h.factor] * len(h.step)], operator.mul)  # rounded at each change, as MXNet's are
        return warmed_up(xp, h, t, stepwise(xp, t, h.step, list(rates)))


class Poly(Schedule):
    """final_lr + (base_lr - final_lr) (1 - s)^power, where s = (t - warmup_steps) / (max_update - warmup_steps), at most 1."""

    name = 'poly'
    summary = 'a power of what is left of the run'
    hypers = (MAX_UPDATE, BASE_LR, Hyper('power', 2.0, '[0, inf)', 'the exponent; MXNet calls the argument pwr'), FINAL_LR, *WARMUP)

    @staticmethod
    def of(attributes: Mapping[str, Any]) -> Values:
        return Values(**_common(attributes, attributes['base_lr_orig'], 'max_update', 'final_lr', 'power'))

    @staticmethod
    def after(attributes: Mapping[str, Any], num_update: int) -> Dict[str, Any]:
        return _arrived(attributes, num_update, lambda a, done: a['final_lr'] + (a['base_lr_orig'] - a['final_lr']) * (
            pow(1 - done / a['max_steps'], a['power'])))

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        left = 1 - (xp.minimum(t, h.max_update) - h.warmup_steps) / (h.max_update - h.warmup_steps)
        return warmed_up(xp, h, t, h.final_lr + (h.base_lr - h.final_lr) * xp.maximum(left, 0.0) ** h.power)


class Cosine(Schedule):
    """final_lr + (base_lr - final_lr) (1 + cos(pi s)) / 2, where s is as in `Poly`."""

    name = 'cosine'
    summary = 'half a wave of the cosine'
    hypers = (MAX_UPDATE, BASE_LR, FINAL_LR, *WARMUP)

    @staticmethod
    def of(attributes: Mapping[str, Any]) -> Values:
        return Values(**_common(attributes, attributes['base_lr_orig'], 'max_update', 'final_lr'))

    @staticmethod
    def after(attributes: Mapping[str, Any], num_update: int) -> Dict[str, Any]:
        return _arrived(attributes, num_update, lambda a, done: a['final_lr'] + (a['base_lr_orig'] - a['final_lr']) * (
            1 + math.cos(math.pi * done / a['max_steps'])) / 2)

    @staticmethod
    def rate(xp: Any, h: Values, t: Any) -> Any:
        done = xp.minimum(t, h.max_update) - h.warmup_steps
        wave = xp.cos(math.pi * done / (h.max_update - h.warmup_steps))
        return warmed_up(xp, h, t, h.final_lr + (h.base_lr - h.final_lr) * (1 + wave) / 2)
