"""A `gluon.Trainer` under each scheduler: the rates of its updates, and its states where a conversion begins.

    python tests/schedule_runs.py

with MXNet installed writes schedule_rates.json: what a Trainer used in the 200 updates after each of its states, for tests that
run where MXNet is not. Nothing is computed here; ``rates`` are what the optimizer was given by the scheduler.
"""
import json
import sys
from pathlib import Path

import schedule_cases

FILE = Path(__file__).parent / 'schedule_rates.json'
FURTHER = 200
STOPS = (2, 120, 440)  # updates done: in the middle of a warm-up, in the middle, past the end of those that have one
MULTS = {'weight': 1.0, 'bias': 3.0}
MXNETS = {  # name -> (class of mxnet.lr_scheduler, arguments)
    'mxnet factor': ('FactorScheduler', dict(step=37, factor=0.7, base_lr=0.4)),
    'mxnet factor, stopped': ('FactorScheduler', dict(step=23, factor=0.5, stop_factor_lr=0.03, base_lr=0.4)),
    'mxnet factor, warm-up': ('FactorScheduler', dict(step=30, factor=0.9, base_lr=0.4, warmup_steps=45, warmup_begin_lr=0.1)),
    'mxnet multifactor': ('MultiFactorScheduler', dict(step=[30, 130, 300], factor=0.3, base_lr=0.4)),
    'mxnet multifactor, constant warm-up': ('MultiFactorScheduler', dict(
        step=[60, 130, 300], factor=0.3, base_lr=0.4, warmup_steps=45, warmup_begin_lr=0.02, warmup_mode='constant')),
    'mxnet poly': ('PolyScheduler', dict(max_update=300, base_lr=0.4, pwr=3, final_lr=0.01)),
    'mxnet poly, warm-up': ('PolyScheduler', dict(max_update=300, base_lr=0.4, warmup_steps=45, warmup_begin_lr=0.05)),
    'mxnet cosine': ('CosineScheduler', dict(max_update=300, base_lr=0.4, final_lr=0.01)),
    'mxnet cosine, warm-up': ('CosineScheduler', dict(max_update=300, base_lr=0.4, warmup_steps=45)),
}
METRICS = {'plateau', 'nested'}  # those that depend on one
CASES = [*MXNETS, *schedule_cases.ALL]


def begin_of(name):
    """Every second one begins later."""
    return 40 if CASES.index(name) % 2 else 0


def scheduler_of(name):
    """The scheduler object."""
    from mxnet import lr_scheduler

    import gluon_optim as go
    if name in MXNETS:
        cls, arguments = MXNETS[name]
        return getattr(lr_scheduler, cls)(**arguments)
    return schedule_cases.ALL[name][0](go.lr_scheduler)


class Run:
    """A trainer of two parameters, one of which has an ``lr_mult``; ``rates`` are those of the updates it made, by parameter."""

    def __init__(self, scheduler, optimizer='adamw', begin=0, **arguments):
        import mxnet as mx
        from mxnet import gluon
        self.mx, self.parameters = mx, [gluon.Parameter(name, shape=(2,), lr_mult=mult) for name, mult in MULTS.items()]
        for parameter in self.parameters:
            parameter.initialize(init=mx.init.One())
        arguments = dict(arguments, begin_num_update=begin)
        if scheduler is not None:
            arguments['lr_scheduler'] = scheduler
        self.trainer = gluon.Trainer(self.parameters, optimizer, arguments, kvstore=None)
        self.rates, optimizer = [], self.trainer._optimizer
        given = optimizer._get_lrs

        def recorded(indices):
            found = given(indices)
            self.rates.append(dict(zip([list(MULTS)[index] for index in indices], found)))
            return found

        optimizer._get_lrs = recorded

    def train(self, updates):
        for _ in range(updates):
            with self.mx.autograd.record():
                loss = sum(parameter.data().sum() for parameter in self.parameters)
            loss.backward()
            self.trainer.step(1)
        return self

    def states(self):
        from gluon_optim.mxnet.trainer import export_states
        return export_states(self.trainer)


def runs(name):
    """(states, the rates of the 200 updates after them) for each of `STOPS`, and the states at the end of all."""
    run, found = Run(scheduler_of(name), begin=begin_of(name)), []
    for stop in STOPS:
        found.append((stop, run.train(stop - len(run.rates)).states()))
    last = run.train(FURTHER).states()
    return [(states, run.rates[stop:stop + FURTHER]) for stop, states in found], last


def record():
    import mxnet
    import numpy
    cases = {}
    for name in CASES:
        found, _ = runs(name)
        cases[name] = [{'scheduler': states.scheduler, 'num_update': states.num_update, 'counts': states.counts,
                        'rates': [rates['weight'] for rates in used]} for states, used in found[:3 if name in MXNETS else 1]]
        assert all(rates['bias'] == 3 * rates['weight'] for _, used in found for rates in used)
    about = {'made by': 'python tests/schedule_runs.py', 'mxnet': mxnet.__version__, 'numpy': numpy.__version__,
             'python': sys.version.split()[0]}
    FILE.write_text(json.dumps({**about, 'cases': cases}, separators=(',', ':')).replace('},{', '},\n{') + '\n', encoding='utf-8')


if __name__ == '__main__':
    record()
