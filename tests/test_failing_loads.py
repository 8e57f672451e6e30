"""Loads that fail: wherever it happens, net, trainer and generators are what they were, and the run goes on."""
# ruff: noqa: NPY002  the global generators are what a checkpoint brings back
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')

import gluon_optim as go  # noqa: E402
from gluon_optim.mxnet.trainer import export_states  # noqa: E402
from gluon_optim.states import container  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_runs as runs  # noqa: E402

HALF = {'half': True, 'optimizer': 'adamw', 'arguments': {'learning_rate': 0.01, 'multi_precision': True}}
COSINE = {'scheduler': ['CosineScheduler', {'max_update': 10, 'base_lr': 0.02, 'warmup_steps': 2}]}
LAYOUTS = {
    'one device, amp': {'amp': True},
    'one device, masters': HALF,
    'two devices': {**HALF, **COSINE, 'contexts': [0, 1], 'update_on_kvstore': False},
    'two devices, kvstore': {**HALF, 'contexts': [0, 1], 'update_on_kvstore': True,
                             'scheduler': ['UserScheduler', {'base_lr': 0.1}]},
    'nadam': {**COSINE, 'optimizer': 'nadam', 'contexts': [0, 1], 'update_on_kvstore': True},
    'lbsgd': {'optimizer': 'lbsgd', 'arguments': {'learning_rate': 0.02, 'momentum': 0.9, 'batch_scale': 2}},
}
COPIES = [(mx.nd.NDArray, '_sync_copyfrom'), (mx.nd.NDArray, 'asnumpy'), (mx.kvstore.KVStore, 'broadcast'),
          (mx.kvstore.KVStore, 'push')]


class OutOfMemory(Exception):
    pass


class FailAt:
    """Lets the ``k``-th call of ``function`` fail."""

    def __init__(self, function, k, error=OutOfMemory):
        self.function, self.k, self.error, self.calls = function, k, error, 0

    def __get__(self, owner, cls=None):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.k:
                raise self.error(self.k)
            return self.function(owner, *args, **kwargs)
        return call


def trained(config, steps):
    net, trainer = runs.make(config, seed=5)
    runs.train(net, trainer, steps)
    return net, trainer


def snapshot(net, trainer):
    """All that a load may change; nothing is asked that counts how often it is asked."""
    states = export_states(trainer, net)
    scheduler, scaler = trainer._optimizer.lr_scheduler, getattr(trainer, '_amp_loss_scaler', None)
    weights = {name: [data.asnumpy().tobytes() for data in parameter.list_data()]
               for name, parameter in net._collect_params_with_prefix().items()}
    return [weights, go.states_digest(trainer, net), states.counts, states.num_update, states.hypers, repr(states.variables),
            scheduler and dict(vars(scheduler)), scaler and dict(vars(scaler), _wait_to_read=0)]


def generators():
    return np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.parametrize('copying', COPIES, ids=lambda c: c[1])
@pytest.mark.parametrize('steps', [0, 2])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_failing_at_the_kth_copy_for_every_k(tmp_path, monkeypatch, layout, steps, copying):
    config, path = LAYOUTS[layout], str(tmp_path / 'x')
    net, trainer = trained(config, 3)
    go.save_checkpoint(path, net=net, trainer=trainer)

    net, trainer = trained(config, steps)
    if steps:
        before = snapshot(net, trainer)
    owner, name = copying
    original = getattr(owner, name)
    for k in range(1, 1000):
        seeds = generators()
        mx.random.seed(k)
        failing = FailAt(original, k)
        monkeypatch.setattr(owner, name, failing)
        try:
            go.load_checkpoint(path, net=net, trainer=trainer)
            break
        except OutOfMemory:
            pass
        finally:
            monkeypatch.setattr(owner, name, original)
        assert generators() == seeds
        drawn = mx.nd.random.uniform(shape=3).asnumpy().tolist()
        mx.random.seed(k)
        assert mx.nd.random.uniform(shape=3).asnumpy().tolist() == drawn
        if steps:
            assert snapshot(net, trainer) == before
    assert failing.calls < k and (k > 4 or name in ('broadcast', 'push'))
    loaded = runs.facts(net, trainer)
    other, other_trainer = trained(config, steps)
    go.load_checkpoint(path, net=other, trainer=other_trainer)
    assert runs.facts(other, other_trainer) == loaded


@pytest.mark.parametrize('layout', LAYOUTS)
def test_loading_states_alone_and_being_interrupted(tmp_path, monkeypatch, layout):
    """`load_states` and Ctrl-C at each copy; weights that are not their rounded masters would be written."""
    config, path = LAYOUTS[layout], str(tmp_path / 'x')
    net, trainer = trained(config, 3)
    go.save_states(trainer, path, net)
    net, trainer = trained(config, 2)
    before, original = snapshot(net, trainer), mx.nd.NDArray._sync_copyfrom
    for k in range(1, 1000):
        monkeypatch.setattr(mx.nd.NDArray, '_sync_copyfrom', FailAt(original, k, KeyboardInterrupt))
        try:
            report = go.load_states(trainer, path, net)
            break
        except KeyboardInterrupt:
            pass
        finally:
            monkeypatch.setattr(mx.nd.NDArray, '_sync_copyfrom', original)
        assert snapshot(net, trainer) == before
    assert k > 4 and export_states(trainer, net).num_update == 3
    assert bool(report.rewritten) == bool(config.get('half'))


@pytest.mark.parametrize('steps', [0, 2])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_after_a_failed_load_the_run_goes_on(tmp_path, monkeypatch, layout, steps):
    config, path = LAYOUTS[layout], str(tmp_path / 'x')
    go.save_checkpoint(path, *trained(config, 3))
    straight = trained(config, steps)
    mx.random.seed(3)
    runs.train(*straight, 3)
    wanted = runs.facts(*straight)
    original = mx.nd.NDArray._sync_copyfrom
    counting, subject = FailAt(original, 0), trained(config, steps)
    monkeypatch.setattr(mx.nd.NDArray, '_sync_copyfrom', counting)
    go.load_checkpoint(path, *subject)
    for k in (1, counting.calls // 2, counting.calls):
        monkeypatch.setattr(mx.nd.NDArray, '_sync_copyfrom', original)
        net, trainer = trained(config, steps)
        monkeypatch.setattr(mx.nd.NDArray, '_sync_copyfrom', FailAt(original, k))
        with pytest.raises(OutOfMemory):
            go.load_checkpoint(path, net=net, trainer=trainer)
        monkeypatch.setattr(mx.nd.NDArray, '_sync_copyfrom', original)
        mx.random.seed(3)
        runs.train(net, trainer, 3)
        assert runs.facts(net, trainer) == wanted


def refused(path, net, trainer, kind, match):
    """Loading raises, and nothing has changed; the run goes on."""
    before, seeds = snapshot(net, trainer), generators()
    with pytest.raises(kind, match=match):
        go.load_checkpoint(path, net=net, trainer=trainer)
    assert snapshot(net, trainer) == before and generators() == seeds
    runs.train(net, trainer, 1)


def test_who_makes_warnings_errors_gets_one_with_nothing_changed(tmp_path):
    path = str(tmp_path / 'x')
    go.save_checkpoint(path, *trained({'arguments': {'beta1': 0.5}}, 3))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        refused(path, *trained({}, 2), UserWarning, 'beta1 is 0.95 in the trainer and 0.5 in the file')


class Refusing(runs.UserScheduler):
    """Changes something, and then refuses."""

    def set_config(self, config):
        super().set_config(config)
        if config['asked'] > 2:
            raise KeyError('asked too often')


def test_a_scheduler_that_refuses_its_config(tmp_path):
    path = str(tmp_path / 'x')
    pairs = [trained({}, 0) for _ in range(2)]
    for (net, trainer), steps in zip(pairs, (3, 2)):
        trainer._optimizer.lr_scheduler = Refusing(0.1)
        runs.train(net, trainer, steps)
        if steps == 3:
            go.save_checkpoint(path, net=net, trainer=trainer)
    refused(path, *pairs[1], KeyError, 'asked too often')


@pytest.mark.parametrize('name, value, match', [
    ('nadam', np.zeros(3), "'m_schedule' of nadam must be one finite number"),
    ('nadam', np.array(np.nan), "'m_schedule' of nadam must be one finite number"),
    ('lars', np.zeros((1, 1)), "'last_lr' of lars must be one finite number"),
    ('lars', np.array(np.inf), "'last_lr' of lars must be one finite number"),
    ('lbsgd', np.zeros(3), 'lbsgd keeps a sum of gradients'),
    ('lbsgd', np.array(-1), 'lbsgd keeps a sum of gradients'),
    ('novograd', np.array(1.0), "The variables of novograd must be among none. Received from the file: 'extra'"),
])
def test_variables_of_the_optimizer_that_are_none(tmp_path, name, value, match):
    """In a file that is sound otherwise."""
    path, config = str(tmp_path / 'x'), {'optimizer': name, 'arguments': {'learning_rate': 0.01}}
    go.save_checkpoint(path, *trained(config, 3))
    states, run = container.read_checkpoint(path)
    states.variables = dict.fromkeys(states.variables or ['extra'], value)
    container.write(path, states, run)
    refused(path, *trained(config, 2), ValueError, match)


def test_weights_whose_bytes_mxnet_has_permuted(tmp_path):
    """An inference leaves convolutions in oneDNN's own order; nobody waits for it. What is loaded is in the usual one."""
    net = mx.gluon.nn.HybridSequential()
    net.add(mx.gluon.nn.Conv2D(64, 3, in_channels=32), mx.gluon.nn.Conv2D(64, 3, in_channels=64))
    net.initialize()
    net.hybridize()
    path, data = str(tmp_path / 'x'), mx.nd.ones((2, 32, 16, 16))
    go.save_checkpoint(path, net=net)
    wanted = {name: p.data().asnumpy() for name, p in net._collect_params_with_prefix().items()}
    output = net(data).asnumpy()
    net.initialize(mx.init.One(), force_reinit=True)
    net(data)
    go.load_checkpoint(path, net=net)
    for name, parameter in net._collect_params_with_prefix().items():
        np.testing.assert_array_equal(parameter.data().asnumpy(), wanted[name])
    np.testing.assert_array_equal(net(data).asnumpy(), output)


@pytest.mark.parametrize('steps', [0, 2])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_an_error_in_the_very_last_step(tmp_path, monkeypatch, layout, steps):
    """When everything else has been restored: MXNet's generators are seeded last."""
    config, path = LAYOUTS[layout], str(tmp_path / 'x')
    go.save_checkpoint(path, *trained(config, 3))
    net, trainer = trained(config, steps)
    if steps:
        before, seeds = snapshot(net, trainer), generators()
    twin = trained(config, steps)
    with monkeypatch.context() as patch:
        patch.setattr(mx.random, 'seed', FailAt(lambda _, *args: None, 1).__get__(None))
        with pytest.raises(OutOfMemory):
            go.load_checkpoint(path, net=net, trainer=trainer)
    if steps:
        assert snapshot(net, trainer) == before and generators() == seeds
    for pair in ((net, trainer), twin):
        mx.random.seed(3)
        np.random.seed(3)
        random.seed(3)
        runs.train(*pair, 2)
    assert runs.facts(net, trainer, noise=False) == runs.facts(*twin, noise=False)
