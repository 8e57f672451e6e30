"""The optax transformations against the rules in NumPy and against optax itself, with and without float64; states both ways."""
import functools
import subprocess
import sys

import conversion_runs
import numpy as np
import pytest
from conversion_runs import LIMITS, STEPS, cases, rate, run_rule, settings, weights_and_gradients

from gluon_optim import rules
from gluon_optim.mapping import optax_file
from gluon_optim.states.model import OptimizerStates, ParameterInfo, digest

jax = pytest.importorskip('jax')
optax = pytest.importorskip('optax')
jnp = jax.numpy
from gluon_optim.optax import arguments, create, from_optax, load, save, to_optax  # noqa: E402

MODES = [('float32', False), ('float32', True), ('float64', True)]


@pytest.fixture
def x64(request):
    """Whether JAX has float64: False where a test does not ask otherwise."""
    before = jax.config.jax_enable_x64
    jax.config.update('jax_enable_x64', getattr(request, 'param', False))
    yield
    jax.config.update('jax_enable_x64', before)


pytestmark = pytest.mark.usefixtures('x64')


def schedule(count):
    """`rate`, as optax counts."""
    return jnp.asarray([rate(step) for step in range(1, 2 * STEPS + 1)])[count]


def run(optimizer, params, gradients, state=None):
    """Jitted, with parameters and state donated."""
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree_util.tree_map(jnp.array, params)
    state = jax.jit(optimizer.init)(params) if state is None else state
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params, state


def assert_near(found, expected, travelled, limit):
    for key, weight in expected.items():
        assert found[key].shape == weight.shape and found[key].dtype == weight.dtype
        rounding = 4 * np.spacing(np.abs(weight).max())  # JAX rounds a product and a sum once: 20 steps differ by some of these
        assert np.abs(np.asarray(found[key]) - weight).max() <= max(limit * travelled[key], rounding) and travelled[key] > 1e-3


def states_of(name, hypers, dtype='float32', steps=10, **options):
    """States as a run of ``steps`` updates leaves them, computed with NumPy, and the weights."""
    weights, gradients = weights_and_gradients(dtype, steps)
    weights, slots, _ = run_rule(name, hypers, weights, gradients)
    slots = {key: {slot: np.asarray(value, dtype) for slot, value in own.items()} for key, own in slots.items()}
    infos = [ParameterInfo(key, 'net0_' + key, w.shape, dtype) for key, w in weights.items()]
    hypers = rules.get(name).hyperparameters(**hypers).asdict()
    return OptimizerStates(name, hypers, steps, infos, dict.fromkeys(weights, steps), slots, **options), weights


# -- the transformation ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype, x64', [('float32', False), ('float64', True)], indirect=['x64'], ids=['single', 'double'])
@pytest.mark.parametrize('name, extra', list(cases()))
def test_equals_the_rule(name, extra, dtype, x64):
    hypers = settings(name, extra)
    weights, gradients = weights_and_gradients(dtype)
    expected, slots, travelled = run_rule(name, hypers, weights, gradients)
    params, state = run(create(name, learning_rate=schedule, **hypers), weights, gradients)
    assert_near(params, expected, travelled, LIMITS[dtype])
    assert state.count == STEPS and state.count.dtype == np.int32 and state.master is None
    for key, own in slots.items():
        for slot, value in own.items():
            found = state.slots[slot][key]
            assert found.dtype == dtype and found.shape == np.shape(value)
            np.testing.assert_allclose(found, value, rtol=20 * LIMITS[dtype], atol=20 * LIMITS[dtype])


@pytest.mark.parametrize('dtype, x64', MODES, indirect=['x64'], ids=['single', 'single-x64', 'double'])
@pytest.mark.parametrize('name', [name for name in rules.names(drop_ins=True) if name not in rules.names()])
def test_rules_of_mxnet_run_or_are_refused(name, dtype, x64):
    weights, gradients = weights_and_gradients(dtype)
    hypers = {'wd': 0.1} if any(hyper.name == 'wd' for hyper in rules.get(name).hypers) else {}
    try:
        optimizer = create(name, learning_rate=schedule, **hypers)
    except ValueError as error:
        assert str(error).startswith(f'{name!r} cannot be a GradientTransformation')
        return
    params, _ = run(optimizer, weights, gradients)
    expected, _, travelled = run_rule(name, hypers, weights, gradients)
    for key, weight in expected.items():
        limit = max(10 * LIMITS[dtype] * max(travelled[key], 1e-3), 4 * np.spacing(np.abs(weight).max()))
        assert np.abs(np.asarray(params[key]) - weight).max() <= limit


@pytest.mark.parametrize('name, beta', [('adamw', 0.999), ('radam', 0.999), ('radam', 0.9999), ('novograd', 0.999),
                                        ('nadam_torch', 0.999)])
def test_coefficients_keep_their_digits_in_single_precision(name, beta):
    rule = rules.get(name)
    h = rule.hyperparameters(beta2=beta, wd=0.0)
    for t in (*range(1, 12), 100, 1000, 4000, 100000):
        exact = rule.all_coefficients(rules.base.scalars, h, t)
        found = rule.all_coefficients(jnp, h.replace(learning_rate=jnp.float32(h.learning_rate)), jnp.float32(t))
        for key, value in exact.items():
            np.testing.assert_allclose(np.float32(found[key]), value, rtol=1e-6, err_msg=f'{key} at {t}')


@pytest.mark.parametrize('name, ours, theirs', [
    ('adamw', dict(wd=0.1, epsilon=1e-3), lambda lr: optax.adamw(lr, eps=1e-3, weight_decay=0.1)),
    ('adam_torch', dict(epsilon=1e-3), lambda lr: optax.adam(lr, eps=1e-3)),
    ('sgd_torch', dict(momentum=0.9), lambda lr: optax.sgd(lr, momentum=0.9)),
    ('sgd_torch', dict(momentum=0.9, nesterov=True), lambda lr: optax.sgd(lr, momentum=0.9, nesterov=True)),
])
@pytest.mark.parametrize('x64', [True], indirect=True)
def test_equals_optax(name, ours, theirs, x64):
    weights, gradients = weights_and_gradients()
    mine, _ = run(create(name, learning_rate=schedule, **ours), weights, gradients)
    other, _ = run(theirs(schedule), weights, gradients)
    for key in weights:
        np.testing.assert_allclose(mine[key], other[key], rtol=1e-12)


def test_updates_give_the_rules_weight_bit_for_bit():
    random = np.random.RandomState(0)
    weights = {'w': random.normal(size=1_000_000).astype('float32')}
    gradient = {'w': random.normal(size=1_000_000).astype('float32')}
    for lr in (2.0 ** -10, 0.125, 1.0, 32.0):  # exact products, so that one sum is all that is rounded
        params, _ = run(create('sgd_torch', learning_rate=lr), weights, [gradient])
        assert bytes(np.asarray(params['w'])) == bytes(weights['w'] - np.float32(lr) * gradient['w'])
    # a weight that decays to nothing in one step: no update can reach it exactly
    keep = create('adamw', learning_rate=1.0, wd=1 - 2.0 ** -20)
    params, _ = run(keep, weights, [{'w': np.zeros_like(gradient['w'])}])
    assert np.all(np.abs(params['w'] - weights['w'] * 2.0 ** -20) <= np.spacing(np.abs(weights['w'])))


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('name', ['novograd', 'adamw', 'asgd'])
def test_half_parameters_follow_their_masters(name, dtype):
    weights, gradients = weights_and_gradients('float32', 8)
    halves = jax.tree_util.tree_map(lambda w: jnp.asarray(w, dtype), weights)
    gradients = [jax.tree_util.tree_map(lambda g: jnp.asarray(g, dtype), gradient) for gradient in gradients]
    singles = [jax.tree_util.tree_map(lambda x: x.astype('float32'), tree) for tree in (halves, *gradients)]
    params, state = run(create(name), halves, gradients)
    expected, _ = run(create(name), singles[0], singles[1:])
    for key in weights:
        assert params[key].dtype == dtype and state.master[key].dtype == 'float32'
        np.testing.assert_allclose(state.master[key], expected[key], rtol=3e-7)
        assert np.asarray(params[key]).tobytes() == np.asarray(state.master[key].astype(dtype)).tobytes()
        assert all(tree[key].dtype == 'float32' for tree in state.slots.values())
    state = create(name, multi_precision=False).init(halves)
    assert state.master is None and all(tree['bias'].dtype == 'float32' for tree in state.slots.values())


def test_rates_may_be_numbers_schedules_arrays_and_injected():
    weights, gradients = weights_and_gradients('float32')
    expected, _ = run(create('adamw', learning_rate=0.25, wd=0.5), weights, gradients)
    for options in (dict(learning_rate=lambda count: 0.25, wd=lambda count: 0.5), dict(learning_rate=jnp.float32(0.25), wd=0.5)):
        params, _ = run(create('adamw', **options), weights, gradients)
        for key in weights:
            np.testing.assert_allclose(params[key], expected[key], rtol=1e-6)
    injected = optax.inject_hyperparams(lambda learning_rate: create('adamw', learning_rate=learning_rate, wd=0.5))
    injected = injected(learning_rate=0.25)
    params, state = run(injected, weights, gradients)
    np.testing.assert_allclose(params['weight'], expected['weight'], rtol=1e-6)
    assert float(state.hyperparams['learning_rate']) == 0.25
    seen = []
    optimizer = create('sgd_torch', learning_rate=lambda count: seen.append(int(count)) or 0.1)
    state = optimizer.init(weights)
    for _ in range(3):
        _, state = optimizer.update(weights, state, weights)
    assert seen == [0, 1, 2]


def test_a_slot_that_begins_with_the_weight_is_an_array_of_its_own():
    optimizer, params = create('dcasgd'), {'w': jnp.ones(3)}
    state = optimizer.init(params)
    for tree in state.slots.values():
        assert tree['w'] is not params['w'] and tree['w'].unsafe_buffer_pointer() != params['w'].unsafe_buffer_pointer()


def test_multipliers():
    weights, gradients = weights_and_gradients('float32', 3)
    factors = {'weight': 0.5, 'bias': 2, 'one': 0.0, 'number': 1.0}
    optimizer = create('adamw', lr_mult=factors, wd_mult={**factors, 'weight': 0.0}, wd=0.5, learning_rate=0.1)
    params, _ = run(optimizer, weights, gradients)
    for key, factor in factors.items():
        own = dict(learning_rate=0.1 * factor, wd=0.5 * (0.0 if key == 'weight' else factor))
        alone, _ = run(create('adamw', **own), {key: weights[key]}, [{key: g[key]} for g in gradients])
        np.testing.assert_allclose(params[key], alone[key], rtol=1e-6)
    assert params['one'] == weights['one']


def test_works_inside_optax():
    weights, gradients = weights_and_gradients('float32', 3)
    mask = {key: key != 'bias' for key in weights}
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(create('novograd', learning_rate=0.1), mask))
    params, _ = run(chain, weights, [dict(g, bias=np.zeros(3, 'float32')) for g in gradients])
    assert bytes(np.asarray(params['bias'])) == bytes(weights['bias']) and not np.allclose(params['weight'], weights['weight'])
    nested = {'layers': [{'w': weights['weight']}, (weights['bias'],)]}
    params, state = run(create('adamw'), nested, [nested])
    assert jax.tree_util.tree_structure(params) == jax.tree_util.tree_structure(nested)
    assert jax.tree_util.tree_structure(state.slots['mean']) == jax.tree_util.tree_structure(nested)


@pytest.mark.parametrize('error, message, make', [
    (ValueError, "Unknown optimizer 'novogard'", lambda: create('novogard')),
    (TypeError, "Unknown argument of adamw 'beta'", lambda: create('adamw', beta=1)),
    (ValueError, '`beta1` must be in', lambda: create('adamw', beta1=1.0)),
    (TypeError, '`beta1` must be in', lambda: create('adamw', beta1=lambda count: 0.9)),
    (ValueError, '`multi_precision` must be one of', lambda: create('adamw', multi_precision=2)),
    (ValueError, 'A parameter must be an array of float16, bfloat16, float32, float64. Received: int32',
     lambda: create('adamw').init({'w': jnp.arange(3)})),
    (ValueError, 'adamw needs the parameters', lambda: create('adamw').update(jnp.ones(1), create('adamw').init(jnp.ones(1)))),
])
def test_refusals(error, message, make):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


def test_rules_that_do_not_lower_are_refused():
    class Matrix(rules.get('sgd_torch')):
        name, lowerable = 'matrix', False

    rules.add(Matrix)
    try:
        with pytest.raises(ValueError, match="'matrix' cannot be a GradientTransformation"):
            create('matrix')
    finally:
        del rules.registry.RULES['matrix']


def test_without_jax_there_is_one_line_that_says_what_to_do():
    code = ("import sys; sys.modules['jax'] = None\nimport gluon_optim\n"
            "try:\n    import gluon_optim.optax\nexcept ImportError as error:\n    print(error)")
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], stdout=subprocess.PIPE, check=True, text=True)
    assert done.stdout.startswith('gluon_optim.optax needs JAX and optax, and importing failed: ')
    assert done.stdout.endswith(". In a checkout of gluon_optim, pip install '.[optax]'\n")


# -- states into JAX and back ------------------------------------------------------------------------------------------

def test_counts_multipliers_masters_and_fresh_parameters():
    weights, gradients = weights_and_gradients('float16', 4)
    infos = [ParameterInfo('weight', 'w', (4, 3), 'float16', 0.5, 1.0), ParameterInfo('bias', 'b', (3,), 'float16', 1.0, 0.0),
             ParameterInfo('one', 'o', (1,), 'float16'), ParameterInfo('number', 'n', (), 'float16')]
    counts, rule, slots, masters = {'weight': 3, 'bias': 5, 'one': 0, 'number': 3}, rules.get('adamw'), {}, {}
    hypers = rule.hyperparameters(wd=0.1, learning_rate=0.25)

    def advance(key, begin, times):
        info = next(info for info in infos if info.name == key)
        h = hypers.replace(wd=0.1 * info.wd_mult, learning_rate=0.25 * info.lr_mult)
        for t in range(begin + 1, begin + times + 1):
            w, own = rule.run(np, h, t, masters.get(key, weights[key].astype('float32')), gradients[t % 4][key].astype('float32'),
                              slots.get(key))
            masters[key], slots[key] = np.asarray(w, 'float32'), {k: np.asarray(v, 'float32') for k, v in own.items()}

    for key in ('weight', 'bias', 'number'):
        advance(key, 0, counts[key])
    states = OptimizerStates('adamw', hypers.asdict(), 7, infos, dict(counts), dict(slots), dict(masters))
    with pytest.raises(ValueError, match="'one' has not been updated yet, and its state starts from its weight. Pass `weights`"):
        to_optax(states)
    names = [{'a': 'weight', 'b': 'one'}, 'bias', ('number',)]
    state = to_optax(states, params=names, weights=weights)
    assert arguments(states, names)['lr_mult'] == [{'a': 0.5, 'b': 1.0}, 1.0, (1.0,)]
    params = jax.tree_util.tree_map(lambda name: jnp.asarray(masters.get(name, weights[name])).astype('float16'), names)
    back = from_optax(state, 'adamw', jax.tree_util.tree_map(lambda name: next(i for i in infos if i.name == name), names),
                      num_update=7, **hypers.asdict())
    assert back.counts == counts and digest(from_optax(state, 'adamw', params, names, 7, **hypers.asdict())) == digest(back)
    for key, own in states.slots.items():
        assert all(back.slots[key][slot].tobytes() == array.tobytes() for slot, array in own.items())
        assert back.master[key].tobytes() == states.master[key].tobytes()
    by_count = [jax.tree_util.tree_map(lambda name, k=k: gradients[(counts[name] + k) % 4][name], names) for k in (1, 2, 3)]
    optimizer = create('adamw', **arguments(states, names))
    params, state = run(optimizer, params, by_count, state)
    for key in weights:
        advance(key, counts[key], 3)
    for name, value, master in zip(*map(jax.tree_util.tree_leaves, (names, params, state.master))):
        np.testing.assert_allclose(master, masters[name], rtol=3e-7)
        assert bytes(np.asarray(value)) == bytes(np.asarray(master.astype('float16')))
    assert [int(x) for x in jax.tree_util.tree_leaves(state.count)] == [6, 3, 8, 6]


def test_the_report_says_what_to_do():
    scheduler = {'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': {}}
    states, _ = states_of('novograd', {'rescale_grad': 0.5}, scheduler=scheduler)
    to_optax(states)
    report = '\n'.join(states.report)
    assert "gluon_optim.optax.create('novograd'): exact; 4 parameters, update 10" in report
    assert 'rescale_grad=0.5 is not carried over' in report and arguments(states)['rescale_grad'] == 1.0
    assert 'pass a function of the number of updates done as learning_rate, starting with update 11' in report
    assert 'param_groups' not in report


@pytest.mark.parametrize('error, message, change', [
    (ValueError, "Unknown target 'torch'", lambda s: dict(target='torch')),
    (ValueError, "Unknown parameter 'wieght'", lambda s: dict(params=['wieght'])),
    (TypeError, '`params` must be a pytree of names. Received: int', lambda s: dict(params=['bias', 3])),
    (ValueError, "'mean' of 'bias' must have shape (3,)", lambda s: s.slots['bias'].update(mean=np.zeros(4, 'float32'))),
    (ValueError, "must hold 'mean'", lambda s: s.slots['bias'].pop('mean')),
    (ValueError, 'optax would lose the variables', lambda s: s.variables.update(x=np.ones(1))),
    (ValueError, 'JAX must have float64 enabled', lambda s: s.parameters.append(ParameterInfo('d', 'd', (1,), 'float64'))),
])
def test_states_that_do_not_fit_are_refused(error, message, change):
    states, _ = states_of('adamw', {})
    changed = change(states)
    with pytest.raises(error) as caught:
        to_optax(states, **(changed if isinstance(changed, dict) else {}))
    assert message in str(caught.value) and not states.report


def test_states_of_others_are_refused():
    with pytest.raises(TypeError, match='`state` must be the state of an optimizer made by `create`. Received: tuple'):
        from_optax(optax.adam(0.1).init(jnp.ones(2)), 'adamw')
    state = create('adamw').init({'w': jnp.ones(2)})
    with pytest.raises(ValueError, match="must hold 'norm_sq'"):
        from_optax(state, 'novograd')
    with pytest.raises(ValueError, match="'w' must be float16, float32 or float64"):
        from_optax(state, 'adamw', {'w': jnp.ones(2, jnp.bfloat16)})
    back = from_optax(state, 'adamw')
    assert back.names == ['w'] and any('shapes and types of weights are taken from the slots' in line for line in back.report)


# -- every optimizer, every step ---------------------------------------------------------------------------------------

def written(path, states, weights=None):
    optax_file.write(path, states, states.parameters, weights)
    return path


@pytest.mark.parametrize('dtype, x64, which', [
    ('float32', False, 'usual'), ('float32', False, 'other'), ('float16', False, 'usual'), ('float64', True, 'other'),
], indirect=['x64'])
@pytest.mark.parametrize('name', conversion_runs.NAMES)
def test_a_run_goes_on_in_jax_and_comes_back(name, which, dtype, x64, tmp_path):
    states, weights = conversion_runs.half_trained(name, which, dtype)
    path = written(tmp_path / 'run.npz', states)
    back, _ = optax_file.read(path)
    assert digest(back) == digest(states) and (back.hypers, back.parameters) == (states.hypers, states.parameters)
    state, given = load(path)
    direct = jax.tree_util.tree_leaves(to_optax(states))
    assert all(bytes(np.asarray(x)) == bytes(np.asarray(y)) for x, y in zip(direct, jax.tree_util.tree_leaves(state)))
    optimizer = create(**dict(given, learning_rate=schedule))
    kinds = [(jax.tree_util.tree_structure(tree), [(x.shape, x.dtype) for x in jax.tree_util.tree_leaves(tree)])
             for tree in (state, optimizer.init(weights))]
    assert kinds[0] == kinds[1]
    gradients = conversion_runs.gradients_of(dtype, STEPS, 2)
    params, later = run(optimizer, weights, gradients, state)
    after, new, travelled = conversion_runs.advance(states, weights, gradients, 10)
    found = params if later.master is None else later.master
    conversion_runs.assert_near(found, after, new, travelled)
    save(tmp_path / 'later.npz', later, name, {info.name: info for info in states.parameters}, num_update=30, **states.hypers)
    again, _ = optax_file.read(tmp_path / 'later.npz')
    assert (again.counts, again.num_update) == (after.counts, 30)
    for key, own in again.slots.items():
        assert all(array.tobytes() == bytes(np.asarray(later.slots[slot][key])) for slot, array in own.items())


@pytest.mark.parametrize('name', ['ftml', 'lamb', 'adam', 'adam_torch', 'radam', 'novograd', 'lans', 'nadam_torch', 'adabelief'])
def test_late_in_a_run(name):
    states, weights = conversion_runs.half_trained(name, 'usual')
    states = conversion_runs.late(states, 100_000)
    gradients = conversion_runs.gradients_of('float32', STEPS, 2)
    optimizer = create(name, **dict(arguments(states), learning_rate=lambda count: schedule(count - 100_000)))
    params, _ = run(optimizer, weights, gradients, to_optax(states))
    conversion_runs.assert_near(params, *conversion_runs.advance(states, weights, gradients, 10))
