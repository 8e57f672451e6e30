"""States of a real `gluon.Trainer`: out, into another one, in another process, on other devices."""
import copy
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')
from mxnet import gluon  # noqa: E402
from mxnet.contrib.amp.loss_scaler import LossScaler  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim.mxnet.trainer import export_states, import_states  # noqa: E402
from gluon_optim.states import container  # noqa: E402
from gluon_optim.states.errors import StateFileError  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import resume as run  # noqa: E402

NOVOGRAD = {'arguments': {'learning_rate': 0.05, 'wd': 0.01}}
HALF = {'half': True, 'optimizer': 'adamw', 'arguments': {'learning_rate': 0.01, 'multi_precision': True}}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'run')


def trained(config, steps=3):
    net, trainer = run.make(config)
    run.train(net, trainer, 0, steps)
    return net, trainer


def save(net, trainer, path):
    go.save_states(trainer, path + '.states', net)
    trainer.save_states(path + '.native')
    net.save_parameters(path + '.params')
    return run.facts(net, trainer)


def in_new_process(*arguments):
    root = Path(container.__file__).parents[2]
    out = subprocess.run([sys.executable, run.__file__, json.dumps(arguments)], env={**os.environ, 'PYTHONPATH': str(root)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


def as_json(x):
    return json.loads(json.dumps(x))


# Save, die, go on

@pytest.mark.parametrize('saved, resumed', [
    # the scheduler is past its end at step 3: a fresh one would answer with its first rate
    ({'contexts': [0], 'scheduler': ['CosineScheduler', {'max_update': 2, 'base_lr': 0.1, 'final_lr': 0.02}]}, {'contexts': [2]}),
    ({**NOVOGRAD, 'contexts': [1], 'update_on_kvstore': True}, {'contexts': [0], 'update_on_kvstore': False, 'kvstore': None}),
    ({**HALF, 'contexts': [0, 1], 'kvstore': 'local', 'update_on_kvstore': True}, {'contexts': [3, 2]}),
    ({**HALF, 'contexts': [0, 1], 'update_on_kvstore': False}, {'contexts': [0, 1]}),
    ({'optimizer': 'sgd_torch', 'arguments': {'begin_num_update': 100},
      'scheduler': ['FactorScheduler', {'step': 102, 'factor': 0.5}]}, {'arguments': {}, 'scheduler': None}),
    ({'optimizer': 'sgd_torch', 'arguments': {'momentum': 0.9, 'nesterov': True},
      'scheduler': ['UserScheduler', {'base_lr': 0.2}]}, {'contexts': [5], 'scheduler': ['UserScheduler', {}]}),
], ids=['cpu0-cpu2-cosine', 'kvstore-none', 'half-2-other-2', 'half-2-2', 'stateless-begin-factor', 'user-scheduler'])
def test_a_resumed_run_equals_the_straight_one_bit_for_bit(path, saved, resumed):
    net, trainer = trained(saved)
    before = save(net, trainer, path)
    run.train(net, trainer, 3, 6)
    out = in_new_process({**saved, **resumed}, path, 3, 6)
    assert out['loaded'] == as_json(before)
    assert out['end'] == as_json(run.facts(net, trainer))
    trained_ones = 7 if saved.get('half') else 8  # without running statistics
    assert out['report'] == f'restored {trained_ones} of {trained_ones} parameters at step {before["num_update"]}'


def test_one_device_to_two_and_back(path):
    """Bit-equal after each load; in between only the gradients' sums are rounded differently."""
    one, two = {**NOVOGRAD, 'norm': False}, {**NOVOGRAD, 'norm': False, 'contexts': [1, 2]}  # batch norm would see half batches
    net, trainer = trained(one)
    before = save(net, trainer, path)
    net2, trainer2 = run.make(two)
    net2.load_parameters(path + '.params', ctx=trainer2._contexts)
    go.load_states(trainer2, path + '.states', net2)
    assert run.facts(net2, trainer2) == before
    go.save_states(trainer2, path + '.states', net2)
    run.train(net, trainer, 3, 6)
    out = run.resume(one, path, 3, 6)
    assert out['loaded'] == before and out['end'] == run.facts(net, trainer)
    run.train(net2, trainer2, 3, 6)
    assert run.facts(net2, trainer2)['counts'] == out['end']['counts']
    for name, parameter in net2._collect_params_with_prefix().items():
        straight = net._collect_params_with_prefix()[name].data().asnumpy()
        np.testing.assert_allclose(parameter.data(mx.cpu(1)).asnumpy(), straight, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('contexts, kvstore, on_kvstore', [
    ([0], None, None), ([0], 'local', True), ([0], 'device', False), ([0], 'device', True),
    ([0, 1], 'local', True), ([0, 1], 'local', False), ([0, 1], 'device', True), ([0, 1], 'device', False)])
def test_kvstores(path, contexts, kvstore, on_kvstore):
    """On every kvstore, with the parameters loaded before or after the states, the run goes on as it was."""
    config = {**NOVOGRAD, 'kvstore': kvstore, 'update_on_kvstore': on_kvstore, 'contexts': contexts}
    net, trainer = trained(config)
    before = save(net, trainer, path)
    run.train(net, trainer, 3, 5)
    after = run.facts(net, trainer)
    for states_first in (False, True):
        net, trainer = run.make(config)
        if states_first:
            go.load_states(trainer, path + '.states', net)
        net.load_parameters(path + '.params', ctx=trainer._contexts)
        if not states_first:
            go.load_states(trainer, path + '.states', net)
        assert run.facts(net, trainer) == before
        run.train(net, trainer, 3, 5)
        assert run.facts(net, trainer) == after


def test_each_device_has_its_own_states(path):
    net, trainer = trained({**NOVOGRAD, 'contexts': [0, 1], 'update_on_kvstore': False})
    save(net, trainer, path)
    net, trainer = run.make({**NOVOGRAD, 'contexts': [3, 4], 'update_on_kvstore': False})
    go.load_states(trainer, path + '.states', net)
    for steps in range(2):
        for updater, context in zip(trainer._updaters, [mx.cpu(3), mx.cpu(4)]):
            assert len(updater.states) == 8
            assert all(array.context == context for state in updater.states.values() for array in state)
        run.train(net, trainer, 3 + steps, 4 + steps)
    first, second = trainer._updaters
    assert not {id(a) for s in first.states.values() for a in s} & {id(a) for s in second.states.values() for a in s}
    for index, state in first.states.items():
        for a, b in zip(state, second.states[index]):
            assert (a.asnumpy() == b.asnumpy()).all()


def test_states_follow_the_weights_of_a_kvstore(path):
    """Where its copies of the weights are is MXNet's affair; restored states must be where its own would be."""
    config = {**NOVOGRAD, 'contexts': [3, 4], 'kvstore': 'local', 'update_on_kvstore': True}
    net, trainer = trained(config)
    save(net, trainer, path)
    own = {index: [array.context for array in state] for index, state in trainer._kvstore._updater.states.items()}
    net, trainer = run.make(config)
    go.load_states(trainer, path + '.states', net)
    run.train(net, trainer, 3, 4)
    assert {index: [array.context for array in state] for index, state in trainer._kvstore._updater.states.items()} == own


@pytest.mark.parametrize('on_kvstore', [True, False])
def test_set_data_long_after_loading_keeps_the_states_of_that_moment(path, on_kvstore):
    """MXNet throws a kvstore with its states away then; the counts would go on with fresh moments."""
    config = {**NOVOGRAD, 'contexts': [0, 1], 'kvstore': 'device', 'update_on_kvstore': on_kvstore}
    save(*trained(config), path)
    net, trainer = run.make(config)
    go.load_states(trainer, path + '.states', net)
    run.train(net, trainer, 3, 5)
    before = go.states_digest(trainer)
    for _ in range(2):
        parameter = net[4].weight
        parameter.set_data(parameter.data(mx.cpu(0)) * 0.5)
        assert go.states_digest(trainer) == before
    slots = export_states(trainer, net).slots['4.weight']
    run.train(net, trainer, 5, 6)
    moved = export_states(trainer, net).slots['4.weight']
    # beta2 = 0.98: the second moment cannot fall by more than that unless it started anew
    assert moved['norm_sq'] >= 0.98 * slots['norm_sq'] and go.states_digest(trainer) != before


@pytest.mark.parametrize('contexts, kvstore', [([0, 1], 'device'), ([0, 1], 'local'), ([0], 'device'), ([0, 1], 'object')])
@pytest.mark.parametrize('name', ['adamw', 'novograd', 'adam', 'nadam', 'sgd', 'lars'])
@pytest.mark.parametrize('when', [0, 1, 3])
def test_set_data_in_a_run_keeps_the_states_as_it_does_in_a_resumed_one(path, name, contexts, kvstore, when):
    """From the first step on. MXNet's own would begin with fresh moments and old counts."""
    config = {'optimizer': name, 'arguments': {'learning_rate': 0.02}, 'contexts': contexts, 'update_on_kvstore': True,
              'kvstore': mx.kv.create('device') if kvstore == 'object' else kvstore}
    go.accelerate()
    try:
        net, trainer = trained(config, when)
        go.save_states(trainer, path + '.states', net)
        weights = {key: p.data(mx.cpu(0)) * 0.5 for key, p in net._collect_params_with_prefix().items()}
        mx.nd.save(path + '.params', weights)
        net.load_parameters(path + '.params', ctx=trainer._contexts)
        parameter = net[4].bias
        parameter.set_data(parameter.data(mx.cpu(0)) + 1)
        run.train(net, trainer, when, when + 2)

        config['kvstore'] = mx.kv.create('device') if kvstore == 'object' else kvstore
        resumed, other = run.make(config)
        go.load_states(other, path + '.states', resumed)
        resumed.load_parameters(path + '.params', ctx=other._contexts)
        parameter = resumed[4].bias
        parameter.set_data(parameter.data(mx.cpu(0)) + 1)
        run.train(resumed, other, when, when + 2)
    finally:
        go.restore_builtins()
    assert run.facts(net, trainer) == run.facts(resumed, other)
    assert set(export_states(trainer, net).counts.values()) == {0, when + 2}


def test_before_the_first_step(path):
    """Nothing has state yet; saving, loading and stepping equals a fresh run."""
    net, trainer = run.make(NOVOGRAD)
    net.save_parameters(path + '.params')
    go.save_states(trainer, path + '.states', net)
    run.train(net, trainer, 0, 2)
    out = run.resume(NOVOGRAD, path, 0, 2)
    assert out['report'] == 'restored 0 of 8 parameters at step 0'
    assert out['end'] == run.facts(net, trainer)


def test_loading_into_a_trainer_that_has_trained_leaves_nothing_of_it(path):
    net, trainer = run.make(NOVOGRAD)
    net.save_parameters(path + '.params')
    go.save_states(trainer, path + '.states', net)
    fresh = run.facts(net, trainer)
    run.train(net, trainer, 0, 2)
    go.load_states(trainer, path + '.states', net)
    net.load_parameters(path + '.params')
    assert run.facts(net, trainer) == fresh


@pytest.mark.parametrize('config', [NOVOGRAD, {'optimizer': 'adamw', 'half': True, 'arguments': {'multi_precision': True}}])
def test_native_states_keep_the_counts_on_another_device(path, config):
    net, trainer = trained({**config, 'contexts': [0]})
    save(net, trainer, path)
    run.train(net, trainer, 3, 6)
    out = in_new_process({**config, 'contexts': [2]}, path, 3, 6, 'native')
    end = run.facts(net, trainer)
    assert out['end'] == as_json(end) and set(end['counts'].values()) == {0, 6}


# Frozen parameters

def test_frozen_parameters_keep_their_state(path):
    net, trainer = trained(NOVOGRAD)
    held = export_states(trainer, net)
    net[4].weight.grad_req = 'null'
    run.train(net, trainer, 3, 5)
    save(net, trainer, path)
    net, trainer = run.make(NOVOGRAD)
    net.load_parameters(path + '.params')
    net[4].weight.grad_req = 'null'
    assert str(go.load_states(trainer, path + '.states', net)) == 'restored 8 of 8 parameters at step 5'
    run.train(net, trainer, 5, 6)
    go.save_states(trainer, path + '.states', net)
    back = container.read(path + '.states')
    assert back.counts['4.weight'] == 3 and back.counts['4.bias'] == 6
    for slot, array in held.slots['4.weight'].items():
        assert (back.slots['4.weight'][slot] == array).all()
    net[4].weight.grad_req = 'write'
    run.train(net, trainer, 6, 7)
    assert export_states(trainer, net).counts['4.weight'] == 4


# Masters

@pytest.mark.parametrize('on_kvstore', [True, False])
def test_weights_that_are_not_their_rounded_master_are_rewritten_everywhere(path, on_kvstore):
    config = {**HALF, 'contexts': [0, 1], 'kvstore': 'device', 'update_on_kvstore': on_kvstore}
    net, trainer = trained(config)
    before = save(net, trainer, path)
    run.train(net, trainer, 3, 5)
    after = run.facts(net, trainer)
    net, trainer = run.make(config)
    net.load_parameters(path + '.params', ctx=trainer._contexts)
    run.train(net, trainer, 3, 4)  # the kvstore has its own copies now
    net.load_parameters(path + '.params', ctx=trainer._contexts)
    run.train(net, trainer, 3, 4)
    weight = net[3].weight
    for data in weight.list_data():
        data[:] = data * 2
    others = {name: p for name, p in net._collect_params_with_prefix().items() if name != '3.weight'}
    saved = mx.nd.load(path + '.params')
    for name, parameter in others.items():
        parameter.set_data(saved[name])
    report = go.load_states(trainer, path + '.states', net)
    assert report.rewritten == ['3.weight']
    assert run.facts(net, trainer) == before
    run.train(net, trainer, 3, 5)
    assert run.facts(net, trainer) == after
    assert go.load_states(trainer, path + '.states', net).rewritten == ['3.weight']  # it trained on
    assert go.load_states(trainer, path + '.states', net).rewritten == []


# Schedulers

SCHEDULERS = [
    ['FactorScheduler', {'step': 4, 'factor': 0.5, 'base_lr': 0.1, 'warmup_steps': 2}],
    ['MultiFactorScheduler', {'step': [3, 6], 'factor': 0.5, 'base_lr': 0.1}],
    ['PolyScheduler', {'max_update': 6, 'base_lr': 0.1, 'final_lr': 0.01}],
    ['CosineScheduler', {'max_update': 6, 'base_lr': 0.1, 'warmup_steps': 2, 'warmup_begin_lr': 0.01}],
]


def scheduled(scheduler, **arguments):
    """A trainer of one parameter, quick to make."""
    parameter = gluon.Parameter('w', shape=(3,))
    parameter.initialize(mx.init.One())
    if scheduler is not None:
        arguments['lr_scheduler'] = getattr(mx.lr_scheduler, scheduler[0])(**scheduler[1])
    return gluon.Trainer([parameter], 'adamw', arguments)


def step(trainer, number):
    """The rates of ``number`` steps."""
    rates = []
    for _ in range(number):
        for parameter in trainer._params:
            with mx.autograd.record():
                losses = [(data * data).sum() for data in parameter.list_data()]
            mx.autograd.backward(losses)
        trainer.step(1)
        rates.append(trainer.learning_rate)
    return rates


@pytest.mark.parametrize('scheduler', SCHEDULERS, ids=lambda s: s[0])
@pytest.mark.parametrize('at', [2, 5, 9])
@pytest.mark.parametrize('present', ['same', 'other values', 'none', 'current'])
def test_schedules_go_on(path, scheduler, at, present):
    straight = scheduled(scheduler)
    rates = step(straight, at)
    go.save_states(straight, path)
    rates += step(straight, 6)
    name, options = scheduler
    trainer = scheduled({'none': None, 'other values': [name, {**options, 'base_lr': 0.7}]}.get(present, scheduler))
    held = trainer.optimizer.lr_scheduler
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        go.load_states(trainer, path, hyperparameters='current' if present == 'current' else 'file')
    assert any(w.category is UserWarning for w in caught) == (present in ('none', 'other values'))
    if present != 'none':
        assert trainer.optimizer.lr_scheduler is held
    assert step(trainer, 6) == rates[at:]


def test_another_scheduler_is_an_error_that_names_both(path):
    saved = scheduled(SCHEDULERS[0])
    go.save_states(saved, path)
    trainer = scheduled(SCHEDULERS[2])
    with pytest.raises(ValueError, match='FactorScheduler.*PolyScheduler'):
        go.load_states(trainer, path)
    with pytest.warns(UserWarning, match="PolyScheduler in the trainer and .*FactorScheduler in the file: the trainer's applies"):
        go.load_states(trainer, path, hyperparameters='current')
    assert isinstance(trainer.optimizer.lr_scheduler, mx.lr_scheduler.PolyScheduler)
    go.save_states(scheduled(None), path)
    with pytest.raises(ValueError, match='without a scheduler.*FactorScheduler'):
        go.load_states(saved, path)


class Homemade(mx.lr_scheduler.FactorScheduler):
    pass


class Careless(mx.lr_scheduler.LRScheduler):
    def __call__(self, num_update):
        return self.base_lr

    def get_config(self):
        return {'base_lr': self.base_lr}

    def set_config(self, config):
        self.base_lr = config['base_lr']
        if config['base_lr'] < 0.5:
            raise KeyError('too low')


def test_users_schedulers(path):
    trainer = scheduled(None)
    trainer.optimizer.lr_scheduler = Homemade(step=2)
    trainer.optimizer.lr_scheduler.function = print
    with pytest.raises(TypeError, match='Homemade.*its attribute function.*get_config'):
        go.save_states(trainer, path)
    assert not os.path.exists(path)
    trainer.optimizer.lr_scheduler = Careless(base_lr=0.2)
    go.save_states(trainer, path)
    with pytest.raises(ValueError, match='Careless.*has none'):
        go.load_states(scheduled(None), path)
    other = scheduled(None)
    step(other, 2)
    before = go.states_digest(other)
    other.optimizer.lr_scheduler = Careless(base_lr=0.9)
    with pytest.raises(KeyError):
        go.load_states(other, path)
    assert other.optimizer.lr_scheduler.base_lr == 0.9 and go.states_digest(other) == before


@pytest.mark.parametrize('attributes', [{}, {'base_lr': 'high'}, {'max_update': 3}])
def test_schedulers_that_no_class_makes_are_refused(attributes):
    trainer = scheduled(None)
    states = export_states(trainer)
    states.scheduler = {'class': 'mxnet.lr_scheduler.CosineScheduler', 'attributes': attributes}
    for present in (trainer, scheduled(SCHEDULERS[3])):
        with pytest.raises(ValueError, match='CosineScheduler'):
            import_states(present, states)
    for path in ('os.system', 'mxnet.lr_scheduler.logging', 'mxnet.lr_scheduler.cos', 'CosineScheduler', ''):
        states.scheduler = {'class': path, 'attributes': {}}
        with pytest.raises(ValueError, match='only those of MXNet'):
            import_states(trainer, states)


# The loss scaler of AMP

def test_loss_scaler(path):
    saved = scheduled(None)
    saved._amp_loss_scaler = LossScaler()  # as amp.init_trainer does
    saved._amp_loss_scaler._scale_seq_len = 3
    step(saved, 2)
    go.save_states(saved, path)
    trainer = scheduled(None)
    trainer._amp_loss_scaler = LossScaler()
    go.load_states(trainer, path)
    assert vars(trainer._amp_loss_scaler) == vars(saved._amp_loss_scaler)
    step(trainer, 2)
    step(saved, 2)
    assert trainer._amp_loss_scaler.loss_scale == saved._amp_loss_scaler.loss_scale == 2 ** 17
    with pytest.warns(UserWarning, match='loss scaler'):
        go.load_states(scheduled(None), path)


# Hyper-parameters

def test_whose_hyperparameters_hold(path):
    saved = scheduled(None, learning_rate=0.1, wd=0.0, beta1=0.8, clip_gradient=0.5)
    step(saved, 2)
    go.save_states(saved, path)

    def values(trainer):
        return [getattr(trainer.optimizer, name) for name in ('lr', 'wd', 'beta1', 'clip_gradient')]

    mine = dict(learning_rate=0.003, wd=0.5)
    trainer = scheduled(None, **mine, rescale_grad=0.25)
    with pytest.warns(UserWarning) as caught:
        report = go.load_states(trainer, path)
    assert values(trainer) == [0.1, 0.0, 0.8, 0.5]
    assert trainer.optimizer.rescale_grad == 0.25  # the trainer's, from its next batch size
    said = [str(w.message) for w in caught if w.category is UserWarning]
    assert report.warnings == said and sorted(text.split()[0] for text in said) == ['beta1', 'clip_gradient', 'learning_rate', 'wd']
    trainer = scheduled(None, **mine)
    with pytest.warns(UserWarning, match="trainer's applies"):
        assert len(go.load_states(trainer, path, hyperparameters='current').warnings) == 4
    assert values(trainer) == [0.003, 0.5, 0.9, None]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        go.load_states(scheduled(None, learning_rate=0.1, wd=0.0, beta1=0.8, clip_gradient=0.5), path)


@pytest.mark.parametrize('mode, holds, whose', [('file', 0.5, 'file'), ('current', 1.0, 'trainer')])
def test_multipliers_are_hyperparameters_too(path, mode, holds, whose):
    saved = scheduled(None)
    saved._params[0].lr_mult = 0.5
    go.save_states(saved, path)
    trainer = scheduled(None)
    with pytest.warns(UserWarning, match=f"^lr_mult of w is 1.0 in the trainer and 0.5 in the file: the {whose}'s applies.$"):
        go.load_states(trainer, path, hyperparameters=mode)
    assert trainer._params[0].lr_mult == holds


# Names

def dense(*units, prefixes=None):
    net = gluon.nn.HybridSequential()
    for i, n in enumerate(units):
        net.add(gluon.nn.Dense(n, in_units=3 if i == 0 else units[i - 1], prefix=prefixes[i] if prefixes else None))
    net.initialize()
    return net, gluon.Trainer(net.collect_params(), 'adamw')


def train_dense(net, trainer, steps=2):
    for number in range(steps):
        with mx.autograd.record():
            loss = (net(mx.nd.ones((2, 3)) * (number + 1)) ** 2).sum()
        loss.backward()
        trainer.step(1)


def moments(net, trainer):
    """Slots by the place of each parameter."""
    slots = export_states(trainer, net).slots
    return {name: {slot: array.tolist() for slot, array in slots[name].items()} for name in slots}


def test_a_second_net_in_one_process(path):
    """Twelve equal layers, so that dense9 and dense10 of one net, and their order as text, fall differently in the other."""
    first = dense(*[3] * 12)
    train_dense(*first)
    go.save_states(first[1], path)
    second = dense(*[3] * 12)
    with pytest.warns(UserWarning, match='automatic numbers') as caught:
        go.load_states(second[1], path)
    assert len([w for w in caught if w.category is UserWarning]) == 1
    assert moments(*second) == moments(*first)
    go.save_states(first[1], path, first[0])  # with the net there is nothing to interpret
    third = dense(*[3] * 12)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        go.load_states(third[1], path, third[0])
    assert moments(*third) == moments(*first)


def test_the_file_has_both_names(path):
    net, trainer = dense(2, prefixes=['a_'])
    go.save_states(trainer, path, net)
    assert [(p.name, p.full_name) for p in container.read(path).parameters] == [('0.bias', 'a_bias'), ('0.weight', 'a_weight')]
    go.save_states(trainer, path)
    assert container.read(path).names == ['a_bias', 'a_weight']


def test_layers_that_changed_places_are_found_by_name(path):
    first = dense(3, 3, prefixes=['a_', 'b_'])
    train_dense(*first)
    go.save_states(first[1], path)
    second = dense(3, 3, prefixes=['b_', 'a_'])
    go.load_states(second[1], path)
    one, two = moments(*first), moments(*second)
    assert one['0.weight'] == two['1.weight'] and one['1.bias'] == two['0.bias'] and one['0.bias'] != one['1.bias']


def test_strict_and_not(path):
    first = dense(3, 4, prefixes=['body_', 'head_'])
    train_dense(*first)
    go.save_states(first[1], path)
    net, trainer = dense(3, 5, 2, prefixes=['body_', 'head_', 'more_'])
    before = go.states_digest(trainer)
    with pytest.raises(ValueError) as caught:
        go.load_states(trainer, path)
    text = str(caught.value)
    assert 'more_weight' in text and 'head_weight is float32[5, 3], in the file float32[4, 3]' in text and 'strict=False' in text
    assert go.states_digest(trainer) == before
    report = go.load_states(trainer, path, strict=False)
    assert report.restored == ['body_bias', 'body_weight'] and report.missing == ['more_bias', 'more_weight']
    assert report.unexpected == []
    assert sorted(text.split()[0] for text in report.mismatched) == ['head_bias', 'head_weight']
    states = export_states(trainer)
    assert states.counts == {'body_bias': 2, 'body_weight': 2, 'head_bias': 0, 'head_weight': 0, 'more_bias': 0, 'more_weight': 0}
    train_dense(net, trainer, 1)
    assert set(export_states(trainer).counts.values()) == {1, 3}
    net, trainer = dense(3, prefixes=['body_'])  # the head was dropped
    report = go.load_states(trainer, path, strict=False)
    assert report.unexpected == ['head_bias', 'head_weight'] and str(report) == 'restored 2 of 2 parameters at step 2'


def test_what_does_not_fit_stays_as_it_was(path):
    first = dense(3, 4, prefixes=['body_', 'head_'])
    train_dense(*first)
    go.save_states(first[1], path)
    net, trainer = dense(3, 5, prefixes=['body_', 'head_'])
    train_dense(net, trainer, 5)
    head = moments(net, trainer)['1.weight']
    go.load_states(trainer, path, strict=False)
    assert moments(net, trainer)['1.weight'] == head
    assert export_states(trainer).counts == {'body_bias': 2, 'body_weight': 2, 'head_bias': 5, 'head_weight': 5}


def test_names_that_repeat_need_the_net(path):
    net, trainer = dense(3, 3)
    for parameter in trainer._params:
        parameter.name = parameter.name.rpartition('_')[2]  # as a bare trainer of MXNet 2.0 has them
    with pytest.raises(ValueError, match='twice.*net='):
        go.save_states(trainer, path)
    go.save_states(trainer, path, net)
    assert len(container.read(path).names) == 4


def test_shared_parameters(path):
    def shared():
        net = gluon.nn.HybridSequential()
        net.add(gluon.nn.Dense(3, in_units=3), gluon.nn.Dense(3, in_units=3))
        net.add(gluon.nn.Dense(3, in_units=3, params=net[0].params))
        net.initialize()
        return net, gluon.Trainer(net.collect_params(), 'adamw')

    first, second = shared(), shared()
    train_dense(*first)
    go.save_states(first[1], path, first[0])
    go.load_states(second[1], path, second[0])
    assert moments(*second) == moments(*first) and sorted(moments(*first)) == ['0.bias', '0.weight', '1.bias', '1.weight']


# What is refused changes nothing

def spoiled(path, how):
    data = bytearray(Path(path).read_bytes())
    if how == 'cut':
        del data[-1]
    else:
        data[-5 if how == 'flip' else 100] ^= 1
    Path(path).write_bytes(bytes(data))


@pytest.mark.filterwarnings('ignore:novograd updates float16')
@pytest.mark.parametrize('config, spoil, error, words', [
    ({'optimizer': 'adamw'}, None, ValueError, "'novograd'.*'adamw'"),
    ({'half': True}, None, ValueError, r'3.weight is float16\[6, 48\], in the file float32\[6, 48\]'),
    ({'arguments': {'variant': 'apex'}, 'hyper': 'current'}, None, ValueError, 'norm'),
    ({}, 'cut', StateFileError, 'truncated'),
    ({}, 'flip', StateFileError, 'CRC'),
    ({}, 'header', StateFileError, 'SHA-256'),
])
def test_one_clear_error_and_nothing_changed(path, config, spoil, error, words):
    save(*trained(NOVOGRAD), path)
    if spoil:
        spoiled(path + '.states', spoil)
    config = dict(config)
    mode = config.pop('hyper', 'file')
    net, trainer = trained(config, 2)
    before, file = run.facts(net, trainer), Path(path + '.states').read_bytes()
    with pytest.raises(error, match=words):
        go.load_states(trainer, path + '.states', net, hyperparameters=mode)
    assert run.facts(net, trainer) == before
    assert Path(path + '.states').read_bytes() == file
    run.train(net, trainer, 2, 3)


def test_masters_need_multi_precision(path):
    net, trainer = trained({**HALF})
    save(net, trainer, path)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net, trainer = trained({**HALF, 'arguments': {}}, 2)
    before = run.facts(net, trainer)
    with pytest.raises(ValueError, match='3.weight has a float32 master in the file, the trainer has multi_precision=False'):
        go.load_states(trainer, path + '.states', net)
    assert run.facts(net, trainer) == before
    states = export_states(trainer, net)
    net, trainer = trained(HALF, 2)
    with pytest.raises(ValueError, match='has no float32 master'):
        import_states(trainer, states, net)


@pytest.mark.parametrize('spoil, words', [
    (lambda s: s.slots['0.weight'].pop('mean'), 'must be'),
    (lambda s: s.slots['0.weight'].update(mean=s.slots['0.weight']['mean'].astype('float16')), 'float16'),
    (lambda s: s.slots['0.weight'].update(mean=np.zeros(3, 'float32')), 'must be'),
    (lambda s: s.hypers.update(beta1=2.0), r'beta1.*\[0, 1\)'),
    (lambda s: s.hypers.update(beta3=0.5), 'beta3'),
    (lambda s: s.hypers.update(variant='nobody'), 'nobody'),
])
def test_states_that_the_optimizer_cannot_have(spoil, words):
    net, trainer = trained(NOVOGRAD)
    states = copy.deepcopy(export_states(trainer, net))
    spoil(states)
    before = run.facts(net, trainer)
    with pytest.raises(ValueError, match=words):
        import_states(trainer, states, net)
    assert run.facts(net, trainer) == before


def test_bad_arguments(path):
    net, trainer = dense(3)
    go.save_states(trainer, path)
    with pytest.raises(ValueError, match="'file' or 'current'"):
        go.load_states(trainer, path, hyperparameters='mine')
    with pytest.raises(TypeError, match='gluon.Trainer'):
        go.save_states(net, path)
    with pytest.raises(FileNotFoundError):
        go.load_states(trainer, path + '.absent')


def test_deferred_parameters(path):
    net = gluon.nn.Dense(3)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'adamw')
    for call in (lambda: go.save_states(trainer, path), lambda: go.states_digest(trainer)):
        with pytest.raises(ValueError, match='forward pass'):
            call()
    assert not os.path.exists(path)
    go.save_states(dense(3)[1], path)
    with pytest.warns(UserWarning, match='automatic numbers'):
        go.load_states(trainer, path)  # tests/test_deferred.py has more of this
    assert net.weight.shape == (3, 3) and net.weight.data().shape == (3, 3)


# Reports and digests

def test_the_report_is_logged(path, caplog):
    net, trainer = dense(3)
    train_dense(net, trainer)
    go.save_states(trainer, path)
    with caplog.at_level(logging.INFO, logger='gluon_optim'):
        report = go.load_states(trainer, path)
    logged = [record.getMessage() for record in caplog.records if record.name == 'gluon_optim']
    assert logged == [str(report)] == ['restored 2 of 2 parameters at step 2']


def test_digest():
    net, trainer = trained(NOVOGRAD)
    digest = go.states_digest(trainer, net)
    states = export_states(trainer, net)
    trainer.set_learning_rate(3.0)
    assert go.states_digest(trainer, net) == digest
    other_net, other = run.make({**NOVOGRAD, 'contexts': [2], 'update_on_kvstore': False})
    assert go.states_digest(other, other_net) != digest
    import_states(other, states, other_net)
    assert go.states_digest(other, other_net) == digest
    for spoil in (lambda s: s.counts.update({'0.bias': 4}), lambda s: setattr(s, 'num_update', 9),
                  lambda s: s.slots['0.bias'].update(mean=s.slots['0.bias']['mean'] + np.float32(1e-6))):
        changed = copy.deepcopy(states)
        spoil(changed)
        import_states(other, changed, other_net)
        assert go.states_digest(other, other_net) != digest


MEMORY = """
import resource, sys, mxnet as mx, gluon_optim as go
from mxnet import gluon
parameter = gluon.Parameter('w', shape=(10 << 20,))
parameter.initialize()
trainer = gluon.Trainer([parameter], 'adamw')
with mx.autograd.record():
    loss = parameter.data().sum()
loss.backward()
trainer.step(1)
mx.nd.waitall()
small = gluon.Parameter('s', shape=(1,))
small.initialize()
go.save_states(gluon.Trainer([small], 'adamw'), sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
go.save_states(trainer, sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_saving_needs_no_copy_of_the_states(path):
    """80 MB of state: at most 64 MB more."""
    out = subprocess.run([sys.executable, '-c', MEMORY, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env={**os.environ, 'PYTHONPATH': str(Path(container.__file__).parents[2])})
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 64 and os.path.getsize(path) > 80 << 20


def test_another_net_is_refused(path):
    net, trainer = trained(NOVOGRAD)
    other, _ = run.make(NOVOGRAD)
    with pytest.raises(ValueError, match="has none of the trainer's parameters"):
        go.save_states(trainer, path, other)
    with pytest.raises(TypeError, match='`net` must be the gluon.Block .* Received: ParameterDict'):
        go.save_states(trainer, path, net.collect_params())
    assert not os.path.exists(path)


def test_what_is_not_trained_need_not_be_in_the_file(path):
    """As in states that come back from PyTorch, where running statistics are no parameters."""
    net, trainer = trained(NOVOGRAD)
    states = export_states(trainer, net)
    states.parameters = [info for info in states.parameters if info.name in states.slots]
    report = import_states(trainer, states, net)
    assert report.missing == [] and str(report) == 'restored 8 of 8 parameters at step 3'
    states.parameters = states.parameters[1:]
    with pytest.raises(ValueError, match='in the trainer only'):
        import_states(trainer, states, net)
