"""Gluon's Estimator, killed after some epochs and resumed, is the run that went on."""
import numpy as np
import pytest

mx = pytest.importorskip('mxnet')

from mxnet import gluon  # noqa: E402
from mxnet.gluon.contrib.estimator import Estimator  # noqa: E402

import gluon_optim as go  # noqa: E402

DATA = gluon.data.ArrayDataset(mx.nd.array(np.random.RandomState(0).randn(12, 3)), mx.nd.array(np.arange(12) % 2))


def run(folder, **until):
    mx.random.seed(1)
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Dense(4, activation='tanh'), gluon.nn.Dropout(0.5), gluon.nn.BatchNorm(), gluon.nn.Dense(2))
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'adam', {'learning_rate': 0.01})  # MXNet's own
    estimator = Estimator(net, gluon.loss.SoftmaxCrossEntropyLoss(), mx.metric.Accuracy(), trainer=trainer)
    estimator.logger.disabled = True
    manager = go.CheckpointManager(folder, keep_best=('training accuracy', 'max'), keep_last=2)
    estimator.fit(gluon.data.DataLoader(DATA, batch_size=4), val_data=gluon.data.DataLoader(DATA, batch_size=4),
                  event_handlers=[go.EstimatorCheckpoints(manager)], **until)
    weights = {name: parameter.data().asnumpy().tolist() for name, parameter in net._collect_params_with_prefix().items()}
    return weights, go.states_digest(trainer, net), trainer._optimizer.num_update, manager


def test_resumed_after_some_epochs(tmp_path):
    whole = run(tmp_path / 'whole', epochs=5)
    assert whole[2] == 15
    run(tmp_path / 'parts', epochs=2)
    assert go.CheckpointManager(tmp_path / 'parts').steps() == [1, 2]
    parts = run(tmp_path / 'parts', epochs=5)
    assert parts[:3] == whole[:3]
    assert parts[3].steps()[-2:] == [4, 5]
    _, saved = go.read_checkpoint(parts[3].path(5))
    assert saved.epoch == 5 and saved.batch == 15 and {'training accuracy', 'validation accuracy'} <= set(saved.metrics)


def test_resumed_by_batches(tmp_path):
    run(tmp_path, batches=3)
    assert run(tmp_path, batches=8)[2] == 8


@pytest.mark.parametrize('until', [{'epochs': 2}, {'epochs': 1}, {'batches': 6}])
def test_a_run_that_is_complete(tmp_path, until):
    run(tmp_path, epochs=2)
    with pytest.raises(ValueError, match='2 epochs and 6 batches'):
        run(tmp_path, **until)


def test_it_takes_a_manager():
    with pytest.raises(TypeError, match='CheckpointManager. Received: str'):
        go.EstimatorCheckpoints('run')
