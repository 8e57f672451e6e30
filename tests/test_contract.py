"""What every optimizer of this package promises, whatever it computes: one test module over the whole registry.

Real MXNet, real Trainers. What a rule does not promise is declared on it, in `exceptions`, and tested to be so.
"""
import gc
import inspect
import os
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')
from mxnet import gluon, nd  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from contract_nets import (  # noqa: E402
    COLD,
    EXCEPTIONS_2,
    MXNETS_2,
    NEWER,
    RATE,
    SHAPES,
    Run,
    array,
    assert_same,
    backward_through,
    clear_gradient,
    differ,
    environment,
    flat,
    gradients,
    in_process,
    numbers,
    optimizer_named,
    small_net,
    structural,
    trainer_with,
)

import gluon_optim as go  # noqa: E402
from gluon_optim import cli, rules  # noqa: E402
from gluon_optim.mxnet import executors  # noqa: E402
from gluon_optim.rules.base import BASE_HYPERS  # noqa: E402
from gluon_optim.rules.runtimes import needs, runs_on  # noqa: E402
from gluon_optim.schema import Interval  # noqa: E402

# not those that stand in for MXNet's own, nor what another test registers
NAMES = [name for name in rules.names(samplers=True) if rules.get(name).__module__.startswith('gluon_optim.rules.')
         and '.mx.' not in rules.get(name).__module__]
each = pytest.mark.parametrize('name', NAMES)
TWO = {'contexts': (0, 1), 'kvstore': 'device'}
HALF = {'dtype': 'float16', 'arguments': {'multi_precision': True}}

DEFAULTS = {
    'adabelief': dict(beta1=0.9, beta2=0.999, epsilon=1e-6),
    'adadelta_torch': dict(rho=0.9, epsilon=1e-6),
    'adagrad_torch': dict(lr_decay=0, initial_accumulator=0, epsilon=1e-10),
    'adam_torch': dict(beta1=0.9, beta2=0.999, epsilon=1e-8, amsgrad=False),
    'adamax_torch': dict(beta1=0.9, beta2=0.999, epsilon=1e-8),
    'adamw': dict(wd=0.01, beta1=0.9, beta2=0.999, epsilon=1e-8, amsgrad=False),
    'asgd': dict(lambd=1e-4, alpha=0.75, t0=1e6),
    'lans': dict(beta1=0.9, beta2=0.999, epsilon=1e-6, lower_bound=None, upper_bound=None),
    'larc': dict(base='sgd_torch', trust_coefficient=0.02, clip=True, epsilon=1e-8, min_update=0, variant='apex', momentum=0),
    'nadam_torch': dict(beta1=0.9, beta2=0.999, epsilon=1e-8, momentum_decay=0.004, decoupled_wd=False),
    'noise_adaptive_sgd': dict(learning_rate=1, batch_size=1, curvature=1, averaging_min=1e-3, epsilon=1e-12),
    'novograd': dict(learning_rate=1e-3, beta1=0.95, beta2=0.98, epsilon=1e-8, epsilon_root=0, grad_averaging=None,
                     amsgrad=False, decoupled_wd=False, variant='paper'),
    'psgld': dict(rho=0.99, epsilon=1, temperature=1, noise='philox'),
    'radam': dict(beta1=0.9, beta2=0.999, epsilon=1e-8, decoupled_wd=False),
    'rmsprop_torch': dict(rho=0.99, epsilon=1e-8, momentum=0, centered=False, bias_correction=False),
    'rprop': dict(eta_minus=0.5, eta_plus=1.2, step_min=1e-6, step_max=50),
    'sgd_ema': dict(momentum=0.9, nesterov=False, bias_correction=False),
    'sgd_torch': dict(momentum=0, dampening=0, nesterov=False),
    'sngd': dict(scale_by_weight_norm=False, epsilon=1e-12),
}


def decay_of(name, wd=0.125):
    """A weight decay where there is one."""
    domain = Interval.parse(rules.get(name).hyper('wd').domain)
    return dict(COLD.get(name, {}), **({'wd': wd} if wd in domain else {}))


def drifts(name, contexts=(0,), update_on_kvstore=None, kvstore='device', **others):
    """Whether copies of a parameter would each get a noise of their own, which test_sampling.py tests to be refused."""
    return "MXNet's noise" in needs(rules.get(name)) and len(contexts) > 1 and (update_on_kvstore is False or kvstore is None)


def run_of(name, options, **arguments):
    """A `Run` with some decay; ``options`` of Run, ``arguments`` of the optimizer."""
    options = dict(options)
    return Run(name, dict(decay_of(name), **options.pop('arguments', {}), **arguments), **options)


class Rates:
    """A scheduler that says what a test wants."""

    def __init__(self, *rates):
        self.base_lr, self.rates = RATE, rates

    def __call__(self, num_update):
        rate = self.rates[min(num_update - 1, len(self.rates) - 1)]
        if isinstance(rate, Exception):
            raise rate
        return rate


# Exceptions of MXNet 2.0

@pytest.mark.skipif(not NEWER, reason='for MXNet 2.x')
@pytest.mark.parametrize('what', EXCEPTIONS_2)
def test_what_mxnet_2_cannot_do(what):
    attempt, error, text = EXCEPTIONS_2[what]
    with pytest.raises(error, match=text):
        attempt()


@each
def test_the_name_in_a_trainer_means_this_packages_optimizer(name):
    """Except where MXNet 2.0 has its own by that name; `create` makes this package's everywhere."""
    in_trainer = type(gluon.Trainer(Run('sgd_torch').parameters, name)._optimizer).__module__
    assert in_trainer.startswith('mxnet.optimizer' if NEWER and name in MXNETS_2 else 'gluon_optim.')
    assert type(go.create(name)).__module__ == 'gluon_optim.mxnet.registry'


# Arguments

def test_the_registry_is_that_of_the_contract():
    assert sorted(DEFAULTS) == NAMES


@each
def test_defaults(name):
    optimizer = optimizer_named(name)
    assert type(go.create(name)) is type(optimizer)
    expected = dict(wd=0, rescale_grad=1, clip_gradient=None, learning_rate=rules.get(name).hyper('learning_rate').default)
    expected.update(DEFAULTS[name])
    assert {hyper: getattr(optimizer, hyper) for hyper in expected} == expected
    assert (optimizer.lr_scheduler, optimizer.begin_num_update, optimizer.multi_precision) == (None, 0, False)
    signature = inspect.signature(type(optimizer))
    assert signature.parameters['learning_rate'].default is None
    assert {hyper: signature.parameters[hyper].default for hyper in DEFAULTS[name] if hyper != 'learning_rate'} == {
        hyper: value for hyper, value in DEFAULTS[name].items() if hyper != 'learning_rate'}


@each
def test_every_base_argument_is_accepted(name):
    scheduler = mx.lr_scheduler.FactorScheduler(step=9, factor=0.5)
    symbol = mx.sym.FullyConnected(mx.sym.Variable('x'), num_hidden=2, name='fc')
    given = dict(decay_of(name), learning_rate=0.5, rescale_grad=0.5, clip_gradient=0.75, begin_num_update=8, multi_precision=True)
    run = Run(name, dict(given, lr_scheduler=scheduler, param_idx2name={0: 'p0_weight'}, sym=symbol)).train(2)
    assert {argument: getattr(run.optimizer, argument) for argument in given if argument != 'learning_rate'} == {
        argument: value for argument, value in given.items() if argument != 'learning_rate'}
    assert (run.optimizer.num_update, run.trainer.learning_rate, run.optimizer.idx2name) == (10, 0.25, {0: 'p0_weight'})


@each
def test_the_rate_is_the_users_or_the_schedulers_or_the_default(name, capsys, recwarn):
    default = rules.get(name).hyper('learning_rate').default
    assert optimizer_named(name).learning_rate == default
    assert optimizer_named(name, learning_rate=0.5).learning_rate == 0.5
    for given, rate in [({}, 0.25), (dict(learning_rate=0.5), 0.5), (dict(learning_rate=default), default)]:
        scheduler = mx.lr_scheduler.FactorScheduler(step=10, base_lr=0.25)
        assert optimizer_named(name, lr_scheduler=scheduler, **given).learning_rate == rate
        assert scheduler.base_lr == rate
    assert capsys.readouterr().out == '' and not recwarn.list  # MXNet prints a UserWarning object


def bad_values(hyper):
    """Values that ``hyper`` refuses, and how."""
    if not hyper.optional and not (hyper.is_switch and None in hyper.domain):
        yield None, TypeError
    yield ['a list'], TypeError
    if hyper.is_switch:
        yield 'no such choice', ValueError
        yield 1, ValueError  # not True
        return
    yield '0.5', TypeError
    yield True, TypeError
    yield float('nan'), ValueError
    domain = Interval.parse(hyper.domain)
    for bound, beyond in [(domain.low, -1), (domain.high, 1)]:
        if np.isfinite(bound):
            yield bound + beyond, ValueError
    if not domain.low_closed and np.isfinite(domain.low):
        yield domain.low, ValueError
    if not domain.high_closed:
        yield domain.high, ValueError


@each
def test_a_bad_argument_is_refused_before_anything_happens(name):
    parameters = Run('sgd_torch').parameters
    rule = rules.get(name)
    for hyper in rule.hypers + BASE_HYPERS:
        for value, error in bad_values(hyper):
            if hyper.name == 'learning_rate' and value is None:
                continue  # None is the default
            scheduler = Rates(0.25)
            with pytest.raises(error) as caught:
                trainer_with(parameters, name, {hyper.name: value, 'lr_scheduler': scheduler})
            assert hyper.name in str(caught.value) and repr(value) in str(caught.value), caught.value
            assert scheduler.base_lr == RATE
    with pytest.raises(TypeError, match=f"Unknown argument of {name} 'learning_rates'. Did you mean 'learning_rate'"):
        trainer_with(parameters, name, {'learning_rates': 0.5})
    for begin in (-1, 0.5, True, '1'):
        with pytest.raises((TypeError, ValueError), match='begin_num_update'):
            trainer_with(parameters, name, {'begin_num_update': begin})


def test_an_unknown_name_lists_those_that_are_near():
    with pytest.raises(ValueError, match="Unknown optimizer 'novgrad'. Did you mean 'novograd'?"):
        go.create('novgrad')


@each
def test_a_value_that_turns_bad_during_training_changes_nothing(name):
    """Neither weights nor slots nor counts: with the value put right, the run goes on as if nothing had been."""
    straight = Run(name).train(3).facts()
    run = Run(name).train(1)
    rule = rules.get(name)

    def refused(error, match):
        before = run.facts()
        with pytest.raises(error, match=match):
            run.step()
        assert_same(before, run.facts())

    for hyper in rule.hypers:
        if hyper.name == 'learning_rate':
            continue
        good = getattr(run.optimizer, hyper.name)
        for value, error in bad_values(hyper):
            if value != good:  # 1 for True goes unnoticed, and does no harm
                setattr(run.optimizer, hyper.name, value)
                refused(error, hyper.name)
        setattr(run.optimizer, hyper.name, good)
    for rate, error in [(float('nan'), ValueError), (float('inf'), ValueError), (-0.5, ValueError), ('fast', TypeError)]:
        run.trainer.set_learning_rate(rate)
        refused(error, 'learning_rate')
    run.trainer.set_learning_rate(RATE)
    run.step()
    run.parameters[1].lr_mult = float('nan')
    refused(ValueError, 'lr_mult')
    run.parameters[1].lr_mult = 1.0
    run.parameters[2].wd_mult = float('nan')
    refused(ValueError, 'wd_mult')
    run.parameters[2].wd_mult = 1.0
    assert_same(straight, run.step().facts())


@each
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), ZeroDivisionError('a bug')], ids=['nan', 'inf', 'raises'])
def test_a_scheduler_that_answers_nonsense_changes_nothing(name, bad):
    run = Run(name, {'lr_scheduler': Rates(0.25, bad)}).step()
    before = run.facts()
    with pytest.raises(ZeroDivisionError if isinstance(bad, Exception) else ValueError):
        run.step()
    assert_same(before, run.facts())
    run.optimizer.lr_scheduler.rates = (0.25, 0.125)
    assert_same(Run(name, {'lr_scheduler': Rates(0.25, 0.125)}).train(2).facts(), run.step().facts())


def test_a_bad_value_on_a_kvstore_that_is_called_by_hand_changes_nothing(monkeypatch):
    """There MXNet calls the optimizer through C, which cannot pass the error on: it is printed, and nothing is written."""
    raised = []
    monkeypatch.setattr(sys, 'unraisablehook', lambda what: raised.append(what.exc_value))
    run = Run('novograd', **TWO, update_on_kvstore=True).train(2)
    before = run.facts()
    run.optimizer.beta1 = 2
    run.backward()
    for i, parameter in enumerate(run.parameters):
        run.trainer._kvstore.pushpull(i, parameter.list_grad(), out=parameter.list_data())
    assert_same(before, run.facts())
    assert len(raised) == len(SHAPES) and all(isinstance(error, ValueError) and 'beta1' in str(error) for error in raised)


# Counts

@each
@pytest.mark.parametrize('options', [{}, dict(TWO, update_on_kvstore=False), dict(TWO, update_on_kvstore=True), HALF],
                         ids=['list', 'two contexts', 'kvstore', 'half'])
def test_counts_advance_once_per_step(name, options):
    if drifts(name, **options):
        return
    run = Run(name, **options)
    for t in range(1, 4):
        run.step()
        assert run.optimizer.update_counts() == {i: t for i in range(len(SHAPES))}
        assert run.optimizer.num_update == t


@each
def test_single_keys_and_lists_are_counted_and_updated_alike(name):
    arrays = [(nd.array(numbers(i, shape)), nd.array(g)) for i, (shape, g) in enumerate(zip(SHAPES, gradients(0)))]
    results = []
    for single in (True, False):
        optimizer = optimizer_named(name, learning_rate=RATE, **decay_of(name))
        weights, given = [w.copy() for w, _ in arrays], [g for _, g in arrays]
        states = [optimizer.create_state(i, w) for i, w in enumerate(weights)]
        for t in range(1, 4):
            if single:
                for i in range(len(weights)):
                    optimizer.update(i, weights[i], given[i], states[i])
            else:
                optimizer.update(list(range(len(weights))), weights, given, states)
            assert optimizer.update_counts() == dict.fromkeys(range(len(weights)), t) and optimizer.num_update == t
        results.append(named(weights, states))
    assert_same(*results)


@each
def test_begin_num_update_is_for_the_scheduler_only(name):
    fresh, later = (Run(name, dict(decay_of(name), begin_num_update=begin)).train(3).facts() for begin in (0, 100))
    assert later.pop('num_update') == 100 + fresh.pop('num_update')
    assert_same(fresh, later)
    run = Run(name, {'lr_scheduler': Rates(*[0.25] * 100, 0.125), 'begin_num_update': 100}).step()
    assert_same(Run(name, {'learning_rate': 0.125}).step().weights(), run.weights())


# Multipliers and scales

@each
def test_lr_mult_0_freezes(name):
    start, run = Run(name).weights(), Run(name, decay_of(name), lr_mult=0).train(3)
    if 'lr_mult=0' in rules.get(name).exceptions:
        assert differ(start, run.weights())
    else:
        assert_same(start, run.weights())
    assert differ(start, Run(name, decay_of(name)).train(3).weights())


@each
def test_wd_mult_0_leaves_no_decay(name):
    """Neither beside a gradient nor alone."""
    assert_same(Run(name, {'wd': 0.0}).train(3).facts(), Run(name, decay_of(name), wd_mult=0).train(3).facts())
    nothing = [np.zeros(shape) for shape in SHAPES]
    start, run = Run(name).weights(), Run(name, decay_of(name), wd_mult=0)
    for _ in range(3):
        run.step(nothing)
    if 'wd_mult=0' in rules.get(name).exceptions:
        assert differ(start, run.weights())
    else:
        assert_same(start, run.weights())


@each
def test_multipliers_multiply(name):
    for argument, multiplier in [('learning_rate', 'lr_mult'), ('wd', 'wd_mult')]:
        given = dict(decay_of(name), learning_rate=RATE)
        if argument in given:
            half = dict(given, **{argument: given[argument] / 2})
            assert_same(Run(name, half).train(3).facts(), Run(name, given, **{multiplier: 0.5}).train(3).facts())
    # one parameter's multiplier is that parameter's
    run = Run(name, decay_of(name))
    run.parameters[1].lr_mult = 0.5
    some, all_of_it, half = (r.train(2).weights() for r in (run, Run(name, decay_of(name)), Run(name, decay_of(name), lr_mult=0.5)))
    assert_same({'p0_weight': all_of_it['p0_weight'], 'p1_weight': half['p1_weight'], 'p2_weight': all_of_it['p2_weight']}, some)


@each
@pytest.mark.parametrize('options', [{}, HALF], ids=['single', 'half'])
def test_a_scaled_loss_and_rescale_grad_cancel(name, options):
    """For norms and clipping too: a power of two leaves every bit as it was."""
    clip = {} if options else dict(clip_gradient=0.75)
    plain, by_argument, by_batch = (run_of(name, options, rescale_grad=r, **clip) for r in (1, 1 / 16, 1))
    plain.train(3)
    for _ in range(3):
        by_argument.step(scale=16.0)
        by_batch.step(scale=16.0, batch_size=16)
    assert 'rescaling' not in rules.get(name).exceptions
    assert_same(plain.facts(), by_argument.facts())
    assert_same(plain.facts(), by_batch.facts())


@each
def test_exceptions_are_declared_and_printed(name, capsys):
    declared = go.optimizer_info(name).exceptions
    assert set(declared) <= {'lr_mult=0', 'wd_mult=0', 'rescaling'}
    assert cli.main(['info', name]) == 0
    printed = ' '.join(capsys.readouterr().out.split())
    for what, why in declared.items():
        assert what in printed and why in printed


# Gradients

paths = pytest.mark.parametrize('compiled', [True, False], ids=['compiled', 'operators'])


@pytest.fixture
def path(compiled, monkeypatch):
    """Compiled loops, or MXNet's operators as where numba is missing."""
    if not compiled:
        monkeypatch.setattr(executors, '_compiler', lambda: None)


@each
@paths
@pytest.mark.parametrize('options', [{}, HALF, {'dtype': 'float64'}], ids=['single', 'half', 'double'])
def test_gradients_are_never_modified(name, options, path):
    run = run_of(name, options, rescale_grad=0.5, **({} if options else dict(clip_gradient=0.75)))
    for _ in range(2):
        given = gradients(run.steps)
        run.step()
        for p, g in zip(run.parameters, given):
            np.testing.assert_array_equal(p.grad().asnumpy(), g)


@each
def test_accumulated_gradients(name):
    """grad_req='add': four quarters of a batch are the batch."""
    whole, parts = Run(name, decay_of(name)), Run(name, decay_of(name), grad_req='add')
    for _ in range(3):
        whole.step()
        for _ in range(3):
            parts.backward(scale=0.25)
        parts.step(scale=0.25)
        for p in parts.parameters:
            clear_gradient(p)
    assert_same(whole.facts(), parts.facts())


@each
def test_parameters_without_gradient_are_left_alone(name):
    run = Run(name, decay_of(name))
    start = run.weights()
    run.parameters[1].grad_req = 'null'
    run.train(2)
    assert_same({'p1_weight': start['p1_weight']}, {'p1_weight': run.weights()['p1_weight']})
    assert sorted(run.updaters()[0].states) == sorted(run.optimizer.update_counts()) == [0, 2]
    straight, others = Run(name, decay_of(name)).train(2).facts(), run.facts()
    assert_same({key: straight[key] for key in others if 'p1' not in key}, {key: others[key] for key in others if 'p1' not in key})


@each
def test_stale_gradients_are_skipped_or_refused(name):
    run = Run(name, decay_of(name)).step()
    before = run.facts()
    some = [gradients(1)[0], None, gradients(1)[2]]
    with pytest.raises(UserWarning, match='p1_weight'):
        run.step(some)
    assert_same(before, run.facts())
    run.step(some, ignore_stale_grad=True)
    after = run.facts()
    for key in before:
        of_p1 = 'p1_weight' in key or key == 'count of 1'
        assert np.array_equal(before[key], after[key]) == of_p1 or (not of_p1 and before[key].size == 1), key
    # its next update is its own second
    straight = Run(name, decay_of(name)).step()
    straight.step([gradients(2)[i] for i in range(3)])
    run.step([gradients(2)[i] for i in range(3)])
    assert run.optimizer.update_counts() == {0: 3, 1: 2, 2: 3}
    assert_same({'p1': straight.weights()['p1_weight']}, {'p1': run.weights()['p1_weight']})


@each
@pytest.mark.parametrize('options', [{}, HALF], ids=['single', 'half'])
@paths
@pytest.mark.parametrize('bad', [0.0, np.inf, -np.inf, np.nan], ids=str)
def test_gradients_that_are_nothing_or_no_numbers(name, options, bad, path):
    """Zeros leave everything finite. What is not finite shows where the formula says, in that parameter, and nowhere else."""
    clean, run = run_of(name, options), run_of(name, options)
    given = gradients(0)
    given[0] = np.zeros(SHAPES[0]) if bad == 0 else given[0]
    given[0][1, 2] = bad
    clean.step()
    run.step(given)
    touched = run.facts()
    assert_same({key: value for key, value in clean.facts().items() if 'p0' not in key},
                {key: value for key, value in touched.items() if 'p0' not in key})

    rule = rules.get(name)
    h = rule.hyperparameters(learning_rate=RATE, **decay_of(name))
    with np.errstate(all='ignore'):
        expected, _ = rule.run(NUMPY, h, 1, numbers(0, SHAPES[0]).astype('float32'), given[0].astype('float32'))
    np.testing.assert_array_equal(np.isfinite(touched['p0_weight']), np.isfinite(expected))
    if bad == 0:
        assert all(np.isfinite(value).all() for facts in (touched, run.train(3).facts()) for value in facts.values())
    elif np.isnan(bad) and name != 'rprop':  # which looks at signs only, and takes what has none for 0
        assert np.isnan(touched['p0_weight'][1, 2])


class NUMPY:
    """The array namespace of rules on float32 NumPy; a sign of what is no number is 0, as for MXNet."""

    sqrt, exp, abs, minimum, maximum = np.sqrt, np.exp, np.abs, np.minimum, np.maximum

    @staticmethod
    def sum(x):
        return np.float32(np.sum(x, dtype=np.float64))

    @staticmethod
    def sign(x):
        return np.nan_to_num(np.sign(x))

    @staticmethod
    def standard_normal(x):
        return 0 * x + 1  # COLD: of no effect

    @staticmethod
    def where(condition, x, y):
        return np.where(condition, x, y)


@each
def test_a_parameter_that_first_gets_a_gradient_at_step_50(name):
    """Its first update is a first update."""
    run = Run(name, decay_of(name))
    late = gradients(0)[1]
    for t in range(50):
        run.step([*gradients(0)[:1], late if t == 49 else None, gradients(0)[2]], ignore_stale_grad=True)
    assert run.optimizer.update_counts() == {0: 50, 1: 1, 2: 50}
    fresh = Run(name, decay_of(name)).step([gradients(0)[0], late, gradients(0)[2]])
    fresh, run = fresh.facts(), run.facts()
    assert_same({key: fresh[key] for key in fresh if 'p1' in key}, {key: run[key] for key in run if 'p1' in key})


def test_20000_steps():
    """Quadratics, one for each name: finite throughout, nearer to the minimum than at first, every update counted.

    Without samplers: they draw from around the minimum, as far from it as their temperature says (test_sampling.py).
    """
    names = [name for name in NAMES if 'noise' not in rules.get(name).needs]
    weights, targets = nd.array([[2.0, -1.0]] * len(names)), nd.array([[1.0, 0.5]] * len(names))
    distances = weights - targets  # which are the gradients; all rows at once
    start = nd.norm(distances[0]).asscalar()
    problems = [(optimizer_named(name), i, weights[i], distances[i]) for i, name in enumerate(names)]
    problems = [(optimizer, i, w, g, optimizer.create_state(i, w)) for optimizer, i, w, g in problems]
    for _ in range(20000):
        nd.elemwise_sub(weights, targets, out=distances)
        for optimizer, *arguments in problems:
            optimizer.update(*arguments)
    for optimizer, i, w, _, state in problems:
        assert (optimizer.update_counts(), optimizer.num_update) == ({i: 20000}, 20000)
        assert all(np.isfinite(array.asnumpy()).all() for array in [w, *flat(state)]), names[i]
        assert nd.norm(w - targets[i]).asscalar() < 0.5 * start, names[i]


# Trainers, contexts and kvstores

@each
def test_two_trainers_do_not_affect_each_other(name):
    """Of one optimizer with other arguments, and of another optimizer, on parameters of the same names."""
    alone = Run(name, decay_of(name)).train(4).facts()
    run = Run(name, decay_of(name))
    beside = Run(name, {'learning_rate': 0.5, 'rescale_grad': 0.5, 'clip_gradient': 0.25}), Run(NAMES[NAMES.index(name) - 1])
    for _ in range(4):
        beside[0].step()
        run.step()
        beside[1].step()
    assert_same(alone, run.facts())


# kvstore, update_on_kvstore, contexts. Given a name, MXNet makes no kvstore for one context; without one it cannot update there.
KVSTORES = [
    (None, None, (0,)), (None, False, (0,)),
    *[(lambda kind=kind: mx.kv.create(kind), on, (0,)) for kind in ('local', 'device') for on in (True, False, None)],
    *[(lambda kind=kind: kind, on, (0, 1)) for kind in ('local', 'device') for on in (True, False, None)],
]


@each
@pytest.mark.parametrize('options, scheduled', [({}, False), ({}, True), (HALF, True)], ids=['constant', 'scheduled', 'half'])
def test_kvstores_and_contexts_make_no_difference(name, options, scheduled):
    """One context or two, any kvstore, the update there or here: the same numbers (the shares of a gradient add up exactly)."""
    results = []
    for kvstore, on_kvstore, contexts in KVSTORES:
        if drifts(name, contexts, on_kvstore):
            continue
        rate = {'lr_scheduler': mx.lr_scheduler.FactorScheduler(1, 0.5, base_lr=0.25)} if scheduled else {}
        where = dict(contexts=contexts, kvstore=kvstore and kvstore(), update_on_kvstore=on_kvstore)
        run = run_of(name, {**options, **where}, **rate).train(3)
        expected = bool(kvstore) and on_kvstore is not False
        assert bool(run.trainer._kvstore) == bool(kvstore) and bool(run.trainer._update_on_kvstore) == expected
        results.append(dict(run.facts(), rate=run.trainer.learning_rate))
    for result in results[1:]:
        assert_same(results[0], result)
    assert results[0]['rate'] == (0.0625 if scheduled else RATE)  # 0.25 until step 1, halved after each


@each
@pytest.mark.parametrize('options', [{}, HALF, dict(TWO, **HALF, update_on_kvstore=True)], ids=['single', 'half', 'on a kvstore'])
def test_our_own_files_go_on(name, options, tmp_path):
    """`save_states`, and `save_checkpoint` into a trainer with other weights and states."""
    run = run_of(name, options).train(2)
    go.save_states(run.trainer, tmp_path / 'states')
    resumed = run_of(name, options).step(gradients(7))
    for p, weight in zip(resumed.parameters, run.weights().values()):
        p.set_data(array(weight, dtype=p.dtype))
    go.load_states(resumed.trainer, tmp_path / 'states')
    resumed.steps = run.steps
    assert go.states_digest(resumed.trainer) == go.states_digest(run.trainer)
    assert_same(run.train(2).facts(), resumed.train(2).facts())


@pytest.mark.parametrize('name', ['novograd', 'adamw'])
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_a_checkpoint_of_a_net_goes_on(name, dtype, tmp_path):
    """Weights, those that have no gradient too, and states."""
    def make(seed):
        net = small_net(seed, dtype)
        return net, trainer_with(net.collect_params(), name, dict(learning_rate=RATE, multi_precision=True))

    def train(net, trainer, steps):
        for step in steps:
            backward_through(net, step)
            trainer.step(1)
        return {key: p.data().asnumpy() for key, p in structural(net).items()}

    net, trainer = make(1)
    train(net, trainer, range(2))
    go.save_checkpoint(tmp_path / 'x', net=net, trainer=trainer, extra={'epoch': 3})
    other, resumed = make(2)
    train(other, resumed, range(5, 6))
    assert go.load_checkpoint(tmp_path / 'x', net=other, trainer=resumed) == {'epoch': 3}
    assert_same(train(net, trainer, range(2, 4)), train(other, resumed, range(2, 4)))
    assert go.states_digest(trainer, net) == go.states_digest(resumed, other)


@each
@pytest.mark.parametrize('options', [{}, HALF], ids=['single', 'half'])
@pytest.mark.parametrize('saved_on', [(0,), (0, 1)], ids=['of one', 'of two'])
def test_native_states_on_another_device(name, options, saved_on, tmp_path):
    """MXNet's own save_states and load_states: counts and trajectory go on, which MXNet's own optimizers' do not."""
    def make(contexts, on_kvstore=None):
        scheduler = mx.lr_scheduler.FactorScheduler(2, 0.5, base_lr=0.25)
        where = dict(contexts=contexts, kvstore='device', update_on_kvstore=on_kvstore)
        return run_of(name, {**options, **where}, lr_scheduler=scheduler, begin_num_update=1)
    if drifts(name, saved_on, False):
        return
    run = make(saved_on, on_kvstore=False).train(3)
    run.trainer.save_states(str(tmp_path / 'states'))
    saved = run.weights()
    straight = run.train(3)
    for contexts in [(2,), (0,), (1, 3)]:
        other = make(contexts)
        for p in other.parameters:
            p.set_data(array(saved[p.name], dtype=p.dtype))
        other.trainer.load_states(str(tmp_path / 'states'))
        other.steps = 3
        assert_same(straight.facts(), other.train(3).facts())
        assert straight.trainer.learning_rate == other.trainer.learning_rate


# Pickling

def continued(optimizer, weights, given, states, steps=3):
    for _ in range(steps):
        optimizer.update_multi_precision(list(range(len(weights))), weights, given, states)
    return [array.asnumpy() for array in flat([weights, states])], optimizer.update_counts(), optimizer.num_update


def pickle_case(name, steps):
    """An optimizer after some steps, with what it needs to go on."""
    optimizer = optimizer_named(name, rescale_grad=0.5, begin_num_update=5, multi_precision=True,
                                    lr_scheduler=mx.lr_scheduler.FactorScheduler(7, 0.5, base_lr=RATE), **decay_of(name))
    weights = [nd.array(numbers(i, shape), dtype='float16') for i, shape in enumerate(SHAPES)]
    given = [nd.array(g, dtype='float16') for g in gradients(0)]
    states = [optimizer.create_state_multi_precision(i, w) for i, w in enumerate(weights)]
    if steps:
        continued(optimizer, weights, given, states, steps)
    nd.waitall()
    return optimizer, weights, given, states


@each
@pytest.mark.parametrize('steps', [0, 3])
def test_pickled_optimizers_go_on(name, steps):
    optimizer, *arrays = pickle_case(name, steps)
    copy, copied_arrays = pickle.loads(pickle.dumps(optimizer)), pickle.loads(pickle.dumps(arrays))
    assert type(copy) is type(optimizer) and copy.hyperparameters() == optimizer.hyperparameters()
    assert copy.update_counts() == optimizer.update_counts()
    expected, result = continued(optimizer, *arrays), continued(copy, *copied_arrays)
    assert expected[1:] == result[1:]
    for a, b in zip(expected[0], result[0]):
        np.testing.assert_array_equal(a, b)


GO_ON = '''
import os, pickle, sys
import mxnet
with open(sys.argv[1], 'rb') as file:
    cases = pickle.load(file)
assert 'gluon_optim' not in sys.modules
results = {}
for case, pickled in cases.items():
    optimizer, weights, gradients, states = pickle.loads(pickled)
    for _ in range(3):
        optimizer.update_multi_precision(list(range(len(weights))), weights, gradients, states)
    results[case] = pickle.dumps(([w.asnumpy() for w in weights], optimizer.update_counts(), optimizer.num_update))
with open(sys.argv[2], 'wb') as file:
    pickle.dump(results, file)
os._exit(0)
'''

USER_RULE = '''
import gluon_optim as go

@go.register
class Halved(go.Rule):
    """w -= learning_rate (g / 2 + wd w), and a slot that counts."""
    name, summary = 'halved', 'half a gradient'
    hypers = (go.Hyper('learning_rate', 0.01, '[0, inf)'), go.Hyper('wd', 0.0, '[0, inf)'), go.Hyper('part', 0.5, '(0, 1]'))
    slots = staticmethod(lambda h: (go.Slot('sum'), go.Slot('steps', 'scalar')))
    coefficients = staticmethod(lambda xp, h, t: dict(lr=h.learning_rate, wd=h.wd, part=h.part, t=t))
    @staticmethod
    def step(xp, h, c, w, g, s):
        return w - c.lr * (c.part * g + c.wd * w), dict(sum=s.sum + g, steps=0 * s.steps + c.t)
'''


@pytest.fixture
def user_rule(tmp_path, monkeypatch):
    """The name of a rule in a module of the user's."""
    (tmp_path / 'halved_rule.py').write_text(USER_RULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import halved_rule
    yield halved_rule.Halved.name
    del sys.modules['halved_rule']


def test_pickled_optimizers_go_on_in_a_process_that_knows_mxnet_only(user_rule, tmp_path):
    cases = {f'{name} after {steps}': pickle_case(name, steps) for name in [*NAMES, user_rule] for steps in (0, 3)}
    with open(tmp_path / 'cases', 'wb') as file:
        pickle.dump({key: pickle.dumps(case) for key, case in cases.items()}, file)
    path = os.pathsep.join([str(tmp_path), environment()['PYTHONPATH']])
    in_process(GO_ON, tmp_path / 'cases', tmp_path / 'results', PYTHONPATH=path)
    with open(tmp_path / 'results', 'rb') as file:
        results = pickle.load(file)
    for key, case in cases.items():
        arrays, *counts = continued(*case)
        weights, *their_counts = pickle.loads(results[key])
        assert counts == their_counts, key
        for ours, theirs in zip(arrays, weights):
            np.testing.assert_array_equal(ours, theirs, err_msg=key)


def test_a_users_rule_does_what_a_built_in_one_does(user_rule, monkeypatch):
    """Trainer, masters, kvstore, compiled loops and operators."""
    compiled = Run(user_rule, {'wd': 0.125}).train(3).facts()
    w = numbers(0, SHAPES[0])
    for t in range(3):
        w -= RATE * (0.5 * gradients(t)[0] + 0.125 * w)
    np.testing.assert_allclose(compiled['p0_weight'], w, atol=1e-6)
    assert compiled['p0_weight/1'] == 3
    assert_same(compiled, Run(user_rule, {'wd': 0.125}, contexts=(0, 1), kvstore='device').train(3).facts())
    half = Run(user_rule, {'wd': 0.125, 'multi_precision': True}, dtype='float16').train(3).facts()
    np.testing.assert_array_equal(half['p0_weight/0'], compiled['p0_weight'])
    monkeypatch.setattr(executors, '_compiler', lambda: None)
    assert_same(compiled, Run(user_rule, {'wd': 0.125}).train(3).facts())


class Turned(go.Rule):
    """Coefficients in one order at t = 1, in another later, and others from t = 60 on."""

    name, hypers = 'turned', (go.Hyper('learning_rate', 0.5, '[0, inf)'), go.Hyper('wd', 0.0, '[0, inf)'))
    slots = staticmethod(lambda h: ())

    @staticmethod
    def coefficients(xp, h, t):
        c = dict(lr=h.learning_rate, wd=h.wd) if t == 1 else dict(wd=h.wd, lr=h.learning_rate)
        return dict(c, late=0.0) if t >= 60 else c

    @staticmethod
    def step(xp, h, c, w, g, s):
        return w - c.lr * (g + c.wd * w), {}


@pytest.mark.parametrize('compiled', [True, False])
def test_coefficients_are_known_by_name(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(executors, '_compiler', lambda: None)
    go.register(Turned)
    run = Run('turned', {'wd': 0.125})
    w = numbers(0, SHAPES[0])
    for t in range(4):
        run.step()
        w -= RATE * (gradients(t)[0] + 0.125 * w)
    np.testing.assert_allclose(run.weights()['p0_weight'], w, atol=1e-6)
    run.optimizer.set_update_counts({i: 58 for i in range(len(SHAPES))}, 58)
    before = run.step().facts()
    with pytest.raises(ValueError, match="same names for every t: 'lr', 'wd', 'rescale_grad'. Received for t=60: .*'late'"):
        run.step()
    assert_same(before, run.facts())


# Types

@each
def test_half_weights_follow_single_masters(name):
    """The masters are the weights of a float32 run, bit for bit; the weights are those rounded, after every step."""
    single, half = Run(name, decay_of(name)), Run(name, dict(decay_of(name), multi_precision=True), dtype='float16')
    for _ in range(4):
        exact, facts = single.step().facts(), half.step().facts()
        for p in half.parameters:
            master = facts[f'{p.name}/0']
            assert master.dtype == np.float32 and facts[p.name].dtype == np.float16
            np.testing.assert_array_equal(master, exact[p.name])
            np.testing.assert_array_equal(facts[p.name], master.astype(np.float16))
            for k in range(sum(key.startswith(f'{p.name}/') for key in exact)):
                np.testing.assert_array_equal(facts[f'{p.name}/{k + 1}'], exact[f'{p.name}/{k}'])


@each
def test_half_weights_without_masters(name):
    """One warning for all parameters and steps; gradients of zeros leave everything finite."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        run = Run(name, decay_of(name), dtype='float16')
        for _ in range(3):
            run.step([np.zeros(shape) for shape in SHAPES])
        run.train(3)
    ours = [str(w.message) for w in caught if 'multi_precision' in str(w.message)]
    assert len(ours) == 1 and name in ours[0]
    facts = run.facts()
    assert all(np.isfinite(value).all() for value in facts.values())
    assert all(value.dtype == np.float32 for key, value in facts.items() if '/' in key)
    assert all(facts[p.name].dtype == np.float16 for p in run.parameters)


@each
def test_double_weights_are_computed_in_double(name):
    run = Run(name, decay_of(name), dtype='float64').train(3)
    rule = rules.get(name)
    h = rule.hyperparameters(learning_rate=RATE, **decay_of(name))
    expected = numbers(0, SHAPES[0]), None
    for t in range(3):
        expected = rule.run(np, h, t + 1, expected[0], gradients(t)[0], expected[1])
    facts = run.facts()
    assert all(value.dtype == np.float64 for key, value in facts.items() if 'weight' in key)
    np.testing.assert_allclose(facts['p0_weight'], expected[0], rtol=0, atol=1e-13)


@each
def test_weights_and_gradients_of_other_kinds_are_refused(name):
    optimizer = optimizer_named(name)
    bfloat16 = np.dtype([('bfloat16', np.uint16)])
    ones = nd.ones((2, 3))
    state = optimizer.create_state(0, ones)
    for weight, text in [(ones.astype('int32'), 'int32'), (ones.astype('uint8'), 'uint8'), (ones.astype(bfloat16), 'bfloat16'),
                         (ones.tostype('row_sparse'), 'row_sparse')]:
        for refused in (optimizer.create_state, optimizer.create_state_multi_precision):
            with pytest.raises(TypeError, match=f'{name} updates .*Received: .*{text}'):
                refused(0, weight)
        with pytest.raises(TypeError, match=f'{name} updates .*Received: .*{text}'):
            optimizer.update(0, weight, weight, state)
        np.testing.assert_array_equal(weight.astype('float32').asnumpy(), ones.asnumpy())
    for gradient, error, text in [(ones.tostype('row_sparse'), TypeError, f"{name} takes dense gradients.*'row_sparse'"),
                                  (nd.ones((3, 2)), ValueError, 'shape and dtype'),
                                  (ones.astype('float64'), ValueError, 'shape and dtype')]:
        with pytest.raises(error, match=text):
            optimizer.update(0, ones, gradient, state)
    assert optimizer.update_counts() == {} and (ones.asnumpy() == 1).all()


@pytest.mark.skipif(NEWER, reason="see EXCEPTIONS_2: 'an Embedding has sparse gradients'")
def test_a_sparse_gradient_in_a_trainer_is_refused():
    embedding = gluon.nn.Embedding(5, 3, sparse_grad=True)
    embedding.initialize()
    trainer = gluon.Trainer(embedding.collect_params(), 'novograd')
    with mx.autograd.record():
        loss = embedding(nd.array([1, 2])).sum()
    loss.backward()
    before = embedding.weight.data().asnumpy()
    with pytest.raises(TypeError, match='sparse_grad=False'):
        trainer.step(1)
    np.testing.assert_array_equal(embedding.weight.data().asnumpy(), before)


# Lists of parameters

def mixed_arrays(dtypes):
    weights = [nd.array(numbers(i, SHAPES[i % 3]), dtype=dtype) for i, dtype in enumerate(dtypes)]
    return weights, [nd.array(numbers(50 + i, w.shape), dtype=w.dtype) for i, w in enumerate(weights)]


def named(weights, states):
    """The arrays of weights and states, by name."""
    return {f'{i}/{k}': array.asnumpy() for i, w in enumerate(weights) for k, array in enumerate(flat([w, states[i]]))}


@each
def test_an_updater_takes_lists_of_mixed_types(name):
    dtypes = ['float16', 'float32', 'float16', 'float64', 'float32', 'float16']
    results = []
    for together in (True, False):
        optimizer = optimizer_named(name, learning_rate=RATE, multi_precision=True, **decay_of(name))
        updater = mx.optimizer.get_updater(optimizer)
        weights, given = mixed_arrays(dtypes)
        for _ in range(3):
            if together:
                updater(list(range(6)), given, weights)
            else:
                for i in range(6):
                    updater(i, given[i], weights[i])
        assert optimizer.update_counts() == dict.fromkeys(range(6), 3)
        results.append(named(weights, updater.states))
    assert_same(*results)


def test_one_launch_for_all_parameters_of_a_type(monkeypatch):
    pytest.importorskip('numba')
    launched, run = [], executors._Loops.run
    monkeypatch.setattr(executors._Loops, 'run', lambda self, *args: launched.append(len(self.update.weights)) or run(self, *args))
    updater = mx.optimizer.get_updater(optimizer_named('novograd', multi_precision=True))
    weights, given = mixed_arrays(['float16', 'float32', 'float16', 'float64', 'float32', 'float16'])
    updater(list(range(6)), given, weights)
    assert sorted(launched) == ([1] * 6 if NEWER else [1, 2, 3])  # in 2.x those of a Trainer are together


@each
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_lists_that_change_from_step_to_step(name, dtype, monkeypatch):
    """Any subset in any order equals updates one by one, also when not all that was prepared can be kept."""
    monkeypatch.setattr(executors, 'KEEP', 8)
    random = np.random.RandomState(7)
    subsets = [list(range(6))] + [list(random.permutation(6)[:random.randint(1, 7)]) for _ in range(8)] + [[5, 4, 3, 2, 1, 0]]
    results = []
    for together in (True, False):
        optimizer = optimizer_named(name, learning_rate=RATE, multi_precision=True, **decay_of(name))
        updater = mx.optimizer.get_updater(optimizer)
        weights, given = mixed_arrays([dtype] * 6)
        for subset in subsets:
            subset = [int(i) for i in subset]
            if together:
                updater(subset, [given[i] for i in subset], [weights[i] for i in subset])
            else:
                for i in subset:
                    updater(i, given[i], weights[i])
        results.append(named(weights, updater.states))
        counts = {i: sum(i in subset for subset in subsets) for i in range(6)}
        assert optimizer.update_counts() == counts
    assert_same(*results)


@each
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_arrays_that_are_replaced_between_steps_are_picked_up(name, dtype):
    """States by Updater.set_states, weights and gradients by other arrays under the same index."""
    updater = mx.optimizer.get_updater(optimizer_named(name, learning_rate=RATE, multi_precision=True, **decay_of(name)))
    weights, given = mixed_arrays([dtype] * 3)
    indices = list(range(3))
    updater(indices, given, weights)
    nd.waitall()
    saved, saved_weights = updater.get_states(dump_optimizer=False), [w.copy() for w in weights]
    counts = updater.optimizer.update_counts()
    updater(indices, given, weights)
    nd.waitall()
    expected = named(weights, updater.states)

    for arrays in ('the same', 'others'):
        updater.set_states(saved)
        updater.optimizer.set_update_counts(counts, 1)
        if arrays == 'others':
            weights, given = [w.copy() for w in saved_weights], [g.copy() for g in given]
        else:
            for w, old in zip(weights, saved_weights):
                old.copyto(w)
        gc.collect()
        updater(indices, given, weights)
        nd.waitall()
        assert_same(expected, named(weights, updater.states))


@each
def test_states_that_do_not_fit_are_refused(name):
    optimizer = optimizer_named(name, multi_precision=True)
    weight = nd.array(numbers(0, (2, 3)))
    good = optimizer.create_state(0, weight)
    bad = [None, (*good, weight.copy()), tuple(nd.ones((7,)) for _ in good) or (weight.copy(),)]
    bad += [tuple(slot.astype('float64') for slot in good)] if good else []
    for state in bad:
        with pytest.raises(ValueError, match=f'state of parameter number 0 does not belong to {name}'):
            optimizer.update(0, weight, weight.copy(), state)
    half = weight.astype('float16')
    with pytest.raises(ValueError, match='master'):
        optimizer.update_multi_precision(0, half, half.copy(), good)
    assert optimizer.update_counts() == {}
    np.testing.assert_array_equal(weight.asnumpy(), numbers(0, (2, 3)))


# Options

VALUES = {  # where 0.5, 0.25 or 0.75 would show nothing
    'clip_gradient': [1 / 1024], 'eta_plus': [2.0], 'lower_bound': [64.0], 't0': [1.5], 'upper_bound': [1 / 64],
}
BESIDE = {  # what must be set for an option to mean something, or to be seen in a few steps
    ('asgd', 'alpha'): dict(lambd=0.5),
    ('psgld', 'noise'): dict(temperature=1.0),
    ('larc', 'dampening'): dict(momentum=0.5),
    ('larc', 'learning_rate'): dict(trust_coefficient=0.5),
    ('larc', 'min_update'): dict(variant='openseq2seq'),
    ('larc', 'nesterov'): dict(momentum=0.5),
    ('novograd', 'grad_averaging'): dict(variant='apex'),  # beside others, None means False
    ('radam', 'epsilon'): dict(beta2=0.75),        # sooner rectified
    ('rprop', 'step_max'): dict(learning_rate=0.75),
    ('rprop', 'step_min'): dict(learning_rate=0.25),
    ('sgd_torch', 'dampening'): dict(momentum=0.5),
    ('sgd_torch', 'nesterov'): dict(momentum=0.5),
    ('sngd', 'rescale_grad'): dict(epsilon=0.5),
}
CANCELS = {('lans', 'rescale_grad')}  # normalised gradients, as its docstring says


def other_values(name, option):
    hyper = rules.get(name).hyper(option)
    if hyper.is_switch:
        default = BESIDE.get((name, option), {}).get('variant') == 'apex' or hyper.default  # what None stands for
        return [value for value in hyper.domain if value not in (hyper.default, default)]
    domain = Interval.parse(hyper.domain)
    return VALUES.get(hyper.name) or [next(v for v in (0.5, 0.25, 0.75) if v in domain and v != hyper.default)]


@pytest.mark.parametrize('name, option', [(name, h.name) for name in NAMES for h in rules.get(name).hypers + BASE_HYPERS
                                          if h.domain != '[0, 0]'])
def test_every_option_changes_the_result(name, option, monkeypatch):
    """Weights or slots, of a parameter whose first gradient is zero and of others. Gradients become smaller, so that a
    largest value so far is not the last. On operators: the loops are the same numbers, and there are dozens to compile."""
    monkeypatch.setattr(executors, '_compiler', lambda: None)

    def result(arguments):
        run = Run(name, arguments)
        for t in range(8):
            run.step([g * (0.5 ** t if t or i else 0) for i, g in enumerate(gradients(t))])
        return run.facts()

    for value in other_values(name, option):
        beside = BESIDE.get((name, option), {})
        beside = dict(decay_of(value if option == 'base' else name), **beside)
        beside.pop(option, None)
        plain, changed = result(beside), result({**beside, option: value})
        if (name, option) in CANCELS:
            assert_same(plain, changed, tolerance=1e-6)
        else:
            assert differ(plain, changed), value


# Compiled loops and operators

LOWERABLE = [name for name in NAMES if runs_on(rules.get(name), 'kernels')]


def variants(name, half):
    """Arguments of a rule: its defaults and, for float32, every switch off its default."""
    rule = rules.get(name)
    yield {}
    if half:
        return
    for hyper in rule.hypers:
        if hyper.is_switch and hyper.name != 'base':
            for value in other_values(name, hyper.name):
                yield dict(BESIDE.get((name, hyper.name), {}), **{hyper.name: value})


@pytest.mark.parametrize('name', LOWERABLE)
@pytest.mark.parametrize('half', [False, True], ids=['single', 'half'])
def test_compiled_loops_equal_the_operators_bit_for_bit(name, half, monkeypatch):
    """Through the Trainer, with a tensor of several pieces of work, clipping, and rates and counts that differ."""
    shapes = (*SHAPES, (3, 50000))
    compiler = executors._compiler
    for arguments in variants(name, half):
        results = []
        for compiled in (True, False):
            monkeypatch.setattr(executors, '_compiler', compiler if compiled else lambda: None)
            given = dict(decay_of(name), rescale_grad=0.75, multi_precision=half, **arguments)
            if not half:
                given.update(clip_gradient=1.25)
            mx.random.seed(0)  # for a seed, or for the noise itself
            run = Run(name, given, dtype='float16' if half else 'float32', shapes=shapes)
            run.parameters[2].lr_mult = 0.3
            for t in range(4):
                run.trainer.set_learning_rate(0.1 / (t + 1))
                run.step([g if i != 1 or t % 2 else None for i, g in enumerate(gradients(t, shapes))], ignore_stale_grad=True)
            results.append(run.facts())
        assert_same(*results)


WITHOUT_NUMBA = '''
import logging, os, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'numba':
            raise ImportError('No module named numba')
sys.meta_path.insert(0, Blocker())
logging.basicConfig(level=logging.INFO, format='LOG %(levelname)s %(message)s')
import numpy as np
import gluon_optim
from contract_nets import Run
facts = {}
for name in ('novograd', 'adamw', 'novograd'):
    for options in ({}, dict(dtype='float16', arguments={'multi_precision': True})):
        facts.update({f'{name} {options} {key}': value for key, value in Run(name, **options).train(3).facts().items()})
np.savez(sys.argv[1], **facts)
assert 'numba' not in sys.modules
sys.stdout.flush(); sys.stderr.flush()
os._exit(0)
'''


def test_without_numba_it_works_and_says_so_once(tmp_path):
    _, log = in_process(WITHOUT_NUMBA, tmp_path / 'facts.npz')
    assert log.count('pip install numba') == 1 and log.count('LOG WARNING') == 1, log
    result = np.load(tmp_path / 'facts.npz')
    for name in ('novograd', 'adamw'):
        for options in ({}, HALF):
            expected = Run(name, **options).train(3).facts()
            same_order = dict(dtype='float16', arguments={'multi_precision': True}) if options else {}
            assert_same({f'{name} {same_order} {key}': value for key, value in expected.items()},
                        {key: result[key] for key in result.files if key.startswith(f'{name} {same_order} ')})


# Processes and threads: in processes of their own, with several threads whatever this one was told

TRAIN = '''
import os, pickle, sys, threading
import numpy as np
import mxnet as mx
import gluon_optim
from gluon_optim.lowering import numba_runtime as runtime
from contract_nets import Run
SHAPES = ((3, 4), (2, 65536), (1,))
def digest(run):
    return {key: np.asarray(value).tobytes() for key, value in run.facts().items()}
def finish():
    sys.stdout.flush()
    os._exit(0)
'''

FORKED_CHILD = TRAIN + '''
expected = digest(Run('lans', shapes=SHAPES).train(6))
run = Run('lans', shapes=SHAPES).train(3)  # threads are running by now
assert runtime.lane_count(10 ** 6) > 1
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    try:
        with os.fdopen(writing, 'wb') as pipe:
            pickle.dump(digest(run.train(3)), pipe)
    finally:
        os._exit(0)
os.close(writing)
with os.fdopen(reading, 'rb') as pipe:
    received = pickle.loads(pipe.read())
assert os.waitpid(child, 0)[1] == 0
assert received == expected
assert digest(run.train(3)) == expected  # the parent goes on as well
print('equal')
finish()
'''

DATA_LOADER = TRAIN + '''
from mxnet import gluon
def through(workers):
    data = gluon.data.ArrayDataset(np.arange(24, dtype='float32').reshape(12, 2), np.arange(12))
    run = Run('lans', shapes=SHAPES).train(2)
    seen = []
    for epoch in range(2):
        for x, y in gluon.data.DataLoader(data, batch_size=4, num_workers=workers):
            seen.append(x.asnumpy().tobytes())
            run.step()
    return seen, digest(run)
assert runtime.lane_count(10 ** 6) > 1
assert through(2) == through(0)
print('equal')
finish()
'''

TWO_THREADS = TRAIN + '''
names = ['lans', 'adamw']  # of its own kernel each, then both of one
for pair in (names, ['novograd', 'novograd']):
    results = {}
    def work(k):
        results[k] = digest(Run(pair[k], {'learning_rate': 0.1 * (k + 1)}, shapes=SHAPES).train(8))
    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runtime.lane_count(10 ** 6) > 1
    for k in range(2):
        assert results[k] == digest(Run(pair[k], {'learning_rate': 0.1 * (k + 1)}, shapes=SHAPES).train(8)), k
print('equal')
finish()
'''


@pytest.mark.parametrize('layer', ['omp', 'workqueue'])
@pytest.mark.parametrize('code', [FORKED_CHILD, DATA_LOADER, TWO_THREADS], ids=['forked child', 'DataLoader', 'two threads'])
def test_processes_and_threads(code, layer):
    pytest.importorskip('numba')
    out, err = in_process(code, OMP_NUM_THREADS='2', NUMBA_NUM_THREADS='2', NUMBA_THREADING_LAYER=layer)
    assert out.split() == ['equal'], err


COLD_THREADS = TRAIN + '''
results = {}
def work(k):
    results[k] = digest(Run('sgd_torch', shapes=SHAPES).train(2))
threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
assert len(results) == 4 and all(r == results[0] for r in results.values())
print('equal')
finish()
'''


def test_threads_that_compile_the_same_kernel_at_once(tmp_path):
    pytest.importorskip('numba')
    out, err = in_process(COLD_THREADS, OMP_NUM_THREADS='2', NUMBA_NUM_THREADS='2', GLUON_OPTIM_CACHE=str(tmp_path))
    assert out.split() == ['equal'], err
