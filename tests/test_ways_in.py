"""What other people's programs do: optimizers made by class, arrays as batch sizes, Module's states without counts, a rate of 0."""
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')

import gluon_optim as go  # noqa: E402
from gluon_optim.rules.mx import DROP_INS  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from contract_nets import Run, assert_same  # noqa: E402

OWN = {name: {'momentum': 0.9} for name in ('sgd', 'nag', 'lars', 'lbsgd', 'dcasgd')}


@pytest.fixture(autouse=True)
def accelerated():
    go.accelerate()
    yield
    go.restore_builtins()


def run_of(optimizer):
    """A run with an optimizer that was made before."""
    run = Run('sgd')
    run.trainer = mx.gluon.Trainer(run.parameters, optimizer, kvstore=None)
    return run


# accelerated(mx.optimizer.Adam(...))

@pytest.mark.parametrize('name', sorted(DROP_INS))
def test_an_optimizer_that_its_class_made_becomes_the_drop_in_in_its_state(name):
    """As GluonTS makes them. From the beginning, and in the middle of a run."""
    cls = mx.optimizer.Optimizer.opt_registry[name].replaces
    for steps in (0, 2):
        made = cls(learning_rate=0.02, wd=0.01, lr_scheduler=mx.lr_scheduler.FactorScheduler(2, 0.5, base_lr=0.02))
        for _ in range(steps):
            weight = mx.nd.ones(2)
            made.update(0, weight, mx.nd.ones(2), made.create_state(0, weight))
        optimizer = go.accelerated(made)
        assert type(optimizer) is type(go.create(name)) and optimizer.lr_scheduler is made.lr_scheduler and optimizer.wd == 0.01
        assert optimizer.num_update == made.num_update == steps and optimizer.update_counts() == ({0: 2} if steps else {})
    by_class = run_of(go.accelerated(cls(learning_rate=0.0625, **OWN.get(name, {}))))
    by_name = Run(name, OWN.get(name, {}))
    mx.random.seed(3)
    by_class.train(3)
    mx.random.seed(3)
    assert_same(by_class.weights(), by_name.train(3).weights())


def test_what_has_no_drop_in():
    class Another(mx.optimizer.Adam):
        pass

    ours = go.create('adamw')
    assert go.accelerated(ours) is ours and go.accelerated(go.create('adam')).__class__ is type(go.create('adam'))
    for optimizer, received in ((Another(), 'Another'), (mx.optimizer.Test(), 'Test'), ('adam', 'builtins.str')):
        with pytest.raises(TypeError, match=f'`accelerated` takes .*Received: .*{received}'):
            go.accelerated(optimizer)


def test_the_log_says_once_what_accelerate_did_not_reach(tmp_path, caplog):
    """Where it is saved or restored: nothing else of this package meets it."""
    def said(optimizer):
        caplog.clear()
        run = run_of(optimizer).train(1)
        go.save_states(run.trainer, tmp_path / 'x')
        go.load_states(run.trainer, tmp_path / 'x')
        go.save_checkpoint(tmp_path / 'y', trainer=run.trainer)
        return [record.getMessage() for record in caplog.records if 'accelerated' in record.getMessage()]

    made = mx.optimizer.Adam()
    assert said(made) == [
        'mxnet.optimizer.optimizer.Adam is not accelerated: it was made by its class, not by its name, or before accelerate(). '
        'Give the trainer gluon_optim.accelerated(optimizer).']
    assert said(mx.optimizer.Adam()) == [] and len(said(mx.optimizer.SGD())) == 1  # once for each class
    assert said(go.accelerated(mx.optimizer.NAG())) == said(mx.optimizer.create('nag')) == said(mx.optimizer.Test()) == []
    go.restore_builtins()
    assert said(mx.optimizer.Adam()) == []
    go.accelerate('sgd')
    assert said(mx.optimizer.Adam()) == [] and len(said(mx.optimizer.SGD())) == 1


# trainer.step(an array)

@pytest.mark.parametrize('name', ['adamw', 'novograd', 'larc', 'adam', 'sgd', 'nadam', 'lars', 'lbsgd'])
@pytest.mark.parametrize('on_kvstore', [False, True])
def test_a_batch_size_in_an_array_and_nan_that_skips(name, on_kvstore):
    """GluonNLP divides by the scale of the loss and the norm, which are arrays; where they are NaN or infinite it skips."""
    options = dict(contexts=[0, 1], kvstore='device', update_on_kvstore=on_kvstore)
    run, straight = Run(name, OWN.get(name, {}), **options), Run(name, OWN.get(name, {}), **options)
    for k, size in enumerate([4.0, np.nan, np.inf, 0.0, -np.inf, 2.0]):
        mx.random.seed(k)
        run.steps = straight.steps
        before = run.facts() if k else None
        run.step(batch_size=mx.nd.array([size]))
        if size == size and size:  # 1 / inf is 0: an update without a gradient
            mx.random.seed(k)
            straight.step(batch_size=size)
        else:
            assert_same(run.facts(), before)
    assert_same(run.facts(), straight.facts())
    assert run.optimizer.num_update == 4 and run.optimizer.rescale_grad == 0.5


@pytest.mark.parametrize('name', ['adamw', 'adam'])
def test_rescale_grad_as_an_array(name, tmp_path):
    optimizer = go.create(name, rescale_grad=mx.nd.array([0.25]))
    assert optimizer.rescale_grad == 0.25 and pickle.loads(pickle.dumps(optimizer)).rescale_grad == 0.25
    skipping = go.create(name, rescale_grad=mx.nd.array([np.nan]))
    weight, gradient = mx.nd.ones(3), mx.nd.ones(3)
    skipping.update(0, weight, gradient, skipping.create_state(0, weight))
    assert weight.asnumpy().tolist() == [1, 1, 1] and skipping.num_update == 0
    run = Run(name).train(1)
    run.step(batch_size=mx.nd.array([np.nan]))
    go.save_states(run.trainer, str(tmp_path / 'x'))  # in between
    assert go.read_states(str(tmp_path / 'x')).hypers['rescale_grad'] == 1.0
    before = run.facts()
    with pytest.raises(ValueError, match=r'must be one number, and so must the batch size. Received: an array of shape \(2,\)'):
        run.step(batch_size=mx.nd.array([1.0, 2.0]))
    assert_same(run.facts(), before)
    with pytest.raises(ValueError, match='rescale_grad'):  # a number that is NaN is a mistake
        run.step(batch_size=float('nan'))
    assert_same(run.facts(), before)


def test_what_mxnet_saved_with_an_array_can_be_loaded():
    made = mx.optimizer.Adam()
    made.rescale_grad = mx.nd.array([0.125])
    assert go.accelerated(made).rescale_grad == 0.125


# Module.save_optimizer_states has states, and no counts

def module(name, steps, begin=0, states=None, weights=None):
    """A Module after ``steps`` updates, that begins with the weights and states of a file."""
    data = mx.sym.FullyConnected(mx.sym.Variable('data'), num_hidden=3, name='fc')
    net = mx.mod.Module(mx.sym.LinearRegressionOutput(data, mx.sym.Variable('label'), name='out'), ['data'], ['label'])
    net.bind([('data', (4, 5))], [('label', (4, 3))])
    mx.random.seed(1)
    net.init_params(mx.init.Uniform(1.0))
    if weights:
        net.set_params(*weights)
    scheduler = mx.lr_scheduler.FactorScheduler(3, 0.5, base_lr=0.05)
    net.init_optimizer('local', name, {'lr_scheduler': scheduler, 'begin_num_update': begin, 'learning_rate': 0.05})
    if states:
        net.load_optimizer_states(states)
    for k in range(begin, begin + steps):
        random = np.random.RandomState(k)
        net.forward_backward(mx.io.DataBatch([mx.nd.array(random.randn(4, 5))], [mx.nd.array(random.randn(4, 3))]))
        net.update()
    return net


def optimizer_of(net):
    return (net._kvstore._updater if net._update_on_kvstore else net._updater).optimizer


@pytest.mark.parametrize('name', ['adamw', 'novograd', 'radam', 'adam_torch', 'adam', 'lamb', 'sgd_torch'])
def test_module_goes_on_from_states_without_counts_at_begin_num_update(name, tmp_path):
    path, first, straight = str(tmp_path / 'x'), module(name, 4), module(name, 7)
    first.save_optimizer_states(path)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        resumed = module(name, 3, 4, path, first.get_params())
    for key, value in straight.get_params()[0].items():
        np.testing.assert_array_equal(resumed.get_params()[0][key].asnumpy(), value.asnumpy())
    a, b = optimizer_of(resumed), optimizer_of(straight)
    assert a.num_update == b.num_update == 7
    if name in DROP_INS:  # MXNet's count is t there
        assert a._index_update_count == b._index_update_count
    else:
        assert a.update_counts() == b.update_counts() and set(a.update_counts().values()) == {7}


@pytest.mark.parametrize('name, said', [('adamw', True), ('adam', True), ('sgd_torch', False), ('sgd', False)])
def test_module_without_begin_num_update_is_told_that_t_restarts(name, said, tmp_path):
    path, first = str(tmp_path / 'x'), module(name, 4)
    first.save_optimizer_states(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        module(name, 3, 0, path, first.get_params())
    told = [str(w.message) for w in caught if 'restarts at 1. Pass begin_num_update' in str(w.message)]
    assert len(told) == said
    if said:
        assert told[0].startswith(f'{name} got states without update counts')


def test_parameters_that_are_new_begin_at_1_beside_states_without_counts():
    """And what has been counted before the first such state came stays."""
    optimizer = go.create('adamw', begin_num_update=10)
    weights = [mx.nd.ones(2) for _ in range(3)]
    states = [optimizer.create_state(i, weights[i]) for i in range(3)]
    optimizer._created = {0, 2}
    for i in (0, 0, 1, 1, 1, 2):
        optimizer.update(i, weights[i], mx.nd.ones(2), states[i])
    assert optimizer.update_counts() == {0: 2, 1: 13, 2: 1} and optimizer.num_update == 13


def test_begin_num_update_alone_is_for_the_schedule():
    run = Run('adamw', {'begin_num_update': 100}).train(2)
    assert set(run.optimizer.update_counts().values()) == {2} and run.optimizer.num_update == 102


# sgld and rates that are 0

def test_sgld_skips_too():
    run = Run('sgld').train(1)
    before = run.weights()
    run.step(batch_size=mx.nd.array([np.nan]))
    assert_same(run.weights(), before)
    assert run.optimizer.num_update == 1


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_sgld_leaves_a_parameter_of_rate_0_and_counts_it(dtype):
    run = Run('sgld', {'multi_precision': dtype == 'float16'}, dtype)
    run.parameters[1].lr_mult = 0
    before = run.weights()
    run.train(2)
    after = run.weights()
    assert (after['p1_weight'] == before['p1_weight']).all() and (after['p0_weight'] != before['p0_weight']).all()
    assert set(run.optimizer.update_counts().values()) == {2}


def test_sgld_at_the_end_of_a_schedule():
    run = Run('sgld', {'lr_scheduler': mx.lr_scheduler.CosineScheduler(2, base_lr=0.1)}).train(2)
    before = run.weights()
    run.train(2)
    assert_same(run.weights(), before)


def test_sgld_names_the_parameter_of_a_negative_rate():
    run = Run('sgld')
    run.parameters[1].lr_mult = -1
    with pytest.raises(ValueError, match="sgld must be 0 or more. Received: -0.0625 for the parameter 'p1_weight'"):
        run.step()
    assert run.optimizer.update_counts().get(1, 0) == 0


def test_sgld_asks_a_scheduler_once_per_update():
    class Counting(mx.lr_scheduler.LRScheduler):
        asked = 0

        def __call__(self, number):
            self.asked += 1
            return 0.1

    scheduler = Counting()
    Run('sgld', {'lr_scheduler': scheduler}).train(2)
    assert scheduler.asked == 2 * 3
