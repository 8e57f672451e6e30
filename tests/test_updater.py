"""The updater that remembers its lists does what MXNet's does, with fewer questions."""
import numpy as np
import pytest

mx = pytest.importorskip('mxnet')
from mxnet import gluon  # noqa: E402

import gluon_optim as go  # noqa: E402

SHAPES = [(3, 2), (5,), (1,), (40,)]


def parameters(dtypes):
    random = np.random.default_rng(0)
    made = []
    for i, (shape, dtype) in enumerate(zip(SHAPES, dtypes)):
        parameter = gluon.Parameter(f'p{i}', shape=shape, dtype=dtype)
        parameter.initialize(mx.init.Zero())
        parameter.set_data(mx.nd.array(random.normal(size=shape), dtype=dtype))
        made.append(parameter)
    return made


def feed(params, t, stale=()):
    random = np.random.default_rng(t)
    for i, parameter in enumerate(params):
        parameter.grad()[:] = mx.nd.array(random.normal(size=parameter.shape), dtype=parameter.dtype)
        parameter.data()._fresh_grad = i not in stale


def multiplied(trainer, params, tmp_path):
    params[1].lr_mult, params[2].wd_mult = 0.5, 3.0


def loaded(trainer, params, tmp_path):
    trainer.save_states(str(tmp_path / 'states'))
    trainer.load_states(str(tmp_path / 'states'))


def replaced_state(trainer, params, tmp_path):
    trainer._updaters[0].states[0] = trainer._optimizer.create_state(0, params[0].data())


def removed_state(trainer, params, tmp_path):
    del trainer._updaters[0].states[3]


def cast(trainer, params, tmp_path):
    params[3].cast('float64')
    trainer._updaters[0].states.pop(3)


def nothing(trainer, params, tmp_path):
    pass


@pytest.mark.parametrize('name', ['adamw', 'novograd'])
@pytest.mark.parametrize('dtypes', [['float32'] * 4, ['float32', 'float64', 'float32', 'float64']], ids=['one type', 'two'])
@pytest.mark.parametrize('change', [nothing, multiplied, loaded, replaced_state, removed_state, cast])
def test_same_numbers_as_with_mxnets_updater(monkeypatch, tmp_path, name, dtypes, change):
    runs = []
    for remember in (True, False):
        with monkeypatch.context() as patched:
            if not remember:
                patched.setattr('gluon_optim.mxnet.optimizer.remember_lists', lambda trainer: None)
            params = parameters(dtypes)
            trainer = gluon.Trainer(params, go.create(name, learning_rate=0.1, wd=0.01))
            for t in range(7):
                if t == 3:
                    change(trainer, params, tmp_path)
                feed(params, t, stale=[1] if t in (4, 5) else [])
                trainer.update(1, ignore_stale_grad=True)
            assert isinstance(trainer._updaters[0], mx.optimizer.Updater)
            assert (type(trainer._updaters[0]) is mx.optimizer.Updater) is not remember
            runs.append([p.data().asnumpy() for p in params] + [trainer._optimizer._index_update_count])
    for a, b in zip(*runs):
        np.testing.assert_equal(a, b)


def test_weights_are_asked_for_their_types_once(monkeypatch):
    params = parameters(['float32'] * 4)
    trainer = gluon.Trainer(params, go.create('adamw'))
    asked = []
    own = mx.nd.NDArray.dtype
    monkeypatch.setattr(mx.nd.NDArray, 'dtype', property(lambda array: asked.append(array) or own.fget(array)))
    for t in range(4):
        feed(params, t)
        before = len(asked)
        trainer.update(1)
    of_last_step = [array for array in asked[before:] if any(array is p.data() for p in params)]
    assert len(set(map(id, of_last_step))) <= 1  # the first stands for all
