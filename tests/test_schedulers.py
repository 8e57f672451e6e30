"""Schedulers in state files: MXNet's, a user's, and those of other packages; what differs is said, and nothing takes for ever."""
import copy
import math
import warnings

import numpy as np
import pytest
from loads import killed_after_a_minute, told  # noqa: F401

mx = pytest.importorskip('mxnet')
from mxnet import gluon  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim.mxnet import scheduler_states as schedulers  # noqa: E402
from gluon_optim.mxnet.trainer import export_states, import_states  # noqa: E402

pytestmark = pytest.mark.usefixtures('killed_after_a_minute')
S = mx.lr_scheduler


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'run')


def trainer_of(scheduler, **arguments):
    parameter = gluon.Parameter('w', shape=(2,))
    parameter.initialize(mx.init.One())
    if scheduler is not None:
        arguments['lr_scheduler'] = scheduler
    return gluon.Trainer([parameter], 'sgd_torch', arguments)


def step(trainer, number):
    """The rates of ``number`` steps."""
    rates = []
    for _ in range(number):
        parameter, = trainer._params
        with mx.autograd.record():
            loss = (parameter.data() ** 2).sum()
        loss.backward()
        trainer.step(1)
        rates.append(trainer.learning_rate)
    return rates


# Written as those of gluoncv.utils are: no get_config, attributes that appear with the first question, schedulers in a list

class Part(S.LRScheduler):
    def __init__(self, mode, base_lr=0.1, target_lr=0, niters=0, offset=0, power=2, step_iter=None, step_factor=0.1):
        super().__init__()
        self.mode, self.base_lr, self.target_lr = mode, base_lr, base_lr if mode == 'constant' else target_lr
        self.niters, self.offset, self.power, self.step, self.step_factor = niters, offset, power, step_iter, step_factor

    def __call__(self, num_update):
        self.update(num_update)
        return self.learning_rate

    def update(self, num_update):
        last = self.niters - 1
        t = min(max(0, num_update - self.offset), last)
        if self.mode == 'step':
            self.learning_rate = self.base_lr * self.step_factor ** sum(s <= t for s in self.step)
        else:
            factor = {'constant': lambda: 0, 'linear': lambda: 1 - t / last, 'poly': lambda: (1 - t / last) ** self.power,
                      'cosine': lambda: (1 + math.cos(math.pi * t / last)) / 2}[self.mode]()
            self.learning_rate = self.target_lr + (self.base_lr - self.target_lr) * factor


class Sequential(S.LRScheduler):
    def __init__(self, parts):
        super().__init__()
        self.update_sep, self.count, self.learning_rate, self.schedulers = [], 0, 0, []
        for part in parts:
            part.offset = self.count
            self.count += part.niters
            self.update_sep.append(self.count)
            self.schedulers.append(part)

    def __call__(self, num_update):
        index = next((i for i, sep in enumerate(self.update_sep) if sep > num_update), len(self.schedulers) - 1)
        self.schedulers[index].update(num_update)
        self.learning_rate = self.schedulers[index].learning_rate
        return self.learning_rate


def warmed_up(target=0.001, steps=(6, 9), **options):
    return Sequential([Part('linear', 0, 0.1, 3), Part('step', 0.1, niters=8, step_iter=list(steps), **options),
                       Part('cosine', 0.1, target, 6)])


class Asked(S.LRScheduler):
    """Remembers for which updates it was asked."""

    def __init__(self, base_lr):
        super().__init__(base_lr)
        self.asked = []

    def __call__(self, num_update):
        self.asked.append(num_update)
        return self.base_lr / len(self.asked)


class Slower(S.FactorScheduler):
    """A user's own, derived from one of MXNet's."""


class Tuple(S.LRScheduler):
    """With everything that can be written down."""

    def __init__(self, milestones=(3, 6)):
        super().__init__()
        self.milestones, self.names, self.nothing, self.numpy = milestones, {'a': [1, {'b': None}], 'c': 'x'}, None, np.float32(0.5)
        self.inner = {'first': S.CosineScheduler(10, 0.1), 'others': (Part('constant', 0.1, niters=3),)}

    def __call__(self, num_update):
        return self.inner['first'](num_update) * 0.5 ** sum(num_update > m for m in self.milestones)


# Schedulers of unknown classes

@pytest.mark.parametrize('make', [warmed_up, lambda: Slower(3, 0.5, base_lr=0.1), Tuple, lambda: Part('poly', 0.1, niters=9)],
                         ids=['sequential', 'derived', 'nested', 'part'])
@pytest.mark.parametrize('at', [0, 2, 5, 11, 20])
@pytest.mark.parametrize('mode', ['file', 'current'])
def test_a_scheduler_that_is_its_attributes_is_saved_and_goes_on(path, make, at, mode):
    straight = trainer_of(make())
    step(straight, at)
    go.save_states(straight, path)
    held = make()
    trainer = trainer_of(held)
    assert told(lambda: go.load_states(trainer, path, hyperparameters=mode)) == []
    assert trainer._optimizer.lr_scheduler is held
    assert schedulers.export_scheduler(held) == schedulers.export_scheduler(straight._optimizer.lr_scheduler)
    assert step(trainer, 9) == step(straight, 9)


def test_types_that_json_does_not_have_come_back():
    scheduler = Tuple()
    trainer = trainer_of(scheduler)
    import_states(trainer, export_states(trainer_of(Tuple((3, 6)))))
    others = scheduler.inner['others']
    assert scheduler.milestones == (3, 6) and type(others) is tuple and type(others[0]) is Part


@pytest.mark.parametrize('change, names', [
    (lambda: warmed_up(steps=(6, 10)), ['schedulers[1].step']),
    (lambda: warmed_up(target=0.01), ['schedulers[2].target_lr']),
    (lambda: warmed_up(step_factor=0.5), ['schedulers[1].step_factor']),
], ids=['milestones', 'target', 'factor'])
def test_what_differs_within_such_a_scheduler_is_said(path, change, names):
    saved = trainer_of(warmed_up())
    step(saved, 4)
    go.save_states(saved, path)
    said = told(lambda: go.load_states(trainer_of(change()), path))
    assert [line.split(' of the scheduler')[0] for line in said] == names and all("the file's applies" in line for line in said)


def test_other_parts_are_an_error_and_nothing_is_changed(path):
    go.save_states(trainer_of(warmed_up()), path)
    two = Sequential([Part('linear', 0, 0.1, 3), Part('cosine', 0.1, 0, 6)])
    other = warmed_up()
    other.schedulers[2] = S.CosineScheduler(3)
    for scheduler, match in ((two, r'schedulers is 2 values in the trainer\. Received from the file: 3 values'),
                             (other, r'schedulers\[2\] is mxnet.lr_scheduler.CosineScheduler in the trainer.*Part')):
        before = schedulers.export_scheduler(scheduler)
        with pytest.raises(ValueError, match=match):
            go.load_states(trainer_of(scheduler), path)
        assert schedulers.export_scheduler(scheduler) == before
    with pytest.raises(ValueError, match='Sequential, the trainer has none'):
        go.load_states(trainer_of(None), path)


@pytest.mark.parametrize('attribute, match', [
    (lambda n: n, 'its attribute extra is of type function'), ([1, {2: 3}], r'its attribute extra\[1\] is of type dict'),
    (np.zeros(3), 'its attribute extra is of type ndarray'), ({'a': object()}, r"its attribute extra\['a'\] is of type object"),
], ids=['function', 'keys', 'array', 'object'])
def test_what_cannot_be_saved_is_named(path, attribute, match):
    scheduler = warmed_up()
    scheduler.schedulers[1].extra = attribute
    with pytest.raises(TypeError, match=f'The scheduler .*Part cannot be saved: {match}'):
        go.save_states(trainer_of(scheduler), path)


def test_schedulers_that_are_more_than_attributes_cannot_be_saved(path):
    class Slots(S.LRScheduler):
        __slots__ = ('hidden',)

    itself = warmed_up()
    itself.schedulers.append(itself)
    for scheduler, match in ((lambda n: 0.1, 'its state is not in attributes'), (Slots(), 'its state is not in attributes'),
                             (itself, 'it contains itself')):
        trainer = trainer_of(None)
        trainer._optimizer.lr_scheduler = scheduler
        with pytest.raises(TypeError, match=match):
            go.save_states(trainer, path)


def test_a_failed_load_puts_back_the_parts_too(path):
    saved = trainer_of(warmed_up(), momentum=0.9)
    step(saved, 5)
    go.save_states(saved, path)
    trainer = trainer_of(warmed_up(target=0.05), momentum=0.9)
    step(trainer, 2)
    before = copy.deepcopy(schedulers.export_scheduler(trainer._optimizer.lr_scheduler))
    trainer._optimizer.set_shared_state = None  # fails after the scheduler was restored
    with pytest.raises(TypeError), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        go.load_states(trainer, path)
    assert schedulers.export_scheduler(trainer._optimizer.lr_scheduler) == before


# What differs

CHANGED = {
    'step': (lambda: S.FactorScheduler(4, 0.5, base_lr=0.4), lambda: S.FactorScheduler(7, 0.5, base_lr=0.4), 'step'),
    'factor': (lambda: S.FactorScheduler(4, 0.5, base_lr=0.4), lambda: S.FactorScheduler(4, 0.9, base_lr=0.4), 'factor'),
    'factor base': (lambda: S.FactorScheduler(4, 0.5, base_lr=0.4), lambda: S.FactorScheduler(4, 0.5, base_lr=0.1), 'base_lr'),
    'stop': (lambda: S.FactorScheduler(4, 0.5), lambda: S.FactorScheduler(4, 0.5, 0.001), 'stop_factor_lr'),
    'cosine longer': (lambda: S.CosineScheduler(20), lambda: S.CosineScheduler(40), 'max_update'),
    'cosine base': (lambda: S.CosineScheduler(20, base_lr=0.4), lambda: S.CosineScheduler(20, base_lr=0.04), 'base_lr'),
    'cosine final': (lambda: S.CosineScheduler(20), lambda: S.CosineScheduler(20, final_lr=0.001), 'final_lr'),
    'poly power': (lambda: S.PolyScheduler(20), lambda: S.PolyScheduler(20, pwr=1), 'power'),
    'milestones': (lambda: S.MultiFactorScheduler([3, 9], 0.5), lambda: S.MultiFactorScheduler([3, 90], 0.5), 'step'),
    'warm-up': (lambda: S.CosineScheduler(20, warmup_steps=3), lambda: S.CosineScheduler(20, warmup_steps=4), 'warmup_steps'),
    'warm-up mode': (lambda: S.PolyScheduler(20, warmup_steps=3), lambda: S.PolyScheduler(20, warmup_steps=3,
                                                                                           warmup_mode='constant'), 'warmup_mode'),
    'derived': (lambda: Slower(4, 0.5), lambda: Slower(5, 0.5), 'step'),
}


@pytest.mark.parametrize('at', [0, 2, 6, 25])
@pytest.mark.parametrize('trained', [0, 1, 8])
@pytest.mark.parametrize('what', CHANGED)
def test_a_changed_schedule_is_said_and_an_unchanged_one_is_not(path, what, at, trained):
    """Wherever the run was saved, and also where the trainer has already gone further."""
    first, other, name = CHANGED[what]
    saved = trainer_of(first())
    step(saved, at)
    go.save_states(saved, path)
    for make, mode in ((first, 'file'), (first, 'current'), (other, 'file'), (other, 'current')):
        trainer = trainer_of(make())
        step(trainer, trained)
        said = told(lambda: go.load_states(trainer, path, hyperparameters=mode))  # noqa: B023
        if make is first:
            assert said == []
        else:
            assert name in [line.split(' of the scheduler')[0] for line in said]
            assert all(("the file's applies" if mode == 'file' else "the trainer's applies") in line for line in said)


def test_a_rate_beside_the_scheduler(path):
    """MXNet lets `learning_rate` overwrite the scheduler's base_lr, and leaves the copy that the warm-up uses."""
    def make(rate):
        return trainer_of(S.FactorScheduler(4, 0.5, base_lr=0.4), learning_rate=rate)

    saved = make(0.2)
    step(saved, 6)
    go.save_states(saved, path)
    assert told(lambda: go.load_states(make(0.2), path)) == []
    assert told(lambda: go.load_states(make(0.1), path)) == [
        "base_lr of the scheduler at update 6 is 0.05 in the trainer and 0.1 in the file: the file's applies."]


def test_a_scheduler_given_up_or_exchanged_is_said(path):
    saved = trainer_of(S.CosineScheduler(20))
    go.save_states(saved, path)
    assert told(lambda: go.load_states(trainer_of(None), path)) == [
        "The scheduler is none in the trainer and mxnet.lr_scheduler.CosineScheduler in the file: the file's applies."]
    for scheduler, mine in ((None, 'none'), (S.PolyScheduler(20), 'mxnet.lr_scheduler.PolyScheduler')):
        assert told(lambda: go.load_states(trainer_of(scheduler), path, hyperparameters='current')) == [  # noqa: B023
            f"The scheduler is {mine} in the trainer and mxnet.lr_scheduler.CosineScheduler in the file: the trainer's applies."]
    go.save_states(trainer_of(None), path)
    assert told(lambda: go.load_states(trainer_of(S.PolyScheduler(20)), path, hyperparameters='current')) == [
        "The scheduler is mxnet.lr_scheduler.PolyScheduler in the trainer and none in the file: the trainer's applies."]


def test_a_schedule_that_begins_later(path):
    """The file's was asked from update 101 on only, and so is the trainer's for comparison."""
    def make():
        return trainer_of(S.CosineScheduler(50, base_lr=0.4), begin_num_update=100)

    saved = make()
    step(saved, 3)
    go.save_states(saved, path)
    assert told(lambda: go.load_states(make(), path)) == []


# Brought to an update

@pytest.mark.parametrize('number', [0, 1, 7])
def test_a_users_scheduler_is_asked_once_for_every_update(path, number):
    """hyperparameters='current': for 1, 2, ... and the last one, each once, as in training."""
    states = export_states(trainer_of(None))
    states.num_update = number
    scheduler = Asked(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import_states(trainer_of(scheduler), states, hyperparameters='current')
    assert scheduler.asked == list(range(1, number + 1))


@pytest.mark.parametrize('begin', [0, 3])
def test_a_users_scheduler_is_compared_at_the_update_of_the_file(begin):
    scheduler = Asked(0.1)
    for update in range(1, begin + 1):
        scheduler(update)
    plan = schedulers.plan_scheduler(scheduler, begin, schedulers.export_scheduler(Asked(0.1)), 0, 'file')
    assert [line for line in plan.notes if 'base_lr' in line] == [] and scheduler.asked == list(range(1, begin + 1))
    copied = Asked(0.1)
    schedulers._advance(copied, begin, begin + 2)
    assert copied.asked == [begin + 1, begin + 2]


ALL = [lambda: S.FactorScheduler(3, 0.5, 0.01, base_lr=0.4), lambda: S.FactorScheduler(2, 0.9, base_lr=0.4, warmup_steps=5),
       lambda: S.FactorScheduler(1, 1.0, base_lr=0.4), lambda: S.MultiFactorScheduler([2, 3, 8], 0.5, base_lr=0.4),
       lambda: S.MultiFactorScheduler([2], 0.5, base_lr=0.4, warmup_steps=4), lambda: S.PolyScheduler(6, 0.4),
       lambda: S.PolyScheduler(6, 0.4, final_lr=0.1, warmup_steps=3), lambda: S.CosineScheduler(6, 0.4),
       lambda: S.CosineScheduler(6, 0.4, 0.1, warmup_steps=3)]


@pytest.mark.parametrize('make', ALL)
@pytest.mark.parametrize('begin', [0, 2, 7])
@pytest.mark.parametrize('end', [0, 1, 2, 3, 4, 6, 7, 8, 9, 30])
def test_mxnets_schedulers_get_at_once_where_they_get_asked_for_every_update(make, begin, end):
    asked, brought = make(), make()
    for update in range(1, begin + 1):
        asked(update)
        brought(update)
    for update in range(begin + 1, end + 1):
        asked(update)
    schedulers._advance(brought, begin, end)
    assert vars(brought) == vars(asked)


HUGE = 2 ** 53 - 1


@pytest.mark.parametrize('make', [*ALL, lambda: S.FactorScheduler(1, 1 - 1e-3, 0.0, base_lr=0.4)])
@pytest.mark.parametrize('mode', ['file', 'current'])
def test_updates_of_any_number(make, mode):
    states = export_states(trainer_of(make()))
    states.num_update = HUGE
    trainer = trainer_of(make())
    told(lambda: import_states(trainer, states, hyperparameters=mode))
    rates = step(trainer, 2)
    assert trainer._optimizer.num_update == HUGE + 2 and 0 <= rates[1] <= rates[0]


@pytest.mark.parametrize('changes', [
    {'step': 0}, {'step': -3}, {'step': 1e-300}, {'step': 0.5}, {'step': [1]}, {'step': '3'}, {'step': None}, {'step': True},
    {'count': 'x'}, {'count': None}, {'count': True}, {'base_lr': 'high'}, {'factor': 2}, {'factor': [0.5]}, {'warmup_steps': 1.5},
    {'warmup_mode': 'x'}, {'step': 1, 'factor': 1 - 2 ** -53, 'stop_factor_lr': 0.0},
    {'step': 1, 'factor': -1, 'stop_factor_lr': -1}], ids=str)
@pytest.mark.parametrize('make', [lambda: S.FactorScheduler(4, 0.5, base_lr=0.4), lambda: Slower(4, 0.5, base_lr=0.4)])
def test_attributes_that_would_never_return_or_fail_later_are_refused(make, changes):
    present = trainer_of(make())
    states = export_states(present)
    states.num_update = HUGE
    states.scheduler['attributes'].update(changes)
    before = export_states(present)
    for trainer in (present, trainer_of(None)):
        if isinstance(make(), Slower) and not {'step', 'count'} & set(changes):
            continue  # MXNet's own are checked like this, a user's must only return
        with pytest.raises(ValueError, match='must make a scheduler|only those of MXNet'):
            import_states(trainer, states)
    assert export_states(present) == before


@pytest.mark.parametrize('changes', [{'cur_step_ind': -1}, {'cur_step_ind': 3}, {'step': []}, {'step': [3, 'x']}, {'step': [5, 3]},
                                     {'step': 4}, {'cur_step_ind': None}], ids=str)
def test_milestones_that_are_none_are_refused(changes):
    trainer = trainer_of(S.MultiFactorScheduler([3, 9], 0.5))
    states = export_states(trainer)
    states.scheduler['attributes'].update(changes)
    with pytest.raises(ValueError, match='must make a scheduler'):
        import_states(trainer, states)


def test_a_users_scheduler_is_not_asked_for_ever():
    scheduler = Asked(0.1)
    trainer = trainer_of(scheduler)
    states = export_states(trainer)
    states.num_update = HUGE
    with pytest.raises(ValueError, match='must be asked for every update up to that of the file, and 10000000 is the limit'):
        import_states(trainer, states, hyperparameters='current')
    assert scheduler.asked == [] and trainer._optimizer.num_update == 0
    said = told(lambda: import_states(trainer, states))
    assert len(said) == 1 and 'It is not known whether the scheduler of the file differs' in said[0]
    assert trainer._optimizer.num_update == HUGE and scheduler.asked == []
