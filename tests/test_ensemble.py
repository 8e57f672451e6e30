"""Snapshot ensembles: what is kept and for how long, what they predict, and that training goes on as if they had not."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')

from mxnet import autograd, gluon  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim.states.errors import StateFileError  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_runs as runs  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
X = np.random.RandomState(1).randn(7, 2, 6, 6).astype('float32')


@pytest.fixture
def folder(tmp_path):
    return tmp_path / 'run'


def trained(folder, steps=6, cycle=2, config=None, **options):
    """Net, trainer and snapshots of a run."""
    net, trainer = runs.make(config or {})
    snapshots = go.ensemble.Snapshots(go.CheckpointManager(folder, **{'keep_last': 1, **options}), net, trainer, cycle=cycle)
    for step in range(1, steps + 1):
        runs.train(net, trainer, 1)
        snapshots.save(step)
    return net, trainer, snapshots


def outputs(folder, step, contexts=(0,)):
    """Of a net of its own, with what is in one file."""
    net = runs.make_net(contexts)
    go.load_checkpoint(go.CheckpointManager(folder).path(step), net=net)
    return net(mx.nd.array(X)).asnumpy().astype('float64')


def softmax(array, axis=-1):
    return np.exp(array) / np.exp(array).sum(axis=axis, keepdims=True)


# What is kept

@pytest.mark.parametrize('background', [False, True])
def test_snapshots_are_never_deleted(folder, background):
    net, trainer, snapshots = trained(folder, 7, cycle=3, background=background)
    assert snapshots.steps() == [3, 6] and len(snapshots) == 2
    assert snapshots.manager.steps() == [3, 6, 7]
    for step in range(8, 12):  # each by another manager, which knows nothing of cycles
        go.CheckpointManager(folder, keep_last=1).save(step, net, trainer)
    assert sorted(os.listdir(folder)) == ['step-11.safetensors', 'step-3.kept.safetensors', 'step-6.kept.safetensors']
    assert repr(snapshots) == f"<Snapshots: of steps 3, 6 in '{folder}'>"


def test_between_the_ends_of_cycles_the_manager_decides(folder):
    net, _, snapshots = trained(folder, 12, cycle=5, save_every=4, keep_last=None)
    assert snapshots.manager.steps() == [4, 5, 8, 10, 12] and snapshots.steps() == [5, 10]
    assert not snapshots.save(13)
    assert not snapshots.save(14, force=True, extra={'fold': 3})
    assert snapshots.manager.steps()[-1] == 14 and snapshots.manager.restore_latest(net=net) == {'fold': 3}


def test_of_a_step_there_is_one_file(folder):
    net, trainer = runs.make({})
    manager = go.CheckpointManager(folder, keep_last=1)
    manager.save(1, net, trainer, {'saved': 1})
    manager.save(1, net, trainer, {'saved': 2}, keep=True)
    assert os.listdir(folder) == ['step-1.kept.safetensors']
    manager.save(1, net, trainer, {'saved': 3})  # what was kept is kept
    assert os.listdir(folder) == ['step-1.kept.safetensors'] and manager.kept() == [1]
    assert manager.restore_latest(net, trainer) == {'saved': 3} == manager.restore(1, net, trainer)


def test_snapshots_of_a_branch_that_was_left_do_not_count(folder):
    net, trainer, _ = trained(folder, 6)
    manager = go.CheckpointManager(folder, keep_last=1)
    manager.restore(4, net=net, trainer=trainer)
    again = go.ensemble.Snapshots(manager, net, trainer, cycle=3)
    runs.train(net, trainer, 1)
    again.save(5)
    assert again.steps() == [2, 4]
    assert (folder / 'step-6.kept.safetensors.abandoned').exists()


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='needs SIGKILL')
def test_a_killed_run_keeps_its_snapshots_and_ends_with_the_same(tmp_path):
    script = [sys.executable, str(ROOT / 'tests/ensemble_runs.py')]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests')])}
    for last in (4, 9, 10):  # after, at and after the end of a cycle
        process = subprocess.Popen([*script, str(tmp_path / 'killed'), '1000000'], stdout=subprocess.PIPE, text=True,
                                   env=environment)
        for line in process.stdout:
            if int(line) >= last:
                process.kill()
                break
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert set(go.CheckpointManager(tmp_path / 'killed').kept()) >= set(range(3, last + 1, 3))
    steps = str(max(go.CheckpointManager(tmp_path / 'killed').steps()) + 2)
    ends = [json.loads(subprocess.run([*script, str(tmp_path / name), steps], stdout=subprocess.PIPE, text=True, env=environment,
                                      check=True).stdout.splitlines()[-1]) for name in ('killed', 'straight')]
    assert ends[0] == ends[1]
    assert ends[0]['kept'] == list(range(3, int(steps) + 1, 3))


# Where cycles end

@pytest.mark.parametrize('schedule, wanted', [
    (lambda s: s.CosineRestarts(step=10, base_lr=0.1), [10, 20, 30, 40, 50]),
    (lambda s: s.CosineRestarts(step=5, base_lr=0.1, step_mult=2), [5, 15, 35]),
    (lambda s: s.Chain([(7, s.Cosine(7, base_lr=0.1)), (20, s.Linear(20, base_lr=0.1)), (99, s.Cosine(99, base_lr=0.1))]), [7, 27]),
    (lambda s: 12, [12, 24, 36, 48])], ids=['cosine', 'longer and longer', 'chain', 'number'])
def test_where_cycles_end(folder, schedule, wanted):
    snapshots = go.ensemble.Snapshots(go.CheckpointManager(folder), runs.make_net([0]), cycle=schedule(go.lr_scheduler))
    assert [step for step in range(55) if snapshots.ends(step)] == wanted


def test_the_rate_is_lowest_in_the_snapshots(folder):
    net, _ = runs.make({})
    schedule = go.lr_scheduler.CosineRestarts(step=4, base_lr=0.1)
    trainer = gluon.Trainer(net.collect_params(), 'sgd_torch', {'lr_scheduler': schedule})
    snapshots = go.ensemble.Snapshots(go.CheckpointManager(folder), net, trainer, schedule)
    rates = []
    for step in range(1, 10):
        runs.train(net, trainer, 1)
        rates.append((trainer.learning_rate, snapshots.save(step)))
    assert [rate for rate, kept in rates if kept] == [min(rates)[0]] * 2


def accumulating(folder, config=None, k=3, cycle=2):
    """One batch after the other of a run in which ``k`` are an update, and what `save` returned: a new process at each call."""
    net, trainer = runs.make({'update_on_kvstore': False, **(config or {})})
    trainer.step = go.gradients.Accumulate(trainer, k).step
    snapshots = go.ensemble.Snapshots(go.CheckpointManager(folder, keep_last=1), net, trainer, cycle=cycle)
    restored = snapshots.manager.restore_latest(net=net, trainer=trainer)
    step = restored.step if restored else 0
    while True:
        step = (yield step, step and snapshots.save(step), snapshots, trainer) or step + 1
        runs.train(net, trainer, 1)


@pytest.mark.parametrize('config', [{}, {'contexts': [0, 1]}, {'contexts': [0, 1], 'kvstore': None}], ids=str)
@pytest.mark.parametrize('killed', [0, 1], ids=['straight', 'resumed after each batch'])
def test_updates_count_and_not_batches(folder, config, killed):
    """Of 3 batches one is an update, and of 2 updates one ends a cycle; the batches after it are the same update."""
    kept, run = [], accumulating(folder, config)
    next(run)
    for _ in range(20):
        if killed:
            run = accumulating(folder, config)
            restored = next(run)  # saves it again
            assert bool(restored[1]) == (restored[0] in kept)
        step, taken, snapshots, _ = next(run)
        kept += [step] if taken else []
    assert kept == [6, 12, 18] == snapshots.steps()
    for step in kept:
        assert go.read_states(snapshots.manager.path(step)).num_update == step // 3


def test_a_run_that_is_set_back_takes_its_snapshots_again(folder):
    run = accumulating(folder)
    for _ in range(15):
        step, _, snapshots, trainer = next(run)
    assert step == 14 and snapshots.steps() == [6, 12]
    for back, wanted in ((12, [18]), (6, [12])):  # of the batch after the end of a cycle, without an update of its own
        snapshots.manager.restore(back, net=snapshots.net, trainer=trainer)
        taken = [run.send(back + 1)[:2], *(next(run)[:2] for _ in range(7))]
        assert [step for step, kept in taken if kept] == wanted
    assert snapshots.steps() == [6, 12]


def test_steps_that_overflow_do_not_count(folder):
    net, trainer = runs.make({'plain': True})
    scaler = go.gradients.Scaler(trainer, init_scale=8.0)
    snapshots = go.ensemble.Snapshots(go.CheckpointManager(folder), net, trainer, cycle=2)
    kept = []
    for step in range(1, 9):
        with autograd.record():
            loss = net(mx.nd.array(X)).sum() * (np.inf if step in (2, 4, 5) else 1.0)
            scaled = scaler.scale(loss)
        scaled.backward()
        scaler.step(7)
        scaler.update()
        kept += [step] if snapshots.save(step) else []
    assert kept == [3, 7] == snapshots.steps() and trainer._optimizer.num_update == 5


@pytest.mark.parametrize('config', [{}, {'contexts': [0, 1], 'update_on_kvstore': True}], ids=str)
def test_the_updates_before_the_first_count(folder, config):
    """As they do for the schedule."""
    schedule = go.lr_scheduler.CosineRestarts(step=4, base_lr=0.1)
    net, trainer = runs.make({'arguments': {'begin_num_update': 3, 'lr_scheduler': schedule}, **config})
    snapshots = go.ensemble.Snapshots(go.CheckpointManager(folder), net, trainer, cycle=schedule)
    kept = []
    for step in range(1, 7):
        runs.train(net, trainer, 1)
        kept += [step] if snapshots.save(step) else []
    assert kept == [1, 5]


# What they predict

@pytest.mark.parametrize('options, average', [
    ({}, softmax), ({'last': 2}, softmax), ({'batch_size': 3}, softmax), ({'axis': 0}, lambda array: softmax(array, 0)),
    ({'average': 'outputs'}, lambda array: array), ({'average': 'outputs', 'last': 9, 'batch_size': 7}, lambda array: array),
], ids=['all', 'the last two', 'in parts', 'over another axis', 'outputs', 'outputs, more than there are'])
@pytest.mark.parametrize('kind', [mx.nd.array, np.asarray], ids=['mxnet', 'numpy'])
def test_the_mean_of_what_each_predicts(folder, kind, options, average):
    _, _, snapshots = trained(folder)
    steps = snapshots.steps()[-options.get('last', 3):]
    by_hand = np.mean([average(outputs(folder, step)) for step in steps], axis=0)
    predicted = snapshots.predict(kind(X), **options)
    assert isinstance(predicted, mx.nd.NDArray) and predicted.dtype == np.float32 and predicted.shape == (7, 4)
    np.testing.assert_allclose(predicted.asnumpy(), by_hand, rtol=2e-6, atol=1e-7)
    assert np.abs(by_hand - average(outputs(folder, steps[0]))).max() > 1e-3  # the networks differ


def test_in_a_new_process_from_the_folder_alone(folder):
    _, _, snapshots = trained(folder)
    wanted = snapshots.predict(mx.nd.array(X)).asnumpy()
    net = gluon.nn.HybridSequential()  # the same net, which is not told the sizes of its inputs
    net.add(gluon.nn.Conv2D(3, 3), gluon.nn.BatchNorm(), gluon.nn.Flatten(), gluon.nn.Dropout(0.3), gluon.nn.Dense(6),
            gluon.nn.Dense(4))
    net.initialize()
    again = go.ensemble.Snapshots(go.CheckpointManager(folder), net)
    np.testing.assert_array_equal(again.predict(mx.nd.array(X)).asnumpy(), wanted)
    np.testing.assert_array_equal(net(mx.nd.array(X)).asnumpy(), outputs(folder, 6).astype('f4'))  # the newest stays


def test_numbers_for_each_network(folder):
    net, _, snapshots = trained(folder)
    found = snapshots.map(lambda: net(mx.nd.array(X)).asnumpy(), last=2)
    np.testing.assert_array_equal(found, [outputs(folder, step).astype('f4') for step in (4, 6)])


def test_one_of_several_nets(folder):
    pairs = {name: runs.make({}, seed) for seed, name in enumerate(('generator', 'discriminator'))}
    nets, trainers = ({name: pair[k] for name, pair in pairs.items()} for k in (0, 1))
    manager = go.CheckpointManager(folder, keep_last=1)
    snapshots = go.ensemble.Snapshots(manager, nets['generator'], cycle=2, part='generator')
    scores = []
    for step in range(1, 6):
        runs.train(nets['generator'], trainers['generator'], 1)
        scores += [nets['generator'](mx.nd.array(X)).asnumpy()] if snapshots.ends(step) else []
        manager.save(step, net=nets, trainer=trainers, keep=snapshots.ends(step))
    assert snapshots.steps() == [2, 4]
    np.testing.assert_allclose(snapshots.predict(X, average='outputs').asnumpy(), np.mean(scores, axis=0), atol=1e-6)
    with pytest.raises(ValueError, match=r"one of several, part='generator'. Call manager.save\(step, net="):
        snapshots.save(6)


# Training goes on

CONFIGS = {
    'float32': {}, 'two contexts': {'contexts': [0, 1]}, 'on kvstore': {'contexts': [0, 1], 'update_on_kvstore': True},
    'float16': {'half': True, 'arguments': {'multi_precision': True}},
    'float16 on kvstore': {'half': True, 'arguments': {'multi_precision': True}, 'contexts': [0, 1], 'update_on_kvstore': True},
    'scaled': {'amp': True}, 'momentum': {'optimizer': 'sgd', 'arguments': {'momentum': 0.9}},
}


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('hybrid', [False, True], ids=['imperative', 'hybrid'])
def test_predictions_leave_no_trace(tmp_path, name, hybrid):
    found = []
    for predicts in (False, True):
        net, trainer, snapshots = trained(tmp_path / str(predicts), 4, config=CONFIGS[name])
        if hybrid:
            net.hybridize(static_alloc=True)
        for step in (5, 6):
            before = runs.facts(net, trainer, noise=False)
            if predicts:
                snapshots.predict(mx.nd.array(X))
            assert runs.facts(net, trainer, noise=False) == before
            runs.train(net, trainer, 1)
            snapshots.save(step)
        found.append(runs.facts(net, trainer))
    assert found[0] == found[1]


@pytest.mark.parametrize('grad_req', ['write', 'add'])
def test_between_backward_and_step(folder, grad_req):
    """Gradients stay, also while one is recorded: in prediction mode nothing is added to it."""
    found = []
    for predicts in (False, True):
        net, trainer, snapshots = trained(folder / str(predicts), 4)
        net.collect_params('.*weight|.*bias|.*gamma|.*beta').setattr('grad_req', grad_req)
        for _ in range(2):
            with autograd.record():
                loss = (net(mx.nd.array(X)) ** 2).mean()
                if predicts:
                    snapshots.predict(mx.nd.array(X))
            loss.backward()
            if predicts:
                snapshots.predict(mx.nd.array(X))
        trainer.step(1)
        found.append((runs.facts(net, trainer), {name: parameter.grad().asnumpy().tolist() for name, parameter in
                                                 net._collect_params_with_prefix().items() if parameter.grad_req != 'null'}))
    assert found[0] == found[1]


def test_after_an_error_the_net_is_as_before(folder):
    net, trainer, snapshots = trained(folder)
    runs.train(net, trainer, 1)
    before = runs.facts(net, trainer, noise=False)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        snapshots.map(stop)
    assert runs.facts(net, trainer, noise=False) == before
    path = folder / 'step-4.kept.safetensors'
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StateFileError, match='step-4.kept.safetensors'):  # after that of step 2 was loaded
        snapshots.predict(mx.nd.array(X))
    assert runs.facts(net, trainer, noise=False) == before
    path.unlink()
    assert snapshots.steps() == [2, 6]
    with pytest.raises(ValueError, match='must have the same parameters'):
        go.ensemble.Snapshots(snapshots.manager, runs.make_net([0], head=5)).predict(mx.nd.array(X))


# What is refused

def test_no_snapshot_yet(folder):
    net, _, snapshots = trained(folder, 1)
    for again in (snapshots, go.ensemble.Snapshots(go.CheckpointManager(folder / 'none'), net)):
        with pytest.raises(ValueError, match='There must be a snapshot in .*Received: none'):
            again.predict(mx.nd.array(X))
    assert repr(again) == f"<Snapshots: of steps none yet in '{folder / 'none'}'>"


@pytest.mark.parametrize('arguments, error, words', [
    (('folder', 'net'), TypeError, '`manager` must be a CheckpointManager. Received: str'),
    (('manager', 'folder'), TypeError, '`net` must be a gluon.Block. Received: str'),
    (('manager', 'net', 'net'), TypeError, '`trainer` must be a gluon.Trainer'),
    (('manager', 'net', None, 0), ValueError, '`cycle` must be a whole number, 1 or more. Received: cycle=0'),
    (('manager', 'net', None, 1.5), ValueError, '`cycle` must be a whole number'),
    (('manager', 'net', None, 'falling'), ValueError, '`cycle` must be a schedule with a rate that falls and rises again'),
    (('manager', 'net', None, 'unknown'), TypeError, 'The scheduler must be one of')], ids=str)
def test_bad_arguments(folder, arguments, error, words):
    given = {'folder': str(folder), 'manager': go.CheckpointManager(folder), 'net': runs.make_net([0]),
             'falling': mx.lr_scheduler.CosineScheduler(10), 'unknown': mx.lr_scheduler.LRScheduler()}
    with pytest.raises(error, match=words):
        go.ensemble.Snapshots(*(given.get(argument, argument) for argument in arguments))


@pytest.mark.parametrize('options, error, words', [
    ({'average': 'mean'}, ValueError, "`average` must be one of 'probabilities', 'outputs'. Received: average='mean'"),
    ({'last': 0}, ValueError, '`last` must be a whole number, 1 or more'),
    ({'batch_size': 0}, ValueError, '`batch_size` must be a whole number, 1 or more'),
    ({'axis': 9}, ValueError, 'axis 9 is out of bounds'),
    ({'x': [1, 2]}, TypeError, '`x` must be one NDArray or NumPy array. Received: list')], ids=str)
def test_bad_predictions(folder, options, error, words):
    net, trainer, snapshots = trained(folder, 3)
    before = runs.facts(net, trainer, noise=False)
    with pytest.raises(error, match=words):
        snapshots.predict(**{'x': mx.nd.array(X), **options})
    assert runs.facts(net, trainer, noise=False) == before


def test_probabilities_of_one_output(folder):
    _, _, snapshots = trained(folder, 3, config={'head': 1, 'plain': True})
    with pytest.raises(ValueError, match=r"outputs of shape \(7, 1\), one along axis -1, .* Pass average='outputs', or call map"):
        snapshots.predict(X)
    assert snapshots.predict(X, average='outputs').shape == (7, 1)


def test_saving_needs_a_cycle(folder):
    with pytest.raises(ValueError, match='`cycle` must be given to save snapshots'):
        go.ensemble.Snapshots(go.CheckpointManager(folder), runs.make_net([0])).save(1)


def test_a_net_with_two_outputs(folder):
    class Two(gluon.nn.Dense):
        def forward(self, x):
            return super().forward(x), x

    net = Two(2, in_units=3)
    net.initialize()
    snapshots = go.ensemble.Snapshots(go.CheckpointManager(folder), net, cycle=1)
    snapshots.save(1)
    with pytest.raises(TypeError, match='The net must return one array. Received: tuple. Call map'):
        snapshots.predict(mx.nd.ones((4, 3)))
    assert snapshots.map(lambda: net(mx.nd.ones((4, 3)))[1].shape) == [(4, 3)]


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    """And again, where all is done already."""
    pytest.importorskip('sklearn')
    monkeypatch.chdir(tmp_path)
    block, = re.findall('```python\n(.*?)```', (ROOT / 'docs/ENSEMBLES.md').read_text(encoding='utf-8'), re.DOTALL)
    for _ in range(2):
        exec(compile(block, 'docs/ENSEMBLES.md', 'exec'), {})  # noqa: S102
        assert float(capsys.readouterr().out.split("<Snapshots: of steps 100, 200, 300 in 'run'> ")[1]) > 0.9
