"""Sampling: the posteriors that sgld and psgld draw from, against closed forms, and chains on disk."""
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')
from mxnet import autograd, gluon, nd  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import reference  # noqa: E402
import sampling_runs  # noqa: E402
from contract_nets import environment, in_process  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim import rules  # noqa: E402

TEMPERATURES = (0.25, 1.0, 4.0)


@pytest.fixture(autouse=True)
def names_are_counted_from_0():
    """Noise is drawn in the order of names, and `dense10_` sorts before `dense9_`."""
    with mx.name.NameManager():
        yield


# Moments, and how far they may be from the truth

def effective_size(series):
    """The effective number of independent draws in ``series`` (steps, chains): its size over the integrated autocorrelation time.

    That is 1 + 2 sum rho_k, summed until rho_k is below 0.05 (Sokal's window, for chains that are many and short).
    """
    x = series - series.mean()
    variance, total = np.mean(x * x), 1.0
    for lag in range(1, len(x) // 2):
        correlation = np.mean(x[lag:] * x[:-lag]) / variance
        if correlation < 0.05:
            break
        total += 2 * correlation
    return series.size / total


def assert_moments(draws, mean, covariance, bias=0.0):
    """``draws`` (steps, dimensions, chains) have that mean and covariance within 4.5 standard errors, of the effective sample size
    in the test itself, and the relative ``bias`` of a covariance."""
    for i, expected in enumerate(mean):
        error = np.sqrt(covariance[i, i] / effective_size(draws[:, i]))
        assert abs(draws[:, i].mean() - expected) < 4.5 * error, (i, draws[:, i].mean(), expected, error)
    centred = draws - np.asarray(mean)[None, :, None]
    for i in range(len(mean)):
        for j in range(i + 1):
            products = centred[:, i] * centred[:, j]
            error = products.std() / np.sqrt(effective_size(products))
            scale = np.sqrt(covariance[i, i] * covariance[j, j])
            found = products.mean()
            assert abs(found - covariance[i, j]) < 4.5 * error + bias * scale, (i, j, found, covariance[i, j], error)
            assert 4.5 * error < 0.06 * scale  # sharp enough to see 6 %


def parameter(shape):
    p = gluon.Parameter('w', shape=shape)
    p.initialize(mx.init.Zero())
    return p


def drawn(chain):
    return np.array([weights['w'] for _, weights in chain], 'float64')


# Bayesian linear regression: a Gaussian posterior of two weights that are correlated

_random = np.random.RandomState(7)
X = _random.standard_normal((20, 2)) @ np.array([[0.5, 0.35], [0.0, 0.3]])
Y = X @ np.array([1.0, -2.0]) + 0.3 * _random.standard_normal(20)
PRIOR = 1.5
HESSIAN = X.T @ X + PRIOR * np.eye(2)
MEAN = np.linalg.solve(HESSIAN, X.T @ Y)


def regression(name, folder, temperature, chains, burn_in, thin, samples, **arguments):
    """Draws of ``chains`` independent chains in one parameter of shape (2, chains), from gradients of all examples."""
    mx.random.seed(int(4 * temperature))
    p, x, y = parameter((2, chains)), nd.array(X), nd.array(Y).reshape((-1, 1))
    trainer = gluon.Trainer([p], go.create(name, wd=PRIOR, **arguments))
    chain = go.sampling.Chain(trainer, folder, burn_in, thin, temperature)
    for _ in range(burn_in + thin * samples):
        with autograd.record():
            loss = gluon.loss.L2Loss(batch_axis=0)(nd.dot(x, p.data()), y.broadcast_to((len(Y), chains))) * chains
        loss.backward()  # L2Loss averages over all but the batch axis
        chain.step(len(Y), len(Y))
    return drawn(chain)


def discretised(temperature, rate, scales=(1.0, 1.0)):
    """The exact stationary covariance of w += -rate/2 G H (w - m) + sqrt(rate temperature G) x with constant G.

    S = M S M' + rate temperature G with M = 1 - rate/2 G H has the solution temperature (H - rate/4 H G H)^-1; for one weight of
    curvature a, temperature / (a (1 - rate G a / 4)).
    """
    return temperature * np.linalg.inv(HESSIAN - rate / 4 * HESSIAN @ np.diag(scales) @ HESSIAN)


@pytest.mark.parametrize('temperature, noise', [*[(temperature, 'mxnet') for temperature in TEMPERATURES], (1.0, 'philox')])
def test_sgld_has_the_posterior_of_a_regression(tmp_path, temperature, noise):
    """With its discretisation, which is a third of the variance here: so the rate, the noise and the decay are all felt."""
    rate = 1.6 / np.linalg.eigvalsh(HESSIAN).max()
    draws = regression('sgld', tmp_path, temperature, 3000, 40, 4, 20, learning_rate=rate, noise=noise)
    expected = discretised(temperature, rate)
    assert (np.diag(expected) / np.diag(temperature * np.linalg.inv(HESSIAN))).max() > 1.2
    assert_moments(draws, MEAN, expected)


@pytest.mark.parametrize('temperature', TEMPERATURES)
def test_psgld_has_the_posterior_of_a_regression(tmp_path, temperature):
    """As if G were constant, but for what leaving Gamma out costs: (1 - rho) / (rate G a) of a variance."""
    rate, rho, epsilon = 0.8, 0.99, 1.0
    draws = regression('psgld', tmp_path, temperature, 1000, 500, 10, 40, learning_rate=rate, rho=rho, epsilon=epsilon)
    covariance = discretised(temperature, 0.0)
    for _ in range(100):  # V is the mean of g^2, which depends on the covariance; g is without the prior
        g = X.T @ X @ MEAN - X.T @ Y
        scales = 1 / (epsilon + np.sqrt(g ** 2 + np.diag(X.T @ X @ covariance @ X.T @ X)))
        covariance = discretised(temperature, rate, scales)
    slowest = np.linalg.eigvals(np.diag(scales) @ HESSIAN).real.min()
    assert_moments(draws, MEAN, covariance, bias=(1 - rho) / (rate * slowest))


def trained(trainer, p, loss, steps, every=1, burn_in=0):
    """The values of ``p`` after every ``every`` updates that follow ``burn_in``, from one gradient of ``loss(p)`` each."""
    values = []
    for k in range(1, burn_in + steps + 1):
        with autograd.record():
            value = loss(p.data())
        value.backward()
        trainer.step(1)
        if k > burn_in and (k - burn_in) % every == 0:
            values.append(p.data().asnumpy().astype('float64'))
    return np.array(values)


def assert_variance(values, expected, within=0.0):
    """The variance around 0 of ``values`` (steps, chains), within 4.5 standard errors and the relative difference ``within``."""
    squares = values * values
    error = squares.std() / np.sqrt(effective_size(squares))
    assert abs(squares.mean() - expected) < 4.5 * error + within * expected, (squares.mean(), expected, error)
    assert 4.5 * error < 0.05 * expected


def test_what_psgld_loses_without_gamma():
    """Where V forgets as fast as the chain moves, variances are too large, by (1 - rho) / (rate G a) to first order."""
    a, temperature, rate, rho, epsilon = 0.5, 4.0, 1.0, 0.96, 0.05
    mx.random.seed(1)
    p = parameter((4000,))
    p.set_data(nd.random.normal(scale=np.sqrt(temperature / a), shape=p.shape))
    trainer = gluon.Trainer([p], 'psgld', {'learning_rate': rate, 'rho': rho, 'epsilon': epsilon, 'temperature': temperature})
    values = trained(trainer, p, lambda w: (a * w * w / 2).sum(), 200, every=5, burn_in=200)
    variance = temperature / a
    for _ in range(50):
        scale = 1 / (epsilon + a * np.sqrt(variance))
        variance = temperature / (a * (1 - rate * scale * a / 4))
    bias = (1 - rho) / (rate * scale * a)
    assert 0.1 < bias < 0.2
    assert_variance(values, variance * (1 + bias), within=bias / 4)


@pytest.mark.parametrize('name', ['sgld', 'psgld'])
def test_the_gradient_is_that_of_the_whole_data_set(tmp_path, name):
    """From batches of 5 of 60 examples, each chain its own: the posterior of a mean, and what their noise adds to its variance."""
    size, batch, wd, chains = 60, 5, 20.0, 4000
    y = np.random.RandomState(0).standard_normal(size) + 1.0
    a = size + wd
    variance_of_gradient = size ** 2 * y.var() / batch
    mx.random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    mean, rate = y.sum() / a, 0.3 / a

    def variance(scale):
        return (1 + rate * scale / 4 * variance_of_gradient) / (a * (1 - rate * scale * a / 4))

    scale = 1.0
    if name == 'psgld':  # V is mostly the noise of batches, which does not depend on w
        rate *= 30
        for _ in range(50):
            scale = 1 / (1.0 + np.sqrt(variance_of_gradient + (wd * mean) ** 2 + size ** 2 * variance(scale)))
    p = parameter((chains,))
    trainer = gluon.Trainer([p], name, {'learning_rate': rate, 'wd': wd})
    chain = go.sampling.Chain(trainer, tmp_path, 60 if name == 'sgld' else 500, 10)
    for _ in range(chain.burn_in + 200):
        drawn_y = nd.array(y[np.random.randint(size, size=(batch, chains))])  # noqa: NPY002
        with autograd.record():
            loss = (p.data() - drawn_y) ** 2 / 2  # a row per example
        loss.backward()
        chain.step(batch, size)
    values = drawn(chain)
    expected = variance(scale)
    assert expected * a > 1.2
    assert abs(values.mean() - mean) < 4.5 * np.sqrt(expected / effective_size(values))
    assert_variance(values - mean, expected, within=0.0 if name == 'sgld' else 0.02)


@pytest.mark.parametrize('curvature', [0.5, 2.0, 8.0])
def test_sgd_with_a_constant_rate_walks_about_the_minimum(curvature):
    """The lecture's random walk: var = lr sigma^2 / (a (2 - lr a)), as of a temperature lr sigma^2 / 2."""
    rate, sigma = 0.2, 3.0
    mx.random.seed(4)
    p = parameter((20000,))
    trainer = gluon.Trainer([p], 'sgd', {'learning_rate': rate})
    values = trained(trainer, p, lambda w: (curvature * w * w / 2 + sigma * nd.random.normal(shape=w.shape) * w).sum(), 60, every=6,
                     burn_in=80)
    assert_variance(values, rate * sigma ** 2 / (curvature * (2 - rate * curvature)))


# The rules

def test_psgld_equals_its_paper():
    """The rule in float64 and on MXNet's operators against the formulas of the paper, with the same noise."""
    random = np.random.RandomState(0)
    w0, gradients, noise = random.standard_normal((3, 4)), random.standard_normal((9, 3, 4)), random.standard_normal((9, 3, 4))
    hypers = {'wd': 0.07, 'rescale_grad': 0.4, 'clip_gradient': 0.5, 'rho': 0.8, 'epsilon': 0.05, 'temperature': 1.7}
    rates = 0.3 + 0.2 * np.cos(np.arange(9))
    rule = rules.get('psgld')
    h = rule.hyperparameters(**hypers)

    def run(changed):
        w, slots, found = w0, None, []
        for t in range(9):
            xp = types.SimpleNamespace(sqrt=np.sqrt, minimum=np.minimum, maximum=np.maximum)
            xp.standard_normal = lambda like, t=t: noise[t]
            w, slots = rule.run(xp, changed.replace(learning_rate=rates[t] * changed.learning_rate), t + 1, w, gradients[t], slots)
            found.append(w)
        return np.array(found), slots['mean_sq']

    expected, v = reference.psgld_path(hypers, w0, gradients, rates, noise)
    weights, slot = run(h.replace(learning_rate=1.0))
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    np.testing.assert_allclose(slot, v, rtol=1e-12)
    for name in ('learning_rate', *hypers):  # each is felt
        one = h.replace(learning_rate=1.0)
        assert np.abs(run(one.replace(**{name: 1.01 * getattr(one, name)}))[0] - expected).max() > 1e-4, name


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('name', ['sgld', 'psgld'])
def test_a_trainer_computes_the_rule(name, dtype):
    """With the noise that MXNet draws, at a temperature of 1.7 and with masters."""
    hypers = {'wd': 0.07, 'temperature': 1.7, **({'epsilon': 0.5} if name == 'psgld' else {})}
    p = gluon.Parameter('w', shape=(5, 7), dtype=dtype)
    p.initialize(mx.init.Normal(1.0))
    trainer = gluon.Trainer([p], go.create(name, learning_rate=0.1, multi_precision=True, noise='mxnet', **hypers))
    rule, exact = rules.get(name), 'float64' if dtype == 'float64' else 'float32'
    h, w, slots = rule.hyperparameters(learning_rate=0.1, **hypers), p.data().asnumpy().astype('float64'), None
    for t in range(1, 4):
        with autograd.record():
            loss = (p.data() * p.data()).sum()
        loss.backward()
        g = p.grad().asnumpy().astype('float64')
        mx.random.seed(t)
        trainer.step(1)
        mx.random.seed(t)
        x = nd.random.normal(shape=(5, 7), dtype=exact).asnumpy()
        xp = types.SimpleNamespace(sqrt=np.sqrt, standard_normal=lambda _, x=x: x)
        w, slots = rule.run(xp, h, t, w, g, slots, exact=True)
        rtol = {'float16': 1e-3, 'float32': 1e-5, 'float64': 1e-12}[dtype]
        np.testing.assert_allclose(p.data().asnumpy(), w, rtol=rtol, atol=0.01 * rtol)


@pytest.mark.parametrize('multi_precision', [True, 'kahan'])
def test_samples_hold_the_rounded_weights_of_float16(tmp_path, multi_precision):
    p = gluon.Parameter('w', shape=(200,), dtype='float16')
    p.initialize(mx.init.Constant(0.5))
    optimizer = go.create('psgld', learning_rate=1e-6, multi_precision=multi_precision)
    trainer = gluon.Trainer([p], optimizer, update_on_kvstore=False)
    chain = go.sampling.Chain(trainer, tmp_path / 'chain', burn_in=0, thin=1)
    for _ in range(3):
        p.data()._fresh_grad = True
        chain.step(1, 10)
    _, sample = list(chain)[-1]
    slots, master = optimizer.split_state(trainer._updaters[0].states[0], optimizer.hyperparameters(), multi_precision)
    exact = master.asnumpy() if master is not None else p.data().asnumpy().astype('float32') + slots[-1].asnumpy()
    assert sample['w'].dtype == np.float16
    # half of the last digit, which in a tie is rounded either way
    assert (np.abs(exact - sample['w']) <= np.spacing(np.abs(sample['w'])).astype('float32') / 2).all()
    assert 1e-5 < np.abs(exact - sample['w']).max() < 2.0 ** -11   # the walk is finer than the type


def test_sgld_at_temperature_1_is_mxnets():
    results = []
    for optimizer in ('sgld', go.create('sgld', learning_rate=0.01, wd=0.1, temperature=1)):
        mx.random.seed(0)
        p = parameter((50,))
        trainer = gluon.Trainer([p], optimizer, {'learning_rate': 0.01, 'wd': 0.1} if isinstance(optimizer, str) else None)
        results.append(trained(trainer, p, lambda w: ((w - 1) ** 2).sum(), 5))
    np.testing.assert_array_equal(*results)


def test_tempered_sgld_counts_rates_and_refuses_as_ever(tmp_path):
    """A rate of 0 leaves the parameter, a negative one names it, a scheduler is asked once, a native save refuses."""
    asked = []

    class Scheduler(mx.lr_scheduler.LRScheduler):
        def __call__(self, t):
            asked.append(t)
            return (0.1, 0.0, -1.0)[t - 1]
    p = parameter((3,))
    trainer = gluon.Trainer([p], go.create('sgld', lr_scheduler=Scheduler(), temperature=2.0))
    first, second = trained(trainer, p, lambda w: w.sum(), 2)
    np.testing.assert_array_equal(first, second)
    assert asked == [1, 2] and trainer._optimizer.num_update == 2
    with pytest.raises(ValueError, match="must be 0 or more. Received: -1.0 for the parameter 'w'"):
        trained(trainer, p, lambda w: w.sum(), 1)
    trainer._optimizer.lr_scheduler, trainer._optimizer.lr = None, 0.1
    p.wd_mult = float('nan')
    with pytest.raises(ValueError, match='must be finite'):
        trained(trainer, p, lambda w: w.sum(), 1)
    assert trainer._optimizer.num_update == 2
    with pytest.raises(ValueError, match="sgld that is pickled must be 1, for MXNet's own has none. Received: temperature=2.0"):
        trainer.save_states(str(tmp_path / 'states'))


def test_psgld_is_no_optimizer_of_the_list():
    assert 'psgld' not in go.list_optimizers() and 'psgld' not in rules.names(drop_ins=True)
    assert 'psgld' in rules.names(samplers=True)
    info = go.optimizer_info('psgld')
    assert info.runtimes == ('mxnet', 'numpy') and [hyper.name for hyper in info.hypers][:6] == [
        'learning_rate', 'wd', 'rho', 'epsilon', 'temperature', 'noise']
    assert go.optimizer_info('sgld').runtimes == ('mxnet (operators only)', 'numpy')  # by default MXNet draws
    with pytest.raises(ValueError, match="`base` must be one of.*Received: base='psgld'"):
        go.create('larc', base='psgld')
    with pytest.raises(ValueError, match="'psgld' is an optimizer of gluon_optim"):
        go.accelerate('psgld')
    with pytest.raises(ValueError, match='is taken'):
        go.register('psgld')(type('Mine', (go.Rule,), {}))


# Chains on disk

def advance(net, trainer, chain, steps, manager=None):
    for _ in range(steps):
        sampling_runs.step(net, trainer, chain)
        if manager:
            manager.save(chain.position, net, trainer)


@pytest.mark.parametrize('name', ['sgld', 'psgld', 'sgld philox'])
def test_a_killed_chain_draws_the_same_samples(tmp_path, name):
    """Killed with SIGKILL at random instants, and resumed each time from the newest checkpoint."""
    done = subprocess.run([sys.executable, str(Path(sampling_runs.__file__)), str(tmp_path / 'run'), '4', name], timeout=120,
                          stdout=subprocess.PIPE, env=environment(), check=True)
    found = json.loads(done.stdout)
    assert found['reached'] >= 12 and len(found['straight']) > 6
    assert found['resumed'] == found['straight']


OPTIONS = {'one': {}, 'two': {'contexts': (0, 1), 'update_on_kvstore': True}}


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize('name', ['sgld', 'psgld', "MXNet's sgld", *sampling_runs.NOISES])
def test_a_resumed_chain_draws_the_same_samples(tmp_path, name, options):
    """In a new net and trainer, with dropout and noise, from a checkpoint between two samples; V is in it."""
    first, second = str(tmp_path / 'straight'), str(tmp_path / 'resumed')
    digests = []
    for folder in (first, second):
        run = sampling_runs.make(folder, name, thin=3, **options)
        advance(*run, 7, go.CheckpointManager(folder, save_every=7))
        if folder == second:
            advance(*run, 5)  # drawn, and lost
            run = sampling_runs.make(folder, name, thin=3, seed=9, **options)
            assert go.CheckpointManager(folder).restore_latest(*run[:2]).step == 7
            advance(*run, 1)
            assert run[2].steps() == [6]  # those after the checkpoint were set aside at once
        advance(*run, 11 - (folder == second))
        digests.append(go.states_digest(run[1], run[0]))
    assert sampling_runs.facts(first) == sampling_runs.facts(second) and digests[0] == digests[1]
    assert run[2].steps() == [6, 9, 12, 15, 18]
    for parameter in run[1]._params:  # no copy has a noise of its own
        assert len({data.asnumpy().tobytes() for data in parameter.list_data()}) == 1
    assert sorted(name for name in os.listdir(second + '/chain') if 'abandoned' in name) == [
        f'sample-{step}.safetensors.abandoned' for step in (12, 9)]


def test_a_sample_is_kept_after_burn_in_and_every_thin_updates(tmp_path):
    net, trainer, chain = sampling_runs.make(str(tmp_path), thin=4)
    kept = []
    for _ in range(12):
        if sampling_runs.step(net, trainer, chain):
            kept.append(chain.position)
            path = chain.path(chain.position)
            other = sampling_runs.make(str(tmp_path / 'other'), seed=5)[0]
            assert go.load_checkpoint(path, net=other).step == chain.position
            for name, parameter in net._collect_params_with_prefix().items():
                np.testing.assert_array_equal(parameter.data().asnumpy(),
                                              other._collect_params_with_prefix()[name].data().asnumpy())
    assert kept == chain.steps() == [7, 11] and len(chain) == 2
    assert 'burn_in=3, thin=4, temperature=2.0: 2 samples at update 12' in repr(chain)
    assert chain.keep() is False  # again at the same position


def test_a_skipped_update_is_none(tmp_path):
    net, trainer, chain = sampling_runs.make(str(tmp_path), 'psgld', thin=1)
    advance(net, trainer, chain, 4)
    trainer._scale = nd.array([float('nan')])  # so that rescale_grad is NaN, as where a batch size is
    assert not sampling_runs.step(net, trainer, chain)
    assert chain.position == 4 and chain.steps() == [4]
    again = go.sampling.Chain(trainer, chain.directory, 3, 1, 2.0, net)  # nor is it one where the chain begins with it
    assert not sampling_runs.step(net, trainer, again) and os.listdir(chain.directory) == ['sample-4.safetensors']
    trainer._scale = 1.0
    assert sampling_runs.step(net, trainer, chain) and chain.steps() == [4, 5]


def test_a_chain_that_is_taken_back_draws_again(tmp_path):
    """To an earlier checkpoint, while it runs: also by a single update."""
    net, trainer, chain = sampling_runs.make(str(tmp_path), thin=1)
    manager = go.CheckpointManager(tmp_path / 'checkpoints')
    advance(net, trainer, chain, 6, manager)
    for back in (5, 4):
        manager.restore(back, net, trainer)
        assert sampling_runs.step(net, trainer, chain) and chain.steps() == list(range(4, back + 2))


def test_one_may_update_without_step(tmp_path):
    net, trainer, chain = sampling_runs.make(str(tmp_path), kvstore='device', update_on_kvstore=False)
    for _ in range(5):
        with autograd.record():
            loss = net(nd.ones((4, 16))).sum()
        loss.backward()
        trainer.allreduce_grads()
        trainer.update(4 / 100)
        chain.keep()
    assert chain.steps() == [5]


def test_a_new_run_sets_aside_what_an_old_one_left(tmp_path, caplog):
    advance(*sampling_runs.make(str(tmp_path)), 9)
    (tmp_path / 'chain/.sample-5.safetensors.0123456789abcdef.tmp').write_bytes(b'of a writer that was killed')
    run = _, _, chain = sampling_runs.make(str(tmp_path), seed=1)
    assert chain.steps() == [5, 7, 9]
    advance(*run, 5)
    assert chain.steps() == [5]
    assert sorted(os.listdir(tmp_path / 'chain')) == ['sample-5.safetensors'] + [
        f'sample-{step}.safetensors.abandoned' for step in (5, 7, 9)]
    assert 'holds the samples of the later steps 5, 7, 9' in caplog.text


def test_the_temperature_is_saved_and_must_stay(tmp_path):
    net, trainer, chain = sampling_runs.make(str(tmp_path), temperature=2.0)
    advance(net, trainer, chain, 6)
    go.save_checkpoint(tmp_path / 'six', net, trainer)
    assert go.read_states(tmp_path / 'six').hypers['temperature'] == 2.0
    other = sampling_runs.make(str(tmp_path), temperature=0.5)
    with pytest.warns(UserWarning, match="temperature is 0.5 in the trainer and 2.0 in the file: the file's applies"):
        go.load_checkpoint(tmp_path / 'six', *other[:2])
    with pytest.raises(ValueError, match='must stay that of the chain, 0.5. Received: 2.0'):
        sampling_runs.step(*other)
    other[1]._optimizer.temperature = 0.5
    with pytest.raises(ValueError, match='samples of this chain only. Received: others, .temperature 2.0 there, 0.5 here'):
        sampling_runs.step(*other)
    assert other[2].position == 6  # before anything is updated
    assert sampling_runs.facts(str(tmp_path)).keys() == {'5'}
    # MXNet's own cannot take it
    with pytest.raises(ValueError, match="MXNet's own sgld has no `temperature`. Received from the file: temperature=2.0"):
        go.load_states(gluon.Trainer(net.collect_params(), 'sgld'), tmp_path / 'six', net)


def test_states_of_sgld_without_a_temperature_are_those_of_1(tmp_path):
    """Files of versions before this one, and MXNet's own."""
    _, trainer, _ = sampling_runs.make(str(tmp_path), temperature=1.0)
    trainer.save_states(str(tmp_path / 'native'))
    states = go.read_states(tmp_path / 'native')
    assert 'temperature' not in states.hypers
    go.load_states(trainer, tmp_path / 'native')
    assert trainer._optimizer.temperature == 1


# Prediction

def linear(folder, chains_of=((1.0, 2.0), (3.0, -2.0), (5.0, 3.0))):
    """A net x -> a x + b, and its chain with samples whose a and b are given."""
    net = gluon.nn.Dense(1, in_units=1)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), go.create('sgld', learning_rate=0.0))
    chain = go.sampling.Chain(trainer, folder, burn_in=0, thin=1, net=net)
    for a, b in chains_of:
        net.weight.set_data(nd.array([[a]]))
        net.bias.set_data(nd.array([b]))
        with autograd.record():
            loss = net(nd.ones((1, 1)))
        loss.backward()
        chain.step(1, 1)
    return net, trainer, chain


def test_predict_is_mean_and_spread_over_the_samples(tmp_path):
    net, _, chain = linear(tmp_path)
    before = net.weight.data().asnumpy()
    mean, std = chain.predict(net, nd.array([[0.0], [2.0]]))
    values = np.array([[2.0, 4.0], [-2.0, 4.0], [3.0, 13.0]])
    np.testing.assert_allclose(mean.asnumpy().ravel(), values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std.asnumpy().ravel(), values.std(0), rtol=1e-6)
    np.testing.assert_array_equal(net.weight.data().asnumpy(), before)
    mean, std = chain.predict(net, [nd.array([[2.0]])], output=lambda y: y * y)
    np.testing.assert_allclose(mean.asnumpy(), [[(16 + 16 + 169) / 3]], rtol=1e-6)
    with pytest.raises(TypeError, match='must be one array. Received: tuple'):
        chain.predict(net, nd.ones((1, 1)), output=lambda y: (y, y))
    np.testing.assert_array_equal(net.weight.data().asnumpy(), before)


def test_predict_in_a_process_of_its_own(tmp_path):
    """From the folder alone, into a net that leaves its shapes open."""
    net, _, chain = linear(tmp_path)
    mean, std = chain.predict(net, nd.array([[2.0]]))
    out, _ = in_process("""if True:
        import sys, gluon_optim as go
        from mxnet import gluon, nd
        net = gluon.nn.Dense(1)
        net.initialize()
        mean, std = go.sampling.Samples(sys.argv[1]).predict(net, nd.array([[2.0]]))
        print(mean.asscalar(), std.asscalar(), [step for step, weights in go.sampling.Samples(sys.argv[1])])
    """, tmp_path)
    assert out == f'{mean.asscalar()} {std.asscalar()} [1, 2, 3]\n'


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_predict_leaves_the_chain_as_it_was(tmp_path, options):
    """Between two steps, where parameters are on one and on two devices: the same samples follow."""
    straight = sampling_runs.make(str(tmp_path / 'a'), 'psgld', **options)
    advance(*straight, 9)
    disturbed = sampling_runs.make(str(tmp_path / 'b'), 'psgld', **options)
    advance(*disturbed, 6)
    disturbed[2].predict(disturbed[0], nd.ones((2, 16)))
    advance(*disturbed, 3)
    assert sampling_runs.facts(str(tmp_path / 'a')) == sampling_runs.facts(str(tmp_path / 'b'))


def test_predict_neither_trains_nor_records(tmp_path):
    net, trainer, chain = sampling_runs.make(str(tmp_path))
    advance(net, trainer, chain, 7)
    x = nd.ones((2, 16))
    mean, _ = chain.predict(net, x)
    with autograd.record():  # dropout would be on
        again, _ = chain.predict(net, x)
    np.testing.assert_array_equal(mean.asnumpy(), again.asnumpy())


def test_the_spread_of_one_sample_is_0_and_of_large_means_is_right(tmp_path):
    net, _, chain = linear(tmp_path / 'one', [(1.0, 2.0)])
    assert chain.predict(net, nd.ones((1, 1)))[1].asscalar() == 0
    net, _, chain = linear(tmp_path / 'large', [(0.0, 4000000.0), (0.0, 4000001.0)])
    assert chain.predict(net, nd.ones((1, 1)))[1].asscalar() == 0.5


# What is refused

def test_bad_arguments_are_refused(tmp_path):
    net = gluon.nn.Dense(1, in_units=1)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'psgld')
    good = dict(trainer=trainer, directory=tmp_path, burn_in=0, thin=1)
    for changed, match in [
            (dict(burn_in=-1), '`burn_in` must be a whole number, 0 or more. Received: burn_in=-1'),
            (dict(thin=0), '`thin` must be a whole number, 1 or more. Received: thin=0'), (dict(thin=2.5), '`thin` must be'),
            (dict(temperature=0), r'`temperature` must be in \(0, inf\). Received: temperature=0'),
            (dict(temperature=-1.0), '`temperature` must be'), (dict(temperature=float('nan')), '`temperature` must be'),
            (dict(trainer=gluon.Trainer(net.collect_params(), 'adam')), "must draw samples.*Received: 'adam'"),
            (dict(trainer=gluon.Trainer(net.collect_params(), 'novograd')), "must draw samples.*Received: 'novograd'"),
            (dict(trainer=gluon.Trainer(net.collect_params(), 'sgld'), temperature=2.0),
             'sgld has no temperature, it samples at 1. Received: temperature=2.0'),
            (dict(net=gluon.nn.Dense(2, in_units=1)), 'initialize')]:
        with pytest.raises(ValueError, match=match):
            go.sampling.Chain(**dict(good, **changed))
    with pytest.raises(TypeError, match='`temperature` must be'):
        go.sampling.Chain(**good, temperature='hot')
    with pytest.raises(TypeError, match='`trainer` must be a gluon.Trainer. Received: Dense'):
        go.sampling.Chain(**dict(good, trainer=net))
    assert trainer._optimizer.temperature == 1  # nothing was changed
    chain = go.sampling.Chain(**good)
    for sizes, match in [((0, 5), '`batch_size` must be'), ((2.5, 5), '`batch_size` must be'), ((5, 0), '`dataset_size` must be'),
                         ((100, 4), '`dataset_size` must be at least `batch_size`. Received: batch_size=100, dataset_size=4')]:
        with pytest.raises(ValueError, match=match):
            chain.step(*sizes)
    assert chain.position == 0
    with pytest.raises(ValueError, match='There must be samples to predict with. Received: none in'):
        chain.predict(net, nd.ones((1, 1)))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('name', ['sgld', 'psgld mxnet'])
def test_copies_that_would_drift_apart_are_refused(tmp_path, name):
    net, trainer, chain = sampling_runs.make(str(tmp_path), name, contexts=(0, 1), update_on_kvstore=False)
    before = net[0].weight.data(mx.cpu(0)).asnumpy()
    with pytest.raises(ValueError, match='must get the same noise.*update_on_kvstore=True'):
        sampling_runs.step(net, trainer, chain)
    if name == 'psgld mxnet':  # without a chain too
        with pytest.raises(ValueError, match='psgld must draw one noise.*update_on_kvstore=True'):
            trainer.step(4)
    np.testing.assert_array_equal(before, net[0].weight.data(mx.cpu(0)).asnumpy())


def test_a_chain_that_diverges_says_so(tmp_path):
    run = _, trainer, chain = sampling_runs.make(str(tmp_path), thin=1)
    trainer.set_learning_rate(1e4)
    with pytest.raises(ValueError, match=r"A sample must be finite. Received: '0.weight'.* the chain has diverged"):
        advance(*run, 40)
    assert all(np.isfinite(array).all() for _, weights in chain for array in weights.values())


def test_what_cannot_be_kept_is_refused_before_the_first_step(tmp_path):
    sparse = gluon.Parameter('w', shape=(4, 2), stype='row_sparse', grad_stype='row_sparse')
    sparse.initialize()
    with pytest.raises(ValueError, match='must be dense. Received: w'):
        go.sampling.Chain(gluon.Trainer([sparse], 'sgld'), tmp_path, 0, 1)


def test_a_damaged_sample_and_another_net_are_refused(tmp_path):
    net, _, chain = linear(tmp_path)
    with pytest.raises(ValueError, match='must be initialized'):
        chain.predict(gluon.nn.Dense(1, in_units=1), nd.ones((1, 1)))
    other = gluon.nn.Dense(2, in_units=1)
    other.initialize()
    with pytest.raises(ValueError, match='must have the same parameters'):
        chain.predict(other, nd.ones((1, 1)))
    before = net.weight.data().asnumpy()
    path = Path(chain.path(2))
    whole = path.read_bytes()
    go.save_states(chain.trainer, path, net)
    with pytest.raises(ValueError, match='sample-2.* must be a sample. Received: a file of optimizer states'):
        chain.predict(net, nd.ones((1, 1)))
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match='sample-2'):
        chain.predict(net, nd.ones((1, 1)))
    np.testing.assert_array_equal(net.weight.data().asnumpy(), before)


# What the documents show

def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    pytest.importorskip('sklearn')
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / 'docs/SAMPLING.md').read_text(encoding='utf-8')
    code = re.search('```python\n(.*?)```', text, re.DOTALL).group(1)
    names = {}
    exec(compile(code, 'docs/SAMPLING.md', 'exec'), names)  # noqa: S102
    assert names['chain'].steps() == list(range(220, names['chain'].position + 1, 20))
    np.testing.assert_allclose(names['mean'].asnumpy().sum(1), 1, rtol=1e-5)
    assert (names['mean'].asnumpy().argmax(1) == names['labels'][:5].asnumpy()).all()


def test_rules_draw_noise_with_numpy():
    """From its global generator, as `Rule.run` promises of any namespace like NumPy."""
    for name in ('sgld', 'psgld'):
        rule = rules.get(name)
        np.random.seed(0)  # noqa: NPY002
        h = rule.hyperparameters(learning_rate=0.25, temperature=4.0)
        w, _ = rule.run(np, h, 1, np.zeros(10000, 'float32'), np.zeros(10000, 'float32'))
        assert w.std() == pytest.approx(1.0, rel=0.03)
