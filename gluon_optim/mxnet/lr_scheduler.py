"""Learning rate schedulers in and out of state files: by class path and attributes, never by pickle.

MXNet's schedulers are stateful: past its end a CosineScheduler keeps the rate at which it arrived, and a fresh one would
answer with the rate from which it started. So all attributes are saved and put back.
"""
import contextlib
import copy
import importlib
import math
from typing import Any, Callable, Dict, Optional

__all__ = ['SchedulerPlan', 'export_scheduler', 'keep', 'plan_scheduler']

KNOWN = ('mxnet.lr_scheduler', 'gluon_optim.mxnet.lr_scheduler')  # modules whose classes are their attributes


def export_scheduler(scheduler: Any) -> Optional[Dict[str, Any]]:
    """``{'class': path, 'attributes': {...}}``, None for no scheduler.

    A user's class defines ``get_config()``, which returns a dictionary that JSON can hold, and ``set_config(dict)``.
    Raises TypeError, naming the class, where it does not.
    """
    if scheduler is None:
        return None
    if _has_config(scheduler):
        attributes = scheduler.get_config()
        if not isinstance(attributes, dict):
            raise TypeError(f'{_path(scheduler)}.get_config() must return a dictionary. Received: {attributes!r}.')
    elif type(scheduler).__module__ in KNOWN:
        attributes = vars(scheduler)
    else:
        raise TypeError(f'The scheduler {_path(scheduler)} cannot be saved: a class that is not of MXNet must define get_config(), '
                        'which returns its attributes as a dictionary, and set_config(dict). Define both, or use a class of '
                        'mxnet.lr_scheduler.')
    return {'class': _path(scheduler), 'attributes': copy.deepcopy(attributes)}


class SchedulerPlan:
    """The scheduler that will hold: ``present`` with other attributes, or a new one."""

    def __init__(self, scheduler: Any, change: Callable[[], Any] = lambda: None):
        self._scheduler, self._change = scheduler, change

    def apply(self, undo: contextlib.ExitStack) -> Any:
        """Change the scheduler in place, as the user may hold it, and return it."""
        if hasattr(self._scheduler, '__dict__'):
            keep(undo, vars(self._scheduler))
        if _has_config(self._scheduler):
            undo.callback(self._scheduler.set_config, self._scheduler.get_config())
        self._change()
        return self._scheduler


def keep(undo: contextlib.ExitStack, changing: Dict[Any, Any]) -> None:
    """Let ``undo`` put back the entries that ``changing`` has now."""
    before = dict(changing)

    def put_back() -> None:
        changing.clear()
        changing.update(before)
    undo.callback(put_back)


def plan_scheduler(present: Any, saved: Optional[Dict[str, Any]], num_update: int, mode: str) -> SchedulerPlan:
    """Check whether ``saved`` can be restored; nothing changes yet.

    ``mode='file'``: the saved attributes go into a present scheduler of the same class, or into a new one where there is
    none. ``mode='current'``: the present one stays and is asked for every update up to ``num_update``, as in training.

    Raises ValueError for another class, or for attributes that are not those of the class.
    """
    if mode == 'current':
        return SchedulerPlan(present, lambda: _replay(present, num_update))
    if saved is None and present is None:
        return SchedulerPlan(None)
    if saved is None or (present is not None and not _is_of(present, saved['class'])):
        file = 'without a scheduler' if saved is None else f'with the scheduler {saved["class"]}'
        raise ValueError(f'The file was saved {file}, the trainer has {_path(present)}. Create the trainer as it was, or pass '
                         'hyperparameters="current" to go on with the trainer\'s.')
    attributes = copy.deepcopy(saved['attributes'])
    if present is not None and _has_config(present):
        return SchedulerPlan(present, lambda: present.set_config(attributes))
    scheduler = _new(saved['class']) if present is None else copy.copy(present)
    if present is not None and set(vars(present)) != set(attributes):
        raise ValueError(f'{saved["class"]} must have the attributes {sorted(vars(present))}. Received from the file: '
                         f'{sorted(attributes)}. It was written by another version of the class: pass hyperparameters="current".')
    vars(scheduler).update(attributes)
    _try(scheduler, saved['class'], num_update)
    return SchedulerPlan(scheduler) if present is None else SchedulerPlan(present, lambda: vars(present).update(attributes))


def _path(scheduler: Any) -> str:
    return f'{type(scheduler).__module__}.{type(scheduler).__qualname__}'


def _is_of(scheduler: Any, path: str) -> bool:
    """Whether ``path`` names the scheduler's class. The user's script is ``__main__`` when run, and has a name when imported."""
    if '__main__' in (type(scheduler).__module__, path.partition('.')[0]):
        return path.endswith('.' + type(scheduler).__qualname__)
    return path == _path(scheduler)


def _has_config(scheduler: Any) -> bool:
    return callable(getattr(scheduler, 'get_config', None)) and callable(getattr(scheduler, 'set_config', None))


def _new(path: str) -> Any:
    """An instance without attributes of one of the classes that are made for a trainer without a scheduler."""
    module, _, name = path.rpartition('.')
    cls = getattr(importlib.import_module(module), name, None) if module in KNOWN else None
    if not isinstance(cls, type) or cls.__module__ != module:
        raise ValueError(f'The file was saved with the scheduler {path}, the trainer has none, and only those of MXNet are made '
                         f'from a file. Create the trainer with lr_scheduler={name}(...), or pass hyperparameters="current".')
    return object.__new__(cls)


def _try(scheduler: Any, path: str, num_update: int) -> None:
    try:
        rate = copy.deepcopy(scheduler)(num_update)
        if not math.isfinite(rate):
            raise ValueError(f'a rate of {rate}')
    except Exception as error:
        raise ValueError(f'The attributes of {path} in the file must make a scheduler. Received: {type(error).__name__}: {error}. '
                         'Pass hyperparameters="current".') from error


def _replay(scheduler: Any, num_update: int) -> None:
    if scheduler is not None:
        for update in range(1, num_update + 1):
            scheduler(update)
