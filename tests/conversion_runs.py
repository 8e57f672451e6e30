"""Half-trained runs of every optimizer that has mirrors, made with NumPy, and how they go on: what conversions are held to."""
import math

import numpy as np
import pytest

from gluon_optim import list_optimizers, rules
from gluon_optim.rules.base import initial_slot
from gluon_optim.rules.runtimes import mirrored
from gluon_optim.states.model import OptimizerStates, ParameterInfo

NAMES = [name for name in list_optimizers() if mirrored(rules.get(name))]
STEPS = 20
SHAPES = {'weight': (4, 3), 'bias': (3,), 'one': (1,), 'number': ()}
LIMITS = {'float32': 1e-6, 'float64': 1e-12}

# none is the default of any rule; one set at a time, where a rule's `check` allows it
NUMBERS = dict(wd=0.05, beta1=0.8, beta2=0.97, epsilon=2e-3, eps=2e-3, rho=0.85, lr_decay=0.02, initial_accumulator=0.1, lambd=0.01,
               alpha=0.6, t0=4.0, momentum=0.8, lamda=0.1, lamda1=0.02, beta=0.5, lower_bound=0.5, upper_bound=2.0,
               trust_coefficient=0.5, min_update=0.01, dampening=0.3, momentum_decay=0.01, batch_size=2.0, curvature=0.5,
               averaging_min=0.05, epsilon_root=1e-3, gamma1=0.85, gamma2=0.8, clip_weights=2.0, eta_minus=0.4, eta_plus=1.3,
               step_min=1e-4, step_max=0.5, wd_lh=0.02)


def hyper_sets(name):
    """A large epsilon, momentum and decay; no default value; and every switch turned."""
    rule = rules.get(name)
    declared = {hyper.name: hyper for hyper in rule.hypers}
    usual = dict(epsilon=1e-3, eps=1e-3, wd=0.1, momentum=0.9, trust_coefficient=1.0)
    usual = allowed(rule, {}, {key: value for key, value in usual.items() if key in declared})
    other = allowed(rule, {}, {key: value for key, value in NUMBERS.items() if key in declared})
    switches = {key: hyper.domain[-1] if hyper.domain[-1] != hyper.default else hyper.domain[0]
                for key, hyper in declared.items() if hyper.is_switch and isinstance(hyper.domain, tuple)}
    turned = allowed(rule, usual, switches)
    return {'usual': usual, 'other': dict(other, clip_gradient=0.7), **({'switches': turned} if turned != usual else {})}


def allowed(rule, given, more):
    """``given`` with each of ``more`` that the rule allows beside the others."""
    for key, value in more.items():
        try:
            rule.hyperparameters(**dict(given, **{key: value}))
        except ValueError:
            continue
        given = dict(given, **{key: value})
    return given


CASES = [(name, which) for name in NAMES for which in hyper_sets(name)]


def rate(step):
    return 0.05 * (1 + math.cos(step)) + 0.01


def cases():
    """Every rule with its defaults, and with every value of every switch that its `check` allows."""
    return list(_cases())


def _cases():
    for name in rules.names():
        rule, found = rules.get(name), [{}]
        for hyper in rule.hypers:
            if hyper.is_switch:
                found += [{hyper.name: value} for value in hyper.domain if value not in (None, hyper.default)]
        for extra in found:
            for momentum in ({}, {'momentum': 0.9}):
                if momentum and not any(hyper.name == 'momentum' for hyper in rule.declared(extra)):
                    continue
                try:
                    rule.hyperparameters(**extra, **momentum)
                except ValueError:
                    continue
                yield pytest.param(name, {**extra, **momentum}, id='-'.join([name, *map(str, {**extra, **momentum}.values())]))


def settings(name, extra):
    """All hyper-parameters: epsilon where it shows, decay where the rule has any, clipping on."""
    declared = {hyper.name for hyper in rules.get(name).declared(extra)}
    return dict({'epsilon': 1e-3} if 'epsilon' in declared and name != 'adamax' else {}, clip_gradient=0.7, rescale_grad=0.5,
                **({'trust_coefficient': 1.0} if name == 'larc' else {}),  # steps that are large beside the rounding of weights
                **({} if 'rprop' in (name, extra.get('base')) else {'wd': 0.1}), **extra)


def weights_and_gradients(dtype='float64', steps=STEPS, seed=1, shapes=SHAPES):
    """Weights by name, and for each step gradients by name, of very different sizes."""
    random = np.random.RandomState(seed)
    weights = {name: np.asarray(random.normal(size=shape), dtype) for name, shape in shapes.items()}
    scales = np.geomspace(1e-3, 10, steps)
    random.shuffle(scales)
    gradients = [{name: np.asarray(random.normal(size=shape) * scale, dtype) for name, shape in shapes.items()} for scale in scales]
    return weights, gradients


def run_rule(name, hypers, weights, gradients, begin=0, slots=None):
    """The rule on NumPy arrays: weights and slots by parameter, and how far each weight has travelled."""
    rule, weights, slots = rules.get(name), dict(weights), dict(slots or {})
    travelled = dict.fromkeys(weights, 0.0)
    for t, gradient in enumerate(gradients, begin + 1):
        h = rule.hyperparameters(**dict(hypers, learning_rate=rate(t)))
        for key in weights:
            start = slots.get(key) or {slot.name: initial_slot(slot, weights[key]) for slot in rule.slots(h)}
            new, slots[key] = rule.run(np, h, t, weights[key], gradient[key], start)
            travelled[key] = travelled[key] + np.abs(new - weights[key]).max()
            weights[key] = np.asarray(new, weights[key].dtype)
    return weights, slots, travelled


def gradients_of(dtype, steps, seed):
    """For each step gradients by name, of very different sizes."""
    random = np.random.RandomState(seed)
    scales = np.geomspace(1e-3, 10, steps)
    random.shuffle(scales)
    return [{name: np.asarray(random.normal(size=shape) * scale, dtype) for name, shape in SHAPES.items()} for scale in scales]


def weights_of(dtype):
    random = np.random.RandomState(3)
    return {name: np.asarray(random.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def advance(states, weights, gradients, begin, exact=False):
    """The rule in NumPy from ``states``: new states, weights, and the sum of each parameter's updates.

    float16 ``weights`` follow masters. The rates are those of `rate`, whatever stands in the states. ``exact``: as they are,
    where MXNet rounds them.
    """
    rule, counts = rules.get(states.optimizer), dict(states.counts)
    slots, masters = dict(states.slots), dict(states.master)
    weights, travelled = dict(weights), dict.fromkeys(weights, 0.0)
    for step, gradient in enumerate(gradients, begin + 1):
        for info in states.parameters:
            name, half = info.name, info.dtype == 'float16'
            dtype = 'float32' if half else info.dtype
            h = rule.hyperparameters(**dict(states.hypers, learning_rate=rate(step), rescale_grad=1.0))
            h = h.replace(learning_rate=h.learning_rate * info.lr_mult, wd=h.wd * info.wd_mult)
            old = masters.get(name, weights[name].astype(dtype))
            start = slots.get(name) or {slot.name: initial_slot(slot, old) for slot in rule.slots(h)}
            counts[name] += 1
            one = rule.on_masters() if half else rule
            new, own = one.run(np, h, counts[name], old, gradient[name].astype(dtype), start, exact)
            travelled[name] += float(np.abs(new - old).max())
            new, slots[name] = np.asarray(new, dtype), {slot: np.asarray(array, dtype) for slot, array in own.items()}
            weights[name] = new.astype(info.dtype)
            if half:
                masters[name] = new
    new = OptimizerStates(states.optimizer, states.hypers, states.num_update + len(gradients), states.parameters, counts, slots,
                          masters)
    return new, weights, travelled


def half_trained(name, which, dtype='float32', updates=10):
    """States after ``updates`` updates, and the weights. The multipliers of the bias are not 1."""
    hypers = rules.get(name).hyperparameters(**hyper_sets(name)[which]).asdict()
    infos = [ParameterInfo(key, 'net0_' + key, shape, dtype, *((0.5, 0.0) if key == 'bias' else ()))
             for key, shape in SHAPES.items()]
    fresh = OptimizerStates(name, hypers, 0, infos, dict.fromkeys(SHAPES, 0), {})
    states, weights, _ = advance(fresh, weights_of(dtype), gradients_of(dtype, updates, 1), 0)
    return states, weights


def late(states, count):
    """The same, as if it had seen ``count`` updates more."""
    states.counts = {name: done + count for name, done in states.counts.items()}
    states.num_update += count
    return states


def assert_near(found, states, weights, travelled, roundings=None):
    """``found`` by name are weights, or masters where there are any. Where steps are tiny, a few roundings of the largest weight
    are allowed: runtimes round a product and a sum once, or in another order, and PyTorch 2.13 does not round one float32 root
    in six to the nearest number (it is up to 0.75 of a spacing away; NumPy's and the kernels' roots are exact).

    ftml computes each weight anew as -z/d, from sums of which little is left: in float32 NumPy itself is up to 8e-6 of the sum
    of updates away from float64 there; in float64 ftml is held to 1e-12 like all."""
    roundings = roundings or (40 if states.optimizer == 'ftml' else 4)
    for info in states.parameters:
        expected = states.master.get(info.name, weights[info.name])
        array = np.asarray(found[info.name])
        assert array.shape == expected.shape and array.dtype == expected.dtype
        limit = LIMITS[str(expected.dtype)] * travelled[info.name]
        rounding = roundings * float(np.spacing(np.abs(expected).max()))
        apart = float(np.abs(array - expected).max())
        assert apart <= max(limit, rounding), (info.name, apart / travelled[info.name], rounding / travelled[info.name])
