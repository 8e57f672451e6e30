"""Clipping, NaN and inf, loss scaling and accumulation on real trainers, against NumPy in float64."""
import contextlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')

from mxnet import autograd, gluon  # noqa: E402
from mxnet.contrib.amp.loss_scaler import LossScaler  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim.mxnet.trainer import export_states, import_states  # noqa: E402

G = go.gradients
NAN, INF = float('nan'), float('inf')
ROOT = Path(__file__).resolve().parent.parent


# Trainers whose gradients are known

class Bilinear(gluon.HybridBlock):
    """The loss is the sum of each parameter times a constant: so the constants are the gradients."""

    def __init__(self, shapes, dtypes, **kwargs):
        super().__init__(prefix='', **kwargs)
        for k, (shape, dtype) in enumerate(zip(shapes, dtypes)):
            setattr(self, f'w{k}', self.params.get(f'w{k}', shape=shape, dtype=dtype, init=mx.init.Normal(0.5)))


def trainer_of(shapes=((3, 4), (5,)), dtypes=None, contexts=1, optimizer='adamw', **arguments):
    net = Bilinear(shapes, dtypes or ['float32'] * len(shapes))
    mx.random.seed(7)
    net.initialize(ctx=[mx.cpu(k) for k in range(contexts)])
    for parameter in net.collect_params().values():  # the same start everywhere
        parameter.set_data(parameter.list_data()[0])
    return gluon.Trainer(net.collect_params(), optimizer, arguments, update_on_kvstore=None if contexts == 1 else False)


def backward(trainer, values, scale=None, skip=()):
    """Let backward make ``values`` the gradients: of each parameter an array, or a list of them, one for each context."""
    losses = []
    with autograd.record():
        for i, (parameter, value) in enumerate(zip(trainer._params, values)):
            if i in skip or parameter.grad_req == 'null':
                continue
            for k, data in enumerate(parameter.list_data()):
                own = value[k] if isinstance(value, list) else value
                own = mx.nd.array(own, ctx=data.context, dtype='float64')
                # through float64, so that what is scaled there is rounded once
                losses.append((data.astype('float64') * own).sum())
    autograd.backward(scale(losses) if scale else losses)


def with_gradients(dtypes=None, contexts=1):
    """A trainer whose gradients are summed over its devices."""
    trainer = trainer_of(dtypes=dtypes, contexts=contexts)
    backward(trainer, values_for(trainer))
    trainer.allreduce_grads()
    return trainer


def gradients_of(trainer, k=0):
    return [parameter.list_grad()[k].asnumpy() for parameter in trainer._params]


def weights_of(trainer, k=0):
    return [parameter.list_data()[k].asnumpy() for parameter in trainer._params]


def norm_of(arrays):
    return math.sqrt(sum((np.asarray(array, 'float64') ** 2).sum() for array in arrays))


def values_for(trainer, seed=0, size=1.0):
    generator = np.random.RandomState(seed)
    return [size * generator.randn(*parameter.shape) for parameter in trainer._params]


@contextlib.contextmanager
def synchronisations(monkeypatch):
    """Counts how often Python waits for a device."""
    spent = {'calls': 0}
    with monkeypatch.context() as patch:
        for owner, name in ((mx.nd.NDArray, 'asnumpy'), (mx.nd.NDArray, 'wait_to_read'), (mx.nd, 'waitall')):
            patch.setattr(owner, name, counted(getattr(owner, name), spent))
        yield spent


def counted(function, spent):
    def call(*args, **kwargs):
        spent['calls'] += 1
        return function(*args, **kwargs)
    return call


# Clipping

@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('contexts', [1, 2])
def test_clipping_by_global_norm(dtype, contexts):
    trainer = with_gradients([dtype] * 2, contexts)
    before = gradients_of(trainer)
    assert norm_of(before) > 1.5
    norm = G.clip_by_global_norm(trainer, 1.5)
    assert isinstance(norm, float) and norm == pytest.approx(norm_of(before), rel=1e-6 if dtype != 'float64' else 1e-14)
    digits = {'float16': 1e-3, 'float32': 1e-6, 'float64': 1e-14}[dtype]
    for k in range(contexts):
        after = gradients_of(trainer, k)
        assert norm_of(after) == pytest.approx(1.5, rel=digits)
        for a, b in zip(after, before):
            np.testing.assert_allclose(a, b.astype('float64') * (1.5 / norm_of(before)), rtol=digits)
    again = gradients_of(trainer)
    assert G.clip_by_global_norm(trainer, 100.0) == pytest.approx(1.5, rel=digits)
    assert all((a == b).all() for a, b in zip(again, gradients_of(trainer)))  # not enlarged


@pytest.mark.parametrize('contexts', [1, 2])
def test_clipping_by_norm_of_each_parameter(contexts):
    trainer = trainer_of(dtypes=['float16', 'float32'], contexts=contexts)
    backward(trainer, [np.full((3, 4), 300.0), np.full(5, 0.1)])
    trainer.allreduce_grads()
    norms = G.clip_by_norm(trainer, 2.0)
    assert norms == {'w0': pytest.approx(300 * contexts * math.sqrt(12)), 'w1': pytest.approx(0.1 * contexts * math.sqrt(5))}
    for k in range(contexts):
        large, small = gradients_of(trainer, k)
        assert norm_of([large]) == pytest.approx(2.0, rel=1e-3)
        assert (small == np.float32(0.1) * np.float32(contexts)).all()


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('contexts', [1, 2])
def test_clipping_by_value(dtype, contexts):
    trainer = with_gradients([dtype] * 2, contexts)
    expected = [np.clip(gradient, np.dtype(dtype).type(-0.1), np.dtype(dtype).type(0.7)) for gradient in gradients_of(trainer)]
    G.clip_by_value(trainer, -0.1, 0.7)
    for k in range(contexts):
        assert all((a == b).all() for a, b in zip(gradients_of(trainer, k), expected))
    assert all(gradient.max() == np.dtype(dtype).type(0.7) for gradient in expected)


def test_one_sided_bounds_and_nan():
    trainer = trainer_of()
    backward(trainer, [np.full((3, 4), -5.0), np.array([NAN, INF, 1, -INF, 3])])
    G.clip_by_value(trainer, -INF, 2)
    a, b = gradients_of(trainer)
    assert (a == -5).all()
    np.testing.assert_array_equal(b, np.array([NAN, 2, 1, -INF, 2], 'float32'))


def test_the_batch_size_states_the_norm_in_the_units_of_the_optimizer():
    trainer = trainer_of(rescale_grad=0.5)
    backward(trainer, values_for(trainer, size=64))
    seen = [0.5 / 32 * gradient for gradient in gradients_of(trainer)]
    assert G.clip_by_global_norm(trainer, 0.25, batch_size=32) == pytest.approx(norm_of(seen), rel=1e-6)
    assert 0.5 / 32 * norm_of(gradients_of(trainer)) == pytest.approx(0.25, rel=1e-6)
    G.clip_by_value(trainer, -0.01, 0.01, batch_size=32)
    assert max(abs(gradient).max() for gradient in gradients_of(trainer)) == pytest.approx(0.01 * 32 / 0.5)
    assert max(G.clip_by_norm(trainer, 1e-3, batch_size=32).values()) > 1e-3
    assert [0.5 / 32 * norm_of([gradient]) for gradient in gradients_of(trainer)] == pytest.approx([1e-3] * 2, rel=1e-6)


def test_squares_that_float16_and_float32_cannot_hold():
    trainer = trainer_of(((100, 100), (4,), (3,)), ['float16', 'float32', 'float64'])
    backward(trainer, [np.full((100, 100), 300.0), np.full(4, 1e25), np.full(3, 1e30)])
    expected = norm_of(gradients_of(trainer))
    assert G.clip_by_global_norm(trainer, 1.0) == pytest.approx(expected, rel=1e-6)
    trainer = trainer_of(((100, 100), (4,)), ['float16', 'float32'])
    backward(trainer, [np.full((100, 100), 6e4), np.full(4, 1e25)])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert G.clip_by_norm(trainer, 1e-3) == {'w0': pytest.approx(100 * 6e4, rel=1e-3), 'w1': pytest.approx(2e25)}
    # 1e-3 / 6e6 is 0 in float16
    assert [norm_of([gradient]) for gradient in gradients_of(trainer)] == pytest.approx([1e-3, 1e-3], rel=0.01)


def test_a_long_gradient_keeps_its_digits():
    """A float32 sum over all elements would be 6e-5 off, mx.nd.multi_sum_sq 0.01."""
    trainer = trainer_of(((3, 1_000_003), (1,)))
    backward(trainer, [np.random.RandomState(0).rand(3, 1_000_003), np.ones(1)])
    before = norm_of(gradients_of(trainer))
    assert G.clip_by_global_norm(trainer, 10.0) == pytest.approx(before, rel=1e-7)
    assert norm_of(gradients_of(trainer)) == pytest.approx(10.0, rel=1e-6)


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='Linux tells the largest size of a process')
def test_no_temporaries_of_the_size_of_the_weights():
    """In a process of its own, which knows its largest size: 100 MB of gradients, clipped in float32 and float16."""
    code = (Path(__file__).parent / 'gradient_memory.py').read_text()
    for dtype, function in (('float32', 'clip_by_global_norm'), ('float16', 'clip_by_global_norm'), ('float16', 'clip_by_norm'),
                            ('float32', 'find_nonfinite'), ('float32', 'Scaler')):
        done = subprocess.run([sys.executable, '-c', code, dtype, function], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) < 8, (dtype, function)  # MB


def test_convolutions_whose_gradients_have_another_layout():
    """oneDNN permutes arrays in place: norms and products must not see that."""
    mx.random.seed(0)
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Conv2D(32, 3, in_channels=16), gluon.nn.BatchNorm(in_channels=32), gluon.nn.Conv2D(32, 3, in_channels=32))
    net.initialize()
    net.hybridize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd')
    x = mx.nd.random.normal(shape=(8, 16, 12, 12))

    def run():
        with autograd.record():
            loss = (net(x) ** 2).sum()
        loss.backward()

    trained = [parameter for parameter in trainer._params if parameter.grad_req != 'null']
    run()
    expected = [parameter.grad().asnumpy().astype('float64') for parameter in trained]
    run()
    norm = G.clip_by_global_norm(trainer, 1.0)  # nothing has looked at the gradients before
    assert norm == pytest.approx(norm_of(expected), rel=1e-5)
    for parameter, gradient in zip(trained, expected):
        np.testing.assert_allclose(parameter.grad().asnumpy(), gradient / norm_of(expected), rtol=1e-3, atol=1e-7)


def test_frozen_and_unused_parameters_are_left_out():
    trainer = trainer_of(((2,), (2,), (2,)))
    trainer._params[1].grad_req = 'null'
    backward(trainer, [np.full(2, 3.0), np.zeros(2), np.full(2, 100.0)], skip=(1,))
    trainer.update(1)
    backward(trainer, [np.full(2, 3.0), np.zeros(2), np.zeros(2)], skip=(1, 2))  # the 100 of the third are stale
    assert G.clip_by_global_norm(trainer, 1.0) == pytest.approx(math.sqrt(18))
    assert (trainer._params[2].grad().asnumpy() == 100).all()
    assert set(G.clip_by_norm(trainer, 1.0)) == {'w0'}
    trainer.update(1, ignore_stale_grad=True)


def test_accumulated_gradients_are_clipped_as_they_are():
    trainer = trainer_of(((2,),))
    trainer._params[0].grad_req = 'add'
    for _ in range(3):
        with autograd.record():
            loss = (trainer._params[0].data() * mx.nd.array([1, 0])).sum()
        loss.backward()
    assert G.clip_by_global_norm(trainer, 2.0) == 3.0
    assert gradients_of(trainer)[0].tolist() == [2.0, 0.0]


def sparse_trainer(optimizer='sgd', contexts=1, dtype='float32'):
    net = gluon.nn.HybridSequential(prefix='')
    net.add(gluon.nn.Embedding(10, 3, sparse_grad=True, dtype=dtype, prefix='embed_'))
    net.initialize(mx.init.One(), ctx=[mx.cpu(k) for k in range(contexts)])
    return net, gluon.Trainer(net.collect_params(), optimizer, {'learning_rate': 1.0},
                              update_on_kvstore=None if contexts == 1 else False)


@pytest.mark.parametrize('contexts', [1, 2])
def test_row_sparse_gradients(contexts):
    net, trainer = sparse_trainer(contexts=contexts)

    def run(factor):
        with autograd.record():
            losses = [(net(mx.nd.array([1, 4, 4], ctx=mx.cpu(k))) * factor).sum() for k in range(contexts)]
        autograd.backward(losses)
        trainer.allreduce_grads()

    run(1.0)
    expected = contexts * math.sqrt(3 + 3 * 4)
    assert G.clip_by_global_norm(trainer, 1.0) == pytest.approx(expected, rel=1e-5)
    gradient = trainer._params[0].list_grad()[-1]
    assert gradient.stype == 'row_sparse'
    assert norm_of([gradient.asnumpy()]) == pytest.approx(1.0, rel=1e-5) and gradient.asnumpy()[0].tolist() == [0, 0, 0]
    trainer.update(1)
    np.testing.assert_allclose(net[0].weight.data().asnumpy()[4], 1 - 2 * contexts / expected, rtol=1e-5)
    run(1.0)
    G.clip_by_value(trainer, -1, 1)
    assert trainer._params[0].list_grad()[-1].asnumpy()[[1, 4, 5]].tolist() == [[1] * 3, [1] * 3, [0] * 3]
    with pytest.raises(ValueError, match=r'row_sparse.*embed_weight'):
        G.clip_by_value(trainer, 0.5, 1)
    assert G.find_nonfinite(trainer) == {}
    trainer.update(1)
    run(INF)
    assert G.find_nonfinite(trainer) == {'embed_weight': 'inf'}
    scaler = G.Scaler(trainer)
    before = net[0].weight.data().asnumpy()
    scaler.scale([mx.nd.ones(1)])
    assert not scaler.step(1)
    assert (net[0].weight.data().asnumpy() == before).all()


def test_numpy_arrays():
    """Parameters of a net in `npx.set_np` mode, in a process of its own."""
    code = '''
import mxnet as mx, gluon_optim as go
mx.npx.set_np()
net = mx.gluon.nn.Dense(1, in_units=2, use_bias=False)
net.initialize()
trainer = mx.gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 1.0})
accumulate, scaler = go.gradients.Accumulate(trainer, 2), go.gradients.Scaler(trainer)
for _ in range(2):
    with mx.autograd.record():
        loss = net(mx.np.array([[3, 4]])).sum()
    scaler.scale(loss).backward()
    print(accumulate.step(1, lambda: print(go.gradients.clip_by_global_norm(trainer, 1.0), go.gradients.clip_by_norm(trainer, .5),
                                           go.gradients.clip_by_value(trainer, -.3, .3), go.gradients.find_nonfinite(trainer))))
print(net.weight.grad() / 65536, scaler.loss_scale)
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ['False', "10.0 {'dense0_weight': 1.0} None {}", 'True', '[[0.3 0.3]] 65536.0']


# One clear error

@pytest.mark.parametrize('wrong', [0, -1.0, NAN, 'one', None, True])
@pytest.mark.parametrize('function', ['clip_by_global_norm', 'clip_by_norm'])
def test_a_max_norm_that_is_none(function, wrong):
    trainer = trainer_of()
    backward(trainer, values_for(trainer))
    with pytest.raises(ValueError, match=r'`max_norm` must be a number above 0. Received: max_norm='):
        getattr(G, function)(trainer, wrong)
    with pytest.raises(ValueError, match='`batch_size` must be a number above 0'):
        getattr(G, function)(trainer, 1.0, batch_size=0 if wrong is None else wrong)


@pytest.mark.parametrize('low, high', [(1, -1), (NAN, 1), (0, NAN), ('0', 1), (None, 1)])
def test_bounds_that_are_none(low, high):
    trainer = trainer_of()
    backward(trainer, values_for(trainer))
    with pytest.raises(ValueError, match='low <= high'):
        G.clip_by_value(trainer, low, high)


CALLS = {'clip_by_value': (-1, 1), 'clip_by_global_norm': (1.0,), 'clip_by_norm': (1.0,)}


@pytest.mark.parametrize('function', CALLS)
def test_no_gradient(function):
    clip = getattr(G, function)
    trainer = trainer_of()
    with pytest.raises(ValueError, match='There must be gradients.*since the last update'):
        clip(trainer, *CALLS[function])
    backward(trainer, values_for(trainer))
    clip(trainer, *CALLS[function])
    trainer.update(1)
    with pytest.raises(ValueError, match='since the last update.*backward'):  # after the step, too
        clip(trainer, *CALLS[function])
    for parameter in trainer._params:
        parameter.grad_req = 'null'
    for call in (clip, lambda trainer, *_: G.find_nonfinite(trainer)):
        with pytest.raises(ValueError, match='grad_req="null"'):
            call(trainer, *CALLS[function])
    net = gluon.nn.Dense(2, use_bias=False)
    net.initialize()
    for call in (clip, lambda trainer, *_: G.find_nonfinite(trainer)):
        with pytest.raises(ValueError, match='shapes of parameters are not known yet'):
            call(gluon.Trainer(net.collect_params(), 'sgd'), *CALLS[function])
    with pytest.raises(TypeError, match='gluon.Trainer'):
        clip(net, *CALLS[function])


@pytest.mark.parametrize('function', CALLS)
def test_gradients_that_were_not_summed_over_the_devices(function):
    trainer = trainer_of(contexts=2)
    values = values_for(trainer)
    backward(trainer, [[value, 2 * value] for value in values])
    before = gradients_of(trainer, 0), gradients_of(trainer, 1)
    with pytest.raises(ValueError, match=r"different ones of 'w0', 'w1'.*allreduce_grads"):
        getattr(G, function)(trainer, *CALLS[function])
    assert all((a == b).all() for k in (0, 1) for a, b in zip(before[k], gradients_of(trainer, k)))
    trainer.allreduce_grads()
    getattr(G, function)(trainer, *CALLS[function])


@pytest.mark.parametrize('function', CALLS)
def test_a_trainer_that_updates_on_its_kvstore(function):
    trainer = trainer_of(contexts=2)
    trainer._kvstore_params['update_on_kvstore'] = None  # MXNet's default, which means True on several devices
    backward(trainer, values_for(trainer))
    with pytest.raises(ValueError, match='Create it with update_on_kvstore=False'):
        getattr(G, function)(trainer, *CALLS[function])
    scaler = G.Scaler(trainer)
    backward(trainer, values_for(trainer), scaler.scale)
    with pytest.raises(ValueError, match='Create it with update_on_kvstore=False'):
        scaler.step(1)
    with pytest.raises(ValueError, match='Create it with update_on_kvstore=False'):
        trainer.step(1)
    with pytest.raises(ValueError, match='Create it with update_on_kvstore=False'):
        G.Accumulate(trainer, 1)
    trainer._kvstore_params['update_on_kvstore'] = True
    with pytest.raises(ValueError, match='Create it with update_on_kvstore=False'):
        G.Scaler(trainer)


# NaN and inf

@pytest.mark.filterwarnings('ignore:adamw updates float16')
@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('contexts', [1, 2])
def test_nan_and_inf_are_told_apart(dtype, contexts):
    trainer = trainer_of(((4,),) * 5, [dtype] * 5, contexts)
    values = [np.array(value) for value in ([1, 2, 3, 4], [1, NAN, 3, 4], [INF, 2, 3, 4], [INF, NAN, 1, 1], [0, -INF, 0, 0])]
    expected = {'w1': 'nan', 'w2': 'inf', 'w3': 'nan', 'w4': 'inf'}
    backward(trainer, values)
    assert G.find_nonfinite(trainer) == expected
    trainer.allreduce_grads()
    assert G.find_nonfinite(trainer) == expected
    trainer.update(1)
    assert G.find_nonfinite(trainer) == expected  # gradients that were used already


def test_the_second_device_alone_has_the_nan():
    trainer = trainer_of(contexts=2)
    backward(trainer, [[np.ones((3, 4)), np.ones((3, 4))], [np.ones(5), np.full(5, NAN)]])
    assert G.find_nonfinite(trainer) == {'w1': 'nan'}


@pytest.mark.filterwarnings('ignore:adamw updates float16')
def test_large_values_are_not_infinite():
    trainer = trainer_of(((2,), (2,), (2,)), ['float16', 'float32', 'float64'])
    backward(trainer, [np.full(2, 65504.0), np.full(2, 3e38), np.full(2, 1e300)])
    assert G.find_nonfinite(trainer) == {}
    scaler = G.Scaler(trainer, init_scale=1)
    backward(trainer, [np.full(2, 65504.0), np.full(2, 3e38), np.full(2, 1e300)], scaler.scale)
    assert scaler.step(1)


@pytest.mark.parametrize('function', ['clip_by_global_norm', 'clip_by_norm'])
def test_what_is_not_finite_is_not_clipped(function):
    trainer = trainer_of(((2,), (2,), (2,)))
    values = [np.array([3.0, 4.0]), np.array([NAN, 1]), np.array([INF, 1])]
    backward(trainer, values)
    with pytest.warns(UserWarning, match="not clipped: NaN in 'w1', inf in 'w2'"):
        norm = getattr(G, function)(trainer, 1.0)
    if function == 'clip_by_norm':
        assert norm['w0'] == 5 and math.isnan(norm['w1']) and norm['w2'] == INF
        values[0] = values[0] / 5
    else:
        assert math.isnan(norm)
    for gradient, value in zip(gradients_of(trainer), values):
        np.testing.assert_allclose(gradient, value, rtol=1e-6)


@pytest.mark.parametrize('contexts', [1, 2])
@pytest.mark.parametrize('function, arguments', [
    ('clip_by_value', (-0.1, 0.1)), ('clip_by_global_norm', (0.1,)), ('clip_by_norm', (0.1,)), ('find_nonfinite', ())])
def test_one_synchronisation_per_call(monkeypatch, function, arguments, contexts):
    trainer = trainer_of(((3, 4), (5,), (100_000,), (7, 2), (3,)) * 3, ['float32', 'float16', 'float32', 'float64', 'float32'] * 3,
                         contexts)
    values = values_for(trainer)
    backward(trainer, values)
    trainer.allreduce_grads()
    with synchronisations(monkeypatch) as spent:
        getattr(G, function)(trainer, *arguments)
    assert spent['calls'] == (0 if function == 'clip_by_value' and contexts == 1 else 1)
    values[4][0], values[8][0] = NAN, INF
    backward(trainer, values)
    trainer.allreduce_grads()
    with synchronisations(monkeypatch) as spent, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        getattr(G, function)(trainer, *arguments)
    assert spent['calls'] <= (2 if 'norm' in function else 1)  # a second time to see whether only the square is infinite


@pytest.mark.parametrize('contexts', [1, 2])
def test_one_synchronisation_per_step_of_a_scaler(monkeypatch, contexts):
    trainer = trainer_of(((3,),) * 450, contexts=contexts, optimizer='sgd')  # MXNet's sgd does not wait
    scaler = G.Scaler(trainer)
    trainer.optimizer.__class__ = mx.optimizer.SGD
    for bad in (False, True):
        values = values_for(trainer)
        if bad:
            values[-1][0] = INF
        backward(trainer, values, scaler.scale)
        with synchronisations(monkeypatch) as spent:
            scaler.unscale()
        assert spent['calls'] == 1
        for function in (G.clip_by_global_norm, G.clip_by_norm):
            with synchronisations(monkeypatch) as spent:
                function(trainer, 1.0)
            assert spent['calls'] == 1
        with synchronisations(monkeypatch) as spent:
            assert scaler.step(1) is not bad
            scaler.update()
        assert spent['calls'] == 0


# Loss scaling

OPTIMIZERS = {
    'adamw': dict(learning_rate=0.1, epsilon=0.3, wd=0.1),          # an epsilon that is felt
    'novograd': dict(learning_rate=0.1, epsilon=0.3),
    'sgd': dict(learning_rate=0.125, momentum=0.875, wd=0.125),
    'lamb': dict(learning_rate=0.1, epsilon=0.3),
    'nag': dict(learning_rate=0.1, momentum=0.9, clip_gradient=0.0015),
}


def medium_values(trainer, seed):
    """From 1/32 to 1/16: times 65536 float16 can hold them and their sums, and none of them loses digits."""
    generator = np.random.RandomState(seed)
    return [generator.choice([-1, 1], parameter.shape) * generator.uniform(1 / 32, 1 / 16, parameter.shape)
            for parameter in trainer._params]


def run(optimizer, scale, contexts=1, dtype='float32', clip=None, native=False):
    arguments = dict(OPTIMIZERS[optimizer], multi_precision=dtype == 'float16')
    create = mx.optimizer.create if native else go.create
    trainer = trainer_of(dtypes=[dtype] * 2, contexts=contexts, optimizer=create(optimizer, **arguments))
    scaler = G.Scaler(trainer, init_scale=scale, scale_factor=1, backoff_factor=1)
    norms = []
    for step in range(6):
        values = [[value, 0.5 * value] if contexts == 2 else value for value in medium_values(trainer, step)]
        backward(trainer, values, scaler.scale)
        if clip:
            scaler.unscale()
            norms.append(getattr(G, clip[0])(trainer, *clip[1:]))
        assert scaler.step(32)
        scaler.update()
    assert trainer._scale == 1  # a step of the trainer alone is as ever
    return trainer, norms


CLIPS = [None, ('clip_by_global_norm', 0.1), ('clip_by_norm', 0.08), ('clip_by_value', -0.04, 0.05),
         ('clip_by_global_norm', 0.1 / 32, 32)]


@pytest.mark.parametrize('native', [False, True], ids=['ours', 'mxnet'])
@pytest.mark.parametrize('clip', CLIPS, ids=str)
@pytest.mark.parametrize('contexts', [1, 2])
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_the_same_update_with_loss_scale_1_and_65536(optimizer, dtype, contexts, clip, native):
    """Bit for bit, because powers of two change no digits."""
    if native and optimizer in ('adamw', 'novograd'):
        return  # not among the optimizers of MXNet
    one, plain = run(optimizer, 1, contexts, dtype, clip, native)
    other, scaled = run(optimizer, 65536, contexts, dtype, clip, native)
    assert plain == scaled
    for k in range(contexts):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(weights_of(one, k), weights_of(other, k)))
    assert go.states_digest(one) == go.states_digest(other)
    assert export_states(one).hypers == export_states(other).hypers
    if clip:  # and it was felt
        assert any((a != b).any() for a, b in zip(weights_of(one), weights_of(run(optimizer, 1, contexts, dtype, None, native)[0])))


@pytest.mark.parametrize('contexts', [1, 2])
def test_the_scaled_and_clipped_update_is_that_of_numpy(contexts):
    trainer, norms = run('sgd', 65536, contexts, 'float64', ('clip_by_global_norm', 0.1))
    reference = trainer_of(dtypes=['float64'] * 2, contexts=contexts)
    weights, moments = weights_of(reference), [0, 0]
    for step in range(6):
        sums = [value * (1.5 if contexts == 2 else 1) for value in medium_values(reference, step)]
        assert norms[step] == pytest.approx(norm_of(sums), rel=1e-12)
        for i, g in enumerate(sums):
            g = g * min(1, 0.1 / norm_of(sums)) / 32
            moments[i] = 0.875 * moments[i] - 0.125 * (g + 0.125 * weights[i])
            weights[i] = weights[i] + moments[i]
    for k in range(contexts):
        for a, b in zip(weights_of(trainer, k), weights):
            np.testing.assert_allclose(a, b, rtol=1e-12)


def test_a_scale_keeps_what_float16_would_lose():
    def after(scale):
        trainer = trainer_of(((4,),), ['float16'], optimizer=go.create('sgd', learning_rate=1e6, multi_precision=True))
        scaler = G.Scaler(trainer, init_scale=scale)
        start = weights_of(trainer)[0]
        backward(trainer, [np.full(4, 1e-8)], scaler.scale)  # 0 in float16
        scaler.step(1)
        return weights_of(trainer)[0] - start

    assert (after(1) == 0).all()
    np.testing.assert_allclose(after(65536), -1e-2, rtol=0.05)


class Counted(mx.lr_scheduler.LRScheduler):
    """A schedule that notes when it was asked."""

    def __init__(self, asked=()):
        super().__init__(base_lr=0.1)
        self.asked = list(asked)

    def __call__(self, num_update):
        self.asked.append(num_update)
        return self.base_lr / num_update

    def get_config(self):
        return {'asked': self.asked}

    def set_config(self, config):
        self.asked = list(config['asked'])


def training(contexts=1, dtype='float32', optimizer='adamw', **options):
    optimizer = go.create(optimizer, lr_scheduler=Counted(), multi_precision=dtype == 'float16')
    trainer = trainer_of(((3, 4), (5,), (2,)), [dtype] * 3, contexts, optimizer)
    trainer._params[2].grad_req = 'null'  # frozen, or a running mean
    scaler = G.Scaler(trainer, **{'init_scale': 1024, **options})
    for step in range(3):
        backward(trainer, values_for(trainer, step), scaler.scale)
        scaler.step(4)
        scaler.update()
    return trainer, scaler


def everything(trainer):
    return (go.states_digest(trainer), trainer.optimizer.num_update, trainer.optimizer.update_counts(),
            list(trainer.optimizer.lr_scheduler.asked), [array.tobytes() for array in weights_of(trainer)],
            trainer.optimizer.lr)


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('contexts', [1, 2])
@pytest.mark.parametrize('bad', [NAN, INF])
def test_what_happens_to_a_step_that_is_not_finite(contexts, dtype, bad):
    for nonfinite in ('skip', 'raise', 'ignore'):
        trainer, scaler = training(contexts, dtype)
        before = everything(trainer)
        values = values_for(trainer)
        values[1][2] = bad
        backward(trainer, [[value, np.zeros_like(value)][:contexts] for value in values], scaler.scale)
        if nonfinite == 'raise':
            word = 'NaN' if math.isnan(bad) else 'inf'
            with pytest.raises(G.NonfiniteGradients, match=f"{word} in 'w1', at loss scale 1024") as caught:
                scaler.step(4, nonfinite='raise')
            assert caught.value.parameters == {'w1': 'nan' if math.isnan(bad) else 'inf'}
        else:
            assert scaler.step(4, nonfinite=nonfinite) is (nonfinite == 'ignore')
        scaler.update()
        assert scaler.loss_scale == 512 and scaler.state_dict()['unskipped'] == 0
        if nonfinite == 'ignore':
            assert trainer.optimizer.num_update == 4 and not np.isfinite(weights_of(trainer)[1]).all()
            continue
        assert everything(trainer) == before
        backward(trainer, values_for(trainer, 9), scaler.scale)  # and the run continues
        assert scaler.step(4)
        scaler.update()
        assert trainer.optimizer.num_update == 4 and np.isfinite(weights_of(trainer)[1]).all()


def test_a_sum_over_devices_that_overflows_is_found():
    trainer = trainer_of(((2,),), ['float16'], 2, go.create('adamw', multi_precision=True))
    scaler = G.Scaler(trainer, init_scale=1)
    backward(trainer, [np.full(2, 40000.0)], scaler.scale)
    assert G.find_nonfinite(trainer) == {}
    assert not scaler.step(1)


def test_the_gradients_of_a_skipped_step_are_not_used_later():
    trainer = trainer_of(((2,), (2,)), optimizer=go.create('sgd', learning_rate=1.0))
    scaler = G.Scaler(trainer)
    backward(trainer, [np.ones(2), np.full(2, INF)], scaler.scale)
    assert not scaler.step(1)
    scaler.update()
    second = weights_of(trainer)[1]
    backward(trainer, [np.ones(2), np.zeros(2)], scaler.scale, skip=(1,))
    assert scaler.step(1, ignore_stale_grad=True)
    assert (weights_of(trainer)[1] == second).all()
    scaler.update()
    backward(trainer, [np.ones(2), np.zeros(2)], scaler.scale, skip=(1,))
    with pytest.raises(UserWarning, match='w1'):  # MXNet's own
        scaler.step(1)
    assert scaler.step(1, ignore_stale_grad=True)  # a step that has raised an error can be made again


@pytest.mark.parametrize('policy', ['skip', 'ignore'])
def test_clipping_says_nothing_where_the_scaler_decides(policy):
    trainer, scaler = training()
    values = values_for(trainer)
    values[0][0] = INF
    backward(trainer, values, scaler.scale)
    scaler.unscale()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert G.clip_by_global_norm(trainer, 1.0) == INF
    assert scaler.step(4, nonfinite=policy) is (policy == 'ignore')


def test_the_scale_grows_and_falls():
    trainer = trainer_of(((2,),))
    scaler = G.Scaler(trainer, init_scale=8, scale_factor=4, backoff_factor=0.5, scale_window=3, max_scale=64, min_scale=1)

    def step(value):
        backward(trainer, [np.full(2, value)], scaler.scale)
        scaler.step(1)
        scaler.update()
        return scaler.loss_scale

    assert [step(v) for v in (1, 1, 1, 1, 1, INF, 1, 1, 1, 1, 1, 1)] == [8, 8, 32, 32, 32, 16, 16, 16, 64, 64, 64, 64]
    assert [step(INF) for _ in range(6)] == [32, 16, 8, 4, 2, 1]
    with pytest.raises(ValueError, match=r'must not fall below min_scale=1\b.*find_nonfinite'):
        step(INF)
    assert step(1) == 1 and 'loss_scale=1, 1 of 3' in repr(scaler)


def test_the_scale_is_that_of_pytorch():
    torch = pytest.importorskip('torch')
    finite = np.random.RandomState(4).rand(120) > 0.15
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, theirs = torch.optim.SGD([weight], lr=0.0), torch.amp.GradScaler('cpu', 64.0, 2.0, 0.5, 5)
    trainer = trainer_of(((2,),))
    ours = G.Scaler(trainer, 64.0, 2.0, 0.5, 5)
    for good in finite:
        optimizer.zero_grad()
        theirs.scale((weight * (1.0 if good else INF)).sum()).backward()
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        backward(trainer, [np.full(2, 1.0 if good else INF)], ours.scale)
        ours.unscale()
        assert ours.step(1) == good
        ours.update()
        assert (ours.loss_scale, ours.state_dict()['unskipped']) == (theirs.get_scale(), theirs.state_dict()['_growth_tracker'])


@pytest.mark.parametrize('max_norm', [0.5, 3.0, 100.0])
def test_the_clipped_gradients_are_those_of_pytorch(max_norm):
    torch = pytest.importorskip('torch')
    trainer = trainer_of()
    backward(trainer, values_for(trainer))
    weights = [torch.nn.Parameter(torch.zeros(gradient.shape)) for gradient in gradients_of(trainer)]
    for weight, gradient in zip(weights, gradients_of(trainer)):
        weight.grad = torch.tensor(gradient)
    norm = torch.nn.utils.clip_grad_norm_(weights, max_norm)
    assert G.clip_by_global_norm(trainer, max_norm) == pytest.approx(norm.item(), rel=1e-6)
    for weight, gradient in zip(weights, gradients_of(trainer)):
        np.testing.assert_allclose(gradient, weight.grad.numpy(), rtol=5e-6)


def test_a_scale_above_the_limit_stays():
    """From a file of PyTorch, whose scale has none."""
    trainer = trainer_of(((2,),))
    scaler = G.Scaler(trainer, scale_window=1)
    scaler.load_state_dict({'loss_scale': 2.0 ** 30, 'unskipped': 0})
    backward(trainer, [np.full(2, 1e-6)], scaler.scale)
    scaler.step(1)
    scaler.update()
    assert scaler.loss_scale == 2 ** 30


def test_the_order_of_a_step():
    trainer = trainer_of()
    scaler = G.Scaler(trainer)
    wrong = {'idle': ('unscale', 'step', 'update'), 'scaled': ('update',), 'unscaled': ('unscale', 'update', 'scale'),
             'stepped': ('scale', 'unscale', 'step')}
    calls = {'unscale': scaler.unscale, 'step': lambda: scaler.step(1), 'update': scaler.update,
             'scale': lambda: scaler.scale(mx.nd.ones(1))}

    def refused(phase):
        for name in wrong[phase]:
            with pytest.raises(ValueError, match=rf'scale, backward, unscale, clip, step, update. Received: {name}\(\) after'):
                calls[name]()

    refused('idle')
    backward(trainer, values_for(trainer), scaler.scale)
    refused('scaled')
    with pytest.raises(ValueError, match=r'scaler.unscale\(\) first'):
        G.clip_by_global_norm(trainer, 1.0)
    scaler.unscale()
    refused('unscaled')
    G.clip_by_global_norm(trainer, 1.0)
    with pytest.raises(ValueError, match="one of 'skip', 'raise', 'ignore'"):
        scaler.step(1, nonfinite='nothing')
    scaler.step(1)
    refused('stepped')
    scaler.update()
    scaler.scale(mx.nd.ones(1))
    with pytest.raises(ValueError, match='There must be gradients'):  # no backward
        scaler.step(1)


def test_several_losses_and_backward_outside_of_record():
    trainer = trainer_of(((2,),))
    scaler = G.Scaler(trainer, init_scale=8)
    with autograd.record():
        a, b = (trainer._params[0].data() * 2).sum(), (trainer._params[0].data() * 3).sum()
    scaled = scaler.scale((a, b))
    assert isinstance(scaled, tuple) and isinstance(scaler.scale([a]), list) and not autograd.is_recording()
    autograd.backward(list(scaled))
    assert gradients_of(trainer)[0].tolist() == [40, 40]


@pytest.mark.parametrize('loss, error, words', [
    (1.0, TypeError, 'array of MXNet'), ([mx.nd.ones(1), None], TypeError, 'NoneType'),
    (mx.nd.ones(1, dtype='float16'), ValueError, 'float16.*astype'), (mx.nd.ones(1, dtype='int32'), ValueError, 'int32')])
def test_losses_that_cannot_be_scaled(loss, error, words):
    scaler = G.Scaler(trainer_of())
    with pytest.raises(error, match=words):
        scaler.scale(loss)
    assert scaler._phase == 'idle'


@pytest.mark.parametrize('wrong', [
    dict(init_scale=0), dict(init_scale=INF), dict(scale_factor=0.5), dict(backoff_factor=0), dict(backoff_factor=2),
    dict(scale_window=0), dict(scale_window=1.5), dict(min_scale=4, init_scale=2), dict(max_scale=2), dict(init_scale=NAN)])
def test_arguments_of_a_scaler(wrong):
    trainer = trainer_of()
    with pytest.raises(ValueError, match='Received'):
        G.Scaler(trainer, **wrong)
    assert not hasattr(trainer, '_amp_loss_scaler')


@pytest.mark.parametrize('contexts', [1, 2])
@pytest.mark.parametrize('early', [False, True])
def test_gradients_are_summed_over_devices_once(contexts, early):
    """Whoever calls allreduce_grads: also where the gradients of the devices are the same, so that nothing shows it."""
    trainer = trainer_of(((2,),), contexts=contexts)
    scaler = G.Scaler(trainer, init_scale=1)
    for _ in range(2):
        backward(trainer, [np.ones(2)], scaler.scale)
        if early:
            trainer.allreduce_grads()
        scaler.unscale()
        assert gradients_of(trainer)[0].tolist() == [contexts] * 2
        if contexts == 2:
            with pytest.raises(ValueError, match='summed over the devices once'):
                trainer.allreduce_grads()
            with pytest.raises(ValueError, match='summed over the devices once'):
                trainer.step(1)
        scaler.step(1)
        scaler.update()


class OfTwoProcesses(gluon.Trainer):
    """Sums in its own way, as Horovod's trainer does: here over two processes with equal gradients."""

    def _allreduce_grads(self):
        for parameter in self._params:
            gradient = parameter.grad()
            gradient *= 2


def test_gradients_are_summed_over_processes_once():
    trainer = OfTwoProcesses(trainer_of(((2,),))._params, 'adamw')
    scaler = G.Scaler(trainer, init_scale=1)
    backward(trainer, [np.ones(2)], scaler.scale)
    scaler.unscale()
    with pytest.raises(ValueError, match='summed over the devices once'):
        trainer.step(1)
    assert gradients_of(trainer)[0].tolist() == [2, 2]


@pytest.mark.parametrize('contexts', [1, 2])
def test_a_step_of_the_trainer_itself(contexts):
    """trainer.step after scale, as AMP has it: skips, adapts, and updates by the gradient without the scale."""
    trainer, other = (trainer_of(contexts=contexts, optimizer=go.create('sgd', learning_rate=1.0)) for _ in range(2))
    scaler = G.Scaler(trainer, init_scale=1024)
    for step, size in enumerate((1.0, INF, 1.0)):
        backward(trainer, values_for(trainer, step, size), scaler.scale)
        trainer.step(4)
        if size == 1:
            backward(other, values_for(other, step, size))
            other.step(4)
    assert scaler.loss_scale == 512 and scaler.state_dict()['unskipped'] == 1
    backward(trainer, values_for(trainer))  # and one without a scale
    trainer.step(4)
    backward(other, values_for(other))
    other.step(4)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(weights_of(trainer), weights_of(other)))
    assert scaler.state_dict()['unskipped'] == 1 and trainer.optimizer.num_update == 3


def test_clipping_under_the_scaler_of_amp():
    """amp.scale_loss sets the same attributes, so the norm is that of the gradient without the scale there too."""
    trainer = trainer_of(((2,),), optimizer=go.create('sgd', learning_rate=1.0))
    trainer._amp_loss_scaler, trainer._amp_original_scale = LossScaler(), trainer._scale  # as amp.init_trainer does
    start = weights_of(trainer)[0]
    trainer._scale = trainer._amp_original_scale / 65536                                  # as amp.scale_loss does
    with autograd.record():
        scaled = (trainer._params[0].data() * mx.nd.array([3, 4])).sum() * 65536
    scaled.backward()
    assert G.clip_by_global_norm(trainer, 1.0) == 5.0
    trainer.update(1)
    np.testing.assert_allclose(start - weights_of(trainer)[0], [0.6, 0.8], rtol=1e-5)


def test_amp_itself():
    """`amp.init` changes MXNet's operators for the whole process: hence one of its own."""
    script = Path(__file__).parent / 'amp_runs.py'
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found['scale'] == [65536.0, 65536.0, 32768.0, 32768.0]
    assert found['updates'] == [1, 2, 2, 3]
    assert found['ours'] == found['amp'] and found['replaced'] == 'another loss scaler'


def test_the_last_scaler_counts():
    trainer = trainer_of()
    first, second = G.Scaler(trainer), G.Scaler(trainer)
    with pytest.raises(ValueError, match='another loss scaler'):
        first.scale(mx.nd.ones(1))
    backward(trainer, values_for(trainer), second.scale)
    assert second.step(1)


# Accumulation

def loss_of(net, x, y):
    return gluon.loss.SoftmaxCrossEntropyLoss()(net(x), y)


def classifier(contexts=1, deferred=False):
    mx.random.seed(3)
    net = gluon.nn.HybridSequential(prefix='')
    net.add(gluon.nn.Dense(8, in_units=0 if deferred else 6, activation='tanh', prefix='a_'),
            gluon.nn.Dense(4, in_units=8, prefix='b_'))
    net.initialize(mx.init.Constant(0.1), ctx=[mx.cpu(k) for k in range(contexts)])  # the same in whatever order
    net[1].weight.set_data(mx.nd.random.normal(shape=(4, 8)))
    net.hybridize()
    return net


def batches(number, size=8, seed=0):
    generator = np.random.RandomState(seed)
    return [(generator.randn(size, 6).astype('float32'), generator.randint(0, 4, size)) for _ in range(number)]


def backward_of(net, trainer, x, y, scaler=None):
    parts = zip(*(gluon.utils.split_and_load(mx.nd.array(a), trainer._contexts) for a in (x, y)))
    with autograd.record():
        losses = [loss_of(net, *part) for part in parts]
    autograd.backward(scaler.scale(losses) if scaler else losses)


def trainer_for(net, optimizer='adamw', contexts=1, **arguments):
    return gluon.Trainer(net.collect_params(), go.create(optimizer, **arguments),
                         update_on_kvstore=None if contexts == 1 else False)


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('clipped', [False, True])
@pytest.mark.parametrize('contexts', [1, 2])
@pytest.mark.parametrize('deferred', [False, True])
def test_accumulated_batches_are_one_large_batch(contexts, clipped, scaled, deferred):
    data = batches(8)
    net = classifier(contexts, deferred=deferred)
    trainer = trainer_for(net, contexts=contexts, learning_rate=0.05, lr_scheduler=mx.lr_scheduler.FactorScheduler(1, 0.5))
    accumulate = G.Accumulate(trainer, 4)
    scaler = G.Scaler(trainer) if scaled else None
    norms, updated = [], []
    for x, y in data:
        backward_of(net, trainer, x, y, scaler)
        updated.append(accumulate.step(len(x), (lambda: norms.append(G.clip_by_global_norm(trainer, 2.0))) if clipped else None))
    assert updated == [False, False, False, True] * 2
    assert trainer.optimizer.num_update == 2 and len(norms) == 2 * clipped

    large = classifier(contexts)
    reference = trainer_for(large, contexts=contexts, learning_rate=0.05, lr_scheduler=mx.lr_scheduler.FactorScheduler(1, 0.5))
    for start in (0, 4):
        x, y = (np.concatenate([one[i] for one in data[start:start + 4]]) for i in (0, 1))
        backward_of(large, reference, x, y)
        reference.allreduce_grads()
        if clipped:
            assert norms[start // 4] == pytest.approx(G.clip_by_global_norm(reference, 2.0), rel=1e-5)
        reference.update(len(x))
    for k in range(contexts):
        for a, b in zip(weights_of(trainer, k), weights_of(reference, k)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert trainer.learning_rate == reference.learning_rate


def test_batches_of_different_sizes_and_the_rest():
    data = [(x[:n], y[:n]) for (x, y), n in zip(batches(5), (8, 3, 5, 2, 6))]
    net, large = classifier(), classifier()
    net.collect_params().setattr('grad_req', 'add')  # with which each gradient would contain those before it
    trainer, reference = trainer_for(net), trainer_for(large)
    accumulate = G.Accumulate(trainer, 3)
    for x, y in data:
        backward_of(net, trainer, x, y)
        accumulate.step(len(x))
    assert repr(accumulate) == '<Accumulate: 2 of 3 batches>'
    assert accumulate.finish() and not accumulate.finish()
    for part in (data[:3], data[3:]):
        x, y = (np.concatenate([one[i] for one in part]) for i in (0, 1))
        backward_of(large, reference, x, y)
        reference.step(len(x))
    for a, b in zip(weights_of(trainer), weights_of(reference)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_parameters_that_are_cast():
    """MXNet's grad_req='add' keeps only the last batch of such a parameter, which this must not rely on."""
    weights = []
    for k, factors in ((1, [1 + 2 + 4.0]), (3, [1.0, 2.0, 4.0])):
        optimizer = go.create('sgd', learning_rate=1.0, multi_precision=True)
        trainer = trainer_of(((3,),), ['float16'], optimizer=optimizer)
        trainer._params[0].grad_req = 'add'
        accumulate = G.Accumulate(trainer, k)
        for factor in factors:
            backward(trainer, [np.full(3, factor * 2.0 ** -12)])
            accumulate.step(1 / len(factors))
        weights += weights_of(trainer)
    assert (weights[0] == weights[1]).all()
    with autograd.record():
        loss = trainer._params[0].data().astype('float32').sum()
    trainer._params[0].grad_req = 'add'
    for _ in range(3):
        with autograd.record():
            loss = trainer._params[0].data().astype('float32').sum()
        loss.backward()
    assert gradients_of(trainer)[0].tolist() == [1, 1, 1]  # 3 if MXNet's were right: then Accumulate could be simpler


def test_a_parameter_that_one_device_alone_has_used():
    """What the other device has from the batch before is not added again."""
    trainer = trainer_of(((2,),), contexts=2, optimizer=go.create('sgd', learning_rate=1.0))
    accumulate = G.Accumulate(trainer, 2)
    start = weights_of(trainer)[0]
    backward(trainer, [[np.full(2, 1.0), np.full(2, 8.0)]])
    accumulate.step(1)
    with autograd.record():
        loss = (trainer._params[0].data(mx.cpu(0)) * 2).sum()
    loss.backward()
    accumulate.step(1)
    for k in (0, 1):
        np.testing.assert_allclose(start - weights_of(trainer, k)[0], (1 + 8 + 2) / 2, rtol=1e-6)


def test_float16_gradients_are_summed_in_float32():
    trainer = trainer_of(((1,),), ['float16'], optimizer=go.create('sgd', learning_rate=1.0, multi_precision=True))
    start = weights_of(trainer)[0].astype('float32')
    accumulate = G.Accumulate(trainer, 65)
    for value in [1.0] + [2.0 ** -12] * 64:  # each of which float16 would lose beside the 1
        backward(trainer, [np.full(1, value)])
        accumulate.step(1 / 65)
    master = export_states(trainer).master['w0']
    np.testing.assert_allclose(start - master, 1 + 2.0 ** -6, rtol=1e-5)


@pytest.mark.parametrize('nonfinite', ['skip', 'raise'])
def test_accumulated_gradients_that_are_not_finite_are_dropped(nonfinite):
    net = classifier()
    trainer = trainer_for(net)
    accumulate, scaler = G.Accumulate(trainer, 2), G.Scaler(trainer, init_scale=64)
    (x, y), *_ = batches(1)
    before = go.states_digest(trainer)
    backward_of(net, trainer, x * INF, y, scaler)
    accumulate.step(8)
    backward_of(net, trainer, x, y, scaler)
    if nonfinite == 'raise':
        with pytest.raises(G.NonfiniteGradients):
            accumulate.step(8, nonfinite='raise')
    else:
        assert not accumulate.step(8, nonfinite='skip')
    assert go.states_digest(trainer) == before and scaler.loss_scale == 32 and trainer.optimizer.num_update == 0
    for _ in range(2):
        backward_of(net, trainer, x, y, scaler)
        done = accumulate.step(8, nonfinite=nonfinite)
    assert done and all(np.isfinite(weight).all() for weight in weights_of(trainer))


@pytest.mark.parametrize('contexts', [1, 2])
@pytest.mark.parametrize('scaled', [False, True])
def test_an_update_that_an_error_has_stopped_can_be_finished(contexts, scaled):
    results = []
    for fail in (False, True):
        net = classifier(contexts)
        trainer = trainer_for(net, 'sgd', contexts, learning_rate=0.1)
        accumulate, scaler = G.Accumulate(trainer, 2), G.Scaler(trainer) if scaled else None
        for i, (x, y) in enumerate(batches(2)):
            backward_of(net, trainer, x, y, scaler)
            if fail and i == 1:
                with pytest.raises(ZeroDivisionError):
                    accumulate.step(8, lambda: 1 / 0)
                with pytest.raises(ValueError, match=r'Call finish\(\)'):
                    accumulate.step(8)
                assert accumulate.finish()
            else:
                accumulate.step(8)
        results.append(weights_of(trainer))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*results))


@pytest.mark.parametrize('contexts', [1, 2])
@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('loaded', [False, True])
def test_an_update_in_the_middle_of_an_accumulation(tmp_path, contexts, scaled, loaded):
    """It would be without the batches so far, which would come too late. The error changes nothing: the run can continue."""
    results = []
    for wrong in (False, True):
        net = classifier(contexts)
        trainer = trainer_for(net, 'sgd', contexts, learning_rate=0.1)
        accumulate, scaler = G.Accumulate(trainer, 2), G.Scaler(trainer) if scaled else None
        for i, (x, y) in enumerate(batches(2)):
            backward_of(net, trainer, x, y, scaler)
            if wrong and i == 1:
                with pytest.raises(ValueError, match=r'without the 1 that are accumulated.*accumulate\.finish\(\)'):
                    (scaler or trainer).step(8)
                if not scaled:
                    with pytest.raises(ValueError, match='without the 1'):
                        trainer.update(8)
            accumulate.step(8)
            if loaded and i == 0:
                go.save_checkpoint(str(tmp_path / 'x'), net=net, trainer=trainer)
                go.load_checkpoint(str(tmp_path / 'x'), net=net, trainer=trainer)
        assert trainer.optimizer.num_update == 1
        results.append(weights_of(trainer))
        backward_of(net, trainer, x, y, scaler)
        (scaler or trainer).step(8)  # between two accumulations
        assert trainer.optimizer.num_update == 2
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*results))


def test_accumulation_where_the_kvstore_updates():
    """The default of a trainer with two devices: the first batch says so, or Accumulate itself where it is decided by then."""
    net = classifier(2)
    trainer = gluon.Trainer(net.collect_params(), 'novograd')
    accumulate = G.Accumulate(trainer, 4)
    backward_of(net, trainer, *batches(1)[0])
    with pytest.raises(ValueError, match='updates on its kvstore.*update_on_kvstore=False'):
        accumulate.step(8)
    assert repr(accumulate) == '<Accumulate: 0 of 4 batches>'
    trainer.step(8)
    net.collect_params().setattr('grad_req', 'add')
    with pytest.raises(ValueError, match='updates on its kvstore.*update_on_kvstore=False'):
        G.Accumulate(trainer, 4)
    assert {parameter.grad_req for parameter in trainer._params} == {'add'}


def test_arguments_of_accumulate():
    trainer = trainer_of()
    for k in (0, -1, 1.5, None):
        with pytest.raises(ValueError, match='`k` must be a whole number, 1 or more'):
            G.Accumulate(trainer, k)
    with pytest.raises(ValueError, match='row_sparse.*embed_weight'):
        G.Accumulate(sparse_trainer()[1], 2)
    accumulate = G.Accumulate(trainer, 2)
    for size in (0, -1, NAN, 'many'):
        with pytest.raises(ValueError, match='`batch_size`'):
            accumulate.step(size)
    with pytest.raises(ValueError, match='`nonfinite` is for trainers with a Scaler'):
        accumulate.step(1, nonfinite='skip')
    G.Accumulate(trainer, 3)
    with pytest.raises(ValueError, match='another Accumulate'):
        accumulate.step(1)
    accumulate = G.Accumulate(trainer, 2)
    G.Scaler(trainer)
    backward(trainer, values_for(trainer))
    with pytest.raises(ValueError, match=r'accumulate\.step\(\) after update\(\) or nothing'):  # without scaler.scale
        accumulate.step(1)
    assert not accumulate.finish()


# Checkpoints

def scaled_run(contexts=1, k=3, seed=0, **options):
    net = classifier(contexts)
    for i, parameter in enumerate(net.collect_params().values()):  # nothing that is right may come from the first run
        parameter.set_data(parameter.data(mx.cpu(0)) + 0.01 * seed * i)
    trainer = trainer_for(net, contexts=contexts, learning_rate=0.05)
    return net, trainer, G.Accumulate(trainer, k), G.Scaler(trainer, **{'init_scale': 64, 'scale_window': 2, **options})


def go_on(net, trainer, accumulate, scaler, data):
    scales = []
    for x, y in data:
        backward_of(net, trainer, x, y, scaler)
        accumulate.step(8, lambda: G.clip_by_global_norm(trainer, 2.0))
        scales.append((scaler.loss_scale, scaler.state_dict()['unskipped']))
    return scales


@pytest.mark.parametrize('contexts', [1, 2])
@pytest.mark.parametrize('stop', range(10))
def test_a_run_resumes_in_the_middle_of_everything(tmp_path, contexts, stop):
    data = batches(14)
    data[4][0][0] = INF  # the second update is left out
    straight = scaled_run(contexts)
    expected = go_on(*straight, data)
    assert len(set(expected)) == 4
    first = scaled_run(contexts)
    go_on(*first, data[:stop])
    with go.CheckpointManager(tmp_path, background=True) as manager:
        manager.save(stop, net=first[0], trainer=first[1])
        go_on(*first, batches(1, seed=8))  # while the file is written
    resumed = scaled_run(contexts, seed=5, init_scale=2)
    go_on(*resumed, batches(1, seed=9))  # has gradients of its own
    assert manager.restore_latest(net=resumed[0], trainer=resumed[1]).step == stop
    assert resumed[2]._batches == stop % 3
    assert go_on(*resumed, data[stop:]) == expected[stop:]
    for k in range(contexts):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(weights_of(resumed[1], k), weights_of(straight[1], k)))
    assert go.states_digest(resumed[1], resumed[0]) == go.states_digest(straight[1], straight[0])


@pytest.mark.parametrize('there, here', [(2, 1), (1, 2)])
def test_accumulated_gradients_move_to_another_number_of_devices(tmp_path, there, here):
    data, path = batches(3), str(tmp_path / 'x')
    saved, straight = scaled_run(there), scaled_run(1)
    go_on(*saved, data[:2])
    go_on(*straight, data)
    go.save_checkpoint(path, net=saved[0], trainer=saved[1])
    resumed = scaled_run(here, seed=5)
    go.load_checkpoint(path, net=resumed[0], trainer=resumed[1])
    go_on(*resumed, data[2:])
    assert resumed[1].optimizer.num_update == 1
    for a, b in zip(weights_of(resumed[1]), weights_of(straight[1])):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('finish', [False, True])
@pytest.mark.parametrize('there, here', [(1024, None), (None, 1024), (64, 1024), (None, None)])
def test_a_scaler_may_come_and_go_in_the_middle_of_an_accumulation(tmp_path, there, here, finish):
    """Powers of two change no bit of the sums."""
    def run_with(scale):
        net = classifier()
        trainer = trainer_for(net, 'sgd', learning_rate=0.1)
        return net, trainer, G.Accumulate(trainer, 2), scale and G.Scaler(trainer, init_scale=scale)

    def batch(run, x, y):
        net, trainer, accumulate, scaler = run
        backward_of(net, trainer, x, y, scaler)
        return accumulate.step(8)

    (first, second), path = batches(2), str(tmp_path / 'x')
    saved, straight, resumed = run_with(there), run_with(None), run_with(here)
    assert not batch(saved, *first) and not batch(straight, *first)
    go.save_checkpoint(path, net=saved[0], trainer=saved[1])
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='The file holds the state of a loss scaler')
        go.load_checkpoint(path, net=resumed[0], trainer=resumed[1])
    for run in (straight, resumed):
        assert run[2].finish() if finish else batch(run, *second)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(weights_of(resumed[1]), weights_of(straight[1])))


@pytest.mark.parametrize('number', [2, 3])
def test_another_number_of_batches_per_update(tmp_path, number):
    """Between two updates and in the middle of one: the script's applies, and is said to."""
    path, saved, other, same = str(tmp_path / 'x'), scaled_run(k=2), scaled_run(k=8), scaled_run(k=2)
    go_on(*saved, batches(number))
    go.save_states(saved[1], path)
    assert not go.load_states(same[1], path).warnings
    with pytest.warns(UserWarning, match="k of Accumulate is 8 in the script and 2 in the file: the script's applies"):
        go.load_states(other[1], path)
    assert repr(other[2]) == f'<Accumulate: {number % 2} of 8 batches>'
    assert go.states_digest(same[1]) == go.states_digest(other[1]) == go.states_digest(saved[1])
    none = trainer_for(classifier(), learning_rate=0.05)
    G.Scaler(none, init_scale=64, scale_window=2)
    with pytest.warns(UserWarning, match='trainer has no Accumulate: ' + ('they are not' if number % 2 else 'each batch is')):
        go.load_states(none, path)
    states = go.read_states(path)
    for wrong in (2.0, 0, [2]):
        states.variables['accumulated:k'] = np.array(wrong)
        with pytest.raises(ValueError, match='`k` of Accumulate must be'):
            import_states(same[1], states)


def test_accumulated_gradients_without_their_scale(tmp_path):
    """Files from before it was saved do not say in which units their sums are."""
    saved, here = scaled_run(), scaled_run()
    go_on(*saved, batches(1))
    states = export_states(saved[1])
    states.variables['accumulated'] = states.variables['accumulated'][:2]
    with pytest.raises(ValueError, match='three numbers: of batches, their size and the loss scale'):
        import_states(here[1], states)


def test_a_parameter_whose_gradient_came_before_the_checkpoint(tmp_path):
    """It is part of the next update, although no later batch touches it."""
    path, results = str(tmp_path / 'x'), []
    for resume in (False, True):
        trainer = trainer_of(optimizer=go.create('sgd', learning_rate=1.0))
        accumulate = G.Accumulate(trainer, 2)
        backward(trainer, values_for(trainer))
        accumulate.step(1)
        if resume:
            go.save_states(trainer, path)
            trainer = trainer_of(optimizer=go.create('sgd', learning_rate=1.0))
            accumulate = G.Accumulate(trainer, 2)
            go.load_states(trainer, path)
        backward(trainer, values_for(trainer, 1), skip=(1,))
        assert accumulate.step(1)
        results.append(weights_of(trainer))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*results))


def test_between_step_and_update(tmp_path):
    """What is saved there continues as if update had been called."""
    for value in (1.0, INF):
        trainer, scaler = training()
        backward(trainer, values_for(trainer, size=value), scaler.scale)
        scaler.step(4)
        path = str(tmp_path / 'x')
        go.save_states(trainer, path)
        scaler.update()
        other, resumed = training()
        go.load_states(other, path)
        assert resumed.state_dict() == scaler.state_dict()
        backward(other, values_for(other), resumed.scale)
        assert resumed.step(4)


def test_a_file_of_one_scaler_for_the_other(tmp_path):
    path = str(tmp_path / 'x')
    amp = trainer_of()
    amp._amp_loss_scaler = LossScaler()
    vars(amp._amp_loss_scaler).update(_loss_scale=4096.0, _next_loss_scale=2048.0, _unskipped=17, _max_loss_scale=2.0 ** 20)
    go.save_states(amp, path)
    ours = trainer_of()
    scaler = G.Scaler(ours, backoff_factor=0.25)
    with pytest.warns(UserWarning, match='max_scale of the loss scaler is 16777216.0 in the trainer and 1048576.0 in the file'):
        go.load_states(ours, path)
    assert scaler.loss_scale == 2048 and scaler.state_dict()['unskipped'] == 17
    assert scaler.state_dict()['max_loss_scale'] == 2 ** 20 and scaler.state_dict()['backoff_factor'] == 0.25
    go.save_states(ours, path)
    assert go.read_states(path).loss_scaler == {
        'loss_scale': 2048.0, 'next_loss_scale': 2048.0, 'unskipped': 17, 'scale_factor': 2.0, 'backoff_factor': 0.25,
        'scale_seq_len': 2000, 'max_loss_scale': 2.0 ** 20, 'min_loss_scale': 2.0 ** -14}
    amp._amp_loss_scaler = LossScaler()
    with pytest.warns(UserWarning, match='min_loss_scale of'), pytest.warns(UserWarning, match='backoff.* 0.25 .*always 0.5'):
        go.load_states(amp, path)
    assert (amp._amp_loss_scaler.loss_scale, amp._amp_loss_scaler._unskipped) == (2048, 17)
    assert set(vars(amp._amp_loss_scaler)) == set(vars(LossScaler()))


def test_whose_settings_apply(tmp_path):
    path = str(tmp_path / 'x')
    trainer, _ = training(scale_window=7)
    go.save_states(trainer, path)
    for mode, window in (('file', 7), ('current', 5)):
        other, scaler = training(scale_window=5, init_scale=2)
        with pytest.warns(UserWarning, match=f"scale_window.*5.*7.*the {'file' if mode == 'file' else 'trainer'}'s applies"):
            go.load_states(other, path, hyperparameters=mode)
        assert scaler.state_dict()['scale_seq_len'] == window
        assert (scaler.loss_scale, scaler.state_dict()['unskipped']) == (1024, 3)  # progress is not a setting


def test_a_trainer_without_what_the_file_has(tmp_path):
    path = str(tmp_path / 'x')
    saved = scaled_run()
    go_on(*saved, batches(1))
    go.save_states(saved[1], path)
    net = classifier()
    with pytest.warns(UserWarning) as caught:
        go.load_states(trainer_for(net), path)
    said = ' '.join(str(each.message) for each in caught)
    assert 'loss scaler and the trainer has none' in said and 'has no Accumulate: they are not restored' in said
    with pytest.raises(ValueError, match='gradients of 1 batches.*k=1'):
        go.load_states(scaled_run(k=1)[1], path)


@pytest.mark.parametrize('wrong', [
    {'loss_scale': 1.0}, {'loss_scale': 0.0, 'unskipped': 1}, {'loss_scale': 1.0, 'unskipped': -1},
    {'loss_scale': '1', 'unskipped': 1}, {'loss_scale': True, 'unskipped': 1},
    {'loss_scale': 1.0, 'unskipped': 1.5}, {'loss_scale': 1.0, 'unskipped': 1, 'tolerance': 2},
    {'loss_scale': INF, 'unskipped': 0}, {'loss_scale': 1.0, 'unskipped': 0, 'scale_seq_len': 0}])
def test_states_that_are_not_those_of_a_scaler(wrong):
    scaler = G.Scaler(trainer_of())
    before = scaler.state_dict()
    with pytest.raises(ValueError, match='state of a loss scaler must'):
        scaler.load_state_dict(wrong)
    assert scaler.state_dict() == before
    scaler.load_state_dict({**before, 'loss_scale': 4.0, 'next_loss_scale': 4.0, 'unskipped': 9})
    assert (scaler.loss_scale, scaler.state_dict()['unskipped']) == (4, 9)


def test_a_load_that_fails_changes_no_gradient(tmp_path, monkeypatch):
    path = str(tmp_path / 'x')
    saved = scaled_run(seed=3)
    go_on(*saved, batches(5, seed=4))
    go.save_states(saved[1], path)
    _, trainer, accumulate, _ = here = scaled_run()
    go_on(*here, batches(1))

    def snapshot():
        states = export_states(trainer)
        return ({name: array.tobytes() for name, array in states.variables.items()}, states.loss_scaler, states.counts,
                repr(accumulate))

    before, calls = snapshot(), []
    with monkeypatch.context() as patch:  # the last that a load does
        patch.setattr('gluon_optim.mxnet.trainer._install', lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go.load_states(trainer, path)
    assert snapshot() == before
    for k in range(1, 40):
        real = mx.nd.NDArray._sync_copyfrom

        def copy(*args, _real=real, _k=k, _calls=calls):
            _calls.append(1)
            if len(_calls) == _k:
                raise MemoryError
            return _real(*args)
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(mx.nd.NDArray, '_sync_copyfrom', copy)
            try:
                go.load_states(trainer, path)
            except MemoryError:
                patch.undo()
                assert snapshot() == before
            else:
                break
    assert k > 8 and accumulate._batches == 2


# The page and the example

def test_the_page_runs(capsys):
    names = {}
    blocks = re.findall('```python\n(.*?)```', (ROOT / 'docs/GRADIENTS.md').read_text(encoding='utf-8'), re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, 'docs/GRADIENTS.md', 'exec'), names)  # noqa: S102
    assert capsys.readouterr().out == '1024.0\n'
    assert names['norm'] > 0 and names['bad'] == {} and names['trainer'].optimizer.num_update == 2


def test_what_the_page_says_of_mxnet():
    """Its clip_global_norm counts each device, takes no float16 on the CPU, and makes finite gradients 0 beside an infinite one."""
    arrays = [mx.nd.ones((4,)), mx.nd.ones((4,))]
    assert gluon.utils.clip_global_norm(arrays, 100.0) == pytest.approx(math.sqrt(8))
    with pytest.raises(mx.MXNetError, match='dot only supports float32/float64 for CPU'):
        gluon.utils.clip_global_norm([mx.nd.ones((4,), dtype='float16')], 100.0)
    arrays = [mx.nd.ones((4,)), mx.nd.array([INF, 1])]
    with pytest.warns(UserWarning, match='nan or inf'):
        gluon.utils.clip_global_norm(arrays, 100.0)
    np.testing.assert_array_equal(np.concatenate([array.asnumpy() for array in arrays]), [0, 0, 0, 0, NAN, 0])

    scaler, trainer, left_out = LossScaler(), trainer_of(((2,),)), 0
    for _ in range(5):
        backward(trainer, [np.full(2, INF if scaler.loss_scale > 2 ** 15 else 1.0)])
        left_out += scaler.has_overflow(trainer._params)
    assert left_out == 2


def test_the_example(tmp_path):
    pytest.importorskip('sklearn')
    picture = tmp_path / 'picture.png'
    drawn = ['--picture', str(picture)] if importlib.util.find_spec('matplotlib') else []
    script = ROOT / 'examples/mixed_precision.py'
    done = subprocess.run([sys.executable, str(script), '--steps', '60', '--overflow-at', '30', *drawn], capture_output=True,
                          text=True, timeout=300, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode in (0, 1), done.stderr  # 60 steps are too few for its accuracy
    rows = dict(re.findall(r'^(float\S+(?:, \S+(?: 1)?)?) +\S+% +\S+ +\d+ +(\S+)%', done.stdout, re.MULTILINE))
    assert set(rows) == {'float32', 'float16, scale 1', 'float16, Scaler'}
    assert float(rows['float16, scale 1']) > float(rows['float32']) + 20
    assert abs(float(rows['float16, Scaler']) - float(rows['float32'])) < 10
    assert not drawn or picture.read_bytes().startswith(b'\x89PNG')
