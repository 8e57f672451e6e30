"""Half-precision weights that keep their rounding error in place of a float32 master: `gluon_optim.rules.compensated`."""
import copy
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('numba')
from conversion_runs import NAMES, hyper_sets, rate  # noqa: E402
from test_torch_kernels import XP, everything, feed, launched, parameters, steps  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim import rules  # noqa: E402
from gluon_optim.rules.base import initial_slot, scalars  # noqa: E402
from gluon_optim.rules.compensated import compensated  # noqa: E402
from gluon_optim.states import container, inspection  # noqa: E402
from gluon_optim.states.model import digest  # noqa: E402
from gluon_optim.torch import create  # noqa: E402

HALVES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}
DIGITS = {'float16': 11, 'bfloat16': 8}   # significant bits


def rounded(x, dtype):
    """float32 numbers, rounded to nearest even to a type of 16 bits: by NumPy, or as integers."""
    x = np.asarray(x, np.float32)
    if dtype == 'float16':
        with np.errstate(over='ignore'):
            return x.astype(np.float16).astype(np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7fff + ((bits >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xffff0000)
    return np.where(np.isnan(x), x, bits.astype(np.uint32).view(np.float32))


def split(x, dtype):
    """A weight and its compensation, from the exact weight in float32."""
    weight = rounded(x, dtype)
    with np.errstate(invalid='ignore'):
        lost = np.asarray(x, np.float32) - weight
    return weight, rounded(np.where(np.isfinite(lost), lost, 0), dtype)


def exact(optimizer, param):
    """The float32 weight that the optimizer knows."""
    state = optimizer.state[param]
    if 'compensation' in state:
        return param.detach().float() + state['compensation'].float()
    return state.get('master', param).detach().float()


# The numbers

@pytest.mark.parametrize('dtype', HALVES)
def test_the_pair_has_the_digits_that_the_documentation_promises(dtype):
    """17 significant bits in bfloat16; 23 in float16, and nothing below 2^-25."""
    random = np.random.default_rng(0)
    x = (random.choice([-1, 1], 200000) * 2.0 ** random.uniform(-30, 14, 200000)).astype('float32')
    rule = compensated(rules.get('sgd_torch'), dtype)
    w, slots = rule.run(np, rule.hyperparameters(learning_rate=1.0), 1, np.zeros_like(x), -x, {'compensation': np.zeros_like(x)})
    np.testing.assert_array_equal(w, split(x, dtype)[0])
    np.testing.assert_array_equal(slots['compensation'], split(x, dtype)[1])
    bits = {'float16': 23, 'bfloat16': 17}[dtype]
    apart = np.abs((w + slots['compensation']).astype('float64') - x)
    bound = np.maximum(2.0 ** (np.floor(np.log2(np.abs(x))) - bits), 2.0 ** -25 if dtype == 'float16' else 0)
    assert (apart <= bound).all() and (apart > bound / 4).any()   # and no more than that


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('name', NAMES)
def test_kernels_are_the_rule_on_the_sum_of_weight_and_compensation(name, dtype):
    """Bit for bit: the rule in single precision, between a sum and two roundings that are written here."""
    rule, hypers = rules.get(name), hyper_sets(name)['other']
    params = parameters(HALVES[dtype])
    expected = [(np.atleast_1d(p.detach().float().numpy()), np.zeros(p.shape or (1,), 'float32'), None) for p in params]
    optimizer = create(name, params, fused=True, multi_precision='kahan', **hypers)
    for t in range(1, 5):
        steps(optimizer, params, t, t)
        h = rule.hyperparameters(**dict(hypers, learning_rate=rate(t)))
        c = {key: np.float32(value) for key, value in rule.all_coefficients(rule.numbers(scalars, 'float32'), h, t).items()}
        for i, (w, lost, slots) in enumerate(expected):
            slots = slots or {slot.name: np.atleast_1d(np.float32(initial_slot(slot, w))) for slot in rule.slots(h)}
            with np.errstate(all='ignore'):
                new, slots = rule.apply(XP, rule.static(h), c, w + lost, np.atleast_1d(params[i].grad.float().numpy()), slots)
            expected[i] = (*split(new, dtype), slots)
    assert launched(optimizer) == (1, 0)
    for p, (w, lost, slots) in zip(params, expected):
        state = optimizer.state[p]
        assert state['compensation'].dtype == p.dtype and 'master' not in state
        np.testing.assert_array_equal(np.atleast_1d(p.detach().float().numpy()), w)
        np.testing.assert_array_equal(np.atleast_1d(state['compensation'].float().numpy()), lost)
        for slot in rule.slots(h):
            np.testing.assert_array_equal(np.atleast_1d(state[slot.torch or slot.name].numpy()), slots[slot.name])


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('name', ['adamw', 'novograd', 'sgd_torch'])
def test_operations_do_what_kernels_do(name, dtype):
    """Where PyTorch has no root or product with a coefficient: bit for bit. Elsewhere it rounds some of them otherwise."""
    runs = []
    for fused in (True, False):
        params = parameters(HALVES[dtype])
        optimizer = steps(create(name, params, fused=fused, multi_precision='kahan', wd=0.01), params)
        runs.append((everything(optimizer, params), [exact(optimizer, p) for p in params]))
    if name == 'sgd_torch':
        assert all(map(torch.equal, *(numbers for numbers, _ in runs)))
    bits, least = {'float16': (22, 2.0 ** -24), 'bfloat16': (16, 0)}[dtype]
    for a, b in zip(*(weights for _, weights in runs)):
        assert float((a - b).abs().max()) <= max(2.0 ** -bits * float(a.abs().max()), least)


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('dtype', HALVES)
def test_a_weight_that_overflows_is_as_without_a_master(dtype, fused):
    """Its compensation is 0; and what rounds down to the largest number is kept."""
    largest = torch.finfo(HALVES[dtype]).max
    little = 2.0 ** (np.floor(np.log2(largest)) - DIGITS[dtype] - 1)   # a quarter of the distance to the number before
    ends = []
    for mode in ('kahan', False):
        param = torch.nn.Parameter(torch.tensor([largest, largest, 1.0, 1.0]).to(HALVES[dtype]))
        optimizer = create('sgd_torch', [param], lr=1.0, fused=fused, multi_precision=mode)
        for t, gradient in enumerate(([-largest / 4, -little, 0.0, float('nan')], [-1.0, 0, 0, 0], [1.0, 0, 0.25, 0])):
            param.grad = torch.tensor(gradient).to(HALVES[dtype])
            optimizer.step()
            if t == 0:
                np.testing.assert_array_equal(param.detach().double().numpy(), [np.inf, largest, 1, np.nan])
            if mode == 'kahan':
                assert optimizer.state[param]['compensation'].tolist() == [0, little, 0, 0]
        ends.append(param.detach().double().numpy())
    np.testing.assert_array_equal(*ends)


def test_memory_is_half_of_what_masters_take():
    taken = {}
    for mode in (False, True, 'kahan'):
        params = parameters(torch.bfloat16)
        optimizer = steps(create('adamw', params, multi_precision=mode), params)
        taken[mode] = sum(x.numel() * x.element_size() for p in params for x in optimizer.state[p].values())
    assert taken['kahan'] - taken[False] == 2 * sum(p.numel() for p in params)
    assert taken[True] - taken[False] == 2 * (taken['kahan'] - taken[False])


# Training: it ends where masters end

def quadratic(dtype, mode, updates=2000):
    """Mean squared distance from the minimum of a quadratic with curvatures from 0.01 to 1, after AdamW with a falling rate."""
    random = np.random.default_rng(0)
    minimum = torch.tensor(random.normal(size=400), dtype=torch.float32)
    curvature = torch.logspace(-2, 0, 400)
    param = torch.nn.Parameter(torch.zeros(400, dtype=dtype))
    optimizer = create('adamw', [param], wd=0.0, multi_precision=mode)
    for t in range(updates):
        optimizer.param_groups[0]['lr'] = 0.01 * (1 - t / updates) ** 2
        param.grad = (curvature * (param.detach().float() - minimum)).to(dtype)
        optimizer.step()
    return float((curvature * (exact(optimizer, param) - minimum) ** 2).mean())


@pytest.mark.parametrize('dtype', HALVES)
def test_a_quadratic_ends_where_it_ends_with_masters(dtype):
    """bfloat16: 1.50e-5 with masters, 1.52e-5 with compensations, 1.0e-2 without either. float16: 1.455e-5 twice, and 3.3e-4."""
    ends = {mode: quadratic(HALVES[dtype], mode) for mode in (True, 'kahan', False)}
    print(dtype, ends)
    assert ends['kahan'] <= 1.05 * ends[True] + 1e-12
    assert ends[False] > 10 * ends[True]


def digits(dtype, mode, epochs=15):
    """Training loss, and accuracy on digits that were not trained on, of a small net with a small rate."""
    data = pytest.importorskip('sklearn.datasets').load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10)).to(dtype)
    optimizer = create('sgd_torch', net.parameters(), lr=0.01, momentum=0.9, multi_precision=mode)
    order = torch.Generator().manual_seed(0)

    def outputs(rows):
        hidden = torch.tanh(torch.nn.functional.linear(x[rows], net[0].weight.float(), net[0].bias.float()))
        return torch.nn.functional.linear(hidden, net[2].weight.float(), net[2].bias.float())

    for _ in range(epochs):
        for rows in torch.randperm(1500, generator=order).split(50):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(outputs(rows), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        loss = float(torch.nn.functional.cross_entropy(outputs(torch.arange(1500)), y[:1500]))
        return loss, float((outputs(torch.arange(1500, 1797)).argmax(1) == y[1500:]).float().mean())


def test_digits_end_where_they_end_with_masters():
    """Loss and accuracy are 0.1808 and 88.2% with masters and with compensations, 0.306 without either."""
    ends = {mode: digits(torch.bfloat16, mode) for mode in (True, 'kahan', False)}
    print(ends)
    assert abs(ends['kahan'][0] - ends[True][0]) < 0.02 * ends[True][0]
    assert abs(ends['kahan'][1] - ends[True][1]) < 0.01
    assert ends[False][0] > 1.1 * ends[True][0]   # small updates round away


# The state in PyTorch

@pytest.mark.parametrize('dtype', HALVES)
def test_a_loaded_state_continues_bit_for_bit(dtype, tmp_path):
    params = parameters(HALVES[dtype])
    optimizer = steps(create('novograd', params, multi_precision='kahan'), params)
    torch.save(optimizer.state_dict(), tmp_path / 'optimizer.pt')
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = create('novograd', others)   # the file says that it is 'kahan', as it says everything of a group
    other.load_state_dict(torch.load(tmp_path / 'optimizer.pt', weights_only=True))
    assert other.param_groups[0]['multi_precision'] == 'kahan'
    steps(optimizer, params, 5, 6)
    steps(other, others, 5, 6)
    assert all(map(torch.equal, everything(optimizer, params), everything(other, others)))


def test_a_state_with_a_compensation_belongs_to_parameters_of_its_type():
    params = parameters(torch.bfloat16)
    saved = steps(create('adamw', params, multi_precision='kahan'), params).state_dict()
    for dtype in (torch.float32, torch.float16):
        other = create('adamw', parameters(dtype), multi_precision='kahan')
        with pytest.raises(ValueError, match=r'Parameter 0 .*must be torch.bfloat16.*add the compensation'):
            other.load_state_dict(copy.deepcopy(saved))
        assert not other.state
    params[0].data = params[0].data.float()
    optimizer = create('adamw', params)
    optimizer.state.update({p: saved['state'][i] for i, p in enumerate(params)})
    feed(params, 1)
    with pytest.raises(ValueError, match='must be torch.bfloat16, as its compensation'):
        optimizer.step()


@pytest.mark.parametrize('key', ['compensation', 'exp_avg'])
@pytest.mark.parametrize('wrong', [torch.zeros(2), torch.zeros(()), torch.zeros(5, 3), torch.zeros(1), 0.0, None, [1.0]])
def test_what_cannot_belong_to_the_parameter_is_refused(key, wrong):
    """In a state to be loaded, and where it was put into the optimizer's own."""
    wrong = wrong.bfloat16() if isinstance(wrong, torch.Tensor) and key == 'compensation' else wrong
    params = parameters(torch.bfloat16)
    for fused in (True, False):
        optimizer = steps(create('adamw', params, multi_precision='kahan', fused=fused), params)
        saved = copy.deepcopy(optimizer.state_dict())
        saved['state'][1][key] = wrong
        before = [tensor.clone() for tensor in everything(optimizer, params)]
        with pytest.raises(ValueError, match=rf"'{key}' of parameter 1 must (have shape|be an array).*Received: "):
            optimizer.load_state_dict(saved)
        assert all(map(torch.equal, before, everything(optimizer, params)))
        optimizer.state[params[1]][key] = wrong
        weights = [param.detach().clone() for param in params]
        feed(params, 9)
        with pytest.raises(ValueError, match=f"'{key}' in the state of a parameter .* must be a tensor of shape .*Received: "):
            optimizer.step()
        assert all(map(torch.equal, weights, params))
        del optimizer.state[params[1]][key]


@pytest.mark.parametrize('saved, claimed, has', [(True, 'kahan', 'a master'), ('kahan', True, 'a compensation'),
                                                 ('kahan', False, 'a compensation')])
def test_a_group_and_its_states_must_agree(saved, claimed, has):
    params = parameters(torch.bfloat16)
    state = steps(create('adamw', params, multi_precision=saved), params).state_dict()
    state['param_groups'][0]['multi_precision'] = claimed
    with pytest.raises(ValueError, match=f'must have a master for multi_precision=True.*Received: {has} in a group with'):
        create('adamw', parameters(torch.bfloat16)).load_state_dict(state)
    params = parameters(torch.bfloat16)
    optimizer = steps(create('adamw', params, multi_precision=saved), params)
    optimizer.param_groups[0]['multi_precision'] = claimed   # what it would save, nothing could load
    before = [param.detach().clone() for param in params]
    feed(params, 9)
    with pytest.raises(ValueError, match=f'must have a master for multi_precision=True.*Received: {has} in a group with'):
        optimizer.step()
    assert all(map(torch.equal, before, params))


@pytest.mark.parametrize('value', ['Kahan', 'master', 1, None])
def test_other_values_are_refused(value):
    with pytest.raises((ValueError, TypeError), match="`multi_precision` must be one of False, True, 'kahan'"):
        create('adamw', parameters(torch.bfloat16), multi_precision=value)
    params = parameters(torch.bfloat16)
    optimizer = steps(create('adamw', params, multi_precision='kahan'), params)
    optimizer.param_groups[0]['multi_precision'] = value
    feed(params, 9)
    with pytest.raises((ValueError, TypeError), match="`multi_precision` must be one of False, True, 'kahan'"):
        optimizer.step()


def test_groups_of_either_kind_in_one_optimizer():
    """Each in a launch of its own, with float32 parameters, which need neither, in a third."""
    def run(fused):
        params = [*parameters(torch.bfloat16, [(4,)] * 4), *parameters(torch.float32, [(4,)])]
        groups = [dict(params=params[:2], multi_precision='kahan'), dict(params=params[2:4]), dict(params=params[4:])]
        return steps(create('sgd_torch', groups, momentum=0.9, fused=fused), params), params
    (optimizer, params), (plain, others) = run(True), run(False)
    assert launched(optimizer) == (3, 0)
    held = [sorted({'master', 'compensation'}.intersection(optimizer.state[p])) for p in params]
    assert held == [['compensation'], ['compensation'], ['master'], ['master'], []]
    assert all(map(torch.equal, everything(optimizer, params), everything(plain, others)))


def test_layouts_and_views():
    images = torch.nn.Parameter(torch.randn(4, 3, 5, 5).bfloat16().to(memory_format=torch.channels_last))
    view = torch.nn.Parameter(torch.randn(6, 8).bfloat16()[:, ::2])   # which no kernel takes
    copies = [torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in (images, view)]
    optimizer, plain = (create('sgd_torch', params, momentum=0.9, multi_precision='kahan') for params in ((images, view), copies))
    steps(optimizer, [images, view])
    steps(plain, copies)
    assert launched(optimizer) == (1, 1) and launched(plain) == (1, 0)
    assert optimizer.state[images]['compensation'].stride() == images.stride()
    for p, q in zip((images, view), copies):
        assert torch.equal(p, q) and torch.equal(optimizer.state[p]['compensation'], plain.state[q]['compensation'])


def test_scaled_gradients_and_skipped_steps():
    """What PyTorch's GradScaler does needs no more than it did: a step with an infinite gradient changes nothing."""
    params = parameters(torch.bfloat16)   # PyTorch unscales no float16 gradients
    optimizer = create('adamw', params, multi_precision='kahan')
    scaler = torch.amp.GradScaler('cpu', init_scale=8.0) if hasattr(torch.amp, 'GradScaler') else pytest.skip('of PyTorch 2.3')
    for t, spoiled in ((1, False), (2, True), (3, False)):
        before = everything(optimizer, params)
        for p in params:
            p.grad = torch.full_like(p, float('inf') if spoiled else t * 8.0)
        scaler.scale(torch.ones(()))   # which makes the scale
        scaler.step(optimizer)
        scaler.update()
        assert all(map(torch.equal, before, everything(optimizer, params))) == spoiled


# Files and conversions

def converted(name='adamw', dtype='float16', updates=3):
    """States of a run in PyTorch, and that run."""
    params = parameters(HALVES[dtype])
    optimizer = steps(create(name, params, multi_precision='kahan'), params, 1, updates)
    return params, optimizer, {f'p{i}': p for i, p in enumerate(params)}


@pytest.mark.parametrize('name', ['adamw', 'sgd_torch', 'novograd'])
def test_there_and_back(name, tmp_path):
    params, optimizer, named = converted(name)
    states = go.from_torch(optimizer.state_dict(), params=named)
    assert {info.dtype for info in states.parameters} == {'float16'} and not states.master
    container.write(str(tmp_path / 'run.safetensors'), states)
    states = go.read_states(str(tmp_path / 'run.safetensors'))
    assert [states.slots[key]['compensation'].dtype for key in named] == ['float16'] * len(named)
    again = go.to_torch(states)
    assert any("'compensation'" in line for line in states.report)
    assert [group['multi_precision'] for group in again['param_groups']] == ['kahan']
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = create(name, others)
    other.load_state_dict(again)
    steps(optimizer, params, 4, 5)
    steps(other, others, 4, 5)
    assert all(map(torch.equal, everything(optimizer, params), everything(other, others)))
    nameless = go.from_torch(optimizer.state_dict())   # shapes and types from the state
    assert {info.dtype for info in nameless.parameters} == {'float16'}


def test_the_digest_and_the_checks_see_it():
    _, optimizer, named = converted()
    states = go.from_torch(optimizer.state_dict(), params=named)
    assert inspection.missing(states) == []
    changed = copy.deepcopy(states)
    changed.slots['p0']['compensation'][0, 0] += 1
    assert digest(changed) != digest(states)
    del changed.slots['p0']['compensation']
    assert inspection.missing(changed) == ["p0 must have the slots ['compensation', 'mean', 'var'], but has ['mean', 'var']"]
    changed = copy.deepcopy(states)
    changed.slots['p0']['compensation'] = changed.slots['p0']['compensation'].ravel()
    assert inspection.missing(changed) == ['p0/compensation has the shape [15], but the weight has [5, 3]']
    changed = copy.deepcopy(states)
    changed.parameters[0].dtype = 'float32'
    assert any("p0 must have the slots ['mean', 'var']" in line for line in inspection.missing(changed))


def test_what_cannot_hold_it_says_so():
    _, optimizer, named = converted()
    states = go.from_torch(optimizer.state_dict(), params=named)
    words = r"would lose .*the compensations of the float16 parameters 'p0', 'p1', .*float32, weight.astype\('float32'\) \+"
    with pytest.raises(ValueError, match=words):
        go.to_torch(states, 'torch')
    assert 'compensation' not in go.to_torch(states, 'torch', allow_lossy=True)['state'][0]
    assert any(line.startswith('lost: the compensations of the float16 parameters') for line in states.report)
    if pytest.importorskip('optax'):
        with pytest.raises(ValueError, match='optax ' + words):
            go.to_optax(states)
        with pytest.raises(ValueError, match='`multi_precision` must be True or False in optax'):
            go.optax.create('adamw', multi_precision='kahan')
    if pytest.importorskip('onnx'):
        with pytest.raises(ValueError, match='ONNX ' + words):
            go.to_onnx(states, weights={key: p.detach().numpy() for key, p in named.items()})


def test_bfloat16_stays_in_pytorch():
    _, optimizer, named = converted(dtype='bfloat16')
    with pytest.raises(ValueError, match='must be float16 in MXNet.*Make the parameters float32, param.data = param.float'):
        go.from_torch(optimizer.state_dict(), params={key: p.float() for key, p in named.items()})


def test_a_compensation_of_another_weight_is_refused():
    _, optimizer, named = converted()
    with pytest.raises(ValueError, match="compensation of 'p0' must be of the type of its weight.*float16 for a weight of float32"):
        go.from_torch(optimizer.state_dict(), params={key: p.float() for key, p in named.items()})


def test_weights_of_a_model_are_exact():
    """A model's weights are those that its optimizer knows; where they stay float16, it gets masters with all digits."""
    from gluon_optim.models import model_to_torch
    net = torch.nn.Sequential(torch.nn.Linear(5, 3)).half()
    optimizer = create('adamw', net.parameters(), multi_precision='kahan')
    for t in range(1, 4):
        feed(list(net.parameters()), t)
        optimizer.step()
    states = go.from_torch(optimizer.state_dict(), params=dict(net.named_parameters()))
    arrays = {key: p.detach().numpy() for key, p in net.named_parameters()}
    model = model_to_torch(arrays, states=states)
    for key, p in net.named_parameters():
        np.testing.assert_array_equal(model.weights[key], exact(optimizer, p).numpy())
    assert 'compensation' not in model.states().slots['0.weight']
    with pytest.raises(ValueError, match=r"weight '0.weight' must have the type and shape of its compensation, float16\[3, 5\]"):
        model_to_torch({key: array.astype('float32') for key, array in arrays.items()}, states=states)
    half = model_to_torch(arrays, like=net, states=states)
    np.testing.assert_array_equal(half.states().master['0.weight'], exact(optimizer, net[0].weight).numpy())


def test_a_rule_may_not_have_a_slot_of_that_name():
    from gluon_optim.schema import Slot
    rule = type('Taken', (rules.get('sgd_torch'),), {'name': 'taken', 'slots': staticmethod(lambda h: (Slot('compensation'),))})
    with pytest.raises(TypeError, match="names other than 'weight', 'master', 'compensation'"):
        rules.add(rule)
    assert 'taken' not in rules.names()


def test_the_command_line_shows_it(tmp_path):
    params, optimizer, named = converted()
    path = str(tmp_path / 'run.states')
    container.write(path, go.from_torch(optimizer.state_dict(), params=named))
    out = subprocess.run([sys.executable, '-m', 'gluon_optim', 'inspect', path], capture_output=True, text=True)
    assert out.returncode == 0 and 'compensation' in out.stdout, out.stderr
    steps(optimizer, params, 4, 4)
    container.write(path + '2', go.from_torch(optimizer.state_dict(), params=named))
    out = subprocess.run([sys.executable, '-m', 'gluon_optim', 'diff', path, path + '2'], capture_output=True, text=True)
    assert out.returncode == 1 and 'compensation' in out.stdout, out.stderr
    out = subprocess.run([sys.executable, '-m', 'gluon_optim', 'verify', path], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    arguments = [path, '--to', 'torch', '--output', str(tmp_path / 'run.pt'), '--verify', '4']
    out = subprocess.run([sys.executable, '-m', 'gluon_optim', 'convert', *arguments], capture_output=True, text=True)
    assert out.returncode == 0 and 'steps in PyTorch' in out.stdout + out.stderr, out.stdout + out.stderr
