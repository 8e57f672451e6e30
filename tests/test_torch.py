"""The PyTorch mirrors against the rules in NumPy and against torch.optim, and states into PyTorch and back."""
import copy
import functools
import io
import pickle
import subprocess
import sys

import conversion_runs
import numpy as np
import pytest
from conversion_runs import STEPS, assert_near, cases, rate, run_rule, settings

import gluon_optim as go
from gluon_optim import rules
from gluon_optim.rules.mx import DROP_INS
from gluon_optim.rules.runtimes import mirrored
from gluon_optim.states.model import OptimizerStates, ParameterInfo, digest

torch = pytest.importorskip('torch')
from gluon_optim.torch import create, from_torch, param_groups, to_torch  # noqa: E402
from gluon_optim.torch.executors import NAMESPACES  # noqa: E402

SHAPES = {'weight': (4, 3), 'bias': (3,), 'one': (1,)}  # MXNet has none of shape ()
weights_and_gradients = functools.partial(conversion_runs.weights_and_gradients, shapes=SHAPES)


def parameters(weights, dtype=None):
    return {name: torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for name, w in weights.items()}


def step(optimizer, params, gradients, lr=None):
    for name, p in params.items():
        p.grad = None if gradients.get(name) is None else torch.tensor(gradients[name]).to(p.dtype)
    for group in optimizer.param_groups if lr is not None else ():
        group['lr'] = lr
    optimizer.step()


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def states_of(name, hypers, dtype='float32', steps=10, infos=None, **options):
    """States as a run of ``steps`` updates leaves them, computed with NumPy, and the weights."""
    weights, gradients = weights_and_gradients(dtype, steps)
    rule = rules.get(name)
    weights, slots, _ = run_rule(name, hypers, weights, gradients)
    infos = infos or [ParameterInfo(key, 'net0_' + key, w.shape, dtype) for key, w in weights.items()]
    slots = {key: {slot: np.asarray(value, 'float64' if dtype == 'float64' else 'float32') for slot, value in own.items()}
             for key, own in slots.items()}
    hypers = rule.hyperparameters(**hypers).asdict()
    return OptimizerStates(name, hypers, steps, infos, dict.fromkeys(weights, steps), slots, **options), weights


# -- the mirror --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, extra', cases())
def test_equals_the_rule(name, extra):
    hypers = settings(name, extra)
    weights, gradients = weights_and_gradients()
    expected, slots, _ = run_rule(name, hypers, weights, gradients)
    params = parameters(weights)
    optimizer = create(name, params.values(), **hypers)
    for t, gradient in enumerate(gradients, 1):
        step(optimizer, params, gradient, rate(t))
    for key, p in params.items():
        np.testing.assert_allclose(p.detach().numpy(), expected[key], rtol=1e-12, atol=1e-12)
        state = optimizer.state[p]
        assert state['step'] == STEPS and state['step'].dtype == torch.float32
        for slot in rules.get(name).slots(rules.get(name).hyperparameters(**hypers)):
            value = state[slot.torch or slot.name]
            assert value.dtype == torch.float64 and value.shape == (p.shape if slot.like == 'weight' else ())
            np.testing.assert_allclose(value.numpy(), slots[key][slot.name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name, cls, ours, theirs', [
    ('adamw', 'AdamW', {'beta1': 0.8, 'epsilon': 1e-3, 'wd': 0.1}, {'betas': (0.8, 0.999), 'eps': 1e-3, 'weight_decay': 0.1}),
    ('adamw', 'AdamW', {'amsgrad': True, 'beta2': 0.9}, {'amsgrad': True, 'betas': (0.9, 0.9)}),
    ('sgd_torch', 'SGD', {'momentum': 0.9, 'wd': 0.1, 'nesterov': True}, {'momentum': 0.9, 'weight_decay': 0.1, 'nesterov': True}),
    ('sgd_torch', 'SGD', {'momentum': 0.9, 'dampening': 0.5}, {'momentum': 0.9, 'dampening': 0.5}),
])
@pytest.mark.parametrize('dtype, tolerance', [('float64', 1e-13), ('float32', 2e-6)])
def test_equals_torch(name, cls, ours, theirs, dtype, tolerance):
    weights, gradients = weights_and_gradients(dtype)
    mine, other = parameters(weights), parameters(weights)
    optimizers = create(name, mine.values(), **ours), getattr(torch.optim, cls)(other.values(), lr=1.0, **theirs)
    for t, gradient in enumerate(gradients, 1):
        for optimizer, params in zip(optimizers, (mine, other)):
            step(optimizer, params, gradient, rate(t))
    for key in weights:
        np.testing.assert_allclose(mine[key].detach().numpy(), other[key].detach().numpy(), rtol=tolerance, atol=tolerance)
        for word, value in optimizers[1].state[other[key]].items():
            np.testing.assert_allclose(optimizers[0].state[mine[key]][word].numpy(), value.numpy(), rtol=tolerance, atol=tolerance)


def test_sums_are_carried_in_double_and_numbers_stand_for_tensors():
    xp = NAMESPACES[torch.float32]
    assert xp.sum(torch.tensor([2.0 ** 24, 1.0, -2.0 ** 24])).item() == 1.0
    big = torch.full((100_000,), 0.1)
    assert xp.sum(big) == big.double().sum().float() and xp.sum(big).dtype == torch.float32
    x = torch.tensor([-2.0, 3.0, float('nan')])
    for low in (xp.maximum(x, 0.0), xp.maximum(0.0, x), xp.maximum(x, torch.zeros(3))):
        assert str(low.tolist()) == '[0.0, 3.0, nan]'
    for high in (xp.minimum(x, 0.0), xp.minimum(0.0, x), xp.minimum(x, torch.zeros(3))):
        assert str(high.tolist()) == '[-2.0, 0.0, nan]'
    for dtype, namespace in NAMESPACES.items():
        y = torch.ones((), dtype=dtype)
        for x in (namespace.where(y == 1, 0.1, 0.2), namespace.where(y == 1, 0.1, y), namespace.where(y == 0, y, 0.1)):
            assert x.dtype == dtype and x == torch.tensor(0.1, dtype=dtype)


def test_param_groups_have_their_own_hyperparameters():
    weights, gradients = weights_and_gradients()
    params = parameters(weights)
    optimizer = create('adamw', [{'params': [params['weight']], 'weight_decay': 0.3, 'learning_rate': 0.2},
                                 {'params': params['bias'], 'wd': 0.0, 'beta1': 0.5}], lr=0.1)
    optimizer.add_param_group({'params': [params['one']], 'amsgrad': True})
    assert [(group['lr'], group['wd'], group['beta1']) for group in optimizer.param_groups] == [(0.2, 0.3, 0.9), (0.1, 0.0, 0.5),
                                                                                                (0.1, 0.01, 0.9)]
    for gradient in gradients[:3]:
        step(optimizer, params, gradient)
    for key, own in (('weight', dict(wd=0.3, learning_rate=0.2)), ('bias', dict(wd=0.0, beta1=0.5, learning_rate=0.1)),
                     ('one', dict(amsgrad=True, learning_rate=0.1))):
        rule, w, slots = rules.get('adamw'), weights[key], None
        for t in (1, 2, 3):
            w, slots = rule.run(np, rule.hyperparameters(**own), t, w, gradients[t - 1][key], slots)
        np.testing.assert_allclose(params[key].detach().numpy(), w, rtol=1e-13)


def test_other_libraries_may_keep_their_own_in_a_group():
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer, other = (create('adamw', [one], lr=0.1, wd=0.3) for one in (p, q))
    optimizer.param_groups[0].update(initial_lr=0.5, max_lr=1.0, swa_lr=0.2, name='head', lr_scale=0.1, weight_decay=0.3)
    for t in range(3):
        for one, its in ((p, optimizer), (q, other)):
            one.grad = torch.full((2,), float(t))
            its.step()
    assert torch.equal(p, q)
    optimizer.param_groups[0]['wd'] = 0.4   # what was a copy now contradicts it
    with pytest.raises(ValueError, match=r"remove group\['weight_decay'\]"):
        optimizer.step()
    del optimizer.param_groups[0]['weight_decay']
    optimizer.step()


def test_a_group_of_larc_may_have_another_base():
    weights, gradients = weights_and_gradients()
    params = parameters(weights)
    optimizer = create('larc', [{'params': [params['weight'], params['one']]},
                                {'params': [params['bias']], 'base': 'adamw', 'beta1': 0.5}], lr=0.1, momentum=0.9)
    step(optimizer, params, gradients[0])
    assert set(optimizer.state[params['weight']]) == {'step', 'momentum_buffer'}
    assert set(optimizer.state[params['bias']]) == {'step', 'exp_avg', 'exp_avg_sq'}  # and the decay of the optimizer
    rule = rules.get('larc')
    h = rule.hyperparameters(base='adamw', beta1=0.5, learning_rate=0.1, wd=0.0)
    w, _ = rule.run(np, h, 1, weights['bias'], gradients[0]['bias'])
    np.testing.assert_allclose(params['bias'].detach().numpy(), w, rtol=1e-13)


def test_closure_is_called_with_gradients_on_and_its_loss_returned():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = create('sgd_torch', [p], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (p ** 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert p.tolist() == [0.0, 0.0]


def test_schedulers_and_hooks():
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer, seen = create('sgd_torch', [p], lr=1.0, momentum=0.5), []
    optimizer.register_step_post_hook(lambda *_: seen.append(p.item()))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()
    assert seen == [-1.0, -1.75, -1.75 - 0.25 * 1.75]
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)  # writes momentum too
    optimizer.step()
    cycle.step()
    assert optimizer.param_groups[0]['momentum'] != 0.5
    fresh = create('sgd_torch', [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))])
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))  # with what the scheduler keeps in the group
    assert fresh.param_groups[0]['initial_lr'] == optimizer.param_groups[0]['initial_lr']


def test_gradients_are_read_only_and_may_be_missing():
    weights, gradients = weights_and_gradients('float32')
    params = parameters(weights)
    optimizer = create('adamw', params.values(), clip_gradient=1e-3, rescale_grad=0.5)
    step(optimizer, params, dict(gradients[0], bias=None))
    for key in ('weight', 'one'):
        assert params[key].grad.numpy().tobytes() == gradients[0][key].tobytes()
    assert params['bias'] not in optimizer.state and params['bias'].detach().numpy().tobytes() == weights['bias'].tobytes()
    step(optimizer, params, gradients[1])
    assert [int(optimizer.state[p]['step']) for p in params.values()] == [2, 1, 2]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', ['novograd', 'adamw', 'sgd_torch'])
def test_half_parameters_follow_their_masters(name, dtype):
    weights, gradients = weights_and_gradients('float32')
    halves = parameters(weights, dtype)
    singles = {key: torch.nn.Parameter(p.detach().float()) for key, p in halves.items()}
    optimizer, reference = create(name, halves.values(), lr=1e-3), create(name, singles.values(), lr=1e-3)
    for gradient in gradients:
        step(optimizer, halves, gradient)
        step(reference, singles, {key: p.grad.float().numpy() for key, p in halves.items()})
        for key, p in halves.items():
            state = optimizer.state[p]
            assert state['master'].dtype == torch.float32 and torch.equal(p.detach(), state['master'].to(dtype))
            assert torch.equal(state['master'], singles[key].detach())
            assert all(state[word].dtype == torch.float32 for word in state)


def test_half_parameters_without_masters():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = create('sgd_torch', [p], lr=1e-5, momentum=0.9, multi_precision=False)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert set(optimizer.state[p]) == {'step', 'momentum_buffer'} and optimizer.state[p]['momentum_buffer'].dtype == torch.float32
    assert p.tolist() == [1.0] * 4  # 1e-5 rounds away


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize('name, extra', [('novograd', {}), ('adamw', {'amsgrad': True}), ('sgd_torch', {'momentum': 0.9})])
def test_a_saved_state_goes_on_bit_for_bit(name, extra, dtype):
    weights, gradients = weights_and_gradients()
    straight = parameters(weights, dtype)
    optimizer = create(name, straight.values(), clip_gradient=1.0, **extra)
    for t in range(10):
        step(optimizer, straight, gradients[t], rate(t))
    resumed = {key: torch.nn.Parameter(p.detach().clone()) for key, p in straight.items()}
    other = create(name, resumed.values())
    saved = through_a_file(optimizer.state_dict())
    other.load_state_dict(saved)
    assert other.param_groups[0]['clip_gradient'] == 1.0
    for t in range(10, 20):
        step(optimizer, straight, gradients[t], rate(t))
        step(other, resumed, gradients[t], rate(t))
    for key, p in straight.items():
        assert torch.equal(p, resumed[key])
        for word, value in optimizer.state[p].items():
            loaded = other.state[resumed[key]][word]
            assert loaded.dtype == value.dtype and torch.equal(loaded, value)
            assert not torch.equal(saved['state'][list(straight).index(key)][word], value)  # the dictionary is not written to


def test_hooks_of_users_around_loading_change_and_see_what_counts():
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = create('sgd_torch', [p], momentum=0.9)
    p.grad = torch.full_like(p, 0.1)
    optimizer.step()
    saved, seen = optimizer.state_dict(), []
    other = create('sgd_torch', [p], momentum=0.9)
    other.register_load_state_dict_pre_hook(
        lambda _, given: dict(given, param_groups=[dict(given['param_groups'][0], momentum=0.5)]))
    other.register_load_state_dict_post_hook(lambda me: seen.append(me.state[p]['master'].dtype))
    other.load_state_dict(saved)
    assert other.param_groups[0]['momentum'] == 0.5 and seen == [torch.float32]
    assert len(other._optimizer_load_state_dict_pre_hooks) == len(other._optimizer_load_state_dict_post_hooks) == 1  # the user's


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_deepcopy_and_pickle(clone):
    weights, gradients = weights_and_gradients('float32')
    params = parameters(weights)
    optimizer = create('novograd', params.values(), lr=0.1)
    step(optimizer, params, gradients[0])
    params2, optimizer2 = clone((params, optimizer))
    step(optimizer, params, gradients[1])
    assert not torch.equal(params['weight'], params2['weight'])
    step(optimizer2, params2, gradients[1])
    assert all(torch.equal(p, params2[key]) for key, p in params.items())
    assert "'novograd'" in repr(optimizer2)


def test_beside_and_inside_a_compiled_function():
    torch.manual_seed(0)
    model, plain = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(5, 3)

    def train(net, optimizer):
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    optimizers = create('novograd', model.parameters(), lr=0.1), create('novograd', plain.parameters(), lr=0.1)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled, compiled_step = torch.compile(train, backend=backend), torch.compile(optimizers[0].step, backend=backend)
    for _ in range(11):
        assert torch.equal(compiled(model, optimizers[0]), train(plain, optimizers[1]))
    assert len(graphs) == 1  # of the model: updates are not traced, whose coefficients are other numbers at each step
    compiled_step()
    optimizers[1].step()
    assert len(graphs) == 1
    assert torch.equal(model.weight, plain.weight) and optimizers[0].state[model.weight]['step'] == 12


@pytest.mark.parametrize('arguments, error, words', [
    (dict(name='novogard'), ValueError, "Did you mean 'novograd'"),
    (dict(beta3=0.9), TypeError, "Did you mean 'beta2'"),
    (dict(maximize=True), TypeError, "Unknown argument of novograd 'maximize'"),
    (dict(lr=-1.0), ValueError, r'`learning_rate` must be in \[0, inf\)'),
    (dict(lr=float('nan')), ValueError, 'Received: learning_rate=nan'),
    (dict(lr=0.1, learning_rate=0.1), TypeError, 'given twice'),
    (dict(weight_decay=-1.0), ValueError, '`wd` must be in'),
    (dict(lr='0.1'), TypeError, 'Pass a number'),
    (dict(variant='apex', amsgrad=True), ValueError, 'not defined for variant'),
    (dict(multi_precision=1), ValueError, '`multi_precision` must be one of False, True'),
    (dict(params=[torch.zeros(2, dtype=torch.int64)]), ValueError, 'Received: torch.int64'),
    (dict(params=[torch.zeros(2, dtype=torch.complex64)]), ValueError, 'Received: torch.complex64'),
    (dict(params=[{'params': torch.zeros(2), 'beta3': 1}]), TypeError, "Unknown argument of novograd 'beta3'"),
    (dict(params=[{'params': torch.zeros(2), 'beta1': 1}]), ValueError, r'`beta1` must be in \[0, 1\)'),
])
def test_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        create(**{'name': 'novograd', 'params': [torch.zeros(2)], **arguments})


def test_a_group_that_is_refused_is_not_added():
    optimizer = create('novograd', [torch.zeros(2)])
    for group in ({'params': torch.zeros(2), 'beta1': 2.0}, {'params': torch.zeros(2, dtype=torch.int32)},
                  {'params': torch.zeros(2), 'optimizer': 'adamw'}):
        with pytest.raises(ValueError):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize('spoil, words', [
    (lambda optimizer, p, q: optimizer.param_groups[1].update(lr=float('nan')), 'learning_rate=nan'),
    (lambda optimizer, p, q: optimizer.param_groups[1].update(beta2=1.5), '`beta2` must be in'),
    (lambda optimizer, p, q: optimizer.param_groups[1].update(weight_decay=100.0), r"as group\['wd'\].*Received.*100.0"),
    (lambda optimizer, p, q: optimizer.param_groups[1].update(learning_rate=100.0), r"learning_rate as group\['lr'\]"),
    (lambda optimizer, p, q: setattr(q, 'grad', torch.eye(2).to_sparse()), 'gradient must be dense'),
])
def test_nothing_is_written_before_all_is_checked(spoil, words):
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = create('adamw', [{'params': [p]}, {'params': [q]}])
    p.grad, q.grad = torch.ones(2), torch.ones(2, 2)
    optimizer.step()
    before = copy.deepcopy((p, q, optimizer.state_dict()['state']))
    spoil(optimizer, p, q)
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert str((p, q, optimizer.state_dict()['state'])) == str(before)


def _loaded(change):
    def spoiled(state_dict):
        state_dict = copy.deepcopy(state_dict)
        change(state_dict)
        return state_dict
    return spoiled


@pytest.mark.parametrize('spoil, words', [
    (lambda sd: create('adamw', [torch.zeros(2)]).state_dict(), 'must hold|must be'),
    (lambda sd: torch.optim.AdamW([torch.zeros(4, 3)]).state_dict(), 'one without'),
    (_loaded(lambda sd: sd['param_groups'][0].update(optimizer='adamw')), "`optimizer` .* must be 'novograd'"),
    (_loaded(lambda sd: sd['param_groups'][0].update(beta1=2.0)), '`beta1` must be in'),
    (_loaded(lambda sd: sd['param_groups'][0].pop('beta1')), "one without 'beta1'"),
    (_loaded(lambda sd: sd['param_groups'][0]['params'].pop()), 'param_groups'),
    (_loaded(lambda sd: sd['state'][1].pop('exp_avg')), "parameter 1 must hold 'exp_avg'"),
    (_loaded(lambda sd: sd['state'][1].update(exp_avg=torch.zeros(4))), 'must have shape'),
    (_loaded(lambda sd: sd['state'][1].update(exp_avg=torch.zeros(3, dtype=torch.float64))), 'lose digits'),
    (_loaded(lambda sd: sd['state'][1].update(step=torch.tensor(float('nan')))), 'number of updates'),
    (_loaded(lambda sd: sd['state'][1].update(master=torch.full((3,), 7.0))), 'keeps no master'),
])
def test_a_state_that_does_not_fit_is_refused_and_nothing_changed(spoil, words):
    weights, gradients = weights_and_gradients('float32')
    params = parameters(weights)
    optimizer = create('novograd', params.values())
    step(optimizer, params, gradients[0])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(spoil(before))
    assert str(optimizer.state_dict()) == str(before)
    assert not optimizer._optimizer_load_state_dict_pre_hooks and not optimizer._optimizer_load_state_dict_post_hooks


def test_masters_may_become_float32_parameters():
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = create('adamw', [half])
    half.grad = torch.full_like(half, 0.3)
    optimizer.step()
    state = optimizer.state_dict()
    single = torch.nn.Parameter(state['state'][0]['master'].clone())
    other = create('adamw', [single])
    other.load_state_dict(state)
    assert 'master' not in other.state[single]


def test_without_torch_there_is_one_line_that_says_what_to_do():
    code = ("import sys; sys.modules['torch'] = None\nimport gluon_optim\nimport gluon_optim.mapping.state_dict\n"
            "try:\n    import gluon_optim.torch\nexcept ImportError as error:\n    print(error)")
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], stdout=subprocess.PIPE, check=True, text=True)
    assert done.stdout.startswith('gluon_optim.torch needs PyTorch, and importing failed: ')
    assert done.stdout.endswith(". In a checkout of gluon_optim, pip install '.[torch]'\n")


# -- states into PyTorch and back --------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('name, extra', cases())
def test_states_into_the_mirror_and_back(name, extra, dtype):
    hypers = dict(settings(name, extra), rescale_grad=1.0)
    states, weights = states_of(name, hypers, dtype)
    state_dict = through_a_file(to_torch(states))
    back = from_torch(state_dict, params=states.parameters)
    assert digest(back) == digest(states) and back.parameters == states.parameters and back.hypers == states.hypers
    params = parameters(weights)
    optimizer = create(name, params.values(), **{key: extra[key] for key in ('base',) if key in extra})
    optimizer.load_state_dict(state_dict)
    assert digest(from_torch(optimizer.state_dict(), params=states.parameters)) == digest(states)
    _, gradients = weights_and_gradients(dtype, seed=2)
    expected, _, _ = run_rule(name, hypers, weights, gradients, 10, states.slots)
    travelled = dict.fromkeys(weights, 0.0)
    for t, gradient in enumerate(gradients, 11):
        before = {key: p.detach().numpy().copy() for key, p in params.items()}
        step(optimizer, params, gradient, rate(t))
        for key, p in params.items():
            travelled[key] = travelled[key] + np.abs(p.detach().numpy() - before[key])
    for key, p in params.items():
        far = np.abs(p.detach().numpy() - expected[key]) / np.maximum(travelled[key].max(), 1e-30)
        assert far.max() <= (1e-6 if dtype == 'float32' else 1e-12)


def infos_with_multipliers():
    return [ParameterInfo(name, name, shape, 'float64', lr_mult, wd_mult)
            for (name, shape), (lr_mult, wd_mult) in zip(SHAPES.items(), ((1.0, 1.0), (2.0, 0.0), (1.0, 1.0)))]


@pytest.mark.parametrize('target', ['mirror', 'torch'])
def test_multipliers_become_param_groups(target):
    states, weights = states_of('adamw', {'wd': 0.1, 'learning_rate': 0.05}, 'float64', infos=infos_with_multipliers())
    state_dict = through_a_file(to_torch(states, target))
    groups = state_dict['param_groups']
    wd = 'wd' if target == 'mirror' else 'weight_decay'
    assert [(group['params'], group['lr'], group[wd]) for group in groups] == [([0, 2], 0.05, 0.1), ([1], 0.1, 0.0)]
    params = parameters(weights)
    split = param_groups(state_dict, params.values())
    assert split == [{'params': [params['weight'], params['one']]}, {'params': [params['bias']]}]
    optimizer = create('adamw', split) if target == 'mirror' else torch.optim.AdamW(split)
    optimizer.load_state_dict(copy.deepcopy(state_dict))  # PyTorch's own classes write to what they were given
    for info in states.parameters:
        state = optimizer.state[params[info.name]]
        assert state['exp_avg'].numpy().tobytes() == states.slots[info.name]['mean'].tobytes()
    gradients = weights_and_gradients(seed=3)[1][0]
    step(optimizer, params, gradients)
    rule = rules.get('adamw')
    for info in states.parameters:
        h = rule.hyperparameters(learning_rate=0.05 * info.lr_mult, wd=0.1 * info.wd_mult)
        w, _ = rule.run(np, h, 11, weights[info.name], gradients[info.name], states.slots[info.name])
        np.testing.assert_allclose(params[info.name].detach().numpy(), w, rtol=1e-13)
    assert any('param_groups(state_dict, params)' in line for line in states.report)
    back = from_torch(state_dict, 'adamw', target, params=states.parameters)
    assert back.parameters == states.parameters and back.hypers['learning_rate'] == 0.05 and digest(back) == digest(states)
    if target == 'mirror':  # whose groups know the names, also after they were renumbered
        assert from_torch(state_dict).names == states.names
        back = from_torch(create_and_load(split, state_dict).state_dict(), params=states.names)
        assert [(info.name, info.lr_mult, info.wd_mult) for info in back.parameters] == [
            (info.name, info.lr_mult, info.wd_mult) for info in states.parameters]
        assert digest(back) == digest(states)


def test_multipliers_come_back_exactly():
    infos = infos_with_multipliers()
    infos[0].lr_mult = 3.0
    states, _ = states_of('adamw', {'learning_rate': 0.1}, 'float64', infos=infos)
    assert 0.1 * 3.0 / 3.0 != 0.1
    back = from_torch(to_torch(states), params=infos)
    assert back.hypers['learning_rate'] == 0.1 and back.parameters == infos


@pytest.mark.parametrize('off, fits', [(1e-11, True), (1e-8, False), (-1e-8, False)])
def test_rates_of_groups_that_are_not_the_multipliers_are_refused(off, fits):
    """They may differ by rounding, and by no more."""
    infos = infos_with_multipliers()
    state_dict = to_torch(states_of('adamw', {'learning_rate': 0.05, 'wd': 0.1}, 'float64', infos=infos)[0])
    state_dict['param_groups'][1]['lr'] *= 1 + off
    if fits:
        assert from_torch(state_dict, params=infos).parameters == infos
    else:
        with pytest.raises(ValueError, match='one value times the multipliers'):
            from_torch(state_dict, params=infos)


def create_and_load(groups, state_dict):
    optimizer = create('adamw', groups)
    optimizer.load_state_dict(state_dict)
    return optimizer


def test_a_plain_list_of_parameters_is_told_to_make_groups():
    states, weights = states_of('adamw', {}, 'float64', infos=infos_with_multipliers())
    optimizer = create('adamw', parameters(weights).values())
    with pytest.raises(ValueError, match='param_groups'):
        optimizer.load_state_dict(to_torch(states))


def test_params_selects_and_reorders():
    states, _ = states_of('novograd', {})
    state_dict = to_torch(states, params=['one', 'weight'])
    assert state_dict['param_groups'][0]['param_names'] == ['one', 'weight'] and state_dict['param_groups'][0]['params'] == [0, 1]
    assert state_dict['state'][1]['exp_avg'].shape == (4, 3)
    assert any('2 parameters' in line and 'one, weight' in line for line in states.report)
    assert from_torch(state_dict, params=['weight', 'one']).names == ['weight', 'one']
    assert from_torch(state_dict, params=['a', 'b']).slots['b']['mean'].shape == (4, 3)
    for params, words in ((['on'], "Did you mean 'one'"), (['one', 'one'], 'once'), ([], 'Nothing to convert'), ('one', None)):
        with pytest.raises(TypeError if words is None else ValueError, match=words):
            to_torch(states, params=params)


def test_the_dictionary_is_a_copy():
    states, weights = states_of('sgd_torch', {'momentum': 0.9})
    before = digest(states)
    params = parameters(weights)
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    optimizer.load_state_dict(to_torch(states, 'torch'))
    step(optimizer, params, weights_and_gradients('float32')[1][0])
    assert digest(states) == before


def test_parameters_that_had_no_update_stay_fresh():
    states, weights = states_of('sgd_torch', {'momentum': 0.9, 'dampening': 0.5})
    states.counts['bias'] = 0
    del states.slots['bias']
    for target in ('mirror', 'torch'):
        state_dict = to_torch(states, target)
        assert sorted(state_dict['state']) == [0, 2]
        back = from_torch(state_dict, 'sgd_torch', target, params=states.parameters, num_update=10)
        assert digest(back) == digest(states)
    states.slots['bias'] = {'momentum_buffer': np.zeros(3, 'float32')}
    assert to_torch(states)['state'][1]['step'] == 0
    state_dict = to_torch(states, 'torch')
    params = parameters(weights)
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    optimizer.load_state_dict(state_dict)
    step(optimizer, params, {'bias': np.ones(3, 'float32')})
    assert optimizer.state[params['bias']]['momentum_buffer'].tolist() == [1.0] * 3  # the first gradient is not dampened


def with_masters(name='adamw', hypers=None):
    states, weights = states_of(name, hypers or {})
    states.master = weights
    for info in states.parameters:
        info.dtype = 'float16'
    return states


def test_masters_travel():
    states = with_masters()
    state_dict = through_a_file(to_torch(states))
    halves = parameters(states.master, torch.float16)
    optimizer = create('adamw', halves.values())
    optimizer.load_state_dict(state_dict)
    for key, p in halves.items():
        assert optimizer.state[p]['master'].numpy().tobytes() == states.master[key].tobytes()
        assert optimizer.state[p]['exp_avg'].numpy().tobytes() == states.slots[key]['mean'].tobytes()
    back = from_torch(optimizer.state_dict())
    assert digest(back) == digest(states)
    assert from_torch(optimizer.state_dict(), params=halves).parameters[0].dtype == 'float16'


def test_half_weights_without_masters_stay_without():
    states = with_masters()
    states.master = {}
    assert to_torch(states)['param_groups'][0]['multi_precision'] is False


@pytest.mark.parametrize('prepare, target, words', [
    (lambda: states_of('novograd', {})[0], 'torch', "no equivalent in target='torch'"),
    (lambda: states_of('adamw', {})[0], 'tensorflow', "Available: target='mirror', target='torch'"),
    (lambda: states_of('adamw', {'clip_gradient': 0.5})[0], 'torch', 'would lose clip_gradient=0.5'),
    (with_masters, 'torch', "'weight', 'bias', 'one'.*make the parameters float32"),
])
def test_what_would_be_lost_is_refused(prepare, target, words):
    states = prepare()
    with pytest.raises(ValueError, match=words):
        to_torch(states, target)
    assert states.report == []


def test_allow_lossy_goes_on_and_reports():
    states, _ = states_of('adamw', {'clip_gradient': 0.5})
    assert to_torch(states, 'torch', allow_lossy=True)['param_groups'][0]['betas'] == (0.9, 0.999)
    assert any(line.startswith('lost: clip_gradient=0.5') for line in states.report)


def test_what_is_not_carried_over_is_reported():
    states, _ = states_of('adamw', {'rescale_grad': 1 / 32}, loss_scaler={'loss_scale': 1024.0},
                          scheduler={'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': {}})
    state_dict = to_torch(states)
    report = '\n'.join(states.report)
    for words in ('exact', '3 parameters', 'rescale_grad=0.03125', 'mean loss', 'FactorScheduler', 'update 11', 'loss scaler'):
        assert words in report
    assert state_dict['param_groups'][0]['rescale_grad'] == 1.0
    lines = list(states.report)
    to_torch(states)
    assert states.report == lines


@pytest.mark.parametrize('spoil, words', [
    (lambda states: states.slots['bias'].pop('mean'), "'bias' must hold 'exp_avg'"),
    (lambda states: states.slots['bias'].update(extra=np.zeros(3, 'float32')), "'bias' must have the slots"),
    (lambda states: states.slots['bias'].update(mean=np.zeros((4, 3), 'float32')), r"'exp_avg' of 'bias' must have shape \(3,\)"),
    (lambda states: states.slots['bias'].update(mean=np.zeros(3)), 'lose digits'),
    (lambda states: states.slots.pop('bias'), "'bias' has seen 10 updates but has no slots"),
    (lambda states: states.master.update(bias=np.zeros(2, 'float32')), "'master' of 'bias' must have shape"),
    (lambda states: setattr(states, 'optimizer', 'novogard'), "Did you mean 'novograd'"),
])
def test_states_that_are_not_whole_are_refused(spoil, words):
    states, _ = states_of('adamw', {})
    spoil(states)
    with pytest.raises(ValueError, match=words):
        to_torch(states)


@pytest.mark.parametrize('change, arguments, words', [
    (lambda sd: None, dict(optimizer='novograd'), "`optimizer` .* must be 'novograd'"),
    (lambda sd: sd['param_groups'][0].pop('optimizer'), {}, '`optimizer` must be a registered name'),
    (lambda sd: None, dict(target='torch', optimizer='adamw'), "torch.optim.AdamW has 'lr', 'weight_decay', 'betas'"),
    (lambda sd: None, dict(params=['a']), 'must name the 3 parameters'),
    (lambda sd: None, dict(params=['a', 'weight', 'bias']), "Only in `params`: 'a'. Only in the state: 'one'"),
    (lambda sd: None, dict(params={name: np.zeros(2, 'f4') for name in SHAPES}), 'must have shape'),
    (lambda sd: None, dict(params={name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}), 'bfloat16'),
    (lambda sd: sd['state'].pop(1), {}, "does not give the shape of 'bias'"),
    (lambda sd: sd['state'][1].pop('exp_avg_sq'), {}, "'bias' must hold 'exp_avg_sq'"),
])
def test_what_cannot_go_back_is_refused(change, arguments, words):
    state_dict = to_torch(states_of('adamw', {})[0])
    change(state_dict)
    with pytest.raises(ValueError, match=words):
        from_torch(state_dict, **arguments)


def test_groups_that_a_trainer_cannot_have_are_refused():
    optimizer = create('adamw', [{'params': [torch.zeros(2)]}, {'params': [torch.zeros(2)], 'beta1': 0.5}])
    with pytest.raises(ValueError, match="group 1 differs from group 0 in 'beta1'"):
        from_torch(optimizer.state_dict(), params={'a': np.zeros(2, 'f4'), 'b': np.zeros(2, 'f4')})
    optimizer = create('adamw', [{'params': [torch.zeros(2)]}, {'params': [torch.zeros(2)], 'lr': 0.5}], lr=0.1)
    infos = [ParameterInfo(name, name, (2,), 'float32') for name in 'ab']
    with pytest.raises(ValueError, match='one value times the multipliers'):
        from_torch(optimizer.state_dict(), params=infos)
    maximizing = torch.optim.AdamW([torch.zeros(2)], maximize=True)
    with pytest.raises(ValueError, match=r'`maximize` .* must be False'):
        from_torch(maximizing.state_dict(), 'adamw', 'torch')
    adam = torch.optim.Adam([torch.zeros(2)]).state_dict()
    if 'decoupled_weight_decay' in adam['param_groups'][0]:  # since PyTorch 2.7: else nothing tells the two apart
        with pytest.raises(ValueError, match='`decoupled_weight_decay`'):
            from_torch(adam, 'adamw', 'torch')


def test_a_native_run_of_torch_goes_back_to_gluon():
    weights, gradients = weights_and_gradients('float32')
    params = parameters(weights)
    split = [{'params': [params['weight'], params['bias']]}, {'params': [params['one']], 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(split, lr=0.1)
    for gradient in gradients[:3]:
        step(optimizer, params, gradient)
    states = from_torch(optimizer.state_dict(), 'adamw', 'torch', params=params)
    assert states.names == list(params) and states.num_update == 3 and set(states.counts.values()) == {3}
    assert [(info.dtype, info.wd_mult, info.lr_mult) for info in states.parameters] == [
        ('float32', 1.0, 1.0), ('float32', 1.0, 1.0), ('float32', 0.0, 1.0)]
    assert states.slots['bias']['var'].tobytes() == optimizer.state[params['bias']]['exp_avg_sq'].numpy().tobytes()
    assert states.hypers['learning_rate'] == 0.1 and states.hypers['wd'] == 0.01


# -- from a Gluon Trainer and back -------------------------------------------------------------------------------------

class GluonRun:
    """Parameters in a real `gluon.Trainer`, whose gradients are given."""

    def __init__(self, name, hypers, dtype, weights):
        mx = pytest.importorskip('mxnet')
        self.mx, self.params = mx, {}
        for key, w in weights.items():
            self.params[key] = mx.gluon.Parameter(key, shape=w.shape, dtype=dtype)
            self.params[key].initialize()
            self.params[key].set_data(mx.nd.array(w, dtype=dtype))
        made = go.create(name, multi_precision=dtype == 'float16', **hypers)
        self.trainer = mx.gluon.Trainer(list(self.params.values()), made)

    def step(self, gradients, lr, batch_size=4):
        with self.mx.autograd.record():  # the gradient of a loss that is summed over the batch
            losses = [(p.data() * self.mx.nd.array(gradients[key], dtype=p.dtype)).sum() * batch_size
                      for key, p in self.params.items()]
        self.mx.autograd.backward(losses)
        self.trainer.set_learning_rate(lr)
        self.trainer.step(batch_size)

    def weights(self):
        """The weights that training goes on from: masters where there are any."""
        from gluon_optim.mxnet.trainer import export_states
        return {key: export_states(self.trainer).master.get(key, p.data().asnumpy()) for key, p in self.params.items()}


SPINE = [('novograd', {}), ('adamw', {'amsgrad': True}), ('sgd_torch', {'momentum': 0.9, 'dampening': 0.3})]
# MXNet reads 1 - beta2 of 0.999 as 1.3e-5 less than it is
MXNETS = [(name, {'beta2': 0.999} if 'beta2' in [hyper.name for hyper in rules.get(name).hypers] else {})
          for name in DROP_INS if mirrored(rules.get(name))] + [('rmsprop', {'centered': True})]
GLUON = [(name, hypers, dtype) for name, hypers in SPINE for dtype in ('float32', 'float64', 'float16')] + [
    ('novograd', {'variant': variant}, 'float32') for variant in ('jasper', 'openseq2seq', 'tfa', 'apex')] + [
    (name, {}, 'float32') for name in rules.names() if name not in dict(SPINE)] + [
    (name, hypers, dtype) for name, hypers in MXNETS for dtype in ('float32', 'float64', 'float16')] + [
    (name, {}, 'float16') for name in rules.names() if name not in dict(SPINE)]


@pytest.mark.parametrize('name, hypers, dtype', GLUON, ids=['-'.join([x[0], *map(str, x[1].values()), x[2]]) for x in GLUON])
def test_a_gluon_run_goes_on_in_torch_and_comes_back(name, hypers, dtype):
    hypers = {key: value for key, value in settings(name, hypers).items() if key not in ('rescale_grad', 'clip_gradient')}
    weights, gradients = weights_and_gradients(dtype, 30)
    run = GluonRun(name, hypers, dtype, weights)
    from gluon_optim.mxnet.trainer import export_states, import_states, states_digest
    for t in range(1, 11):
        run.step(gradients[t - 1], rate(t))
    states = export_states(run.trainer)
    state_dict = through_a_file(to_torch(states))
    assert digest(from_torch(state_dict, params=states.parameters)) == digest(states) == states_digest(run.trainer)

    params = parameters({key: p.data().asnumpy() for key, p in run.params.items()})
    optimizer = create(name, params.values())
    optimizer.load_state_dict(state_dict)
    travelled, before = dict.fromkeys(params, 0.0), run.weights()
    for t in range(11, 31):
        run.step(gradients[t - 1], rate(t))
        step(optimizer, params, gradients[t - 1], rate(t))
        now = run.weights()
        for key in params:
            travelled[key] += np.abs(now[key] - before[key]).max()
        before = now
    mine = {key: optimizer.state[p].get('master', p).detach().numpy() for key, p in params.items()}
    assert_near(mine, export_states(run.trainer), before, travelled, roundings=8 if name == 'ftml' else 4)
    assert min(travelled.values()) > 1e-3

    other = GluonRun(name, hypers, dtype, {key: p.detach().numpy() for key, p in params.items()})
    back = from_torch(optimizer.state_dict(), params=states.parameters)
    with pytest.warns(UserWarning, match='learning_rate is .* in the trainer and .* in the file'):
        report = import_states(other.trainer, back)
    assert report.restored == list(params) and report.step == 30
    assert states_digest(other.trainer) == digest(back)


@pytest.mark.parametrize('name', ['nadam', 'lars', 'lbsgd', 'sgld', 'psgld'])
def test_what_is_more_than_a_rule_is_refused(name):
    with pytest.raises(ValueError, match='no mirror'):
        create(name, [torch.nn.Parameter(torch.ones(2))], lr=0.1)


# Names

@pytest.mark.skipif(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 6), reason='optimizers know no names')
def test_names_that_both_sides_have_must_be_in_one_order():
    states = OptimizerStates('sgd_torch', dict(learning_rate=0.1, momentum=0.9), 1, [], {}, {})
    for name, value in (('10.weight', 1.0), ('2.weight', 2.0)):
        states.parameters.append(ParameterInfo(name, name, (2,), 'float32'))
        states.counts[name], states.slots[name] = 1, {'momentum_buffer': np.full(2, value, 'float32')}
    named = [(name, torch.nn.Parameter(torch.zeros(2))) for name in ('2.weight', '10.weight')]
    optimizer = create('sgd_torch', named)
    with pytest.raises(ValueError, match="'10.weight' at position 0 of the state and 1 of this optimizer"):
        optimizer.load_state_dict(to_torch(states))
    assert not optimizer.state
    optimizer.load_state_dict(to_torch(states, params=['2.weight', '10.weight']))
    assert [float(optimizer.state[param]['momentum_buffer'][0]) for _, param in named] == [2.0, 1.0]

    renamed = create('sgd_torch', [('a', named[0][1]), ('b', named[1][1])])
    renamed.load_state_dict(to_torch(states, params=['2.weight', '10.weight']))
    assert renamed.param_groups[0]['param_names'] == ['a', 'b']  # its own


def test_running_statistics_are_left_out():
    infos = [ParameterInfo(name, name, (2,), 'float32') for name in ('1.gamma', '1.running_mean', '1.beta')]
    states = OptimizerStates('sgd_torch', dict(learning_rate=0.1, momentum=0.9), 1, infos, {}, {})
    for name in ('1.gamma', '1.beta'):
        states.counts[name], states.slots[name] = 1, {'momentum_buffer': np.ones(2, 'float32')}
    assert to_torch(states)['param_groups'][0]['param_names'] == ['1.gamma', '1.beta']


def test_the_rate_of_a_scheduler_counts():
    """MXNet's own files have the rate with which the optimizer was made, and a scheduler that has gone on."""
    infos = [ParameterInfo('w', 'w', (2,), 'float32')]
    slots = {'w': {'momentum': np.ones(2, 'f4')}}
    states = OptimizerStates('sgd', dict(learning_rate=0.25, momentum=0.9), 4, infos, {'w': 4}, slots,
                             scheduler={'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': {'base_lr': 0.125}})
    assert to_torch(states)['param_groups'][0]['lr'] == 0.125
    state_dict = to_torch(states, 'torch', allow_lossy=True)
    assert state_dict['param_groups'][0]['lr'] == 0.125 and float(state_dict['state'][0]['momentum_buffer'][0]) == -8.0


@pytest.mark.parametrize('scheduler, rate, following, first', [
    ({'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': dict(
        step=3, factor=0.5, stop_factor_lr=1e-8, count=6, base_lr=0.1, warmup_steps=0, warmup_begin_lr=0, warmup_final_lr=0.4,
        warmup_mode='linear')}, 0.1, 0.05, 0.4),
    ({'class': 'mxnet.lr_scheduler.CosineScheduler', 'attributes': dict(
        max_update=20, final_lr=0, base_lr=0.2, base_lr_orig=0.4, max_steps=20, warmup_steps=0, warmup_begin_lr=0,
        warmup_final_lr=0.4, warmup_mode='linear')}, 0.2, 0.2 * (1 + np.cos(0.55 * np.pi)), 0.4),
    ({'class': 'somebody.elses.Scheduler', 'attributes': {'base_lr': 0.1}}, 0.1, 0.1, None), (None, 0.1, 0.1, None)])
@pytest.mark.parametrize('target', ['mirror', 'torch'])
def test_schedules_in_pytorch_start_from_the_first_rate_and_not_from_what_is_left_of_it(target, scheduler, rate, following, first):
    """The groups have the rate of the next update."""
    h = dict(rules.get('adamw').hyperparameters(learning_rate=rate).asdict())
    infos = [ParameterInfo(name, name, (2,), 'float32', lr_mult=mult) for name, mult in (('w', 1.0), ('b', 2.0))]
    slots = {info.name: {slot: np.ones(2, 'float32') for slot in ('mean', 'var')} for info in infos}
    states = OptimizerStates('adamw', h, 10, infos, {'w': 10, 'b': 10}, slots, scheduler=scheduler)
    state_dict = to_torch(states, target)
    groups = state_dict['param_groups']
    assert [group['lr'] for group in groups] == pytest.approx([following, 2 * following], rel=1e-15)
    assert [group.get('initial_lr') for group in groups] == ([first, 2 * first] if first else [None, None])
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in infos]
    make = create if target == 'mirror' else lambda name, *arguments: torch.optim.AdamW(*arguments)
    optimizer = make('adamw', [{'params': [weight]} for weight in weights])
    optimizer.load_state_dict(state_dict)
    if first:
        resumed = torch.optim.lr_scheduler.StepLR(optimizer, 1000, last_epoch=10)
        assert resumed.base_lrs == [first, 2 * first]
    back = from_torch(state_dict, optimizer='adamw', target=target)
    assert back.hypers['learning_rate'] == rate
