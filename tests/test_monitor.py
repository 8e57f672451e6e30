"""Monitors: the noise of gradients, and norms of weights, gradients and updates, against NumPy in float64."""
import csv
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')
from mxnet import autograd, gluon, nd  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim.mxnet.monitor.rows import RowFile  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {'a': (3, 4), 'b': (5,)}
SIZES = (4, 2, 6)


class Linear(gluon.Block):
    """The gradient of the loss of an example is the example: two arrays, of the shapes of the parameters."""

    def __init__(self, dtype='float32', frozen=()):
        super().__init__()
        with self.name_scope():
            for name, shape in SHAPES.items():
                setattr(self, name, self.params.get(name, shape=shape, dtype=dtype,
                                                    grad_req='null' if name in frozen else 'write'))

    def forward(self, a, b):
        # MXNet's cast writes its gradient over what is there, also with grad_req='add': it must not come first
        w = {name: parameter.data(a.context).expand_dims(0).astype(a.dtype) for name, parameter in (('a', self.a), ('b', self.b))}
        return (w['a'] * a).sum(axis=(1, 2)) + (w['b'] * b).sum(axis=1)


def make(contexts=1, dtype='float32', grad_req='write', optimizer='sgd', arguments=None, frozen=(), **options):
    net = Linear(dtype, frozen)
    net.initialize(mx.init.One(), ctx=[mx.cpu(k) for k in range(contexts)])
    for parameter in net.collect_params().values():
        if parameter.grad_req != 'null':
            parameter.grad_req = grad_req
    return net, gluon.Trainer(net.collect_params(), optimizer, {'learning_rate': 0.1, **(arguments or {})}, **options)


def examples(sizes=SIZES, seed=0, mean=0.5, dtype='float32', decimals=3):
    """For each part, the gradients of its examples: a dictionary of arrays."""
    draw = np.random.default_rng(seed)
    return [{name: (mean + draw.normal(size=(size, *shape))).round(decimals).astype(dtype) for name, shape in SHAPES.items()}
            for size in sizes]


def backward(net, parts, mean=False, scale=1.0):
    """A pass, with a part on each device."""
    with autograd.record():
        losses = [net(*(nd.array(part[name], ctx=mx.cpu(k), dtype=part[name].dtype) for name in SHAPES)) * scale
                  for k, part in enumerate(parts)]
        losses = [loss.mean() for loss in losses] if mean else losses
    autograd.backward(losses)


def observe(noise, net, parts, contexts=1, mean=False, scale=1.0):
    passes = [parts[k:k + contexts] for k in range(0, len(parts), contexts)]
    for group in passes:
        backward(net, group, mean, scale)
        noise.observe([len(part['a']) for part in group], last=group is passes[-1])


def two_sizes(parts, names=tuple(SHAPES)):
    """(sigma^2, g^2) by the definition: the variance between the means of parts, weighted by their sizes, in float64."""
    sizes = np.array([len(part['a']) for part in parts], 'f8')
    means = np.array([np.concatenate([part[name].astype('f8').mean(axis=0).ravel() for name in names]) for part in parts])
    mean = sizes @ means / sizes.sum()
    sigma_sq = (sizes * ((means - mean) ** 2).sum(axis=1)).sum() / (len(parts) - 1)
    return sigma_sq, mean @ mean - sigma_sq / sizes.sum()


def figures(noise):
    return [noise.sigma_sq, noise.g_sq]


# The estimates

@pytest.mark.parametrize('contexts', [1, 3], ids=['passes', 'devices'])
@pytest.mark.parametrize('grad_req', ['write', 'add'])
@pytest.mark.parametrize('mean', [False, True], ids=['sum', 'mean'])
@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
def test_parts_of_a_batch(contexts, grad_req, mean, dtype):
    net, trainer = make(contexts, dtype, grad_req)
    parts = examples(dtype='float64' if dtype == 'float64' else 'float32', decimals=1 if dtype == 'float16' else 3)
    noise = go.monitor.NoiseScale(trainer, net, reduction='mean' if mean else 'sum', curvature=2.0)
    observe(noise, net, parts, contexts, mean)
    # the sums of a float16 gradient are rounded to 11 bits
    tolerance = {'float16': 3e-3, 'float32': 2e-6, 'float64': 1e-13}[dtype]
    for name in SHAPES:
        np.testing.assert_allclose(figures(noise.parameters[name]), two_sizes(parts, [name]), rtol=tolerance)
    sigma_sq, g_sq = two_sizes(parts)
    np.testing.assert_allclose(figures(noise.total), (sigma_sq, g_sq), rtol=tolerance)
    np.testing.assert_allclose((noise.b_star, noise.eta_star, noise.eta_1), (
        16 * sigma_sq / g_sq, 0.25, g_sq / (32 * sigma_sq * 2.0)), rtol=2 * tolerance)


@pytest.mark.parametrize('grad_req', ['write', 'add'])
def test_several_passes_on_several_devices(grad_req):
    sizes = (4, 2, 6, 1, 3, 5)
    net, trainer = make(2, grad_req=grad_req)
    noise = go.monitor.NoiseScale(trainer, net)
    for seed in range(3):  # a batch knows nothing of the one before
        parts = examples(sizes, seed)
        noise.averaging = 1.0
        observe(noise, net, parts, contexts=2)
        np.testing.assert_allclose(figures(noise.total), two_sizes(parts), rtol=2e-6)
        trainer.step(sum(sizes))
        net.collect_params().zero_grad()


def test_passes_and_devices_give_the_same_bits():
    states = []
    for contexts in (1, 3):
        net, trainer = make(contexts)
        noise = go.monitor.NoiseScale(trainer, net)
        for seed in range(4):
            observe(noise, net, examples(seed=seed), contexts)
        state = noise.state_dict()
        states.append({**state, 'parameters': [{**each, 'full_name': ''} for each in state['parameters']]})
    assert states[0] == states[1]
    assert states[0]['total']['count'] == 4


def test_little_noise_around_a_large_mean_is_not_lost():
    """|m_i|^2 and |m|^2 agree in the first eight digits here: their difference would be rounding."""
    net, trainer = make(dtype='float64')
    parts = examples(mean=0.0, dtype='float64')
    far = [{name: 1e4 + array for name, array in part.items()} for part in parts]
    noise = go.monitor.NoiseScale(trainer, net)
    observe(noise, net, far)
    np.testing.assert_allclose(noise.total.sigma_sq, two_sizes(parts)[0], rtol=1e-9)


def test_the_expectation_is_the_truth():
    """Linear regression y = x.w* + e with x ~ N(0, I), e ~ N(0, s^2), at w = w* + a: the gradient of an example, x x.a - x e, has
    the mean a and the variance (d + 1)|a|^2 + d s^2."""
    d, s, a, batches, sizes = 6, 0.7, 0.4, 1500, (1, 2, 5)
    draw = np.random.default_rng(1)
    net = gluon.nn.Dense(1, in_units=d, use_bias=False)
    net.initialize(mx.init.Constant(a))  # w* = 0
    trainer = gluon.Trainer(net.collect_params(), 'sgd')
    over_all, single = (go.monitor.NoiseScale(trainer, net, averaging=averaging) for averaging in (0.0, 1.0))
    found = []
    for _ in range(batches):
        for size in sizes:
            x, e = draw.normal(size=(size, d)), s * draw.normal(size=(size, 1))
            with autograd.record():
                loss = gluon.loss.L2Loss()(net(nd.array(x)), nd.array(e))
            loss.backward()
            for noise in (over_all, single):
                noise.observe(size, last=size == sizes[-1])
        found.append(single.total.sigma_sq)
    truth = (d + 1) * d * a * a + d * s * s, d * a * a
    total = over_all.total
    assert over_all.batches == batches
    assert total.sigma_sq == pytest.approx(np.mean(found), rel=1e-9)
    error = np.std(found) / batches ** 0.5
    assert error < 0.03 * truth[0]
    assert abs(total.sigma_sq - truth[0]) < 4 * error
    assert total.g_sq_error < 0.1 * truth[1]
    assert abs(total.g_sq - truth[1]) < 4 * total.g_sq_error
    assert total.b_star == pytest.approx(16 * truth[0] / truth[1], rel=0.2)


@pytest.mark.parametrize('averaging', [0.0, 0.3, 1.0])
def test_the_running_means(averaging):
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net, averaging=averaging)
    batches = [two_sizes(examples(seed=seed)) for seed in range(7)]
    weights = np.zeros(7)
    for t in range(7):
        observe(noise, net, examples(seed=t))
        share = max(averaging, 1 / (t + 1))
        weights *= 1 - share
        weights[t] = share
    assert weights.sum() == pytest.approx(1)
    sigma_sq, g_sq = weights @ np.array(batches)
    np.testing.assert_allclose(figures(noise.total), (sigma_sq, g_sq), rtol=1e-5)
    assert noise.b_star == pytest.approx(16 * sigma_sq / g_sq, rel=1e-5)  # the quotient of means, not the mean of quotients
    spread = np.array(batches)[:, 1] - g_sq
    if averaging == 1:
        assert noise.total.g_sq_error is None  # one batch: nothing to compare with
    else:
        error = (weights @ spread ** 2 * (weights @ weights) / (1 - weights @ weights)) ** 0.5
        assert noise.total.g_sq_error == pytest.approx(error, rel=1e-4)
    if averaging == 0:
        assert error == pytest.approx(np.std(spread, ddof=1) / 7 ** 0.5)  # that of an ordinary mean


def test_the_loss_scale_is_taken_out():
    found = []
    for scale in (1.0, 65536.0):
        net, trainer = make(arguments={'rescale_grad': 1 / scale})
        noise = go.monitor.NoiseScale(trainer, net)
        observe(noise, net, examples(), scale=scale)
        found.append(noise.total)
    assert found[0] == found[1]


def test_gradients_stay_as_they_are():
    for grad_req in ('write', 'add'):
        net, trainer = make(2, grad_req=grad_req)
        noise = go.monitor.NoiseScale(trainer, net)
        backward(net, examples()[:2])
        before = [gradient.asnumpy() for p in net.collect_params().values() for gradient in p.list_grad()]
        noise.observe(list(SIZES[:2]), last=False)
        noise.observe(list(SIZES[:2]))
        after = [gradient.asnumpy() for p in net.collect_params().values() for gradient in p.list_grad()]
        assert all((x == y).all() for x, y in zip(before, after))


def test_frozen_parameters_and_those_that_params_leaves_out():
    parts = examples()
    net, trainer = make(frozen=['a'])
    noise = go.monitor.NoiseScale(trainer, net)
    observe(noise, net, parts)
    assert list(noise.parameters) == ['b']
    np.testing.assert_allclose(figures(noise.total), two_sizes(parts, ['b']), rtol=2e-6)
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net, params='a')
    observe(noise, net, parts)
    assert list(noise.parameters) == ['a']


def test_a_parameter_that_is_unfrozen_begins_then():
    net, trainer = make(frozen=['a'])
    noise = go.monitor.NoiseScale(trainer, net, averaging=0.0)
    for seed in range(3):
        observe(noise, net, examples(seed=seed))
    net.a.grad_req = 'write'
    observe(noise, net, examples(seed=3))
    assert list(noise.parameters) == ['a', 'b']
    np.testing.assert_allclose(figures(noise.parameters['a']), two_sizes(examples(seed=3), ['a']), rtol=2e-6)
    expected = np.mean([two_sizes(examples(seed=seed), ['b']) for seed in range(4)], axis=0)
    np.testing.assert_allclose(figures(noise.parameters['b']), expected, rtol=2e-6)


def test_row_sparse_gradients():
    found = []
    for sparse in (False, True):
        mx.random.seed(0)
        net = gluon.nn.Embedding(7, 3, sparse_grad=sparse)
        net.initialize()
        trainer = gluon.Trainer(net.collect_params(), 'sgd')
        noise = go.monitor.NoiseScale(trainer, net)
        norms = go.monitor.Norms(trainer, net)
        for words in ([1, 2, 2], [2, 5]):
            with autograd.record():
                loss = (net(nd.array(words)) ** 2).sum()
            loss.backward()
            noise.observe(len(words), last=len(words) == 2)
        with norms:
            trainer.step(5)
        found.append((noise.total, norms.latest['weight']))
    assert found[0] == found[1]


def test_numpy_arrays_of_mxnet():
    """A process of its own: `set_np` holds for all of it."""
    code = ('import mxnet as mx, gluon_optim as go\n'
            'mx.npx.set_np()\n'
            'net = mx.gluon.nn.Dense(1, in_units=2, use_bias=False)\n'
            'net.initialize(mx.init.One())\n'
            "trainer = mx.gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1})\n"
            'noise, norms = go.monitor.NoiseScale(trainer, net), go.monitor.Norms(trainer, net)\n'
            'for part in ([[1, 2], [3, 2]], [[2, 2], [4, 4]]):\n'
            '    with mx.autograd.record():\n'
            '        loss = net(mx.np.array(part)).sum()\n'
            '    loss.backward()\n'
            '    noise.observe(2, last=part[0][0] == 2)\n'
            'with norms:\n'
            '    trainer.step(2)\n'
            "print(noise.total.sigma_sq, noise.total.g_sq, norms.latest['weight'].update_norm)\n")
    done = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=str(ROOT),
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr.decode()
    sigma_sq, g_sq, update = map(float, done.stdout.split())
    assert (sigma_sq, g_sq) == (2, 12)  # as in the example of the docstring
    assert update == pytest.approx(0.1 * 72 ** 0.5 / 2, rel=1e-6)


# What is not known

def parts_of(*values):
    return [{name: np.full((1, *shape), value, 'float32') for name, shape in SHAPES.items()} for value in values]


def test_where_the_noise_hides_the_mean(tmp_path):
    net, trainer = make()
    writer = Recorder()
    noise = go.monitor.NoiseScale(trainer, net, path=tmp_path / 'noise.csv', writer=writer)
    observe(noise, net, parts_of(1, -1))
    assert noise.total == go.monitor.Noise(34.0, None, None, None, 0.5, None)
    assert (noise.b_star, noise.eta_1) == (None, None)
    text = str(noise.table())
    assert 'B* unknown (noise hides the mean)' in text
    assert 'unknown (noise hides the mean)' in repr(noise)
    assert not re.search('nan|inf|-[0-9]', text)
    assert rows_of(tmp_path / 'noise.csv') == [['1', '2', '34.0', '', '', '', '0.5', '']]
    assert {tag for tag, _, _ in writer.scalars} == {'noise/sigma_sq', 'noise/eta_star'}
    for value in (2, 3, 4):
        observe(noise, net, parts_of(value, value + 1))  # and what is hidden once comes to light later
    assert noise.b_star > 0
    assert 'unknown' not in str(noise.table())


def test_no_noise_at_all():
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net)
    with pytest.warns(UserWarning, match='all parts are the same'):
        observe(noise, net, parts_of(1, 1))
    assert (noise.b_star, noise.eta_1) == (0, math.inf)
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net)
    observe(noise, net, parts_of(0, 0))
    assert (noise.b_star, noise.eta_1) == (None, None)


def test_before_the_first_batch():
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net, curvature=4.0)
    assert (noise.b_star, noise.eta_star, noise.eta_1, noise.total, noise.parameters) == (None, 0.125, None, None, {})
    assert str(noise.table()).startswith('NoiseScale: no batch yet')


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.filterwarnings('error::RuntimeWarning')
def test_gradients_that_are_not_finite_are_left_out(bad, tmp_path):
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net, path=tmp_path / 'noise.csv')
    observe(noise, net, examples())
    before = noise.state_dict()
    for place in range(3):
        parts = examples(seed=1)
        parts[place]['b'][0, 0] = bad
        observe(noise, net, parts)
    assert noise.state_dict() == {**before, 'skipped': 3}
    assert '3 left out as not finite' in str(noise.table())
    assert len(rows_of(tmp_path / 'noise.csv')) == 1


# What is shown

def test_the_table():
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net)
    for seed in range(2):
        observe(noise, net, examples(seed=seed))
    lines = str(noise.table()).splitlines()
    assert lines[0] == f'NoiseScale after 2 batches: B* = {noise.b_star:.6g}, eta* = 0.5, eta_1 = {noise.eta_1:.6g}'
    assert [line.split()[0] for line in lines[1:]] == ['parameter', 'a', 'b', 'all']
    assert lines[-1].split()[1:] == [f'{value:.6g}' for key, value in noise.total._asdict().items() if key != 'eta_star']
    assert len({len(line) for line in lines[1:]}) == 1  # figures end below one another
    html = noise.table()._repr_html_()
    assert html.count('<tr>') == 4
    assert '<th>sigma^2</th>' in html


class Recorder:
    """With the signature of mxboard's SummaryWriter; tensorboardX has another name for the value."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, global_step=None):
        self.scalars.append((tag, value, global_step))


def events(folder):
    """The scalars in TensorBoard's event files: (tag, value, step). Records are framed as TFRecords."""
    event = pytest.importorskip('tensorboardX.proto.event_pb2')
    found = []
    for path in sorted(folder.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            size, = struct.unpack_from('<Q', data, place)
            message = event.Event.FromString(data[place + 12:place + 12 + size])
            found += [(value.tag, value.simple_value, message.step) for value in message.summary.value]
            place += 16 + size
    return found


def rows_of(path):
    with open(path, newline='') as file:
        return list(csv.reader(file))[1:]


def test_event_files(tmp_path):
    """Of the real tensorboardX, read back."""
    tensorboard = pytest.importorskip('tensorboardX')
    net, trainer = make()
    recorder = Recorder()
    with tensorboard.SummaryWriter(str(tmp_path / 'x')) as writer:
        for each in (writer, recorder):
            net, trainer = make()
            noise = go.monitor.NoiseScale(trainer, net, writer=each)
            norms = go.monitor.Norms(trainer, net, writer=each)
            for seed in range(3):
                observe(noise, net, examples(seed=seed))
                with norms:
                    trainer.step(6)
    found = events(tmp_path / 'x')
    assert [(tag, step) for tag, _, step in found] == [(tag, step) for tag, _, step in recorder.scalars]
    np.testing.assert_allclose([value for _, value, _ in found], [value for _, value, _ in recorder.scalars], rtol=1e-6)
    assert {tag for tag, _, _ in found} == {
        *(f'noise/{key}' for key in ('sigma_sq', 'g_sq', 'g_sq_error', 'b_star', 'eta_star', 'eta_1')),
        *(f'{key}/{name}' for key in ('weight_norm', 'gradient_norm', 'update_norm', 'update_ratio') for name in 'ab')}
    assert found[-8:] == [(f'{key}/{name}', np.float32(value), 3) for name in 'ab'
                          for key, value in norms.latest[name]._asdict().items()]


def test_a_row_for_each_batch(tmp_path):
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net, path=tmp_path / 'noise.csv')
    expected = []
    for seed in range(4):
        observe(noise, net, examples(seed=seed))
        expected.append([str(seed // 2 + 1), '12', *('' if value is None else repr(value) for value in noise.total)])
        if seed % 2:
            trainer.step(12)  # two batches at the same weights
    assert rows_of(tmp_path / 'noise.csv') == expected


def test_the_picture(tmp_path):
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net)
    with pytest.raises(ValueError, match='Create it with path='):
        noise.plot(tmp_path / 'noise.png')
    noise = go.monitor.NoiseScale(trainer, net, path=tmp_path / 'noise.csv')
    with pytest.raises(ValueError, match='has no rows. Call observe first'):
        noise.plot(tmp_path / 'noise.png')
    observe(noise, net, parts_of(1, -1))
    for seed in range(3):
        observe(noise, net, examples(seed=seed))
        trainer.step(12)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"a picture needs matplotlib.*pip install '.\[plot\]'"):
            noise.plot(tmp_path / 'noise.png')
    else:
        noise.plot(tmp_path / 'noise.png')
        assert (tmp_path / 'noise.png').read_bytes().startswith(b'\x89PNG')
        with pytest.raises(ValueError, match='nope'):
            noise.plot(tmp_path / 'noise.nope')


# Norms

def weights(net):
    return {name: getattr(net, name).data().asnumpy().astype('f8') for name in SHAPES}


def masters(trainer, net, tmp_path):
    go.save_states(trainer, tmp_path / 'states', net)
    return {name: array.astype('f8') for name, array in go.read_states(tmp_path / 'states').master.items()}


def norm(array):
    return np.sqrt((array.astype('f8') ** 2).sum())


def expected_norms(before, gradients, after):
    return {name: (norm(before[name]), norm(gradients[name]), norm(after[name] - before[name]),
                   norm(after[name] - before[name]) / norm(before[name])) for name in before}


def assert_norms(norms, expected, rtol):
    assert list(norms.latest) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(norms.latest[name], values, rtol=rtol, err_msg=name)


@pytest.mark.parametrize('kvstore', [None, False, True], ids=['one device', 'devices', 'kvstore'])
@pytest.mark.parametrize('optimizer, arguments', [
    ('sgd', {'momentum': 0.9, 'wd': 0.1}), ('adam', {}), ('novograd', {}), ('lamb', {}), ('adadelta', {}), ('larc', {})])
def test_norms(optimizer, arguments, kvstore):
    contexts = 1 if kvstore is None else 2
    options = {} if kvstore is None else {'update_on_kvstore': kvstore}
    net, trainer = make(contexts, optimizer=optimizer, arguments=arguments, **options)
    norms = go.monitor.Norms(trainer, net)
    for seed in range(3):
        parts = examples(SIZES[:contexts], seed)
        backward(net, parts)
        gradient = {name: sum(part[name].astype('f8').sum(axis=0) for part in parts) / 6 for name in SHAPES}
        before = weights(net)
        with norms:
            trainer.step(6)
        assert norms.update == seed + 1
        assert_norms(norms, expected_norms(before, gradient, weights(net)), 1e-6)


@pytest.mark.parametrize('optimizer', ['sgd', 'adam', 'novograd', 'lamb'])
@pytest.mark.parametrize('kvstore', [False, True])
def test_norms_of_masters(optimizer, kvstore, tmp_path):
    """A step of 1e-5 changes no float16 weight of 1."""
    net, trainer = make(2, 'float16', optimizer=optimizer, arguments={'learning_rate': 1e-6, 'multi_precision': True},
                        update_on_kvstore=kvstore)
    norms = go.monitor.Norms(trainer, net)
    before = weights(net)
    for seed in range(3):
        parts = examples(SIZES[:2], seed, decimals=1)
        backward(net, parts)
        gradient = {name: sum(getattr(net, name).grad(mx.cpu(k)).asnumpy().astype('f8') for k in range(2)) / 6 for name in SHAPES}
        with norms:
            trainer.step(6)
        after = masters(trainer, net, tmp_path)
        assert_norms(norms, expected_norms(before, gradient, after), 1e-3 if not kvstore else 1e-6)
        np.testing.assert_allclose([each.update_norm for each in norms.latest.values()],
                                   [norm(after[name] - before[name]) for name in SHAPES], rtol=1e-6)
        assert all(each.update_norm > 0 for each in norms.latest.values())
        before = after
    assert (net.a.data() == 1).asnumpy().all()


def test_norms_without_masters():
    net, trainer = make(dtype='float16')
    norms = go.monitor.Norms(trainer, net)
    backward(net, examples(decimals=1)[:1])
    gradient = {name: getattr(net, name).grad().asnumpy().astype('f8') / 4 for name in SHAPES}
    before = weights(net)
    with norms:
        trainer.step(4)
    assert_norms(norms, expected_norms(before, gradient, weights(net)), 1e-6)


def test_squares_neither_vanish_nor_overflow():
    """As they would in float32."""
    net, trainer = make()
    for name, shape in SHAPES.items():
        getattr(net, name).set_data(nd.full(shape, 1e-25))
    norms, noise = go.monitor.Norms(trainer, net), go.monitor.NoiseScale(trainer, net)
    parts = [{name: array * np.float32(1e25) for name, array in part.items()} for part in examples()]
    observe(noise, net, parts)
    np.testing.assert_allclose(figures(noise.total), two_sizes(parts), rtol=1e-6)
    with norms:
        trainer.step(1)
    assert norms.latest['a'].weight_norm == pytest.approx(1e-25 * 12 ** 0.5, rel=1e-6)
    assert norms.latest['a'].gradient_norm == pytest.approx(norm(parts[-1]['a'].sum(axis=0)), rel=1e-6)


def test_norms_of_a_convolution_between_predictions():
    """An inference permutes the weights of a convolution in place, for oneDNN."""
    mx.random.seed(0)
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Conv2D(16, 3, in_channels=16), gluon.nn.Conv2D(16, 3, in_channels=16))
    net.initialize(mx.init.Xavier())
    net.hybridize()
    trainer = gluon.Trainer(net.collect_params(), 'adamw', {'learning_rate': 0.1})
    norms = go.monitor.Norms(trainer, net, params='*weight')
    x = nd.random.normal(shape=(2, 16, 8, 8))
    for _ in range(3):
        with autograd.record():
            loss = net(x).sum()
        loss.backward()
        before = {name: p.data().asnumpy() for name, p in net._collect_params_with_prefix().items()}
        net(x)
        with norms:
            trainer.step(2)
        net(x)
        after = {name: p.data().asnumpy() for name, p in net._collect_params_with_prefix().items()}
        for name, each in norms.latest.items():
            assert each.update_norm == pytest.approx(norm(after[name].astype('f8') - before[name].astype('f8')), rel=1e-6)
            assert each.weight_norm == pytest.approx(norm(before[name]), rel=1e-6)


def test_a_weight_of_zero_has_no_ratio(tmp_path):
    net, trainer = make()
    net.b.set_data(nd.zeros(5))
    writer = Recorder()
    norms = go.monitor.Norms(trainer, net, writer, tmp_path / 'norms.csv')
    backward(net, examples()[:1])
    with norms:
        trainer.step(4)
    assert norms.latest['b'].weight_norm == 0
    assert norms.latest['b'].update_ratio is None
    assert str(norms.table()).splitlines()[-1].split()[-1] == '-'
    assert rows_of(tmp_path / 'norms.csv')[1][-1] == ''
    assert 'update_ratio/b' not in {tag for tag, _, _ in writer.scalars}


def test_the_gradient_as_the_update_saw_it():
    """A loss scaler takes its scale out of `rescale_grad` afterwards."""
    net, trainer = make()
    one, other = go.monitor.Norms(trainer, net), go.monitor.Norms(trainer, net, params='b')
    for seed in range(2):
        parts = examples(seed=seed)
        backward(net, parts[:1])
        with one, other:
            trainer.step(4)
            trainer._optimizer.rescale_grad = 7
        assert one.latest['b'] == other.latest['b']
        assert one.latest['b'].gradient_norm == pytest.approx(norm(parts[0]['b'].mean(axis=0)), rel=1e-6)
        assert '_check_and_rescale_grad' not in vars(trainer)


def test_every_so_many_updates(tmp_path):
    net, trainer = make()
    norms = go.monitor.Norms(trainer, net, path=tmp_path / 'norms.csv', every=3, params='b')
    for seed in range(7):
        backward(net, examples(seed=seed)[:1])
        with norms:
            trainer.step(4)
    assert [row[:2] for row in rows_of(tmp_path / 'norms.csv')] == [['3', 'b'], ['6', 'b']]


def test_an_update_that_is_not_made_has_no_row(tmp_path):
    net, trainer = make()
    norms = go.monitor.Norms(trainer, net, path=tmp_path / 'norms.csv')
    with norms:
        pass  # skipped, as AMP does on an overflow
    backward(net, examples()[:1])
    with pytest.raises(ZeroDivisionError), norms:
        trainer.step(0)
    assert rows_of(tmp_path / 'norms.csv') == []
    assert norms.latest == {}
    with norms:
        trainer.step(4)
    assert [row[0] for row in rows_of(tmp_path / 'norms.csv')] == ['1', '1']
    backward(net, examples()[:1])
    with pytest.raises(KeyboardInterrupt), norms:
        trainer.step(4)
        raise KeyboardInterrupt
    assert len(rows_of(tmp_path / 'norms.csv')) == 2
    with pytest.raises(ValueError, match='one update in a `with norms:` block. Received: 2'), norms:
        for seed in range(2):
            backward(net, examples(seed=seed)[:1])
            trainer.step(4)


# With go.gradients

def test_a_scaler_changes_no_figure():
    gradients = pytest.importorskip('gluon_optim.mxnet.gradients')
    found = []
    for scaled in (False, True):
        net, trainer = make(2, update_on_kvstore=False)
        noise, norms = go.monitor.NoiseScale(trainer, net), go.monitor.Norms(trainer, net)
        scaler = gradients.Scaler(trainer) if scaled else None
        for bad in (False, True):
            parts = examples(SIZES[:2])
            parts[0]['b'][0, 0] = np.inf if bad else 1
            with autograd.record():
                losses = [net(*(nd.array(part[name], ctx=mx.cpu(k)) for name in SHAPES)) for k, part in enumerate(parts)]
            autograd.backward(scaler.scale(losses) if scaled else losses)
            noise.observe(list(SIZES[:2]))
            if scaled:
                scaler.unscale()
                gradients.clip_by_global_norm(trainer, 1e9)
                with norms:
                    assert scaler.step(6) is not bad
                scaler.update()
            elif not bad:
                with norms:
                    trainer.step(6)
        assert (noise.batches, noise.skipped, norms.update) == (1, 1, 1)
        found.append((noise.total, norms.latest))
    assert found[0] == found[1]


@pytest.mark.parametrize('grad_req', ['write', 'add'])
def test_accumulated_batches_are_parts(grad_req):
    gradients = pytest.importorskip('gluon_optim.mxnet.gradients')
    net, trainer = make(2, grad_req=grad_req, update_on_kvstore=False)
    accumulate = gradients.Accumulate(trainer, 2)
    noise, norms = go.monitor.NoiseScale(trainer, net), go.monitor.Norms(trainer, net)
    parts = examples((4, 2, 6, 1))
    for k in (0, 2):
        sizes = [len(part['a']) for part in parts[k:k + 2]]
        backward(net, parts[k:k + 2])
        noise.observe(sizes, last=k == 2)
        with norms:
            accumulate.step(sum(sizes))
    np.testing.assert_allclose(figures(noise.total), two_sizes(parts), rtol=2e-6)
    whole = {name: np.concatenate([part[name] for part in parts]).astype('f8').sum(axis=0) / 13 for name in SHAPES}
    assert norms.latest['b'].gradient_norm == pytest.approx(norm(whole['b']), rel=1e-6)


# Cost

def test_one_copy_to_the_host(monkeypatch):
    """However many parameters there are."""
    net = gluon.nn.Sequential()
    for _ in range(30):
        net.add(gluon.nn.Dense(3, in_units=3))
    net.initialize(ctx=[mx.cpu(0), mx.cpu(1)])
    trainer = gluon.Trainer(net.collect_params(), 'sgd')
    noise, norms = go.monitor.NoiseScale(trainer, net), go.monitor.Norms(trainer, net)
    copies = []
    asnumpy = nd.NDArray.asnumpy
    monkeypatch.setattr(nd.NDArray, 'asnumpy', lambda self: copies.append(self.shape) or asnumpy(self))
    monkeypatch.setattr(nd.NDArray, 'wait_to_read', None)
    for last in (False, True):
        with autograd.record():
            losses = [net(nd.ones((2, 3), ctx=ctx)).sum() for ctx in (mx.cpu(0), mx.cpu(1))]
        autograd.backward(losses)
        noise.observe(4, last=last)
        assert len(copies) == last
    with norms:
        trainer.step(4)
    assert copies == [(60 * 4,), (60 * 3,)]


# Resuming

@pytest.mark.parametrize('reached', range(1, 7))
@pytest.mark.parametrize('lost', [0, 1, 2])
def test_between_accumulated_batches_no_row_is_lost(tmp_path, reached, lost):
    """Two batches are one update: of the one that a checkpoint is in the middle of the first row stays. What was written after
    the checkpoint, ``lost`` batches, is made again."""
    def process(name, first, last, saved=6):
        net, trainer = make(2, update_on_kvstore=False)
        accumulate = go.gradients.Accumulate(trainer, 2)
        noise = go.monitor.NoiseScale(trainer, net, path=tmp_path / f'{name}.csv')
        if first:
            noise.load_state_dict(go.load_checkpoint(tmp_path / name, net=net, trainer=trainer)['noise'])
        for batch in range(first, last):
            observe(noise, net, examples((4, 2), seed=batch), contexts=2)
            accumulate.step(6)
            if batch < saved:
                go.save_checkpoint(tmp_path / name, net=net, trainer=trainer, extra={'noise': noise.state_dict()})

    process('straight', 0, 8)
    process('resumed', 0, reached + lost, saved=reached)
    process('resumed', reached, reached + 1, saved=7)  # and again, from one batch later
    process('resumed', reached + 1, 8)
    assert [row[0] for row in rows_of(tmp_path / 'straight.csv')] == ['1', '1', '2', '2', '3', '3', '4', '4']
    assert (tmp_path / 'resumed.csv').read_bytes() == (tmp_path / 'straight.csv').read_bytes()


def test_the_state_is_json_and_fits_another_net(tmp_path):
    """Which in this process has other automatic names."""
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net)
    for seed in range(3):
        observe(noise, net, examples(seed=seed))
        trainer.step(12)
    go.save_checkpoint(tmp_path / 'run', net=net, trainer=trainer, extra={'noise': noise.state_dict()})
    for structural in (True, False):
        other, its = make()
        restored = go.load_checkpoint(tmp_path / 'run', net=other, trainer=its)
        resumed = go.monitor.NoiseScale(its, other if structural else None)
        resumed.load_state_dict(restored['noise'])
        assert [*resumed.parameters.values()] == [*noise.parameters.values()]
        observe(resumed, other, examples(seed=7))
    straight = go.monitor.NoiseScale(trainer, net)
    straight.load_state_dict(noise.state_dict())
    observe(straight, net, examples(seed=7))
    assert straight.total == resumed.total


def test_a_run_that_is_set_back_in_its_process_has_no_row_twice(tmp_path):
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net, path=tmp_path / 'noise.csv')
    observe(noise, net, examples(seed=0))
    trainer.step(12)
    go.save_checkpoint(tmp_path / 'run', net=net, trainer=trainer, extra={'noise': noise.state_dict()})
    for _ in range(2):
        observe(noise, net, examples(seed=1))
        rows = rows_of(tmp_path / 'noise.csv')
        assert [row[0] for row in rows] == ['1', '2']
        noise.load_state_dict(go.load_checkpoint(tmp_path / 'run', net=net, trainer=trainer)['noise'])


def test_a_state_from_the_middle_of_a_batch():
    """Accumulated gradients may be in a checkpoint, and go on; the parts that have been seen are not."""
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net)
    observe(noise, net, examples())
    total = noise.total
    backward(net, examples()[:1])
    noise.observe(4, last=False)
    resumed = go.monitor.NoiseScale(trainer, net)
    resumed.load_state_dict(noise.state_dict())
    noise.load_state_dict(resumed.state_dict())
    for each in (noise, resumed):
        each.observe(4, last=False)
        each.observe(4)
        assert each.total == total
        assert each.state_dict()['interrupted'] is False
        observe(each, net, examples(seed=1))
        assert each.batches == 2


RUN = '''
import os, signal, sys
sys.path.insert(0, {tests!r})
import mxnet as mx
import gluon_optim as go
from test_monitor import examples, observe, make
folder, end, die = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
net, trainer = make(2, optimizer='adamw', grad_req='add')
manager = go.CheckpointManager(folder, save_every=4)
noise = go.monitor.NoiseScale(trainer, net, path=folder + '/noise.csv')
norms = go.monitor.Norms(trainer, net, path=folder + '/norms.csv', every=2)
restored = manager.restore_latest(net, trainer)
if restored is not None:
    noise.load_state_dict(restored['noise'])
for step in range(restored.step if restored else 0, end):
    net.collect_params().zero_grad()
    observe(noise, net, examples((4, 2, 3, 3), seed=step), contexts=2)
    with norms:
        trainer.step(12)
    if step + 1 == die:
        with open(folder + '/norms.csv', 'a') as file:
            file.write('11,a,0.1')  # as if in the middle of a line
        os.kill(os.getpid(), signal.SIGKILL)
    manager.save(step + 1, net=net, trainer=trainer, extra={{'noise': noise.state_dict()}})
print(noise.table())
print(norms.table())
'''


def test_a_killed_run_continues_bit_for_bit(tmp_path):
    def process(folder, die):
        (tmp_path / folder).mkdir(exist_ok=True)
        done = subprocess.run([sys.executable, '-c', RUN.format(tests=str(ROOT / 'tests')), str(tmp_path / folder), '14', str(die)],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, 'PYTHONPATH': str(ROOT)})
        assert done.returncode == (-signal.SIGKILL if die else 0), done.stderr
        return done

    straight = process('straight', 0)
    process('killed', 11)
    assert len(rows_of(tmp_path / 'killed/noise.csv')) == 11
    resumed = process('killed', 0)
    assert resumed.stdout == straight.stdout
    for name in ('noise.csv', 'norms.csv'):
        assert (tmp_path / 'killed' / name).read_bytes() == (tmp_path / 'straight' / name).read_bytes()
    assert 'noise.csv: cut off 3 rows of updates 9 to 11' in resumed.stderr


# The CSV file

def test_a_row_file(tmp_path, caplog):
    path = tmp_path / 'rows.csv'
    rows = RowFile(path, ['update', 'x'], once=True)
    rows.write(1, [['a'], ['b, "c"']])
    rows.write(2, [[None]])
    rows.write(5, [[0.1]])
    assert path.read_text() == 'update,x\n1,a\n1,"b, ""c"""\n2,\n5,0.1\n'
    rows.write(2, [[7]])  # the run was set back
    assert path.read_text() == 'update,x\n1,a\n1,"b, ""c"""\n2,7\n'
    assert 'cut off 2 rows of updates 2 to 5' in caplog.text
    with open(path, 'a') as file:
        file.write('3,0.1')  # killed in the middle
    RowFile(path, ['update', 'x'], once=True).write(3, [[0.25]])
    assert path.read_text() == 'update,x\n1,a\n1,"b, ""c"""\n2,7\n3,0.25\n'
    with open(path, 'a') as file:
        file.write('1')  # of 12
    RowFile(path, ['update', 'x'], once=True).write(12, [[0.5]])
    assert path.read_text().endswith('\n3,0.25\n12,0.5\n')
    RowFile(path, ['update', 'x'], once=True).write(1, [[0]])
    assert path.read_text() == 'update,x\n1,0\n'


def test_an_unfinished_heading(tmp_path):
    path = tmp_path / 'rows.csv'
    path.write_text('upd')
    RowFile(path, ['update', 'x'], once=True).write(1, [[0]])
    assert path.read_text() == 'update,x\n1,0\n'


@pytest.mark.parametrize('cls', [go.monitor.NoiseScale, go.monitor.Norms])
def test_the_folder_of_a_new_run(tmp_path, monkeypatch, cls):
    """Is made, as a CheckpointManager makes it at its first save."""
    monkeypatch.chdir(tmp_path)
    _, trainer = make()
    for path in ('run/1/rows.csv', 'run/1/other.csv', 'rows.csv'):
        cls(trainer, path=path)
        assert os.path.exists(path)


def test_files_that_are_something_else_stay(tmp_path):
    path = tmp_path / 'other.csv'
    path.write_text('epoch,loss\n1,2\n')
    _, trainer = make()
    for cls in (go.monitor.NoiseScale, go.monitor.Norms):
        with pytest.raises(ValueError, match="its first line must be update,.* Received: 'epoch,loss'"):
            cls(trainer, path=path)
        with pytest.raises(OSError, match='other.csv'):
            cls(trainer, path=path / 'x.csv')
    assert path.read_text() == 'epoch,loss\n1,2\n'
    path.write_text('update,x\n1,2\nnotes\n')
    with pytest.raises(ValueError, match="must begin with the number of an update. Received: 'notes'"):
        RowFile(path, ['update', 'x'], once=True).write(3, [[0]])
    assert path.read_text() == 'update,x\n1,2\nnotes\n'


# Bad input

def test_a_single_part():
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net)
    backward(net, examples()[:1])
    with pytest.raises(ValueError, match='two parts at least.* Received: one, of 4 examples. Split it'):
        noise.observe(4)
    noise.observe(4, last=False)
    backward(net, examples()[1:2])
    noise.observe(2)
    np.testing.assert_allclose(figures(noise.total), two_sizes(examples()[:2]), rtol=2e-6)


def test_no_gradients():
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net)
    with pytest.raises(ValueError, match="Gradients must be new. Received: 'a', 'b'"):
        noise.observe(4, last=False)
    observe(noise, net, examples())
    trainer.step(12)
    with pytest.raises(ValueError, match='Gradients must be new'):
        noise.observe(4, last=False)
    deferred = gluon.nn.Dense(2)
    deferred.initialize()
    noise = go.monitor.NoiseScale(gluon.Trainer(deferred.collect_params(), 'sgd'), deferred)
    with pytest.raises(ValueError, match="Gradients must be new. Received: 'weight'"):
        noise.observe(4, last=False)


@pytest.mark.parametrize('size', [0, -1, 2.5, True, None, '4', [4], [4, 0], [4, 2, 1], 5])
def test_sizes(size):
    net, trainer = make(2)
    noise = go.monitor.NoiseScale(trainer, net)
    backward(net, examples()[:2])
    with pytest.raises(ValueError, match='`batch_size` must be'):
        noise.observe(size)
    assert noise.batches == 0
    noise.observe(6)
    noise.observe(np.int64(6))
    assert noise.batches == 2


def test_a_step_within_a_batch():
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net)
    for part in examples()[:2]:
        backward(net, [part])
        noise.observe(len(part['a']), last=False)
    trainer.step(6)
    backward(net, examples()[:1])
    with pytest.raises(ValueError, match='a part after a step, of a batch with 2 parts from before it, which are dropped'):
        noise.observe(4)
    observe(noise, net, examples(seed=1))
    assert noise.batches == 1
    np.testing.assert_allclose(figures(noise.total), two_sizes(examples(seed=1)), rtol=2e-6)


def test_gradients_that_have_been_summed_over_devices():
    net, trainer = make(2, update_on_kvstore=False)
    noise = go.monitor.NoiseScale(trainer, net)
    backward(net, examples()[:2])
    trainer.allreduce_grads()
    with pytest.warns(UserWarning, match='the same, as they are on all devices after allreduce_grads') as warned:
        noise.observe(6)
    assert warned[0].filename == __file__


def test_gradients_that_are_observed_twice():
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net)
    backward(net, examples()[:1])
    noise.observe(4, last=False)
    with pytest.warns(UserWarning, match=r'all parts are the same, as they are where observe is called again without another'
                                         r' backward\(\)') as warned:
        noise.observe(4)
    assert warned[0].filename == __file__


def test_parameters_that_change_within_a_batch():
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net)
    backward(net, examples()[:1])
    noise.observe(4, last=False)
    net.a.grad_req = 'null'
    backward(net, examples()[:1])
    with pytest.raises(ValueError, match="the same for all parts of a batch. Received: 'a', frozen or not"):
        noise.observe(4)


@pytest.mark.parametrize('arguments, error', [
    ({'averaging': 1.5}, r'`averaging` must be in \[0, 1\]'), ({'averaging': None}, '`averaging` must be'),
    ({'curvature': 0}, r'`curvature` must be in \(0, inf\)'), ({'reduction': 'max'}, "`reduction` must be one of 'sum', 'mean'"),
    ({'params': 'nothing'}, "`params` must match.*which matches none of 'a', 'b'"), ({'params': 3}, '`params` must be a pattern'),
    ({'writer': 'logs'}, r'`writer` must have add_scalar\(tag, value, step\). Received: str')])
def test_arguments(arguments, error):
    net, trainer = make()
    with pytest.raises((ValueError, TypeError), match=error):
        go.monitor.NoiseScale(trainer, net, **arguments)
    if not set(arguments) - {'params', 'writer'}:
        with pytest.raises((ValueError, TypeError), match=error):
            go.monitor.Norms(trainer, net, **arguments)


def test_trainers_that_cannot_be_watched():
    net, trainer = make(frozen=['a', 'b'])
    for cls in (go.monitor.NoiseScale, go.monitor.Norms):
        with pytest.raises(ValueError, match='Received: a trainer without any'):
            cls(trainer, net)
        with pytest.raises(TypeError, match='`trainer` must be a gluon.Trainer. Received: str'):
            cls('sgd')
    sparse = gluon.Parameter('table', shape=(3, 2), stype='row_sparse', grad_stype='row_sparse')
    sparse.initialize()
    with pytest.raises(ValueError, match="Parameters must be dense. Received: 'table'"):
        go.monitor.Norms(gluon.Trainer([sparse], 'sgd'))
    with pytest.raises(ValueError, match='`every` must be a whole number, 1 or more'):
        go.monitor.Norms(make()[1], every=0)


@pytest.mark.parametrize('damage', [
    lambda state: state.pop('total'), lambda state: state['total'].pop('g_sq'), lambda state: state['total'].update(g_sq=math.nan),
    lambda state: state['total'].update(g_sq='1'), lambda state: state.update(skipped=-1), lambda state: state.update(parameters=3),
    lambda state: state.update(rows=[1]), lambda state: state.update(rows=[1, -1]), lambda state: state.update(rows=3),
    lambda state: state['parameters'][0].pop('name'), lambda state: state['parameters'][0].update(name='c', full_name='c')])
def test_states_that_are_none(damage):
    net, trainer = make()
    noise = go.monitor.NoiseScale(trainer, net)
    observe(noise, net, examples())
    before = json.dumps(noise.state_dict())
    state = json.loads(before)
    damage(state)
    with pytest.raises(ValueError, match='The state must be'):
        noise.load_state_dict(state)
    assert json.dumps(noise.state_dict()) == before


# The documentation

def test_the_page_runs_and_runs_again(tmp_path, monkeypatch, capsys):
    """The second time the run is restored at its end."""
    pytest.importorskip('sklearn')
    pytest.importorskip('tensorboardX')
    monkeypatch.chdir(tmp_path)
    blocks = re.findall('```python\n(.*?)```', (ROOT / 'docs/MONITORS.md').read_text(encoding='utf-8'), re.DOTALL)
    assert len(blocks) == 3
    tables = []
    for _ in range(2):
        names = {}
        exec(compile(blocks[0], 'docs/MONITORS.md', 'exec'), names)  # noqa: S102
        tables.append(capsys.readouterr().out.partition('Norms')[0])
        for block in blocks[1:]:
            exec(compile(block, 'docs/MONITORS.md', 'exec'), names)  # noqa: S102
    assert tables[0] == tables[1]
    assert tables[0].startswith('NoiseScale after 100 batches: B* = ')
    assert [row[0] for row in rows_of('noise.csv')] == [str(k) for k in range(1, 102)]
    assert {tag for tag, _, step in events(tmp_path / 'events') if step == 102} >= {'noise/sigma_sq', 'update_ratio/2.weight'}
