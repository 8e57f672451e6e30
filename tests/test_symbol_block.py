"""Nets from `SymbolBlock.imports`: the shapes of their parameters are None for ever, and are taken from the data."""
import pytest

mx = pytest.importorskip('mxnet')

from mxnet import autograd, gluon  # noqa: E402

import gluon_optim as go  # noqa: E402

# MXNet infers types without the data's
pytestmark = pytest.mark.filterwarnings('ignore:Cannot decide type')

X = mx.nd.ones((2, 4))


@pytest.fixture
def exported(tmp_path):
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Dense(3, in_units=4), gluon.nn.Dense(2, in_units=3))
    net.initialize()
    net.hybridize()
    net(X)
    net.export(str(tmp_path / 'net'))
    return tmp_path / 'net'


def make(exported):
    net = gluon.SymbolBlock.imports(f'{exported}-symbol.json', ['data'], f'{exported}-0000.params')
    return net, gluon.Trainer(net.collect_params(), 'novograd', {'learning_rate': 0.01})


def step(net, trainer, steps=1):
    for _ in range(steps):
        with autograd.record():
            loss = (net(X) ** 2).mean()
        loss.backward()
        trainer.step(1)


def weights(net):
    return {name: parameter.data().asnumpy().tolist() for name, parameter in net.collect_params().items()}


def test_it_is_saved_and_resumed_like_any_other(exported, tmp_path):
    net, trainer = make(exported)
    assert {parameter.shape for parameter in net.collect_params().values()} == {None}
    step(net, trainer, 3)
    trainer.save_states(str(tmp_path / 'mxnet.states'))
    go.save_states(trainer, tmp_path / 'states', net=net)
    digest = go.states_digest(trainer, net=net)
    with go.CheckpointManager(tmp_path / 'run') as manager:
        manager.save(3, net=net, trainer=trainer)
    wanted = weights(net)
    for path in ('states', 'mxnet.states'):
        other, resumed = make(exported)
        go.load_states(resumed, tmp_path / path, net=other)
        assert go.states_digest(resumed, net=other) == digest
    other, resumed = make(exported)
    assert go.CheckpointManager(tmp_path / 'run').restore_latest(net=other, trainer=resumed).step == 3
    assert weights(other) == wanted
    step(net, trainer, 3)
    step(other, resumed, 3)
    assert weights(other) == weights(net)
    assert go.read_states(tmp_path / 'states').parameters[0].shape == (3,)


@pytest.mark.parametrize('context', [mx.cpu(0), mx.cpu(1)])
def test_one_that_was_imported_without_its_parameters_takes_their_shapes_from_the_file(exported, tmp_path, context):
    net, trainer = make(exported)
    step(net, trainer, 2)
    go.save_checkpoint(tmp_path / 'run', net=net, trainer=trainer)
    other = gluon.SymbolBlock.imports(f'{exported}-symbol.json', ['data'])
    with pytest.raises(ValueError, match=r'Call net\.initialize'):
        go.load_checkpoint(tmp_path / 'run', net=other)
    other.initialize(ctx=context)
    resumed = gluon.Trainer(other.collect_params(), 'novograd', {'learning_rate': 0.01})
    go.load_checkpoint(tmp_path / 'run', net=other, trainer=resumed)
    assert weights(other) == weights(net) and go.states_digest(resumed, net=other) == go.states_digest(trainer, net=net)
