"""CUDA kernels on MXNet's arrays: the executor, the arguments of launches and what a step calls, with an emulated GPU behind
MXNet's C API."""
import gc
import logging

import numpy as np
import pytest
from cuda_runs import COMPILER, Device

mx = pytest.importorskip('mxnet')

from mxnet import gluon, nd  # noqa: E402
from test_cuda import hyper_sets  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim.lowering import cuda  # noqa: E402
from gluon_optim.mxnet import cuda_batch, executors  # noqa: E402

pytestmark = pytest.mark.skipif(COMPILER is None, reason='no C++ compiler')

SHAPES = [(7, 5), (1,), (3, 1500), (9, 2), (300,), (2, 2), (11,)]
TENSORS = 3   # of a launch


@pytest.fixture
def device(monkeypatch, tmp_path):
    """CPU contexts as if they were GPUs, whose launches take three tensors."""
    monkeypatch.setattr(executors, 'KERNELS', {'cpu': executors.KERNELS['gpu']})
    monkeypatch.setattr(cuda, 'capacity', lambda *key: TENSORS)
    monkeypatch.setattr(mx.runtime.Features, 'is_enabled', lambda self, name: name == 'CUDA_RTC')
    for cached in (cuda_batch._compiled, cuda_batch._functions, cuda_batch._say_once):
        cached.cache_clear()
    yield Device(mx.base._LIB, monkeypatch, tmp_path)
    for cached in (cuda_batch._compiled, cuda_batch._functions, cuda_batch._say_once):
        cached.cache_clear()
    gc.collect()   # while the emulated functions are there to free what was compiled


class Run:
    """An optimizer with lists of arrays, as an updater has them."""

    def __init__(self, name, dtype='float32', shapes=SHAPES, **options):
        random = np.random.RandomState(1)
        self.optimizer = go.create(name, **dict(hyper_sets(name)['other'], learning_rate=0.1, **options))
        self.optimizer.set_wd_mult({1: 0.0, 4: 0.5})   # three rows of coefficients
        self.dtype, self.random = dtype, np.random.RandomState(2)
        self.weights = [nd.array(random.normal(size=shape), dtype=dtype) for shape in shapes]
        self.gradients = [nd.zeros(shape, dtype=dtype) for shape in shapes]
        self.states = [self.optimizer.create_state_multi_precision(i, w) for i, w in enumerate(self.weights)]

    def feed(self):
        for g in self.gradients:
            g[:] = nd.array(self.random.normal(size=g.shape), dtype=self.dtype)
        nd.waitall()

    def update(self):
        self.optimizer.update_multi_precision(list(range(len(self.weights))), self.weights, self.gradients, self.states)

    def steps(self, n=3):
        for _ in range(n):
            self.feed()
            self.update()
        return self

    def arrays(self):
        def flat(state):
            if isinstance(state, (tuple, list)):
                return [a for part in state for a in flat(part)]
            return [] if state is None else [state]
        return [a.asnumpy() for a in (*self.weights, *(a for state in self.states for a in flat(state)))]


def on_loops(monkeypatch, *arguments, **options):
    """The same steps by the loops of the CPU."""
    with monkeypatch.context() as patch:
        patch.setattr(executors, 'KERNELS', {'cpu': executors._loops})
        return Run(*arguments, **options).steps().arrays()


MIXED = {'multi_precision': True}
PHILOX = {'noise': 'philox', 'seed': 2 ** 53 - 5}
CASES = [('adamw', 'float32', {}), ('adamw', 'float16', MIXED), ('adamw', 'float64', {}), ('adamw', 'float16', {}),
         ('novograd', 'float32', {}), ('lans', 'float32', {}), ('lamb', 'float16', MIXED), ('adam', 'float16', {}),
         ('nadam', 'float32', {}), ('lars', 'float16', MIXED), ('sgd_torch', 'float32', {}), ('sgld', 'float32', PHILOX),
         ('sgld', 'float16', {**PHILOX, **MIXED}), ('psgld', 'float32', PHILOX), ('psgld', 'float64', PHILOX),
         ('psgld', 'float16', PHILOX)]


def passes(optimizer):
    prepared, = optimizer._executor._prepared.values()
    return len(prepared._batch.kernel.passes)


@pytest.mark.filterwarnings('ignore:.*without a float32 master')
@pytest.mark.parametrize('name, dtype, options', CASES)
def test_steps_are_those_of_the_loops_and_nothing_waits(device, monkeypatch, name, dtype, options):
    run = Run(name, dtype, **options).steps(1)
    most = passes(run.optimizer) * -(-len(SHAPES) // TENSORS)
    for _ in range(2):
        run.feed()
        del device.launches[:], device.waits[:]
        run.update()
        assert device.waits == []
        assert 0 < len(device.launches) <= most
    assert len(device.sources) == 1
    expected = on_loops(monkeypatch, name, dtype, **options)
    limit = 1e-14 if dtype == 'float64' else 0
    for mine, theirs in zip(run.arrays(), expected):
        np.testing.assert_allclose(mine, theirs, rtol=limit, atol=limit)


def test_a_trainer_makes_few_launches(device):
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Dense(5, in_units=4), gluon.nn.BatchNorm(in_channels=5), gluon.nn.Dense(1, in_units=5))
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), go.create('novograd'))
    tensors = sum(p.grad_req != 'null' for p in net.collect_params().values())
    for _ in range(3):
        with mx.autograd.record():
            loss = net(nd.ones((3, 4))).sum()
        loss.backward()
        nd.waitall()
        del device.launches[:], device.waits[:]
        trainer.step(3)
        assert len(device.launches) <= 3 * -(-tensors // TENSORS)
        assert device.waits == []
        assert np.isfinite(net[0].weight.data().asnumpy()).all()


@pytest.mark.parametrize('name', ['sgld', 'psgld'])
def test_a_chain_continues_bit_for_bit(device, monkeypatch, tmp_path, name):
    """The key and the streams are in the state, the number of the update is that of the parameter. The loops of the CPU walk the
    same way."""
    def trainer(seed):
        parameters = [gluon.Parameter(f'p{i}_weight', shape=shape) for i, shape in enumerate(SHAPES)]
        for i, parameter in enumerate(parameters):
            parameter.initialize(mx.init.Constant(0.1 * i))
        return gluon.Trainer(parameters, go.create(name, learning_rate=0.1, noise='philox', seed=seed), kvstore=None)

    def train(trainer, steps):
        for t in steps:
            for parameter in trainer._params:
                parameter.grad()[:] = t
                parameter.data()._fresh_grad = True
            nd.waitall()
            del device.launches[:], device.waits[:]
            trainer.step(1)
            assert device.waits == [] or executors.KERNELS['cpu'] is executors._loops
        return [parameter.data().asnumpy() for parameter in trainer._params]

    straight = trainer(7)
    train(straight, (1, 2))
    go.save_states(straight, tmp_path / 'states')
    resumed = trainer(8)
    for mine, theirs in zip(resumed._params, straight._params):
        mine.set_data(theirs.data())
    go.load_states(resumed, tmp_path / 'states')
    expected = train(straight, (3, 4))
    assert len(device.launches) == -(-len(SHAPES) // TENSORS)
    for mine, theirs in zip(train(resumed, (3, 4)), expected):
        np.testing.assert_array_equal(mine, theirs)
    monkeypatch.setattr(executors, 'KERNELS', {'cpu': executors._loops})
    for mine, theirs in zip(train(trainer(7), (1, 2, 3, 4)), expected):
        np.testing.assert_array_equal(mine, theirs)


def test_what_is_only_read_is_constant(device):
    """MXNet's engine lets operators that only read an array run side by side."""
    Run('novograd', shapes=SHAPES[:3]).steps(1)
    # gradients read, 'partial' written; 'partial' read, norms and 'kept' written; gradients and 'kept' read, weights and means
    # written
    assert device.launches == [('pass_0', 3, 1), ('pass_1', 1, 4), ('pass_2', 4, 6)]


def test_new_objects_for_the_same_arrays(device, monkeypatch):
    """As a kvstore hands them over: nothing is compiled or allocated again."""
    run = Run('lamb').steps(1)
    prepared, = run.optimizer._executor._prepared.values()
    for _ in range(2):
        run.feed()
        run.weights, run.gradients = ([a.detach() for a in arrays] for arrays in (run.weights, run.gradients))
        del device.waits[:]
        run.update()
        assert device.waits == []
    assert list(run.optimizer._executor._prepared.values()) == [prepared]
    assert len(device.sources) == 1
    for mine, theirs in zip(run.arrays(), on_loops(monkeypatch, 'lamb')):
        np.testing.assert_array_equal(mine, theirs)


def shared(run, which):
    """Let two arrays of ``run`` share memory."""
    flat = nd.array(np.arange(6.0) - 2)
    if which == 'gradients':
        run.gradients[1] = run.gradients[0]
    elif which == 'gradient and weight':
        run.gradients[0] = run.weights[0]
    else:
        run.weights = [flat[:3], flat[3:]]


@pytest.mark.parametrize('which', ['gradients', 'gradient and weight', 'parts of one array'])
@pytest.mark.parametrize('later', [False, True])
def test_arrays_that_share_memory_run_in_operators(device, monkeypatch, which, later):
    def steps():
        run = Run('sgd_torch', shapes=[(3,), (3,)])
        if later:
            run.steps(1)
        shared(run, which)
        for _ in range(2):
            run.feed()
            run.update()
        return run.arrays()

    mine = steps()
    assert len(device.launches) == int(later)
    with monkeypatch.context() as patch:
        patch.setattr(executors, 'KERNELS', {})
        for a, b in zip(mine, steps()):
            np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize('why', ['built without', 'NVRTC fails'])
def test_operators_serve_where_nothing_compiles(device, monkeypatch, caplog, why):
    device.fails = True
    if why == 'built without':
        monkeypatch.setattr(mx.runtime.Features, 'is_enabled', lambda self, name: False)
    with caplog.at_level(logging.WARNING, 'gluon_optim'):
        run = Run('adamw').steps()
        Run('adamw', shapes=SHAPES).steps(1)
    assert device.launches == []
    assert [record.message for record in caplog.records if 'operators' in record.message] == [caplog.records[0].message]
    assert 'adamw runs on MXNet operators on GPUs' in caplog.text and ('mx.rtc' in caplog.text) == (why == 'built without')
    for mine, theirs in zip(run.arrays(), on_loops(monkeypatch, 'adamw')):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_a_loaded_state_is_taken(device, monkeypatch):
    """New states: prepared anew, compiled once."""
    run = Run('adamw').steps(1)
    run.states = [tuple(a.copy() for a in state) for state in run.states]
    run.steps(2)
    assert len(device.sources) == 1
    for mine, theirs in zip(run.arrays(), on_loops(monkeypatch, 'adamw')):
        np.testing.assert_array_equal(mine, theirs)


def test_the_check_for_gpus(device, monkeypatch):
    """tools/gpu_check.py where MXNet runs on the GPU."""
    pytest.importorskip('torch')
    import gpu_check
    for name, kind, launches in (('lamb', 'float16', 6), ('adamw', 'kahan-float16', 2), ('psgld', 'float32', 2)):
        del device.launches[:]
        row = gpu_check.check_kernels(gpu_check.MXNetSteps, name, kind, mx.cpu())
        assert row['holds'] and row['by'] == 'mx.rtc' and row['launches'] == launches, row
        assert device.launches
    assert gpu_check.check_noise(gpu_check.MXNetSteps, 'float32', mx.cpu())['rule'] == 0
