"""Learning rate schedulers to and from state files: by class path and attributes, never by pickle.

MXNet's schedulers are stateful: past its end a CosineScheduler keeps the rate at which it arrived, and a fresh one would
answer with the rate from which it started. So all attributes are saved and put back. Ours are their arguments, and what a Plateau
has observed.
"""
import contextlib
import copy
import importlib
import inspect
import math
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy

# a submodule, not an attribute of `mxnet`: a parameter server imports this file while `mxnet` is still being imported
from mxnet import lr_scheduler as mx

from ..schedules.catalog import CLASSES, OURS, schedule_of
from .lr_scheduler import Scheduler

__all__ = ['SchedulerPlan', 'export_scheduler', 'keep', 'plan_scheduler']

KNOWN = ('mxnet.lr_scheduler', OURS)  # modules whose classes are made from a file
ASKED = 10 ** 7       # for so many updates a scheduler is asked, or decays, at most to be brought to a later one
COMPARED = 10 ** 6    # the same where it is only compared
DECAYING = (mx.FactorScheduler, mx.MultiFactorScheduler)
ENDING = (mx.PolyScheduler, mx.CosineScheduler)
ATTRIBUTES = {'base_lr': 'warmup_final_lr', 'pwr': 'power'}  # where MXNet's classes keep arguments of other names


# Out of a trainer

def export_scheduler(scheduler: Any) -> Optional[Dict[str, Any]]:
    """``{'class': path, 'attributes': {...}}``, None for no scheduler.

    The attributes are what ``get_config()`` returns, where the class defines it and ``set_config(dict)``; else all that the
    object has: numbers, strings, lists, dictionaries, and such schedulers. Raises TypeError, naming class and attribute,
    where they are anything else.
    """
    return None if scheduler is None else _record(scheduler, ())


def _record(scheduler: Any, within: Tuple[Any, ...]) -> Dict[str, Any]:
    """``within``: the schedulers that contain this one."""
    path = _path(scheduler)
    if _has_config(scheduler):
        attributes = scheduler.get_config()
        if not isinstance(attributes, dict):
            raise TypeError(f'{path}.get_config() must return a dictionary. Received: {attributes!r}.')
        return {'class': path, 'attributes': copy.deepcopy(attributes)}
    if not _is_its_attributes(scheduler):
        raise _unsaved(scheduler, 'its state is not in attributes')
    if any(scheduler is other for other in within):
        raise _unsaved(scheduler, 'it contains itself')
    return {'class': path, 'attributes': {name: _plain(value, scheduler, name, (*within, scheduler))
                                          for name, value in vars(scheduler).items()}}


def _plain(value: Any, scheduler: Any, where: str, within: Tuple[Any, ...]) -> Any:
    """``value``, the attribute ``where`` of ``scheduler``, as JSON has it."""
    if isinstance(value, numpy.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, scheduler, f'{where}[{i}]', within) for i, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, scheduler, f'{where}[{key!r}]', within) for key, item in value.items()}
    if isinstance(value, mx.LRScheduler):
        return _record(value, within)
    raise _unsaved(scheduler, f'its attribute {where} is of type {type(value).__name__}')


def _unsaved(scheduler: Any, why: str) -> TypeError:
    return TypeError(f'The scheduler {_path(scheduler)} cannot be saved: {why}. Attributes must be numbers, strings, None, lists, '
                     'dictionaries and schedulers, or the class must define get_config(), which returns a dictionary of them, '
                     'and set_config(dict).')


def _is_its_attributes(scheduler: Any) -> bool:
    """Whether `vars` has all that the object is: it is of a class with a ``__call__`` of its own, and without slots."""
    cls = type(scheduler)
    return (inspect.isfunction(inspect.getattr_static(cls, '__call__', None)) and hasattr(scheduler, '__dict__')
            and not any(base.__dict__.get('__slots__') for base in cls.__mro__))


def _path(scheduler: Any) -> str:
    return f'{type(scheduler).__module__}.{type(scheduler).__qualname__}'


def _has_config(scheduler: Any) -> bool:
    return callable(getattr(scheduler, 'get_config', None)) and callable(getattr(scheduler, 'set_config', None))


# Into a trainer

class SchedulerPlan(NamedTuple):
    """The scheduler that will hold, and what becomes of it."""

    scheduler: Any
    changes: List[Tuple[Any, Dict[str, Any]]]   # schedulers, and the attributes or the config that they get
    replayed: int                               # the number of updates for which it is asked
    notes: List[str]                            # one sentence for each difference between the trainer's and the file's

    def apply(self, undo: contextlib.ExitStack) -> Any:
        """Change the scheduler in place, as the user may hold it, and return it."""
        for scheduler in _parts(self.scheduler):
            if hasattr(scheduler, '__dict__'):
                keep(undo, vars(scheduler))
            if _has_config(scheduler):
                undo.callback(scheduler.set_config, scheduler.get_config())
        for scheduler, attributes in self.changes:
            _put(scheduler, attributes)
        if self.replayed:
            _advance(self.scheduler, 0, self.replayed)
        return self.scheduler


def keep(undo: contextlib.ExitStack, changing: Dict[Any, Any]) -> None:
    """Let ``undo`` restore the current entries of ``changing``."""
    before = dict(changing)

    def put_back() -> None:
        changing.clear()
        changing.update(before)
    undo.callback(put_back)


def plan_scheduler(present: Any, begin: int, saved: Optional[Dict[str, Any]], num_update: int, mode: str) -> SchedulerPlan:
    """Check whether ``saved``, which has been asked for ``num_update`` updates, can be restored; nothing changes yet.

    ``mode='file'``: the saved attributes go into the trainer's scheduler ``present``, which has been asked for ``begin``
    updates, if it is of the same class, or into a new one where there is none. ``mode='current'``: the present one stays and
    is asked for every update up to ``num_update``, as in training, if it is not one of ours, which need not be asked.

    Raises ValueError for another class, or for attributes that are not those of the class.
    """
    if mode == 'current':
        if present is not None:
            _check_distance(present, num_update, ASKED)
        notes = _differences(present, begin, saved, num_update, "the trainer's applies", history=True)
        return SchedulerPlan(present, [], 0 if present is None else num_update, notes)
    if saved is None and present is None:
        return SchedulerPlan(None, [], 0, [])
    if saved is None or (present is not None and not _is_of(present, saved['class'])):
        file = 'without a scheduler' if saved is None else f'with the scheduler {saved["class"]}'
        raise ValueError(f'The file was saved {file}, the trainer has {_path(present)}. Create the trainer as it was, or pass '
                         'hyperparameters="current" to keep the trainer\'s.')
    if _is_ours(saved['class']):
        schedule_of(saved)  # refuses what no constructor makes, before schedulers without end are copied
    saved = copy.deepcopy(saved)
    scheduler = _new(saved) if present is None else _copied(present)  # to try it out
    changes = [] if present is None else _changes(present, saved)
    if present is not None and scheduler is not None:
        _restore(scheduler, saved)
    if scheduler is not None:
        _check(scheduler, saved['class'], num_update)
        if type(scheduler) in DECAYING:  # it would decay at the next update; however far that is, it has done so now
            changes = [(present, vars(scheduler))]
    notes = _differences(present, begin, saved, num_update, "the file's applies")
    return SchedulerPlan(scheduler, [], 0, notes) if present is None else SchedulerPlan(present, changes, 0, notes)


def _is_of(scheduler: Any, path: str) -> bool:
    """Whether ``path`` names the scheduler's class. The user's script is ``__main__`` when run, and has a name when imported."""
    if '__main__' in (type(scheduler).__module__, path.partition('.')[0]):
        return path.endswith('.' + type(scheduler).__qualname__)
    return path == _path(scheduler)


def _new(saved: Dict[str, Any]) -> Any:
    """A scheduler of one of the classes that are made for a trainer without one, with the attributes in the file."""
    path = saved['class']
    module, _, name = path.rpartition('.')
    cls = getattr(importlib.import_module(module), name, None) if module in KNOWN else None
    if not isinstance(cls, type) or cls.__module__ != module:
        raise ValueError(f'The file was saved with the scheduler {path}, the trainer has none, and only those of MXNet and of '
                         f'gluon_optim are made from a file. Create the trainer with lr_scheduler={name}(...), or pass '
                         'hyperparameters="current".')
    scheduler: Any = object.__new__(cls)
    vars(scheduler).update(_with_schedulers(saved['attributes']) if _is_ours(path) else saved['attributes'])
    return scheduler


def _with_schedulers(value: Any) -> Any:
    """``value`` with a scheduler for each record of one."""
    if _is_record(value):
        return _new(value)
    if isinstance(value, dict):
        return {name: _with_schedulers(item) for name, item in value.items()}
    return [_with_schedulers(item) for item in value] if isinstance(value, list) else value


def _is_ours(path: str) -> bool:
    return path.startswith(OURS + '.') and path in CLASSES


def _parts(scheduler: Any) -> Iterator[Any]:
    """The scheduler, and those in its attributes."""
    yield scheduler
    if not _has_config(scheduler):
        yield from _within(list(getattr(scheduler, '__dict__', {}).values()))


def _within(value: Any) -> Iterator[Any]:
    """The schedulers in an attribute."""
    if isinstance(value, mx.LRScheduler):
        yield from _parts(value)
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _within(item)


def _put(scheduler: Any, attributes: Dict[str, Any]) -> None:
    if _has_config(scheduler):
        scheduler.set_config(attributes)
    else:
        vars(scheduler).update(attributes)


def _restore(scheduler: Any, saved: Dict[str, Any]) -> None:
    for part, attributes in _changes(scheduler, saved):
        _put(part, attributes)


def _copied(scheduler: Any) -> Any:
    """A copy that can be tried out, None of what has none: a user's class may hold anything."""
    try:
        return copy.deepcopy(scheduler)
    except Exception:
        if _has_config(scheduler):
            return None
        raise


def _changes(scheduler: Any, saved: Dict[str, Any]) -> List[Tuple[Any, Dict[str, Any]]]:
    """What of ``scheduler``, and of those in it, gets which attributes. Raises ValueError where the file has others."""
    attributes = saved['attributes']
    if _has_config(scheduler):
        return [(scheduler, attributes)]
    present = vars(scheduler)
    if type(scheduler).__module__ in KNOWN and set(present) != set(attributes):
        raise ValueError(f'{saved["class"]} must have the attributes {sorted(present)}. Received from the file: '
                         f'{sorted(attributes)}. It was written by another version of the class: pass hyperparameters="current".')
    changes: List[Tuple[Any, Dict[str, Any]]] = []
    values = {name: _value(present.get(name), new, f'{_path(scheduler)}.{name}', changes) for name, new in attributes.items()}
    return [*changes, (scheduler, values)]


def _value(present: Any, new: Any, where: str, changes: List[Tuple[Any, Dict[str, Any]]]) -> Any:
    """``new`` as an attribute that is ``present`` now: schedulers stay, and their attributes are added to ``changes``."""
    parts = any(True for _ in _within(present))
    if isinstance(present, mx.LRScheduler):
        if not _is_record(new) or not _is_of(present, new['class']):
            raise _other(where, _path(present), new)
        changes += _changes(present, new)
        return present
    if isinstance(present, (list, tuple)) and parts:
        if not isinstance(new, list) or len(new) != len(present):
            raise _other(where, f'{len(present)} values', new)
        return type(present)(_value(a, b, f'{where}[{i}]', changes) for i, (a, b) in enumerate(zip(present, new)))
    if isinstance(present, dict) and parts:
        if not isinstance(new, dict) or set(new) != set(present):
            raise _other(where, f'the keys {sorted(present)}', new)
        return {key: _value(present[key], new[key], f'{where}[{key!r}]', changes) for key in present}
    if _is_record(new):
        raise _other(where, f'{present!r:.80}', new)
    return tuple(new) if isinstance(present, tuple) and isinstance(new, list) else new


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {'class', 'attributes'} and isinstance(value['attributes'], dict)


def _other(where: str, present: str, new: Any) -> ValueError:
    received = f'the scheduler {new["class"]}' if _is_record(new) else f'{len(new)} values' if isinstance(new, list) else repr(new)
    return ValueError(f'{where} is {present} in the trainer. Received from the file: {received:.80}. Create the scheduler as it '
                      'was, or pass hyperparameters="current" to keep the trainer\'s.')


def _check(scheduler: Any, path: str, num_update: int) -> None:
    """Refuse a scheduler that no constructor makes, or that has no rate at ``num_update``; brings it there."""
    try:
        if type(scheduler) in DECAYING + ENDING:
            _check_attributes(scheduler)
        if type(scheduler) in DECAYING:
            _decay(scheduler, num_update)
        elif isinstance(scheduler, mx.FactorScheduler) and not num_update - scheduler.count <= ASKED * max(scheduler.step, 0):
            raise ValueError(f'step={scheduler.step!r} and count={scheduler.count!r} at update {num_update}')
        rate = copy.deepcopy(scheduler)(num_update)
        if not math.isfinite(rate):
            raise ValueError(f'a rate of {rate}')
    except Exception as error:
        raise ValueError(f'The attributes of {path} in the file must make a scheduler. Received: {type(error).__name__}: {error}. '
                         'Pass hyperparameters="current".') from error


def _check_attributes(scheduler: Any) -> None:
    """Raise an error where the constructor would, or for attributes that it does not make."""
    held = vars(scheduler)
    type(scheduler)(**{name: held[ATTRIBUTES.get(name, name)] for name in _arguments(scheduler)})
    for name, value in held.items():
        if name != 'warmup_mode' and not isinstance(value, list) and type(value) not in (int, float):
            raise TypeError(f'{name}={value!r}')
    if not 0 <= held.get('cur_step_ind', 0) <= len(held['step'] if isinstance(held.get('step'), list) else ()):
        raise ValueError(f'cur_step_ind={held["cur_step_ind"]!r}')


def _arguments(scheduler: Any) -> List[str]:
    """The names of the constructor's arguments, '*' for any number of them."""
    return ['*' if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) else name
            for name, parameter in inspect.signature(type(scheduler)).parameters.items()]


# Through the updates of a run

def _check_distance(scheduler: Any, number: int, limit: int) -> None:
    """Raise ValueError where it would take too long to ask the scheduler for ``number`` updates."""
    if type(scheduler) not in DECAYING + ENDING and not _is_ours(_path(scheduler)) and number > limit:
        raise ValueError(f'{_path(scheduler)} must be asked for every update up to that of the file, and {limit} is the limit. '
                         f'Received: {number}. Use a scheduler of mxnet.lr_scheduler or gluon_optim.lr_scheduler, which need not '
                         'be asked for all.')


def _advance(scheduler: Any, begin: int, end: int) -> None:
    """Ask ``scheduler`` for every update after ``begin`` up to ``end``, as in training; not for all if MXNet's or ours."""
    if _is_ours(_path(scheduler)):
        scheduler(end)
    elif type(scheduler) in DECAYING:
        _decay(scheduler, end)
    elif type(scheduler) in ENDING:
        if begin < min(end, scheduler.max_update):
            scheduler(min(end, scheduler.max_update))  # after the last one they change no more
    else:
        for update in range(begin + 1, end + 1):
            scheduler(update)


def _decay(scheduler: Any, num_update: int) -> None:
    """What calling one of `DECAYING` does, without a line in the log for each decay, and at once where the rate has arrived."""
    vars(scheduler).update(CLASSES[_path(scheduler)].after(vars(scheduler), num_update))


# The script's and the file's

def _differences(present: Any, begin: int, saved: Optional[Dict[str, Any]], num_update: int, whose: str, history: bool = False
                 ) -> List[str]:
    """One sentence for each value of the schedule that differs between trainer and file; with ``history``, also for what one of
    ours has observed.

    Both are brought to the same update: what moves in a run is the same then, unless something else is not.
    """
    if present is None or saved is None or not _is_of(present, saved['class']):
        mine, theirs = 'none' if present is None else _path(present), saved['class'] if saved else 'none'
        return [] if mine == theirs else [f'The scheduler is {mine} in the trainer and {theirs} in the file: {whose}.']
    mine, theirs = _copied(present), _copied(present)
    if mine is None:
        return [f'The scheduler {_path(present)} cannot be copied, so it is not known whether that of the file differs: {whose}.']
    end = max(begin, num_update)
    try:
        _restore(theirs, saved)
        _check(theirs, saved['class'], num_update)
        _check_distance(mine, end - begin, COMPARED)
        _check_distance(theirs, end - num_update, COMPARED)
        _advance(mine, begin, end)
        _advance(theirs, num_update, end)
        records = [_record(scheduler, ())['attributes'] for scheduler in (mine, theirs, present)]
        values = list(_chosen(present, records, '', history))
    except Exception as error:
        return [f'It is not known whether the scheduler of the file differs: {whose}. {error}']
    notes, told = [], set()
    for name, (a, b, first) in values:
        if a != b and repr((a, b)) not in told:
            told.add(repr((a, b)))  # MXNet keeps some arguments twice
            when = '' if a == first else f' at update {end}'
            notes.append(f'{name} of the scheduler{when} is {a!r:.80} in the trainer and {b!r:.80} in the file: {whose}.')
    return notes


def _chosen(scheduler: Any, records: List[Dict[str, Any]], prefix: str, history: bool) -> Iterator[Tuple[str, List[Any]]]:
    """The attributes that are the constructor's arguments, and their values in each of the records. Where one of the arguments
    is kept under another name all attributes may be arguments."""
    names = _arguments(scheduler)
    if isinstance(scheduler, Scheduler) and history:
        names = [hyper.name for hyper in scheduler.formula.hypers + scheduler.formula.history]
    if not all(name in records[0] for name in names):
        names = list(dict.fromkeys(name for record in records for name in record))
    for name in names:
        held = None if _has_config(scheduler) else vars(scheduler).get(name)
        values = [record.get(name) for record in records]
        given = [record.get('warmup_final_lr') for record in records]  # what MXNet's constructor got as base_lr, which decays
        values = given if name == 'base_lr' and given[0] != given[1] else values
        yield from _leaves(held, values, prefix + name, history)


def _leaves(held: Any, values: List[Any], name: str, history: bool) -> Iterator[Tuple[str, List[Any]]]:
    """The values of an attribute, taken apart where it contains schedulers."""
    if isinstance(held, mx.LRScheduler):
        yield from _chosen(held, [value['attributes'] for value in values], f'{name}.', history)
    elif isinstance(held, (list, tuple, dict)) and any(True for _ in _within(held)):
        for key, item in held.items() if isinstance(held, dict) else enumerate(held):
            yield from _leaves(item, [value[key] for value in values], f'{name}[{key!r}]', history)
    else:
        yield name, values
