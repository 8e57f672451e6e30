"""MXNet's schedulers as functions of the number of the update, against MXNet's own objects."""
import copy

import numpy as np
import pytest

import gluon_optim as go
from gluon_optim.states.model import ParameterInfo

lr_scheduler = pytest.importorskip('mxnet.lr_scheduler')
SCHEDULERS = {
    'factor': lambda: lr_scheduler.FactorScheduler(7, 0.7, base_lr=0.4),
    'factor, stopped': lambda: lr_scheduler.FactorScheduler(3, 0.5, stop_factor_lr=0.03, base_lr=0.4),
    'factor, warm-up': lambda: lr_scheduler.FactorScheduler(4, 0.9, base_lr=0.4, warmup_steps=9, warmup_begin_lr=0.1),
    'multifactor': lambda: lr_scheduler.MultiFactorScheduler([3, 8, 30], 0.3, base_lr=0.4),
    'multifactor, constant warm-up': lambda: lr_scheduler.MultiFactorScheduler(
        [3, 8, 30], 0.3, base_lr=0.4, warmup_steps=5, warmup_begin_lr=0.02, warmup_mode='constant'),
    'poly': lambda: lr_scheduler.PolyScheduler(40, base_lr=0.4, pwr=3, final_lr=0.01),
    'poly, warm-up': lambda: lr_scheduler.PolyScheduler(40, base_lr=0.4, warmup_steps=6, warmup_begin_lr=0.05),
    'cosine': lambda: lr_scheduler.CosineScheduler(40, base_lr=0.4, final_lr=0.01),
    'cosine, warm-up': lambda: lr_scheduler.CosineScheduler(40, base_lr=0.4, warmup_steps=6),
}


@pytest.mark.parametrize('name', SCHEDULERS)
def test_rates_are_those_of_mxnet(name):
    """Also from an object in the middle of a run, forwards and backwards, and from its attributes."""
    run = SCHEDULERS[name]()
    updates = np.arange(1, 61)
    expected = [run(int(t)) for t in updates]
    for asked in (0, 1, 5, 20, 39, 60):
        scheduler = SCHEDULERS[name]()
        for t in range(1, asked + 1):
            scheduler(t)
        before = copy.deepcopy(vars(scheduler))
        np.testing.assert_allclose(go.rate(scheduler, updates), expected, rtol=1e-13)
        record = {'class': f'mxnet.lr_scheduler.{type(scheduler).__name__}', 'attributes': vars(scheduler)}
        assert [go.rate(record, int(t)) for t in (1, 17, 60)] == pytest.approx([expected[t - 1] for t in (1, 17, 60)], rel=1e-13)
        assert vars(scheduler) == before


def test_a_base_rate_that_an_optimizer_has_set():
    scheduler = lr_scheduler.FactorScheduler(2, 0.5, base_lr=0.4)
    scheduler.base_lr = 0.1  # as Adam's constructor does with its default
    assert go.rate(scheduler, np.arange(1, 6)).tolist() == [0.1, 0.1, 0.05, 0.05, 0.025]


@pytest.mark.parametrize('t', [0, -1, 1.5, [1, 0]])
def test_updates_begin_at_1(t):
    with pytest.raises(ValueError, match='1 or more'):
        go.rate(SCHEDULERS['poly'](), t)


def test_other_classes_are_refused():
    class Own(lr_scheduler.LRScheduler):
        pass
    with pytest.raises(TypeError, match='Own'):
        go.rate(Own(), 1)


@pytest.mark.parametrize('name, wrong', [
    ('FactorScheduler', {'step': 0}), ('FactorScheduler', {'count': 'many'}), ('CosineScheduler', {'base_lr_orig': '0.1'}),
    ('PolyScheduler', {'base_lr_orig': float('inf')}), ('MultiFactorScheduler', {'base_lr': -1.0, 'cur_step_ind': 0})])
def test_attributes_of_no_scheduler_are_refused_and_do_not_stop_a_conversion(name, wrong):
    """A file may hold them, and its checksums be right."""
    attributes = dict(step=10, factor=0.5, stop_factor_lr=1e-8, count=20, cur_step_ind=1, base_lr=0.1, base_lr_orig=0.1, power=2,
                      max_update=60, final_lr=0.0, warmup_steps=0, warmup_begin_lr=0, warmup_final_lr=0.4, warmup_mode='linear')
    scheduler = {'class': f'mxnet.lr_scheduler.{name}', 'attributes': {**attributes, **wrong}}
    with pytest.raises(ValueError, match=f'must be those of a mxnet.lr_scheduler.{name}. Received: '):
        go.rate(scheduler, 1)
    pytest.importorskip('torch')
    info = ParameterInfo('weight', 'weight', (2,), 'float32')
    slots = {'momentum_buffer': np.ones(2, 'float32')}
    states = go.OptimizerStates('sgd_torch', {'momentum': 0.9, 'learning_rate': 0.1}, 1, [info], {'weight': 1}, {'weight': slots},
                                scheduler=scheduler)
    assert 'initial_lr' not in go.to_torch(states)['param_groups'][0]
    assert any('is not carried over' in line and "set 'lr' of the param groups at each step, starting with update 2" in line
               for line in states.report)
