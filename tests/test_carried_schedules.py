"""A schedule survives a conversion: 200 further updates with Gluon's rates in PyTorch, JAX and ONNX Runtime, and the way back."""
import copy
import functools
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import schedule_cases
import schedule_runs
from schedule_runs import CASES, FURTHER, METRICS, MULTS

import gluon_optim as go
from gluon_optim import cli, schedules
from gluon_optim.mapping import loss_scalers
from gluon_optim.mapping.torch_schedulers import in_pytorch
from gluon_optim.states import container
from gluon_optim.states.model import ParameterInfo

RECORDED = json.loads(schedule_runs.FILE.read_text(encoding='utf-8'))
STARTS = [(name, place) for name in CASES for place in range(len(RECORDED['cases'][name])) if name not in METRICS]
TIME = [name for name in CASES if name not in METRICS]
BETWEEN = FURTHER // 2  # where the program that continues is itself stopped and resumed


def torch():
    return pytest.importorskip('torch')


@functools.lru_cache(maxsize=None)
def gluons(name):
    """What real trainers do."""
    pytest.importorskip('mxnet')
    return pickle.dumps(schedule_runs.runs(name))


def recorded(name, place):
    """States as Gluon had them, with arrays of a rule made up, and the rates that Gluon used afterwards."""
    known = RECORDED['cases'][name][place]
    infos = [ParameterInfo(key, key, (2,), 'float32', lr_mult=mult) for key, mult in MULTS.items()]
    slots = {key: {'mean': np.full(2, 0.5, 'float32'), 'var': np.ones(2, 'float32')} for key in MULTS}
    base = known['scheduler']['attributes'].get('base_lr')
    h = go.rules.get('adamw').hyperparameters(**({} if base is None else {'learning_rate': base}))
    states = go.OptimizerStates('adamw', h.asdict(), known['num_update'], infos, dict(known['counts']), slots,
                                scheduler=copy.deepcopy(known['scheduler']))
    return states, np.array(known['rates'])


def optimizer_from(state_dict, target):
    params = [torch().nn.Parameter(torch().ones(2)) for _ in MULTS]
    groups = go.torch.param_groups(state_dict, params)
    made = go.torch.create('adamw', groups) if target == 'mirror' else torch().optim.AdamW(groups)
    made.load_state_dict(state_dict)
    return made


def through_a_file(value, path):
    torch().save(value, path)
    return torch().load(path, weights_only=True)


def rates_of(optimizer):
    """Those of the groups, by parameter."""
    return dict(zip(MULTS, [group['lr'] for group in optimizer.param_groups]))


def train(optimizer, scheduler, updates):
    """The rates of the updates."""
    used = []
    for _ in range(updates):
        for group in optimizer.param_groups:
            for param in group['params']:
                param.grad = torch().ones(2)
        used.append(rates_of(optimizer))
        optimizer.step()
        scheduler.step()
    return used


def same_rates(found, expected, exact):
    """Ours are computed by one function on both sides. MXNet's own classes multiply step by step, where the function has a
    power, and take Python's cosine, not NumPy's: there the last digits of a rate of 0.4 may differ."""
    for key in MULTS:
        theirs, ours = [rates[key] for rates in found], [rates[key] for rates in expected]
        if exact:
            assert theirs == ours
        else:
            np.testing.assert_allclose(theirs, ours, rtol=1e-14, atol=2e-16)


# PyTorch

@pytest.mark.parametrize('target', ['mirror', 'torch'])
@pytest.mark.parametrize('name', TIME)
def test_200_updates_in_pytorch_and_back(name, target, tmp_path):
    """Through a file that PyTorch reads safely, resumed in the middle in a new optimizer with a new scheduler."""
    torch()
    found, last = pickle.loads(gluons(name))
    for states, used in found:
        checkpoint = through_a_file(go.to_torch(states, target), tmp_path / 'there.pt')
        optimizer = optimizer_from(checkpoint, target)
        scheduler = go.torch.scheduler(optimizer, checkpoint['scheduler'])
        assert isinstance(scheduler, torch().optim.lr_scheduler.LambdaLR) and scheduler.last_epoch == states.num_update
        rates = train(optimizer, scheduler, BETWEEN)
        saved = through_a_file({'optimizer': optimizer.state_dict(), 'scheduler': scheduler.state_dict()}, tmp_path / 'between.pt')
        optimizer = optimizer_from(saved['optimizer'], target)
        scheduler = go.torch.scheduler(optimizer, saved['scheduler'])
        rates += train(optimizer, scheduler, FURTHER - BETWEEN)
        same_rates(rates, used, exact=not name.startswith('mxnet'))
    back = go.from_torch(optimizer.state_dict(), 'adamw', target, [info.name for info in last.parameters],
                         scheduler=scheduler.state_dict())
    assert back.scheduler == last.scheduler  # bit for bit: a float is equal to nothing else
    assert (back.num_update, back.counts, back.hypers['learning_rate']) == (
        last.num_update, last.counts, last.hypers['learning_rate'])
    assert [info.lr_mult for info in back.parameters] == list(MULTS.values())


@pytest.mark.parametrize('name', TIME)
def test_a_trainer_goes_on_where_pytorch_stopped(name, tmp_path):
    """The scheduler is made from the file, in a trainer that had none."""
    torch()
    pytest.importorskip('mxnet')
    from gluon_optim.mxnet.trainer import import_states
    (states, used), *_ = pickle.loads(gluons(name))[0]
    checkpoint = go.to_torch(states)
    optimizer = optimizer_from(checkpoint, 'mirror')
    scheduler = go.torch.scheduler(optimizer, checkpoint['scheduler'])
    train(optimizer, scheduler, 50)
    torch().save({'optimizer': optimizer.state_dict(), 'scheduler': scheduler.state_dict()}, tmp_path / 'run.pt')
    assert cli.main(['convert', str(tmp_path / 'run.pt'), '--to', 'mxnet', '-o', str(tmp_path / 'back.safetensors')]) == 0
    run = schedule_runs.Run(None)
    with pytest.warns(UserWarning, match="The scheduler is none in the trainer and .* in the file: the file's applies."):
        import_states(run.trainer, container.read(str(tmp_path / 'back.safetensors')))
    run.train(FURTHER - 50)
    same_rates(run.rates, used[50:], exact=not name.startswith('mxnet'))


def test_the_recorded_rates_are_what_a_trainer_uses():
    """tests/schedule_rates.json, for one schedule of each kind."""
    pytest.importorskip('mxnet')
    for name in ('mxnet factor, warm-up', 'cosine'):
        for known, (states, used) in zip(RECORDED['cases'][name], pickle.loads(gluons(name))[0]):
            assert known['rates'] == [rates['weight'] for rates in used]
            assert (known['scheduler'], known['num_update'], known['counts']) == (
                states.scheduler, states.num_update, states.counts)


@pytest.mark.parametrize('target', ['mirror', 'torch'])
@pytest.mark.parametrize('name, place', STARTS)
def test_the_recorded_rates_in_pytorch(name, place, target):
    """Where MXNet is not."""
    torch()
    states, used = recorded(name, place)
    checkpoint = go.to_torch(states, target)
    optimizer = optimizer_from(checkpoint, target)
    rates = train(optimizer, go.torch.scheduler(optimizer, checkpoint['scheduler']), FURTHER)
    same_rates(rates, [{key: rate * mult for key, mult in MULTS.items()} for rate in used], exact=False)


def test_an_optimizer_without_scheduler_has_the_rate_of_the_next_update():
    torch()
    states, used = recorded('cosine', 0)
    groups = go.to_torch(states, 'torch')['param_groups']
    assert [group['lr'] for group in groups] == pytest.approx([used[0] * mult for mult in MULTS.values()], rel=1e-14)


@pytest.mark.filterwarnings('ignore:Detected call of `lr_scheduler.step')  # the line brings a new scheduler to its place so
@pytest.mark.parametrize('name', TIME)
def test_pytorch_alone_continues_as_the_report_says(name):
    """The line for those who do not install this package is run as it stands, after each start, while it holds."""
    torch()
    ran = 0
    for place in range(len(RECORDED['cases'][name])):
        states, used = recorded(name, place)
        for info in states.parameters:
            info.lr_mult = 1.0
        checkpoint = go.to_torch(states, 'torch')
        line, = (line for line in states.report if line.startswith('without gluon_optim, after optimizer.load_state_dict: '))
        code, _, until = line.partition(': ')[2].partition(', up to update ')
        end = int(until.partition(':')[0]) - states.num_update if until else FURTHER
        optimizer = optimizer_from(checkpoint, 'torch')
        if code.startswith('scheduler = '):
            held = {'torch': torch(), 'optimizer': optimizer}
            exec(code, held)  # noqa: S102
            scheduler = held['scheduler']
        elif code.startswith('the rate does not change'):
            scheduler = torch().optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        else:
            assert code.startswith('no class of torch.optim.lr_scheduler has these rates: ') and '=' in code
            continue
        rates = [rates['weight'] for rates in train(optimizer, scheduler, min(end, FURTHER))]
        np.testing.assert_allclose(rates, used[:len(rates)], rtol=1e-9, atol=1e-12)
        ran += 1
    if any(word in name for word in ('step', 'exponential', 'restarts', 'one-cycle', 'linear down', 'constant')) and (
            'warm' not in name and 'chain' not in name):
        assert ran


def test_a_user_who_reads_the_report_alone_sees_every_letter_of_the_formula():
    found = in_pytorch(*schedules.schedule_of(schedules.record('InverseTime', base_lr=0.4, decay=0.5, steps_per_epoch=10)),
                       num_update=0, multipliers=False)
    assert found.endswith('rate(t) = base_lr / (1 + decay epoch),   epoch = floor((t - 1) / steps_per_epoch), base_lr=0.4, '
                          'decay=0.5, steps_per_epoch=10')


def test_the_lines_of_the_documentation_run(tmp_path, monkeypatch):
    """docs/CONVERSIONS.md, and what it says of the file afterwards."""
    torch()
    monkeypatch.chdir(tmp_path)
    states, used = recorded('cosine', 0)
    container.write('run.safetensors', states)
    text = (Path(__file__).parent.parent / 'docs/CONVERSIONS.md').read_text(encoding='utf-8')
    code, = re.findall('## The learning rate and the loss scaler.*?```python\n(.*?)```', text, re.DOTALL)
    net, seen = torch().nn.ParameterList([torch().ones(2), torch().ones(2)]), []
    held = {'net': net, 'loss': lambda net: seen.append(held['optimizer'].param_groups[0]['lr']) or sum(p.sum() for p in net)}
    exec(compile(code, 'docs/CONVERSIONS.md', 'exec'), held)  # noqa: S102
    np.testing.assert_allclose(seen, used, rtol=1e-14)
    assert cli.main(['convert', 'later.pt', '--to', 'mxnet', '--optimizer', 'adamw', '--params', 'weight,bias', '-o', 'back']) == 0
    back = container.read('back')
    assert (back.scheduler, back.num_update) == (schedules.after(states.scheduler, 202), states.num_update + FURTHER)


# PyTorch: the scheduler itself

HALF = schedules.record('Step', step=10, factor=0.5, base_lr=0.4)


def new_optimizer(groups=1, **options):
    params = [torch().nn.Parameter(torch().ones(2)) for _ in range(groups)]
    return torch().optim.SGD([{'params': [param], **{key: values[place] for key, values in options.items()}}
                              for place, param in enumerate(params)], lr=0.1)


def test_a_new_run_in_pytorch_on_a_schedule_of_gluon():
    optimizer = new_optimizer()
    scheduler, rates = go.torch.scheduler(optimizer, HALF), []
    for _ in range(25):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == [0.4] * 10 + [0.2] * 10 + [0.1] * 5
    assert [scheduler.base_lrs[0] * scheduler.lr_lambdas[0](epoch) for epoch in (0, 10)] == pytest.approx([0.4, 0.2])


@pytest.mark.parametrize('options, expected', [
    (dict(lr=[0.1, 0.01]), [0.4, pytest.approx(0.04)]),        # the first has the optimizer's own rate
    (dict(lr=[0.01, 0.1]), [pytest.approx(0.04), 0.4]),        # the second has
    (dict(lr=[0.5, 1.0]), [0.4, 0.8]),                         # none has: in units of the first
    (dict(lr=[0.5, 1.0], lr_mult=[2.0, 1.0]), [0.8, 0.4]),     # as a conversion says it
    (dict(lr=[0.0, 0.0]), [0.4, 0.4])])
def test_groups_keep_their_ratios(options, expected):
    optimizer = new_optimizer(2, **options)
    go.torch.scheduler(optimizer, HALF)
    assert [group['lr'] for group in optimizer.param_groups] == expected


def test_where_it_continues():
    """From the states of an optimizer that counts, from the record, or as the caller says; and where nothing says it, an error."""
    adam = torch().optim.Adam([torch().nn.Parameter(torch().ones(2))])
    train_one(adam, 12)
    assert go.torch.scheduler(adam, HALF).last_epoch == 12
    assert go.torch.scheduler(adam, dict(HALF, num_update=15, begin_num_update=5)).last_epoch == 17  # it was at 10 when converted
    assert go.torch.scheduler(adam, HALF, num_update=3).last_epoch == 3
    sgd = torch().optim.SGD([torch().nn.Parameter(torch().ones(2))], lr=0.1, momentum=0.9)
    assert go.torch.scheduler(sgd, HALF).last_epoch == 0
    train_one(sgd, 3)
    with pytest.raises(ValueError, match='`num_update` must be given: SGD has been updated'):
        go.torch.scheduler(sgd, HALF)
    assert go.torch.scheduler(sgd, dict(HALF, num_update=20)).last_epoch == 20
    adagrad = torch().optim.Adagrad([torch().nn.Parameter(torch().ones(2))])  # has a state with 0 updates from the beginning
    assert go.torch.scheduler(adagrad, dict(HALF, num_update=20)).last_epoch == 20


def test_the_record_of_a_conversion_serves_later_too():
    """The optimizer was updated since, and only its own state was saved: it counts, and begin_num_update is added."""
    torch()
    name = next(name for name in TIME if schedule_runs.begin_of(name))
    states, used = recorded(name, 0)
    checkpoint = go.to_torch(states, 'torch')
    assert checkpoint['scheduler']['begin_num_update'] == 40
    optimizer = optimizer_from(checkpoint, 'torch')
    train(optimizer, go.torch.scheduler(optimizer, checkpoint['scheduler']), 60)
    later = optimizer_from(optimizer.state_dict(), 'torch')
    assert go.torch.scheduler(later, checkpoint['scheduler']).last_epoch == states.num_update + 60
    assert later.param_groups[0]['lr'] == pytest.approx(used[60], rel=1e-14)
    back = go.from_torch(dict(later.state_dict(), scheduler=checkpoint['scheduler']), 'adamw', 'torch', list(MULTS))
    assert (back.num_update, back.scheduler) == (states.num_update + 60, schedules.after(states.scheduler, states.num_update + 60))


@pytest.mark.parametrize('target', ['mirror', 'torch'])
def test_multipliers_come_back_even_where_all_rates_are_0(target):
    """Also those of a first group with another one than 1."""
    torch()
    states, _ = recorded('mxnet cosine, warm-up', 2)
    for info, mult in zip(states.parameters, (10.0, 2.0)):
        info.lr_mult = mult
    checkpoint = go.to_torch(states, target)
    assert [group['lr'] for group in checkpoint['param_groups']] == [0.0, 0.0]
    back = go.from_torch(checkpoint, 'adamw', target, list(MULTS))
    assert [info.lr_mult for info in back.parameters] == [10.0, 2.0]
    assert back.hypers['learning_rate'] == states.hypers['learning_rate']


def train_one(optimizer, updates):
    for _ in range(updates):
        for param in optimizer.param_groups[0]['params']:
            param.grad = torch().ones(2)
        optimizer.step()


def test_load_state_dict_sets_the_rates_too():
    """In either order of optimizer and scheduler."""
    optimizer = new_optimizer()
    scheduler = go.torch.scheduler(optimizer, HALF, num_update=25)
    held = copy.deepcopy(scheduler.state_dict())
    other = new_optimizer()
    fresh = go.torch.scheduler(other, schedules.record('Constant'))
    fresh.load_state_dict(held)
    assert (other.param_groups[0]['lr'], fresh.get_last_lr(), fresh.last_epoch) == (0.1, [0.1], 25)
    assert held == scheduler.state_dict()
    for _ in range(10):
        other.step()
        fresh.step()
    assert fresh.get_last_lr() == [0.05]


def test_a_rate_that_is_a_tensor_stays_one():
    optimizer = torch().optim.Adam([torch().nn.Parameter(torch().ones(2))], lr=torch().tensor(0.4, dtype=torch().float64))
    held = optimizer.param_groups[0]['lr']
    scheduler = go.torch.scheduler(optimizer, HALF, num_update=9)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]['lr'] is held and float(held) == 0.2


@pytest.mark.parametrize('given, error, words', [
    ({'class': 'mine.Half', 'attributes': {}}, TypeError, 'mine.Half'),
    ({'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': {}}, ValueError, 'must be those of a mxnet.lr_scheduler'),
    ({'scheduler': {}}, ValueError, "must have 'class' and 'attributes'"),
    (dict(HALF, num_update=-1), ValueError, '`num_update` of the scheduler must be a number of updates'),
    ({'lr_lambdas': [None], 'last_epoch': 3}, ValueError, 'functions of your own'),
    ({'lr_lambdas': 7, 'last_epoch': 3}, ValueError, 'complete. Received'),
    ({'lr_lambdas': [{'schedule': 5, 'begin': 0}], 'last_epoch': 3}, ValueError, 'complete. Received'),
    ({'lr_lambdas': [{'schedule': HALF, 'begin': 0}], 'last_epoch': 'x'}, ValueError, '`num_update` of the scheduler'),
    ({'num_bad_epochs': 3, 'carried': {}}, ValueError, 'complete. Received'),
    ([1], TypeError, 'must be a scheduler, its record, or states. Received: list'),
    (None, TypeError, 'must be a scheduler, its record, or states. Received: NoneType')])
def test_what_is_no_schedule_is_refused(given, error, words):
    for make in makers():
        with pytest.raises(error, match=words):
            make(given)


def makers():
    """Each of the three that is installed."""
    found = []
    for room, make in (('torch', lambda given: go.torch.scheduler(new_optimizer(), given)),
                       ('onnx', lambda given: go.onnx.export_schedule(given)),
                       ('optax', lambda given: go.optax.schedule(given))):
        try:
            getattr(go, room)
        except ImportError:
            continue
        found.append(make)
    if not found:
        pytest.skip('needs one of the frameworks')
    return found


def test_states_without_a_scheduler_are_refused():
    states, _ = recorded('cosine', 0)
    states.scheduler = None
    for make in makers():
        with pytest.raises(ValueError, match='must be states with a scheduler'):
            make(states)


# Plateau

def test_a_plateau_continues_in_pytorch_with_what_it_has_seen():
    """200 updates with the same metrics on both sides; and back, with what PyTorch has seen."""
    torch()
    pytest.importorskip('mxnet')
    metrics = iter([3, 2, 2, 2, 2, 2, 1, 1.5, 1.5, 1.5, 1.5, 0.9, 1, 0.8, 0.8, 0.8, 0.8, 0.7, *[0.9] * 30])
    gluon = go.lr_scheduler.Plateau(**schedule_cases.PLATEAU)
    run = schedule_runs.Run(gluon)
    for _ in range(9):
        run.train(10)
        gluon.observe(next(metrics))
    states = run.states()
    assert len(gluon.reduced) > 1 and gluon.cooling == 1
    checkpoint = go.to_torch(states, 'torch')
    assert any('Plateau continues' in line for line in states.report)
    assert go.from_torch(checkpoint, 'adamw', 'torch', list(MULTS)).scheduler == states.scheduler
    optimizer = optimizer_from(checkpoint, 'torch')
    scheduler = go.torch.scheduler(optimizer, checkpoint['scheduler'])
    assert isinstance(scheduler, torch().optim.lr_scheduler.ReduceLROnPlateau)
    theirs = []
    for _ in range(FURTHER // 10):
        metric = next(metrics)
        run.train(10)
        gluon.observe(metric)
        for _ in range(10):
            theirs.append(rates_of(optimizer))
            train_one(optimizer, 1)
        scheduler.step(metric)
    ours = run.rates[90:]
    assert [rates['weight'] for rates in theirs] == [rates['weight'] for rates in ours]
    assert len({rates['weight'] for rates in ours}) > 2
    np.testing.assert_allclose([rates['bias'] for rates in theirs], [rates['bias'] for rates in ours], rtol=1e-15)
    back = go.from_torch(optimizer.state_dict(), 'adamw', 'torch', list(MULTS), scheduler=scheduler)
    attributes = back.scheduler['attributes']
    assert [attributes[key] for key in ('best', 'bad', 'cooling', 'final_lr', 'num_update')] == [
        gluon.best, gluon.bad, gluon.cooling, gluon.final_lr, gluon.num_update]
    assert go.rate(back.scheduler, back.num_update + 1) == gluon(back.num_update + 1)


def test_the_line_for_a_plateau_in_pytorch_alone():
    torch()
    record = schedule_cases.plateau(schedule_cases.Records())
    optimizer = new_optimizer()
    held = {'torch': torch(), 'optimizer': optimizer}
    exec(in_pytorch(*schedules.schedule_of(record), 500, multipliers=False), held)  # noqa: S102
    ours, theirs = vars(go.torch.scheduler(optimizer, record, 500)), vars(held['scheduler'])
    assert {key for key in theirs if key not in ('optimizer', '_last_lr', 'default_min_lr') and theirs[key] != ours[key]} == set()


def test_a_schedule_that_depends_on_a_metric_is_refused_where_none_is_seen():
    record = schedule_cases.ALL['nested'][0](schedule_cases.Records())
    for make in makers():
        with pytest.raises(ValueError, match='depends on a metric'):
            make(record)
    states, _ = recorded('nested', 0)
    for verb in ('to_torch', 'to_optax', 'to_onnx'):
        try:
            convert = getattr(go, verb)
        except ImportError:
            continue
        states.report.clear()
        convert(states, **({'weights': {key: np.ones(2, 'float32') for key in MULTS}} if verb == 'to_onnx' else {}))
        line, = (line for line in states.report if 'lr_scheduler.Scaled' in line)
        assert 'is not carried over, because its rates depend on a metric' in line
        assert f'that of update {states.num_update + 1} is' in line


# JAX

def one_ulp(found, expected):
    """Within the spacing of float32 numbers there, and equal in nearly all; where a rate of 0.4 has fallen to 0, within what
    double precision leaves of it."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == np.float32
    assert (np.abs(found.astype('float64') - expected) <= np.maximum(np.spacing(np.abs(expected).astype('float32')), 1e-17)).all()
    assert (np.abs(found - expected.astype('float32')) <= 1e-17).mean() > 0.99


@pytest.mark.parametrize('name, place', STARTS)
def test_200_updates_in_jax(name, place):
    jax, optax = pytest.importorskip('jax'), pytest.importorskip('optax')
    states, used = recorded(name, place)
    rate, counts = jax.jit(go.optax.schedule(states)), max(states.counts.values()) + np.arange(FURTHER, dtype='int32')
    one_ulp(rate(counts), used)
    one_ulp([rate(jax.numpy.int32(count)) for count in counts[::20]], used[::20])
    if place:
        return
    one_ulp(jax.lax.scan(lambda count, _: (count + 1, go.optax.schedule(states)(count)), jax.numpy.int32(counts[0]), None, 20)[1],
            used[:20])
    sgd = optax.sgd(go.optax.schedule(states))  # optax's own, which counts from 0
    state = sgd.init(jax.numpy.zeros(2))
    state = jax.tree_util.tree_map(lambda count: count + counts[0], state)
    updates, _ = jax.jit(sgd.update)(jax.numpy.ones(2), state)
    one_ulp(-updates, [used[0]] * 2)


LONG = 10 ** 6


@pytest.mark.parametrize('x64', [False, True])
@pytest.mark.parametrize('name, arguments', [
    ('Cosine', dict(max_update=LONG, base_lr=0.4)), ('Polynomial', dict(max_update=LONG, base_lr=0.4, pwr=2.5)),
    ('Exponential', dict(factor=0.99999, base_lr=0.4)), ('Step', dict(step=1000, factor=0.99, base_lr=0.4)),
    ('CosineRestarts', dict(step=7777, base_lr=0.4, step_mult=2)), ('InverseSqrt', dict(base_lr=0.4, step=4000))])
def test_a_million_updates_in_jax_are_right_to_the_last_digit_of_float32(name, arguments, x64):
    """Single precision alone would be off by percents where a power has a large exponent, or a cosine is near -1."""
    jax = pytest.importorskip('jax')
    pytest.importorskip('optax')
    record, counts = schedules.record(name, **arguments), np.arange(LONG, dtype='int32')
    expected, before = go.rate(record, counts.astype('int64') + 1), jax.config.jax_enable_x64
    try:
        jax.config.update('jax_enable_x64', x64)
        found = np.asarray(jax.jit(go.optax.schedule(record))(counts))
    finally:
        jax.config.update('jax_enable_x64', before)
    if x64:
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-16)
    else:
        one_ulp(found, expected)
        assert (np.abs(found - expected.astype('float32')) <= 1e-17).mean() > 0.99999


@pytest.mark.parametrize('name, place', [('mxnet factor, warm-up', 1), ('mxnet cosine', 2), ('chain', 0), ('restarts', 0)])
def test_the_mirror_in_jax_follows_the_schedule(name, place, tmp_path):
    """Through a file, and back; the update of adamw without epsilon is lr times something that does not depend on it."""
    jax = pytest.importorskip('jax')
    pytest.importorskip('optax')
    jnp = jax.numpy
    states, used = recorded(name, place)
    container.write(str(tmp_path / 'run.safetensors'), states)
    assert cli.main(['convert', str(tmp_path / 'run.safetensors'), '--to', 'optax', '--verify', '20', '-o',
                     str(tmp_path / 'run.npz')]) == 0
    state, arguments = go.optax.load(str(tmp_path / 'run.npz'))
    assert repr(arguments['learning_rate']) == f'gluon_optim.optax.schedule({states.scheduler["class"]!r})'
    params = {key: jnp.zeros(2) for key in MULTS}
    constant = go.optax.create(**dict(arguments, learning_rate=1.0, wd=0.0))
    update = jax.jit(go.optax.create(**dict(arguments, wd=0.0)).update)
    for k in range(3):
        gradients = {key: jnp.full(2, 0.5 + k) for key in MULTS}
        found, _ = update(gradients, state, params)
        unit, state = constant.update(gradients, state, params)
        for key in MULTS:
            np.testing.assert_allclose(found[key], used[k] * np.asarray(unit[key]), rtol=5e-7, atol=1e-30)
    go.optax.save(str(tmp_path / 'later.npz'), state, 'adamw', {info.name: info for info in states.parameters},
                  **{key: value for key, value in arguments.items() if key not in ('name', 'lr_mult', 'wd_mult')})
    assert cli.main(['convert', str(tmp_path / 'later.npz'), '--to', 'mxnet', '-o', str(tmp_path / 'back.safetensors')]) == 0
    back = container.read(str(tmp_path / 'back.safetensors'))
    assert back.num_update == states.num_update + 3
    assert back.scheduler == schedules.after(states.scheduler, states.num_update + 3)


# ONNX

def session(model):
    runtime = pytest.importorskip('onnxruntime')
    return runtime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])


@pytest.mark.parametrize('name, place', STARTS)
def test_200_updates_in_onnx_runtime(name, place, tmp_path):
    """From the states, from the converted model, and merged with the step; and back, by a file."""
    onnx = pytest.importorskip('onnx')
    states, used = recorded(name, place)
    model = go.to_onnx(states, weights={key: np.ones(2, 'float32') for key in MULTS})
    schedule, many = go.onnx.export_schedule(model), go.onnx.export_schedule(states, shape=(2, 'n'))
    for one in (schedule, many):
        onnx.checker.check_model(one, full_check=True)
    first = max(states.counts.values()) + 1
    found, = session(many).run(None, {'t': np.arange(first, first + FURTHER).reshape(2, -1)})
    assert found.shape == (2, FURTHER // 2) and found.dtype == np.float64
    np.testing.assert_allclose(found.reshape(-1), used, rtol=1e-12, atol=1e-15)
    one_ulp(found.reshape(-1).astype('float32'), used)
    scalar, = session(schedule).run(None, {'t': np.array(first)})
    assert scalar.shape == () and scalar == pytest.approx(found[0, 0], rel=1e-15)
    if place:
        return

    step, arrays = go.onnx.unpack(model)
    prefixed = onnx.compose.add_prefix(schedule, 'schedule/')
    merged = session(onnx.compose.merge_models(prefixed, step, io_map=[('schedule/rate', 'learning_rate')]))
    both = {**arrays, 'weight': np.ones(2, 'float32'), 'bias': np.ones(2, 'float32')}
    gradients = {f'{key}/grad': np.ones(2, 'float32') for key in MULTS}
    one = dict(zip([x.name for x in merged.get_outputs()], merged.run(None, {**both, **gradients, 'schedule/t': both['t']})))
    apart = session(step)
    two = dict(zip([x.name for x in apart.get_outputs()], apart.run(None, {**both, **gradients, 'learning_rate': scalar})))
    assert set(two) <= set(one) and all(np.array_equal(one[key], two[key]) for key in two)

    onnx.save(model, str(tmp_path / 'run.onnx'))
    assert cli.main(['convert', str(tmp_path / 'run.onnx'), '--to', 'mxnet', '-o', str(tmp_path / 'back.safetensors')]) == 0
    back = container.read(str(tmp_path / 'back.safetensors'))
    assert (back.scheduler, back.num_update) == (states.scheduler, states.num_update)


def test_a_model_that_was_trained_on_brings_back_a_later_scheduler():
    onnx = pytest.importorskip('onnx')
    states, _ = recorded('mxnet multifactor', 0)
    model = go.to_onnx(states, weights={key: np.ones(2, 'float32') for key in MULTS})
    count, = (tensor for tensor in model.training_info[0].algorithm.initializer if tensor.name == 't')
    count.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(count) + 150, 't'))
    back = go.from_onnx(model)
    assert back.num_update == states.num_update + 150
    assert back.scheduler == schedules.after(states.scheduler, states.num_update + 150) != states.scheduler


def test_a_model_of_a_schedule_alone():
    pytest.importorskip('onnx')
    model = go.onnx.export_schedule(HALF, shape=('n',))
    assert [x.name for x in model.graph.input] == ['t'] and [x.name for x in model.graph.output] == ['rate']
    assert session(model).run(None, {'t': np.array([1, 10, 11, 25])})[0].tolist() == [0.4, 0.4, 0.2, 0.1]
    constant = session(go.onnx.export_schedule(schedules.record('Constant', base_lr=0.3), shape=('n', 1)))
    assert constant.run(None, {'t': np.array([[1], [2]])})[0].tolist() == [[0.3], [0.3]]


# Reports, --verify, and the loss scaler

@pytest.mark.parametrize('to, ending', [('torch', 'pt'), ('optax', 'npz'), ('onnx', 'onnx')])
def test_verify_replays_at_the_rates_of_the_scheduler(to, ending, tmp_path, capsys, monkeypatch):
    """And notices a scheduler that continues one update too early."""
    for needs in {'optax': ['jax', 'optax'], 'onnx': ['onnx', 'onnxruntime']}.get(to, ['torch']):
        pytest.importorskip(needs)
    states, _ = recorded('warm-up, linear', 0)
    container.write(str(tmp_path / 'run.safetensors'), states)
    np.savez(tmp_path / 'weights.npz', **{key: np.ones(2, 'float32') for key in MULTS})
    command = ['convert', str(tmp_path / 'run.safetensors'), '--to', to, '--params', str(tmp_path / 'weights.npz'), '--force',
               '--verify', '20', '-o', str(tmp_path / f'run.{ending}')]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert 'then as many at the rates of the scheduler' in said and 'is not carried over' not in said
    assert 'the scheduler gluon_optim.mxnet.lr_scheduler.Warmup continues' in said
    assert f'the rate of update {states.num_update + 1} is' in said
    monkeypatch.setattr('gluon_optim.transfer.job.scheduled_rates', lambda states, count: [
        go.rate(states.scheduler, states.num_update + k) for k in range(count)])
    assert cli.main(command) == 1
    assert 'differs by' in capsys.readouterr().err


def test_a_scheduler_of_the_users_own_is_named_and_comes_back():
    torch()
    states, _ = recorded('cosine', 0)
    states.scheduler = {'class': 'mine.Half', 'attributes': {'base_lr': 0.25, 'every': 3}}
    checkpoint = go.to_torch(states, 'torch')
    line, = (line for line in states.report if 'mine.Half' in line)
    assert line == ("the scheduler mine.Half is not carried over, because its rates are not known here: set 'lr' of the param "
                    f'groups at each step, starting with update {states.num_update + 1}: its base_lr is 0.25')
    assert not [line for line in states.report if 'without gluon_optim' in line]
    back = go.from_torch(checkpoint, 'adamw', 'torch', list(MULTS))
    assert (back.scheduler, back.num_update) == (states.scheduler, states.num_update)


@pytest.mark.parametrize('optimizer', ['adadelta'])
def test_an_optimizer_without_a_rate_needs_no_scheduler(optimizer):
    torch()
    states, _ = recorded('cosine', 0)
    states.optimizer, states.hypers = optimizer, go.rules.get(optimizer).hyperparameters().asdict()
    states.slots = {key: {'acc_g': np.ones(2, 'float32'), 'acc_delta': np.ones(2, 'float32')} for key in MULTS}
    assert 'scheduler' not in go.to_torch(states, 'torch')
    assert 'the scheduler gluon_optim.mxnet.lr_scheduler.Cosine has no effect: adadelta has no learning rate' in states.report


SCALER = dict(loss_scale=1024.0, next_loss_scale=512.0, max_loss_scale=2.0 ** 24, scale_seq_len=5, unskipped=3)


def test_the_loss_scaler_continues_in_pytorch(tmp_path):
    """PyTorch's own grows when MXNet's would have, and comes back with what it has become."""
    torch()
    if not hasattr(torch(), 'amp') or not hasattr(torch().amp, 'GradScaler'):
        pytest.skip('needs torch.amp.GradScaler, of PyTorch 2.3')
    states, _ = recorded('cosine', 0)
    states.loss_scaler = dict(SCALER)
    checkpoint = through_a_file(go.to_torch(states, 'torch'), tmp_path / 'run.pt')
    assert go.from_torch(checkpoint, 'adamw', 'torch', list(MULTS)).loss_scaler == SCALER
    line, = (line for line in states.report if 'loss scaler' in line)
    assert 'init_scale=512.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=5' in line
    scaler = torch().amp.GradScaler('cpu')
    scaler.load_state_dict(checkpoint['loss_scaler'])
    optimizer, scales = optimizer_from(checkpoint, 'torch'), []
    for k in range(4):
        scales.append(scaler.get_scale())
        loss = sum(param.sum() for group in optimizer.param_groups for param in group['params'])
        scaler.scale(loss * (float('inf') if k == 3 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scales == [512, 512, 1024, 1024] and scaler.get_scale() == 512  # 3 + 2 finite steps, then one that is not
    back = go.from_torch(dict(checkpoint, loss_scaler=scaler.state_dict()), 'adamw', 'torch', list(MULTS)).loss_scaler
    assert back == dict(SCALER, loss_scale=512.0, unskipped=0)


def test_a_loss_scaler_of_another_kind_is_named():
    assert loss_scalers.to_torch({'loss_scale': 8.0}) == {} == loss_scalers.to_torch(None)
    assert loss_scalers.from_torch({'scale': 8.0}) is None
    ours = dict(SCALER, scale_factor=1.5, backoff_factor=0.25)
    assert loss_scalers.to_torch(ours)['growth_factor'] == 1.5 and loss_scalers.from_torch(loss_scalers.to_torch(ours)) == ours
    assert 'give its scale to the new one' in loss_scalers.what_becomes_of_it({'loss_scale': 8.0}, to_pytorch=True)[0]
    assert 'begin with the scale 512.0' in loss_scalers.what_becomes_of_it(SCALER, to_pytorch=False)[0]
