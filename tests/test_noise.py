"""Noise from a counter: Philox against its authors' vectors, the distribution, the same numbers everywhere, and their state."""
import dataclasses
import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))
from gluon_optim import rules
from gluon_optim.rules.base import scalars
from gluon_optim.rules.noise import SEEDS, Noise, normals, philox

KEY = 2 ** 53 - 12345


# The generator

# kat_vectors of Random123 1.14, philox4x32 with 10 rounds: counter, key, result
KNOWN = [
    ('00000000 00000000 00000000 00000000', '00000000 00000000', '6627e8d5 e169c58d bc57ac4c 9b00dbd8'),
    ('ffffffff ffffffff ffffffff ffffffff', 'ffffffff ffffffff', '408f276d 41c83b0e a20bc7c6 6d5451fd'),
    ('243f6a88 85a308d3 13198a2e 03707344', 'a4093822 299f31d0', 'd16cfe09 94fdcceb 5001e420 24126ea1'),
]


def words(text):
    return [np.uint64(int(word, 16)) for word in text.split()]


@pytest.mark.parametrize('counter, key, result', KNOWN)
def test_philox_is_that_of_its_authors(counter, key, result):
    assert [f'{int(word):08x}' for word in philox(words(counter), words(key))] == result.split()


def sample(key, stream, update, draw, j):
    """One sample with Python's integers and floats, from the paper and the docstring of `rules.noise`."""
    x, k = [16 * (j // 64) + j % 16, update, stream, draw], [key % 2 ** 32, key // 2 ** 32]
    for _ in range(10):
        (high0, low0), (high1, low1) = divmod(0xD2511F53 * x[0], 2 ** 32), divmod(0xCD9E8D57 * x[2], 2 ** 32)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2 ** 32, (k[1] + 0xBB67AE85) % 2 ** 32]
    which, odd = divmod(j % 64 // 16, 2)
    b, turn = x[2 * which:2 * which + 2]
    angle = 2 * math.pi * turn / 2 ** 32
    return math.sqrt(-2 * math.log((b + 0.5) / 2 ** 32)) * (math.sin(angle) if odd else math.cos(angle))


def test_samples_are_what_is_written():
    for key, stream, update, draw in [(0, 0, 1, 0), (KEY, 2 ** 32 - 1, 2 ** 31, 3)]:
        expected = [sample(key, stream, update, draw, j) for j in range(200)]
        np.testing.assert_allclose(normals(key, stream, update, draw, 200), expected, rtol=0, atol=1e-13)


def test_single_precision_is_the_same_to_rounding():
    single, double = (normals(KEY, 3, 5, 0, 2 ** 21, dtype) for dtype in ('float32', 'float64'))
    np.testing.assert_allclose(single, double, rtol=0, atol=1.5e-6)
    assert single.dtype == np.float32 and abs(double).max() > 4.8


def test_an_element_does_not_depend_on_how_many_there_are():
    longest = normals(KEY, 1, 2, 0, 2 ** 21 + 300)  # of more than one piece
    for size in (0, 1, 63, 64, 65, 1000, 2 ** 21 + 1):
        np.testing.assert_array_equal(normals(KEY, 1, 2, 0, size), longest[:size])


# The distribution

def test_moments_and_tails_are_those_of_the_normal_distribution():
    n = 2 ** 22
    x = normals(7, 0, 1, 0, n, 'float32').astype('float64')
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        error = np.sqrt((math.prod(range(1, 2 * power, 2)) - moment ** 2) / n)
        assert abs((x ** power).mean() - moment) < 4.5 * error, power
    for bound in (1.0, 2.0, 3.0, 4.0):
        p = 2 * stats.norm.sf(bound)
        assert abs((abs(x) > bound).mean() - p) < 4.5 * np.sqrt(p / n), bound
    assert abs((abs(x) < 1e-3).mean() - 2e-3 * stats.norm.pdf(0)) < 4.5 * np.sqrt(8e-4 / n)


@pytest.mark.parametrize('counter', [(1, 0, 1, 0), (2, 0, 1, 0), (1, 1, 1, 0), (1, 0, 2, 0), (1, 0, 1, 1), (KEY, 77, 10 ** 6, 0)])
def test_a_million_samples_pass_the_test_of_kolmogorov_and_smirnov(counter):
    assert stats.kstest(normals(*counter, 10 ** 6, 'float32'), 'norm').pvalue > 1e-4


def test_keys_parameters_updates_draws_and_neighbours_are_independent():
    n, base = 2 ** 20, (5, 3, 7, 0)
    x = normals(*base, n)
    others = [normals(*(value + (k == place) * step for k, value in enumerate(base)), n) for place in range(4)
              for step in (1, 2, 256)]
    others += [np.roll(x, lag) for lag in (1, 2, 15, 16, 17, 32, 48, 63, 64, 65, 128, 16384)]
    for y in others:
        for a, b in ((x, y), (x * x - 1, y * y - 1)):  # their sizes too
            assert abs((a * b).mean()) < 5 * a.std() * b.std() / np.sqrt(n)
        assert (x == y).mean() < 1e-6


# In kernels and elsewhere

mx = pytest.importorskip('mxnet')
from mxnet import gluon, nd  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim.mxnet import executors  # noqa: E402

SHAPES = [(5, 7), (64,), (1,), (200, 100), (3, 4, 5)]
SAMPLERS = {'sgld': dict(temperature=1.7), 'psgld': dict(temperature=1.7, epsilon=0.5)}


def parameters(dtype='float32', contexts=(0,), shapes=SHAPES):
    random = np.random.RandomState(3)
    made = []
    for i, shape in enumerate(shapes):
        one = gluon.Parameter(f'p{i}_weight', shape=shape, dtype=dtype)
        one.initialize(ctx=[mx.cpu(k) for k in contexts])
        one.set_data(nd.array(random.standard_normal(shape), dtype=dtype))
        made.append(one)
    return made


def created(name, **arguments):
    return go.create(name, **{**SAMPLERS[name], 'learning_rate': 0.1, 'wd': 0.07, 'noise': 'philox', 'seed': KEY, **arguments})


def train(trainer, steps, first=1):
    """Steps on gradients that depend on the parameter's name and the step."""
    for t in range(first, first + steps):
        for parameter in trainer._params:
            random = np.random.RandomState([int(parameter.name[1]), t])
            gradient = random.standard_normal(parameter.shape)
            for own in parameter.list_grad():
                own[:] = nd.array(gradient, dtype=parameter.dtype)
            for data in parameter.list_data():
                data._fresh_grad = True
        trainer.step(1)
    return [parameter.data(parameter.list_ctx()[-1]).asnumpy() for parameter in trainer._params]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize('compiled', [True, False])
@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('name', SAMPLERS)
def test_a_trainer_computes_the_rule_with_the_noise_of_the_counter(name, dtype, compiled, monkeypatch):
    """In kernels and on operators: in single precision the bits of the rule in NumPy; float16 with masters."""
    if not compiled:
        monkeypatch.setattr(executors, '_compiler', lambda: None)
    made = parameters(dtype)
    starts = [one.data().asnumpy() for one in made]
    trainer = gluon.Trainer(made, created(name, multi_precision=True))
    found = train(trainer, 3)
    exact = 'float64' if dtype == 'float64' else 'float32'
    rule = rules.get(name)
    h = rule.hyperparameters(learning_rate=0.1, wd=0.07, noise='philox', **SAMPLERS[name])
    for i, start in enumerate(starts):
        w, slots = start.astype(exact), None
        for t in (1, 2, 3):
            g = np.random.RandomState([i, t]).standard_normal(start.shape).astype(dtype).astype(exact)
            c = {key: np.dtype(exact).type(value) for key, value in rule.all_coefficients(scalars, h, t).items()}
            slots = slots or {slot.name: np.zeros(start.shape, exact) for slot in rule.slots(h)}
            w, slots = rule.apply(Noise(np, KEY, i, t), rule.static(h), c, w, g, slots)
        if dtype == 'float64':
            np.testing.assert_allclose(found[i], w, rtol=1e-12, atol=1e-13)
        else:
            np.testing.assert_array_equal(found[i], w.astype(dtype))


@pytest.mark.parametrize('name', SAMPLERS)
def test_noise_does_not_depend_on_lists_threads_devices_and_order(name):
    expected = train(gluon.Trainer(parameters(), created(name)), 4)
    assert same(expected, train(gluon.Trainer(parameters(contexts=(3,)), created(name)), 4))
    alone = gluon.Trainer(parameters(), created(name))  # one by one, the last parameter first
    alone._optimizer.aggregate_num = 0
    one_by_one = mx.optimizer.get_updater(alone._optimizer)
    one_by_one.aggregate_updates = False
    alone._updaters[:] = [lambda indices, gradients, weights: [
        one_by_one(*one) for one in reversed(list(zip(indices, gradients, weights)))]]
    assert same(expected, train(alone, 4))
    numba = pytest.importorskip('numba')
    from gluon_optim.lowering import numba_runtime
    for threads in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(numba_runtime, 'lane_count', lambda elements, threads=threads: threads)
            assert same(expected, train(gluon.Trainer(parameters(), created(name)), 4))


@pytest.mark.parametrize('name', SAMPLERS)
def test_copies_of_a_parameter_get_one_noise_however_they_are_updated(name, tmp_path):
    for options in (dict(update_on_kvstore=True), dict(update_on_kvstore=False)):
        made = parameters(contexts=(0, 1))
        trainer = gluon.Trainer(made, created(name), **options)
        go.sampling.Chain(trainer, tmp_path, 0, 100, temperature=1.7)._check()
        train(trainer, 4)
        for one in made:
            first, second = (data.asnumpy() for data in one.list_data())
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize('name', SAMPLERS)
def test_parameters_updates_and_keys_differ(name):
    """Seen in weights that do not otherwise differ: no gradient, no decay."""
    def moved(**arguments):
        made = parameters(shapes=[(300,)] * 3)
        for one in made:
            one.set_data(nd.zeros(300))
        trainer = gluon.Trainer(made, created(name, wd=0.0, rescale_grad=0.0, **arguments))
        paths = [np.array(train(trainer, 1, t)) for t in (1, 2, 3)]
        return np.diff([np.zeros_like(paths[0]), *paths], axis=0)  # by update, parameter and element

    changes = moved()
    first = changes.reshape(9, 300) / changes.std()
    assert abs(np.corrcoef(first) - np.eye(9)).max() < 4.5 / np.sqrt(300)
    assert 0.9 < (first ** 2).mean() < 1.1
    assert same(moved(), changes) and not same(moved(seed=KEY - 1), changes)


def test_a_second_draw_of_an_update_is_another():
    """In a rule of a user, which need not declare where noise comes from to be run by MXNet's."""
    class TwoDraws(go.Rule):
        name, summary = 'two_draws', 'two samples for each element'
        needs = frozenset({'noise'})
        hypers = (go.Hyper('learning_rate', 1.0, '[0, inf)'), go.Hyper('wd', 0.0, '[0, inf)'), rules.base.NOISE)
        slots = staticmethod(lambda h: (go.Slot('second'),))
        coefficients = staticmethod(lambda xp, h, t: dict(lr=h.learning_rate))

        @staticmethod
        def step(xp, h, c, w, g, s):
            return (w + c.lr * rules.base.standard_normal(xp, w),
                    dict(second=s.second + c.lr * rules.base.standard_normal(xp, w)))

    go.register(TwoDraws)
    try:
        made = parameters(shapes=[(1000,)])
        made[0].set_data(nd.zeros(1000))
        trainer = gluon.Trainer(made, 'two_draws', {'seed': 5})
        weight, = train(trainer, 1)
        second = trainer._updaters[0].states[0][0].asnumpy() if trainer._updaters[0].states else \
            trainer._kvstore._updater.states[0][0].asnumpy()
        np.testing.assert_array_equal(weight, normals(5, 0, 1, 0, 1000, 'float32'))
        np.testing.assert_array_equal(second, normals(5, 0, 1, 1, 1000, 'float32'))
    finally:
        for names in (rules.registry.RULES, mx.optimizer.Optimizer.opt_registry, go.mxnet.registry._CLASSES):
            del names['two_draws']


# Seeds, and the state

def test_without_a_seed_mxnets_generator_decides():
    def run(seed):
        mx.random.seed(seed)
        return train(gluon.Trainer(parameters(), created('psgld', seed=None)), 2)

    assert same(run(1), run(1)) and not same(run(1), run(2))


@pytest.mark.parametrize('name', SAMPLERS)
def test_states_hold_the_key_and_the_streams(name, tmp_path):
    """They continue bit for bit in a trainer with another seed, another order and one more parameter."""
    straight = gluon.Trainer(parameters(), created(name))
    train(straight, 3)
    go.save_states(straight, tmp_path / 'states')
    saved = go.read_states(tmp_path / 'states')
    assert saved.variables['seed'] == KEY and saved.variables['stream:p3_weight'] == 3
    made = parameters()
    for one, other in zip(made, straight._params):
        one.set_data(other.data())
    expected = train(straight, 3, 4)
    new = gluon.Parameter('p9_weight', shape=(64,))
    new.initialize(mx.init.Zero())
    resumed = gluon.Trainer([new, *made[::-1]], created(name, seed=1))
    go.load_states(resumed, tmp_path / 'states', strict=False)
    found = train(resumed, 3, 4)
    assert same(expected, found[:0:-1])
    streams = resumed._optimizer.streams
    assert len(set(streams.values())) == len(streams) == 6


def test_a_sampler_of_this_package_pickles_with_its_key(tmp_path):
    straight = gluon.Trainer(parameters(), created('psgld'), update_on_kvstore=False)
    train(straight, 2)
    straight.save_states(str(tmp_path / 'native'))
    weights = [one.data().copy() for one in straight._params]
    expected = train(straight, 2, 3)
    states = go.read_states(tmp_path / 'native')
    assert states.variables['seed'] == KEY and len(states.variables) == 6
    for load in (lambda trainer: trainer.load_states(str(tmp_path / 'native')),
                 lambda trainer: go.load_states(trainer, tmp_path / 'native')):
        resumed = gluon.Trainer(parameters(), created('psgld', seed=2), update_on_kvstore=False)
        for one, weight in zip(resumed._params, weights):
            one.set_data(weight)
        load(resumed)
        assert same(train(resumed, 2, 3), expected)


def test_an_sgld_with_noise_of_its_own_is_not_pickled_as_mxnets(tmp_path):
    trainer = gluon.Trainer(parameters(), created('sgld', temperature=1.0), update_on_kvstore=False)
    train(trainer, 1)
    with pytest.raises(ValueError, match="noise of an sgld that is pickled must be MXNet's.*Received: noise='philox'"):
        trainer.save_states(str(tmp_path / 'native'))
    go.save_states(trainer, tmp_path / 'states')
    with pytest.raises(ValueError, match="MXNet's own sgld has no `noise`. Received from the file: noise='philox'"):
        go.load_states(gluon.Trainer(parameters(), 'sgld'), tmp_path / 'states')
    assert b'seed' not in pickle.dumps(go.create('sgld'))


def test_files_of_psgld_from_before_there_was_a_choice_continue_with_mxnets_noise(tmp_path):
    trainer = gluon.Trainer(parameters(), go.create('psgld', noise='mxnet'))
    train(trainer, 1)
    states = go.mxnet.trainer.export_states(trainer)
    del states.hypers['noise']
    other = gluon.Trainer(parameters(), 'psgld')
    go.mxnet.trainer.import_states(other, states)
    assert other._optimizer.noise == 'mxnet'


@pytest.mark.parametrize('arguments, match', [
    (dict(seed=-1), '`seed` must be a whole number, 0 or more. Received: seed=-1'),
    (dict(seed=1.5), '`seed` must be a whole number'),
    (dict(seed=SEEDS), r'`seed` must be below 2\*\*53. Received: seed=9007199254740992'),
    (dict(seed=1, noise='mxnet'), "`seed` is that of noise='philox'. Received: seed=1"),
    (dict(noise='numpy'), "`noise` must be one of 'philox', 'mxnet'. Received: noise='numpy'")])
@pytest.mark.parametrize('name', SAMPLERS)
def test_bad_seeds_and_noises_are_refused(name, arguments, match):
    with pytest.raises(ValueError, match=match):
        created(name, **arguments)


@pytest.mark.parametrize('seed', [-1, 1.5, SEEDS, 'x', True])
def test_a_bad_seed_cannot_be_set_later(seed):
    """It would be saved, and a file with it could not be loaded."""
    optimizer = created('psgld')
    with pytest.raises(ValueError, match='`seed` must be'):
        optimizer.seed = seed
    assert optimizer.seed == KEY
    optimizer.seed = np.int64(7)
    assert type(optimizer.seed) is int and optimizer.shared_state()['seed'] == 7


def test_a_file_with_another_key_is_refused(tmp_path):
    trainer = gluon.Trainer(parameters(), created('psgld'))
    train(trainer, 1)
    states = go.mxnet.trainer.export_states(trainer)
    for name, value in (('seed', np.array(-1)), ('seed', np.array(0.5)), ('stream:p0_weight', np.zeros(2, 'int64'))):
        with pytest.raises(ValueError, match=f'The variable {name!r} of psgld must be one whole number'):
            go.mxnet.trainer.import_states(trainer, dataclasses.replace(states, variables={**states.variables, name: value}))


def test_a_negative_rate_names_the_parameter_and_is_not_counted():
    trainer = gluon.Trainer(parameters(), created('sgld'))
    train(trainer, 1)
    before = [one.data().asnumpy() for one in trainer._params]
    trainer._params[0].lr_mult = -1
    with pytest.raises(ValueError, match="sgld must be 0 or more. Received: -0.1 for the parameter 'p0_weight'"):
        train(trainer, 1)
    assert same(before, [one.data().asnumpy() for one in trainer._params]) and trainer._optimizer.num_update == 1
    trainer._params[0].lr_mult = 1
    trainer.set_learning_rate(0.0)
    assert same(before, train(trainer, 1)) and trainer._optimizer.num_update == 2
