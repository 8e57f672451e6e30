"""The rules in float64 against torch.optim, against formulas written out here, and what holds for every rule."""
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

from gluon_optim import rules
from gluon_optim.lowering.plan import cut
from gluon_optim.rules.base import initial_slot, scalars
from gluon_optim.rules.catalog import optimizer_info
from gluon_optim.rules.graph import trace
from gluon_optim.schema import Hyper, Slot, Values

STEPS = 20
ARRAY_FUNCTIONS = ('sum', 'sqrt', 'abs', 'sign', 'exp', 'minimum', 'maximum', 'where')
XP = SimpleNamespace(**{name: getattr(np, name) for name in ARRAY_FUNCTIONS})  # nothing else may be used in `step`

NEW = sorted(set(rules.names()) - {'novograd'})


def problem(seed=1, shape=(4, 3), steps=STEPS, dtype=np.float64):
    """A weight and gradients of very different sizes; an element that stays 0 at first, one whose sign alternates."""
    random = np.random.default_rng(seed)
    w = random.normal(size=shape)
    gradients = random.normal(size=(steps,) + shape) * np.exp(random.normal(size=(steps,) + (1,) * len(shape)))
    gradients[:3].reshape(3, -1)[:, 0] = 0
    gradients[::2].reshape(len(gradients[::2]), -1)[:, 1] *= -1
    return w.astype(dtype), gradients.astype(dtype)


def rates(learning_rate, steps=STEPS):
    """A rate that changes at every step."""
    return [learning_rate * (0.5 + 0.5 * math.cos(math.pi * k / steps)) for k in range(steps)]


def train(name, weight, gradients, schedule_of_rates=None, **hypers):
    """Run a rule; return the weights after every step and the final slots. Inputs are read-only: a rule is pure."""
    rule = rules.get(name)
    h = rule.hyperparameters(**hypers)
    slots = {slot.name: initial_slot(slot, weight) for slot in rule.slots(h)}
    weights = []
    for t, g in enumerate(gradients, 1):
        for array in (weight, g, *slots.values()):
            np.asarray(array).flags.writeable = False
        step_h = h if schedule_of_rates is None else h.replace(learning_rate=schedule_of_rates[t - 1])
        weight, slots = rule.run(XP, step_h, t, weight, g, slots)
        weights.append(weight)
    return np.array(weights), slots


# -- PyTorch -----------------------------------------------------------------------------------------------------------

TORCH = [
    # rule, its hyper-parameters, torch's class, torch's arguments
    ('adam_torch', {}, 'Adam', {}),
    ('adam_torch', dict(wd=0.1, beta1=0.8, beta2=0.97, epsilon=1e-3, amsgrad=True), 'Adam',
     dict(weight_decay=0.1, betas=(0.8, 0.97), eps=1e-3, amsgrad=True)),
    ('adam_torch', dict(beta1=0.0, beta2=0.0), 'Adam', dict(betas=(0.0, 0.0))),
    ('adamw', dict(wd=0.1, beta1=0.8, beta2=0.97, epsilon=1e-3, amsgrad=True), 'AdamW',
     dict(weight_decay=0.1, betas=(0.8, 0.97), eps=1e-3, amsgrad=True)),
    ('adamw', {}, 'AdamW', {}),
    ('radam', {}, 'RAdam', {}),
    ('radam', dict(wd=0.1, beta1=0.8, beta2=0.97, epsilon=1e-3), 'RAdam', dict(weight_decay=0.1, betas=(0.8, 0.97), eps=1e-3)),
    ('radam', dict(wd=0.1, decoupled_wd=True), 'RAdam', dict(weight_decay=0.1, decoupled_weight_decay=True)),
    ('radam', dict(beta2=0.5), 'RAdam', dict(betas=(0.9, 0.5))),   # rho_inf = 3: never rectified
    ('radam', dict(beta2=0.0), 'RAdam', dict(betas=(0.9, 0.0))),
    ('nadam_torch', {}, 'NAdam', {}),
    ('nadam_torch', dict(wd=0.1, beta1=0.8, beta2=0.97, epsilon=1e-3, momentum_decay=0.1), 'NAdam',
     dict(weight_decay=0.1, betas=(0.8, 0.97), eps=1e-3, momentum_decay=0.1)),
    ('nadam_torch', dict(wd=0.1, decoupled_wd=True), 'NAdam', dict(weight_decay=0.1, decoupled_weight_decay=True)),
    ('adamax_torch', {}, 'Adamax', {}),
    ('adamax_torch', dict(wd=0.1, beta1=0.8, beta2=0.9, epsilon=1e-2), 'Adamax',
     dict(weight_decay=0.1, betas=(0.8, 0.9), eps=1e-2)),
    ('rmsprop_torch', {}, 'RMSprop', {}),
    ('rmsprop_torch', dict(wd=0.1, rho=0.9, epsilon=1e-3, momentum=0.7), 'RMSprop',
     dict(weight_decay=0.1, alpha=0.9, eps=1e-3, momentum=0.7)),
    ('rmsprop_torch', dict(centered=True, rho=0.9, momentum=0.7), 'RMSprop', dict(centered=True, alpha=0.9, momentum=0.7)),
    ('adagrad_torch', {}, 'Adagrad', {}),
    ('adagrad_torch', dict(wd=0.1, lr_decay=0.1, initial_accumulator=0.3, epsilon=1e-3), 'Adagrad',
     dict(weight_decay=0.1, lr_decay=0.1, initial_accumulator_value=0.3, eps=1e-3)),
    ('adadelta_torch', {}, 'Adadelta', {}),
    ('adadelta_torch', dict(wd=0.1, rho=0.7, epsilon=1e-2), 'Adadelta', dict(weight_decay=0.1, rho=0.7, eps=1e-2)),
    ('asgd', {}, 'ASGD', {}),
    ('asgd', dict(wd=0.1, lambd=0.2, alpha=0.6, t0=7.0), 'ASGD', dict(weight_decay=0.1, lambd=0.2, alpha=0.6, t0=7.0)),
    ('rprop', {}, 'Rprop', {}),
    ('rprop', dict(eta_minus=0.3, eta_plus=1.7, step_min=5e-3, step_max=0.2), 'Rprop',
     dict(etas=(0.3, 1.7), step_sizes=(5e-3, 0.2))),
    ('sgd_torch', dict(wd=0.1), 'SGD', dict(weight_decay=0.1)),
    ('sgd_torch', dict(wd=0.1, momentum=0.9, dampening=0.3), 'SGD', dict(weight_decay=0.1, momentum=0.9, dampening=0.3)),
    ('sgd_torch', dict(wd=0.1, momentum=0.9, nesterov=True), 'SGD', dict(weight_decay=0.1, momentum=0.9, nesterov=True)),
]


@pytest.fixture
def torch():
    """PyTorch, computing its scalar state (mu_product, eta) in float64 too."""
    module = pytest.importorskip('torch')
    before = module.get_default_dtype()
    module.set_default_dtype(module.float64)
    yield module
    module.set_default_dtype(before)


def torch_run(torch, optimizer_of, weight, gradients, schedule_of_rates, change=None):
    """The same with a torch optimizer: weights after every step, and its state. ``change`` may alter each gradient."""
    p = torch.nn.Parameter(torch.tensor(weight))
    optimizer = optimizer_of([p])
    weights = []
    for g, lr in zip(gradients, schedule_of_rates):
        optimizer.param_groups[0]['lr'] = lr
        g = g if change is None else change(p.detach().numpy(), g, lr)
        p.grad = torch.tensor(g)
        optimizer.step()
        weights.append(p.detach().numpy().copy())
    return np.array(weights), {k: torch.as_tensor(v).numpy() for k, v in optimizer.state[p].items() if v is not None}


@pytest.mark.parametrize('learning_rate', [0.05, 1.0])
@pytest.mark.parametrize('name, hypers, cls, arguments', TORCH, ids=[f'{x[0]}-{"-".join(x[1]) or "default"}' for x in TORCH])
def test_equals_torch(torch, name, hypers, cls, arguments, learning_rate):
    w, gradients = problem()
    lrs = rates(learning_rate)
    expected, state = torch_run(torch, lambda p: getattr(torch.optim, cls)(p, lr=lrs[0], **arguments), w, gradients, lrs)
    weights, slots = train(name, w, gradients, lrs, learning_rate=lrs[0], **hypers)
    np.testing.assert_allclose(weights, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())

    rule = rules.get(name)
    declared = {slot.name: slot.torch for slot in rule.slots(rule.hyperparameters(**hypers))}
    assert set(declared.values()) == set(state) - {'step'}
    for ours, theirs in declared.items():
        np.testing.assert_allclose(slots[ours], state[theirs], rtol=1e-12, atol=1e-12 * np.abs(state[theirs]).max(), err_msg=ours)


@pytest.mark.parametrize('momentum, nesterov', [(0.8, False), (0.8, True), (0.0, False)])
def test_sgd_ema_is_torch_sgd_with_another_rate(torch, momentum, nesterov):
    w, gradients = problem()
    lrs = rates(0.5)
    expected, _ = torch_run(torch, lambda p: torch.optim.SGD(p, momentum=momentum, nesterov=nesterov, weight_decay=0.1), w,
                            gradients, [lr * (1 - momentum) for lr in lrs])
    weights, _ = train('sgd_ema', w, gradients, lrs, momentum=momentum, nesterov=nesterov, wd=0.1)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)


def test_rmsprop_bias_correction_is_torch_on_a_corrected_average(torch):
    """Dividing v by 1 - rho^t is a smaller epsilon and a smaller rate, both changing at every step."""
    w, gradients = problem()
    rho, epsilon = 0.9, 1e-3
    p = torch.nn.Parameter(torch.tensor(w))
    optimizer = torch.optim.RMSprop([p], alpha=rho, weight_decay=0.1)
    for t, g in enumerate(gradients, 1):
        root = math.sqrt(1 - rho ** t)
        optimizer.param_groups[0].update(lr=0.05 * root, eps=epsilon * root)
        p.grad = torch.tensor(g)
        optimizer.step()
    weights, _ = train('rmsprop_torch', w, gradients, learning_rate=0.05, rho=rho, epsilon=epsilon, wd=0.1, bias_correction=True)
    np.testing.assert_allclose(weights[-1], p.detach().numpy(), rtol=1e-12)


def test_rmsprop_centered_with_bias_correction():
    w, gradients = problem()
    expected, a, v = w, 0 * w, 0 * w
    for t, g in enumerate(gradients, 1):
        a, v = 0.9 * a + 0.1 * g, 0.9 * v + 0.1 * g ** 2
        expected = expected - 0.05 * g / (np.sqrt(v / (1 - 0.9 ** t) - a ** 2) + 1e-3)
    weights, _ = train('rmsprop_torch', w, gradients, learning_rate=0.05, rho=0.9, epsilon=1e-3, centered=True,
                       bias_correction=True)
    np.testing.assert_allclose(weights[-1], expected, rtol=1e-12)


def test_rmsprop_centered_is_finite_where_rounding_makes_the_variance_negative():
    w = np.ones((3, 1), np.float32)
    gradients = np.full((3000, 3, 1), 0.1, np.float32) * np.float32([[1], [3], [7]])
    weights, _ = train('rmsprop_torch', w, gradients, centered=True, rho=0.9, epsilon=0.1, learning_rate=1e-3)
    assert np.isfinite(weights).all()


@pytest.mark.parametrize('name, slot', [('rprop', 'step_size'), ('asgd', 'eta')])
def test_the_first_update_is_told_by_its_number(name, slot):
    """Not by what a slot holds: a state may come from elsewhere."""
    rule, (w, gradients) = rules.get(name), problem()
    h = rule.hyperparameters()
    slots = {x.name: initial_slot(x, w) for x in rule.slots(h)}
    fresh, _ = rule.run(XP, h, 1, w, gradients[0], slots)
    again, _ = rule.run(XP, h, 1, w, gradients[0], {**slots, slot: slots[slot] + 7})
    later, _ = rule.run(XP, h, 2, w, gradients[0], {**slots, slot: slots[slot] + 7})
    np.testing.assert_array_equal(fresh, again)
    assert not np.allclose(fresh, later)


# -- LARC --------------------------------------------------------------------------------------------------------------

def apex_larc(trust_coefficient, clip, wd, epsilon):
    def change(w, g, lr):
        w_norm, g_norm = np.linalg.norm(w), np.linalg.norm(g)
        if w_norm == 0 or g_norm == 0:
            return g
        ratio = trust_coefficient * w_norm / (g_norm + wd * w_norm + epsilon)
        return (min(ratio / lr, 1) if clip else ratio) * (g + wd * w)
    return change


def openseq2seq_larc(trust_coefficient, clip, min_update, epsilon):
    def change(w, g, lr):
        ratio = trust_coefficient * np.linalg.norm(w) / (np.linalg.norm(g) + epsilon)
        return (min(max(ratio / lr, min_update), 1) if clip else max(ratio, min_update)) * g
    return change


def larc_problem():
    w, gradients = problem()
    gradients[[0, 5]] = 0
    return w, gradients


@pytest.mark.parametrize('clip', [True, False])
@pytest.mark.parametrize('base', [{}, dict(momentum=0.9), dict(momentum=0.9, nesterov=True), dict(momentum=0.8, dampening=0.5)],
                         ids=lambda x: '-'.join(x) or 'plain')
@pytest.mark.parametrize('wd, epsilon', [(0.0, 1e-8), (0.3, 1e-2)])
def test_larc_apex_around_sgd(torch, clip, base, wd, epsilon):
    w, gradients = larc_problem()
    lrs = rates(0.3)
    expected, _ = torch_run(torch, lambda p: torch.optim.SGD(p, lr=0.3, **base), w, gradients, lrs,
                            apex_larc(0.1, clip, wd, epsilon))
    weights, _ = train('larc', w, gradients, lrs, trust_coefficient=0.1, clip=clip, wd=wd, epsilon=epsilon, **base)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)


@pytest.mark.parametrize('clip', [True, False])
@pytest.mark.parametrize('min_update', [0.0, 0.05, 2.0])
def test_larc_openseq2seq_around_sgd(torch, clip, min_update):
    w, gradients = larc_problem()
    lrs = rates(0.3)
    expected, _ = torch_run(torch, lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, weight_decay=0.1), w, gradients, lrs,
                            openseq2seq_larc(0.1, clip, min_update, 1e-3))
    weights, _ = train('larc', w, gradients, lrs, variant='openseq2seq', trust_coefficient=0.1, clip=clip, wd=0.1, momentum=0.9,
                       epsilon=1e-3, min_update=min_update)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)


@pytest.mark.parametrize('base, cls', [('adam_torch', 'Adam'), ('adamw', 'AdamW'), ('rmsprop_torch', 'RMSprop'), ('asgd', 'ASGD')])
def test_larc_around_other_rules_takes_over_their_decay(torch, base, cls):
    w, gradients = larc_problem()
    lrs = rates(0.3)
    expected, _ = torch_run(torch, lambda p: getattr(torch.optim, cls)(p, lr=0.3, weight_decay=0.0), w, gradients, lrs,
                            apex_larc(0.1, False, 0.2, 1e-8))
    weights, _ = train('larc', w, gradients, lrs, base=base, trust_coefficient=0.1, clip=False, wd=0.2)
    np.testing.assert_allclose(weights, expected, rtol=1e-11)


def test_larc_never_exceeds_the_rate_nor_the_trusted_length():
    w, gradients = problem()
    for lr in (1e-3, 0.1, 10.0):
        weights, _ = train('larc', w, gradients, learning_rate=lr, trust_coefficient=0.02)
        before = np.concatenate([w[None], weights[:-1]])
        for old, new, g in zip(before, weights, gradients):
            rate = min(lr, 0.02 * np.linalg.norm(old) / np.linalg.norm(g))   # OpenSeq2Seq's page and the course
            np.testing.assert_allclose(new - old, -rate * g, rtol=1e-6)      # epsilon, and a difference


def test_larc_of_a_weight_of_zeros_passes_the_gradient():
    weights, _ = train('larc', np.zeros(2), np.array([[3.0, 4.0]]), learning_rate=0.5, wd=0.1)
    np.testing.assert_array_equal(weights[0], [-1.5, -2.0])


def test_larc_with_a_rate_of_zero_moves_nothing():
    w, gradients = larc_problem()
    for variant in ('apex', 'openseq2seq'):
        weights, _ = train('larc', w, gradients, learning_rate=0.0, momentum=0.9, wd=0.1, variant=variant)
        np.testing.assert_array_equal(weights[-1], w)
        weights, _ = train('larc', 0 * w, gradients, learning_rate=0.0, variant=variant)
        np.testing.assert_array_equal(weights[-1], 0 * w)


def test_larc_has_the_arguments_of_its_base():
    larc = rules.get('larc')
    names = [x.name for x in larc.declared({'base': 'novograd'})]
    assert names[:2] == ['learning_rate', 'wd']
    assert {'epsilon', 'base_epsilon', 'variant', 'base_variant', 'beta1', 'amsgrad'} <= set(names)
    assert len(names) == len(set(names))
    h = larc.hyperparameters(base='adamw', beta1=0.5, epsilon=1e-3, base_epsilon=1e-5)
    assert (h.wd, h.beta1, h.epsilon, h.base_epsilon) == (0.01, 0.5, 1e-3, 1e-5)
    assert larc.hyperparameters(base='adadelta_torch').learning_rate == 1.0
    assert larc.hypers == larc.declared({})
    with pytest.raises(TypeError, match=r"Unknown argument of larc 'momentum'.*'base_epsilon'"):
        larc.hyperparameters(base='adamw', momentum=0.9)
    with pytest.raises(ValueError, match=r"`base` must be one of .*'adamw'.* Received: base='larc'"):
        larc.hyperparameters(base='larc')
    with pytest.raises(ValueError, match='`nesterov=True` needs momentum'):
        larc.hyperparameters(nesterov=True)
    with pytest.raises(ValueError, match="`min_update` is not defined for variant='apex'"):
        larc.hyperparameters(min_update=0.1)


def test_larc_tells_the_variants_of_novograd_from_its_own():
    w, gradients = problem()
    plain, _ = train('larc', w, gradients, base='novograd', beta2=0.5)
    other, _ = train('larc', w, gradients, base='novograd', beta2=0.5, base_variant='apex')
    assert not np.allclose(plain, other)


def test_larc_around_a_rule_of_the_user(monkeypatch):
    class SignDescent(rules.Rule):
        name = 'sign_descent'
        summary = 'for this test'
        hypers = (Hyper('learning_rate', 0.1, '[0, inf)'), Hyper('wd', 0.0, '[0, 0]'))
        slots = staticmethod(lambda h: ())
        coefficients = staticmethod(lambda xp, h, t: dict(lr=h.learning_rate))
        step = staticmethod(lambda xp, h, c, w, g, s: (w - c.lr * xp.sign(g), {}))

    monkeypatch.setitem(rules.registry.RULES, 'sign_descent', SignDescent)
    weights, _ = train('larc', np.ones(2), np.array([[3.0, -4.0]]), base='sign_descent')
    np.testing.assert_allclose(weights[0], [0.9, 1.1])


@pytest.mark.parametrize('base', ['lans', 'adabelief'])
def test_larc_leaves_clipping_where_its_base_has_it(base):
    """These two rules clip after normalising and after decay."""
    w, gradients = problem()
    h = dict(base=base, trust_coefficient=0.1, clip=False, wd=0.2, learning_rate=0.05)
    free, _ = train('larc', w, gradients, **h)
    clipped, _ = train('larc', w, gradients, clip_gradient=0.01, **h)
    assert not np.allclose(free, clipped)
    slots = train('larc', w, gradients, clip_gradient=0.01, **h)[1]
    assert np.abs(slots['mean']).max() <= 0.01


# -- rules without a peer in PyTorch ---------------------------------------------------------------------------------

def test_sngd():
    w, gradients = problem()
    lrs = rates(0.1)
    for scaled in (False, True):
        expected = w
        for lr, g in zip(lrs, gradients):
            length = np.linalg.norm(expected) if scaled else 1
            expected = expected - lr * (length * g / (np.linalg.norm(g) + 0.3) + 0.2 * expected)
        weights, _ = train('sngd', w, gradients, lrs, scale_by_weight_norm=scaled, epsilon=0.3, wd=0.2)
        np.testing.assert_allclose(weights[-1], expected, rtol=1e-12)


def test_sngd_steps_have_a_fixed_length():
    w, gradients = problem()
    weights, _ = train('sngd', w, gradients, learning_rate=0.1)
    steps = np.diff(np.concatenate([w[None], weights]), axis=0)
    np.testing.assert_allclose([np.linalg.norm(step) for step in steps], 0.1)
    still, _ = train('sngd', w, 0 * gradients, epsilon=0.0)
    np.testing.assert_array_equal(still[-1], w)


def test_sgd_ema_bias_correction():
    """Constant gradients: the corrected average is the gradient from the first step on, Nesterov or not."""
    w, g = problem()[0], np.ones((5, 4, 3))
    for nesterov in (False, True):
        weights, _ = train('sgd_ema', w, g, learning_rate=0.1, momentum=0.7, bias_correction=True, nesterov=nesterov)
        np.testing.assert_allclose(weights, w - 0.1 * np.arange(1, 6)[:, None, None], rtol=1e-12)
    weights, _ = train('sgd_ema', w, g, learning_rate=0.1, momentum=0.7)
    np.testing.assert_allclose(weights[0], w - 0.1 * 0.3)


def test_noise_adaptive_sgd():
    w, gradients = problem()
    lrs = rates(1.0)
    batch, curvature, smallest, epsilon = 8.0, 3.0, 0.05, 1e-2
    expected, a, s, batch_star, etas = w, 0 * w, 0 * w, None, None
    with np.errstate(divide='ignore'):
        for lr, g in zip(lrs, gradients):
            r = np.ones_like(w) if batch_star is None else np.clip(batch / batch_star, smallest, 0.5)
            a, s = (1 - r) * a + r * g, (1 - r) * s + r * g ** 2
            batch_star = 16 * batch * np.maximum(s - a ** 2, 0) / (a ** 2 + epsilon)
            etas = np.minimum(batch / (2 * batch_star * curvature), 1 / (2 * curvature))
            expected = expected - lr * etas * (g + 0.2 * expected)
    weights, slots = train('noise_adaptive_sgd', w, gradients, lrs, batch_size=batch, curvature=curvature, averaging_min=smallest,
                           epsilon=epsilon, wd=0.2)
    np.testing.assert_allclose(weights[-1], expected, rtol=1e-12)
    for name, value in dict(mean=a, mean_sq=s, batch_star=batch_star, eta=etas).items():
        np.testing.assert_allclose(slots[name], value, rtol=1e-11, err_msg=name)


def test_noise_adaptive_sgd_measures_batch_star():
    """Gradients of known mean and spread: B* is 16 sigma^2/g^2, sigma that of one example."""
    random, batch, mean, sigma = np.random.default_rng(3), 4.0, 0.5, 2.0
    gradients = mean + sigma / math.sqrt(batch) * random.normal(size=(4000, 50, 1))
    _, slots = train('noise_adaptive_sgd', np.zeros((50, 1)), gradients, batch_size=batch, averaging_min=1e-3)
    assert np.median(slots['batch_star']) == pytest.approx(16 * sigma ** 2 / mean ** 2, rel=0.3)
    assert np.median(slots['eta']) == pytest.approx(batch / (2 * 16 * sigma ** 2 / mean ** 2), rel=0.3)


def test_noise_adaptive_sgd_cannot_average_with_a_weight_of_one():
    """Why weights stop at 1/2: one gradient has no spread, so B* = 0, which asks for a weight of 1 again."""
    w, gradients = problem()
    weights, slots = train('noise_adaptive_sgd', w, gradients, averaging_min=1.0, curvature=5.0, batch_size=3.0)
    np.testing.assert_allclose(weights[-1], w - 0.1 * gradients.sum(0), rtol=1e-12)
    assert not slots['batch_star'].any()


@pytest.mark.parametrize('clip', [None, 0.5])
def test_adabelief(clip):
    w, gradients = problem()
    lrs = rates(0.05)
    b1, b2, epsilon, wd = 0.8, 0.97, 1e-3, 0.1
    expected, m, v = w, 0 * w, 0 * w
    for t, (lr, g) in enumerate(zip(lrs, gradients), 1):
        u = 0.5 * g + wd * expected
        u = u if clip is None else np.clip(u, -clip, clip)
        m = b1 * m + (1 - b1) * u
        v = b2 * v + (1 - b2) * (u - m) ** 2 + epsilon
        expected = expected - lr * math.sqrt(1 - b2 ** t) / (1 - b1 ** t) * m / (np.sqrt(v) + epsilon)
    weights, slots = train('adabelief', w, gradients, lrs, beta1=b1, beta2=b2, epsilon=epsilon, wd=wd, rescale_grad=0.5,
                           clip_gradient=clip)
    np.testing.assert_allclose(weights[-1], expected, rtol=1e-12)
    np.testing.assert_allclose(slots['var'], v, rtol=1e-12)


@pytest.mark.parametrize('options', [{}, dict(lower_bound=7.0), dict(upper_bound=0.5), dict(clip_gradient=0.2)],
                         ids=lambda x: '-'.join(x) or 'plain')
def test_lans(options):
    w, gradients = problem()
    lrs = rates(0.05)
    b1, b2, epsilon, wd = 0.8, 0.97, 1e-3, 0.1
    low, high, clip = options.get('lower_bound', 0), options.get('upper_bound', np.inf), options.get('clip_gradient', np.inf)
    expected, m, v = w, 0 * w, 0 * w
    for t, (lr, g) in enumerate(zip(lrs, gradients), 1):
        h = np.clip(g / np.linalg.norm(g), -clip, clip)
        m, v = b1 * m + (1 - b1) * h, b2 * v + (1 - b2) * h ** 2
        d = np.sqrt(v / (1 - b2 ** t)) + epsilon
        p, q = m / (1 - b1 ** t) / d + wd * expected, h / d + wd * expected
        r = np.clip(np.linalg.norm(expected), low, high)
        expected = expected - lr * r * (b1 * p / np.linalg.norm(p) + (1 - b1) * q / np.linalg.norm(q))
    weights, slots = train('lans', w, gradients, lrs, beta1=b1, beta2=b2, epsilon=epsilon, wd=wd, rescale_grad=0.25, **options)
    np.testing.assert_allclose(weights[-1], expected, rtol=1e-12)
    np.testing.assert_allclose(slots['mean'], m, rtol=1e-11, atol=1e-15)


def test_lans_of_zeros():
    """MXNet 2.0 turns NaN on a gradient of zeros; a ratio with a zero norm is 1."""
    w, gradients = problem()
    weights, slots = train('lans', w, 0 * gradients, learning_rate=0.1)
    np.testing.assert_array_equal(weights[-1], w)
    assert not slots['mean'].any() and not slots['var'].any()
    weights, _ = train('lans', 0 * w, gradients, learning_rate=0.1)
    assert np.isfinite(weights).all() and weights[0].any()


# -- every rule --------------------------------------------------------------------------------------------------------

def settings(name):
    """Arguments that reach every option of a rule, one dictionary each."""
    rule = rules.get(name)
    yield {}
    for hyper in rule.hypers:
        if hyper.name != 'base':
            yield changed(hyper, name)
    if name == 'larc':
        for base in rules.names():
            if base != 'larc':
                yield dict(base=base)
        yield dict(base='novograd', base_variant='apex')
        yield dict(variant='openseq2seq', base='adam_torch', clip=False)


# what an option needs beside it
CONTEXT = {
    ('sgd_torch', 'dampening'): dict(momentum=0.9),
    ('sgd_torch', 'nesterov'): dict(momentum=0.9),
    ('larc', 'dampening'): dict(momentum=0.9),
    ('larc', 'nesterov'): dict(momentum=0.9),
    ('larc', 'min_update'): dict(variant='openseq2seq', learning_rate=1.0),
    ('larc', 'epsilon'): dict(learning_rate=1.0),
    ('radam', 'decoupled_wd'): dict(wd=0.1),
    ('nadam_torch', 'decoupled_wd'): dict(wd=0.1),
    ('larc', 'trust_coefficient'): dict(learning_rate=1.0),
    ('larc', 'variant'): dict(wd=0.1, learning_rate=1.0),
}
# options that act on a slot only
SHOWN_BY = {('asgd', 't0'): 'average', ('noise_adaptive_sgd', 'batch_size'): 'batch_star'}
# numbers for options where half the default, or 0.1, would not do
NUMBER = {'epsilon': 0.5, 'base_epsilon': 0.5, 't0': 5.0, 'lower_bound': 9.0, 'upper_bound': 0.1, 'min_update': 0.7,
          'step_min': 0.03, 'step_max': 0.011, 'batch_size': 7.0, 'curvature': 7.0, 'eta_plus': 3.0, 'averaging_min': 0.9,
          'beta2': 0.5, 'lambd': 0.2}


def changed(hyper, name):
    """Arguments in which ``hyper`` is not at its default."""
    context = CONTEXT.get((name, hyper.name), {})
    if hyper.domain == '[0, 0]':
        return context
    if hyper.is_switch:
        return dict(context, **{hyper.name: next(x for x in hyper.domain if x != hyper.default)})
    return dict(context, **{hyper.name: NUMBER.get(hyper.name, hyper.default / 2 if hyper.default else 0.1)})


@pytest.mark.parametrize('name', NEW)
def test_every_option_changes_the_result(name):
    w, gradients = problem()
    for hyper in rules.get(name).hypers:
        if hyper.name == 'base' or hyper.domain == '[0, 0]':
            continue
        alone, slots = train(name, w, gradients, **CONTEXT.get((name, hyper.name), {}))
        other, other_slots = train(name, w, gradients, **changed(hyper, name))
        if (name, hyper.name) in SHOWN_BY:
            alone, other = slots[SHOWN_BY[name, hyper.name]], other_slots[SHOWN_BY[name, hyper.name]]
        assert np.abs(alone - other).max() > 1e-9, hyper.name
    clipped, _ = train(name, w, gradients, clip_gradient=0.1)
    free, _ = train(name, w, gradients)
    assert name == 'rprop' or np.abs(free - clipped).max() > 1e-9


@pytest.mark.parametrize('name', rules.names())
def test_zero_gradients_in_float32(name):
    """Zeros at first, throughout, and again after others; for weights of zeros too: all finite."""
    w, gradients = problem(dtype=np.float32)
    gradients[[0, 1, 10, 11]] = 0
    for hypers in settings(name):
        for weight in (w, 0 * w):
            for g in (gradients, 0 * gradients):
                weights, slots = train(name, weight, g, **hypers)
                assert np.isfinite(weights).all(), hypers
                assert all(np.isfinite(slot).all() for slot in slots.values()), hypers


class Traced:
    """A number whose value Python code may not look at, as under `jax.jit`."""

    def __init__(self, value):
        self.value = value

    def __bool__(self):
        raise AssertionError('a rule branched on a traced number')

    __float__ = __int__ = __index__ = __bool__
    __hash__ = object.__hash__


def _bare(x):
    return x.value if isinstance(x, Traced) else x


for _name in ('add', 'radd', 'sub', 'rsub', 'mul', 'rmul', 'truediv', 'rtruediv', 'lt', 'le', 'gt', 'ge', 'eq', 'ne'):
    setattr(Traced, f'__{_name}__', lambda a, b, _name=_name: Traced(getattr(np.float64(a.value), f'__{_name}__')(_bare(b))))
Traced.__neg__ = lambda a: Traced(-a.value)
TRACING = SimpleNamespace(**{name: lambda *a, name=name: Traced(getattr(scalars, name)(*map(_bare, a)))
                             for name in ('sqrt', 'exp', 'expm1', 'log', 'minimum', 'maximum', 'where')})


@pytest.mark.parametrize('name', rules.names())
def test_coefficients_can_be_traced(name):
    """learning_rate, wd and t may be symbols: no Python `if`, no `math` on them, and the same numbers come out."""
    rule = rules.get(name)
    for hypers in settings(name):
        h = rule.hyperparameters(**hypers)
        symbols = h.replace(learning_rate=Traced(h.learning_rate), wd=Traced(h.wd))
        for t in (1, 2, 7, 50, 20000):
            expected = rule.all_coefficients(scalars, h, t)
            traced = rule.all_coefficients(TRACING, symbols, Traced(t))
            assert {k: float(_bare(v)) for k, v in traced.items()} == pytest.approx(expected, rel=1e-15, abs=0), (hypers, t)
            assert all(isinstance(value, (int, float)) for value in expected.values())


@pytest.mark.parametrize('name', rules.names())
def test_steps_are_elementwise_functions_and_sums(name):
    """Every rule, with every option, can be cut into loops; every declared slot is written."""
    rule = rules.get(name)
    for hypers in settings(name):
        for clip in (None, 0.5):
            h = rule.hyperparameters(clip_gradient=clip, **hypers)
            graph = trace(rule, rule.static(h), tuple(rule.all_coefficients(scalars, h, 1)))
            sizes = {slot.name: 'tensor' if slot.like == 'weight' else 'scalar' for slot in rule.slots(h)}
            assert {k: v.size for k, v in graph.outputs.items()} == dict(sizes, weight='tensor'), hypers
            assert cut(graph)


@pytest.mark.parametrize('name', rules.names())
def test_switches_and_slots_alone_decide_the_graph(name):
    """A kernel is compiled once per `static`: numbers may not change what `step` does."""
    rule = rules.get(name)
    seen = {}
    for hypers in settings(name):
        h = rule.hyperparameters(**hypers)
        graph = trace(rule, rule.static(h), tuple(rule.all_coefficients(scalars, h, 1)))
        text = repr([(node.op, [a.index for a in node.args], node.name) for node in graph.nodes])
        static = rule.static(h)._replace(slots=tuple(slot._replace(init=0.0) for slot in rule.slots(h)))
        assert seen.setdefault(static, text) == text, hypers


@pytest.mark.parametrize('name', rules.names())
def test_declarations(name):
    rule = rules.get(name)
    assert rule.name == name and rule.summary and rule.paper and rule.__doc__
    assert [x.name for x in rule.hypers[:2]] == ['learning_rate', 'wd']
    for hyper in rule.hypers:
        assert hyper.doc and hyper.check(hyper.default) == hyper.default, hyper.name
    for hypers in settings(name):
        slots = rule.slots(rule.hyperparameters(**hypers))
        assert len({slot.name for slot in slots}) == len(slots)
        assert all(isinstance(slot, Slot) and slot.doc and slot.torch for slot in slots)


@pytest.mark.parametrize('name, hypers, message', [
    ('rprop', dict(wd=0.1), r'`wd` must be in \[0, 0\]. Received: wd=0.1'),
    ('rprop', dict(step_min=2.0, step_max=1.0), '`step_min` must not be above `step_max`. Received: step_min=2.0, step_max=1.0'),
    ('rprop', dict(eta_plus=0.9), r'`eta_plus` must be in \(1, inf\)'),
    ('lans', dict(lower_bound=2.0, upper_bound=1.0), '`lower_bound` must not be above `upper_bound`. Received: lower_bound=2.0'),
    ('lans', dict(upper_bound=0.0), r'`upper_bound` must be in \(0, inf\) or None'),
    ('sgd_ema', dict(momentum=1.0), r'`momentum` must be in \[0, 1\)'),
    ('noise_adaptive_sgd', dict(batch_size=0), r'`batch_size` must be in \(0, inf\)'),
    ('larc', dict(variant='timm'), "`variant` must be one of 'apex', 'openseq2seq'"),
])
def test_refusals(name, hypers, message):
    with pytest.raises(ValueError, match=message):
        rules.get(name).hyperparameters(**hypers)


def test_values_read_like_attributes():
    with pytest.raises(AttributeError, match="no `beta1` here; available: 'lr'"):
        _ = Values(lr=1).beta1


@pytest.mark.parametrize('name', rules.names(drop_ins=True))
def test_every_rule_says_what_it_computes(name):
    formula = optimizer_info(name).formula
    assert re.search(r'\b[wu] *[-+*]?= ', formula), formula


def test_adamw_without_bias_correction_is_berts():
    """lr (m / (sqrt(v) + epsilon) + wd w), as GluonNLP's BERTAdam has it."""
    rule = rules.get('adamw')
    h = rule.hyperparameters(learning_rate=0.1, wd=0.01, beta1=0.8, beta2=0.9, epsilon=0.05, bias_correction=False)
    w, m, v, slots = np.ones(2), 0, 0, None
    expected = np.ones(2)
    for t, g in enumerate((np.array([1.0, -2.0]), np.array([0.5, 3.0])), 1):
        w, slots = rule.run(np, h, t, w, g, slots)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        expected = expected - 0.1 * (m / (np.sqrt(v) + 0.05) + 0.01 * expected)
        np.testing.assert_allclose(w, expected, rtol=1e-14)
