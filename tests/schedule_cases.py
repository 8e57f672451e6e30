"""Schedules with arguments that are all felt, and their formulas in reference.py; as records where there is no MXNet."""
import copy
import math

import reference

from gluon_optim.schedules.catalog import OURS, SCHEDULES
from gluon_optim.schedules.plateau import Plateau


class Records:
    """In place of `gluon_optim.lr_scheduler`: the record of a scheduler for each call of its class."""

    def __getattr__(self, name):
        schedule = next(schedule for schedule in SCHEDULES if schedule.__name__ == name)

        def make(*given, **named):
            names = [hyper.name for hyper in schedule.hypers]
            defaults = {hyper.name: hyper.default for hyper in schedule.hypers + schedule.history}
            return {'class': f'{OURS}.{name}', 'attributes': {**defaults, **dict(zip(names, given)), **named}}
        return make

    def scaled(self, *given):
        return self.Scaled(*given)


# name -> (class, arguments, the formula in reference.py)
PLAIN = {
    'constant': ('Constant', dict(base_lr=0.3), lambda t, base_lr: base_lr),
    'inverse time': ('InverseTime', dict(base_lr=0.4, decay=0.7, steps_per_epoch=37), reference.inverse_time),
    'interval': ('IntervalInverseTime', dict(base_lr=0.4, decay=0.7, interval=41), reference.interval_inverse_time),
    'step': ('Step', dict(step=60, factor=0.7, base_lr=0.4), reference.step_lr),
    'multi-step': ('MultiStep', dict(step=[30, 80, 300], factor=0.3, base_lr=0.4), reference.multi_step_lr),
    'exponential': ('Exponential', dict(factor=0.99, base_lr=0.4), reference.exponential_lr),
    'exponential by 50': ('Exponential', dict(factor=0.5, base_lr=0.4, step=50), reference.exponential_lr),
    'polynomial': ('Polynomial', dict(max_update=300, base_lr=0.4, pwr=1.7, final_lr=0.01), reference.polynomial_lr),
    'linear down': ('Linear', dict(max_update=300, base_lr=0.4, final_lr=0.03), reference.linear_lr),
    'linear up': ('Linear', dict(max_update=300, base_lr=0.1, final_lr=0.4), reference.linear_lr),
    'cosine': ('Cosine', dict(max_update=300, base_lr=0.4, final_lr=0.01), reference.cosine_lr),
    'restarts': ('CosineRestarts', dict(step=70, base_lr=0.4, final_lr=0.01, step_mult=1), reference.cosine_restarts_lr),
    'restarts, longer': ('CosineRestarts', dict(step=31, base_lr=0.4, final_lr=0.01, step_mult=2), reference.cosine_restarts_lr),
    'restarts, thrice': ('CosineRestarts', dict(step=1, base_lr=0.4, final_lr=0.0, step_mult=3), reference.cosine_restarts_lr),
    'one-cycle': ('OneCycle', dict(max_update=300, base_lr=0.4, pct_start=0.3, anneal_strategy='cos', div_factor=25.0,
                                   final_div_factor=1e4, three_phase=False), reference.one_cycle_lr),
    'one-cycle, three': ('OneCycle', dict(max_update=333, base_lr=0.4, pct_start=0.37, anneal_strategy='cos', div_factor=10.0,
                                          final_div_factor=100.0, three_phase=True), reference.one_cycle_lr),
    'one-cycle, lines': ('OneCycle', dict(max_update=300, base_lr=0.4, pct_start=0.251, anneal_strategy='linear', div_factor=10.0,
                                          final_div_factor=100.0, three_phase=False), reference.one_cycle_lr),
    'inverse square root': ('InverseSqrt', dict(base_lr=0.4, step=20), reference.inverse_sqrt_lr),
    'sum to infinity': ('SumToInfinity', dict(base_lr=0.4, b=7.5, gamma=0.6), reference.sum_to_infinity_lr),
    'piecewise': ('Piecewise', dict(step=[50, 51, 200], factor=[0.1, 1, 0.5, 0.0], base_lr=0.4, kind='constant'),
                  reference.piecewise_lr),
    'piecewise lines': ('Piecewise', dict(step=[50, 51, 200], factor=[0.1, 1, 0.5, 0.0], base_lr=0.4, kind='linear'),
                        reference.piecewise_lr),
}


def plain(name):
    """The formula of one of `PLAIN` as a function of t alone."""
    _, arguments, formula = PLAIN[name]
    return lambda t: formula(t, **arguments)


def made(S, name):
    cls, arguments, _ = PLAIN[name]
    return getattr(S, cls)(**copy.deepcopy(arguments))


PLATEAU = dict(base_lr=0.4, mode='min', factor=0.5, patience=1, threshold=1e-4, threshold_mode='rel', cooldown=1, final_lr=0.03,
               epsilon=1e-8)
METRICS = [3, 2, 2, 2, 2, 2, 1, 1.5, 1.5, 1.5, math.nan, 1, 1, 1, 1, 1, 1, 1, 1]
SEEN = list(zip(range(20, 400, 20), METRICS))


def plateau(S):
    """One that has seen the metrics."""
    scheduler = S.Plateau(**PLATEAU)
    for t, metric in SEEN:
        if isinstance(scheduler, dict):
            h = Plateau.hyperparameters(**scheduler['attributes'])
            scheduler['attributes'].update(Plateau.observed(h, metric, t))
        else:
            scheduler.observe(metric, t)
    return scheduler


def plateau_formula(t):
    return reference.plateau_lr(SEEN, t, **PLATEAU)


# name -> (a function of the module that makes it, or `Records`, and its formula)
ALL = {
    **{name: (lambda S, name=name: made(S, name), plain(name)) for name in PLAIN},
    **{f'warm-up, {kind}': (lambda S, kind=kind: S.Warmup(made(S, 'cosine'), 45, 0.02, kind),
                            lambda t, kind=kind: reference.warmed_up_lr(t, plain('cosine'), 45, 0.02, kind))
       for kind in ('linear', 'constant', 'power2', 'sqrt')},
    'warm-up of none': (lambda S: S.Warmup(made(S, 'step'), 0), plain('step')),
    'warm-up of one': (lambda S: S.Warmup(made(S, 'step'), 1), plain('step')),
    'transformer': (lambda S: S.Warmup(S.InverseSqrt(base_lr=0.4, step=40), 40),
                    lambda t: reference.transformer_lr(t, 0.4, 40)),
    'chain': (lambda S: S.Chain([(40, made(S, 'linear up')), (100, made(S, 'inverse time')), (150, made(S, 'cosine'))]),
              lambda t: reference.chained_lr(t, [(40, plain('linear up')), (100, plain('inverse time')), (150, plain('cosine'))])),
    'chain without end': (lambda S: S.Chain([(1, made(S, 'constant')), (None, made(S, 'step'))]),
                          lambda t: reference.chained_lr(t, [(1, plain('constant')), (None, plain('step'))])),
    'scaled': (lambda S: S.scaled(made(S, 'restarts'), 48, 32), lambda t: plain('restarts')(t) * 1.5),
    'nested': (lambda S: S.scaled(S.Warmup(S.Chain([(90, made(S, 'one-cycle')), (None, plateau(S))]), 30, 0.01), 2),
               lambda t: 2 * reference.warmed_up_lr(
                   t, lambda u: reference.chained_lr(u, [(90, plain('one-cycle')), (None, plateau_formula)]), 30, 0.01, 'linear')),
    'plateau': (plateau, plateau_formula),
}
