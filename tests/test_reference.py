"""The rules compute what the papers and the recorded peers say: three comparisons, and a proof that they can fail.

1. `reference` reproduces every recorded trajectory of ``golden/``, weights and slots.
2. The package's rules equal `reference` in float64, to 1e-12 of the distance travelled, in settings where no
   hyper-parameter stands at its default or at 0; run in the recording's precision they equal the recorded peers.
3. A change of any one hyper-parameter, and of any one coefficient of a rule, by 1 % is noticed by comparison 2.
"""
import functools
import hashlib
import os
from collections import namedtuple

import golden_runs
import numpy as np
import pytest
import reference

from gluon_optim import rules
from gluon_optim.rules.base import initial_slot, scalars

# The settings ------------------------------------------------------------------------------------------------------------

STEPS = 14
RATES = 0.45 + 0.3 * np.cos(2.3 * np.arange(STEPS))  # 0.15 to 0.75, another one at each step
SCALES = np.array([0, 1, 0.3, 4, 2, 0.1, 1, 6, 0.5, 0, 3, 1, 2, 0.7])  # of the gradients: zero at first and once in between

_random = np.random.RandomState(20260920)
W0 = {'zero gradient first': 2 * _random.standard_normal((3, 4)), 'one element': np.array([0.4]), 'zero weight': np.zeros(2)}
GRADIENTS = {which: scales.reshape((-1,) + (1,) * W0[which].ndim) * _random.standard_normal((STEPS,) + W0[which].shape)
             for which, scales in zip(W0, (SCALES, np.roll(SCALES, -3), np.roll(SCALES, -1)))}

BASE = {'wd': 0.07, 'rescale_grad': 0.4, 'clip_gradient': 0.9}
ADAM = dict(BASE, beta1=0.8, beta2=0.93, epsilon=0.05)
LARC = dict(BASE, trust_coefficient=0.15, epsilon=0.2)
AROUND_SGD = {'base': 'sgd_torch', 'base_hypers': {'momentum': 0.6, 'dampening': 0.3}}
AROUND_NESTEROV = {'base': 'sgd_torch', 'base_hypers': {'momentum': 0.6, 'nesterov': True}}
AROUND_ADAM = {'base': 'adam_torch', 'base_hypers': {'beta1': 0.8, 'beta2': 0.93, 'epsilon': 0.05, 'amsgrad': True}}
AROUND_NOVOGRAD = {'base': 'novograd', 'base_hypers': {'beta1': 0.8, 'beta2': 0.6, 'epsilon': 0.05, 'variant': 'tfa',
                                                       'grad_averaging': True}}


def each(hypers, **choices):
    """``hypers`` with every combination of ``choices``."""
    settings = [hypers]
    for name, values in choices.items():
        settings = [dict(setting, **{name: value}) for setting in settings for value in values]
    return settings


BOTH = (False, True)
SETTINGS = {
    'novograd': (
        each(dict(ADAM, epsilon_root=0.03), variant=('paper', 'jasper'), grad_averaging=(None, True), amsgrad=BOTH,
             decoupled_wd=BOTH)
        + each(ADAM, variant=('openseq2seq', 'tfa', 'apex'), grad_averaging=(None, False, True))),
    'larc': [dict(setting, **around) for around in (AROUND_SGD, AROUND_NESTEROV, AROUND_ADAM, AROUND_NOVOGRAD)
             for setting in each(dict(LARC, variant='apex'), clip=BOTH)
             + each(dict(LARC, variant='openseq2seq', min_update=0.12), clip=BOTH)],
    'sngd': each(dict(BASE, epsilon=0.3), scale_by_weight_norm=BOTH),
    'lans': [dict(ADAM, clip_gradient=0.3), dict(ADAM, clip_gradient=0.3, lower_bound=1.2, upper_bound=3.0)],
    'sgd_torch': [dict(BASE, momentum=0.0), dict(BASE, momentum=0.6, dampening=0.3), dict(BASE, momentum=0.6, nesterov=True)],
    'sgd_ema': each(dict(BASE, momentum=0.6), nesterov=BOTH, bias_correction=BOTH) + [dict(BASE, momentum=0.0)],
    'noise_adaptive_sgd': [dict(BASE, batch_size=3.0, curvature=0.8, averaging_min=0.15, epsilon=0.02)],
    'adamw': each(ADAM, amsgrad=BOTH, bias_correction=BOTH),
    'adam_torch': each(ADAM, amsgrad=BOTH),
    'adamax_torch': [ADAM],
    'nadam_torch': each(dict(ADAM, momentum_decay=0.3), decoupled_wd=BOTH),
    'radam': each(ADAM, decoupled_wd=BOTH),
    'adabelief': [ADAM],
    'rmsprop_torch': [dict(BASE, rho=0.8, epsilon=0.05, momentum=momentum, **form) for momentum in (0.0, 0.6)
                      for form in each({}, centered=BOTH, bias_correction=BOTH)],
    'adagrad_torch': [dict(BASE, lr_decay=0.2, initial_accumulator=0.4, epsilon=0.05)],
    'adadelta_torch': [dict(BASE, rho=0.7, epsilon=0.05)],
    'asgd': [dict(BASE, lambd=0.05, alpha=0.6, t0=3.0)],
    'rprop': [{'rescale_grad': 0.4, 'clip_gradient': 0.9, 'eta_minus': 0.6, 'eta_plus': 1.3, 'step_min': 0.2, 'step_max': 1.0}],
}

# Numbers that stand at their default or at 0 in some settings (not in all).
AT_DEFAULT = {
    ('novograd', 'epsilon_root'): 'refused outside paper and jasper', ('larc', 'epsilon_root'): 'the base is tfa, which refuses it',
    ('larc', 'min_update'): 'refused outside openseq2seq', ('larc', 'dampening'): 'refused with nesterov',
    ('lans', 'lower_bound'): 'None is unbounded', ('lans', 'upper_bound'): 'None is unbounded',
    ('sgd_torch', 'momentum'): '0 keeps no buffer', ('sgd_torch', 'dampening'): 'refused with nesterov, of no use without momentum',
    ('sgd_ema', 'momentum'): '0 keeps no average', ('rmsprop_torch', 'momentum'): '0 keeps no buffer', ('rprop', 'wd'): 'refused',
}
# Hyper-parameters whose value makes no difference.
WITHOUT_EFFECT = {
    ('lans', 'rescale_grad'): 'the gradient is divided by its norm before it is clipped',
}
# Our slots -> the papers' letters.
MEAN_VAR = {'mean': 'm', 'var': 'v', 'max_var': 'v_max'}
SLOTS = {
    'novograd': {'mean': 'm', 'norm_sq': 'v', 'max_norm_sq': 'v_max', 'norm': 'r'},
    'sngd': {}, 'lans': MEAN_VAR, 'sgd_torch': {'momentum_buffer': 'b'}, 'sgd_ema': {'mean': 'g_tilde'},
    'noise_adaptive_sgd': {'mean': 'g_tilde', 'mean_sq': 's_tilde', 'batch_star': 'B_star', 'eta': 'eta'},
    'adamw': MEAN_VAR, 'adam_torch': MEAN_VAR, 'adamax_torch': {'mean': 'm', 'largest': 'u'},
    'nadam_torch': dict(MEAN_VAR, mu_product='mu_product'), 'radam': MEAN_VAR, 'adabelief': {'mean': 'm', 'var': 's'},
    'rmsprop_torch': {'mean_sq': 'n', 'mean': 'g_bar', 'momentum_buffer': 'b'}, 'adagrad_torch': {'sum_sq': 'G'},
    'adadelta_torch': {'mean_sq': 'E_g2', 'mean_sq_delta': 'E_dx2'}, 'asgd': {'average': 'a', 'eta': 'eta', 'mu': 'mu'},
    'rprop': {'previous': 'g', 'step_size': 'size'},
}
# Coefficients that a rule hands over in settings that have no use for them: (rule, coefficient) -> where.
UNUSED = {
    ('novograd', 'wd'): lambda h: h.get('decoupled_wd'),  # `keep` has it
    ('novograd', 'eps_root'): lambda h: h['variant'] not in ('paper', 'jasper'),
    ('larc', 'wd'): lambda h: h['variant'] == 'apex',  # LARC decays, not the base
    ('larc', 'larc_wd'): lambda h: h['variant'] == 'openseq2seq',
    ('larc', 'larc_min_update'): lambda h: h['variant'] == 'apex',
    ('larc', 'larc_lr'): lambda h: not h['clip'],
    ('larc', 'mu'): lambda h: h['base'] == 'sgd_torch' and not h['base_hypers'].get('nesterov'),
    ('larc', 'eps_root'): lambda h: h['base'] == 'novograd',
    ('lans', 'rescale_grad'): lambda h: True,
    ('lans', 'lower'): lambda h: 'lower_bound' not in h,  # 0
    ('lans', 'upper'): lambda h: 'upper_bound' not in h,  # infinite
    ('sgd_torch', 'mu'): lambda h: not h.get('nesterov'),
    ('sgd_torch', 'mu_buffer'): lambda h: h['momentum'] == 0,
    ('sgd_torch', 'a'): lambda h: h['momentum'] == 0,
    ('sgd_ema', 'lr'): lambda h: h['momentum'] > 0,
    ('sgd_ema', 'lr_mean'): lambda h: h.get('nesterov') or h['momentum'] == 0,
    ('sgd_ema', 'lr_gradient'): lambda h: not h.get('nesterov'),
    ('sgd_ema', 'lr_ahead'): lambda h: not h.get('nesterov'),
    ('sgd_ema', 'mu'): lambda h: h['momentum'] == 0,
    ('sgd_ema', 'a'): lambda h: h['momentum'] == 0,
    ('rmsprop_torch', 'mu'): lambda h: h['momentum'] == 0,
    ('rmsprop_torch', 'weights'): lambda h: not h['bias_correction'],
}

Case = namedtuple('Case', 'name number hypers')
ALL_CASES = [Case(name, number, hypers) for name, settings in SETTINGS.items() for number, hypers in enumerate(settings)]
CASES = [case for case in ALL_CASES if case.name in rules.names()]


def case_id(case):
    return f'{case.name}-{case.number}'


# Running both ---------------------------------------------------------------------------------------------------------------


def our_hypers(name, hypers):
    """The reference's hyper-parameters as our rule takes them: LARC's base takes its own among LARC's."""
    ours = {key: value for key, value in hypers.items() if key != 'base_hypers'}
    for key, value in hypers.get('base_hypers', {}).items():
        ours['base_' + key if key in LARC or key == 'variant' else key] = value
    return ours


def letters(name, hypers):
    return SLOTS[hypers['base'] if name == 'larc' else name]


def run_rule(name, hypers, w0, gradients, rates, change=None):
    """The rule on NumPy in the precision of ``w0``: [(weight, {letter: slot})], as `reference.trajectory` has it.

    ``change`` multiplies the coefficient of that name by 1.01 throughout.
    """
    rule, letter, w, slots, updates = rules.get(name), letters(name, hypers), w0, None, []
    given = rule.hyperparameters(**our_hypers(name, hypers))
    for t, (g, lr) in enumerate(zip(gradients, rates), 1):
        h = given.replace(learning_rate=float(lr))
        if slots is None:
            slots = {slot.name: initial_slot(slot, w0) for slot in rule.slots(h)}
        c = rule.all_coefficients(scalars, h, t)
        if change:
            c[change] = 1.01 * c[change]
        w, slots = rule.apply(np, rule.static(h), c, w, g, slots)
        slots = {key: np.asarray(value, w0.dtype) for key, value in slots.items()}
        assert w.dtype == w0.dtype and w.shape == w0.shape
        updates.append((w, {letter[key]: value for key, value in slots.items()}))
    return updates


@functools.lru_cache(maxsize=None)
def expected(name, number, which):
    return reference.trajectory(name, SETTINGS[name][number], W0[which], GRADIENTS[which], RATES)


def furthest(case, change=None):
    """How far the rule is from the reference, on the tensor where it is furthest."""
    return max(apart(run_rule(case.name, case.hypers, w0, GRADIENTS[which], RATES, change),
                     expected(case.name, case.number, which), w0) for which, w0 in W0.items())


def apart(updates, others, w0):
    """How far two runs are apart at most: weights in units of the distance that ``others`` has travelled so far (the sum of
    its largest changes), slots in units of the largest that they were so far. Infinite where one side is not finite."""
    worst, travelled, w_before, largest = 0.0, 0.0, w0, {}
    for (w, slots), (w_other, slots_other) in zip(updates, others):
        travelled += np.max(np.abs(w_other - w_before))
        worst, w_before = max(worst, ratio(w - w_other, travelled)), w_other
        for letter in set(slots) & set(slots_other):
            largest[letter] = max(largest.get(letter, 0.0), np.max(np.abs(slots_other[letter])))
            worst = max(worst, ratio(slots[letter] - slots_other[letter], largest[letter]))
    return worst


def ratio(difference, unit):
    size = np.max(np.abs(difference))
    if not np.isfinite(size):
        return np.inf
    return size / unit if unit > 0 else 0.0 if size == 0 else np.inf


# 1. The reference is what other people's code computes -------------------------------------------------------------------------

RUNS = golden_runs.all_runs()


def check_recorded(run, updates, param):
    tolerance = 1e-12 if run.weights[param].dtype == np.float64 else 2e-6
    recorded = run.weights[param]
    weights = np.array([w for w, _ in updates])
    assert np.max(np.abs(weights - recorded)) <= tolerance * np.max(np.abs(recorded)), (run.id, param)
    for letter, values in run.slots.items():
        slots = [np.broadcast_to(slots[letter], value.shape) for (_, slots), value in zip(updates, values[param])]
        assert np.max(np.abs(np.array(slots) - values[param])) <= tolerance * np.max(np.abs(values[param])), (run.id, param, letter)


@pytest.mark.parametrize('run', RUNS, ids=lambda run: run.id)
def test_reference_reproduces_the_recorded_run(run):
    for param, w0 in run.w0.items():
        check_recorded(run, reference.trajectory(run.name, run.hypers, w0, run.gradients[param], run.learning_rates), param)


@pytest.mark.parametrize('run', [run for run in RUNS if run.name in rules.names()], ids=lambda run: run.id)
def test_rule_reproduces_the_recorded_run(run):
    """In the precision of the recording, which is what a user of that peer sees when moving over."""
    for param, w0 in run.w0.items():
        dtype = run.weights[param].dtype
        gradients = np.asarray(run.gradients[param], dtype)
        check_recorded(run, run_rule(run.name, run.hypers, np.asarray(w0, dtype), gradients, run.learning_rates), param)


def test_every_optimizer_that_has_a_peer_has_a_recorded_run():
    without = {'sngd', 'sgd_ema', 'noise_adaptive_sgd'}  # described in lectures only
    assert set(reference.OPTIMIZERS) - {run.name for run in RUNS} == without
    variants = {(run.name, run.hypers.get('variant')) for run in RUNS}
    # Apex's FusedNovoGrad runs on GPUs only: no recording
    assert {v for n, v in variants if n == 'novograd'} == {'paper', 'jasper', 'openseq2seq', 'tfa'}
    assert {v for n, v in variants if n == 'larc'} == {'apex', 'openseq2seq'}


def test_the_recorded_files_are_those_of_the_index():
    entries = golden_runs.index()['runs']
    files = {name[:-4] for name in os.listdir(golden_runs.FOLDER) if name.endswith('.npz')}
    assert files == {entry['file'] for entry in entries} | {'inputs'}
    for entry in entries:
        with open(os.path.join(golden_runs.FOLDER, entry['file'] + '.npz'), 'rb') as file:
            assert hashlib.sha256(file.read()).hexdigest() == entry['sha256'], entry['file']


# 2. The rules are the reference ---------------------------------------------------------------------------------------------


def test_every_rule_has_settings():
    assert set(SETTINGS) == set(SLOTS) | {'larc'} == set(reference.OPTIMIZERS)


@pytest.mark.parametrize('name', [name for name in rules.names() if name in SETTINGS])
def test_settings_leave_nothing_at_its_default(name):
    rule, seen = rules.get(name), {}
    for hypers in SETTINGS[name]:
        h = rule.hyperparameters(**our_hypers(name, hypers))
        for hyper in rule.declared(h.asdict()):
            value = getattr(h, hyper.name)
            seen.setdefault(hyper.name, set()).add(value)
            if not hyper.is_switch and hyper.name != 'learning_rate' and (name, hyper.name) not in AT_DEFAULT:
                assert value not in (hyper.default, 0.0), (hypers, hyper.name)
    for hyper in rule.hypers:
        if hyper.is_switch:
            expected = {'sgd_torch', 'adam_torch', 'novograd'} if hyper.name == 'base' else set(hyper.domain)
            assert seen[hyper.name] >= expected, hyper.name
        elif (name, hyper.name) in AT_DEFAULT and hyper.domain != '[0, 0]':
            assert seen[hyper.name] - {hyper.default, 0.0}, hyper.name


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_rule_equals_the_reference(case):
    for which, w0 in W0.items():
        ours = run_rule(case.name, case.hypers, w0, GRADIENTS[which], RATES)
        assert set(ours[-1][1]) <= set(expected(case.name, case.number, which)[-1][1])  # no slot goes uncompared
        assert apart(ours, expected(case.name, case.number, which), w0) <= 1e-12


def test_gradients_are_clipped_in_part():
    scaled = BASE['rescale_grad'] * np.concatenate([g.ravel() for g in GRADIENTS.values()])
    assert 0.1 < np.mean(np.abs(scaled) > BASE['clip_gradient']) < 0.5


# 3. And would not be if anything were different --------------------------------------------------------------------------------


@pytest.mark.parametrize('case', ALL_CASES, ids=case_id)
def test_every_hyper_parameter_is_felt(case):
    unfelt = set()
    for key, hypers, rates in changes(case.hypers):
        if not any(apart(reference.trajectory(case.name, hypers, w0, GRADIENTS[which], rates),
                         expected(case.name, case.number, which), w0) > 1e-6 for which, w0 in W0.items()):
            unfelt.add(key)
    assert unfelt == {hyper for rule, hyper in WITHOUT_EFFECT if rule == case.name and hyper in case.hypers}


def changes(hypers, rates=RATES):
    """(name, hyper-parameters, rates) with one number 1 % larger or one switch turned, LARC's base included."""
    yield 'learning_rate', hypers, 1.01 * rates
    for key, value in hypers.items():
        if isinstance(value, bool):
            yield key, dict(hypers, **{key: not value}), rates
        elif isinstance(value, float) and value != 0:
            yield key, dict(hypers, **{key: 1.01 * value}), rates
        elif isinstance(value, dict):
            for inner, changed, _ in list(changes(value))[1:]:
                yield key + '.' + inner, dict(hypers, **{key: changed}), rates


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_every_coefficient_is_felt(case):
    rule = rules.get(case.name)
    h = rule.hyperparameters(learning_rate=0.1, **our_hypers(case.name, case.hypers))
    coefficients = set(rule.all_coefficients(scalars, h, 1))
    unfelt = {name for name in coefficients if not furthest(case, change=name) > 1e-6}
    assert unfelt == {name for (rule_name, name), where in UNUSED.items()
                      if rule_name == case.name and name in coefficients and where(case.hypers)}


# What no implementation defines is refused -----------------------------------------------------------------------------------

REFUSED = [(name, hypers) for name, hypers in [
    ('novograd', {'variant': 'tfa', 'amsgrad': True}), ('novograd', {'variant': 'tfa', 'decoupled_wd': True}),
    ('novograd', {'variant': 'openseq2seq', 'amsgrad': True}), ('novograd', {'variant': 'openseq2seq', 'decoupled_wd': True}),
    ('novograd', {'variant': 'openseq2seq', 'epsilon_root': 0.1}), ('novograd', {'variant': 'apex', 'amsgrad': True}),
    ('novograd', {'variant': 'apex', 'decoupled_wd': True}), ('novograd', {'variant': 'apex', 'epsilon_root': 0.1}),
    ('novograd', {'variant': 'nvidia'}), ('sgd_torch', {'nesterov': True}),
    ('sgd_torch', {'nesterov': True, 'momentum': 0.9, 'dampening': 0.1}), ('rprop', {'wd': 0.1}),
    ('larc', {'variant': 'apex', 'min_update': 0.1}), ('larc', {'base': 'larc'}), ('larc', {'nesterov': True}),
] if name in rules.names()]


@pytest.mark.parametrize('name, hypers', REFUSED, ids=str)
def test_undefined_combinations_are_refused(name, hypers):
    with pytest.raises(ValueError) as refusal:
        rules.get(name).hyperparameters(**hypers)
    assert any(key in str(refusal.value) for key in hypers)
