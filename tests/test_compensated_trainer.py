"""float16 weights of MXNet with ``multi_precision='kahan'``: `gluon_optim.rules.compensated` in a `gluon.Trainer`."""
import sys
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')
from mxnet import autograd, gluon, nd  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim import rules  # noqa: E402
from gluon_optim.mxnet import executors  # noqa: E402
from gluon_optim.mxnet.trainer import export_states, import_states  # noqa: E402
from gluon_optim.states.mxnet_files import writer  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import resume as run  # noqa: E402
from test_trainer_states import as_json, in_new_process, save, trained  # noqa: E402

KAHAN = {'half': True, 'optimizer': 'adamw', 'arguments': {'learning_rate': 0.01, 'multi_precision': 'kahan'}}
SHAPES = [(3, 4), (300, 67), (1,)]


def arrays(updates=3):
    """float16 weights, and gradients for each update."""
    random = np.random.RandomState(0)
    return ([nd.array(random.normal(size=shape), dtype='float16') for shape in SHAPES],
            [[nd.array(random.normal(size=shape), dtype='float16') for shape in SHAPES] for _ in range(updates)])


def updated(name, single=False, **arguments):
    """Weights and states after three updates, of the list or of one parameter after the other."""
    optimizer = mx.optimizer.create(name, multi_precision='kahan', **arguments)
    weights, gradients = arrays()
    states = [optimizer.create_state_multi_precision(i, weight) for i, weight in enumerate(weights)]
    for given in gradients:
        if single:
            for i in range(len(weights)):
                optimizer.update_multi_precision(i, weights[i], given[i], states[i])
        else:
            optimizer.update_multi_precision(list(range(len(weights))), weights, given, states)
    return [[array.asnumpy() for array in (weight, *state)] for weight, state in zip(weights, states)]


@pytest.mark.parametrize('name', rules.names())
def test_operators_compute_what_kernels_do(name, monkeypatch):
    compiled, alone = updated(name), updated(name, single=True)
    monkeypatch.setattr(executors, '_compiler', lambda: None)
    for kernel, single, operators in zip(compiled, alone, updated(name)):
        assert operators[0].dtype == operators[-1].dtype == 'float16' and all(slot.dtype == 'float32' for slot in operators[1:-1])
        for a, b, c in zip(kernel, single, operators):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize('compiled', [True, False], ids=['compiled', 'operators'])
def test_an_update_is_the_rules_between_a_sum_and_two_roundings(compiled, monkeypatch):
    """The reference: NumPy's float16, and SGD with momentum written out."""
    if not compiled:
        monkeypatch.setattr(executors, '_compiler', lambda: None)
    found = updated('sgd_torch', learning_rate=0.125, momentum=0.5)
    weights, gradients = arrays()
    for i, (weight, momentum, compensation) in enumerate(found):
        w, lost, m = weights[i].asnumpy(), np.zeros(SHAPES[i], 'float16'), np.zeros(SHAPES[i], 'float32')
        for given in gradients:
            m = np.float32(0.5) * m + given[i].asnumpy().astype('float32')
            x = w.astype('float32') + lost.astype('float32') - np.float32(0.125) * m
            w = x.astype('float16')
            lost = (x - w.astype('float32')).astype('float16')
        np.testing.assert_array_equal(momentum, m)
        np.testing.assert_array_equal(weight, w)
        np.testing.assert_array_equal(compensation, lost)
        assert np.count_nonzero(compensation) > 0.9 * compensation.size - 1


@pytest.mark.filterwarnings('ignore:sgd_torch updates float16')
@pytest.mark.parametrize('compiled', [True, False], ids=['compiled', 'operators'])
def test_a_weight_that_overflows_is_as_without_a_master(compiled, monkeypatch):
    """Its compensation is 0; and what rounds down to the largest float16 is kept."""
    if not compiled:
        monkeypatch.setattr(executors, '_compiler', lambda: None)
    ends = []
    for mode in ('kahan', False):
        optimizer = go.create('sgd_torch', learning_rate=1.0, multi_precision=mode)
        weight = nd.array([65504, 65504, 1, 1], dtype='float16')
        state = optimizer.create_state_multi_precision(0, weight)
        for t, gradient in enumerate(([-16384, -8, 0, np.nan], [-1, 0, 0, 0], [1, 0, 0.25, 0])):
            optimizer.update_multi_precision(0, weight, nd.array(gradient, dtype='float16'), state)
            if t == 0:
                np.testing.assert_array_equal(weight.asnumpy(), np.float16([np.inf, 65504, 1, np.nan]))
            if mode == 'kahan':
                np.testing.assert_array_equal(state[-1].asnumpy(), np.float16([0, 8, 0, 0]))
        ends.append(weight.asnumpy())
    np.testing.assert_array_equal(*ends)


def test_memory_is_half_of_what_masters_take():
    def size(mode):
        optimizer = go.create('adamw', multi_precision=mode)
        state = optimizer.create_state_multi_precision(0, nd.zeros((30, 10), dtype='float16'))
        slots, master = optimizer.split_state(state, optimizer.hyperparameters(), mode)
        return sum(array.size * np.dtype(array.dtype).itemsize for array in (*slots, *([] if master is None else [master])))
    with pytest.warns(UserWarning, match="Pass multi_precision=True, or 'kahan' for half of its memory"):
        go.create('adamw').create_state_multi_precision(0, nd.zeros(3, dtype='float16'))
    assert (size(True), size('kahan')) == (300 * (4 + 8), 300 * (2 + 8))


# Save, die, and continue

@pytest.mark.parametrize('saved, resumed, loader', [
    ({'contexts': [0]}, {'contexts': [2]}, 'go'),
    ({'contexts': [0]}, {}, 'native'),
    ({'contexts': [0, 1], 'kvstore': 'local', 'update_on_kvstore': True}, {'contexts': [3, 2]}, 'go'),
    ({'contexts': [0, 1], 'update_on_kvstore': False}, {'contexts': [0, 1], 'update_on_kvstore': True}, 'go'),
    ({'optimizer': 'sgd_torch', 'contexts': [1], 'update_on_kvstore': True},
     {'contexts': [0], 'kvstore': None, 'update_on_kvstore': None}, 'go'),
], ids=['other-device', 'native', 'two-on-kvstore', 'two', 'no-slots'])
def test_a_resumed_run_equals_the_straight_one_bit_for_bit(tmp_path, saved, resumed, loader):
    saved, path = {**KAHAN, **saved}, str(tmp_path / 'run')
    net, trainer = trained(saved)
    before = save(net, trainer, path)
    assert '3.weight/compensation' in before['slots'] and not before['masters']
    run.train(net, trainer, 3, 6)
    out = in_new_process({**saved, **resumed}, path, 3, 6, loader)
    assert out['loaded'] == as_json(before)
    assert out['end'] == as_json(run.facts(net, trainer))


def test_checkpoints(tmp_path):
    net, trainer = trained(KAHAN)
    go.save_checkpoint(tmp_path / 'run.ckpt', net=net, trainer=trainer)
    run.train(net, trainer, 3, 5)
    other, other_trainer = trained(KAHAN, 1)
    go.load_checkpoint(tmp_path / 'run.ckpt', net=other, trainer=other_trainer)
    run.train(other, other_trainer, 3, 5)
    assert run.facts(other, other_trainer) == run.facts(net, trainer)


@pytest.mark.parametrize('file, trainers', [('kahan', True), ('kahan', False), (True, 'kahan'), (False, 'kahan')])
@pytest.mark.filterwarnings('ignore:adamw updates float16')
def test_a_file_and_a_trainer_must_agree(tmp_path, file, trainers):
    def config(mode):
        return {**KAHAN, 'arguments': {'multi_precision': mode}}
    save(*trained(config(file)), str(tmp_path / 'run'))
    net, trainer = trained(config(trainers), 2)
    before = run.facts(net, trainer)
    has = {'kahan': 'a compensation', True: 'a float32 master', False: 'no float32 master'}[file]
    words = f'3.weight has {has} in the file, the trainer has multi_precision={trainers!r}: create it with multi_precision={file!r}'
    with pytest.raises(ValueError, match=words):
        go.load_states(trainer, str(tmp_path / 'run.states'), net)
    assert run.facts(net, trainer) == before


def test_a_compensation_of_another_type_is_refused():
    net, trainer = trained(KAHAN)
    states = export_states(trainer, net)
    states.slots['3.weight']['compensation'] = states.slots['3.weight']['compensation'].astype('float32')
    with pytest.raises(ValueError, match=r"must be .*'compensation': \('float16'.*they are .*'compensation': \('float32'"):
        import_states(trainer, states, net)


def test_old_files_of_mxnet_and_back(tmp_path):
    """MXNet's own `.states`: read without MXNet's help, and written for it."""
    net, trainer = trained(KAHAN)
    before = save(net, trainer, str(tmp_path / 'run'))
    states = go.read_states(str(tmp_path / 'run.native'), params=[p.name for p in trainer._params])
    name, = (info.name for info in states.parameters if info.dtype == 'float16')
    assert list(states.slots[name]) == ['mean', 'var', 'compensation']
    writer.write_states(tmp_path / 'again', go.read_states(str(tmp_path / 'run.states')), 1)
    other, other_trainer = run.make(KAHAN)
    other.load_parameters(str(tmp_path / 'run.params'))
    other_trainer.load_states(str(tmp_path / 'again'))
    assert other_trainer._optimizer.multi_precision == 'kahan'
    assert run.facts(other, other_trainer) == before


def test_norms_are_those_of_exact_weights():
    """An update that the rounded weight does not show: a millionth of it."""
    weight = gluon.Parameter('weight', shape=(4,), dtype='float16', init=mx.init.One())
    weight.initialize()
    trainer = gluon.Trainer([weight], 'sgd_torch', {'learning_rate': 1.0, 'multi_precision': 'kahan'})
    norms = go.monitor.Norms(trainer)
    for _ in range(2):
        with autograd.record():
            loss = (weight.data().astype('float32') * 2.0 ** -20).sum()
        loss.backward()
        with norms:
            trainer.step(1)
    assert norms.latest['weight'].update_norm == pytest.approx(2 * 2.0 ** -20, rel=1e-6)
    np.testing.assert_array_equal(weight.data().asnumpy(), 1)


# Arguments

@pytest.mark.parametrize('name', ['adam', 'sgd', 'lamb', 'sgld'])
def test_drop_ins_keep_mxnets_state(name):
    with pytest.raises(ValueError, match=f"`multi_precision` of {name} must be False or True.*such as 'adamw'"):
        go.create(name, multi_precision='kahan')


def test_drop_ins_refuse_compensations_that_are_asked_for_later():
    weight, gradient = nd.ones(3, dtype='float16'), nd.ones(3, dtype='float16')
    optimizer = go.create('adam')
    state = optimizer.create_state_multi_precision(0, weight)
    optimizer.multi_precision = 'kahan'
    with pytest.raises(ValueError, match='`multi_precision` of adam must be False or True'):
        optimizer.update_multi_precision(0, weight, gradient, state)
    with pytest.raises(ValueError, match='`multi_precision` of sgd must be False or True'):
        go.accelerated(mx.optimizer.SGD(multi_precision='kahan'))   # a text, which MXNet takes for True


@pytest.mark.parametrize('name', ['adamw', 'sgd_torch', 'psgld'])
@pytest.mark.parametrize('mode', [False, 'kahan'])
def test_a_master_is_named_where_the_setting_has_changed_since(name, mode):
    weight, gradient = nd.ones(3, dtype='float16'), nd.ones(3, dtype='float16')
    optimizer = go.create(name, multi_precision=True)
    state = optimizer.create_state_multi_precision(0, weight)
    optimizer.multi_precision = mode
    with pytest.raises(ValueError, match=f'holds a float32 master.*Received: multi_precision={mode!r}. Set it back'):
        optimizer.update_multi_precision(0, weight, gradient, state)
    np.testing.assert_array_equal(weight.asnumpy(), 1)
    with pytest.raises(ValueError, match='holds a float32 master.*Received: float32. Set it back'):
        optimizer.update_multi_precision(0, weight.astype('float32'), gradient.astype('float32'), state)


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="`multi_precision` must be one of False, True, 'kahan'. Received: multi_precision='khan'"):
        go.create('adamw', multi_precision='khan')
    master, _ = go.create('adamw', multi_precision=1).create_state_multi_precision(0, nd.zeros(3, dtype='float16'))
    assert master.dtype == np.float32


# It ends where masters end

def quadratic(mode, updates=2000):
    """As in test_compensated.py."""
    random = np.random.default_rng(0)
    minimum, curvature = random.normal(size=400).astype('float32'), np.logspace(-2, 0, 400).astype('float32')
    weight = nd.zeros(400, dtype='float16')
    optimizer = go.create('adamw', wd=0.0, multi_precision=mode)
    state = optimizer.create_state_multi_precision(0, weight)
    mixed = {True: lambda: state[0].asnumpy(), False: lambda: weight.asnumpy().astype('float32'),
             'kahan': lambda: weight.asnumpy().astype('float32') + state[-1].asnumpy().astype('float32')}[mode]
    for t in range(updates):
        optimizer.set_learning_rate(0.01 * (1 - t / updates) ** 2)
        gradient = nd.array(curvature * (weight.asnumpy().astype('float32') - minimum), dtype='float16')
        optimizer.update_multi_precision(0, weight, gradient, state)
    return float((curvature * (mixed() - minimum) ** 2).mean())


@pytest.mark.filterwarnings('ignore:adamw updates float16')
def test_a_quadratic_ends_where_it_ends_with_masters():
    """1.455e-5 with masters and with compensations, 3.3e-4 without either."""
    ends = {mode: quadratic(mode) for mode in (True, 'kahan', False)}
    print(ends)
    assert ends['kahan'] <= 1.05 * ends[True] + 1e-12
    assert ends[False] > 10 * ends[True]


def digits(mode, epochs=15):
    """Training loss, and accuracy on digits that were not trained on, of a small net with a small rate."""
    data = pytest.importorskip('sklearn.datasets').load_digits()
    x, y = nd.array(data.data / 16), nd.array(data.target)
    mx.random.seed(0)
    net = gluon.nn.HybridSequential()
    net.add(run.HalfDense(64, 64), gluon.nn.Activation('tanh'), run.HalfDense(10, 64))
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd_torch', {'learning_rate': 0.01, 'momentum': 0.9, 'multi_precision': mode})
    loss_of, order = gluon.loss.SoftmaxCrossEntropyLoss(), np.random.RandomState(0)
    for _ in range(epochs):
        for rows in order.permutation(1500).reshape(-1, 50):
            with autograd.record():
                loss = loss_of(net(x[rows]), y[rows])
            loss.backward()
            trainer.step(50)
    right = net(x[1500:]).argmax(1).asnumpy() == data.target[1500:]
    return float(loss_of(net(x[:1500]), y[:1500]).mean().asscalar()), float(right.mean())


@pytest.mark.filterwarnings('ignore:sgd_torch updates float16')
def test_digits_end_where_they_end_with_masters():
    """Loss and accuracy are 0.1693 and 88.9% with either; so large are the updates that float16 alone comes to 0.1691."""
    ends = {mode: digits(mode) for mode in (True, 'kahan', False)}
    print(ends)
    assert abs(ends['kahan'][0] - ends[True][0]) < 0.002 * ends[True][0]
    assert abs(ends['kahan'][1] - ends[True][1]) < 0.01
