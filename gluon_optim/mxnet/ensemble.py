"""Several networks from one run: kept where the learning rate has come down, they predict together.

    snapshots = go.ensemble.Snapshots(manager, net, trainer, cycle=200)
    for step in range(restored.step + 1 if restored else 1, 1001):
        ...                                     # forward, backward, trainer.step
        snapshots.save(step)                    # instead of manager.save: keeps the network of steps 200, 400, ...
    probabilities = snapshots.predict(images)

Huang, Li, Pleiss, Liu, Hopcroft, Weinberger, Snapshot ensembles: train 1, get M for free, ICLR 2017.

>>> import tempfile, gluon_optim as go
>>> import mxnet as mx
>>> net = mx.gluon.nn.Dense(2, in_units=2)
>>> net.initialize()
>>> with tempfile.TemporaryDirectory() as folder:
...     snapshots = go.ensemble.Snapshots(go.CheckpointManager(folder), net, cycle=2)
...     kept = [snapshots.save(step) for step in range(1, 5)]
...     print(kept, snapshots.steps(), snapshots.predict(mx.nd.ones((1, 2))).sum())
[False, True, False, True] [2, 4]
[1.]
<NDArray 1 @cpu(0)>
"""
import contextlib
from typing import Any, Callable, List, Optional, TypeVar

import numpy
from mxnet import autograd, gluon
from mxnet import ndarray as nd
from mxnet import numpy as mx_numpy
from mxnet.lr_scheduler import LRScheduler

from ..schedules import rate
from ..schema import check_int, one_of
from ..states import container
from ..states.errors import StateFileError
from .checkpoint import load_checkpoint, parameters
from .manager import CheckpointManager
from .trainer import check_trainer
from .typing import BlockLike, TrainerLike
from .weights import devices_of, remember

__all__ = ['Snapshots']

T = TypeVar('T')
AVERAGES = ('probabilities', 'outputs')
LOOKED_THROUGH = (10 ** 4, 10 ** 6)  # updates within which a schedule must have a cycle


class Snapshots:
    """A snapshot ensemble: the networks of one run at the ends of the cycles of its learning rate.

        p(y | x) = 1/M sum_i softmax(f_i(x))[y]         f_1 .. f_M: the networks that were kept

    Parameters
    ----------
    manager : CheckpointManager
        The networks are checkpoints in its folder, saved with ``keep=True``, which are never deleted. All in the folder count,
        also those of an earlier process.
    net : gluon.Block
    trainer : gluon.Trainer, optional
        For `save`: the run can then continue from its checkpoints, and its updates are counted.
    cycle : int or scheduler, optional
        For `save`, where cycles end: after each ``cycle`` updates, or where the rate of a schedule begins to rise again. That is
        any that `gluon_optim.rate` knows, such as `gluon_optim.lr_scheduler.CosineRestarts`.
    part : str, optional
        The name of ``net`` in checkpoints of several. These are saved by ``manager.save(step, net={...}, trainer={...},
        keep=snapshots.ends(step))``, where each step is one update.

    The paper's rate in cycles of C updates is base_lr / 2 (1 + cos(pi ((t - 1) mod C) / C)): CosineRestarts(step=C, base_lr).

    Raises TypeError for another manager, net, trainer or scheduler, ValueError for a cycle below 1 and a schedule without cycles.

    >>> import tempfile, gluon_optim as go
    >>> import mxnet as mx
    >>> net = mx.gluon.nn.Dense(2, in_units=2)
    >>> net.initialize()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     snapshots = go.ensemble.Snapshots(go.CheckpointManager(folder, keep_last=1), net, cycle=2)
    ...     for step in range(1, 8):
    ...         _ = snapshots.save(step)
    ...     snapshots.manager.steps(), snapshots.steps(), snapshots.predict(mx.nd.ones((5, 2))).shape
    ([2, 4, 6, 7], [2, 4, 6], (5, 2))
    """

    def __init__(self, manager: CheckpointManager, net: BlockLike, trainer: Optional[TrainerLike] = None, cycle: Any = None,
                 part: Optional[str] = None):
        if not isinstance(manager, CheckpointManager):
            raise TypeError(f'`manager` must be a CheckpointManager. Received: {type(manager).__name__}.')
        if not isinstance(net, gluon.Block):
            raise TypeError(f'`net` must be a gluon.Block. Received: {type(net).__name__}.')
        if trainer is not None:
            check_trainer(trainer)
        self.manager, self.net, self.trainer, self.part = manager, net, trainer, part
        if isinstance(cycle, LRScheduler):
            if not any(_ends(rate(cycle, numpy.arange(1, updates))).any() for updates in LOOKED_THROUGH):
                raise ValueError(f'`cycle` must be a schedule with a rate that falls and rises again. Received: a '
                                 f'{type(cycle).__name__}, with one that does not in {LOOKED_THROUGH[-1]} updates. Pass a number '
                                 'of updates.')
        elif cycle is not None:
            cycle = check_int('cycle', cycle, 1)
        self.cycle = cycle
        self._before: Optional[int] = None      # the number of updates at the last `save`

    def __repr__(self) -> str:
        return f'<Snapshots: of steps {", ".join(map(str, self.steps())) or "none yet"} in {self.manager.directory!r}>'

    def __len__(self) -> int:
        return len(self.steps())

    def steps(self) -> List[int]:
        """The steps of the networks that were kept, in ascending order. Those of another process count too."""
        self.manager.wait()
        return self.manager.kept()

    def ends(self, step: int) -> bool:
        """Whether a cycle ends with the update number ``step``. Raises ValueError without a ``cycle``."""
        if self.cycle is None:
            raise ValueError('`cycle` must be given to save snapshots. Received: none. Pass the number of updates in a cycle, or '
                             'the schedule.')
        step = check_int('step', step)
        if isinstance(self.cycle, LRScheduler):
            return step > 1 and bool(_ends(rate(self.cycle, numpy.arange(step - 1, step + 2)))[0])
        return step > 0 and step % self.cycle == 0

    def save(self, step: int, **options: Any) -> bool:
        """Call it after each batch, instead of `CheckpointManager.save`: it saves what that would, with the same ``options``, and
        the network for good where a cycle ends. Returns whether it did the latter.

        With a trainer its updates decide, and ``step`` is only the name of the checkpoint: where a batch is no update, because
        gradients are accumulated or a loss scale was too high, cycles take more steps. Without one ``step`` is the number of the
        update.

        Raises as `CheckpointManager.save` does, and ValueError where there are several nets.
        """
        if self.part is not None:
            raise ValueError(f'`save` is for a single net. Received: one of several, part={self.part!r}. Call manager.save(step, '
                             'net={...}, trainer={...}, keep=snapshots.ends(step)).')
        ends = self._is_due(check_int('step', step))
        self.manager.save(step, net=self.net, trainer=self.trainer, keep=ends, **options)
        return ends

    def _is_due(self, step: int) -> bool:
        """Whether a cycle has ended with a network that has not been kept yet: the batches after it may be no updates."""
        if self.trainer is None:
            return self.ends(step)
        before, self._before = self._before, int(self.trainer._optimizer.num_update)
        if not self.ends(self._before):
            return False
        if before is not None and before < self._before:
            return True
        return self._updates_of_newest(step) != self._before  # in a new process, or one that was set back, the files know

    def _updates_of_newest(self, step: int) -> Optional[int]:
        """After how many updates the newest snapshot before ``step`` was taken."""
        gone = self.manager._abandoned or ()
        earlier = [kept for kept in self.steps() if kept < step and kept not in gone]
        with contextlib.suppress(StateFileError, FileNotFoundError, KeyError):  # damaged, or of several nets: not one of ours
            if earlier:
                return int(container.read_manifest(self.manager.path(earlier[-1]))['num_update'])
        return None

    def predict(self, x: Any, last: Optional[int] = None, average: str = 'probabilities', axis: int = -1,
                batch_size: Optional[int] = None) -> Any:
        """The mean of what the networks predict for the batch ``x``.

        Parameters
        ----------
        x : NDArray or numpy.ndarray
            The input of the net. A NumPy array goes to the net's first device.
        last : int, optional
            Of the newest so many networks, or all where there are fewer; of all, by default.
        average : 'probabilities' or 'outputs'
            'probabilities' is the mean of the softmax of the outputs, over ``axis``, for a net that is trained with
            `SoftmaxCrossEntropyLoss`. 'outputs' is that of the outputs as they are: for regression, or probabilities already.
        batch_size : int, optional
            How many go through the net at once; all, by default.

        Returns
        -------
        NDArray
            One array, on the device of ``x``.

        Networks are loaded one after the other, and the net then has its own parameters again, bit for bit, also after an error. A
        net with shapes left out that has not seen data yet takes them from the files, and keeps the parameters of the newest.

        Raises ValueError if nothing has been kept yet, and for probabilities of a net with one output; StateFileError, with the
        path, for a damaged file.
        """
        if average not in AVERAGES:
            raise ValueError(f'`average` must be one of {one_of(AVERAGES)}. Received: average={average!r}.')
        if not isinstance(x, (nd.NDArray, numpy.ndarray)):
            raise TypeError(f'`x` must be one NDArray or NumPy array. Received: {type(x).__name__}. Call map with a function that '
                            'gives the net what it needs.')
        outputs = self.map(lambda: self._outputs(x, batch_size), last)
        values = [_softmax(array, axis) if average == 'probabilities' else array for array in outputs]
        mean = numpy.mean(values, axis=0, dtype='float64')
        make = mx_numpy.array if isinstance(x, mx_numpy.ndarray) else nd.array
        return make(mean, ctx=self._context(x), dtype=outputs[0].dtype)

    def map(self, function: Callable[[], T], last: Optional[int] = None) -> List[T]:
        """What ``function()`` returns with each of the networks in ``net``, in the order in which they were kept: an accuracy over
        a DataLoader, say. Nothing is recorded, and the net is in prediction mode; afterwards it has its own parameters again.

        ``last`` and errors as for `predict`.
        """
        steps = self._chosen(last)
        results = []
        with contextlib.ExitStack() as undo, autograd.pause(train_mode=False):
            present = parameters(self.net, None).values()
            if all(parameter._data is not None for parameter in present):
                remember(undo, present)
            for step in steps:
                load_checkpoint(self.manager.path(step), net=self.net if self.part is None else {self.part: self.net})
                results.append(function())
        return results

    def _outputs(self, x: Any, batch_size: Optional[int]) -> numpy.ndarray:
        """What the net makes of ``x``, in parts."""
        x = nd.array(x, ctx=self._context(x)) if isinstance(x, numpy.ndarray) else x
        size = len(x) if batch_size is None else check_int('batch_size', batch_size, 1)
        found = []
        for i in range(0, len(x), size):
            output = self.net(x[i:i + size])
            if not isinstance(output, nd.NDArray):
                raise TypeError(f'The net must return one array. Received: {type(output).__name__}. Call map with a function that '
                                'takes what it needs.')
            found.append(output.asnumpy())
        return numpy.concatenate(found)

    def _context(self, x: Any) -> Any:
        if not isinstance(x, numpy.ndarray):
            return x.context
        return devices_of(next(iter(parameters(self.net, None).values())))[0]

    def _chosen(self, last: Optional[int]) -> List[int]:
        last = None if last is None else check_int('last', last, 1)
        steps = self.steps()
        if not steps:
            raise ValueError(f'There must be a snapshot in {self.manager.directory!r}. Received: none. Train with save(step) until '
                             'a cycle ends.')
        return steps if last is None else steps[-last:]


def _ends(rates: numpy.ndarray) -> numpy.ndarray:
    """For each rate but the first and the last whether it is lower than both neighbours."""
    return (rates[:-2] > rates[1:-1]) & (rates[1:-1] < rates[2:])


def _softmax(outputs: numpy.ndarray, axis: int) -> numpy.ndarray:
    highest = outputs.max(axis=axis, keepdims=True)
    if highest.shape == outputs.shape:
        raise ValueError('Probabilities must be of two classes at least. Received: outputs of shape '
                         f'{outputs.shape}, one along axis {axis}, for which a softmax is always 1. '
                         "Pass average='outputs', or call map.")
    powers = numpy.exp(outputs - highest, dtype='float64')
    return numpy.asarray(powers / powers.sum(axis=axis, keepdims=True))
