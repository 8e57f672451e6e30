"""Parameters that `reset_ctx` moves in the middle of a run: the run goes on as if they had stayed."""
import sys
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')

import gluon_optim as go  # noqa: E402
from gluon_optim import rules  # noqa: E402
from gluon_optim.mxnet.trainer import export_states  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from contract_nets import Run  # noqa: E402

MOMENTUM = {name: {'momentum': 0.9} for name in ('sgd', 'nag', 'lars', 'signum', 'dcasgd', 'larc', 'sgd_torch')}
OWN = {**MOMENTUM, 'lbsgd': {'momentum': 0.9, 'batch_scale': 2}, 'rprop': {'wd': 0.0}, 'noise_adaptive_sgd': {'batch_size': 8}}
DETERMINED = [name for name in rules.names(drop_ins=True) if name != 'sgld']  # each device has a generator of its own


def continued(name, contexts, places, dtype='float32', **options):
    """5 steps on ``contexts``, a move to each of ``places``, 3 more steps on the last of them."""
    arguments = {'wd': 0.0, **OWN.get(name, {}), 'multi_precision': dtype == 'float16',
                 'lr_scheduler': mx.lr_scheduler.FactorScheduler(4, 0.5, base_lr=0.05)}
    run = Run(name, arguments, dtype, contexts, **options)
    run.train(5)
    for place in places:
        for p in run.parameters:
            p.reset_ctx([mx.cpu(i) for i in place])
        run.contexts = [mx.cpu(i) for i in place]
    return run.train(3)


@pytest.fixture(autouse=True)
def accelerated():
    go.accelerate()
    yield
    go.restore_builtins()


def assert_went_on(run, straight):
    for name, weight in straight.weights().items():
        np.testing.assert_array_equal(run.weights()[name], weight, err_msg=name)
    states, wanted = export_states(run.trainer), export_states(straight.trainer)
    assert set(states.counts.values()) == {8} and states.num_update == 8
    assert run.trainer.learning_rate == straight.trainer.learning_rate and states.variables == wanted.variables
    assert go.states_digest(run.trainer) == go.states_digest(straight.trainer)


@pytest.mark.parametrize('places', [[[1]], [[1], [0]], [[3], [1], [2]]], ids=str)
@pytest.mark.parametrize('name', DETERMINED)
def test_every_optimizer_goes_on(name, places):
    assert_went_on(continued(name, [0], places), continued(name, [0], []))


@pytest.mark.parametrize('kvstore, on_kvstore', [('device', True), ('device', False), ('local', True), ('local', False)])
@pytest.mark.parametrize('name', ['adamw', 'nadam', 'lars'])
@pytest.mark.parametrize('places', [[[2, 3]], [[1, 2]], [[1, 0]], [[4], [0, 1]]], ids=str)
def test_two_devices(name, kvstore, on_kvstore, places):
    options = dict(kvstore=kvstore, update_on_kvstore=on_kvstore)
    assert_went_on(continued(name, [0, 1], places, **options), continued(name, [0, 1], [], **options))


@pytest.mark.parametrize('name', ['adamw', 'adam', 'sgd'])
def test_masters_and_slots_move_along(name):
    run = continued(name, [0], [[1]], 'float16')
    assert_went_on(run, continued(name, [0], [], 'float16'))
    updater, = run.updaters()

    def contexts(state):
        return {c for part in state for c in contexts(part)} if isinstance(state, (tuple, list)) else {state.context}
    assert set.union(*map(contexts, updater.states.values())) == {mx.cpu(1)}


def test_training_there_and_back():
    """As for a few steps on another device; what that device has counted comes along."""
    scheduler = mx.lr_scheduler.FactorScheduler(4, 0.5, base_lr=0.05)
    run = Run('adamw', {'wd': 0.0, 'lr_scheduler': scheduler}).train(1)
    for place, steps in ((1, 3), (0, 3), (2, 1)):
        for p in run.parameters:
            p.reset_ctx(mx.cpu(place))
        run.contexts = [mx.cpu(place)]
        run.train(steps)
    assert_went_on(run, continued('adamw', [0], []))


def test_a_checkpoint_after_the_move_and_the_generators_of_the_new_device(tmp_path):
    path, run = str(tmp_path / 'x'), continued('nadam', [0], [[3]])
    go.save_checkpoint(path, trainer=run.trainer)
    drawn = mx.nd.random.uniform(shape=3, ctx=mx.cpu(3)).asnumpy().tolist()
    other = continued('nadam', [0], [])
    go.load_checkpoint(path, trainer=other.trainer)
    assert mx.nd.random.uniform(shape=3).asnumpy().tolist() == drawn
    assert go.states_digest(other.trainer) == go.states_digest(run.trainer)
    go.load_checkpoint(path, trainer=run.trainer)
    run.train(1)
    other.steps = run.steps - 1
    other.train(1)
    assert go.states_digest(other.trainer) == go.states_digest(run.trainer)


def test_more_devices_than_the_trainer_knows_are_refused():
    """MXNet would update those that it knows, and leave the others as they are."""
    run = Run('adamw').train(1)
    for p in run.parameters:
        p.reset_ctx([mx.cpu(0), mx.cpu(1)])
    run.contexts, run.shares = [mx.cpu(0), mx.cpu(1)], [0.25, 0.75]
    before = {p.name: p.data(mx.cpu(0)).asnumpy() for p in run.parameters}
    with pytest.raises(ValueError, match='as there were when it was made, 1. Received: parameters on'):
        run.step()
    for p in run.parameters:
        np.testing.assert_array_equal(p.data(mx.cpu(0)).asnumpy(), before[p.name])
    assert run.optimizer.num_update == 1
