"""Nets that leave in_units and in_channels out: loading takes the shapes from the file, as `Block.load_parameters` does."""
import numpy as np
import pytest

mx = pytest.importorskip('mxnet')

from mxnet import autograd, gluon  # noqa: E402

import gluon_optim as go  # noqa: E402

nn = gluon.nn
CONTEXTS = [mx.cpu(0), mx.cpu(1)]


def make(contexts=CONTEXTS[:1], hybridize=False, head=2, optimizer='adamw', initialize=True, width=3):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(width, 3, padding=1), nn.BatchNorm(), nn.Activation('relu'), nn.Flatten(), nn.Dense(4), nn.Dense(head))
    if initialize:
        net.initialize(mx.init.Xavier(), ctx=contexts)
    if hybridize:
        net.hybridize()
    if not initialize:
        return net, None
    return net, gluon.Trainer(net.collect_params(), optimizer, {'learning_rate': 0.01})


def train(net, trainer, seed, steps=2):
    rng = np.random.RandomState(seed)
    contexts = trainer._contexts
    for _ in range(steps):
        batches = gluon.utils.split_and_load(mx.nd.array(rng.randn(4, 2, 4, 4)), contexts)
        with autograd.record():
            losses = [(net(batch) ** 2).mean() for batch in batches]
        autograd.backward(losses)
        trainer.step(4)


def values(net):
    return {name: [data.asnumpy().tolist() for data in parameter.list_data()]
            for name, parameter in net._collect_params_with_prefix().items()}


def untouched(net):
    return all(parameter._data is None and parameter._deferred_init for parameter in net.collect_params().values()
               if not parameter.name.endswith('bias') and 'dense' in parameter.name)


@pytest.fixture(scope='module', params=[1, 2])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')
    contexts = CONTEXTS[:request.param]
    net, trainer = make(contexts)
    train(net, trainer, 0)
    go.save_checkpoint(folder / 'run', net=net, trainer=trainer, step=2)
    go.save_states(trainer, folder / 'states', net=net)
    trainer.save_states(str(folder / 'mxnet.states'))
    net.save_parameters(str(folder / 'net.params'))
    with go.CheckpointManager(folder / 'folder') as manager:
        manager.save(2, net=net, trainer=trainer)
    train(net, trainer, 1)
    return folder, contexts, values(net), go.states_digest(trainer, net=net)


@pytest.mark.parametrize('hybridize', [False, True])
@pytest.mark.parametrize('way', ['load_checkpoint', 'restore_latest'])
def test_a_run_resumes_before_its_first_forward_pass(saved, way, hybridize):
    folder, contexts, weights, digest = saved
    net, trainer = make(contexts, hybridize)
    if way == 'load_checkpoint':
        go.load_checkpoint(folder / 'run', net=net, trainer=trainer)
    else:
        assert go.CheckpointManager(folder / 'folder').restore_latest(net=net, trainer=trainer).step == 2
    train(net, trainer, 1)
    assert values(net) == weights and go.states_digest(trainer, net=net) == digest


@pytest.mark.parametrize('file', ['states', 'mxnet.states'])
def test_load_states_takes_the_shapes_too(saved, file):
    folder, contexts, weights, digest = saved
    for order in ('states first', 'weights first'):
        net, trainer = make(contexts)
        if order == 'weights first':
            net.load_parameters(str(folder / 'net.params'), ctx=contexts)
        if file == 'mxnet.states' and order == 'states first':  # a file that lacks what nobody trains, and its shape
            with pytest.raises(ValueError, match='running_mean.*Run one forward pass first'):
                go.load_states(trainer, folder / file, net=net)
            assert untouched(net)
            continue
        go.load_states(trainer, folder / file, net=net)
        if order == 'states first':
            net.load_parameters(str(folder / 'net.params'), ctx=contexts)
        train(net, trainer, 1)
        if len(contexts) == 1:  # save_parameters keeps the mean of the running statistics alone
            assert values(net) == weights
        assert go.states_digest(trainer, net=net) == digest


def test_a_net_alone(saved):
    folder, contexts, _, _ = saved
    net, _ = make(contexts)
    go.load_checkpoint(folder / 'run', net=net)
    batch = mx.nd.ones((1, 2, 4, 4), ctx=contexts[0])
    other, _ = make(contexts)
    other.load_parameters(str(folder / 'net.params'), ctx=contexts)
    if len(contexts) == 1:
        np.testing.assert_array_equal(net(batch).asnumpy(), other(batch).asnumpy())


@pytest.mark.parametrize('change, words', [
    ({'width': 5}, r'0\.weight is float32\[5, 0, 3, 3\], in the file float32\[3, 2, 3, 3\]'),
    ({'head': 7}, r'5\.weight is float32\[7, 0\], in the file float32\[2, 4\]'),
    ({'optimizer': 'novograd'}, "runs 'novograd'")])
def test_what_is_known_of_a_shape_must_agree_and_nothing_changes(saved, change, words):
    folder, contexts, _, _ = saved
    net, trainer = make(contexts, **change)
    for load in (lambda: go.load_checkpoint(folder / 'run', net=net, trainer=trainer),
                 lambda: go.load_states(trainer, folder / 'states', net=net)):
        with pytest.raises(ValueError, match=words):
            load()
        assert untouched(net) and not trainer._optimizer.num_update
    train(net, trainer, 0)  # as if nothing had happened


def test_strict_false_leaves_what_does_not_fit_deferred(saved):
    folder, contexts, _, _ = saved
    net, _ = make(contexts, head=7)
    restored = go.load_checkpoint(folder / 'run', net=net, strict=False)
    assert len(restored.skipped) == 2 and net[5].weight._deferred_init and net[4].weight._data is not None


def test_a_net_that_is_not_initialized(saved):
    folder = saved[0]
    net, _ = make(initialize=False)
    with pytest.raises(ValueError, match=r'Call net\.initialize'):
        go.load_checkpoint(folder / 'run', net=net)


def test_a_second_net_in_one_process_is_matched_without_its_numbers(tmp_path):
    """Names from a bare trainer differ in their numbers; shapes are known in part."""
    net, trainer = make()
    train(net, trainer, 0)
    go.save_states(trainer, tmp_path / 'states')
    other, resumed = make()
    with pytest.warns(UserWarning, match='automatic numbers'):
        go.load_states(resumed, tmp_path / 'states')
    assert go.states_digest(resumed, net=other) == go.states_digest(trainer, net=net)
