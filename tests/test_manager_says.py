"""What a manager says and when: what it saved and restored, and at its first call that it cannot save."""
import logging
import os
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')

import gluon_optim as go  # noqa: E402
from gluon_optim.mxnet.checkpoint import _SEEDS, _plan_random, _reseed  # noqa: E402
from gluon_optim.states.errors import StateFileError  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_runs as runs  # noqa: E402

CONFIG = {'optimizer': 'adamw', 'plain': True}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / 'run'


@pytest.fixture(scope='module')
def pair():
    net, trainer = runs.make(CONFIG)
    runs.train(net, trainer, 1)
    return net, trainer


@pytest.mark.parametrize('background', [False, True])
def test_savings_and_restorings_are_logged(folder, pair, caplog, background):
    caplog.set_level(logging.INFO, 'gluon_optim')
    with go.CheckpointManager(folder, background=background) as manager:
        manager.save(7, *pair)
    path = str(folder / 'step-7.safetensors')
    restored = go.CheckpointManager(folder).restore_latest(*pair)
    go.save_checkpoint(folder / 'own', *pair, step=8)
    said = caplog.text
    assert re.search(r'saved step 7 in \d+\.\d+ s', said) and f'restored step 7 from {path}' in said
    assert re.search(r'saved step 8 in \d+\.\d+ s', said)
    assert repr(restored).startswith(f'<Restored: step 7, from {path!r}, restored 4 of 4 parameters at step 1, extra {{}}')
    assert str(restored) == repr(restored) and restored == {} and restored.path == path


def test_what_is_restored_fits_a_screen(folder, pair):
    go.save_checkpoint(folder.parent / 'x', *pair, extra={'list': list(range(10000))}, epoch=3)
    assert len(repr(go.load_checkpoint(folder.parent / 'x', *pair))) < 500


class Unsavable:
    """A scheduler that cannot be saved."""

    def __init__(self):
        self.base_lr, self.function = 0.1, lambda update: 0.1

    def __call__(self, update):
        return self.function(update)


@pytest.mark.parametrize('first', ['save', 'save later', 'restore_latest', 'restore'])
def test_a_manager_that_cannot_save_says_so_when_it_is_first_asked(folder, pair, first):
    go.CheckpointManager(folder).save(5, *pair)
    net, trainer = runs.make(CONFIG)
    trainer._optimizer.lr_scheduler = Unsavable()
    manager = go.CheckpointManager(folder, save_every=500)
    call = {'save': lambda: manager.save(500, net=net, trainer=trainer),
            'save later': lambda: manager.save(1, net=net, trainer=trainer),
            'restore_latest': lambda: manager.restore_latest(net=net, trainer=trainer),
            'restore': lambda: manager.restore(5, net=net, trainer=trainer)}[first]
    with pytest.raises(TypeError, match='scheduler .*Unsavable'):
        call()
    assert manager.steps() == [5] and not trainer._optimizer.num_update


def test_the_remains_of_a_failed_write_go_with_the_next(folder, pair):
    """Of the same manager: here the file system refused to delete them."""
    manager = go.CheckpointManager(folder)
    manager.save(1, *pair)

    def fail(*arguments):
        raise OSError(5, 'Input/output error')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'fsync', fail)
        patch.setattr(os, 'unlink', fail)
        with pytest.raises(OSError, match='Input/output error'):
            manager.save(2, *pair)
    assert len(os.listdir(folder)) == 2
    manager.save(3, *pair)
    assert sorted(os.listdir(folder)) == ['step-1.safetensors', 'step-3.safetensors']


@pytest.mark.parametrize('mode', ['min', 'max'])
def test_of_equal_metrics_the_later_is_kept(folder, pair, mode):
    manager = go.CheckpointManager(folder, keep_last=1, keep_best=('loss', mode))
    for step in (1, 2, 3):
        manager.save(step, *pair, metrics={'loss': 0.5})
    manager.save(4, *pair, metrics={'loss': {'min': 0.75, 'max': 0.25}[mode]})
    assert manager.steps() == [3, 4]


@pytest.mark.parametrize('seed, fits', [(0, True), (_SEEDS - 1, True), (_SEEDS, False), (-1, False), (1.5, False), (True, False)])
def test_seeds_of_a_checkpoint_are_those_that_mxnet_takes_on_all_devices(seed, fits):
    contexts = [mx.cpu(k) for k in range(8)]
    saved = dict(_reseed(contexts), mxnet=seed)
    if not fits:
        with pytest.raises(StateFileError, match='random state'):
            _plan_random(saved, contexts)
        return
    state = np.random.get_state(), random.getstate()  # noqa: NPY002
    plan = _plan_random(saved, contexts)
    assert plan.seed == seed
    mx.random.seed(plan.seed + len(contexts) - 1, contexts[-1])  # the largest that is given to MXNet
    assert all(np.array_equal(a, b) for a, b in zip(state[0], np.random.get_state())) and state[1] == random.getstate()  # noqa: NPY002


def weights(net):
    return {name: parameter.data().asnumpy().tolist() for name, parameter in net._collect_params_with_prefix().items()}


@pytest.mark.parametrize('on_kvstore', [False, True])
def test_weights_alone_into_another_optimizer(folder, pair, on_kvstore):
    """states=False: the other trainer's own states, counts and rates stay, and the random generators."""
    go.CheckpointManager(folder).save(5, *pair)
    with pytest.raises(ValueError, match="are of 'adamw', the trainer runs 'novograd'"):
        go.load_checkpoint(folder / 'step-5.safetensors', *runs.make({'optimizer': 'novograd', 'plain': True}))
    for load in (lambda *other: go.load_checkpoint(folder / 'step-5.safetensors', *other, states=False),
                 lambda *other: go.CheckpointManager(folder).restore_latest(*other, states=False),
                 lambda *other: go.CheckpointManager(folder).restore(5, *other, states=False)):
        options = {'kvstore': mx.kv.create('local'), 'update_on_kvstore': True} if on_kvstore else {}
        net, trainer = runs.make({'optimizer': 'novograd', 'plain': True, **options})
        runs.train(net, trainer, 2)
        digest, position = go.states_digest(trainer, net), np.random.get_state()[2]  # noqa: NPY002
        restored = load(net, trainer)
        assert weights(net) == weights(pair[0]) and go.states_digest(trainer, net) == digest and restored.states is None
        assert np.random.get_state()[2] == position and trainer._optimizer.num_update == 2  # noqa: NPY002
        runs.train(net, trainer, 1)
        assert weights(net) != weights(pair[0]) and trainer._optimizer.num_update == 3
