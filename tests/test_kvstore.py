"""Trainers and modules that update on their kvstore: one call of the optimizer per step, with the numbers of one per parameter.

A kvstore hands over new objects at every call; what was prepared for an update serves as long as they are of the same kind.
"""
import sys
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')
from mxnet import autograd, gluon, nd  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from contract_nets import RATE, SHAPES, Run, assert_same, conv_net, flat, images, in_process, numbers  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim.mxnet import executors, kvstore  # noqa: E402
from gluon_optim.mxnet.optimizer import Runner  # noqa: E402

STORES = [('local', (0,)), ('local', (0, 1)), ('device', (0,)), ('device', (0, 1))]
stores = pytest.mark.parametrize('kind, contexts', STORES, ids=lambda value: str(value))
LOSS = gluon.loss.SoftmaxCrossEntropyLoss()


@pytest.fixture(autouse=True)
def accelerated():
    go.accelerate()
    yield
    go.restore_builtins()


def run_on(kind, contexts, name='novograd', arguments=None):
    return Run(name, arguments, contexts=contexts, kvstore=mx.kv.create(kind), update_on_kvstore=True)


@pytest.fixture
def calls(monkeypatch):
    """How many parameters each call of an optimizer of ours had."""
    seen, update = [], Runner.update_multi_precision
    monkeypatch.setattr(Runner, 'update_multi_precision', lambda self, index, *others: (
        seen.append(len(index)), update(self, index, *others)))
    return seen


@stores
def test_one_call_per_step(kind, contexts, calls):
    run_on(kind, contexts).train(3)
    assert calls == [len(SHAPES)] * 3


def one_by_one(monkeypatch, make, train):
    """What `train` returns of a run as it is, and of one in which MXNet's trainer asks for each parameter."""
    together = train(make())
    run = make()
    with monkeypatch.context() as patch:
        patch.setattr(gluon.Trainer, '_allreduce_grads', kvstore._allreduce_grads)
        return together, train(run)


class Rising:
    """A schedule that differs at every update."""

    base_lr = RATE

    def __call__(self, num_update):
        return self.base_lr * (1 + num_update / 8)


@stores
@pytest.mark.parametrize('name, arguments', [
    ('adam', {}), ('sgd', dict(momentum=0.9, wd=0.125)), ('nadam', {}), ('lars', dict(momentum=0.9)), ('novograd', dict(wd=0.125)),
    ('sgld', {}), ('psgld', {}), ('lbsgd', dict(momentum=0.9, batch_scale=2)), ('ftml', {}), ('larc', dict(momentum=0.9))],
    ids=lambda x: str(x))
def test_the_same_numbers_as_one_by_one(name, arguments, kind, contexts, monkeypatch):
    """Under a schedule, with a parameter that is trained from the third step on and so has another count."""
    def make():
        mx.random.seed(5)  # sgld and psgld draw
        return run_on(kind, contexts, name, dict(arguments, lr_scheduler=Rising()))

    def train(run):
        run.parameters[0].grad_req = 'null'
        run.train(2)
        run.parameters[0].grad_req = 'write'
        run.train(3)
        return run.weights() if name == 'sgld' else run.facts()  # it has no state

    assert_same(*one_by_one(monkeypatch, make, train))


@pytest.mark.parametrize('name', ['adam', 'novograd'])
def test_half_and_single_parameters_on_one_store(name, monkeypatch):
    def make():
        run = run_on('device', (0, 1), name, dict(multi_precision=True))
        run.parameters[1].cast('float16')
        return run

    assert_same(*one_by_one(monkeypatch, make, lambda run: run.train(3).facts()))


def test_a_change_of_the_batch_size_holds_at_once(monkeypatch):
    def train(run):
        for size in (1, 2, 2, 4):
            run.step(batch_size=size)
        return run.facts()

    assert_same(*one_by_one(monkeypatch, lambda: run_on('local', (0, 1), 'adam'), train))


def module_on(kind, contexts, name, steps=4, **arguments):
    """Parameters, and the states of the store, of a small `Module` after some steps; one of its parameters is not trained."""
    data = mx.sym.Variable('data')
    net = mx.sym.FullyConnected(mx.sym.Activation(mx.sym.FullyConnected(data, num_hidden=5, name='first'), 'tanh'), num_hidden=3,
                                name='second')
    module = mx.mod.Module(mx.sym.SoftmaxOutput(net, name='softmax'), context=[mx.cpu(i) for i in contexts],
                           fixed_param_names=['first_bias'])
    module.bind([('data', (8, 4))], [('softmax_label', (8,))])
    random = np.random.RandomState(0)
    shapes = dict(first_weight=(5, 4), first_bias=(5,), second_weight=(3, 5), second_bias=(3,))
    module.init_params(arg_params={key: nd.array(random.normal(size=shape)) for key, shape in shapes.items()})
    module.init_optimizer(mx.kv.create(kind), name, dict(arguments, learning_rate=RATE))
    for _ in range(steps):
        x, y = nd.array(random.normal(size=(8, 4))), nd.array(random.randint(0, 3, 8))
        module.forward_backward(mx.io.DataBatch([x], [y]))
        module.update()
    arrays = dict(module.get_params()[0])
    for key, state in module._kvstore._updater.states.items():
        arrays.update((f'{key}/{k}', array) for k, array in enumerate(flat(state)))
    return {key: array.asnumpy() for key, array in arrays.items()}


@stores
@pytest.mark.parametrize('name, arguments', [('adam', {}), ('lars', dict(momentum=0.9)), ('novograd', {})])
def test_modules_make_one_call_too(name, arguments, kind, contexts, calls, monkeypatch):
    together = module_on(kind, contexts, name, wd=0.125, **arguments)
    assert calls == [3] * 4 and len(together) > 4
    monkeypatch.setattr(mx.module.module, '_update_params_on_kvstore', kvstore._update_params_on_kvstore)
    monkeypatch.setattr(kvstore, 'update_together', lambda: None)
    assert_same(together, module_on(kind, contexts, name, wd=0.125, **arguments))
    assert calls == [3] * 4 + [1] * 12


def test_an_error_of_the_optimizer_reaches_who_updates_a_module():
    with pytest.raises(ValueError, match='`wd` must be in .-inf, inf.. Received: wd=nan'):
        module_on('local', (0, 1), 'adam', wd=float('nan'))


def test_a_net_whose_parameters_are_all_frozen(calls):
    run = run_on('local', (0, 1))
    for parameter in run.parameters:
        parameter.grad_req = 'null'
    run.trainer.step(1)
    assert calls == []
    np.testing.assert_array_equal(run.weights()['p0_weight'], numbers(0, SHAPES[0]))


def test_sparse_gradients_are_taken_one_by_one(calls):
    embedding = gluon.nn.Embedding(5, 3, sparse_grad=True)
    embedding.initialize()
    trainer = gluon.Trainer(embedding.collect_params(), go.create('sgd', learning_rate=0.5), kvstore=mx.kv.create('local'),
                            update_on_kvstore=True)
    before = embedding.weight.data().asnumpy()
    with autograd.record():
        loss = embedding(nd.array([1, 3])).sum()
    loss.backward()
    trainer.step(1)
    expected = before.copy()
    expected[[1, 3]] -= 0.5
    np.testing.assert_array_equal(embedding.weight.data().asnumpy(), expected)
    assert calls == [1]


def test_a_trainer_of_ones_own_way_keeps_it(calls):
    class OneByOne(gluon.Trainer):
        def _allreduce_grads(self):
            for i, parameter in enumerate(self._params):
                self._kvstore.pushpull(i, parameter.list_grad(), out=parameter.list_data())

    run = run_on('local', (0,))
    run.trainer = OneByOne(run.parameters, 'novograd', {'learning_rate': RATE}, mx.kv.create('local'), update_on_kvstore=True)
    assert_same(run.train(3).facts(), run_on('local', (0,)).train(3).facts())
    assert calls == [1] * 3 * len(SHAPES) + [len(SHAPES)] * 3


def test_mxnets_own_optimizers_are_called_as_ever(monkeypatch):
    seen, update = [], mx.optimizer.Adam.update
    monkeypatch.setattr(mx.optimizer.Adam, 'update', lambda self, index, *more: (seen.append(index), update(self, index, *more)))
    go.create('adam')  # one of ours exists
    go.restore_builtins()
    run_on('local', (0,), 'adam').step()
    assert seen == [0, 1, 2]


@stores
def test_an_error_of_the_optimizer_reaches_the_caller(kind, contexts):
    run = run_on(kind, contexts).train(2)
    before = run.facts()
    run.optimizer.beta1 = 2
    with pytest.raises(ValueError, match='`beta1` must be in'):
        run.step()
    assert_same(before, run.facts())
    run.optimizer.beta1 = 0.95
    assert run.step().optimizer.num_update == 3


# What was prepared

@pytest.fixture
def prepared(monkeypatch):
    """The lists of parameters for which a kernel was prepared."""
    pytest.importorskip('numba')
    seen, make = [], executors._Loops.__init__

    def counted(self, *given):
        seen.append(len(given[-1].weights))
        make(self, *given)

    monkeypatch.setattr(executors._Loops, '__init__', counted)
    return seen


@stores
def test_a_kvstores_new_objects_need_no_new_preparation(kind, contexts, prepared, monkeypatch):
    one_by_one(monkeypatch, lambda: run_on(kind, contexts), lambda run: run.train(4))
    assert prepared == [len(SHAPES)] + [1] * len(SHAPES)


def single(name='sgd_torch', shape=(3, 4), dtype='float32'):
    """An optimizer after one update of one parameter, and what was updated."""
    optimizer = go.create(name, learning_rate=0.5)
    weight, gradient = nd.array(numbers(0, shape), dtype=dtype), nd.array(numbers(1, shape), dtype=dtype)
    state = optimizer.create_state(0, weight)
    optimizer.update(0, weight, gradient, state)
    return optimizer, weight, gradient, state


@pytest.mark.parametrize('change, error', [
    (lambda w, g: (w.reshape((4, 3)), g), ValueError), (lambda w, g: (w, g.reshape((4, 3))), ValueError),
    (lambda w, g: (w, g.reshape((3, 4, 1))), ValueError), (lambda w, g: (w, g[:2]), ValueError),
    (lambda w, g: (w, g.astype('float64')), ValueError), (lambda w, g: (w.astype('int32'), g), TypeError),
    (lambda w, g: (w, g.tostype('row_sparse')), TypeError), (lambda w, g: (w.tostype('row_sparse'), g), TypeError)])
def test_new_objects_of_another_kind_are_checked_like_the_first(change, error):
    optimizer, weight, gradient, state = single()
    new = change(weight, gradient)
    before = new[0].asnumpy().copy()
    with pytest.raises(error):
        optimizer.update(0, *new, state)
    np.testing.assert_array_equal(new[0].asnumpy(), before)
    optimizer.update(0, weight, gradient, state)  # and it goes on
    np.testing.assert_array_equal(weight.asnumpy(), numbers(0, (3, 4)) - 0.5 * 2 * numbers(1, (3, 4)))


@pytest.mark.parametrize('change', [
    lambda a: nd.array(np.tile(a.asnumpy(), (2, 1))), lambda a: a.astype('float64'), lambda a: a.as_in_context(mx.cpu(1)),
    lambda a: a.reshape((2, 2, 1, 1, 1, 1, 3)).copy(), lambda a: a.copy()],
    ids=['shape', 'dtype', 'context', 'seven dimensions', 'same'])
def test_new_objects_of_another_kind_are_updated_as_what_they_are(change):
    optimizer, weight, gradient, state = single()
    new, given = change(weight), change(gradient)
    before, expected = weight.asnumpy(), new.asnumpy() - 0.5 * given.asnumpy()
    for _ in range(2):
        optimizer.update(0, new, given, state)
    np.testing.assert_array_equal(new.asnumpy(), expected - 0.5 * given.asnumpy())
    np.testing.assert_array_equal(weight.asnumpy(), before)


@pytest.mark.parametrize('name', ['adam', 'novograd'])
@pytest.mark.parametrize('running', [1, 4])
def test_convolutions_are_evaluated_while_their_weights_are_updated_one_by_one(name, running):
    """Inference turns weights into oneDNN's blocks in place, and nobody waits for it: by single keys as by a list."""
    results = []
    for singly in (True, False):
        net = conv_net()
        optimizer = go.create(name, learning_rate=0.02)
        updater = mx.optimizer.get_updater(optimizer)
        parameters = list(net.collect_params().values())
        for step in range(4):
            data, label = images(step)
            with autograd.record():
                loss = LOSS(net(data), label)
            loss.backward()
            for _ in range(running):
                net(data)  # still running
            lists = list(range(len(parameters))), [p.grad() for p in parameters], [p.data() for p in parameters]
            for one in zip(*lists) if singly else [lists]:
                updater(*one)
                if singly:
                    net(data)
        nd.waitall()  # MXNet's own `asnumpy` does not wait for inference that turns the weight's bytes
        results.append([p.data().asnumpy() for p in parameters])
    for a, b in zip(*results):
        np.testing.assert_array_equal(a, b)


def test_importing_the_package_leaves_mxnet_as_it_is():
    """Stores and trainers are changed by the first optimizer of this package, or by `accelerate`."""
    out, _ = in_process('''
import mxnet as mx
places = [(mx.gluon.Trainer, '_allreduce_grads'), (mx.kvstore.KVStore, 'set_optimizer'), (mx.model, '_update_params_on_kvstore')]
before = [getattr(*place) for place in places]
import gluon_optim as go
print([getattr(*place) is function for place, function in zip(places, before)], flush=True)
go.accelerate()
print([getattr(*place) is function for place, function in zip(places, before)], flush=True)
import os
os._exit(0)
''')
    assert out.splitlines() == ['[True, True, True]', '[False, False, False]']
