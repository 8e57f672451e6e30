"""States into optimizer classes of other projects and back, against the real classes.

timm and torch_optimizer are used where they are installed. Apex needs CUDA: its classes are written out below, from its
source (apex/optimizers/fused_novograd.py, fused_lamb.py, csrc/multi_tensor_novograd.cu, multi_tensor_lamb.cu, parallel/LARC.py).
"""
import copy
import importlib
import importlib.util
import io
import math
import os
import re
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from gluon_optim import rules
from gluon_optim.mapping import classes as foreign
from gluon_optim.rules.base import initial_slot
from gluon_optim.states.model import OptimizerStates, ParameterInfo, digest

torch = pytest.importorskip('torch')
from gluon_optim.torch import from_torch, param_groups, to_torch  # noqa: E402

STEPS = 20
BEFORE = 10   # updates before the conversion
SHAPES = {'weight': (4, 3), 'bias': (3,), 'one': (1,)}


# -- classes that are not installed everywhere -------------------------------------------------------------------------

def class_of(form):
    """The class whose state ``form`` writes, as ``make(params, **arguments)``; the test is skipped without it."""
    if form.target == 'apex':
        return APEX[form.path]
    package, name = form.path.rsplit('.', 1)
    return getattr(optimizers_of_timm() if package == 'timm.optim' else pytest.importorskip(package), name)


def optimizers_of_timm():
    """timm imports all its models, and torchvision with them: where that is missing, its optimizers alone are imported."""
    try:
        return importlib.import_module('timm.optim')
    except ModuleNotFoundError as error:
        if error.name == 'timm':
            pytest.skip('timm is not installed')
    folder = os.path.dirname(importlib.util.find_spec('timm').origin)
    for name, path in (('timm', folder), ('timm.optim', os.path.join(folder, 'optim'))):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [path]
    package = sys.modules['timm.optim']
    for name in ('Lamb', 'Lars', 'NvNovoGrad', 'RMSpropTF'):
        file = {'RMSpropTF': 'rmsprop_tf'}.get(name, name.lower())
        setattr(package, name, getattr(importlib.import_module(f'timm.optim.{file}'), name))
    return package


class FusedNovoGrad(torch.optim.Optimizer):
    """Its state and its arithmetic, for float32 parameters that all have gradients."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                 reg_inside_moment=False, grad_averaging=True, norm_type=2, init_zero=False):
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay,
                                      grad_averaging=grad_averaging, norm_type=norm_type, init_zero=init_zero))
        self.inside = reg_inside_moment

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            assert group['norm_type'] == 2 and not self.inside
            (beta1, beta2), group['step'] = group['betas'], group.get('step', 0) + 1
            present = [torch.sum(p.grad ** 2).sqrt() for p in group['params']]
            if 'exp_avg_sq' not in group:
                group['exp_avg_sq'] = [torch.zeros(0), torch.zeros(len(present)) if group['init_zero'] else torch.stack(present)]
            assert group['exp_avg_sq'][0].numel() == 0 and group['exp_avg_sq'][1].numel() == len(present)
            norms = group['exp_avg_sq'][1]
            norms.copy_((beta2 * norms ** 2 + (1 - beta2) * torch.stack(present) ** 2).sqrt())
            c1, c2 = (1 - beta1 ** group['step'], math.sqrt(1 - beta2 ** group['step'])) if group['bias_correction'] else (1, 1)
            for p, norm in zip(group['params'], norms):
                state = self.state[p]
                if not state:
                    state['exp_avg'] = torch.zeros_like(p)
                m = state['exp_avg']
                m.copy_(beta1 * m + (1 - beta1 if group['grad_averaging'] else 1) * p.grad)
                p.sub_(group['lr'] * (m / c1 / (norm / c2 + group['eps']) + group['weight_decay'] * p))


class FusedLAMB(torch.optim.Optimizer):
    """Its state and its arithmetic with adam_w_mode."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
                 grad_averaging=True, max_grad_norm=1.0, use_nvlamb=False):
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay,
                                      grad_averaging=grad_averaging, max_grad_norm=max_grad_norm))
        self.use_nvlamb = use_nvlamb

    @torch.no_grad()
    def step(self):
        total = torch.stack([p.grad.norm() for group in self.param_groups for p in group['params']]).norm()
        largest = self.defaults['max_grad_norm']
        scale = total / largest if total > largest else 1.0
        for group in self.param_groups:
            (beta1, beta2), group['step'] = group['betas'], group.get('step', 0) + 1
            c1, c2 = (1 - beta1 ** group['step'], 1 - beta2 ** group['step']) if group['bias_correction'] else (1, 1)
            for p in group['params']:
                state, g = self.state[p], p.grad / scale
                if not state:
                    state['exp_avg'], state['exp_avg_sq'] = torch.zeros_like(p), torch.zeros_like(p)
                m, v = state['exp_avg'], state['exp_avg_sq']
                m.copy_(beta1 * m + (1 - beta1 if group['grad_averaging'] else 1) * g)
                v.copy_(beta2 * v + (1 - beta2) * g * g)
                u = m / c1 / ((v / c2).sqrt() + group['eps']) + group['weight_decay'] * p
                ratio = p.norm() / u.norm() if (self.use_nvlamb or group['weight_decay']) and p.norm() and u.norm() else 1.0
                p.sub_(group['lr'] * ratio * u)


class LARC:
    """Around torch.optim.SGD, whose state it has."""

    def __init__(self, params, trust_coefficient=0.02, clip=True, eps=1e-8, **arguments):
        self.optim, self.trust, self.clip, self.eps = torch.optim.SGD(params, **arguments), trust_coefficient, clip, eps
        self.param_groups, self.state_dict, self.load_state_dict = None, self.optim.state_dict, self._load

    def _load(self, state_dict):
        self.optim.load_state_dict(state_dict)
        self.param_groups = self.optim.param_groups

    @torch.no_grad()
    def step(self):
        decays = [group['weight_decay'] for group in self.optim.param_groups]
        for group, decay in zip(self.optim.param_groups, decays):
            group['weight_decay'] = 0
            for p in group['params']:
                size, length = p.norm(), p.grad.norm()
                if size and length:
                    rate = self.trust * size / (length + size * decay + self.eps)
                    rate = min(rate / group['lr'], 1) if self.clip else rate
                    p.grad = rate * (p.grad + decay * p)
        self.optim.step()
        for group, decay in zip(self.optim.param_groups, decays):
            group['weight_decay'] = decay


APEX = {'apex.optimizers.FusedNovoGrad': FusedNovoGrad, 'apex.optimizers.FusedLAMB': FusedLAMB, 'apex.parallel.LARC': LARC}


# -- runs --------------------------------------------------------------------------------------------------------------

MULTIPLIERS = {'weight': (1.0, 1.0), 'bias': (2.0, 0.5), 'one': (1.0, 1.0)}  # of rate and decay: two param groups


def rate(step):
    return 0.25 * (1 + math.cos(step)) + 0.05


def constant(step):
    return 0.25


def settings(name, extra):
    """All hyper-parameters of a run: epsilon where it shows, decay, and a rate that is a power of two."""
    declared = {hyper.name for hyper in rules.get(name).declared(extra)}
    shows = dict(epsilon=1e-3, eps=1e-3, wd=0.125, momentum=0.5, trust_coefficient=1.0, learning_rate=0.25)
    without = [('rprop', 'wd'), ('adamax', 'epsilon')]  # which only MXNet 2.x has
    return {**{key: value for key, value in shows.items() if key in declared and (name, key) not in without}, **extra}


def start(dtype, steps, seed=1):
    """Weights by name, and gradients by name for each step: of very different sizes across elements, and across steps."""
    random = np.random.RandomState(seed)
    weights = {name: random.normal(scale=0.1, size=shape).astype(dtype) for name, shape in SHAPES.items()}
    sizes = {name: random.permutation(np.geomspace(1, 1e-3, math.prod(shape))).reshape(shape) for name, shape in SHAPES.items()}
    return weights, [{name: (random.normal(size=shape) * sizes[name] * 10 ** random.uniform(-2, 0)).astype(dtype)
                      for name, shape in SHAPES.items()} for _ in range(steps)]


def infos_for(dtype):
    return [ParameterInfo(name, 'net0_' + name, shape, dtype, *MULTIPLIERS[name]) for name, shape in SHAPES.items()]


def run_rule(name, hypers, weights, gradients, rates, begin=0, slots=None):
    """The rule itself in float64: weights and slots after each step."""
    rule = rules.get(name)
    weights = {key: np.asarray(w, 'float64') for key, w in weights.items()}
    slots = {key: {word: np.asarray(value, 'float64') for word, value in own.items()} for key, own in (slots or {}).items()}
    for t, gradient in enumerate(gradients, begin + 1):
        for key, (lr_mult, wd_mult) in MULTIPLIERS.items():
            h = rule.hyperparameters(**hypers)
            h = h.replace(m_schedule=0.0) if name == 'nadam' else h
            h = h.replace(learning_rate=rates(t) * lr_mult, wd=h.wd * wd_mult)
            own = slots.get(key) or {slot.name: initial_slot(slot, weights[key]) for slot in rule.slots(h)}
            weights[key], slots[key] = rule.run(np, h, t, weights[key], np.asarray(gradient[key], 'float64'), own, exact=True)
        yield dict(weights), dict(slots)


def states_of(name, hypers, dtype='float32', rates=rate, steps=BEFORE):
    """States as a run of ``steps`` updates leaves them, and its weights."""
    weights, gradients = start(dtype, steps)
    *_, (weights, slots) = run_rule(name, hypers, weights, gradients, rates)
    slots = {key: {word: np.asarray(value, dtype) for word, value in own.items()} for key, own in slots.items()}
    weights = {key: w.astype(dtype) for key, w in weights.items()}
    states = OptimizerStates(name, rules.get(name).hyperparameters(**hypers).asdict(), steps, infos_for(dtype),
                             dict.fromkeys(weights, steps), slots)
    if name == 'nadam':
        states.variables['m_schedule'] = np.array(0.0)
    return states, weights


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def loaded(form, state_dict, weights, h):
    """Parameters, and a real optimizer of theirs that has loaded ``state_dict``."""
    params = {key: torch.nn.Parameter(torch.tensor(w)) for key, w in weights.items()}
    optimizer = class_of(form)(param_groups(state_dict, params.values()), lr=1.0, **form.made_with(h))
    optimizer.load_state_dict(copy.deepcopy(state_dict))
    return params, optimizer


def run_class(form, h, params, optimizer, gradients, rates, begin=BEFORE):
    """Its weights after each step; rates are set as its `Foreign` says."""
    names = {p: key for key, p in params.items()}
    for t, gradient in enumerate(gradients, begin + 1):
        for key, p in params.items():
            p.grad = torch.tensor(gradient[key])
        for group in optimizer.param_groups:
            lr_mult, _ = MULTIPLIERS[names[group['params'][0]]]
            group['lr'] = form.group(h.replace(learning_rate=rates(t) * lr_mult))['lr']
        optimizer.step()
        yield {key: p.detach().numpy().copy() for key, p in params.items()}


def far(weights, mine, theirs):
    """The largest difference of two runs from ``weights`` on, as part of the largest sum of updates of the parameter."""
    path, worst = [weights, *mine], 0.0
    for key in mine[0]:
        sums = sum(np.abs(now[key] - before[key]) for before, now in zip(path, path[1:]))
        worst = max(worst, np.abs(np.asarray(mine[-1][key], 'float64') - theirs[-1][key]).max() / sums.max())
    return worst


CASES = {
    ('adadelta_torch', 'torch'): [{}],
    ('adagrad_torch', 'torch'): [{}, dict(lr_decay=0.01, initial_accumulator=0.25)],
    ('adam_torch', 'torch'): [{}, dict(amsgrad=True)],
    ('adamax_torch', 'torch'): [{}],
    ('adamw', 'torch'): [{}, dict(amsgrad=True, beta2=0.9)],
    ('asgd', 'torch'): [{}, dict(lambd=0.01, t0=5.0)],
    ('nadam_torch', 'torch'): [{}, dict(decoupled_wd=True, momentum_decay=0.1)],
    ('radam', 'torch'): [{}, dict(decoupled_wd=True, beta2=0.9)],
    ('rmsprop_torch', 'torch'): [{}, dict(momentum=0.0), dict(centered=True)],
    ('rprop', 'torch'): [dict(eta_minus=0.75, step_max=0.5), dict(eta_minus=0.75, eta_plus=1.5, step_min=0.125)],
    ('sgd_torch', 'torch'): [{}, dict(momentum=0.0), dict(dampening=0.5), dict(nesterov=True)],
    ('sgd_ema', 'torch'): [{}, dict(momentum=0.0), dict(momentum=0.9), dict(nesterov=True)],
    ('sgd', 'torch'): [{}, dict(momentum=0.0)],
    ('nadam', 'torch'): [{}, dict(schedule_decay=0.1)],
    ('nag', 'torch'): [dict(wd=0.0), dict(momentum=0.0)],
    ('adam', 'torch'): [dict(epsilon=0.0), dict(beta2=0.025, epsilon=0.125)],
    ('adamax', 'torch'): [{}],
    ('rmsprop', 'torch'): [dict(epsilon=0.0), dict(epsilon=0.0, centered=True, gamma2=0.5)],
    ('rmsprop', 'timm'): [{}, dict(centered=True, gamma2=0.5), dict(centered=True, gamma2=0.0)],
    ('adagrad', 'torch'): [dict(eps=0.0, wd=0.0)],
    ('adadelta', 'torch'): [dict(wd=0.0)],
    ('novograd', 'timm'): [{}, dict(variant='jasper', amsgrad=True), dict(decoupled_wd=True), dict(grad_averaging=True)],
    ('novograd', 'torch_optimizer'): [{}, dict(variant='jasper', amsgrad=True), dict(grad_averaging=True)],
    ('novograd', 'apex'): [dict(variant='apex'), dict(variant='apex', grad_averaging=False)],
    ('lamb', 'timm'): [{}, dict(bias_correction=False), dict(wd=0.0)],
    ('lamb', 'torch_optimizer'): [dict(bias_correction=False), dict(bias_correction=False, upper_bound=1.5, wd=0.0)],
    ('lamb', 'apex'): [{}, dict(bias_correction=False), dict(wd=0.0)],
    ('larc', 'timm'): [{}, dict(clip=False, nesterov=True), dict(wd=0.0, dampening=0.5)],
    ('larc', 'torch_optimizer'): [dict(clip=False), dict(clip=False, nesterov=True)],
    ('larc', 'apex'): [{}, dict(clip=False, momentum=0.0), dict(wd=0.0, dampening=0.5)],
}
FORMS = {(form.rule, form.target): form for form in foreign.FOREIGN}
ALL = [pytest.param(FORMS[key], extra, id='-'.join([*key, *(f'{name}={value}' for name, value in extra.items())]))
       for key, extras in CASES.items() for extra in extras]


def test_every_class_is_run():
    assert set(CASES) == set(FORMS) and len(FORMS) == len(foreign.FOREIGN)
    # PyTorch 2.2 makes the state of Adagrad in its constructor only, and cannot step without
    assert all(form.eager for form in foreign.FOREIGN if form.path == 'torch.optim.Adagrad')
    assert set(foreign.REASONS) <= set(rules.names(drop_ins=True, samplers=True)) - {form.rule for form in foreign.FOREIGN}


@pytest.fixture
def default_dtype(request):
    """PyTorch's ASGD rounds its scalars to the default type; torch_optimizer's and timm's make theirs of it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, request.getfixturevalue('dtype')))
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize('form, extra', ALL)
@pytest.mark.parametrize('dtype, tolerance', [('float64', 1e-12), ('float32', 1e-6)])
def test_goes_on_elsewhere_and_comes_back(form, extra, dtype, tolerance, default_dtype):
    if dtype == 'float64' and form.path in ('apex.optimizers.FusedNovoGrad', 'apex.optimizers.FusedLAMB'):
        pytest.skip('float32 and float16 only')
    cls, name = class_of(form), form.rule
    hypers = settings(name, extra)
    h = rules.get(name).hyperparameters(**hypers)
    label = form.label(h, BEFORE)
    rates = constant if label == foreign.CONSTANT_RATE else rate
    states, weights = states_of(name, hypers, dtype, rates)

    state_dict = through_a_file(to_torch(states, form.target))
    keys = set(cls([torch.nn.Parameter(torch.zeros(1))], lr=1.0, **form.made_with(h)).state_dict()['param_groups'][0])
    assert all(set(group) - ({'step', 'exp_avg_sq'} if form.pack else set()) == keys for group in state_dict['param_groups'])
    assert all(group[key] == value for group in state_dict['param_groups'] for key, value in form.fixed.items() if key in keys)
    assert f'{form.path}: {label}; 3 parameters' in '\n'.join(states.report)

    params, optimizer = loaded(form, state_dict, weights, h)
    order = [states.parameters[position] for group in state_dict['param_groups'] for position in group['params']]
    back = from_torch(optimizer.state_dict(), name, form.target, params=order, num_update=BEFORE)  # PyTorch renumbers by groups
    assert digest(back) == digest(states) and back.parameters == order
    outside = {name for argument in form.build.values() for name in getattr(argument, 'ours', ())}
    unknown = outside | {'learning_rate'} - set(form.held) | {need.hyper for need in form.needs}
    for key in set(h.asdict()) - unknown:
        assert back.hypers[key] == states.hypers[key] or (key == 'grad_averaging' and states.hypers[key] is None)

    _, gradients = start(dtype, 2 * STEPS, seed=2)
    expected = [w for w, _ in run_rule(name, hypers, weights, gradients[:STEPS], rates, BEFORE, states.slots)]
    reached = list(run_class(form, h, params, optimizer, gradients[:STEPS], rates))
    distance = far(weights, expected, reached)

    back = from_torch(optimizer.state_dict(), name, form.target, params=order, num_update=BEFORE + STEPS)
    assert set(back.counts.values()) == {BEFORE + STEPS}
    hypers = {key: hypers.get(key, value) if key in outside else value for key, value in back.hypers.items()}
    expected = [w for w, _ in run_rule(name, hypers, reached[-1], gradients[STEPS:], rates, BEFORE + STEPS, back.slots)]
    again = list(run_class(form, h, params, optimizer, gradients[STEPS:], rates, BEFORE + STEPS))
    distance_back = far(reached[-1], expected, again)
    assert max(distance, distance_back) <= tolerance


# -- what is not quite the same ----------------------------------------------------------------------------------------

APPROXIMATE = [('adam', {}), ('rmsprop', {}), ('rmsprop', dict(centered=True, gamma2=0.0)), ('adagrad', dict(wd=0.0))]


@pytest.mark.parametrize('name, extra', APPROXIMATE)
def test_the_report_says_by_how_much(name, extra):
    form, hypers = FORMS[name, 'torch'], settings(name, extra)
    h = rules.get(name).hyperparameters(**hypers)
    before, weights = states_of(name, hypers, 'float64', steps=BEFORE - 1)
    with pytest.raises(ValueError, match='approximate.*allow_lossy=True'):
        to_torch(before, 'torch')
    assert before.report == []
    params, optimizer = loaded(form, to_torch(before, 'torch', allow_lossy=True), weights, h)
    gradients = start('float64', BEFORE)[1][BEFORE - 1:]
    (expected, slots), = run_rule(name, hypers, weights, gradients, rate, BEFORE - 1, before.slots)
    reached, = run_class(form, h, params, optimizer, gradients, rate, BEFORE - 1)
    relative = np.concatenate([np.abs((reached[key] - w) / (expected[key] - w) - 1).ravel() for key, w in weights.items()])
    assert far(weights, [expected], [reached]) > 1e-4  # a wrong epsilon is seen

    states, _ = states_of(name, hypers, 'float64')
    states.slots = slots
    to_torch(states, 'torch', allow_lossy=True)
    worst, mean = map(float, re.search('up to (.*) of their length, (.*) on average, at update 10', states.report[0]).groups())
    assert worst == pytest.approx(relative.max(), rel=0.05) and mean == pytest.approx(relative.mean(), rel=0.05)
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match='approximate.*allow_lossy=True'):
        from_torch(saved, name, 'torch')
    assert 'approximate' in '\n'.join(from_torch(saved, name, 'torch', allow_lossy=True).report)


def test_epsilon_inside_a_root_never_makes_longer_steps():
    h = rules.get('rmsprop').hyperparameters(epsilon=1e-8)
    ours, theirs = foreign.rmsprop_denominators(h, 1, {'n': np.geomspace(1e-20, 1, 10001)})
    assert theirs.min() >= 1e-4 and (ours <= theirs).all() and 0.70 < (ours / theirs).min() < 0.71
    for epsilon in (1e-3, 1e-7, 1e-8, 3e-5):
        key = foreign.root('epsilon')
        assert key.back({'eps': key.there(h.replace(epsilon=epsilon))}) == {'epsilon': epsilon}


@pytest.mark.parametrize('name, extra', [('sgd', {}), ('nag', dict(wd=0.0)), ('rmsprop', dict(epsilon=0.0, centered=True))])
def test_a_rate_that_is_no_power_of_two_costs_the_last_digit(name, extra):
    form, hypers = FORMS[name, 'torch'], dict(settings(name, extra), learning_rate=0.1)
    states, weights = states_of(name, hypers, rates=lambda t: 0.1)
    state_dict = to_torch(states, 'torch')
    assert 'torch.optim' in states.report[0] and 'equal at constant learning rate' in states.report[0]
    back = from_torch(state_dict, name, 'torch', params=states.parameters, num_update=BEFORE)
    slot = next(iter(form.divisors))
    for key, own in states.slots.items():
        np.testing.assert_array_max_ulp(back.slots[key][slot], own[slot], 1)
    # and another rate makes another step
    h = rules.get(name).hyperparameters(**hypers)
    params, optimizer = loaded(form, to_torch(states, 'torch'), weights, h)
    gradients = start('float32', 1, seed=2)[1]
    expected = [w for w, _ in run_rule(name, hypers, weights, gradients, lambda t: 0.3, BEFORE, states.slots)]
    assert far(weights, expected, list(run_class(form, h, params, optimizer, gradients, lambda t: 0.3))) > 0.01


def test_the_rate_of_the_last_update_must_be_known():
    states, _ = states_of('sgd', settings('sgd', {}))
    states.scheduler = {'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': {}}
    with pytest.raises(ValueError, match="would lose the momentum.*FactorScheduler.*states.hypers\\['learning_rate'\\]"):
        to_torch(states, 'torch')
    assert to_torch(states, 'torch', allow_lossy=True)
    states.scheduler = None
    for rate_given, words in ((0.0, "'weight' must not be 0"), (None, '`learning_rate` of the last update must be known')):
        states.hypers.pop('learning_rate') if rate_given is None else states.hypers.update(learning_rate=rate_given)
        with pytest.raises(ValueError, match=words):
            to_torch(states, 'torch')
    states, _ = states_of('sgd', settings('sgd', dict(momentum=0.0)))
    states.scheduler = {'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': {}}
    to_torch(states, 'torch')
    assert 'torch.optim.SGD: exact' in states.report[0]


@pytest.mark.parametrize('name, extra, decay', [('adagrad', dict(eps=0.0), lambda lr: 1 - lr * 0.125),
                                                ('adadelta', {}, lambda lr: 1 - 0.125)])
def test_decay_that_a_class_lacks_can_be_done_by_hand(name, extra, decay):
    form, hypers = FORMS[name, 'torch'], settings(name, extra)
    states, weights = states_of(name, hypers, 'float64')
    for info in states.parameters:
        info.lr_mult = info.wd_mult = 1.0
    with pytest.raises(ValueError, match='would lose wd=0.125.*multiply the weights by 1 - .*wd yourself'):
        to_torch(states, 'torch')
    h = rules.get(name).hyperparameters(**hypers)
    params, optimizer = loaded(form, to_torch(states, 'torch', allow_lossy=True), weights, h)
    gradients = start('float64', STEPS, seed=2)[1]
    for t, gradient in enumerate(gradients, BEFORE + 1):
        for key, w in weights.items():
            weights[key], states.slots[key] = rules.get(name).run(np, h.replace(learning_rate=rate(t)), t, w, gradient[key],
                                                                  states.slots[key])
            params[key].grad = torch.tensor(gradient[key])
            params[key].data *= decay(rate(t))
        optimizer.param_groups[0]['lr'] = form.group(h.replace(learning_rate=rate(t)))['lr']
        optimizer.step()
        for key, w in weights.items():
            np.testing.assert_allclose(params[key].detach().numpy(), w, rtol=1e-12)


@pytest.mark.parametrize('name, target, extra, words', [
    ('novograd', 'timm', dict(variant='tfa'), "variant='tfa', which timm.optim.NvNovoGrad lacks"),
    ('novograd', 'timm', dict(epsilon_root=1e-3), 'epsilon_root=0.001, which timm'),
    ('novograd', 'torch_optimizer', dict(decoupled_wd=True), 'decoupled_wd=True, which torch_optimizer'),
    ('novograd', 'apex', dict(variant='paper'), "variant='paper', which apex"),
    ('nag', 'torch', {}, 'wd=0.125, which torch.optim.SGD lacks: MXNet.s momentum includes the decay of the new weight'),
    ('sgd_ema', 'torch', dict(bias_correction=True), 'bias_correction=True, which'),
    ('rmsprop_torch', 'torch', dict(bias_correction=True), 'bias_correction=True, which'),
    ('rmsprop', 'torch', dict(epsilon=0.0, clip_weights=1.0), 'clip_weights=1.0, which'),
    ('lamb', 'torch_optimizer', {}, 'bias_correction=True, which'),
    ('adamw', 'torch', dict(bias_correction=False), 'bias_correction=False, which torch.optim.AdamW lacks'),
    ('lamb', 'timm', dict(upper_bound=2.0), 'upper_bound=2.0, which'),
    ('larc', 'torch_optimizer', {}, 'clip=True, which'),
    ('larc', 'torch_optimizer', dict(clip=False, wd=0.0), 'wd=0.0, which torch_optimizer.LARS lacks: without decay'),
    ('larc', 'timm', dict(variant='openseq2seq', min_update=0.1), "min_update=0.1, which .*; variant='openseq2seq', which"),
    ('larc', 'timm', dict(base='adamw'), "'larc' has no equivalent in target='timm'"),
    ('adamax', 'torch', dict(clip_gradient=0.5), 'MXNet clips the sum of gradient and decay, which cannot be done from outside'),
    ('adamax', 'torch', dict(clip_gradient=0.5, wd=0.0), 'clip each element of the gradients yourself'),
    ('ftrl', 'torch', {}, "no equivalent in target='torch': no class elsewhere computes it. Available: target='mirror'"),
    ('sgld', 'torch', {}, 'it draws random numbers, which no class elsewhere.*Available: no target at all'),
    ('psgld', 'torch', {}, 'it draws random numbers, which no class elsewhere.*Available: no target at all'),
    ('nadam', 'torch', {}, 'm_schedule=1, which torch.optim.NAdam has separately for each parameter: continue in MXNet until'),
    ('rmsprop', 'apex', {}, "no equivalent in target='apex'. Available: target='mirror', target='timm', target='torch'"),
])
def test_refused(name, target, extra, words):
    rule = rules.get(name)
    states = OptimizerStates(name, rule.hyperparameters(**settings(name, extra)).asdict(), 0, infos_for('float32'),
                             dict.fromkeys(SHAPES, 0), {})
    with pytest.raises(ValueError, match=words):
        to_torch(states, target)


def test_a_first_gradient_of_zeros_divides_the_variants():
    states, _ = states_of('novograd', settings('novograd', {}))
    states.slots['bias']['norm_sq'] = np.zeros((), 'float32')
    optimizers_of_timm()
    with pytest.raises(ValueError, match="a norm of 0 after a zero first gradient.*'bias'"):
        to_torch(states, 'timm')
    states.hypers['variant'] = 'jasper'
    to_torch(states, 'timm')


@pytest.mark.parametrize('name, target, cls, arguments, words', [
    ('sgd', 'torch', 'SGD', dict(momentum=0.9, nesterov=True), '`nesterov` .* must be False'),
    ('sgd', 'torch', 'SGD', dict(momentum=0.9, dampening=0.1), '`dampening` .* must be 0.0'),
    ('nag', 'torch', 'SGD', dict(momentum=0.9), '`nesterov` .* must be True'),
    ('sgd_ema', 'torch', 'SGD', dict(momentum=0.9), '`dampening` .* must be 0.9'),
    ('adam', 'torch', 'Adam', dict(amsgrad=True), '`amsgrad` .* must be False'),
    ('adam_torch', 'torch', 'Adam', dict(maximize=True), '`maximize` .* must be False'),
    ('nadam', 'torch', 'NAdam', {}, "'mu_product' of 'w' must be below 1e-16.*Received: 0.45"),
    ('adamax', 'torch', 'Adamax', {}, '`eps` .* must be 1e-30'),
    ('adadelta', 'torch', 'Adadelta', dict(lr=0.5), '`lr` .* must be 1.0'),
    ('rmsprop', 'torch', 'RMSprop', dict(momentum=0.5), '`momentum` .* must be 0.0'),
    ('adagrad', 'torch', 'Adagrad', dict(weight_decay=0.5), '`weight_decay` .* must be 0.0'),
])
def test_a_state_of_another_optimizer_is_refused(name, target, cls, arguments, words):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer, p.grad = getattr(torch.optim, cls)([p], **{'lr': 0.1, **arguments}), torch.ones(2)
    optimizer.step()
    with pytest.raises(ValueError, match=words):
        from_torch(optimizer.state_dict(), name, target, params={'w': np.ones(2, 'f4')})


# -- parameters without updates, and with other numbers of them --------------------------------------------------------

@pytest.mark.parametrize('form, extra', [pytest.param(FORMS[key], CASES[key][0], id='-'.join(key)) for key in CASES])
def test_parameters_may_have_other_counts_or_none(form, extra):
    """weight has been updated at each step, one at half of them, bias never; all go on as they would have."""
    class_of(form)
    name, hypers = form.rule, settings(form.rule, extra)
    rule, h = rules.get(name), rules.get(name).hyperparameters(**hypers)
    rates = constant if form.label(h, BEFORE) == foreign.CONSTANT_RATE else rate
    if name == 'adam':  # exact for any count
        hypers['epsilon'], h = 0.0, h.replace(epsilon=0.0)
    states, weights = states_of(name, hypers, 'float32', rates)
    half, half_weights = states_of(name, hypers, 'float32', rates, steps=BEFORE // 2)
    states.slots['one'], weights['one'], states.counts['one'] = half.slots['one'], half_weights['one'], BEFORE // 2
    del states.slots['bias']
    states.counts['bias'] = 0
    state_dict = through_a_file(to_torch(states, form.target))
    assert bool(state_dict['state'].get(1)) == form.eager
    params, optimizer = loaded(form, state_dict, weights, h)
    if form.counts:
        order = [states.parameters[position] for group in state_dict['param_groups'] for position in group['params']]
        assert digest(from_torch(optimizer.state_dict(), name, form.target, params=order, num_update=BEFORE)) == digest(states)
    gradients = start('float32', STEPS, seed=2)[1]
    reached = list(run_class(form, h, params, optimizer, gradients, rates))
    h = h.replace(m_schedule=0.0) if name == 'nadam' else h
    for key, (lr_mult, wd_mult) in MULTIPLIERS.items():
        w, expected = weights[key], []
        own = states.slots.get(key) or {slot.name: initial_slot(slot, w) for slot in rule.slots(h)}
        for step, gradient in enumerate(gradients, 1):
            at = h.replace(learning_rate=rates(BEFORE + step) * lr_mult, wd=h.wd * wd_mult)
            w, own = rule.run(np, at, states.counts[key] + step, np.asarray(w, 'float64'), gradient[key].astype('float64'), own,
                              exact=True)
            expected.append({key: w})
        assert far({key: weights[key]}, expected, reached) <= 1e-6


def test_groups_by_count_are_reported():
    states, _ = states_of('lamb', settings('lamb', {}))
    states.counts['one'] = 3
    state_dict = to_torch(states, 'apex')
    assert [(group['params'], group['step']) for group in state_dict['param_groups']] == [([0], 10), ([2], 3), ([1], 10)]
    report = '\n'.join(states.report)
    for words in ('3 param groups, by (lr_mult, wd_mult) [(1.0, 1.0), (2.0, 0.5)] and number of updates', 'needs CUDA',
                  'make apex.optimizers.FusedLAMB with max_grad_norm=inf, use_nvlamb=True'):
        assert words in report
    assert 'max_grad_norm=inf' in '\n'.join(from_torch(state_dict, 'lamb', 'apex').report)


def test_norms_of_apex_that_do_not_fit_are_refused():
    states, _ = states_of('novograd', settings('novograd', dict(variant='apex')))
    state_dict = to_torch(states, 'apex')
    state_dict['param_groups'][0]['exp_avg_sq'][1] = torch.zeros(1)
    with pytest.raises(ValueError, match='as many norms'):
        from_torch(state_dict, 'novograd', 'apex')


def test_a_package_that_is_missing_is_named():
    states, _ = states_of('novograd', settings('novograd', {}))
    hidden = {key: sys.modules.pop(key) for key in list(sys.modules) if key.split('.')[0] == 'torch_optimizer'}
    sys.modules['torch_optimizer'] = None
    try:
        with pytest.raises(ImportError, match='pip install torch_optimizer'):
            to_torch(states, 'torch_optimizer')
    finally:
        del sys.modules['torch_optimizer']
        sys.modules.update(hidden)


# -- real trainers -----------------------------------------------------------------------------------------------------

# MXNet reads beta2 in single precision, where 1 - 0.999 is off by 1e-5: here it is a number that has no more digits
TRAINERS = [
    ('sgd', 'torch', {}), ('sgd', 'torch', dict(momentum=0.0)), ('nag', 'torch', dict(wd=0.0)),
    ('adam', 'torch', dict(epsilon=0.0, beta2=0.875)), ('adamax', 'torch', {}), ('nadam', 'torch', dict(beta2=0.875)),
    ('rmsprop', 'torch', dict(epsilon=0.0)), ('rmsprop', 'timm', dict(centered=True, gamma2=0.5)),
    ('adagrad', 'torch', dict(eps=0.0, wd=0.0)), ('adadelta', 'torch', dict(wd=0.0)), ('lamb', 'timm', dict(beta2=0.875)),
    ('lamb', 'torch_optimizer', dict(beta2=0.875, bias_correction=False))]


@pytest.mark.parametrize('name, target, extra', TRAINERS)
def test_a_run_of_mxnet_goes_on(name, target, extra, tmp_path):
    """MXNet's own optimizer in a Trainer, its own file of states, and the real class of PyTorch."""
    mx = pytest.importorskip('mxnet')
    from gluon_optim.states.reader import read_states
    form, hypers = FORMS[name, target], settings(name, extra)
    class_of(form)
    h = rules.get(name).hyperparameters(**hypers)
    rates = constant if form.label(h, BEFORE) == foreign.CONSTANT_RATE else rate
    before = 2 * BEFORE  # in which nadam's product of momenta vanishes
    weights, gradients = start('float32', before + STEPS)
    params = {}
    for key, w in weights.items():
        params[key] = mx.gluon.Parameter(key, shape=w.shape)
        params[key].initialize()
        params[key].set_data(mx.nd.array(w))
        params[key].lr_mult, params[key].wd_mult = MULTIPLIERS[key]
    trainer = mx.gluon.Trainer(list(params.values()), getattr(mx.optimizer.optimizer, type_of(mx, name))(**hypers))

    def steps(begin, end):
        for t in range(begin + 1, end + 1):
            with mx.autograd.record():
                losses = [(p.data() * mx.nd.array(gradients[t - 1][key])).sum() for key, p in params.items()]
            mx.autograd.backward(losses)
            trainer.set_learning_rate(rates(t))
            trainer.step(1)
            yield {key: p.data().asnumpy() for key, p in params.items()}

    *_, weights = steps(0, before)
    trainer.save_states(str(tmp_path / 'mx.states'))
    states = read_states(tmp_path / 'mx.states', params=list(SHAPES))
    for info in states.parameters:  # the file does not tell them
        info.lr_mult, info.wd_mult = MULTIPLIERS[info.name]
    theirs, optimizer = loaded(form, through_a_file(to_torch(states, target)), weights, h)
    expected = list(steps(before, before + STEPS))
    assert far(weights, expected, list(run_class(form, h, theirs, optimizer, gradients[before:], rates, before))) <= 1e-6


@pytest.mark.filterwarnings('ignore:(learning_rate|momentum) is')  # the script's are others than the file's
def test_the_examples_of_the_documentation(tmp_path, monkeypatch):
    mx = pytest.importorskip('mxnet')
    text = (Path(__file__).parent.parent / 'docs/CONVERSIONS.md').read_text(encoding='utf-8')
    blocks = [block for block in re.findall('```python\n(.*?)```', text, re.DOTALL)
              if 'go.torch.scheduler' not in block]   # which test_carried_schedules.py runs
    monkeypatch.chdir(tmp_path)
    net = mx.gluon.nn.Dense(1, in_units=3)
    net.initialize()
    trainer = mx.gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1, 'momentum': 0.9})
    with mx.autograd.record():
        loss = net(mx.nd.ones((2, 3))).sum()
    loss.backward()
    trainer.step(2)
    trainer.save_states('trainer.states')
    scope = {'net': torch.nn.Linear(3, 1), 'gluon_net': net}
    Path('examples.py').write_text('\n'.join(blocks), encoding='utf-8')
    scope = runpy.run_path('examples.py', scope)
    momentum = scope['trainer']._updaters[0].states[0]
    momentum = (momentum[0] if isinstance(momentum, tuple) else momentum).asnumpy()
    np.testing.assert_allclose(momentum, -trainer._updaters[0].states[0].asnumpy() / 0.1, rtol=1e-6)
    assert len(blocks) == 2 and np.abs(momentum).min() > 0.5


def type_of(mx, name):
    """The class that MXNet registers under ``name``."""
    return mx.optimizer.Optimizer.opt_registry[name].__name__
