"""go.lr_scheduler: every schedule against its formula, PyTorch's class, and a trainer's own steps; saved, resumed, and misused."""
import copy
import inspect
import json
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import schedule_cases
from loads import killed_after_a_minute, told  # noqa: F401

import gluon_optim as go
from gluon_optim import cli, rules
from gluon_optim.schedules.catalog import OURS, SCHEDULES, schedule_of

mx = pytest.importorskip('mxnet')
from mxnet import gluon  # noqa: E402

from gluon_optim.mxnet.scheduler_states import export_scheduler  # noqa: E402
from gluon_optim.mxnet.trainer import export_states, import_states  # noqa: E402

pytestmark = pytest.mark.usefixtures('killed_after_a_minute')
S = go.lr_scheduler
# name -> (a function that makes a scheduler, its formula)
ALL = {name: (lambda make=make: make(S), formula) for name, (make, formula) in schedule_cases.ALL.items()}
ALL["around MXNet's"] = (
    lambda: S.Warmup(mx.lr_scheduler.FactorScheduler(20, 0.9, base_lr=0.4), 10),
    lambda t: reference.warmed_up_lr(t, lambda u: max(reference.step_lr(u, 20, 0.9, 0.4), 1e-8), 10, 0.0, 'linear'))


def made(name):
    return ALL[name][0]()


@pytest.mark.parametrize('name', ALL)
def test_rates_are_those_of_the_formula(name):
    """Forwards, backwards and at random; from the object, from its record, in one array and one by one, and long past its end."""
    make, formula = ALL[name]
    updates = [*range(1, 521), 1000, 12345]
    expected = np.array([formula(t) for t in updates])
    scheduler = make()
    record = json.loads(json.dumps(export_scheduler(scheduler)))
    close = dict(rtol=1e-12, atol=1e-16)  # 1 + cos loses digits near its zero
    np.testing.assert_allclose([scheduler(t) for t in updates], expected, **close)
    np.testing.assert_allclose([scheduler(t) for t in reversed(updates)], expected[::-1], **close)
    np.testing.assert_allclose(go.rate(record, np.array(updates)), expected, **close)
    assert [go.rate(record, t) for t in updates[::50]] == [scheduler(t) for t in updates[::50]]
    assert scheduler(0) == scheduler(1) and type(scheduler(np.int64(3))) is float


@pytest.mark.parametrize('name', ['multi-step', 'cosine', 'chain', 'restarts, longer'])
def test_the_length_is_where_the_rate_stays(name):
    schedule, h = schedule_of(ALL[name][0]())
    length = schedule.length(h)
    if name.startswith('restarts'):
        assert length is None
        return
    rates = go.rate(ALL[name][0](), np.arange(length - 1, length + 50))
    assert rates[0] != rates[1] and len(set(rates[1:])) == 1


# PyTorch's classes

def torch_scheduler(name, optimizer):
    from torch.optim import lr_scheduler as T
    cos = dict(T_max=300, eta_min=0.01)
    return {
        'constant': lambda: T.ConstantLR(optimizer, factor=1.0),
        'inverse time': lambda: T.LambdaLR(optimizer, lambda done: 1 / (1 + 0.7 * (done // 37))),
        'interval': lambda: T.LambdaLR(optimizer, lambda done: 1 / (1 + 0.7 * ((done + 1) // 41))),
        'step': lambda: T.StepLR(optimizer, 60, gamma=0.7),
        'multi-step': lambda: T.MultiStepLR(optimizer, [30, 80, 300], gamma=0.3),
        'exponential': lambda: T.ExponentialLR(optimizer, 0.99),
        'polynomial': lambda: T.PolynomialLR(optimizer, 300, power=1.7),
        'linear down': lambda: T.LinearLR(optimizer, 1.0, 0.03 / 0.4, 300),
        'linear up': lambda: T.LinearLR(optimizer, 0.25, 1.0, 300),
        'cosine': lambda: T.CosineAnnealingLR(optimizer, **cos),
        'restarts': lambda: T.CosineAnnealingWarmRestarts(optimizer, 70, 1, 0.01),
        'restarts, longer': lambda: T.CosineAnnealingWarmRestarts(optimizer, 31, 2, 0.01),
        'one-cycle': lambda: T.OneCycleLR(optimizer, 0.4, 300, cycle_momentum=False),
        'one-cycle, three': lambda: T.OneCycleLR(optimizer, 0.4, 333, pct_start=0.37, three_phase=True, div_factor=10.0,
                                                 final_div_factor=100.0, cycle_momentum=False),
        'one-cycle, lines': lambda: T.OneCycleLR(optimizer, 0.4, 300, pct_start=0.251, anneal_strategy='linear', div_factor=10.0,
                                                 final_div_factor=100.0, cycle_momentum=False),
        'chain': lambda: T.SequentialLR(optimizer, [T.LinearLR(optimizer, 0.25, 1.0, 40), T.StepLR(optimizer, 60, 0.7)], [40]),
    }[name]()


ENDS = {'cosine': 301, 'one-cycle': 300, 'one-cycle, three': 333, 'one-cycle, lines': 300}  # there PyTorch rises again, or raises


@pytest.mark.parametrize('name', ['constant', 'inverse time', 'interval', 'step', 'multi-step', 'exponential', 'polynomial',
                                  'linear down', 'linear up', 'cosine', 'restarts', 'restarts, longer', 'one-cycle',
                                  'one-cycle, three', 'one-cycle, lines', 'chain'])
def test_rates_are_those_of_pytorch(name):
    torch = pytest.importorskip('torch')
    base = {'linear up': 0.4, 'constant': 0.3}.get(name, 0.4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=base)
    theirs = torch_scheduler(name, optimizer)
    ours = {'polynomial': lambda: S.Polynomial(300, 0.4, 1.7),  # which has no final rate there
            'chain': lambda: S.Chain([(40, S.Linear(40, 0.1, 0.4)), (None, S.Step(60, 0.7, 0.4))])}.get(name, lambda: made(name))()
    rates, end = [], ENDS.get(name, 500)
    for _ in range(end):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        theirs.step() if len(rates) < end else None
    np.testing.assert_allclose([ours(t) for t in range(1, end + 1)], rates, rtol=1e-11)
    assert {ours(t) for t in range(end, 500)} == {ours(end)} or end == 500


METRICS = [dict(mode=mode, threshold_mode=kind, patience=patience, cooldown=cooldown, threshold=threshold)
           for mode in ('min', 'max') for kind in ('rel', 'abs') for patience, cooldown in ((0, 0), (2, 0), (1, 3))
           for threshold in (0.0, 0.05)]


@pytest.mark.parametrize('options', METRICS, ids=lambda options: '-'.join(map(str, options.values())))
def test_a_plateau_decides_as_pytorch_does(options):
    """On metrics around 0, above and below, with NaN among them; saved and restored in the middle."""
    torch = pytest.importorskip('torch')
    for seed in range(4):
        random = np.random.RandomState(seed)
        metrics = random.randn(120) + (0, 3, -3, 0)[seed]
        metrics[(random.rand(120) < 0.05) | (np.arange(120) == 0) * (seed == 2)] = math.nan
        small = (1e-4, 1e-2)[seed % 2]  # of the second, the smallest rate is never reached
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.4)
        theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.6, min_lr=1e-3, eps=small, **options)
        ours = S.Plateau(base_lr=0.4, factor=0.6, final_lr=1e-3, epsilon=small, **options)
        rates = []
        for number, metric in enumerate(metrics):
            assert ours(number + 1) == optimizer.param_groups[0]['lr']
            rates.append(ours(number + 1))
            theirs.step(metric)
            assert ours.observe(metric) == optimizer.param_groups[0]['lr']
            if number == 50:
                record = json.loads(json.dumps(export_scheduler(ours)))
                ours = S.Plateau(base_lr=0.4, factor=0.6, final_lr=1e-3, epsilon=small, **options)
                vars(ours).update(record['attributes'])
        assert go.rate(ours, np.arange(1, 121)).tolist() == rates  # all of them, afterwards
        assert len(set(rates)) > 3


# MXNet's schedulers

@pytest.mark.parametrize('make, theirs', [
    (lambda: S.Warmup(S.Cosine(50, 0.4, 0.01), 10, 0.1), lambda: mx.lr_scheduler.CosineScheduler(60, 0.4, 0.01, 10, 0.1)),
    (lambda: S.Warmup(S.Polynomial(50, 0.4, 3, 0.01), 10), lambda: mx.lr_scheduler.PolyScheduler(60, 0.4, 3, 0.01, 10)),
    (lambda: S.Warmup(S.Cosine(50, 0.4), 10, 0.1, 'constant'),
     lambda: mx.lr_scheduler.CosineScheduler(60, 0.4, 0, 10, 0.1, 'constant')),
    (lambda: S.Step(7, 0.5, 0.4), lambda: mx.lr_scheduler.FactorScheduler(7, 0.5, base_lr=0.4)),
    (lambda: S.MultiStep([3, 8], 0.5, 0.4), lambda: mx.lr_scheduler.MultiFactorScheduler([3, 8], 0.5, base_lr=0.4)),
], ids=['cosine', 'poly', 'constant', 'factor', 'multifactor'])
def test_rates_are_those_of_mxnet(make, theirs):
    ours, theirs = make(), theirs()
    np.testing.assert_allclose([ours(t) for t in range(1, 100)], [theirs(t) for t in range(1, 100)], rtol=1e-13)


@pytest.mark.parametrize('kind', ['linear', 'power2', 'sqrt'])
def test_a_warm_up_is_that_of_lbsgd(kind):
    """LBSGD multiplies its rate by 1 ... batch_scale: a warm-up from the rate to batch_scale times that."""
    theirs = mx.optimizer.LBSGD(warmup_strategy=kind, warmup_epochs=2, batch_scale=8, updates_per_epoch=10)
    ours = S.Warmup(S.Constant(0.8), 20, 0.1, kind)
    np.testing.assert_allclose([ours(t) for t in range(1, 40)], [0.1 * theirs._get_lbmult(t) for t in range(1, 40)], rtol=1e-13)


# In a trainer

def trainer_of(scheduler, **arguments):
    """Its weight, in float64, falls by the rate in every step: the gradient is 1."""
    parameter = gluon.Parameter('w', shape=(1,), dtype='float64')
    parameter.initialize(mx.init.Zero())
    if scheduler is not None:
        arguments['lr_scheduler'] = scheduler
    return gluon.Trainer([parameter], 'sgd_torch', arguments)


def used(trainer, number):
    """The rates with which ``number`` steps really moved the weight."""
    parameter, = trainer._params
    rates = []
    for _ in range(number):
        parameter.set_data(mx.nd.zeros((1,), dtype='float64'))
        with mx.autograd.record():
            loss = parameter.data().sum()
        loss.backward()
        trainer.step(1)
        rates.append(-parameter.data().asnumpy()[0])
    return rates


@pytest.mark.parametrize('name', ALL)
def test_a_trainer_uses_these_rates(name):
    make, formula = ALL[name]
    trainer = trainer_of(make())
    assert trainer.learning_rate == make()(1)
    rates = used(trainer, 60)
    np.testing.assert_allclose(rates, [formula(t) for t in range(1, 61)], rtol=1e-12)


@pytest.mark.parametrize('name', [name for name in ALL if name not in ('nested', 'plateau')])
@pytest.mark.parametrize('at', [0, 1, 7, 44, 45, 46, 400])
def test_a_run_resumes_at_any_step(name, at, tmp_path):
    """Inside the warm-up, past the end, in the trainer's own scheduler and in one that is made from the file."""
    make, formula = ALL[name]
    states = export_states(trainer_of(make()))
    states.num_update = at
    path = str(tmp_path / 'run')
    straight = trainer_of(make())
    import_states(straight, states)
    go.save_states(straight, path)
    expected = used(straight, 5)
    np.testing.assert_allclose(expected, [formula(t) for t in range(at + 1, at + 6)], rtol=1e-12)
    for present, mode in ((make(), 'file'), (make(), 'current'), (None, 'file')):
        trainer = trainer_of(present)
        said = told(lambda: go.load_states(trainer, path, hyperparameters=mode))  # noqa: B023
        assert len(said) == (present is None)
        assert present is None or trainer._optimizer.lr_scheduler is present
        assert used(trainer, 5) == expected
        assert export_scheduler(trainer._optimizer.lr_scheduler) == export_scheduler(make())


def warm_plateau(**changed):
    options = {**dict(base_lr=0.4, factor=0.5, patience=0), **changed}
    return S.Warmup(S.Plateau(**options), 10)


def observing(trainer, number, worse=4):
    """Steps of a run that observes a metric, worse and worse, after every ``worse``-th."""
    rates = []
    for _ in range(number):
        rates += used(trainer, 1)
        done = trainer._optimizer.num_update
        if done % worse == 0:
            trainer._optimizer.lr_scheduler.schedule.observe(float(done))
    return rates


@pytest.mark.parametrize('at', [3, 9, 21, 40])
def test_a_plateau_resumes_with_what_it_has_observed(at, tmp_path):
    path = str(tmp_path / 'run')
    straight = trainer_of(warm_plateau())
    observing(straight, at)
    go.save_states(straight, path)
    expected = observing(straight, 20)
    assert expected[-1] < expected[0] or at == 3
    for present in (warm_plateau(), None):
        trainer = trainer_of(present)
        assert len(told(lambda: go.load_states(trainer, path))) == (present is None)  # noqa: B023
        assert observing(trainer, 20) == expected
    said = told(lambda: go.load_states(trainer_of(warm_plateau()), path, hyperparameters='current'))
    observed = len([line for line in said if line.startswith('schedule.best of the scheduler')])
    assert observed == (at >= 4) and all("the trainer's applies" in line for line in said)
    assert [line for line in told(lambda: go.load_states(trainer_of(warm_plateau(patience=3)), path)) if 'patience' in line]


@pytest.mark.parametrize('make, other, names', [
    (lambda: S.Cosine(20), lambda: S.Cosine(40), ['max_update']),
    (lambda: S.Cosine(20), lambda: S.Cosine(20, 0.1, 0.01), ['base_lr', 'final_lr']),
    (lambda: S.MultiStep([3, 9]), lambda: S.MultiStep([3, 8]), ['step']),
    (lambda: S.Warmup(S.Cosine(20), 5), lambda: S.Warmup(S.Cosine(30), 6), ['schedule.max_update', 'steps']),
    (lambda: S.Chain([(4, S.Constant()), (9, S.Cosine(20))]), lambda: S.Chain([(4, S.Constant()), (9, S.Cosine(21))]),
     ['segments[1][1].max_update']),
    (lambda: S.scaled(S.Constant(), 4), lambda: S.scaled(S.Constant(), 8), ['batch_size']),
    (lambda: S.Plateau(patience=3), lambda: S.Plateau(patience=4), ['patience']),
], ids=['cosine', 'rates', 'milestones', 'warm-up', 'chain', 'scaled', 'plateau'])
@pytest.mark.parametrize('at', [0, 3, 30])
def test_what_differs_is_said_by_argument(make, other, names, at, tmp_path):
    path = str(tmp_path / 'run')
    saved = trainer_of(make())
    used(saved, at)
    go.save_states(saved, path)
    for mode, whose in (('file', "the file's applies"), ('current', "the trainer's applies")):
        trainer = trainer_of(other())
        said = told(lambda: go.load_states(trainer, path, hyperparameters=mode))  # noqa: B023
        assert [line.split(' of the scheduler')[0] for line in said] == names and all(whose in line for line in said)
        chosen = (make if mode == 'file' else other)()
        assert used(trainer, 3) == pytest.approx([chosen(t) for t in range(at + 1, at + 4)], rel=1e-12)


def test_another_class_is_refused(tmp_path):
    path = str(tmp_path / 'run')
    go.save_states(trainer_of(S.Warmup(S.Cosine(20), 5)), path)
    for other, match in ((S.Cosine(20), r'with the scheduler gluon_optim.mxnet.lr_scheduler.Warmup, the trainer has .*Cosine'),
                         (S.Warmup(S.Linear(20), 5), r'schedule is gluon_optim.mxnet.lr_scheduler.Linear in the trainer.*Cosine')):
        before = export_scheduler(other)
        with pytest.raises(ValueError, match=match):
            go.load_states(trainer_of(other), path)
        assert export_scheduler(other) == before


COSINE = {'class': f'{OURS}.Cosine', 'attributes': dict(max_update=20, base_lr=0.4, final_lr=0.0)}


def deep(number, chain=False):
    record = COSINE
    for _ in range(number):
        attributes = dict(segments=[[5, record]]) if chain else dict(schedule=record, steps=5, begin=0.0, kind='linear')
        record = {'class': f'{OURS}.{"Chain" if chain else "Warmup"}', 'attributes': attributes}
    return record


def warm(**changed):
    return {'class': f'{OURS}.Warmup', 'attributes': {**dict(schedule=COSINE, steps=5, begin=0.0, kind='linear'), **changed}}


def of(name, **attributes):
    return {'class': f'{OURS}.{name}', 'attributes': attributes}


NONSENSE = {
    'step 0': of('Step', step=0, factor=0.5, base_lr=0.1), 'step text': of('Step', step='3', factor=0.5, base_lr=0.1),
    'step fraction': of('Step', step=1.5, factor=0.5, base_lr=0.1), 'step true': of('Step', step=True, factor=0.5, base_lr=0.1),
    'missing': of('Step', step=3, factor=0.5), 'unknown': of('Step', step=3, factor=0.5, base_lr=0.1, more=1),
    'endless': of('Cosine', max_update=2 ** 53 + 1, base_lr=0.1, final_lr=0.0),
    'negative': of('Cosine', max_update=-4, base_lr=0.1, final_lr=0.0),
    'rate': of('Cosine', max_update=4, base_lr=-0.1, final_lr=0.0),
    'huge rate': of('Cosine', max_update=4, base_lr=10 ** 400, final_lr=0.0),
    'none': of('Cosine', max_update=None, base_lr=0.1, final_lr=0.0),
    'unsorted': of('MultiStep', step=[5, 3], factor=0.5, base_lr=0.1), 'empty': of('MultiStep', step=[], factor=0.5, base_lr=0.1),
    'too many': of('MultiStep', step=list(range(1, 10 ** 6)), factor=0.5, base_lr=0.1),
    'number for a list': of('MultiStep', step=3, factor=0.5, base_lr=0.1),
    'factors': of('Piecewise', step=[3], factor=[1.0], base_lr=0.1, kind='constant'),
    'no cycle': of('OneCycle', max_update=2, base_lr=0.1, pct_start=0.3, anneal_strategy='cos', div_factor=25.0,
                   final_div_factor=1e4, three_phase=False),
    'gamma': of('SumToInfinity', base_lr=0.1, b=1.0, gamma=0.5),
    'deep': deep(10 ** 5), 'deep chain': deep(10 ** 5, chain=True), 'a little deep': deep(16),
    'no schedule': warm(schedule=3), 'a list': warm(schedule=[COSINE]), 'stranger': warm(schedule=of('Own')),
    'user': warm(schedule={'class': 'os.system', 'attributes': {}}), 'attributes': {'class': f'{OURS}.Cosine', 'attributes': None},
    'kind': warm(kind='cubic'), 'steps': warm(steps=-1),
    'bad inner': warm(schedule=of('Step', step=0, factor=0.5, base_lr=0.1)),
    'no segments': of('Chain', segments=[]), 'zero': of('Chain', segments=[[0, COSINE]]),
    'none inside': of('Chain', segments=[[None, COSINE], [3, COSINE]]), 'no pair': of('Chain', segments=[[3, COSINE, 1]]),
    'sum': of('Chain', segments=[[2 ** 53, COSINE], [2 ** 53, COSINE]]), 'flat': of('Chain', segments=[3, COSINE]),
    'reduced': of('Plateau', **schedule_cases.PLATEAU, num_update=3, best=None, bad=0, cooling=0, reduced=[5, 3]),
    'base class': of('Scheduler'), 'function': of('scaled'), 'module': {'class': OURS, 'attributes': {}},
    'wrapper': of('Wrapper'), 'dunder': of('__loader__'),
}


@pytest.mark.parametrize('name', NONSENSE)
def test_a_file_with_nonsense_is_refused(name):
    record = NONSENSE[name]
    with pytest.raises((TypeError, ValueError)) as refused:
        go.rate(record, 3)
    assert len(str(refused.value)) < 1500
    path = record['class'].rpartition('.')[2]
    present = {'Step': lambda: S.Step(3), 'Cosine': lambda: S.Cosine(3), 'MultiStep': lambda: S.MultiStep([3]),
               'Piecewise': lambda: S.Piecewise([3], [1, 2]), 'OneCycle': lambda: S.OneCycle(30), 'Plateau': S.Plateau,
               'SumToInfinity': S.SumToInfinity, 'Warmup': lambda: S.Warmup(S.Cosine(3), 5),
               'Chain': lambda: S.Chain([(3, S.Cosine(3))])}.get(path, lambda: None)()
    for scheduler in (None, present):
        trainer = trainer_of(scheduler)
        before = None if scheduler is None else export_scheduler(scheduler)
        states = export_states(trainer)
        states.num_update, states.scheduler = 2 ** 53 - 1, record
        with pytest.raises(ValueError) as refused:
            import_states(trainer, states)
        assert len(str(refused.value)) < 2000
        assert trainer._optimizer.num_update == 0
        assert (None if scheduler is None else export_scheduler(scheduler)) == before
        told(lambda: import_states(trainer, states, hyperparameters='current'))  # noqa: B023
        assert trainer._optimizer.num_update == 2 ** 53 - 1


@pytest.mark.parametrize('name', ALL)
def test_updates_of_any_number(name):
    scheduler = ALL[name][0]()
    for t in (10 ** 6, 2 ** 31, 2 ** 53 - 1):
        assert 0 <= scheduler(t) <= 0.9


def test_hostile_numbers_cost_nothing():
    record = of('CosineRestarts', step=1, base_lr=0.1, final_lr=0.0, step_mult=2 ** 53)
    assert go.rate(record, 2 ** 53 - 1) == pytest.approx(0.0, abs=1e-9)
    assert go.rate(of('Cosine', max_update=2 ** 53, base_lr=0.1, final_lr=0.0), 1) == 0.1


# Construction

@pytest.mark.parametrize('schedule', SCHEDULES, ids=lambda schedule: schedule.name)
def test_a_class_has_the_arguments_that_are_declared(schedule):
    """Names, order and defaults; its documentation names each, and holds the formula."""
    cls = getattr(S, schedule.__name__)
    signature = inspect.signature(cls)
    assert [(p.name, p.default) for p in signature.parameters.values()] == [(h.name, h.default) for h in schedule.hypers]
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    assert cls.__module__ == OURS and cls.formula is schedule
    for line in schedule.__doc__.strip().splitlines():
        assert line.strip() in cls.__doc__
    assert all(f'\n{hyper.name} : ' in cls.__doc__ and hyper.doc for hyper in schedule.hypers)
    assert issubclass(cls, mx.lr_scheduler.LRScheduler)


@pytest.mark.parametrize('make, error, match', [
    (lambda: S.Step(0), ValueError, r'`step` must be a whole number, 1 or more\. Received: step=0'),
    (lambda: S.Step(-5), ValueError, '`step`'), (lambda: S.Step(2.5), ValueError, '`step`'),
    (lambda: S.Step('3'), ValueError, '`step`'), (lambda: S.Step(3, 1.5), ValueError, r'`factor` must be in \[0, 1\]'),
    (lambda: S.Step(3, 0.5, '0.1'), TypeError, '`base_lr`'), (lambda: S.Step(3, 0.5, -0.1), ValueError, '`base_lr`'),
    (lambda: S.Step(3, 0.5, math.nan), ValueError, '`base_lr`'), (lambda: S.Step(), TypeError, 'step'),
    (lambda: S.MultiStep([]), ValueError, r'`step` must be an increasing list .* with 1 to 10000 entries\. Received: 0'),
    (lambda: S.MultiStep(5), TypeError, '`step`'), (lambda: S.MultiStep([5, 3]), ValueError, 'Received: 5 before 3'),
    (lambda: S.MultiStep([3, 3]), ValueError, 'Received: 3 before 3'), (lambda: S.MultiStep([0, 3]), ValueError, 'step=0'),
    (lambda: S.MultiStep('35'), TypeError, '`step`'), (lambda: S.Cosine(0), ValueError, '`max_update`'),
    (lambda: S.Cosine(10, final_lr=-1), ValueError, '`final_lr`'), (lambda: S.Cosine(True), ValueError, '`max_update`'),
    (lambda: S.InverseTime(0.1, -1, 10), ValueError, '`decay`'),
    (lambda: S.InverseTime(0.1, 1, 0), ValueError, '`steps_per_epoch`'),
    (lambda: S.SumToInfinity(gamma=0.5), ValueError, r'`gamma` must be in \(0.5, 1\].*squares is infinite, and the noise does not'),
    (lambda: S.SumToInfinity(gamma=1.1), ValueError, '`gamma`'), (lambda: S.SumToInfinity(0.0), ValueError, 'add up to infinity'),
    (lambda: S.Piecewise([3], [1]), ValueError, 'Received: 1 factors, 1 steps'),
    (lambda: S.Piecewise([3], [1, -1]), ValueError, '`factor`'), (lambda: S.Piecewise([3], [1, 'x']), TypeError, '`factor`'),
    (lambda: S.Piecewise([3], [1, 2], kind='cubic'), ValueError, '`kind`'),
    (lambda: S.OneCycle(3), ValueError, r'`pct_start` max_update must be above 1'),
    (lambda: S.OneCycle(100, pct_start=1.0), ValueError, '`pct_start`'),
    (lambda: S.OneCycle(100, pct_start=0.6, three_phase=True), ValueError, 'third part'),
    (lambda: S.OneCycle(100, three_phase=1), ValueError, '`three_phase`'),
    (lambda: S.Plateau(factor=1.0), ValueError, '`factor`'), (lambda: S.Plateau(patience=-1), ValueError, '`patience`'),
    (lambda: S.Plateau(mode='best'), ValueError, "`mode` must be one of 'min', 'max'"),
    (lambda: S.Warmup(S.Cosine(9), -1), ValueError, '`steps`'), (lambda: S.Warmup(0.1, 5), TypeError, 'Received: builtins.float'),
    (lambda: S.Warmup(None, 5), TypeError, 'NoneType'), (lambda: S.Warmup(COSINE, 5), TypeError, 'must be an object'),
    (lambda: S.Warmup(mx.lr_scheduler.LRScheduler(), 5), TypeError, 'Received: mxnet.lr_scheduler.LRScheduler'),
    (lambda: S.Warmup(S.Cosine(9, 0.1), 5, 0.2), ValueError, 'first rate of the schedule, 0.1. Received: begin=0.2'),
    (lambda: S.Warmup(S.Cosine(9), 5, kind='cubic'), ValueError, '`kind`'),
    (lambda: S.Chain([]), ValueError, '`segments`'), (lambda: S.Chain([(0, S.Cosine(9))]), ValueError, r'segments\[0\]=0'),
    (lambda: S.Chain([(-3, S.Cosine(9))]), ValueError, r'segments\[0\]'), (lambda: S.Chain(S.Cosine(9)), TypeError, '`segments`'),
    (lambda: S.Chain([S.Cosine(9)]), TypeError, 'pairs'),
    (lambda: S.Chain([(None, S.Cosine(9)), (3, S.Cosine(9))]), ValueError, r'segments\[0\]=None'),
    (lambda: S.Chain([(3, 0.1)]), TypeError, 'float'),
    (lambda: S.scaled(S.Cosine(9), 0), ValueError, '`batch_size`'),
    (lambda: S.scaled(S.Cosine(9), 8, 0), ValueError, '`reference`'),
    (lambda: S.scaled(0.1, 8), TypeError, 'float'),
])
def test_bad_arguments_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize('t', [-1, 1.5, '3', None, True, np.nan])
def test_what_is_no_number_of_an_update_is_refused(t):
    scheduler = S.Cosine(9)
    with pytest.raises(ValueError, match='num_update'):
        scheduler(t)
    with pytest.raises(ValueError, match='1 or more'):
        go.rate(scheduler, t)


def nested(number):
    scheduler = S.Cosine(20)
    for _ in range(number):
        scheduler = S.Warmup(scheduler, 2)
    return scheduler


def test_schedulers_within_one_another_have_a_bound(tmp_path):
    deepest = nested(15)
    trainer = trainer_of(deepest)
    rates = used(trainer, 3)
    go.save_states(trainer, str(tmp_path / 'run'))  # JSON in files is nested up to 100 levels
    other = trainer_of(nested(15))
    assert told(lambda: go.load_states(other, str(tmp_path / 'run'))) == []
    assert used(other, 2) == used(trainer, 2) and rates[0] < 0.01
    with pytest.raises(ValueError, match='At most 16 schedulers'):
        S.Warmup(deepest, 2)


def test_the_deepest_chain_fits_into_a_file(tmp_path):
    scheduler = S.Cosine(20)
    for _ in range(15):
        scheduler = S.Chain([(50, scheduler)])
    trainer = trainer_of(scheduler)
    go.save_states(trainer, str(tmp_path / 'run'))
    other = trainer_of(None)
    told(lambda: go.load_states(other, str(tmp_path / 'run')))
    assert used(other, 5) == used(trainer, 5)


def test_attributes_can_be_changed_and_are_checked():
    scheduler = S.Warmup(S.Cosine(20, 0.4), 5)
    scheduler.steps = 8
    scheduler.schedule.max_update = 40
    assert scheduler(8) == 0.4 and scheduler(4) == pytest.approx(0.2) and scheduler(28) == pytest.approx(0.2)
    for part, name, value in ((scheduler, 'steps', -1), (scheduler, 'base_lr', -1), (scheduler.schedule, 'max_update', 0),
                              (scheduler, 'begin', -0.5)):
        before = export_scheduler(scheduler)
        with pytest.raises(ValueError, match=name):
            setattr(part, name, value)
        assert export_scheduler(scheduler) == before
    with pytest.raises(AttributeError, match="Unknown attribute of Warmup 'step'. Did you mean 'steps'"):
        scheduler.step = 3
    with pytest.raises(AttributeError, match="Unknown attribute of Cosine 'warmup_steps'"):
        scheduler.schedule.warmup_steps = 3


def test_learning_rate_of_an_optimizer_is_base_lr(capsys):
    """As MXNet's constructor sets it, whatever is around the schedule."""
    for make in (lambda: S.Cosine(20, 0.4), lambda: S.Warmup(S.Cosine(20, 0.4), 1), lambda: S.scaled(S.Warmup(S.Step(9), 1), 1),
                 lambda: S.Chain([(9, S.Cosine(20)), (9, S.Step(9))]), lambda: S.Warmup(mx.lr_scheduler.FactorScheduler(20), 1)):
        for name in ('sgd_torch', 'sgd', 'adam'):
            scheduler = make()
            mx.optimizer.create(name, learning_rate=0.25, lr_scheduler=scheduler)
            assert scheduler.base_lr == scheduler(1) == 0.25
    for inner in (S.Cosine(20, 0.4), mx.lr_scheduler.FactorScheduler(20, base_lr=0.4)):
        scheduler = S.Warmup(inner, 5)
        with pytest.raises(ValueError, match='-0.1|below zero'):
            scheduler.base_lr = -0.1
        assert scheduler.base_lr == inner.base_lr == 0.4
    with pytest.raises(ValueError, match='base_lr'):
        S.SumToInfinity().base_lr = 0.0


def test_the_optimizers_of_mxnet_that_overwrite_the_rate_of_a_schedule():
    """The rates that docs/SCHEDULES.md gives; all others, drop-ins for MXNet's apart, keep the schedule's."""
    rates = {}
    for name in [*rules.names(samplers=True), *rules.names(drop_ins=True, samplers=True)]:
        scheduler = S.Warmup(S.Cosine(50, base_lr=0.4), 5)
        rates[name] = mx.optimizer.create(name, lr_scheduler=scheduler).lr_scheduler.base_lr
    assert {name: rate for name, rate in rates.items() if rate != 0.4} == {
        'adam': 0.001, 'adamax': 0.002, 'lamb': 0.001, 'nadam': 0.001, 'rmsprop': 0.001, 'signum': 0.01}


def test_a_plateau_is_asked_by_what_is_around_it():
    """observe() without a number goes by the updates that it has seen itself."""
    inner = S.Plateau(0.4, factor=0.5, patience=0)
    scheduler = S.Warmup(S.Chain([(5, S.Constant(0.4)), (None, inner)]), 4)
    scheduler(3)
    assert inner.num_update == 0
    scheduler(14)  # 11 of the chain, 6 of the plateau
    assert inner.num_update == 6
    inner.observe(1.0)
    assert inner.observe(2.0) == 0.2 and inner.reduced == [6]
    assert (scheduler(14), scheduler(15)) == (0.4, 0.2)


def test_a_rate_that_is_lowered_below_the_begin_of_its_warm_up_can_be_saved(tmp_path):
    trainer = trainer_of(S.Warmup(S.Plateau(0.4, factor=0.1, patience=0), 10, begin=0.1))
    used(trainer, 3)
    for metric in (1.0, 2.0):
        assert trainer._optimizer.lr_scheduler.schedule.observe(metric) in (0.4, 0.4 * 0.1)
    go.save_states(trainer, str(tmp_path / 'run'))
    other = trainer_of(None)
    told(lambda: go.load_states(other, str(tmp_path / 'run')))
    assert used(other, 9) == used(trainer, 9)


@pytest.mark.parametrize('observe, error, match', [
    (lambda s: s.observe(-math.inf, 12), ValueError, '`metric` must be finite'),
    (lambda s: s.observe('bad', 12), ValueError, 'bad'),
    (lambda s: s.observe(1.0, -1), ValueError, '`num_update`'), (lambda s: s.observe(1.0, 2.5), ValueError, '`num_update`'),
    (lambda s: s.observe(1.0, 9), ValueError, 'must not be below 10'), (lambda s: s.observe(None, 12), TypeError, 'NoneType')])
def test_bad_observations_are_refused(observe, error, match):
    scheduler = S.Plateau(patience=0)
    scheduler.observe(1.0, 10)
    scheduler.observe(2.0, 10)
    before = export_scheduler(scheduler)
    with pytest.raises(error, match=match):
        observe(scheduler)
    assert export_scheduler(scheduler) == before


@pytest.mark.parametrize('metric', [
    lambda: mx.nd.array([0.5]), lambda: mx.nd.array([[0.5]]), lambda: mx.np.array(0.5), lambda: np.array([[0.5]]),
    lambda: np.float32(0.5)], ids=['nd', 'nd 2-d', 'np', 'numpy', 'numpy scalar'])
def test_a_metric_may_be_an_array_of_one(metric):
    for scheduler in (S.Plateau(), S.Warmup(S.Plateau(), 1)):
        scheduler.observe(metric(), 3)
        plateau = getattr(scheduler, 'schedule', scheduler)
        assert (type(plateau.best), plateau.best) == (float, 0.5)


def test_a_metric_of_several_numbers_is_refused():
    metric = mx.metric.Accuracy()
    metric.update([mx.nd.array([0, 1])], [mx.nd.array([[1, 0], [0, 1]])])
    for several in (metric.get(), [0.5], np.array([0.5, 1]), mx.nd.array([0.5, 1]), np.zeros(0)):
        with pytest.raises(TypeError, match=r'`metric` must be one number.*pass metric.get\(\)\[1\]'):
            S.Plateau().observe(several)


AROUND = {
    'warm-up': (lambda inner: S.Warmup(inner, 6), 5, math.inf),
    'no warm-up': (lambda inner: S.Warmup(inner, 1), 0, math.inf),
    'scaled': (lambda inner: S.scaled(S.Warmup(inner, 6), 4), 5, math.inf),
    'chain': (lambda inner: S.Chain([(7, S.Constant(0.4)), (9, inner), (None, S.Constant(0.1))]), 7, 16),
    'nested': (lambda inner: S.Warmup(S.Chain([(7, S.Constant(0.4)), (9, S.Warmup(inner, 3)), (4, S.Step(3))]), 4), 12, 19),
    'unreached': (lambda inner: S.Chain([(2, S.Warmup(inner, 9)), (None, S.Constant(0.4))]), 8, 2)}


@pytest.mark.parametrize('numbered', [True, False])
@pytest.mark.parametrize('name', AROUND)
def test_what_is_around_a_plateau_observes_in_its_own_time(name, numbered):
    """A worse metric after every update: each reduces the next rate, from the first one that the plateau gives to its last."""
    make, before, end = AROUND[name]
    inner = S.Plateau(0.4, factor=0.5, patience=0, epsilon=0)
    scheduler, constant = make(inner), make(S.Constant(0.4))
    for update in range(1, 31):
        rate = scheduler(update)
        reductions = max(min(update, end) - before - 2, 0)  # the first metric is the best one
        assert rate == (constant(update) * 0.5 ** reductions if before < update <= end else constant(update))
        returned = scheduler.observe(float(update), update if numbered else None)
        if numbered or before < update < end:
            assert returned == scheduler(update + 1)
    assert inner.reduced == [own for own in range(2, 30 - before + 1) if own < end - before]


def test_an_observation_of_what_is_around_a_plateau_names_its_own_updates():
    scheduler = S.Warmup(S.Plateau(patience=0), 10)
    scheduler.observe(1.0, 20)
    scheduler.observe(2.0, 21)
    before = export_scheduler(scheduler)
    for metric, update, error, match in ((3.0, 20, ValueError, 'must not be below 21.*Received: num_update=20'),
                                         (3.0, -1, ValueError, '`num_update`'), ('bad', 3, ValueError, 'bad'),
                                         ((1, 2), 3, TypeError, '`metric`'), (-math.inf, 30, ValueError, '`metric` must be')):
        with pytest.raises(error, match=match):
            scheduler.observe(metric, update)
    assert export_scheduler(scheduler) == before


@pytest.mark.parametrize('make, found', [
    (lambda: S.Warmup(S.Cosine(9), 3), 'Received: none in Warmup'),
    (lambda: S.scaled(mx.lr_scheduler.FactorScheduler(9), 3), 'Received: none in Scaled'),
    (lambda: S.Chain([(9, S.Plateau()), (None, S.Warmup(S.Plateau(), 3))]), 'Received: 2 in Chain.*Call observe of each')])
def test_observe_needs_one_plateau_within(make, found):
    with pytest.raises(TypeError, match=found):
        make().observe(1.0, 5)


@pytest.mark.parametrize('name', ALL)
def test_copies_and_pickles_are_equal(name):
    """A parameter server gets the optimizer, and its scheduler, as a pickle."""
    scheduler = ALL[name][0]()
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert export_scheduler(other) == export_scheduler(scheduler)
        assert [other(t) for t in (1, 50, 300)] == [scheduler(t) for t in (1, 50, 300)]
    assert repr(scheduler) == repr(copy.deepcopy(scheduler)) or 'FactorScheduler' in repr(scheduler)
    if 'MXNet' not in name and name not in ('nested', 'plateau'):
        again = eval(repr(scheduler), vars(S))  # noqa: S307
        assert export_scheduler(again) == export_scheduler(scheduler)


@pytest.mark.parametrize('name', ['cosine', 'nested', 'chain', "around MXNet's"])
@pytest.mark.parametrize('optimizer', ['adamw', 'sgd'])
def test_mxnets_own_files_hold_them_too(name, optimizer, tmp_path):
    """Trainer.save_states, which pickles; and our file, written as MXNet's, is loaded by MXNet."""
    def trainer(scheduler):
        parameter = gluon.Parameter('w', shape=(2,))
        parameter.initialize(mx.init.One())
        arguments = {'lr_scheduler': scheduler} if scheduler else {}
        return gluon.Trainer([parameter], optimizer, arguments, update_on_kvstore=False)

    def step(run, number):
        for _ in range(number):
            with mx.autograd.record():
                loss = (run._params[0].data() ** 2).sum()
            loss.backward()
            run.step(1)
        return run

    make, formula = ALL[name]
    straight = step(trainer(make()), 4)
    straight.save_states(str(tmp_path / 'native'))
    states = go.read_states(str(tmp_path / 'native'), params=['w'])
    assert states.scheduler == export_scheduler(straight._optimizer.lr_scheduler)
    assert states.hypers['learning_rate'] == straight._optimizer.lr_scheduler.base_lr
    go.save_states(straight, str(tmp_path / 'ours'))
    from gluon_optim.states import container
    from gluon_optim.states.mxnet_files import writer
    writer.write_states(str(tmp_path / 'again'), container.read(str(tmp_path / 'ours')), 1)
    for file in ('native', 'again'):
        other = trainer(None)
        other.load_states(str(tmp_path / file))
        scheduler = other._optimizer.lr_scheduler
        assert type(scheduler) is type(make()) and scheduler.base_lr == make().base_lr  # of an object within it, not a record
        assert [scheduler(t) for t in (5, 50)] == pytest.approx([formula(5), formula(50)], rel=1e-12)


@pytest.mark.parametrize('update_on_kvstore', [True, False])
def test_two_devices_see_one_schedule(update_on_kvstore):
    contexts = [mx.cpu(0), mx.cpu(1)]
    parameter = gluon.Parameter('w', shape=(1,), dtype='float64')
    parameter.initialize(mx.init.Zero(), ctx=contexts)
    trainer = gluon.Trainer([parameter], 'sgd_torch', {'lr_scheduler': S.Warmup(S.Step(3, 0.5, 0.4), 4)},
                            kvstore='device', update_on_kvstore=update_on_kvstore)
    weights = [0.0]
    for _ in range(12):
        for context in contexts:
            with mx.autograd.record():
                loss = parameter.data(context).sum()
            loss.backward()
        trainer.step(2)
        weights.append(parameter.data(contexts[1]).asnumpy()[0])
    rates = [S.Warmup(S.Step(3, 0.5, 0.4), 4)(t) for t in range(1, 13)]
    np.testing.assert_allclose(-np.diff(weights), rates, rtol=1e-12)


class Halved(S.Cosine):
    """A user's own, with an attribute more."""

    def __init__(self, max_update, base_lr, share):
        super().__init__(max_update, base_lr)
        self.share = share

    def __call__(self, num_update):
        return self.share * super().__call__(num_update)


def test_a_users_subclass_works_and_is_not_taken_for_ours(tmp_path):
    trainer = trainer_of(Halved(20, 0.4, 0.5))
    assert used(trainer, 11)[-1] == pytest.approx(0.1)
    go.save_states(trainer, str(tmp_path / 'run'))
    other = trainer_of(Halved(20, 0.4, 0.25))
    assert [line.split(' of the')[0] for line in told(lambda: go.load_states(other, str(tmp_path / 'run')))] == ['share']
    assert used(other, 2) == used(trainer, 2)
    for wrong in (lambda: go.rate(Halved(20, 0.4, 0.5), 1), lambda: S.Warmup(Halved(20, 0.4, 0.5), 3)):
        with pytest.raises(TypeError, match='Halved'):
            wrong()


def test_the_code_in_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parent.parent / 'docs/SCHEDULES.md').read_text(encoding='utf-8')
    blocks, names = re.findall('```python\n(.*?)```', text, re.DOTALL), {}
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, 'docs/SCHEDULES.md', 'exec'), names)  # noqa: S102
    commands = re.findall('^gluon-optim (.*)', text, re.MULTILINE)
    assert len(commands) == 2
    assert cli.main(shlex.split(commands[1])) == 0


def test_a_killed_run_resumes_with_the_same_rates_and_weights(tmp_path):
    """Inside the warm-up of a chain's first part, and where its plateau has reduced the rate."""
    here = Path(__file__).resolve().parent

    def run(*arguments):
        done = subprocess.run([sys.executable, '-W', 'ignore', str(here / 'plateau_runs.py'), *map(str, arguments)],
                              env={**os.environ, 'PYTHONPATH': str(here.parent)}, stdout=subprocess.PIPE, text=True)
        return done.returncode, dict(line.split(maxsplit=1) for line in done.stdout.splitlines())

    code, straight = run(tmp_path / 'straight')
    assert code == 0 and len({straight[str(t)] for t in range(13, 41)}) > 2
    for begin, die in ((6, 8), (21, 23)):
        assert run(tmp_path / str(die), die)[0] == -signal.SIGKILL
        code, resumed = run(tmp_path / str(die))
        assert code == 0 and min(int(step) for step in resumed if step != 'digest') == begin
        assert resumed == {step: straight[step] for step in resumed}
