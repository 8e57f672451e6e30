"""Drop-ins on MXNet 2.0, beside MXNet's own optimizers: the same results, states and files, by the same names.

Through a real Trainer, with arrays of mx.np. test_mxnet2.py has the formulas, and needs no MXNet.
"""
import pickle
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')
sys.path.insert(0, str(Path(__file__).parent))
from contract_nets import MXNETS_2, NEWER, Run, flat, in_process  # noqa: E402

if not NEWER:
    pytest.skip('for MXNet 2.x', allow_module_level=True)

from mxnet import gluon  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim import rules  # noqa: E402
from gluon_optim.mxnet import builtin, executors  # noqa: E402
from gluon_optim.mxnet.native import Stranger  # noqa: E402

MOMENTS = dict(learning_rate=0.2, beta1=0.8, beta2=0.9, epsilon=0.02)
# nothing at its default, large rates
OPTIONS = {
    'sgd': [dict(learning_rate=0.5, momentum=0.8), dict(learning_rate=0.5), dict(learning_rate=0.5, momentum=0.8, aggregate_num=4)],
    'nag': [dict(learning_rate=0.5, momentum=0.8), dict(learning_rate=0.5, momentum=0.0)],
    'signum': [dict(learning_rate=0.1, momentum=0.8, wd_lh=0.2), dict(learning_rate=0.1, momentum=0.0, wd_lh=0.2)],
    'adagrad': [dict(learning_rate=0.5, epsilon=0.02)],
    'rmsprop': [dict(learning_rate=0.1, rho=0.8, epsilon=0.02, clip_weights=1.5),
                dict(learning_rate=0.1, rho=0.8, momentum=0.7, centered=True, epsilon=0.02, clip_weights=1.5)],
    'adadelta': [dict(learning_rate=5.0, rho=0.8, epsilon=0.01)],
    'adam': [MOMENTS], 'adamax': [MOMENTS], 'ftml': [MOMENTS], 'nadam': [dict(MOMENTS, schedule_decay=0.1)],
    'dcasgd': [dict(learning_rate=0.5, momentum=0.8, lamda=0.4), dict(learning_rate=0.5, lamda=0.4)],
    'ftrl': [dict(learning_rate=0.5, lamda1=0.1, beta=0.4)],
    'sgld': [dict(learning_rate=0.2)],
    'lamb': [dict(MOMENTS, lower_bound=2.0, upper_bound=4.0), dict(learning_rate=0.1, bias_correction=False),
             dict(MOMENTS, aggregate_num=2)],
    'lars': [dict(learning_rate=0.5, momentum=0.8, eta=0.1, epsilon=0.01), dict(learning_rate=0.5, eta=0.1),
             dict(learning_rate=0.5, momentum=0.8, eta=0.1, epsilon=0.01, aggregate_num=4)],
}
CASES = [pytest.param(name, own, id=f'{name}-{k}') for name, settings in OPTIONS.items() for k, own in enumerate(settings)]
each = pytest.mark.parametrize('name', OPTIONS)
BASE = dict(wd=0.3, clip_gradient=0.7)
SHAPES = ((3, 4), (7,), (1,), (2, 3, 5), (40, 50), (4,))
SCALES = (1.0, 0.03, 3.0, 0.4, 2.0, 0.01, 0.7, 5.0)
ROUNDED = 1.01 / 1024  # a master near the middle of two float16 numbers may round to either


@pytest.fixture(autouse=True)
def restored():
    yield
    go.restore_builtins()


def trained(optimizer, steps=range(8), dtype='float32', run=None, **options):
    """A run of the optimizer over these steps; ``run`` goes on."""
    mx.np.random.seed(5)
    run = run or Run(optimizer, dtype=dtype, shapes=SHAPES, weights=values(0), **options)
    for step in steps:
        run.step([SCALES[step] * g for g in values(step + 1)], batch_size=2)
    return run


def values(seed):
    random = np.random.RandomState(seed)
    return [random.standard_normal(shape) for shape in SHAPES]


def both(name, own, dtype='float32', **options):
    """MXNet's own run, and that of the drop-in."""
    arguments = dict(BASE, **own, multi_precision=dtype == 'float16')
    return [trained(create(name, **arguments), dtype=dtype, **options) for create in (mx.optimizer.create, go.create)]


def arrays(run):
    """The arrays of the states, by parameter and place; None where MXNet has it."""
    return {(i, k): array for i, state in run.updaters()[0].states.items() for k, array in enumerate(flat(state))}


def compare(theirs, ours, tolerance=2e-6, masters=False):
    """Weights in units of how far they moved, states in units of their largest value."""
    start = [np.asarray(w, 'float64') for w in values(0)]
    for w0, expected, found in zip(start, theirs.weights().values(), ours.weights().values()):
        moved = np.abs(expected.astype('float64') - w0).max()
        np.testing.assert_allclose(found.astype('float64'), expected.astype('float64'), rtol=ROUNDED if masters else 0,
                                   atol=tolerance * moved)
    expected, found = arrays(theirs), arrays(ours)
    assert expected.keys() == found.keys()
    for key, array in expected.items():
        assert (array is None) == (found[key] is None)
        if array is not None:
            assert (array.dtype, array.shape, type(array)) == (found[key].dtype, found[key].shape, type(found[key]))
            expectation = array.asnumpy()
            np.testing.assert_allclose(found[key].asnumpy(), expectation, rtol=0, err_msg=str(key),
                                       atol=max(tolerance * np.abs(expectation).max(), 1e-30))


def test_there_is_one_for_each_that_is_not_this_packages_too():
    own = {name for name, cls in mx.optimizer.Optimizer.opt_registry.items() if cls.__module__.startswith('mxnet.optimizer.')}
    assert own - set(builtin.CLASSES) == {*MXNETS_2, 'groupadagrad', 'test'}
    assert set(builtin.CLASSES) == set(OPTIONS)


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('name, own', CASES)
def test_the_same_results_and_states(name, own, dtype):
    compare(*both(name, own, dtype), masters=dtype == 'float16')


@each
def test_on_mxnets_operators(name, monkeypatch):
    monkeypatch.setattr(executors, '_compiler', lambda: None)
    compare(*both(name, OPTIONS[name][0], 'float16'), masters=True)


@each
def test_defaults_are_those_of_mxnet(name):
    theirs, ours = mx.optimizer.create(name), go.create(name)
    assert isinstance(ours, type(theirs)) and ours.learning_rate == theirs.learning_rate
    assert {key: value for key, value in vars(theirs).items() if key not in vars(ours) or vars(ours)[key] != value} == {}
    compare(trained(theirs), trained(ours), 1e-3)  # at some default rates a step is a few thousand ulp


@each
def test_on_a_kvstore(name):
    """Where MXNet takes its lamb with aggregate_num=1 only, and then counts twice."""
    own, alone = dict(BASE, **OPTIONS[name][0]), {'aggregate_num': 1} if name == 'lamb' else {}

    def on_store(create):
        return trained(create(name, **own, **alone), kvstore=mx.kv.create('local'), update_on_kvstore=True)

    compare(trained(mx.optimizer.create(name, **own)) if name == 'lamb' else on_store(mx.optimizer.create), on_store(go.create))


@pytest.mark.parametrize('name', [name for name in OPTIONS if name != 'sgld'])
def test_two_devices(name):
    """Copies stay equal. MXNet has one m_schedule for all devices, so that those of its nadam drift apart."""
    options = dict(contexts=(0, 1), kvstore='device', update_on_kvstore=False)
    ours = trained(go.create(name, **BASE, **OPTIONS[name][0]), **options)
    ours.weights()  # which compares them
    if name != 'nadam':
        compare(trained(mx.optimizer.create(name, **BASE, **OPTIONS[name][0]), **options), ours)


@pytest.mark.parametrize('name, usual', [(name, mx.optimizer.create(name).use_fused_step) for name in OPTIONS])
def test_the_other_way_to_update_is_mxnets_own(name, usual):
    """`use_fused_step` that is not the default."""
    if not usual:
        with pytest.raises(NotImplementedError):
            trained(go.create(name, use_fused_step=True), range(1))
        return
    theirs, ours = both(name, dict(OPTIONS[name][0], use_fused_step=False), 'float16')
    compare(theirs, ours, 0.0)
    assert ours.optimizer._index_update_count == theirs.optimizer._index_update_count


def test_mxnets_lamb_counts_twice_where_ours_counts_once():
    theirs, ours = both('lamb', dict(MOMENTS, aggregate_num=1))
    assert set(theirs.optimizer._index_update_count.values()) == {16} and set(ours.optimizer.update_counts().values()) == {8}
    compare(trained(mx.optimizer.create('lamb', **BASE, **MOMENTS, aggregate_num=2)), ours)


@each
def test_schedulers_are_asked_as_by_mxnet(name):
    def scheduled():
        return dict(OPTIONS[name][0], lr_scheduler=mx.lr_scheduler.MultiFactorScheduler([2, 4, 7], 0.5, base_lr=0.4))

    arguments = [dict(BASE, **scheduled()) for _ in range(2)]
    compare(*[trained(create(name, **own)) for create, own in zip((mx.optimizer.create, go.create), arguments)])


# accelerate

def test_names_create_the_drop_ins_and_mxnets_own_again():
    assert type(mx.optimizer.create('adam')) is mx.optimizer.Adam
    go.accelerate()
    assert {name for name in OPTIONS if isinstance(mx.optimizer.create(name), builtin.DropIn)} == set(OPTIONS)
    assert type(mx.optimizer.create('adamw')) is mx.optimizer.AdamW
    trainer = gluon.Trainer(Run('sgd_torch').parameters, 'adam', {'beta1': 0.8})
    assert isinstance(trainer._optimizer, builtin.Adam) and trainer._optimizer.beta1 == 0.8
    go.restore_builtins()
    assert {type(mx.optimizer.create(name)) for name in OPTIONS} == {cls.replaces for cls in builtin.CLASSES.values()}
    go.accelerate('sgd')
    assert isinstance(mx.optimizer.create('sgd'), builtin.SGD) and type(mx.optimizer.create('adam')) is mx.optimizer.Adam


@pytest.mark.parametrize('name', MXNETS_2)
def test_names_that_are_mxnets_and_ours_stay_mxnets(name):
    with pytest.raises(ValueError, match=f'{name!r} stays the optimizer of MXNet 2.x.*gluon_optim.create'):
        go.accelerate(name)
    with pytest.raises(TypeError, match='Others have no drop-in'):
        go.accelerated(mx.optimizer.create(name))
    assert type(go.create(name)).__module__ == 'gluon_optim.mxnet.registry'


def test_what_only_mxnet_1_has():
    with pytest.raises(ValueError, match="Unknown optimizer of MXNet 2.x 'lbsgd'"):
        go.create('lbsgd')
    with pytest.raises(ValueError, match="Unknown built-in optimizer 'lbsgd'"):
        go.accelerate('lbsgd')


@each
def test_accelerated_goes_on_where_mxnets_own_was(name):
    own = dict(BASE, **OPTIONS[name][0])
    half = trained(mx.optimizer.create(name, **own), range(4))
    ours = go.accelerated(half.optimizer)
    assert isinstance(ours, builtin.CLASSES[name])
    half.trainer._optimizer = half.trainer._updaters[0].optimizer = ours
    half.trainer._updaters[0].aggregate_updates = ours.aggregate_num > 1
    compare(trained_on(mx.optimizer.create(name, **own)), trained(None, range(4, 8), run=half))


def trained_on(optimizer):
    """In two parts: sgld's noise is seeded for each."""
    return trained(None, range(4, 8), run=trained(optimizer, range(4)))


# States

@each
@pytest.mark.parametrize('saver, loader', [('theirs', 'ours'), ('ours', 'theirs'), ('ours', 'ours')])
def test_native_states_both_ways(name, saver, loader, tmp_path):
    """`Trainer.save_states`: a drop-in's file is MXNet's own, and MXNet's own file continues under a drop-in."""
    create = {'theirs': mx.optimizer.create, 'ours': go.create}
    own = dict(BASE, **OPTIONS[name][0], multi_precision=True)
    first = trained(create[saver](name, **own), range(4), 'float16')
    first.trainer.save_states(str(tmp_path / 'x.states'))
    assert b'gluon_optim' not in (tmp_path / 'x.states').read_bytes()
    second = Run(create[loader](name, **own), dtype='float16', shapes=SHAPES, weights=list(first.weights().values()))
    second.trainer.load_states(str(tmp_path / 'x.states'))
    assert isinstance(second.optimizer, builtin.DropIn) == (loader == 'ours')
    compare(trained(None, range(4, 8), run=first), trained(None, range(4, 8), run=second), masters=True)


@each
@pytest.mark.parametrize('saver, loader', [('theirs', 'ours'), ('ours', 'theirs'), ('ours', 'ours')])
def test_our_states_both_ways(name, saver, loader, tmp_path):
    create = {'theirs': mx.optimizer.create, 'ours': go.create}
    own = dict(BASE, **OPTIONS[name][0], multi_precision=True)
    first = trained(create[saver](name, **own), range(4), 'float16')
    go.save_states(first.trainer, tmp_path / 'x')
    states = go.read_states(tmp_path / 'x')
    assert states.optimizer == name and states.hypers.get('variant', '2.x') == '2.x'
    second = Run(create[loader](name, **own), dtype='float16', shapes=SHAPES, weights=list(first.weights().values()))
    second.step(values(9))  # something to forget
    go.load_states(second.trainer, tmp_path / 'x')
    assert go.states_digest(second.trainer) == go.states_digest(first.trainer)
    second.optimizer.rescale_grad = first.optimizer.rescale_grad
    compare(trained(None, range(4, 8), run=first), trained(None, range(4, 8), run=second), masters=True)


@each
def test_mxnets_file_in_our_reader(name, tmp_path):
    """`go.load_states` of a .states file of MXNet's own, into a drop-in: nothing is lost."""
    own = dict(BASE, **OPTIONS[name][0])
    first = trained(mx.optimizer.create(name, **own), range(4))
    first.trainer.save_states(str(tmp_path / 'x.states'))
    second = Run(go.create(name, **own), shapes=SHAPES, weights=list(first.weights().values()))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        go.load_states(second.trainer, tmp_path / 'x.states')
    compare(trained(None, range(4, 8), run=first), trained(None, range(4, 8), run=second))


WITHOUT_DROP_IN = ['adabelief', 'adamw', 'lans']  # their names mean other optimizers here


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('name', WITHOUT_DROP_IN)
def test_mxnets_file_of_an_optimizer_without_a_drop_in(name, dtype, tmp_path):
    own = dict(BASE, **MOMENTS, multi_precision=True)
    first = trained(mx.optimizer.create(name, **own), range(4), dtype)
    first.trainer.save_states(str(tmp_path / 'x.states'))
    second = Run(mx.optimizer.create(name, **own), dtype=dtype, shapes=SHAPES, weights=list(first.weights().values()))
    go.load_states(second.trainer, tmp_path / 'x.states')
    compare(trained(None, range(4, 8), run=first), trained(None, range(4, 8), run=second), 0.0)
    assert go.states_digest(second.trainer) == go.states_digest(first.trainer)


@pytest.mark.parametrize('name', WITHOUT_DROP_IN)
def test_how_to_continue_where_two_optimizers_have_one_name(name, tmp_path):
    for create, advice in ((go.create, f"go.create('{name}')"), (mx.optimizer.create, f"'{name}'")):
        go.save_states(trained(create(name), range(2)).trainer, tmp_path / 'x')
        other = {go.create: mx.optimizer.create, mx.optimizer.create: go.create}[create]
        with pytest.raises(ValueError, match=re.escape(f'Create the trainer with {advice}, or load states of ')):
            go.load_states(Run(other(name), shapes=SHAPES).trainer, tmp_path / 'x')
    trained(mx.optimizer.create('adamw'), range(2)).trainer.save_states(str(tmp_path / 'x.states'))
    with pytest.raises(ValueError, match="are of 'mxnet.adamw', .* Create the trainer with 'adamw', or"):
        go.load_states(Run(go.create('adamw'), shapes=SHAPES).trainer, tmp_path / 'x.states')


@pytest.mark.parametrize('name', ['adam', 'adagrad', 'lars'])
def test_a_file_from_before_there_were_drop_ins_here(name, tmp_path, monkeypatch):
    """It calls the optimizer by the path of its class, and holds its state as MXNet nests it."""
    first = trained(mx.optimizer.create(name, **BASE, **OPTIONS[name][0]), range(4))
    with monkeypatch.context() as before:
        before.setattr('gluon_optim.mxnet.builtin.twin', lambda optimizer: None)
        go.save_states(first.trainer, tmp_path / 'x')
    assert go.read_states(tmp_path / 'x').optimizer == Stranger(first.optimizer, [mx.cpu()]).name
    second = Run(mx.optimizer.create(name, **BASE, **OPTIONS[name][0]), shapes=SHAPES, weights=list(first.weights().values()))
    go.load_states(second.trainer, tmp_path / 'x')
    compare(trained(None, range(4, 8), run=first), trained(None, range(4, 8), run=second), 0.0)


@pytest.mark.parametrize('name', [name for name in OPTIONS if any(hyper.name == 'variant' for hyper in rules.get(name).hypers)])
def test_a_run_of_mxnet_1_goes_on_as_it_was(name, tmp_path):
    """The file says whose formula it is; MXNet's own file and optimizer cannot, and refuse."""
    rule, first = rules.get(name), trained(go.create(name, **BASE, **OPTIONS[name][0]), range(4))
    go.save_states(first.trainer, tmp_path / 'x')
    states = go.read_states(tmp_path / 'x')
    states.hypers['variant'] = '1.x'
    ours, theirs = [Run(create(name, **BASE, **OPTIONS[name][0]), shapes=SHAPES, weights=list(first.weights().values()))
                    for create in (go.create, mx.optimizer.create)]
    with pytest.warns(UserWarning, match="variant is '2.x' in the trainer and '1.x' in the file"):
        go.mxnet.trainer.import_states(ours.trainer, states)
    ours.step(values(5))
    h = rule.hyperparameters(**{**states.hypers, 'rescale_grad': 1.0})
    if name != 'nadam':  # whose schedule all parameters share
        weight, slots = first.weights()['p4_weight'], states.slots['p4_weight']
        expected, _ = rule.run(np, h, 5, weight, values(5)[4].astype('float32'), slots)
        np.testing.assert_allclose(ours.weights()['p4_weight'], expected, rtol=0, atol=2e-6 * np.abs(expected - weight).max())
    with pytest.raises(ValueError, match=f"The variant of a pickled {name} must be '2.x'"):
        ours.trainer.save_states(str(tmp_path / 'y.states'))
    with pytest.raises(ValueError, match=f"MXNet's own {name} has no `variant`"):
        go.mxnet.trainer.import_states(theirs.trainer, states)


@pytest.mark.parametrize('name', ['adam', 'rmsprop'])
def test_pickled_it_is_mxnets_own(name):
    """In a process that does not have this package."""
    optimizer = pickle.dumps(go.create(name, learning_rate=0.5))
    code = f"""
import sys; sys.modules['gluon_optim'] = None
import pickle, mxnet as mx
optimizer = pickle.loads(bytes.fromhex({optimizer.hex()!r}))
print(type(optimizer).__module__, optimizer.lr, sorted(vars(optimizer)) == sorted(vars(type(optimizer)())))
import os; sys.stdout.flush(); os._exit(0)
"""
    assert in_process(code)[0].split() == [f'mxnet.optimizer.{name}', '0.5', 'True']
