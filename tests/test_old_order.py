"""MXNet's own `.states` files know places in a trainer, which sorts names as text: dense10 before dense2, dense47 after dense36."""
import numpy as np
import pytest

import gluon_optim as go
from gluon_optim.states.mxnet_files.names import renumbered

mx = pytest.importorskip('mxnet')
if not mx.__version__.startswith('1.'):
    pytest.skip('MXNet 2 has no automatic names', allow_module_level=True)


def trained(layers, earlier=0, steps=2, units=lambda k: 4, optimizer='sgd', **hypers):
    """A net of Dense layers in a process that has already made ``earlier`` ones, and a trainer after some steps."""
    with mx.name.NameManager():
        for _ in range(earlier):
            mx.gluon.nn.Dense(1)
        net = mx.gluon.nn.HybridSequential()
        for k in range(layers):
            net.add(mx.gluon.nn.Dense(units(k + 1), in_units=units(k)))
    mx.random.seed(0)
    net.initialize(mx.init.Xavier())
    trainer = mx.gluon.Trainer(net.collect_params(), optimizer, dict({'learning_rate': 1e-3, 'momentum': 0.9}, **hypers))
    for _ in range(steps):
        with mx.autograd.record():
            loss = (net(mx.nd.ones((2, units(0)))) ** 2).sum()
        loss.backward()
        trainer.step(2)
    return net, trainer


def momenta(net, trainer):
    """By layer."""
    states = trainer._updaters[0].states
    names = [parameter.name for parameter in trainer._params]
    return [states[names.index(layer.weight.name)].asnumpy() for layer in net]


@pytest.fixture
def saved(tmp_path):
    net, trainer = trained(12)
    trainer.save_states(str(tmp_path / 'old.states'))
    return tmp_path / 'old.states', momenta(net, trainer)


def test_another_order_of_numbers_is_refused(saved):
    path, _ = saved
    net, trainer = trained(12, earlier=36, steps=1)
    before = momenta(net, trainer)
    with pytest.raises(ValueError, match=r"'dense36_bias'.*count from 0.*NameManager"):
        go.load_states(trainer, path)
    with pytest.raises(ValueError, match=r"'dense36_bias'.*count from 0.*NameManager"):
        go.load_states(trainer, path, net=net)
    for array, old in zip(momenta(net, trainer), before):
        np.testing.assert_array_equal(array, old)


def test_the_remedies_work(saved, tmp_path):
    path, wanted = saved
    net, trainer = trained(12, steps=1)  # inside `with mx.name.NameManager():`
    assert str(go.load_states(trainer, path)).startswith('restored 24 of 24')
    for array, old in zip(momenta(net, trainer), wanted):
        np.testing.assert_array_equal(array, old)
    net, trainer = trained(12, earlier=36)  # of a net with these very names
    trainer.save_states(str(tmp_path / 'same.states'))
    wanted = momenta(net, trainer)
    net, trainer = trained(12, earlier=36, steps=1)
    trainer.load_states(str(tmp_path / 'same.states'))
    go.save_states(trainer, tmp_path / 'named.states', net=net)
    net, trainer = trained(12, steps=1)
    go.load_states(trainer, tmp_path / 'named.states', net=net)
    for array, old in zip(momenta(net, trainer), wanted):
        np.testing.assert_array_equal(array, old)


@pytest.mark.parametrize('layers, earlier', [(4, 0), (4, 36), (12, 100), (3, 8)])
def test_where_the_order_is_one_nothing_is_asked(tmp_path, layers, earlier):
    """Of 12 layers after 100 the numbers have three digits, but not from 0; of 3 after 8 dense10 comes first."""
    net, trainer = trained(layers)
    trainer.save_states(str(tmp_path / 'old.states'))
    wanted = momenta(net, trainer)
    net, trainer = trained(layers, earlier, steps=1)
    if (layers, earlier) in [(12, 100), (3, 8)]:
        with pytest.raises(ValueError, match='count from 0'):
            go.load_states(trainer, tmp_path / 'old.states')
        return
    go.load_states(trainer, tmp_path / 'old.states')
    for array, old in zip(momenta(net, trainer), wanted):
        np.testing.assert_array_equal(array, old)


def test_shapes_may_settle_it(tmp_path):
    net, trainer = trained(12, units=lambda k: k + 2)
    trainer.save_states(str(tmp_path / 'old.states'))
    wanted = momenta(net, trainer)
    net, trainer = trained(12, earlier=36, steps=1, units=lambda k: k + 2)
    go.load_states(trainer, tmp_path / 'old.states')
    for array, old in zip(momenta(net, trainer), wanted):
        np.testing.assert_array_equal(array, old)


def test_without_states_nothing_can_go_astray(tmp_path):
    trained(12, momentum=0.0)[1].save_states(str(tmp_path / 'old.states'))
    _, trainer = trained(12, earlier=36, steps=1, momentum=0.0)
    assert str(go.load_states(trainer, tmp_path / 'old.states')) == 'restored 24 of 24 parameters at step 2'


def test_names_that_are_given(saved, tmp_path):
    """They are taken as they are, sorted where they are no list, and what that rests on is said."""
    path, _ = saved
    net, trainer = trained(12, earlier=36, steps=1)
    names = [parameter.name for parameter in trainer._params]
    net.collect_params().save(str(tmp_path / 'net.params'))
    for given in (names, {parameter.name: parameter.shape for parameter in trainer._params}, tmp_path / 'net.params'):
        states = go.read_states(path, params=given)
        assert states.names == names and any("'dense36_bias'" in line and 'count from 0' in line for line in states.report)
    fresh = [f'dense{k}_{leaf}' for k in sorted(map(str, range(12))) for leaf in ('bias', 'weight')]
    assert not any('count from 0' in line for line in go.read_states(path, params=fresh).report)


def test_renumbered():
    assert renumbered(['a', 'b']) is None and renumbered(['dense0_bias', 'dense10_bias', 'dense2_bias']) is None
    assert renumbered(['conv20_w', 'dense8_w', 'dense9_w']) is None and renumbered(['dense9_w', 'dense10_w']) is None
    assert renumbered(['dense' + '9' * 5000 + '_w']) is None
    names = [f'net_dense{k}_w' for k in range(36, 48)]
    assert [names[k] for k in renumbered(names)][:4] == ['net_dense36_w', 'net_dense46_w', 'net_dense47_w', 'net_dense37_w']
