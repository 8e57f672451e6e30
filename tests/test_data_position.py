"""A run that is resumed in the middle of an epoch sees the samples that it would have seen."""
import numpy as np
import pytest

mx = pytest.importorskip('mxnet')

from mxnet import autograd, gluon  # noqa: E402

import gluon_optim as go  # noqa: E402

SIZE, BATCH, EPOCHS = 22, 4, 3
DATA = gluon.data.ArrayDataset(mx.nd.array(np.random.RandomState(0).randn(SIZE, 3)), mx.nd.arange(SIZE))


def run(folder, until):
    """As docs/CHECKPOINTS.md has it; stopped after ``until`` steps. Which samples were seen, and the weights."""
    net = gluon.nn.Dense(1)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'novograd')
    sampler = go.EpochSampler(len(DATA), seed=7)
    loader = gluon.data.DataLoader(DATA, batch_size=BATCH, sampler=sampler, num_workers=1, thread_pool=True)
    seen = []
    with go.CheckpointManager(folder) as manager:
        restored = manager.restore_latest(net=net, trainer=trainer)
        step, epoch, batch = (restored.step, restored.epoch, restored.batch) if restored else (0, 0, 0)
        while epoch < EPOCHS:
            sampler.at(epoch, skip=batch * BATCH)
            for data, label in loader:
                with autograd.record():
                    loss = (net(data)[:, 0] - label / SIZE) ** 2
                loss.backward()
                trainer.step(len(data))
                seen += label.asnumpy().astype(int).tolist()
                step, batch = step + 1, batch + 1
                manager.save(step, net=net, trainer=trainer, epoch=epoch, batch=batch)
                if step == until:
                    return seen, net.weight.data().asnumpy().tolist()
            epoch, batch = epoch + 1, 0
    return seen, net.weight.data().asnumpy().tolist()


@pytest.mark.parametrize('stop', [1, 5, 6, 7, 17])
def test_resumed_in_the_middle_of_an_epoch(tmp_path, stop):
    mx.random.seed(0)
    whole = run(tmp_path / 'whole', None)
    assert all(sorted(whole[0][k * SIZE:(k + 1) * SIZE]) == list(range(SIZE)) for k in range(EPOCHS))
    assert whole[0][:SIZE] != whole[0][SIZE:2 * SIZE]
    mx.random.seed(0)
    first, _ = run(tmp_path / 'parts', stop)
    mx.random.seed(9)
    np.random.seed(9)  # noqa: NPY002
    rest, weights = run(tmp_path / 'parts', None)
    assert first + rest == whole[0] and weights == whole[1]


@pytest.mark.parametrize('arguments', [{'length': -1}, {'length': 3, 'seed': 1.5}])
def test_what_a_sampler_takes(arguments):
    with pytest.raises(ValueError, match='must be'):
        go.EpochSampler(**arguments)
