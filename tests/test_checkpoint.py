"""Checkpoints: a run that dies and is resumed from one equals the run that went on, whatever it consists of."""
# ruff: noqa: NPY002  the global generators are what a checkpoint brings back
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')

import gluon_optim as go  # noqa: E402
from gluon_optim import rules  # noqa: E402
from gluon_optim.states import container  # noqa: E402
from gluon_optim.states.errors import StateFileError  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_runs as runs  # noqa: E402

ROOT = Path(container.__file__).parents[2]
ENVIRONMENT = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests')])}
WITH_MOMENTUM = ('sgd', 'nag', 'lars', 'signum', 'dcasgd', 'larc', 'sgd_torch')
BASES = {'lbsgd': {'momentum': 0.9, 'batch_scale': 2}, 'rprop': {'wd': 0.0}, 'noise_adaptive_sgd': {'batch_size': 8},
         **{name: {'momentum': 0.9} for name in WITH_MOMENTUM}}
NOVOGRAD = {'arguments': {'learning_rate': 0.05, 'wd': 0.01}}
HALF = {'half': True, 'optimizer': 'adamw', 'arguments': {'learning_rate': 0.01, 'multi_precision': True}}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'run.safetensors')


def trained(config, steps=3):
    net, trainer = runs.make(config)
    runs.train(net, trainer, steps)
    return net, trainer


# Save, die, go on

def variants(name):
    """(saved, resumed) configurations: each layout and each thing that a checkpoint holds, spread over two runs."""
    arguments = {'learning_rate': 0.02, 'wd': 0.01, **BASES.get(name, {})}
    # MXNet's scaler wants gradients of one type, and to be asked by the trainer
    plain = {'optimizer': name, 'arguments': arguments, 'amp': True, 'update_on_kvstore': False}
    full = {'optimizer': name, 'arguments': {**arguments, 'multi_precision': True}, 'half': True,
            'scheduler': ['CosineScheduler', {'max_update': 10, 'base_lr': 0.02, 'final_lr': 0.001, 'warmup_steps': 2}]}
    yield {**plain, 'contexts': [0]}, {'contexts': [3]}
    # replicas of samplers draw their own noise and drift apart, in MXNet too: there must be one updater
    yield {**full, 'contexts': [0, 1], 'update_on_kvstore': name < 'n' or name in ('sgld', 'psgld')}, {'contexts': [4, 2]}


def test_every_optimizer_goes_on_bit_for_bit_in_a_new_process(tmp_path):
    jobs, straight = [], []
    for name in rules.names(drop_ins=True, samplers=True):
        for k, (saved, resumed) in enumerate(variants(name)):
            path = str(tmp_path / f'{name}-{k}')
            net, trainer = trained(saved)
            go.save_checkpoint(path, net=net, trainer=trainer, extra={'name': name, 'deep': [1, {'a': None}]}, epoch=k, batch=7)
            loaded = runs.facts(net, trainer, noise=False)
            runs.train(net, trainer, 20)
            straight.append({'extra': {'name': name, 'deep': [1, {'a': None}]}, 'epoch': k, 'batch': 7, 'loaded': loaded,
                             'end': runs.facts(net, trainer)})
            jobs.append([{**saved, **resumed}, path, 20])
    out = subprocess.run([sys.executable, runs.__file__], input=json.dumps(jobs), env=ENVIRONMENT, stdout=subprocess.PIPE,
                         text=True)
    lines = [json.loads(line) for line in out.stdout.splitlines()]
    assert len(lines) == len(jobs)
    for job, wanted, found in zip(jobs, straight, lines):
        assert found == wanted, job


@pytest.mark.parametrize('scheduler', [
    ['FactorScheduler', {'step': 3, 'factor': 0.5, 'base_lr': 0.1}],
    ['MultiFactorScheduler', {'step': [2, 6], 'factor': 0.5, 'base_lr': 0.1}],
    ['PolyScheduler', {'max_update': 5, 'base_lr': 0.1}], ['UserScheduler', {'base_lr': 0.1}]], ids=lambda x: x[0])
def test_schedulers(path, scheduler):
    config = {**NOVOGRAD, 'scheduler': scheduler}
    net, trainer = trained(config, 7)  # past the end of one of them
    go.save_checkpoint(path, net=net, trainer=trainer)
    runs.facts(net, trainer, noise=False)  # asks the scheduler once, as `resume` does
    runs.train(net, trainer, 3)
    straight = runs.facts(net, trainer)
    assert runs.resume(config, path, 3)['end'] == straight


@pytest.mark.parametrize('saved, resumed', [([0], [1, 2]), ([0, 1], [2])], ids=['1-2', '2-1'])
def test_other_numbers_of_devices(path, saved, resumed):
    """Bit-equal after loading, but for running statistics."""
    config = HALF
    net, trainer = trained({**config, 'contexts': saved})
    go.save_checkpoint(path, net=net, trainer=trainer)
    before = runs.facts(net, trainer, noise=False)
    other, other_trainer = runs.make({**config, 'contexts': resumed})
    go.load_checkpoint(path, net=other, trainer=other_trainer)
    after = runs.facts(other, other_trainer, noise=False)
    assert {**before, 'weights': None} == {**after, 'weights': None}
    for name, digests in after['weights'].items():
        assert len(set(digests)) == 1
        if 'running' not in name:
            assert digests[0] == before['weights'][name][0]
    for name in ('1.running_mean', '1.running_var'):  # MXNet, too, takes the mean of those of several devices
        copies = [data.asnumpy() for data in net._collect_params_with_prefix()[name].list_data()]
        found = other._collect_params_with_prefix()[name].list_data()[-1].asnumpy()
        np.testing.assert_array_equal(found, np.mean(copies, axis=0).astype('float32'))


@pytest.mark.parametrize('saved, resumed', [([0], [1, 2]), ([0, 1], [2])], ids=['1-2', '2-1'])
def test_after_20_steps_other_numbers_of_devices_differ_by_rounding(path, saved, resumed):
    """A batch is split otherwise, and its gradients are summed in another order."""
    config = {'plain': True, 'optimizer': 'sgd_torch', 'arguments': {'momentum': 0.9, 'learning_rate': 0.1}}
    net, trainer = trained({**config, 'contexts': saved})
    go.save_checkpoint(path, net=net, trainer=trainer)
    before = net[1].weight.list_data()[0].asnumpy()
    runs.train(net, trainer, 20)
    other, other_trainer = runs.make({**config, 'contexts': resumed}, seed=99)
    go.load_checkpoint(path, net=other, trainer=other_trainer)
    runs.train(other, other_trainer, 20)
    for layer in (1, 2):
        a, b = (n[layer].weight.list_data()[0].asnumpy() for n in (net, other))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert np.abs(before - net[1].weight.list_data()[0].asnumpy()).max() > 0.1


@pytest.mark.parametrize('background', [False, True])
def test_weights_whose_bytes_mxnet_has_permuted(tmp_path, background):
    """An inference leaves convolutions in oneDNN's own order; nobody waits for it."""
    net = mx.gluon.nn.HybridSequential()
    net.add(mx.gluon.nn.Conv2D(64, 3, in_channels=32), mx.gluon.nn.Conv2D(64, 3, in_channels=64))
    net.initialize()
    net.hybridize()
    trainer = mx.gluon.Trainer(net.collect_params(), 'sgd_torch')
    values = {name: p.data().asnumpy() for name, p in net._collect_params_with_prefix().items()}
    with go.CheckpointManager(tmp_path, background=background) as manager:
        for step in (1, 2):  # the second into memory that is used again
            net(mx.nd.ones((2, 32, 16, 16)))
            manager.save(step, net=net, trainer=trainer)
    for step in (1, 2):
        for weight in container.read_checkpoint(manager.path(step))[1].weights:
            np.testing.assert_array_equal(weight.copies[0], values[weight.name])


def test_one_safetensors_file(path):
    safetensors = pytest.importorskip('safetensors.numpy')
    net, trainer = trained({**HALF, 'contexts': [0, 1]})
    go.save_checkpoint(path, net=net, trainer=trainer)
    tensors = safetensors.load_file(path)
    assert {key.split('/')[0] for key in tensors} == {*net._collect_params_with_prefix(), '_parameters', '_copies'} - {
        '1.running_mean', '1.running_var'}
    for name, parameter in net._collect_params_with_prefix().items():
        for k, data in enumerate(parameter.list_data()):
            key = f'_copies/1/{name}' if k else f'_parameters/{name}'
            assert not k or (key in tensors) == ('running' in name)
            if key in tensors:
                np.testing.assert_array_equal(tensors[key], data.asnumpy())
    states = go.read_states(path)  # a checkpoint is a file of states too
    assert states.counts['4.weight'] == 3 and set(states.slots['4.weight']) == {'mean', 'var'}


# Random numbers

def test_saving_with_the_same_seed_is_reproducible_and_can_leave_generators_alone(path):
    def numbers(**options):
        net, trainer = runs.make(NOVOGRAD)
        if options:
            go.save_checkpoint(path, net=net, trainer=trainer, **options)
        return mx.nd.random.uniform(shape=3).asnumpy().tolist(), np.random.rand(), random.random()

    untouched, reseeded = numbers(), numbers(reseed=True)
    assert numbers(reseed=False) == untouched and container.read_checkpoint(path)[1].random is None
    assert numbers(reseed=True) == reseeded and reseeded[1:] == untouched[1:] and reseeded[0] != untouched[0]


def test_devices_draw_different_numbers_and_their_ids_do_not_matter(path):
    net, trainer = trained({**NOVOGRAD, 'contexts': [0, 1]})
    go.save_checkpoint(path, net=net, trainer=trainer)
    first = [mx.nd.random.uniform(shape=4, ctx=mx.cpu(k)).asnumpy().tolist() for k in (0, 1)]
    net, trainer = runs.make({**NOVOGRAD, 'contexts': [5, 3]})
    go.load_checkpoint(path, net=net, trainer=trainer)
    assert [mx.nd.random.uniform(shape=4, ctx=mx.cpu(k)).asnumpy().tolist() for k in (5, 3)] == first
    assert first[0] != first[1]


# What does not fit changes nothing

def change(**fields):
    def edit(states, run):
        for name, value in fields.items():
            setattr(states if hasattr(states, name) else run, name, value)
    return edit


@pytest.mark.filterwarnings('ignore:novograd updates float16')
@pytest.mark.parametrize('present, words', [
    ({'optimizer': 'adamw'}, "states are of 'novograd', the trainer runs 'adamw'"),
    ({'head': 5}, '5.weight is float32[5, 6], in the file float32[4, 6]'),
    ({'half': True}, '4.bias is in the file only'),
    ({'scheduler': ['FactorScheduler', {'step': 3}]}, 'without a scheduler'),
], ids=['optimizer', 'shape', 'dtype', 'scheduler'])
def test_misfits_change_nothing(path, present, words):
    net, trainer = trained(NOVOGRAD)
    go.save_checkpoint(path, net=net, trainer=trainer)
    net, trainer = trained({**NOVOGRAD, **present}, 2)
    before = runs.facts(net, trainer, noise=False)
    generators = np.random.get_state()[1].tolist()
    with pytest.raises(ValueError, match=words.replace('[', r'\[').replace(']', r'\]')):
        go.load_checkpoint(path, net=net, trainer=trainer)
    assert runs.facts(net, trainer, noise=False) == before and np.random.get_state()[1].tolist() == generators


def test_a_random_state_of_another_kind_changes_nothing(path):
    net, trainer = trained(NOVOGRAD)
    go.save_checkpoint(path, net=net, trainer=trainer)
    states, run = container.read_checkpoint(path)
    run.random['numpy'][0] = 'PCG64'
    container.write(path, states, run)
    runs.train(net, trainer, 1)
    before = runs.facts(net, trainer, noise=False)
    with pytest.raises(StateFileError, match='random state'):
        go.load_checkpoint(path, net=net, trainer=trainer)
    assert runs.facts(net, trainer, noise=False) == before


def forged(path, change):
    """The file at ``path`` with another run in its manifest, and a signature that fits."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:8 + length])
    manifest = json.loads(header['__metadata__']['gluon_optim'])
    change(manifest)
    header['__metadata__']['gluon_optim'] = json.dumps(manifest, separators=(',', ':'))
    text = json.dumps(header, separators=(',', ':')).encode()
    path.write_bytes(container._signed(len(text).to_bytes(8, 'little') + text) + data[8 + length:])


@pytest.mark.parametrize('change, words', [
    (lambda m: m.pop('run'), 'must have the keys'), (lambda m: m.update(run=None), "'run' of the manifest must be an object"),
    (lambda m: m.update(format=container.FORMAT), 'must have the keys'),
    (lambda m: m['run'].update(more=1), 'the run must have the keys'),
    (lambda m: m['run'].pop('epoch'), 'the run must have the keys'),
    (lambda m: m['run'].update(step=-1), "'step' of the run"),
    (lambda m: m['run'].update(metrics={'a': 'b'}), "'metrics' of the run must be an object of numbers"),
    (lambda m: m['run'].update(extra=[]), "'extra' of the run"), (lambda m: m['run'].update(weights={}), "'weights' of the run"),
    (lambda m: m['run']['weights'].pop(), 'must be those listed in the manifest'),
    (lambda m: m['run']['weights'].__setitem__(1, m['run']['weights'][0]), 'must be unique. Received twice'),
    (lambda m: m['run']['weights'][0].update(copies=2**50), 'more than its'),
    (lambda m: m['run']['weights'][0].update(copies=0), "'copies' of a weight"),
    (lambda m: m['run']['weights'][0].update(name='../a'), "'name' of a weight"),
    (lambda m: m['run']['weights'][0].update(name='_copies/1/a'), "'name' of a weight"),
    (lambda m: m['run']['weights'][0].update(full_name=3), "'full_name' of a weight"),
])
def test_forged_runs_are_refused(tmp_path, change, words):
    path = tmp_path / 'x'
    net, trainer = runs.make(NOVOGRAD)
    go.save_checkpoint(path, net=net, trainer=trainer)
    forged(path, lambda manifest: None)
    container.read_checkpoint(path)
    forged(path, change)
    with pytest.raises(StateFileError, match=words.replace('[', r'\[').replace(']', r'\]')):
        container.read_checkpoint(path)


def test_strict_false_loads_what_fits_and_says_what_not(path, caplog):
    net, trainer = trained(NOVOGRAD)
    go.save_checkpoint(path, net=net, trainer=trainer)
    new, new_trainer = runs.make({**NOVOGRAD, 'head': 5}, seed=3)
    head = new[5].weight.data().asnumpy()
    with caplog.at_level(logging.INFO, 'gluon_optim'):
        restored = go.load_checkpoint(path, net=new, trainer=new_trainer, strict=False)
    assert sorted(line.split()[0] for line in restored.skipped) == ['5.bias', '5.weight'] and len(restored.states.mismatched) == 2
    assert 'not loaded: 5.weight is float32[5, 6], in the file float32[4, 6]' in caplog.text
    np.testing.assert_array_equal(new[5].weight.data().asnumpy(), head)
    np.testing.assert_array_equal(new[4].weight.data().asnumpy(), net[4].weight.data().asnumpy())


def test_masters_win_over_weights(path):
    net, trainer = trained(HALF)
    go.save_checkpoint(path, net=net, trainer=trainer)
    before = runs.facts(net, trainer, noise=False)
    states, run = container.read_checkpoint(path)
    for weight in run.weights:
        if weight.name == '4.weight':
            weight.copies[0] *= 3
    container.write(path, states, run)
    restored = go.load_checkpoint(path, net=net, trainer=trainer)
    assert restored.states.rewritten == ['4.weight'] and runs.facts(net, trainer, noise=False) == before


def test_the_net_alone_and_the_trainer_alone(path):
    net, trainer = trained(NOVOGRAD)
    go.save_checkpoint(path, net=net, trainer=trainer, extra={'a': 1})
    other = runs.make_net([2])
    generators = np.random.get_state()[1].tolist()
    restored = go.load_checkpoint(path, net=other)
    assert restored == {'a': 1} and restored.states is None and np.random.get_state()[1].tolist() == generators
    for name, parameter in net._collect_params_with_prefix().items():
        np.testing.assert_array_equal(parameter.data().asnumpy(), other._collect_params_with_prefix()[name].data().asnumpy())
    go.save_checkpoint(path, trainer=trainer)
    before = runs.facts(net, trainer, noise=False)
    runs.train(net, trainer, 1)
    go.load_checkpoint(path, trainer=trainer)
    assert runs.facts(net, trainer, noise=False) == before


def test_a_net_without_a_trainer(path):
    net, trainer = trained(NOVOGRAD)
    go.save_checkpoint(path, net=net, extra={'a': 1}, step=np.int64(3), metrics={'loss': np.float32(0.5), 'other': float('inf')})
    states, run = go.read_checkpoint(path)
    assert (states.optimizer, states.names, run.random, run.metrics) == ('none', [], None, {'loss': 0.5})
    other = runs.make_net([2])
    restored = go.load_checkpoint(path, net=other)
    assert restored == {'a': 1} and restored.step == 3 and restored.states is None
    for name, parameter in net._collect_params_with_prefix().items():
        np.testing.assert_array_equal(parameter.data().asnumpy(), other._collect_params_with_prefix()[name].data().asnumpy())
    with pytest.raises(ValueError, match='saved without one. Load it with only net='):
        go.load_checkpoint(path, net=net, trainer=trainer)


def test_parameters_outside_the_net_are_saved_too(path):
    """The trainer's own, such as those of a loss."""
    net, loss = runs.make_net([0]), mx.gluon.nn.Dense(1, in_units=4, prefix='loss_')
    loss.initialize()
    trainer = mx.gluon.Trainer([*net.collect_params().values(), *loss.collect_params().values()], 'novograd')
    go.save_checkpoint(path, net=net, trainer=trainer)
    value = loss.weight.data().asnumpy()
    loss.weight.set_data(mx.nd.zeros((1, 4)))
    go.load_checkpoint(path, net=net, trainer=trainer)
    np.testing.assert_array_equal(loss.weight.data().asnumpy(), value)


@pytest.mark.parametrize('extra, error, words', [
    ([1], TypeError, '`extra` must be a dictionary. Received: list'), ({'a': object()}, ValueError, 'extra.a must consist of'),
    ({'a': float('nan')}, ValueError, 'extra.a must be a finite number'), ({1: 2}, ValueError, 'string keys')])
def test_extra_must_be_json(path, extra, error, words):
    wanted = (runs.make(NOVOGRAD), mx.nd.random.uniform(shape=3).asnumpy().tolist())[1]
    net, trainer = runs.make(NOVOGRAD)
    with pytest.raises(error, match=words):
        go.save_checkpoint(path, net=net, trainer=trainer, extra=extra)
    assert not os.path.exists(path) and mx.nd.random.uniform(shape=3).asnumpy().tolist() == wanted  # not reseeded


def test_other_refusals(path):
    net, trainer = runs.make(NOVOGRAD)
    with pytest.raises(TypeError, match=r'`trainer` must be a gluon.Trainer.*Received: list.*Pass several as trainer=\{'):
        go.save_checkpoint(path, net=net, trainer=[trainer, trainer])
    with pytest.raises(ValueError, match='Received: neither'):
        go.save_checkpoint(path)
    for position in ({'step': 1.5}, {'epoch': '1'}, {'batch': True}):
        with pytest.raises(ValueError, match='must be a whole number'):
            go.save_checkpoint(path, net=net, trainer=trainer, **position)
    assert not os.path.exists(path)
    go.save_states(trainer, path, net=net)
    with pytest.raises(StateFileError, match='only optimizer states. Use load_states'):
        go.load_checkpoint(path, net=net, trainer=trainer)
    with pytest.raises(ValueError, match='Received: neither'):
        go.save_checkpoint(path, net=net, trainer=trainer)
        go.load_checkpoint(path)
    deferred = mx.gluon.nn.Dense(2)
    deferred.initialize()
    with pytest.raises(ValueError, match='Run one forward pass'):
        go.save_checkpoint(path, net=deferred)
    with pytest.raises(ValueError, match='Call net.initialize'):
        go.load_checkpoint(path, net=mx.gluon.nn.Dense(2, in_units=3))


def test_two_trainers(tmp_path):
    """Each has a folder, and they are restored in the order in which they were saved; test_parts.py has them in one file."""
    def go_on(pairs):
        for net, trainer in pairs:
            runs.train(net, trainer, 2)
        return [runs.facts(net, trainer, noise=False) for net, trainer in pairs]

    managers = [go.CheckpointManager(tmp_path / name) for name in 'ab']
    pairs = [trained(NOVOGRAD), trained({'optimizer': 'adamw'})]
    for manager, pair in zip(managers, pairs):
        manager.save(1, *pair)
    wanted = go_on(pairs)
    managers[0].save(2, *pairs[0])  # killed here
    new = [runs.make(NOVOGRAD, seed=3), runs.make({'optimizer': 'adamw'}, seed=4)]
    common = set(managers[0].steps()) & set(managers[1].steps())
    for manager, pair in zip(managers, new):
        manager.restore(max(common), *pair)
    assert go_on(new) == wanted
