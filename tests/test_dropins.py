"""Drop-ins beside MXNet's own optimizers: the same results, states and files, by the same names."""
import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')
from mxnet import gluon  # noqa: E402
from mxnet.optimizer import optimizer as mx_optimizer  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim import rules  # noqa: E402
from gluon_optim.mxnet import builtin, executors  # noqa: E402
from gluon_optim.rules.base import scalars  # noqa: E402
from gluon_optim.rules.mx.base import as_parsed  # noqa: E402
from gluon_optim.rules.runtimes import runs_on  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import dropin_runs as runs  # noqa: E402
from dropin_runs import NAMES, Run, gradients  # noqa: E402
from test_rules import TRACING, Traced  # noqa: E402

# Every option at a value that is not its default; {} is added to each
OPTIONS = {
    'sgd': [dict(momentum=0.9, lazy_update=False)],
    'nag': [dict(momentum=0.9)],
    'adagrad': [dict(eps=0.01)],
    'rmsprop': [dict(gamma1=0.7, epsilon=0.01, clip_weights=1.0), dict(centered=True),
                dict(centered=True, gamma1=0.7, gamma2=0.6, epsilon=0.01, clip_weights=1.0)],
    'adadelta': [dict(rho=0.7, epsilon=0.01)],
    'adam': [dict(beta1=0.8, beta2=0.97, epsilon=1e-3, lazy_update=False)],
    'adamax': [dict(beta1=0.8, beta2=0.9)],
    'nadam': [dict(beta1=0.8, beta2=0.97, epsilon=1e-3, schedule_decay=0.2)],
    'signum': [dict(momentum=0.7, wd_lh=0.1), dict(momentum=0.0)],
    'dcasgd': [dict(lamda=0.4)],
    'ftrl': [dict(lamda1=0.1, beta=0.4)],
    'ftml': [dict(beta1=0.8, beta2=0.97, epsilon=1e-3)],
    'sgld': [],
    'lamb': [dict(beta1=0.8, beta2=0.97, epsilon=1e-3, lower_bound=2.0, upper_bound=4.0), dict(bias_correction=False)],
    'lars': [dict(momentum=0.9, eta=0.1, eps=0.01, lazy_update=False), dict(momentum=0.9, eta=0.1, momentum_correction=False)],
    'lbsgd': [dict(warmup_strategy=strategy, momentum=0.9, batch_scale=2, updates_per_epoch=4, warmup_epochs=2, begin_epoch=1,
                   num_epochs=9) for strategy in ('linear', 'power2', 'sqrt', 'lars')],
}
CASES = [pytest.param(name, options, id='-'.join([name, *map(str, options.values())]))
         for name, settings in OPTIONS.items() for options in [{}, *settings]]
BASE = dict(learning_rate=0.05, wd=0.03, rescale_grad=0.3, clip_gradient=0.4)
ONE_BY_ONE = {'lbsgd': dict(batch_scale=1)}  # rules do not sum up gradients
WITH_NORMS = ('lamb', 'lars')
SINGLE_SLOTS = ('adagrad', 'rmsprop', 'adadelta', 'ftrl')  # MXNet makes float32 slots for float64 weights, and then fails
ROUNDED = 1.01 / 1024  # a master near the middle of two float16 numbers may round to either


@pytest.fixture(autouse=True)
def as_mxnet_is(monkeypatch):
    monkeypatch.setenv('MXNET_OPTIMIZER_AGGREGATION_SIZE', '40')  # lars corrects the momentum of one call only
    yield
    go.restore_builtins()


def has_norms(name, options):
    """Whether sums over a tensor, which are accumulated in another order, decide what is computed."""
    return name in WITH_NORMS or options.get('warmup_strategy') == 'lars'


def both(name, options, dtype='float32', **how):
    """MXNet's and ours, with multipliers."""
    made = []
    for create in (mx.optimizer.create, go.create):
        mx.random.seed(5)
        optimizer = create(name, param_idx2name=dict(enumerate(NAMES)), **options)
        optimizer.set_lr_mult({'b_bias': 0.3, 'f_weight': 1.7})
        optimizer.set_wd_mult({'d_weight': 0.2, 'b_bias': 2.0})
        made.append(Run(optimizer, dtype, **how))
    return made


def step_both(pair, values, k, skip=()):
    for run in pair:
        if run.optimizer.lr_scheduler is None:
            run.optimizer.set_learning_rate(0.05 * (1.2 + np.cos(2.3 * k)))
        mx.random.seed(k)
        run.step(values, skip)


def ulps(a, b, beside):
    """The largest difference in units of the last place of the largest of a, b and ``beside``, element by element."""
    with np.errstate(invalid='ignore'):
        size = np.spacing(np.maximum(np.maximum(abs(a), abs(b)), abs(beside)))
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, abs(a - b) / size)
    return np.where(np.isnan(apart), np.inf, apart).max()


def compare(pair, before=None, limit=2.0, norms=False):
    """Same places, same types; elements within ``limit`` ulps, or with ``norms`` arrays within 2e-6 of their largest.

    Norms of float16 weights jump when one of these rounds to the other side: 2e-5 there.
    """
    expected, found = (run.arrays() for run in pair)
    assert expected.keys() == found.keys()
    tolerance = 2e-5 if expected[0, NAMES[0], 'weight'].dtype == np.float16 else 2e-6
    for key, array in expected.items():
        if array is None:
            assert found[key] is None, key
            continue
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
        if norms:
            atol = (ROUNDED if array.dtype == np.float16 else tolerance) * abs(array).max()
            np.testing.assert_allclose(found[key], array, rtol=0, atol=atol, err_msg=str(key))
        else:
            beside = array if before is None or before.get(key) is None else before[key]
            assert ulps(array, found[key], beside) <= limit, key
    assert [run.optimizer.num_update for run in pair] == [pair[0].optimizer.num_update] * 2


def put(source, target):
    """Make the arrays of one run those of another."""
    for key, array in target.ndarrays().items():
        if array is not None:
            source.ndarrays()[key].copyto(array)


# The same results

@pytest.mark.parametrize('single', [False, True], ids=['list', 'single'])
@pytest.mark.parametrize('name, options', CASES)
def test_each_step_is_mxnets(name, options, single):
    """Every step from the same arrays, at another rate each; MXNet's states go into the drop-in in between."""
    if name == 'signum' and options == dict(momentum=0.0):
        options = dict(options, wd_lh=0.0)
    pair = both(name, dict(BASE, begin_num_update=3, **options), single=single)
    for k, values in enumerate(gradients(12)):
        before = pair[0].arrays()
        step_both(pair, values, k)
        compare(pair, before, norms=has_norms(name, options))
        put(*pair)


@pytest.mark.parametrize('dtype, base', [('float32', {}), ('float32', dict(wd=0.03, rescale_grad=0.3)), ('float32', BASE),
                                         ('float64', BASE), ('float16', BASE)],
                         ids=['plain', 'decay', 'float32', 'float64', 'float16'])
@pytest.mark.parametrize('name, options', CASES)
def test_twelve_steps_are_mxnets(name, options, dtype, base):
    """On its own way; float16 with masters."""
    if dtype == 'float64' and name in SINGLE_SLOTS:
        pytest.skip('MXNet raises')
    pair = both(name, dict(base, multi_precision=dtype == 'float16', **options), dtype)
    for k, values in enumerate(gradients(12, dtype)):
        step_both(pair, values, k)
    if dtype == 'float64' and has_norms(name, options):
        compare(pair, norms=True)
    else:
        compare(pair, limit=2 * 12, norms=has_norms(name, options))


@pytest.mark.parametrize('dtype', ['float32', 'float64', 'float16'])
@pytest.mark.parametrize('name', [name for name in OPTIONS if runs_on(rules.get(name), 'kernels')])
def test_without_compiled_loops(name, dtype, monkeypatch):
    """On MXNet's operators, as on GPUs."""
    if dtype == 'float64' and name in SINGLE_SLOTS:
        pytest.skip('MXNet raises')
    monkeypatch.setattr(executors, '_compiler', lambda: None)
    pair = both(name, dict(BASE, multi_precision=True, **OPTIONS[name][0]), dtype)
    for k, values in enumerate(gradients(5, dtype)):
        step_both(pair, values, k)
    # coefficients go to MXNet as text, and in float64 not all of their digits arrive
    compare(pair, limit=10, norms=name in WITH_NORMS or dtype == 'float64')


@pytest.mark.parametrize('name', [name for name in OPTIONS if runs_on(rules.get(name), 'kernels')])
def test_a_wrong_coefficient_is_noticed(name, monkeypatch):
    """The comparison can fail: 1 % more of any one coefficient shows in some case."""
    rule, right = rules.get(name), rules.get(name).all_coefficients
    cases = [options for case, options in [param.values for param in CASES] if case == name]
    hypers = [rule.hyperparameters(**BASE, **options) for options in cases]
    unseen = {'mu'} if name == 'dcasgd' else set()  # MXNet's fails with momentum
    for coefficient in {coefficient for h in hypers for coefficient in right(scalars, h, 1)} - unseen:
        def wrong(xp, h, t, coefficient=coefficient):
            return {key: 1.01 * x if key == coefficient else x for key, x in right(xp, h, t).items()}

        monkeypatch.setattr(rule, 'all_coefficients', staticmethod(wrong))
        noticed = False
        for options in cases:
            pair = both(name, dict(BASE, **options))
            for k, values in enumerate(gradients(3)):
                step_both(pair, values, k)
            try:
                compare(pair, limit=6, norms=name in WITH_NORMS)
            except AssertionError:
                noticed = True
                break
        assert noticed, coefficient


@pytest.mark.parametrize('name', OPTIONS)
def test_late_parameters_and_schedulers(name):
    """The scheduler sees the counts that MXNet would show it, parameter by parameter."""
    def scheduler():
        return mx.lr_scheduler.MultiFactorScheduler([2, 4, 7, 9], 0.5, base_lr=0.4)

    pair = both(name, dict(BASE, learning_rate=0.4, begin_num_update=1))
    for run in pair:
        run.optimizer.lr_scheduler = scheduler()
    for k, values in enumerate(gradients(9)):
        step_both(pair, values, k, skip=[0, 3] if k < 3 else [4] if k < 5 else [])
    compare(pair, limit=2 * 9, norms=name in WITH_NORMS)
    assert pair[0].optimizer._index_update_count == pair[1].optimizer._index_update_count


@pytest.mark.parametrize('name, options', [case for case in CASES if case.values[0] != 'nadam'])
def test_two_devices(name, options):
    """Counts are MXNet's on each; each has MXNet's states."""
    pair = both(name, dict(BASE, **options), contexts=(1, 2))
    steps = 2 if name in ('lars', 'lbsgd') else 5  # then replicas of MXNet's drift apart
    if name in ('lars', 'lbsgd') and options:
        pytest.skip('replicas of MXNet drift apart')
    for k, values in enumerate(gradients(steps)):
        step_both(pair, values, k)
    if name != 'sgld':  # noise differs from device to device, and MXNet draws for one after the other
        compare(pair, limit=2 * steps, norms=has_norms(name, options))
    assert pair[0].optimizer._all_index_update_counts[2] == pair[1].optimizer._all_index_update_counts[2]


@pytest.mark.parametrize('name', ['nadam', 'lars', 'lbsgd'])
def test_replicas_stay_equal(name):
    """What belongs to the optimizer as a whole is kept for each device; in MXNet it is shared, and replicas drift apart."""
    theirs, ours = both(name, dict(BASE, **OPTIONS[name][0]), contexts=(0, 1))
    alone = both(name, dict(BASE, **OPTIONS[name][0]))[1]
    for k, values in enumerate(gradients(8)):
        step_both([theirs, ours], values, k)
        step_both([alone], values, k)

    def replicas(run):
        return [[w.asnumpy() for w in device] for device in run.weights]
    assert all(np.array_equal(a, b) for a, b in zip(*replicas(ours)))
    assert all(np.array_equal(a, b) for a, b in zip(replicas(ours)[0], replicas(alone)[0]))
    assert not all(np.array_equal(a, b) for a, b in zip(*replicas(theirs)))


def test_parameter_multipliers():
    """Those of a Trainer's parameters, as MXNet looks them up."""
    results = []
    for name in (None, 'adam'):
        if name:
            go.accelerate(name)
        net = runs.network()
        net[0].weight.lr_mult, net[1].weight.wd_mult, net[1].bias.lr_mult = 0.5, 3.0, 0.0
        trainer = gluon.Trainer(net.collect_params(), 'adam', {'wd': 0.1})
        runs.train(net, trainer, 0, 5)
        results.append(runs.parameters(net))
    assert all(np.array_equal(a, b) for a, b in zip(*results))


def test_lars_corrects_the_momentum_of_a_whole_list(monkeypatch):
    """MXNet calls with four parameters at a time, and corrects the first four."""
    options = dict(OPTIONS['lars'][0], learning_rate=0.05)
    whole, ours = both('lars', options)
    monkeypatch.setenv('MXNET_OPTIMIZER_AGGREGATION_SIZE', '4')
    by_four, _ = both('lars', options)
    for k, values in enumerate(gradients(6)):
        step_both([whole, ours, by_four], values, k)
    compare([whole, ours], norms=True)
    with pytest.raises(AssertionError):
        compare([by_four, ours], norms=True)


@pytest.mark.parametrize('x', [0.1, 8.49e-06, 3.9387348378158e-06, 3.5104099797202255, 1.5e-12, 7.3e-31, 123456.789, 4.2e7, 0.0])
def test_numbers_are_read_as_operators_do(x):
    weight, gradient = mx.nd.zeros(1, dtype='float64'), mx.nd.ones(1, dtype='float64')
    for sign in (1, -1):
        assert -mx.nd.sgd_update(weight, gradient, lr=sign * x).asscalar() == as_parsed(sign * x)
        assert (gradient * (sign * x)).asscalar() == as_parsed(sign * x, 'float64')


# Where MXNet fails or spoils something

@pytest.mark.parametrize('name', [name for name in OPTIONS if name not in ('sgld', 'lbsgd')])
@pytest.mark.parametrize('zeros', [2, 6])
def test_zero_gradients_leave_numbers(name, zeros):
    for dtype, mixed in (('float32', False), ('float16', False), ('float16', True)):
        _, ours = both(name, dict(wd=0.01, multi_precision=mixed), dtype)
        for k, values in enumerate(gradients(6, dtype)):
            step_both([ours], [0 * v if k < zeros else v for v in values], k)
        for key, array in ours.arrays().items():
            assert array is None or np.isfinite(array).all(), (dtype, key)


def test_mxnets_float16_adam_gives_nan_where_ours_does_not():
    theirs, ours = both('adam', dict(BASE), 'float16')
    step_both([theirs, ours], [0 * v for v in gradients(1, 'float16')[0]], 0)
    theirs.optimizer.wd = ours.optimizer.wd = 0.0
    assert not np.isnan(ours.weights[0][1].asnumpy()).any()
    zero = [mx.optimizer.get_updater(create('adam')) for create in (mx.optimizer.create, go.create)]
    weights = [mx.nd.ones(3, dtype='float16') for _ in zero]
    for updater, weight in zip(zero, weights):
        updater(0, mx.nd.zeros(3, dtype='float16'), weight)
    assert np.isnan(weights[0].asnumpy()).all() and (weights[1].asnumpy() == 1).all()


@pytest.mark.parametrize('name', [name for name in OPTIONS if name not in (*SINGLE_SLOTS, 'sgld', 'lbsgd')])
def test_float16_without_masters(name):
    """MXNet computes in float16, the drop-in in float32: one step is equal but for MXNet's rounding. Types are MXNet's."""
    options = {'epsilon': 0.01} if hasattr(go.create(name), 'epsilon') else {}  # 1e-8 is 0 in float16
    pair = both(name, dict(BASE, **options), 'float16')
    for k, values in enumerate(gradients(3, 'float16')):
        put(*pair)
        step_both(pair, values, k)
        expected, found = (run.arrays() for run in pair)
        for key, array in expected.items():
            if array is None:
                continue
            assert array.dtype == found[key].dtype == np.float16, key
            if name in ('nadam', 'ftml', 'lamb'):
                continue  # 1 - beta2^t in float16 is off by tens of percent
            np.testing.assert_allclose(found[key], array, rtol=0.02, atol=0.005 * max(1, abs(array).max()), err_msg=str(key))


@pytest.mark.parametrize('name', SINGLE_SLOTS)
@pytest.mark.parametrize('dtype', ['float64', 'float16'])
def test_types_that_mxnet_cannot_update(name, dtype):
    theirs, ours = both(name, dict(BASE), dtype)
    with pytest.raises(mx.MXNetError):
        theirs.step(gradients(1, dtype)[0])
        mx.nd.waitall()
    _, single = both(name, dict(BASE))
    for k, values in enumerate(gradients(5, dtype)):
        step_both([ours, single], values, k)
    for key, array in ours.arrays().items():
        assert array.dtype == (dtype if key[2] == 'weight' or dtype == 'float64' else 'float32')
        rtol, atol = (2e-2, 2e-2) if dtype == 'float16' else (1e-4, 1e-6)
        np.testing.assert_allclose(array, single.arrays()[key], rtol=rtol, atol=atol)


def test_dcasgd_with_momentum():
    theirs, ours = both('dcasgd', dict(BASE, momentum=0.9, lamda=0.4))
    with pytest.raises(ValueError, match='truth value'):
        theirs.step(gradients(1)[0])
    rule = rules.get('dcasgd')
    h = rule.hyperparameters(**BASE, momentum=0.9, lamda=0.4)
    index = NAMES.index('a_weight')
    weight, slots = ours.weights[0][index].asnumpy().astype('float64'), None
    for t, values in enumerate(gradients(5), 1):
        ours.step(values)
        g = np.clip(0.3 * values[index].astype('float64'), -0.4, 0.4)
        momentum = 0 if slots is None else slots['momentum']
        previous = weight if slots is None else slots['previous_weight']
        expected = 0.9 * momentum - 0.05 * (g + 0.03 * weight + 0.4 * g * g * (weight - previous))
        new, slots = rule.run(np, h, t, weight, values[index].astype('float64'), slots, exact=True)
        np.testing.assert_allclose(new, weight + expected, rtol=1e-12)
        weight = new
    np.testing.assert_allclose(ours.weights[0][index].asnumpy(), weight, rtol=1e-5, atol=1e-6)


def test_rmsprop_of_a_constant_gradient():
    """The variance is 0 but for rounding, and MXNet's root is that of a negative number here and there."""
    theirs, ours = both('rmsprop', dict(centered=True, epsilon=1e-8, learning_rate=1e-3))
    for _ in range(200):
        for run in (theirs, ours):
            run.step([1e4 * v for v in gradients(1)[0]])
    assert not all(np.isfinite(w.asnumpy()).all() for w in theirs.weights[0])
    assert all(np.isfinite(w.asnumpy()).all() for w in ours.weights[0])


@pytest.mark.parametrize('name, off', [
    ('sgd', dict(clip_gradient=0)), ('adam', dict(clip_gradient=-1.0)), ('lars', dict(clip_gradient=0.0)),
    ('rmsprop', dict(clip_gradient=0.0, clip_weights=0)), ('rmsprop', dict(clip_weights=-2.0)),
    ('lamb', dict(clip_gradient=0.0, lower_bound=0.0, upper_bound=-1))])
def test_bounds_that_mxnet_ignores(name, off):
    pair = both(name, dict(BASE, **off))
    for k, values in enumerate(gradients(3)):
        step_both(pair, values, k)
    compare(pair, limit=6, norms=name in WITH_NORMS)


@pytest.mark.parametrize('name', OPTIONS)
def test_gradients_are_not_modified(name):
    optimizer = go.create(name, **BASE)
    updater = mx.optimizer.get_updater(optimizer)
    weight, gradient = mx.nd.ones((5, 3)), mx.nd.full((5, 3), 0.7)
    for _ in range(3):
        updater(0, gradient, weight)
    assert (gradient.asnumpy() == np.float32(0.7)).all()


def test_lbsgd_remembers_gradients_that_the_next_backward_pass_overwrites():
    """MXNet keeps the array itself; its mean of two gradients is the second one at first."""
    results = []
    for create in (mx.optimizer.create, go.create):
        updater = mx.optimizer.get_updater(create('lbsgd', batch_scale=2, learning_rate=1.0, warmup_epochs=0))
        weight, gradient = mx.nd.zeros(3), mx.nd.ones(3)
        updater(0, gradient, weight)
        gradient[:] = 3
        updater(0, gradient, weight)
        results.append(weight.asnumpy()[0])
    assert results == [-6, -4]  # batch_scale times the mean of 3 and 3, of 1 and 3


@pytest.mark.parametrize('strategy', ['linear', 'power2', 'sqrt', 'lars'])
def test_the_rule_of_lbsgd(strategy):
    """With batch_scale 1 there is nothing to sum up: the rule alone gives MXNet's result."""
    options = dict(BASE, warmup_strategy=strategy, momentum=0.9, updates_per_epoch=3, warmup_epochs=2, begin_epoch=1)
    run = Run(mx.optimizer.create('lbsgd', **options))
    rule = rules.get('lbsgd')
    h = rule.hyperparameters(**options)
    weights, slots = [w.asnumpy().astype('float64') for w in run.weights[0]], [None] * len(NAMES)
    for t, values in enumerate(gradients(8), 1):
        run.step(values)
        for i, g in enumerate(values):
            weights[i], slots[i] = rule.run(np, h, t, weights[i], g.astype('float64'), slots[i])
    for weight, array in zip(weights, run.weights[0]):
        np.testing.assert_allclose(array.asnumpy(), weight, rtol=0, atol=2e-6 * abs(weight).max())


# Sparse

@pytest.mark.parametrize('name', ['sgd', 'adam', 'adagrad', 'ftrl', 'signum'])
@pytest.mark.parametrize('sparse_weight', [False, True])
def test_row_sparse_goes_to_mxnet(name, sparse_weight):
    """Sparse and dense parameters in one call: the same results and states as with MXNet."""
    if not sparse_weight and name in ('ftrl', 'signum'):
        pytest.skip('MXNet has no such update')
    random = np.random.RandomState(0)
    dense = [random.standard_normal((6, 3)).astype('float32') for _ in range(3)]
    updates = [[random.standard_normal(shape).astype('float32') for shape in ((2, 3), (6, 3))] for _ in range(4)]
    results = []
    for create in (mx.optimizer.create, go.create):
        updater = mx.optimizer.get_updater(create(name, learning_rate=0.1))
        weights = [mx.nd.array(w) for w in dense]
        if sparse_weight:
            weights[1] = weights[1].tostype('row_sparse')
        if sparse_weight and name == 'signum':
            pytest.skip('MXNet has no such update')
        for rows, full in updates:
            sparse = mx.nd.sparse.row_sparse_array((rows, [1, 4]), shape=(6, 3))
            gradients_ = [mx.nd.array(full), sparse, mx.nd.array(full)]
            for i in ([0, 1, 2],) if updater.aggregate_updates else (0, 1, 2):
                one = (i, gradients_[i], weights[i]) if isinstance(i, int) else (i, gradients_, weights)
                updater(*one)
        states = [a for i in range(3) for _, a in runs.flat(updater.states[i]) if a is not None]
        results.append([array.asnumpy() for array in weights + states])
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_a_trainer_with_sparse_gradients():
    results = []
    for accelerated in (False, True):
        if accelerated:
            go.accelerate()
        mx.random.seed(2)
        net = gluon.nn.HybridSequential(prefix='sparse_')
        net.add(gluon.nn.Embedding(9, 4, sparse_grad=True), gluon.nn.Dense(2, in_units=4, flatten=False))
        net.initialize(mx.init.Xavier())
        trainer = gluon.Trainer(net.collect_params(), 'adam', {'learning_rate': 0.1})
        for k in range(4):
            with mx.autograd.record():
                loss = (net(mx.nd.array([k, 2, 5])) ** 2).sum()
            loss.backward()
            trainer.step(1)
        results.append(runs.parameters(net))
    assert all(np.array_equal(a, b) for a, b in zip(*results))


# Names

def test_create_gives_drop_ins_and_changes_nothing():
    before = dict(mx_optimizer.Optimizer.opt_registry)
    for name in OPTIONS:
        optimizer = go.create(name)
        assert isinstance(optimizer, builtin.DropIn)
        assert isinstance(optimizer, type(mx.optimizer.create(name)))
        assert type(mx.optimizer.create(name)).__module__ == 'mxnet.optimizer.optimizer'
        assert go.create(name.upper()).rule is rules.get(name)
    assert mx_optimizer.Optimizer.opt_registry == before
    assert set(OPTIONS) == set(builtin.CLASSES) == set(rules.names(drop_ins=True)) - set(rules.names())


def test_accelerate_and_restore():
    own = dict(mx_optimizer.Optimizer.opt_registry)
    go.accelerate('Adam', 'sgd')
    assert isinstance(mx.optimizer.create('adam'), builtin.Adam) and isinstance(mx.optimizer.create('SGD'), builtin.SGD)
    assert type(mx.optimizer.create('nag')) is mx.optimizer.NAG
    go.accelerate()
    for name in OPTIONS:
        assert isinstance(mx.optimizer.create(name), builtin.DropIn)
    assert mx.optimizer.Adam is builtin.Adam.replaces and type(mx.optimizer.Adam()) is mx.optimizer.Adam
    net = runs.network()
    assert isinstance(gluon.Trainer(net.collect_params(), 'lamb')._optimizer, builtin.LAMB)
    go.restore_builtins()
    assert mx_optimizer.Optimizer.opt_registry == own


@pytest.mark.parametrize('names, error, message', [
    (['adm'], ValueError, "Unknown built-in optimizer 'adm'. Did you mean 'adam'"),
    (['sgd', 'novograd'], ValueError, "'novograd' is an optimizer of gluon_optim"),
    (['adamw'], ValueError, "'adamw' is an optimizer of gluon_optim"),
    ([mx.optimizer.Adam], TypeError, 'takes names of optimizers'),
])
def test_accelerate_refuses(names, error, message):
    before = dict(mx_optimizer.Optimizer.opt_registry)
    with pytest.raises(error, match=message):
        go.accelerate(*names)
    assert mx_optimizer.Optimizer.opt_registry == before


def test_an_optimizer_that_somebody_registered_stays(monkeypatch):
    own = type('LAMB', (mx.optimizer.Optimizer,), {})
    monkeypatch.setitem(mx_optimizer.Optimizer.opt_registry, 'lamb', own)
    go.accelerate()
    assert mx_optimizer.Optimizer.opt_registry['lamb'] is own
    with pytest.raises(ValueError, match="'lamb' must be the optimizer of MXNet. Received: .*LAMB was registered"):
        go.accelerate('lamb')
    go.restore_builtins()
    assert mx_optimizer.Optimizer.opt_registry['lamb'] is own


def test_module_fit():
    """By name, with the decay that depends on parameters' names, with and without a kvstore."""
    random = np.random.RandomState(1)
    data, label = random.standard_normal((40, 5)), random.randint(0, 3, 40)
    results = []
    for accelerated in (False, True):
        if accelerated:
            go.accelerate()
        for kvstore in ('local', None):
            for name in ('sgd', 'adam', 'nadam'):
                mx.random.seed(0)
                layer = mx.sym.FullyConnected(mx.sym.Variable('data'), num_hidden=3, name='fc')
                module = mx.mod.Module(mx.sym.SoftmaxOutput(layer, name='softmax'), context=mx.cpu())
                module.fit(mx.io.NDArrayIter(data, label, 8), optimizer=name, kvstore=kvstore, num_epoch=2,
                           optimizer_params={'learning_rate': 0.1, 'wd': 0.3}, initializer=mx.init.One())
                assert isinstance(module._optimizer, builtin.DropIn) == accelerated
                results.append(module.get_params()[0])
    half = len(results) // 2
    for a, b in zip(results[:half], results[half:]):
        assert all(np.array_equal(a[key].asnumpy(), b[key].asnumpy()) for key in a)


@pytest.mark.parametrize('name, arguments, error, message', [
    ('adam', dict(beta1=1.5), ValueError, r'`beta1` must be in \[0, 1\). Received: beta1=1.5'),
    ('adam', dict(learning_rate=float('nan')), ValueError, '`learning_rate` must be in'),
    ('sgd', dict(momentum='0.9'), TypeError, '`momentum` must be in'),
    ('sgd', dict(momentun=0.9), TypeError, 'momentun'),
    ('lbsgd', dict(warmup_strategy='cubic'), ValueError, "`warmup_strategy` must be one of 'linear'"),
    ('adagrad', dict(clip_gradient=-1.0), ValueError, '`clip_gradient` must be in'),
])
def test_wrong_arguments(name, arguments, error, message):
    with pytest.raises(error, match=message):
        go.create(name, **arguments)


@pytest.mark.parametrize('name', OPTIONS)
def test_what_comes_later_is_checked_before_anything_is_written(name):
    _, ours = both(name, dict(BASE))
    step_both([ours], gradients(1)[0], 0)
    before = ours.arrays()
    ours.optimizer.set_learning_rate(float('nan'))
    with pytest.raises(ValueError, match='`learning_rate` must be in'):
        ours.step(gradients(1)[0])
    ours.optimizer.set_learning_rate(0.1)
    ours.step(gradients(1)[0])
    twin = both(name, dict(BASE))[1]
    step_both([twin], gradients(1)[0], 0)
    twin.optimizer.set_learning_rate(0.1)
    twin.step(gradients(1)[0])
    assert all(array is None or np.array_equal(array, twin.arrays()[key]) for key, array in ours.arrays().items())
    assert before.keys() == ours.arrays().keys()


def test_a_bad_rate_of_a_scheduler_is_not_counted():
    class Scheduler(mx.lr_scheduler.LRScheduler):
        def __call__(self, num_update):
            return float('nan') if num_update == 2 and self.bad else 0.1

    for name in ('nadam', 'lars'):
        ours, twin = both(name, dict(BASE))[1], both(name, dict(BASE))[1]
        for run, bad in ((ours, True), (twin, False)):
            run.optimizer.lr_scheduler = Scheduler()
            run.optimizer.lr_scheduler.bad = bad
            run.step(gradients(1)[0])
        with pytest.raises(ValueError, match='must be finite'):
            ours.step(gradients(1)[0])
        ours.optimizer.lr_scheduler.bad = False
        for run in (ours, twin):
            run.step(gradients(1)[0])
        assert all(array is None or np.array_equal(array, twin.arrays()[key]) for key, array in ours.arrays().items())


def test_states_of_another_optimizer_are_refused():
    updater = mx.optimizer.get_updater(go.create('adam'))
    updater.states, updater.states_synced = {0: mx.nd.zeros(3)}, {0: True}
    with pytest.raises(ValueError, match='does not belong to adam'):
        updater(0, mx.nd.ones(3), mx.nd.ones(3))
    updater = mx.optimizer.get_updater(go.create('sgd', momentum=0.9, multi_precision=True))
    updater.states, updater.states_synced = {0: mx.nd.zeros(3)}, {0: True}
    with pytest.raises(ValueError, match='float32 master'):
        updater(0, mx.nd.ones(3, dtype='float16'), mx.nd.ones(3, dtype='float16'))


def test_momentum_set_to_zero_later():
    """As in MXNet, the state stays and is not looked at."""
    for name in ('sgd', 'nag', 'lars'):
        pair = both(name, dict(BASE, momentum=0.9))
        for k, values in enumerate(gradients(4)):
            if k == 2:
                for run in pair:
                    run.optimizer.momentum = 0.0
            step_both(pair, values, k)
        expected, found = ([w.asnumpy() for w in run.weights[0]] for run in pair)
        for a, b in zip(expected, found):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)


# Pickles

@pytest.mark.parametrize('name, options', CASES)
def test_exchange_in_the_middle(name, options):
    """MXNet writes and the drop-in goes on, and the other way round; as if one had done it all."""
    options = dict(BASE, **options)
    straight = both(name, options)
    crossed = both(name, options)
    for k, values in enumerate(gradients(8)):
        if k == 3:
            dumps = [run.updaters[0].get_states(dump_optimizer=True) for run in crossed]
            assert not any(b'gluon_optim' in dump for dump in dumps)
            for run, dump in zip(crossed, reversed(dumps)):
                run.updaters[0].set_states(dump)
            assert type(crossed[0].optimizer).__module__ == 'mxnet.optimizer.optimizer'
            assert isinstance(crossed[1].optimizer, builtin.DropIn)
            assert crossed[0].updaters[0].aggregate_updates == straight[0].updaters[0].aggregate_updates
            assert crossed[1].updaters[0].aggregate_updates
        step_both([*straight, *crossed], values, k)
    for run in crossed:
        compare([straight[0], run], limit=2 * 8, norms=has_norms(name, options))


@pytest.mark.parametrize('name', OPTIONS)
@pytest.mark.parametrize('protocol', [0, 2, pickle.HIGHEST_PROTOCOL])  # 0 is how kvstores send it to servers
def test_the_pickle_is_mxnets(name, protocol):
    optimizer = go.create(name, learning_rate=0.2, begin_num_update=4, **OPTIONS[name][0] if OPTIONS[name] else {})
    run = Run(optimizer)
    run.step(gradients(1)[0])
    written = pickle.dumps(optimizer, protocol)
    assert b'gluon_optim' not in written
    loaded = pickle.loads(written)
    own = mx.optimizer.create(name, learning_rate=0.2, begin_num_update=4, **OPTIONS[name][0] if OPTIONS[name] else {})
    theirs = Run(own)
    theirs.step(gradients(1)[0])
    assert type(loaded) is type(own)
    assert loaded.__dict__.keys() == own.__dict__.keys()
    for key in own.__dict__.keys() - {'cumgrads'}:
        assert getattr(loaded, key) == getattr(own, key), key


def test_copies_are_drop_ins():
    optimizer = go.create('nadam', learning_rate=0.2)
    Run(optimizer).step(gradients(1)[0])
    for twin in (copy.copy(optimizer), copy.deepcopy(optimizer)):
        assert type(twin) is builtin.Nadam and twin.m_schedule == optimizer.m_schedule < 1
        assert twin.update_counts() == optimizer.update_counts()
        twin._update_count(0)
        assert twin.update_counts() != optimizer.update_counts()


def in_new_process(jobs):
    """Run `continued` in a process where gluon_optim cannot be imported."""
    command = [sys.executable, runs.__file__, json.dumps(jobs)]
    out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


def test_native_files_in_all_four_directions(tmp_path):
    """Trainer.save_states and load_states; MXNet's side is a process without gluon_optim. All runs end alike."""
    settings = [('adam', {'wd': 0.01}), ('sgd', {'momentum': 0.9}), ('nadam', {}), ('rmsprop', {'centered': True}), ('ftml', {}),
                ('lars', {'momentum': 0.9}), ('adagrad', {}), ('dcasgd', {}),
                ('lbsgd', {'momentum': 0.9, 'warmup_strategy': 'lars'})]

    def job(name, options, load, save, begin, end):
        path = {whose: str(tmp_path / f'{whose}-{name}') for whose in ('ours', 'theirs')}
        return dict(name=name, options=options, load=path.get(load), save=path.get(save), steps=[begin, end])

    their_first = in_new_process([job(*setting, None, 'theirs', 0, 3) for setting in settings])
    go.accelerate()
    our_first = [runs.continued(**job(*setting, None, 'ours', 0, 3)) for setting in settings]
    ends = {load: [runs.continued(**job(*setting, load, None, 3, 7)) for setting in settings] for load in ('ours', 'theirs')}
    written = in_new_process([job(*setting, load, None, 3, 7) for load in ('ours', 'theirs') for setting in settings])
    found = [their_first, our_first, ends['ours'], ends['theirs'], written[:len(settings)], written[len(settings):]]
    modules = [{run.pop('module') for run in group} for group in found]
    mxnets, drop_ins = {'mxnet.optimizer.optimizer'}, {'gluon_optim.mxnet.builtin'}
    assert modules == [mxnets, drop_ins, drop_ins, drop_ins, mxnets, mxnets]
    exact = [k for k, (name, _) in enumerate(settings) if name not in ('lars', 'lbsgd')]  # these take norms, ours in float64
    assert [our_first[k] for k in exact] == [their_first[k] for k in exact]
    for group in found[3:]:
        assert [group[k] for k in exact] == [found[2][k] for k in exact]
    assert all(group[5]['counts'] == found[2][5]['counts'] for group in found[3:])


@pytest.mark.parametrize('kvstore, on_kvstore', [(None, None), ('local', True), ('local', False)])
@pytest.mark.parametrize('contexts', [[0], [0, 1]])
def test_a_trainer_goes_on_with_a_drop_in(kvstore, on_kvstore, contexts, tmp_path):
    """After a native load, also of another optimizer's states; a trainer of MXNet's stays MXNet's."""
    if kvstore is None and len(contexts) > 1:
        pytest.skip('without a kvstore MXNet does not add the gradients of several devices')

    def make(optimizer):
        net = runs.network(contexts)
        store = mx.kv.create(kvstore) if kvstore and len(contexts) == 1 else kvstore
        return net, gluon.Trainer(net.collect_params(), optimizer, kvstore=store, update_on_kvstore=on_kvstore)

    for name in ('adam', 'sgd'):
        net, trainer = make(name)
        runs.train(net, trainer, 0, 2)
        trainer.save_states(str(tmp_path / name))
    for name in ('adam', 'sgd'):
        net, trainer = make(go.create('adam'))
        runs.train(net, trainer, 0, 1)
        trainer.load_states(str(tmp_path / name))
        assert type(trainer._optimizer) is builtin.CLASSES[name]
        assert all(updater.aggregate_updates and updater.optimizer is trainer._optimizer for updater in runs.updaters(trainer))
        runs.train(net, trainer, 2, 4)
        net, trainer = make(name)
        trainer.load_states(str(tmp_path / name))
        assert type(trainer._optimizer).__module__ == 'mxnet.optimizer.optimizer'
        runs.train(net, trainer, 2, 4)
    go.accelerate('adam')
    net, trainer = make(mx.optimizer.Adam())
    trainer.load_states(str(tmp_path / 'adam'))
    assert type(trainer._optimizer) is builtin.Adam
    assert all(updater.aggregate_updates for updater in runs.updaters(trainer))
    runs.train(net, trainer, 2, 4)


def test_counts_do_not_depend_on_the_device(tmp_path):
    """MXNet's own start again at 0 on another device; a drop-in's do not."""
    path = str(tmp_path / 'adam')
    end = runs.continued('adam', {}, None, path, [0, 4])
    go.accelerate()
    straight = runs.continued('adam', {}, path, None, [4, 8])
    moved = runs.continued('adam', {}, path, None, [4, 8], contexts=(3,))
    assert end['counts']['0'] == 4 and straight['counts']['0'] == moved['counts']['0'] == 8
    assert moved['sha'] == straight['sha']


def test_shared_variables_are_restored(tmp_path):
    path = str(tmp_path / 'nadam')
    go.accelerate()
    straight = runs.continued('nadam', {}, None, None, [0, 6])
    runs.continued('nadam', {}, None, path, [0, 2], contexts=(0,))
    assert runs.continued('nadam', {}, path, None, [2, 6], contexts=(1,))['sha'] == straight['sha']


def test_mxnet_is_as_it_was():
    """Importing, and creating MXNet's own, patches nothing; restore_builtins takes back what accelerate did."""
    code = ('import mxnet as mx, gluon_optim as go\n'
            'assert "gluon_optim.mxnet.builtin" not in __import__("sys").modules\n'
            'own = mx.optimizer.Updater.set_states\n'
            'mx.optimizer.create("adam")\n'
            'go.create("novograd")\n'
            'assert mx.optimizer.Updater.set_states is own\n'
            'go.accelerate()\n'
            'assert mx.optimizer.Updater.set_states is not own\n'
            'go.restore_builtins()\n'
            'assert mx.optimizer.Updater.set_states is own\n')
    out = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         cwd=str(Path(builtin.__file__).parents[2]))
    assert out.returncode == 0, out.stderr


# States, taken apart and put together

@pytest.mark.parametrize('name, options', CASES)
def test_split_and_join(name, options):
    for dtype, mixed in (('float32', False), ('float16', True)):
        optimizer = go.create(name, multi_precision=mixed, **options)
        state = optimizer.create_state_multi_precision(0, mx.nd.ones((2, 3), dtype=dtype))
        slots, master = optimizer.split_state(state, optimizer.hyperparameters(), mixed)
        assert (master is not None) == mixed
        assert [a.shape for a in slots] == [(2, 3)] * len(optimizer.rule.slots(optimizer.hyperparameters()))
        joined = optimizer.join_state(slots, master, optimizer.hyperparameters())
        assert [(place, id(a)) for place, a in runs.flat(joined)] == [(place, id(a)) for place, a in runs.flat(state)]


def test_hyperparameters_go_in_and_out():
    for name, settings in OPTIONS.items():
        for options in settings:
            h = go.create(name, **BASE, **options).hyperparameters()
            assert {key: getattr(h, key) for key in options} == options
            other = go.create(name)
            other.set_hyperparameters(h)
            assert other.hyperparameters() == h


# The rules elsewhere

@pytest.mark.parametrize('name, options', CASES)
def test_rules_in_other_namespaces(name, options):
    """Learning rate, decay and t may be symbols; the numbers are those of NumPy, without MXNet's single precision."""
    if name in ('nadam', 'sgld'):
        return  # needs the whole optimizer's schedule, random numbers
    rule = rules.get(name)
    h = rule.hyperparameters(**BASE, **options)
    symbols = h.replace(learning_rate=Traced(h.learning_rate), wd=Traced(h.wd))
    for t in (1, 2, 50, 20000):
        expected = rule.all_coefficients(scalars, h, t)
        traced = rule.all_coefficients(TRACING, symbols, Traced(t))
        assert {key: getattr(x, 'value', x) for key, x in traced.items()} == pytest.approx(expected, rel=1e-14, abs=0)


@pytest.mark.parametrize('name, options', CASES)
def test_rules_in_float64(name, options):
    """Computed by NumPy in float64, from exact numbers, they agree with MXNet's float32."""
    if name == 'sgld':
        return
    rule, run = rules.get(name), Run(mx.optimizer.create(name, **BASE, **dict(options, **ONE_BY_ONE.get(name, {}))))
    h = rule.hyperparameters(**BASE, **dict(options, **ONE_BY_ONE.get(name, {})))
    i = NAMES.index('a_weight')
    weight, slots = run.weights[0][i].asnumpy().astype('float64'), None
    for t, values in enumerate(gradients(6), 1):
        run.updaters[0](i, mx.nd.array(values[i]), run.weights[0][i])
        weight, slots = rule.run(np, h, t, weight, values[i].astype('float64'), slots)
    atol = 1e-3 if name == 'ftml' else 2e-6 * abs(weight).max()  # ftml: 1 - beta2^t in float32
    np.testing.assert_allclose(run.weights[0][i].asnumpy(), weight, rtol=0, atol=atol)
