"""`go.minimize`: the minimum is SciPy's for the same function in NumPy; runs resume; weights are written when they should be."""
import sys

import numpy
import pytest

mx = pytest.importorskip('mxnet')
scipy_optimize = pytest.importorskip('scipy.optimize')
datasets = pytest.importorskip('sklearn.datasets')

from mxnet import autograd, gluon, nd  # noqa: E402
from mxnet.gluon import nn  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim.mxnet.minimize import METHODS  # noqa: E402

WD = 0.01
BCE = gluon.loss.SigmoidBinaryCrossEntropyLoss()
L2 = gluon.loss.L2Loss()


def cancer():
    """The data, standardised; the loss and its gradient in NumPy, of 30 weights and a bias; and its minimum."""
    x, y = datasets.load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)

    def loss(w, wd=WD):
        z = x @ w[:30] + w[30]
        value = numpy.mean(numpy.logaddexp(0, z) - y * z) + wd * w @ w / 2
        error = (numpy.exp(-numpy.logaddexp(0, -z)) - y) / len(y)
        return value, numpy.append(x.T @ error, error.sum()) + wd * w
    return x, y, loss, scipy_optimize.minimize(loss, numpy.zeros(31), jac=True, method='BFGS', options={'gtol': 1e-12})


X, Y, LOSS, MINIMUM = cancer()
DATA = X, Y.astype('float64')


def dense(units=1, inputs=30, dtype='float64', ctx=None, **arguments):
    net = nn.Dense(units, in_units=inputs, **arguments)
    net.initialize(mx.init.Zero(), ctx=ctx)
    net.cast(dtype)
    return net


def weights(net):
    return numpy.concatenate([parameter.data().asnumpy().ravel() for parameter in net.collect_params().values()])


# The minimum

@pytest.mark.parametrize('method', METHODS)
def test_the_minimum_is_that_of_numpy(method):
    net = dense()
    result = go.minimize(net, BCE, DATA, method.upper(), wd=WD, tol=1e-13)
    assert abs(result.fun - MINIMUM.fun) < 1e-12
    assert abs(weights(net) - MINIMUM.x).max() < 1e-6
    assert numpy.array_equal(weights(net), result.x)
    assert (result.method, result.hessian) == (method, 'differences' if method in ('newton-cg', 'trust-ncg') else None)


@pytest.mark.parametrize('method', ['newton-cg', 'l-bfgs-b'])
def test_with_scipys_tolerances_the_minimum_is_that_of_scipy(method):
    net = dense()
    result = go.minimize(net, BCE, DATA, method, wd=WD)
    right = scipy_optimize.minimize(LOSS, numpy.zeros(31), jac=True, method=method)
    assert result.success
    assert abs(result.fun - right.fun) < 1e-8


@pytest.mark.parametrize('method', METHODS)
def test_each_iteration_is_that_of_scipy_in_numpy(method):
    """From a point where the sigmoids are saturated and first steps go too far."""
    def note(point):
        right.append(LOSS(point)[0])

    def hessian(w):
        z = DATA[0] @ w[:30] + w[30]
        rows = numpy.column_stack([DATA[0], numpy.ones(len(z))])
        share = numpy.exp(-numpy.logaddexp(0, -z))
        return rows.T @ (rows * (share * (1 - share))[:, None]) / len(z) + WD * numpy.eye(31)
    right, found, start = [], [], 3 * numpy.random.RandomState(0).standard_normal(31)
    options = {'maxiter': 8, **({'initial_trust_radius': 50} if method == 'trust-ncg' else {})}
    scipy_optimize.minimize(LOSS, start, jac=True, method=method, options=options, callback=note,
                            hess=hessian if method in ('newton-cg', 'trust-ncg') else None)
    net = dense()
    net.weight.set_data(nd.array(start[:30].reshape(1, -1), dtype='float64'))
    net.bias.set_data(nd.array(start[30:], dtype='float64'))
    go.minimize(net, BCE, DATA, method, wd=WD, options=options, callback=lambda iteration, value: found.append(value))
    assert len(found) == len(right) == 8
    assert numpy.allclose(found, right, rtol=1e-6)


def test_the_minimum_in_float32():
    net = dense(dtype='float32')
    result = go.minimize(net, BCE, DATA, 'l-bfgs-b', wd=WD)
    assert abs(LOSS(weights(net).astype('float64'))[0] - MINIMUM.fun) < 1e-6
    assert abs(result.fun - MINIMUM.fun) < 1e-6


def test_batches_of_different_sizes_are_one_whole():
    x, y = DATA
    batches = [(x[:500], y[:500]), (nd.array(x[500:510], dtype='float64'), nd.array(y[500:510])), (x[510:], y[510:])]
    loader = gluon.data.DataLoader(gluon.data.ArrayDataset(x.astype('float32'), y), batch_size=100)
    for data, apart in ((batches, 1e-12), (iter(batches), 1e-12), (loader, 1e-7)):
        result = go.minimize(dense(), BCE, data, 'l-bfgs-b', wd=WD, tol=1e-13)
        assert abs(result.fun - MINIMUM.fun) < apart


@pytest.mark.parametrize('reduction, factor', [('mean', 1), ('sum', len(Y))])
def test_reduction_and_losses_of_whole_batches(reduction, factor):
    def of_batch(output, label):
        losses = BCE(output, label)
        return losses.mean() if reduction == 'mean' else losses.sum()
    data = [(DATA[0][:300], DATA[1][:300]), (DATA[0][300:], DATA[1][300:])]
    for loss in (BCE, of_batch):
        result = go.minimize(dense(), loss, data, 'newton-cg', wd=WD * factor, reduction=reduction, tol=1e-12)
        assert abs(result.fun / factor - MINIMUM.fun) < 1e-12


def test_decay_is_that_of_a_trainer():
    net = dense()
    net.bias.wd_mult = 0
    go.minimize(net, BCE, DATA, wd=WD, tol=1e-12)
    before = weights(net)
    with autograd.record():
        loss = BCE(net(nd.array(X, dtype='float64')), nd.array(Y, dtype='float64'))
    loss.backward()
    gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 1, 'momentum': 0, 'wd': WD}).step(len(Y))
    assert abs(weights(net) - before).max() < 1e-6  # at the minimum there is nothing to do


@pytest.mark.parametrize('hybrid', [False, True])
def test_shapes_are_found_by_a_forward_pass(hybrid, tmp_path):
    """That leaves the statistics of BatchNorm as they were; a manager then finds all of the net."""
    def net(**known):
        made = nn.HybridSequential()
        made.add(nn.BatchNorm(scale=False, center=False, **({'in_channels': 30} if known else {})), nn.Dense(1, **known))
        made.initialize(mx.init.Zero())
        made.cast('float64')
        made.hybridize(hybrid)
        return made

    deferred, other = net(), net(in_units=30)
    batches = [(X[:400], DATA[1][:400]), (X[400:], DATA[1][400:])]
    results = [go.minimize(each, BCE, iter(batches), wd=WD) for each in (deferred, other)]
    assert results[0].success and numpy.array_equal(*(result.x for result in results))
    for mine, theirs in zip(deferred.collect_params().values(), other.collect_params().values()):
        numpy.testing.assert_array_equal(mine.data().asnumpy(), theirs.data().asnumpy())
    manager = str(tmp_path / 'run')
    first = go.minimize(net(), BCE, DATA, wd=WD, maxiter=2, manager=manager)
    assert go.minimize(net(), BCE, DATA, wd=WD, maxiter=3, manager=manager).nit == first.nit + 1 == 3


def test_several_inputs_and_frozen_parameters():
    class Sum(nn.HybridBlock):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Dense(1, in_units=2, use_bias=False), nn.Dense(1, in_units=1)

        def hybrid_forward(self, F, x, y):
            return self.first(x) + self.second(y)
    net = Sum()
    net.initialize()
    net.cast('float64')
    net.hybridize()
    net.second.bias.set_data(nd.array([3], dtype='float64'))
    net.second.bias.grad_req = 'null'
    random = numpy.random.RandomState(0)
    x, y = random.standard_normal((20, 2)), random.standard_normal((20, 1))
    target = x @ [[1], [2]] - y + 3
    result = go.minimize(net, L2, ([x, y], target))
    assert result.fun < 1e-12
    assert abs(weights(net) - [1, 2, -1, 3]).max() < 1e-5
    assert net.second.bias.data().asnumpy() == [3]


def test_after_batch_norm_inference_is_that_of_training():
    random = numpy.random.RandomState(0)
    x, y = 3 + 2 * random.standard_normal((60, 4)), random.standard_normal((60, 1))
    net = nn.HybridSequential()
    net.add(nn.Dense(3, activation='tanh'), nn.BatchNorm(momentum=0.8), nn.Dense(1))
    net.initialize()
    net.cast('float64')
    net(nd.array(x, dtype='float64'))
    go.minimize(net, L2, (x, y), 'l-bfgs-b', wd=1e-3)
    hidden = net[0](nd.array(x, dtype='float64')).asnumpy()
    assert abs(net[1].running_mean.data().asnumpy() - hidden.mean(0)).max() < 1e-9
    assert abs(net[1].running_var.data().asnumpy() - hidden.var(0)).max() < 1e-9


@pytest.mark.parametrize('of_mxnet', [False, True], ids=['numpy', 'mxnet.numpy'])
def test_arrays_of_mxnets_numpy(of_mxnet):
    mx.npx.set_np()
    try:
        data = [mx.np.array(each, dtype='float64') for each in DATA] if of_mxnet else DATA
        net = nn.HybridSequential()
        net.add(nn.Dense(1, in_units=30), nn.BatchNorm(scale=False, center=False), nn.Dense(1, in_units=1))
        mx.random.seed(0)
        net.initialize()
        net.cast('float64')
        net.hybridize()
        first = go.minimize(net, BCE, tuple(data), 'l-bfgs-b', wd=WD, maxiter=5)
        assert first.nit == 5 and first.fun < 0.3
        assert abs(net[1].running_mean.data().asnumpy() - net[0](mx.np.array(X, dtype='float64')).asnumpy().mean()).max() < 1e-9
    finally:
        mx.npx.reset_np()


# Where and when weights are written

@pytest.mark.parametrize('method', METHODS)
def test_a_step_too_far_is_taken_back(method):
    """w - log(w), which is not a number below 0, where Newton's step from 5 leads."""
    tried = []

    def loss(w, label):
        tried.append(w.asnumpy().item())
        return w - nd.log(w)
    net = dense(inputs=1, use_bias=False)
    net.weight.set_data(nd.array([[5]], dtype='float64'))
    result = go.minimize(net, loss, (numpy.ones((1, 1)), numpy.ones(1)), method, tol=1e-10)
    assert min(tried) < 0 or method not in ('newton-cg', 'l-bfgs-b')
    assert abs(net.weight.data().asscalar() - 1) < 1e-6
    assert numpy.isclose(result.fun, 1, atol=1e-12)


@pytest.mark.parametrize('on_kvstore', [True, False])
def test_weights_of_all_devices_and_of_a_trainer(on_kvstore):
    contexts = [mx.cpu(0), mx.cpu(1)]
    net = dense(ctx=contexts)
    trainer = gluon.Trainer(net.collect_params(), 'adamw', {'learning_rate': 1e-6}, kvstore='device', update_on_kvstore=on_kvstore)
    inputs = [nd.array(X, dtype='float64', ctx=context) for context in contexts]

    def step():
        with autograd.record():
            losses = [net(each).sum() for each in inputs]
        autograd.backward(losses)
        trainer.step(1)
    step()
    go.minimize(net, BCE, DATA, wd=WD)
    found = [array.asnumpy() for array in net.weight.list_data()]
    assert numpy.array_equal(*found)
    step()
    assert 0 < abs(net.weight.data(contexts[1]).asnumpy() - found[0]).max() < 1e-4


class Broken(Exception):
    pass


@pytest.mark.parametrize('method', ['newton-cg', 'l-bfgs-b'])
@pytest.mark.parametrize('fails_at', [0, 2])
def test_an_error_leaves_the_best_weights(fails_at, method):
    net = dense()

    def callback(iteration, value):
        seen.append(value)
        if iteration == fails_at:
            raise Broken
    seen = []
    loss = BCE
    if fails_at == 0:
        calls = iter(range(3))

        def loss(output, label):
            if next(calls, None) is None:
                raise Broken
            return BCE(output, label)
    with pytest.raises(Broken):
        go.minimize(net, loss, DATA, method, wd=WD, callback=callback)
    assert numpy.isclose(LOSS(weights(net))[0], seen[-1] if seen else numpy.log(2), rtol=1e-12)
    assert len(seen) == fails_at


def test_gradients_and_counts_of_a_trainer_stay():
    net = dense()
    trainer = gluon.Trainer(net.collect_params(), 'adamw')
    with autograd.record():
        loss = net(nd.array(X, dtype='float64')).sum()
    loss.backward()
    trainer.step(1)
    before, digest = net.weight.grad().asnumpy(), go.states_digest(trainer)
    go.minimize(net, BCE, DATA, wd=WD)
    assert numpy.array_equal(net.weight.grad().asnumpy(), before)
    assert go.states_digest(trainer) == digest


# How a run ends and goes on

def test_a_callback_ends_the_run():
    def callback(iteration, value):
        seen.append((iteration, value))
        if iteration == 3:
            raise StopIteration
    for method in METHODS:
        seen = []
        net = dense()
        result = go.minimize(net, BCE, DATA, method, wd=WD, callback=callback)
        assert [iteration for iteration, _ in seen] == [1, 2, 3]
        assert (result.nit, result.status, result.success) == (3, 99, False)
        assert result.fun == pytest.approx(LOSS(weights(net))[0], rel=1e-12)
        assert result.fun <= seen[-1][1] < seen[0][1] < numpy.log(2)


@pytest.mark.parametrize('method', METHODS)
def test_a_run_that_was_interrupted_resumes(method, tmp_path):
    def interrupt(iteration, value):
        if iteration == 3:
            raise KeyboardInterrupt

    def note(iteration, value):
        seen.append(iteration)
    with pytest.raises(KeyboardInterrupt):
        go.minimize(dense(), BCE, DATA, method, wd=WD, manager=tmp_path, callback=interrupt)
    manager, seen, net = go.CheckpointManager(tmp_path, keep_last=2), [], dense()
    assert manager.steps()[-1] == 3
    result = go.minimize(net, BCE, DATA, method, wd=WD, tol=1e-13, manager=manager, callback=note)
    assert seen[:2] == [4, 5]
    assert result.nit == manager.steps()[-1] >= seen[-1]
    assert abs(result.fun - MINIMUM.fun) < 1e-12
    other = dense()
    manager.restore_latest(net=other)
    assert numpy.array_equal(weights(other), weights(net))
    again = go.minimize(dense(), BCE, DATA, method, wd=WD, tol=1e-13, manager=manager)
    assert abs(again.fun - MINIMUM.fun) < 1e-12


def test_a_checkpoint_of_several_devices_holds_the_iterate(tmp_path):
    """On all of them; a net on one device gets the mean of what differs."""
    def interrupt(iteration, value):
        seen.append(value)
        if iteration == 3:
            raise KeyboardInterrupt
    seen, single = [], dense()
    with pytest.raises(KeyboardInterrupt):
        go.minimize(dense(ctx=[mx.cpu(0), mx.cpu(1)]), BCE, DATA, wd=WD, manager=tmp_path, callback=interrupt)
    go.CheckpointManager(tmp_path).restore_latest(net=single)
    assert LOSS(weights(single))[0] == pytest.approx(seen[-1], rel=1e-12)


def test_most_iterations_are_those_of_the_whole_run(tmp_path):
    first = go.minimize(dense(), BCE, DATA, 'l-bfgs-b', wd=WD, maxiter=4, manager=tmp_path)
    second = go.minimize(dense(), BCE, DATA, 'l-bfgs-b', wd=WD, maxiter=6, manager=tmp_path)
    third = go.minimize(dense(), BCE, DATA, 'l-bfgs-b', wd=WD, maxiter=6, manager=tmp_path)
    assert [first.nit, second.nit, third.nit] == [4, 6, 6]
    assert first.fun > second.fun == third.fun
    assert 'done 6 of 6 iterations' in third.message


def test_a_manager_saves_as_often_as_it_says(tmp_path):
    manager = go.CheckpointManager(tmp_path, keep_last=None, save_every=3)
    result = go.minimize(dense(), BCE, DATA, 'l-bfgs-b', wd=WD, maxiter=7, manager=manager)
    assert (result.nit, manager.steps()) == (7, [3, 6, 7])


def test_checkpoints_of_another_run_are_refused(tmp_path):
    go.minimize(dense(), BCE, DATA, wd=WD, maxiter=2, manager=tmp_path / 'run')
    other = dense()
    with pytest.raises(ValueError, match="'wd': 0.01.*Give each run its own folder"):
        go.minimize(other, BCE, DATA, wd=0.1, manager=tmp_path / 'run')
    go.CheckpointManager(tmp_path / 'other').save(1, net=other)
    with pytest.raises(ValueError, match='Give each run its own folder'):
        go.minimize(other, BCE, DATA, wd=WD, manager=tmp_path / 'other')
    assert not weights(other).any()


# What is refused

def call(net=None, loss=BCE, data=DATA, **arguments):
    return lambda: go.minimize(dense() if net is None else net(), loss, data, **arguments)


def frozen():
    net = dense()
    net.collect_params().setattr('grad_req', 'null')
    return net


@pytest.mark.parametrize('what, error, said', [
    (call(method='newton'), ValueError, "Unknown method 'newton'. Did you mean 'newton-cg'"),
    (call(method=None), TypeError, 'must be a string'),
    (call(reduction='none'), ValueError, "Unknown reduction 'none'"),
    (call(wd=-1), ValueError, '`wd`'),
    (call(wd='1'), ValueError, '`wd`'),
    (call(maxiter=-1), ValueError, '`maxiter`'),
    (call(options={'max_iter': 3}), ValueError, 'max_iter'),
    (call(net=lambda: dense().collect_params()), TypeError, '`net` must be a gluon.Block'),
    (call(net=frozen), ValueError, 'at least one trainable parameter'),
    (call(net=lambda: nn.Dense(1)), ValueError, r'must be initialized.*net.initialize'),
    (call(net=lambda: dense(dtype='float16')), ValueError, r'net.cast'),
    (call(data=3), TypeError, 'Received: int'),
    (call(data=[]), ValueError, 'at least one batch'),
    (call(data=[X]), TypeError, 'batches'),
    (call(data=[(X, Y, Y)]), TypeError, 'batches'),
    (call(data=(X, Y.tolist())), TypeError, 'batches'),
    (call(data=(X[:0], Y[:0])), ValueError, 'one row for each example'),
    (call(data=(X, DATA[1][:500])), ValueError, r'as many examples in x as in y.*Received: the shapes \(569, 30\) and \(500,\)'),
    (call(data=(X[:500], DATA[1]), loss=L2), ValueError, 'as many examples in x as in y'),
    (call(data=(X[:500], DATA[1]), loss=gluon.loss.SoftmaxCrossEntropyLoss(), net=lambda: dense(2)), ValueError, 'as many'),
    (call(data=[(X[:9], DATA[1][:9]), (X[:9], DATA[1][:8])]), ValueError, 'as many examples in x as in y'),
    (call(data=(X[:, :9], DATA[1])), mx.MXNetError, 'shape'),
    (call(loss=lambda output, label: output.asnumpy()), ValueError, 'Received: ndarray'),
    (call(loss=lambda output, label: output[:5]), ValueError, r'569 examples.*Received: the shape \(5, 1\)'),
    (call(loss=lambda output, label: nd.log(output)), ValueError, 'must be finite. Received: -inf'),
    (call(loss=lambda output, label: nd.Dropout(output + 1, p=0.5)), ValueError, 'train_mode=False'),
    (call(loss=lambda output, label: label), ValueError, 'must depend on the parameters'),
])
def test_what_is_refused(what, error, said):
    with pytest.raises(error, match=said):
        what()


def test_without_scipy_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'scipy.optimize', None)
    with pytest.raises(ImportError, match=r"go.minimize needs SciPy.*pip install '.\[curvature\]'"):
        call()()
