"""Compiled kernels on PyTorch's memory, on the CPU: against the rule in NumPy, and whatever may lie or change in that memory."""
import copy
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from conversion_runs import NAMES, hyper_sets, rate

from gluon_optim import rules
from gluon_optim.rules.base import initial_slot, scalars

torch = pytest.importorskip('torch')
pytest.importorskip('numba')
from gluon_optim.torch import create, executors  # noqa: E402

SHAPES = [(5, 3), (7,), (), (300, 67), (1,)]  # one of more than a block, and a length that no block divides


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0):
    random = np.random.default_rng(seed)
    return [torch.nn.Parameter(torch.tensor(random.normal(size=shape)).to(dtype)) for shape in shapes]


def feed(params, t):
    random = np.random.default_rng(100 + t)
    for p in params:
        p.grad = torch.tensor(random.normal(size=p.shape)).to(p.dtype)


def steps(optimizer, params, begin=1, end=4):
    for t in range(begin, end + 1):
        feed(params, t)
        for group in optimizer.param_groups:
            group['lr'] = rate(t)
        optimizer.step()
    return optimizer


def everything(optimizer, params):
    states = [value.clone() for p in params for _, value in sorted(optimizer.state[p].items())]
    return [p.detach().clone() for p in params] + states


def launched(optimizer):
    """How many launches a step makes, and how many parameters are updated without."""
    return len(optimizer._launches._batches), len(optimizer._launches._alone)


class XP:
    """The array namespace of rules on NumPy, with sums in double and everything else in single precision."""

    sqrt, abs, exp, sign = np.sqrt, np.abs, np.exp, np.sign
    minimum, maximum = np.minimum, np.maximum

    @staticmethod
    def sum(x):
        return np.atleast_1d(np.float32(np.sum(x, dtype=np.float64)))

    @staticmethod
    def where(condition, x, y):
        return np.where(condition, np.float32(x), np.float32(y))


@pytest.mark.parametrize('name', NAMES)
def test_single_precision_is_the_rule_bit_for_bit(name):
    rule, hypers = rules.get(name), hyper_sets(name)['other']
    params = parameters()
    expected = [(np.atleast_1d(p.detach().numpy().copy()), None) for p in params]  # NumPy 1 computes with shape () in double
    optimizer = create(name, params, fused=True, **hypers)
    for t in range(1, 5):
        steps(optimizer, params, t, t)
        h = rule.hyperparameters(**dict(hypers, learning_rate=rate(t)))
        c = {key: np.float32(value) for key, value in rule.all_coefficients(rule.numbers(scalars, 'float32'), h, t).items()}
        for i, (w, slots) in enumerate(expected):
            slots = slots or {slot.name: np.atleast_1d(np.float32(initial_slot(slot, w))) for slot in rule.slots(h)}
            with np.errstate(all='ignore'):
                expected[i] = rule.apply(XP, rule.static(h), c, w, np.atleast_1d(params[i].grad.numpy()), slots)
    assert launched(optimizer) == (1, 0)
    for p, (w, slots) in zip(params, expected):
        np.testing.assert_array_equal(np.atleast_1d(p.detach().numpy()), w)
        for slot in rule.slots(h):
            np.testing.assert_array_equal(np.atleast_1d(optimizer.state[p][slot.torch or slot.name].numpy()), slots[slot.name])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('multi_precision', [True, False])
@pytest.mark.parametrize('name', ['adamw', 'novograd', 'lamb', 'sgd_torch'])
def test_kernels_and_operations_agree(name, multi_precision, dtype):
    """PyTorch's own square root is not always correctly rounded: they differ by that."""
    hypers = dict(hyper_sets(name)['other'], multi_precision=multi_precision)
    first = [p.detach().double() for p in parameters(dtype)]
    runs = []
    for fused in (True, False):
        params = parameters(dtype)
        optimizer = steps(create(name, params, fused=fused, **hypers), params)
        assert launched(optimizer) == ((1, 0) if fused else (0, len(SHAPES)))
        runs.append([optimizer.state[p].get('master', p).detach().double() for p in params])
        for p in params:
            if 'master' in optimizer.state[p]:
                assert torch.equal(p.detach(), optimizer.state[p]['master'].to(dtype))
    exact = torch.float32 if multi_precision and dtype in executors.HALVES else dtype
    for kernel, operations, start in zip(*runs, first):
        way, rounding = float((operations - start).abs().max()), torch.finfo(exact).eps
        assert float((kernel - operations).abs().max()) <= rounding * (16 * way + 2 * float(operations.abs().max()))


def test_groups_types_and_counts_share_launches():
    """Two groups of one kind in one launch, with their own numbers and their own counts; another type in one of its own."""
    def run(fused):
        params = parameters(shapes=[(4,)] * 6)
        params[4] = torch.nn.Parameter(params[4].detach().double())
        groups = [{'params': params[:2], 'lr': 0.3}, {'params': params[2:], 'wd': 0.2, 'beta1': 0.5}]
        optimizer = create('adamw', groups, fused=fused)
        feed(params[:3], 1)
        optimizer.step()   # three are one update ahead
        steps(optimizer, params)
        return optimizer, params

    (optimizer, params), (plain, others) = run(True), run(False)
    assert launched(optimizer) == (2, 0)
    assert [int(optimizer.state[p]['step']) for p in params] == [5, 5, 5, 4, 4, 4]
    for a, b in zip(everything(optimizer, params), everything(plain, others)):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


def test_any_dense_layout_and_operations_for_others():
    images = torch.nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
    view = torch.nn.Parameter(torch.randn(6, 8)[:, ::2])  # not dense
    params = [images, view, torch.nn.Parameter(torch.randn(3))]
    copies = [torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]
    optimizer, plain = create('adamw', params), create('adamw', copies, fused=False)
    for t in range(1, 5):
        feed(params, t)  # the gradients are contiguous: another layout than the images'
        if t % 2:
            images.grad = images.grad.to(memory_format=torch.channels_last)
        for p, q in zip(params, copies):
            q.grad = p.grad.clone(memory_format=torch.contiguous_format)
        optimizer.step()
        plain.step()
    assert launched(optimizer) == (1, 1)
    assert optimizer.state[images]['exp_avg'].is_contiguous(memory_format=torch.channels_last)
    for p, q in zip(params, copies):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


def replaced_data(optimizer, p):
    p.data = p.data.clone()


def replaced_slot(optimizer, p):
    optimizer.state[p]['exp_avg'] = optimizer.state[p]['exp_avg'].clone()


def moved_slot(optimizer, p):
    optimizer.state[p]['exp_avg'].data = optimizer.state[p]['exp_avg'].data.clone()


def other_layout(optimizer, p):
    p.data = p.data.t().contiguous().t()


def fresh_state(optimizer, p):
    optimizer.state[p] = {}


def removed_state(optimizer, p):
    optimizer.state.clear()


def set_count(optimizer, p):
    optimizer.state[p]['step'] = torch.tensor(7.0)


def counted_in_place(optimizer, p):
    optimizer.state[p]['step'].fill_(7.0)


def loaded(optimizer, p):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def without_gradient(optimizer, p):
    p.requires_grad_(False)


def another_group(optimizer, p):
    optimizer.add_param_group({'params': [torch.nn.Parameter(torch.zeros(2))]})


def turned(optimizer, p):
    p.data = p.data.t()   # the same address


def number_for_a_count(optimizer, p):
    optimizer.state[p]['step'] = 7


def replaced_count(optimizer, p):
    optimizer.state[p]['step'].data = torch.tensor(7.0)


def switched(optimizer, p):
    optimizer.param_groups[0]['amsgrad'] = True


@pytest.mark.parametrize('change', [turned, number_for_a_count, replaced_count, switched, replaced_data, replaced_slot, moved_slot,
                                    other_layout, fresh_state, removed_state, set_count, counted_in_place, loaded,
                                    without_gradient, another_group])
def test_what_changes_between_steps_is_seen(change):
    """Whatever users do to parameters and state between two steps, kernels and operations do the same."""
    runs = []
    for fused in (True, False):
        params = parameters(shapes=[(5, 5) if change is turned else (5, 3), (7,)])
        optimizer = steps(create('adamw', params, fused=fused), params, 1, 2)
        change(optimizer, params[0])
        for t in range(3, 5):
            feed([p for p in params if p.requires_grad], t)
            if not params[0].requires_grad:
                params[0].grad = None
            optimizer.step()
        counts = {**dict.fromkeys([set_count, counted_in_place, number_for_a_count, replaced_count], 9),
                  **dict.fromkeys([fresh_state, removed_state, without_gradient], 2)}
        assert int(optimizer.state[params[0]]['step']) == counts.get(change, 4)
        runs.append(everything(optimizer, params))
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


def subsets(t):
    """The places of the parameters with a gradient in step t: the first always, the others in turn, once all of them."""
    return range(len(SHAPES)) if t == 7 else [i for i in range(len(SHAPES)) if i == 0 or i % 2 == t % 2]


def test_lists_that_alternate_stay_prepared(monkeypatch):
    """As where generator and discriminator, or experts, take turns: same numbers, and nothing is prepared twice."""
    made = []

    class Counted(executors.Launches):
        def __init__(self, *arguments):
            made.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr('gluon_optim.torch.optimizer.Launches', Counted)
    runs = []
    for fused in (True, False):
        params = parameters()
        optimizer = create('adamw', params, fused=fused)
        made.clear()
        for t in range(1, 14):
            feed(params, t)
            for i in set(range(len(SHAPES))).difference(subsets(t)):
                params[i].grad = None
            optimizer.step()
        assert len(made) == 6  # both, the first again when it sees the states of the second; all; both again beside them
        assert [int(optimizer.state[p]['step']) for p in params] == [sum(i in subsets(t) for t in range(1, 14)) for i in range(5)]
        runs.append(everything(optimizer, params))
        optimizer.load_state_dict(optimizer.state_dict())
        steps(optimizer, params, 14, 14)
        assert len(optimizer._kept) == 1  # the others would hold the old states
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


def test_few_lists_stay_prepared():
    params = parameters(shapes=[(3,)] * 20)
    optimizer = create('sgd', params, momentum=0.9)
    steps(optimizer, params, 1, 1)
    for left_out in params:
        feed(params, 2)
        left_out.grad = None
        optimizer.step()
    assert len(optimizer._kept) == 16


def larger_weight(optimizer, p):
    p.data, p.grad = torch.ones(100, 100), torch.ones(100, 100)


def smaller_slot(optimizer, p):
    optimizer.state[p]['exp_avg'] = torch.zeros(2)


def resized_slot(optimizer, p):
    optimizer.state[p]['exp_avg'].resize_(2)


def smaller_gradient(optimizer, p):
    p.grad.data = torch.ones(2)


@pytest.mark.parametrize('change, error, match', [
    (larger_weight, ValueError, 'must be a tensor of shape'), (smaller_slot, ValueError, 'must be a tensor of shape'),
    (resized_slot, ValueError, 'must be a tensor of shape'), (smaller_gradient, RuntimeError, 'size')])
def test_what_does_not_fit_is_refused_and_nothing_written(change, error, match):
    params = parameters(shapes=[(40,), (7,)])
    optimizer = steps(create('adamw', params), params, 1, 2)
    feed(params, 3)
    change(optimizer, params[0])
    before = everything(optimizer, params)
    with pytest.raises(error, match=match):
        optimizer.step()
    assert all(map(torch.equal, before, everything(optimizer, params)))


def test_a_negated_gradient_is_read_as_one():
    weight = torch.nn.Parameter(torch.ones(1))
    z = torch.complex(torch.ones(1), weight)
    (z.conj() * torch.complex(torch.ones(1), torch.ones(1))).imag.sum().backward()
    assert weight.grad.is_neg() and weight.grad.item() == -1
    create('sgd_torch', [weight], lr=1.0).step()
    assert weight.item() == 2


def test_a_parameter_is_in_a_group_once():
    weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match='may be in a group once. Received: number 1 of 2, a second time'):
        create('adamw', [weight, weight])


def test_counts_in_shared_memory_stay_there():
    params = parameters(shapes=[(3,), (2,)])
    optimizer = steps(create('adamw', params), params, 1, 1)
    for p in params:
        for value in optimizer.state[p].values():
            value.share_memory_()
    shared = [optimizer.state[p]['step'] for p in params]
    steps(optimizer, params, 2, 3)
    assert [int(step) for step in shared] == [3, 3] and all(optimizer.state[p]['step'] is step for p, step in zip(params, shared))


def test_a_step_in_inference_mode_and_one_outside():
    params = parameters(shapes=[(3,), (2,)])
    optimizer = steps(create('adamw', params), params, 1, 1)
    params[1].grad = None
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    assert [int(optimizer.state[p]['step']) for p in params] == [3, 1]


def test_pytorchs_number_of_threads_is_the_most(monkeypatch):
    used = []
    monkeypatch.setattr(executors.kernels_on('cpu', rules.get('adamw')).numba_runtime, 'launch',
                        lambda address, passes, lanes, *rest: used.append(lanes))
    weight = torch.nn.Parameter(torch.ones(2 ** 20))
    weight.grad = torch.ones(2 ** 20)
    optimizer, threads = create('adamw', [weight]), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        optimizer.step()
    finally:
        torch.set_num_threads(threads)
    assert used == [1]


def test_a_gradient_of_another_type_is_updated_by_operations():
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), torch.nn.Parameter(torch.ones(2))]
    params[0].grad_dtype = None  # newer versions of PyTorch refuse others otherwise
    optimizer = create('sgd_torch', params, lr=0.5)
    params[0].grad, params[1].grad = torch.full((3,), 1 / 3), torch.ones(2)
    optimizer.step()
    assert launched(optimizer) == (1, 1)
    assert optimizer.state[params[0]]['master'].tolist() == pytest.approx([1 - 0.5 / 3] * 3, rel=1e-7)
    assert params[1].tolist() == [0.5, 0.5]


def test_autograd_sees_the_change():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, loss = create('adamw', [weight], fused=True), (weight * weight).sum()
    weight.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


def test_a_gradient_scaler_skips_and_scales():
    runs = []
    for fused in (True, False):
        params = parameters(shapes=[(5, 3), (7,)])
        optimizer = create('adamw', params, lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler('cpu', init_scale=256.0, growth_interval=2)
        for t in range(1, 6):
            optimizer.zero_grad()
            scaler.scale(sum((p * p).sum() * t for p in params)).backward()
            if t == 3:
                params[0].grad[0, 0] = float('inf')
            scaler.step(optimizer)
            scaler.update()
        runs.append(everything(optimizer, params))
        assert int(optimizer.state[params[0]]['step']) == 4
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_memory_of_its_own(clone):
    params = parameters()
    optimizer = steps(create('adamw', params, fused=True), params)
    before = everything(optimizer, params)
    other = clone(optimizer)
    others = other.param_groups[0]['params']
    assert other.fused is True
    steps(other, others, 5, 6)
    assert all(map(torch.equal, before, everything(optimizer, params)))
    steps(optimizer, params, 5, 6)
    assert all(map(torch.equal, everything(optimizer, params), everything(other, others)))


def test_a_saved_state_has_as_many_numbers_as_it_says(tmp_path):
    """Counts of updates lie side by side in memory; each is saved as one number."""
    params = parameters(shapes=[(2,)] * 50)
    optimizer = steps(create('sgd_torch', params, momentum=0.9), params, 1, 2)
    torch.save(optimizer.state_dict(), tmp_path / 'state.pt')
    loaded = torch.load(tmp_path / 'state.pt', weights_only=True)
    assert [entry['step'].item() for entry in loaded['state'].values()] == [2.0] * 50
    plain = steps(create('sgd_torch', parameters(shapes=[(2,)] * 50), momentum=0.9, fused=False), params, 1, 1)
    plain.load_state_dict(loaded)
    assert int(plain.state[plain.param_groups[0]['params'][3]]['step']) == 2


def test_threads_step_side_by_side():
    def train(fused, results, k):
        params = parameters(seed=k, shapes=[(700, 500)])
        results[k] = everything(steps(create('novograd', params, fused=fused), params), params)

    together, alone = {}, {}
    threads = [threading.Thread(target=train, args=(True, together, k)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(3):
        train(True, alone, k)
    assert all(torch.equal(a, b) for k in range(3) for a, b in zip(together[k], alone[k]))


@pytest.mark.skipif(not hasattr(__import__('os'), 'fork'), reason='needs fork')
def test_a_forked_process_steps_too():
    program = r'''
import os, torch
from gluon_optim.torch import create
weight = torch.nn.Parameter(torch.ones(600, 600))
optimizer = create('adamw', [weight], lr=0.1, fused=True)
weight.grad = torch.ones(600, 600)
optimizer.step()
child = os.fork()
optimizer.step()
who = 'child' if child == 0 else 'parent'
os.write(1, f'{who} {optimizer.state[weight]["step"].item()} {weight[0, 0].item()}\n'.encode())
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', program], capture_output=True, text=True, timeout=300)
    lines = sorted(line.split() for line in done.stdout.splitlines())
    assert done.returncode == 0 and len(lines) == 2, done.stderr
    assert lines[0][0] == 'child' and lines[1][0] == 'parent' and lines[0][1:] == lines[1][1:]


def test_fused_is_said_or_refused(monkeypatch, caplog):
    weight = torch.nn.Parameter(torch.ones(6, 8)[:, ::2])
    weight.grad = torch.ones(6, 4)
    optimizer = create('adamw', [weight], fused=True)
    with pytest.raises(ValueError, match=r'fused=True needs a kernel.*Received: adamw, a parameter \(6, 4\) of torch.float32'):
        optimizer.step()
    assert weight.detach().eq(1).all()
    with pytest.raises(ValueError, match='must be None, False or True'):
        create('adamw', [weight], fused='yes')
    monkeypatch.setattr(executors, 'KERNELS', {'cpu': ('gluon_optim.no_such_module', 'numba')})
    executors._module.cache_clear()
    for _ in range(2):
        params = parameters()
        assert launched(steps(create('adamw', params), params, 1, 1)) == (0, len(SHAPES))
    executors._module.cache_clear()
    assert [record.message.count('pip install numba') for record in caplog.records] == [1]


@pytest.mark.parametrize('change', [dict(lr=0.3), dict(beta1=0.2), dict(wd=0.4), dict(multi_precision=False)])
def test_settings_that_change_between_steps_are_seen(change):
    params = [torch.nn.Parameter(torch.randn(5))]
    first = create('adamw', params, lr=0.1, wd=0.01)
    for t in (1, 2):
        feed(params, t)
        first.step()
    copies = copy.deepcopy(params)
    first.param_groups[0].update(change)
    anew = create('adamw', copies, lr=0.1, wd=0.01)
    anew.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer, weights in ((first, params), (anew, copies)):
        feed(weights, 3)
        optimizer.step()
    assert torch.equal(params[0], copies[0])


@pytest.mark.parametrize('name, value', [('beta1', 1.5), ('wd', '0.1'), ('amsgrad', 0.5), ('multi_precision', 'other')])
def test_settings_that_become_wrong_are_refused_at_every_step(name, value):
    params = [torch.nn.Parameter(torch.randn(5))]
    optimizer = create('adamw', params, lr=0.1)
    feed(params, 1)
    optimizer.step()
    before, right = params[0].detach().clone(), optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    for _ in range(2):
        with pytest.raises((ValueError, TypeError)):
            optimizer.step()
    assert torch.equal(params[0], before)
    optimizer.param_groups[0][name] = right
    optimizer.step()
    assert not torch.equal(params[0], before)


BAD_SLOTS = {
    'an array': lambda slot: slot.numpy(), 'a list': lambda slot: slot.tolist(), 'meta': lambda slot: slot.to('meta'),
    'sparse': lambda slot: slot.to_sparse(), 'bool': lambda slot: slot.bool(), 'int': lambda slot: slot.long(),
    'complex': lambda slot: slot.to(torch.complex64), 'another shape': lambda slot: slot[..., :1],
}


def spoil_and_step(optimizer, params, spoil, words):
    """A step with the state of the third parameter spoiled raises, and leaves all others as they were."""
    before = [param.detach().clone() for param in params], copy.deepcopy([optimizer.state[p] for p in params[:2]])
    spoil(optimizer.state[params[2]])
    feed(params, 9)
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert all(map(torch.equal, before[0], params))
    for state, param in zip(before[1], params):
        assert state.keys() == optimizer.state[param].keys()
        assert all(torch.equal(value, optimizer.state[param][key]) for key, value in state.items())


@pytest.mark.parametrize('fused', [None, False])
@pytest.mark.parametrize('key, dtype', [('exp_avg', torch.float32), ('master', torch.float16), ('compensation', torch.float16)])
@pytest.mark.parametrize('bad', BAD_SLOTS)
def test_a_slot_that_the_rule_cannot_use_is_refused_before_anything_is_updated(bad, key, dtype, fused):
    params = parameters(dtype, [(4, 3), (7,), (2, 3, 4), ()])
    kept = 'kahan' if key == 'compensation' else True
    optimizer = steps(create('adamw', params, fused=fused, multi_precision=kept), params)
    good = optimizer.state[params[2]][key]
    spoil_and_step(optimizer, params, lambda state: state.update({key: BAD_SLOTS[bad](good)}),
                   rf"'{key}' in the state of a parameter of shape \(2, 3, 4\) must be a tensor .*Received: .*Nothing was updated")
    optimizer.state[params[2]][key] = good
    steps(optimizer, params)


@pytest.mark.parametrize('fused', [None, False])
@pytest.mark.parametrize('count', [-1, -5, 2.5, float('nan'), float('inf'), 2 ** 24 + 2, 2 ** 70, 10 ** 400, 'x', '3', None, [1.0],
                                   torch.tensor([1.0, 2.0]), torch.tensor(-1.0), torch.tensor(-1),
                                   torch.tensor(3.0, device='meta')])
def test_a_count_that_is_none_is_refused_before_anything_is_updated(count, fused):
    params = parameters(shapes=[(4, 3), (7,), (2, 3, 4), ()])
    optimizer = steps(create('adamw', params, fused=fused), params)
    spoil_and_step(optimizer, params, lambda state: state.update(step=count),
                   r"'step' in the state of a parameter of shape \(2, 3, 4\) must be a number of updates.*Received: ")
    optimizer.state[params[2]]['step'] = 4
    steps(optimizer, params)
    if isinstance(count, (int, float)) and count < 2 ** 100:   # into the count: nothing is prepared anew
        spoil_and_step(optimizer, params, lambda state: state['step'].fill_(float(count)), r"'step' in .*of shape \(2, 3, 4\)")


@pytest.mark.parametrize('fused', [None, False])
@pytest.mark.parametrize('change', [lambda slot: slot.half(), lambda slot: slot.bfloat16(), lambda slot: slot.double(),
                                    lambda slot: slot.transpose(0, 2).contiguous().transpose(0, 2),
                                    lambda slot: slot.clone().requires_grad_(), torch.nn.Parameter])
def test_slots_may_be_of_another_float_type_or_lie_otherwise(change, fused):
    params, others = parameters(shapes=[(4, 3), (2, 3, 4)]), parameters(shapes=[(4, 3), (2, 3, 4)])
    optimizer, other = (steps(create('adamw', own, fused=fused), own) for own in (params, others))
    optimizer.state[params[1]]['exp_avg'] = change(optimizer.state[params[1]]['exp_avg'])
    for own, one in ((params, optimizer), (others, other)):
        steps(one, own, 5, 8)
    assert torch.allclose(params[1], others[1], rtol=1e-2, atol=1e-4) and torch.equal(params[0], others[0])


@pytest.mark.parametrize('fused', [None, False])
def test_the_last_count_of_float32_stays(fused):
    params = parameters(shapes=[(4, 3), (7,)])
    optimizer = steps(create('adamw', params, fused=fused), params)
    optimizer.state[params[1]]['step'] = 2 ** 24 - 1
    steps(optimizer, params, 5, 7)
    assert optimizer.state[params[1]]['step'] == 2 ** 24 and optimizer.state[params[0]]['step'] == 7
