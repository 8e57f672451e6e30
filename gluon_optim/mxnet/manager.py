"""`CheckpointManager`: a folder of checkpoints that keeps the right ones and finds the newest valid one."""
import contextlib
import ctypes
import logging
import os
import re
import signal
import threading
import time
import warnings
import weakref
from typing import Any, Collection, Dict, Iterator, List, Optional, Set, Tuple

import numpy
from mxnet.base import _LIB, check_call

from ..schema import check_int, one_of
from ..states import atomic, container
from ..states.errors import StateFileError
from ..states.model import Parts, Run
from .checkpoint import (
    Net,
    Restored,
    Trainer,
    checked_run,
    naming,
    newest_intact,
    read_together,
    restore,
    saving,
    subjects_of,
    take,
)
from .trainer import Pieces, check_savable

__all__ = ['CheckpointManager']

log = logging.getLogger('gluon_optim')
_NAME = re.compile(r'step-(0|[1-9][0-9]{0,15})(?:\.kept)?\.safetensors')
_KEPT = re.compile(r'step-(0|[1-9][0-9]{0,15})\.kept\.safetensors')


class CheckpointManager:
    """Checkpoints of one run, ``step-<step>.safetensors`` in one folder; ``step-<step>.kept.safetensors`` if it was saved with
    ``keep=True``.

    Parameters
    ----------
    directory : str or os.PathLike
        Created when the first checkpoint is saved. One process writes to it at a time; any number may read.
    keep_last : int or None
        How many of the newest to keep; None keeps all.
    keep_every : int, optional
        Checkpoints of steps that are multiples of this are kept permanently.
    keep_best : (str, 'min' or 'max'), optional
        Also keep the one with the lowest or highest value of that metric.
    background : bool
        Write in a thread while training continues: `save` returns as soon as everything has been copied. The memory for
        the copy is reused. Errors are raised by the next `save`, or by `wait`.
    save_every : int
        `save` writes when the step is a multiple of it, so that it can be called after each step.

    Use it in a ``with`` statement, or call `wait` at the end, to be sure that the last checkpoint was written. Give each run
    its own folder; `restore` goes back to an earlier step of the run.

        with go.CheckpointManager('run', save_every=100, background=True) as manager, manager.on_sigterm():
            restored = manager.restore_latest(net=net, trainer=trainer)
            for step in range(restored.step + 1 if restored else 1, steps + 1):
                ...
                manager.save(step, net=net, trainer=trainer)

    Raises ValueError for an argument out of range; the methods say what they raise.

    >>> import tempfile, gluon_optim as go
    >>> import mxnet as mx
    >>> net = mx.gluon.nn.Dense(1, in_units=2)
    >>> net.initialize()
    >>> trainer = mx.gluon.Trainer(net.collect_params(), 'novograd')
    >>> with mx.autograd.record():
    ...     loss = net(mx.nd.ones((4, 2))).sum()
    >>> loss.backward()
    >>> trainer.step(batch_size=4)
    >>> with tempfile.TemporaryDirectory() as folder, go.CheckpointManager(folder, keep_last=2) as manager:
    ...     manager.restore_latest(net=net, trainer=trainer) is None
    ...     for step in range(1, 5):
    ...         _ = manager.save(step, net=net, trainer=trainer)
    ...     manager.steps(), manager.restore_latest(net=net, trainer=trainer).step
    True
    ([3, 4], 4)
    """

    def __init__(self, directory: container.Path, keep_last: Optional[int] = 3, keep_every: Optional[int] = None,
                 keep_best: Optional[Tuple[str, str]] = None, background: bool = False, save_every: int = 1):
        if keep_best is not None and not (isinstance(keep_best, (tuple, list)) and len(keep_best) == 2
                                          and isinstance(keep_best[0], str) and keep_best[1] in ('min', 'max')):
            raise ValueError("`keep_best` must be a metric and 'min' or 'max'. "
                             f"Received: keep_best={keep_best!r}. Write keep_best=('accuracy', 'max').")
        self.directory = os.fspath(directory)
        self.keep_last = None if keep_last is None else check_int('keep_last', keep_last, 1)
        self.keep_every = None if keep_every is None else check_int('keep_every', keep_every, 1)
        self.save_every = check_int('save_every', save_every, 1)
        self.keep_best = None if keep_best is None else tuple(keep_best)
        self.background = bool(background)
        self._metrics: Dict[int, Dict[str, float]] = {}
        self._writing: Optional[_Writing] = None
        self._staging = Staging()
        self._asked: weakref.WeakSet[Any] = weakref.WeakSet()  # trainers that are known to be some that can be saved
        self._terminated = False
        self._abandoned: Optional[List[int]] = None  # steps for the next save to set aside; None: nothing was restored or saved
        self._warned = False  # whether the warning that `keep_best` keeps nothing was given

    def __repr__(self) -> str:
        return (f'CheckpointManager({self.directory!r}, keep_last={self.keep_last}, keep_every={self.keep_every}, '
                f'keep_best={self.keep_best}, background={self.background}, save_every={self.save_every})')

    def __enter__(self) -> 'CheckpointManager':
        return self

    def __exit__(self, *exception: Any) -> None:
        self.wait()

    def path(self, step: int) -> str:
        """The path of the checkpoint of ``step``, whether or not it exists."""
        kept = self._kept_path(step)
        return kept if os.path.lexists(kept) else self._plain_path(step)

    def steps(self) -> List[int]:
        """The steps with checkpoints in the folder, in ascending order; none if there is no folder."""
        return atomic.numbers_in(self.directory, _NAME)

    def kept(self) -> List[int]:
        """The steps that were saved with ``keep=True``, in ascending order."""
        return atomic.numbers_in(self.directory, _KEPT)

    def _plain_path(self, step: int) -> str:
        return os.path.join(self.directory, f'step-{step}.safetensors')

    def _kept_path(self, step: int) -> str:
        return os.path.join(self.directory, f'step-{step}.kept.safetensors')

    # -- saving -----------------------------------------------------------------------------------------------------

    def save(self, step: int, net: Net = None, trainer: Trainer = None,
             extra: Optional[Dict[str, Any]] = None, *, epoch: Optional[int] = None, batch: Optional[int] = None,
             metrics: Optional[Dict[str, float]] = None, force: bool = False, keep: bool = False, reseed: bool = True) -> bool:
        """Save a checkpoint if ``step`` is a multiple of ``save_every``, ``force`` or ``keep`` is true, or SIGTERM came
        (`on_sigterm`).

        With ``keep`` it is never deleted: its name says so, to other managers and later processes too. The other arguments are
        those of `save_checkpoint`. Afterwards checkpoints that need not be kept are deleted. Returns whether it saved.

        Raises as `save_checkpoint` does: TypeError at the first call, whether it saves or not, for a trainer that cannot be saved.
        Warns if the folder holds later steps, from another run or branch, at the first save of a manager that has restored
        nothing; and if no checkpoint has the metric of ``keep_best``.
        """
        step = check_int('step', step)
        self._ask(net, trainer)
        if not (force or keep or self._terminated or step % self.save_every == 0):
            return False
        run = checked_run(step, epoch, batch, metrics, extra)
        with saving(net, trainer, 'CheckpointManager.save', reseed) as together:
            if together.first:
                self.wait()
                self._look_around(step, metrics or ())
                os.makedirs(self.directory, exist_ok=True)
                background = self.background and not self._terminated
                parts = take(run, net, trainer, self._staging if background else Pieces, reseed, together)
                if background:
                    self._writing = _Writing(self, step, parts, run, keep)
                    self._writing.start()
                else:
                    self._write(step, parts, run, keep)
        if self._terminated:
            log.warning('SIGTERM: saved step %d', step)
            self._leave()
        return True

    def _ask(self, net: Any, trainer: Any) -> None:
        """Raise, at once and not at the first step to be saved, where ``trainer`` cannot be saved."""
        if trainer is None:
            return
        for name, (own_net, own) in subjects_of(net, trainer).items():
            if own is not None and own not in self._asked:
                with naming(name):
                    check_savable(own, own_net)
                self._asked.add(own)

    def wait(self) -> None:
        """Wait until the background writing is complete; raise its error, if any."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.join()
        self._staging.take_back()
        if writing.error is not None:
            raise writing.error

    def _look_around(self, step: int, metrics: Collection[str]) -> None:
        """Warn once about likely mistakes."""
        if self._abandoned is None:
            self._abandoned = []
            later = [other for other in self.steps() if other > step]
            if later:
                warnings.warn(f'{self.directory!r} holds the later steps {", ".join(map(str, later))}: restore_latest will restore '
                              f'{later[-1]}, not step {step}, which is saved now. Give a new run its own folder. To go back '
                              'to an earlier step of this one call manager.restore(step, ...), not load_checkpoint.', stacklevel=3)
        if self.keep_best is None or self._warned or self.keep_best[0] in metrics:
            return
        with contextlib.suppress(OSError):  # reading older checkpoints, which saving does not need
            steps = self.steps()
            if metrics or (self.keep_last is not None and self.keep_last <= len(steps) and not self._best(steps)):
                self._warned = True
                warnings.warn(f'keep_best={self.keep_best!r} keeps no checkpoint without {self.keep_best[0]!r} in its metrics. '
                              f'Received for step {step}: {one_of(metrics) or "none"}.', stacklevel=3)

    def _set_aside(self) -> None:
        """Rename the checkpoints after the step that was restored, before a new one is written: otherwise they would be found."""
        while self._abandoned:
            atomic.set_aside(self.path(self._abandoned[-1]))
            self._abandoned.pop()

    def _write(self, step: int, parts: Parts, run: Run, keep: bool) -> None:
        start = time.monotonic()
        atomic.remove_leftovers(self.directory, _NAME)  # of others, and of a write of our own that failed
        self._set_aside()
        if keep:
            with contextlib.suppress(FileNotFoundError):  # of that step there is one file, which is kept from now on
                os.replace(self._plain_path(step), self._kept_path(step))
        container.write_parts(self._kept_path(step) if keep else self.path(step), parts)
        log.info('saved step %d in %.2f s', step, time.monotonic() - start)
        self._metrics[step] = run.metrics
        self._delete_old(step)

    def _delete_old(self, newest: int) -> None:
        """Delete what need not be kept. Later steps, from an abandoned run, are neither touched nor counted."""
        steps = [step for step in self.steps() if step <= newest]
        keep = set(steps if self.keep_last is None else steps[-self.keep_last:])
        keep.update(step for step in steps if self.keep_every and step % self.keep_every == 0)
        keep.update(self.kept())
        try:
            keep.update(self._best(steps))
        except OSError as error:
            log.warning('no old checkpoint is deleted, because the best is not known: %s', error)
            return
        for step in steps:
            if step not in keep:
                try:
                    os.unlink(self.path(step))
                except OSError as error:
                    log.warning('cannot delete the old checkpoint: %s', error)

    def _best(self, steps: List[int]) -> Set[int]:
        """The checkpoint to keep for its metric; of two equal ones, the later."""
        if self.keep_best is None:
            return set()
        metric, mode = self.keep_best
        sign = 1 if mode == 'max' else -1
        values = [(sign * metrics[metric], step) for step in steps for metrics in [self._metrics_of(step)] if metric in metrics]
        return {max(values)[1]} if values else set()

    def _metrics_of(self, step: int) -> Dict[str, float]:
        if step not in self._metrics:
            try:
                self._metrics[step] = container.read_manifest(self.path(step))['run']['metrics']
            except (StateFileError, FileNotFoundError, KeyError):
                self._metrics[step] = {}  # damaged, or only states: no reason to keep it
        return self._metrics[step]

    # -- restoring --------------------------------------------------------------------------------------------------

    def restore(self, step: int, net: Net = None, trainer: Trainer = None, strict: bool = True,
                hyperparameters: str = 'file', states: bool = True) -> Restored:
        """Restore the checkpoint of ``step``, as `load_checkpoint` does; with a trainer, to continue from there.

        The run is then at ``step``, and the next `save` first sets the checkpoints of later steps aside: they are renamed to
        ``step-<step>.safetensors.abandoned``, which `restore_latest` ignores and nothing deletes. Until then, and without a
        trainer or with ``states=False``, the folder is unchanged.

        Raises ValueError if there is no such checkpoint or it does not fit, StateFileError if it is damaged.
        """
        self._ask(net, trainer)
        step = check_int('step', step)

        def read() -> Tuple[Parts, str]:
            self.wait()
            steps = self.steps()
            if step not in steps:
                raise ValueError(f'`step` must have a checkpoint in {self.directory!r}. Received: step={step}. '
                                 f'Available: {", ".join(map(str, steps)) or "none"}.')
            return container.read_parts(self.path(step)), self.path(step)

        parts, path = read_together(subjects_of(net, trainer), 'CheckpointManager.restore', read)
        restored = restore(path, parts, net, trainer, strict, hyperparameters, states)
        if trainer is not None and states:
            self._abandoned = [later for later in self.steps() if later > step]
        return restored

    def restore_latest(self, net: Net = None, trainer: Trainer = None, strict: bool = True,
                       hyperparameters: str = 'file', states: bool = True) -> Optional[Restored]:
        """Restore the newest intact checkpoint, as `load_checkpoint` does; None if there is none yet.

        Damaged ones are skipped, with a warning logged to 'gluon_optim'. Raises StateFileError if all are damaged,
        ValueError if the newest intact one does not fit, OSError if one cannot be read: it may be intact.
        """
        self._ask(net, trainer)

        def read() -> Tuple[Optional[Parts], str]:
            self.wait()
            path, parts = newest_intact(map(self.path, reversed(self.steps())), self.directory) or ('', None)
            return parts, path

        parts, path = read_together(subjects_of(net, trainer), 'CheckpointManager.restore_latest', read)
        if parts is None:
            return None
        restored = restore(path, parts, net, trainer, strict, hyperparameters, states)
        if trainer is not None and states:
            self._abandoned = []  # later ones are damaged
        return restored

    # -- being terminated -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def on_sigterm(self) -> Iterator['CheckpointManager']:
        """Inside the ``with`` block SIGTERM does not end the process: the next `save` saves, whatever the step, and then ends it.

        So call `save` after each step (with ``save_every``). The signal itself does not save, because it may arrive in the
        middle of an update. After saving, the previous handler is restored and gets the signal; a second SIGTERM goes to it
        at once. Main thread only, like all signal handling in Python.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ValueError('`on_sigterm` must be called in the main thread. Received: a call in '
                               f'{threading.current_thread().name!r}. Python handles signals only in the main thread.')
        previous = signal.signal(signal.SIGTERM, self._on_signal)
        self._previous = signal.SIG_DFL if previous is None else previous
        try:
            yield self
        finally:
            if signal.getsignal(signal.SIGTERM) == self._on_signal:
                signal.signal(signal.SIGTERM, self._previous)
            self._terminated = False

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._terminated:
            self._leave()
        else:
            self._terminated = True

    def _leave(self) -> None:
        """Pass the signal to the handler that was there before."""
        self._terminated = False
        signal.signal(signal.SIGTERM, self._previous)
        os.kill(os.getpid(), signal.SIGTERM)


class _Writing(threading.Thread):
    """The writing of one checkpoint; the interpreter waits for it at exit."""

    def __init__(self, manager: CheckpointManager, step: int, parts: Parts, run: Run, keep: bool):
        super().__init__(name=f'checkpoint of step {step}', daemon=False)
        self.error: Optional[BaseException] = None
        self._arguments = manager, step, parts, run, keep

    def run(self) -> None:
        manager, step, parts, run, keep = self._arguments
        try:
            manager._write(step, parts, run, keep)
        except BaseException as error:
            self.error = error
            log.error('the checkpoint of step %d was not written: %s', step, error)
        finally:
            del self._arguments


class Staging:
    """Copies of NDArrays in memory that is reused: allocating it would take longer than copying."""

    def __init__(self) -> None:
        self._free: Dict[Any, List[numpy.ndarray]] = {}
        self._used: List[numpy.ndarray] = []

    def __call__(self, array: Any) -> numpy.ndarray:
        kind = tuple(array.shape), numpy.dtype(array.dtype)
        free = self._free.get(kind)
        copy = free.pop() if free else numpy.empty(*kind)
        self._used.append(copy)
        if array.context.device_type.startswith('cpu'):
            array.wait_to_read()
            address = ctypes.c_void_p()
            # asking for the address also restores the byte order of a weight that MXNet has permuted for oneDNN
            check_call(_LIB.MXNDArrayGetData(array.handle, ctypes.byref(address)))
            ctypes.memmove(copy.ctypes.data, address, copy.nbytes)
        else:
            check_call(_LIB.MXNDArraySyncCopyToCPU(array.handle, copy.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(copy.size)))
        return copy

    def take_back(self) -> None:
        """Free the memory for the next copies, after all have been written."""
        self._free = {}
        for copy in self._used:
            self._free.setdefault((copy.shape, copy.dtype), []).append(copy)
        self._used = []
