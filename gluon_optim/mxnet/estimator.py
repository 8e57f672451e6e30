"""Checkpoints of a run of Gluon's Estimator, `mxnet.gluon.contrib.estimator`."""
import math
from typing import Any, Dict

import mxnet
from mxnet.gluon.contrib.estimator import BatchEnd, EpochEnd, TrainBegin

from .manager import CheckpointManager

__all__ = ['EstimatorCheckpoints']


class EstimatorCheckpoints(TrainBegin, BatchEnd, EpochEnd):
    """An event handler that resumes a run from ``manager``, and saves a checkpoint in it after each epoch.

    Parameters
    ----------
    manager : CheckpointManager
        Its steps are epochs: ``save_every=5`` saves after each fifth. ``keep_best`` may name any metric of the Estimator, as
        'training accuracy' or 'validation loss'.

    `Estimator.fit` gets the number of epochs, or of batches, of the whole run, also where a part of it has been trained.

    Raises ValueError, when training begins, where the run is complete.

    >>> import tempfile, gluon_optim as go, mxnet as mx
    >>> from mxnet.gluon.contrib.estimator import Estimator
    >>> def train(epochs, folder):
    ...     net = mx.gluon.nn.Dense(1)
    ...     net.initialize()
    ...     trainer = mx.gluon.Trainer(net.collect_params(), 'adamw')
    ...     data = mx.gluon.data.DataLoader(mx.gluon.data.ArrayDataset(mx.nd.ones((8, 2)), mx.nd.ones(8)), batch_size=4)
    ...     estimator = Estimator(net, mx.gluon.loss.L2Loss(), mx.metric.MSE(), trainer=trainer)
    ...     estimator.logger.disabled = True
    ...     estimator.fit(data, epochs=epochs, event_handlers=[go.EstimatorCheckpoints(go.CheckpointManager(folder))])
    ...     return trainer.optimizer.num_update
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     train(2, folder), train(3, folder)  # two epochs of two batches, and the third
    (4, 6)
    """

    priority = math.inf  # after all others: what they have updated is saved

    def __init__(self, manager: CheckpointManager):
        if not isinstance(manager, CheckpointManager):
            raise TypeError(f'`manager` must be a CheckpointManager. Received: {type(manager).__name__}.')
        self.manager = manager
        self.epoch = self.batch = 0  # how many the whole run has trained

    def train_begin(self, estimator: Any, *args: Any, **kwargs: Any) -> None:
        restored = self.manager.restore_latest(net=estimator.net, trainer=estimator.trainer)
        self.epoch, self.batch = (0, 0) if restored is None else (restored.epoch or 0, restored.batch or 0)
        if self._complete(estimator):
            raise ValueError(f'The run in {self.manager.directory!r} must have something left to train. Received: one of '
                             f'{self.epoch} epochs and {self.batch} batches. Raise `epochs` or `batches`, or give another folder.')

    def batch_end(self, estimator: Any, *args: Any, **kwargs: Any) -> bool:
        self.batch += 1
        return estimator.max_batch is not None and self.batch >= estimator.max_batch

    def epoch_end(self, estimator: Any, *args: Any, **kwargs: Any) -> bool:
        self.epoch += 1
        self.manager.save(self.epoch, net=estimator.net, trainer=estimator.trainer, epoch=self.epoch, batch=self.batch,
                          metrics=_metrics(estimator))
        if self._complete(estimator):
            self.manager.wait()
        return self._complete(estimator)

    def _complete(self, estimator: Any) -> bool:
        """Whether the run has as many epochs or batches as `Estimator.fit` was asked for."""
        epochs, batches = estimator.max_epoch, estimator.max_batch
        return (epochs is not None and self.epoch >= epochs) or (batches is not None and self.batch >= batches)


def _metrics(estimator: Any) -> Dict[str, float]:
    metrics = [*estimator.train_metrics, *estimator.val_metrics]
    pairs = [pair for metric in metrics if isinstance(metric, mxnet.metric.EvalMetric) for pair in metric.get_name_value()]
    return {name: float(value) for name, value in pairs}
