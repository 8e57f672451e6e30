"""Slots whose shape follows from the weight's: one number for each row, in a Trainer, in files, and in a second run."""
import numpy as np
import pytest

import gluon_optim as go

mx = pytest.importorskip('mxnet')
gluon, autograd = mx.gluon, mx.autograd
pytestmark = pytest.mark.filterwarnings('ignore')


class RowNorms(go.Rule):
    """n += sum of g^2 over a row; w -= learning_rate g / sqrt(n)."""

    name, summary, lowerable = 'row_norms', 'gradients divided by the root of what their rows have summed up', False
    hypers = (go.Hyper('learning_rate', 0.1, '[0, inf)'), go.Hyper('wd', 0.0, '[0, 0]'))

    def slots(h):
        return (go.Slot('row_sq', 'rows'), go.Slot('mean', 'columns'))

    def coefficients(xp, h, t):
        return dict(lr=h.learning_rate)

    def step(xp, h, c, w, g, s):
        flat = (g * g).reshape((g.shape[0], -1))
        row_sq = s.row_sq + flat.sum(axis=1)
        root = (row_sq + 1e-12) ** 0.5
        return w - c.lr * g / root.reshape((-1, *[1] * (len(g.shape) - 1))), dict(row_sq=row_sq, mean=s.mean + g.sum(axis=0))


def make():
    net = gluon.nn.Dense(3, in_units=4, use_bias=False)
    net.initialize()
    net.weight.set_data(mx.nd.array(np.linspace(-1, 1, 12).reshape(3, 4)))
    return net, gluon.Trainer(net.collect_params(), 'row_norms', {'learning_rate': 0.5})


def train(net, trainer, steps):
    for k in range(steps):
        with autograd.record():
            loss = (net(mx.nd.array(np.cos(k + np.arange(8.0)).reshape(2, 4))) ** 2).sum()
        loss.backward()
        trainer.step(2)


def test_rows_and_columns(tmp_path):
    go.register(RowNorms)
    net, trainer = make()
    train(net, trainer, 3)
    go.save_states(trainer, tmp_path / 'run', net=net)
    states = go.read_states(tmp_path / 'run')
    assert {name: array.shape for name, array in states.slots['weight'].items()} == {'row_sq': (3,), 'mean': (4,)}
    train(net, trainer, 3)
    half, resumed = make()
    train(half, resumed, 3)
    trained = make()
    trained[0].weight.set_data(half.weight.data())
    go.load_states(trained[1], tmp_path / 'run', net=trained[0])
    for k in (3, 4, 5):
        with autograd.record():
            loss = (trained[0](mx.nd.array(np.cos(k - 3 + np.arange(8.0)).reshape(2, 4))) ** 2).sum()
        loss.backward()
        trained[1].step(2)
    assert trained[0].weight.data().asnumpy().tobytes() == net.weight.data().asnumpy().tobytes()
    assert go.states_digest(trained[1], net=trained[0]) == go.states_digest(trainer, net=net)
    w, slots = RowNorms.run(np, RowNorms.hyperparameters(), 1, np.ones((2, 3)), np.full((2, 3), 2.0))
    np.testing.assert_allclose(slots['row_sq'], [12, 12])
    np.testing.assert_allclose(w, 1 - 0.1 * 2 / 12 ** 0.5)


def test_kernels_have_no_such_slots():
    class Wrong(RowNorms):
        name, lowerable = 'wrong_shapes', True
    with pytest.raises(TypeError, match="like='weight' or 'scalar'"):
        go.register(Wrong)


def test_a_state_of_another_shape_is_refused(tmp_path):
    go.register(RowNorms)
    net, trainer = make()
    train(net, trainer, 1)
    updater = trainer._updaters[0]
    updater.states[0] = (mx.nd.zeros(4), mx.nd.zeros(4))
    with pytest.raises(ValueError, match='does not belong to row_norms'):
        train(net, trainer, 1)
