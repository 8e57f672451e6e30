#!/usr/bin/env python
"""Train one net on handwritten digits with a cyclic learning rate, and let the networks at the ends of its cycles predict together.

    python examples/snapshot_ensemble.py --picture snapshots.png
    python examples/snapshot_ensemble.py --directory run             # kill it whenever you like, and start it again

prints how good the mean of the newest one, two, ... networks is on held-out digits, averaged over several runs. Exit codes: 0 all
are better than the last alone, 1 they are not or the run cannot go on, 2 unusable arguments.
"""
import argparse
import os
import sys
import tempfile

import digits
import mxnet as mx
import numpy
from mxnet import autograd, gluon
from tqdm import tqdm

import gluon_optim as go

BATCH_SIZE = 64
BASE_LR = 0.3


def build_net():
    """8 x 8 pixels to 10 classes, 9 000 parameters."""
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Flatten(), gluon.nn.Dense(64, in_units=64, activation='relu'),
            gluon.nn.Dense(64, in_units=64, activation='relu'), gluon.nn.Dense(10, in_units=64))
    net.hybridize()
    return net


def train(seed, cycle, steps, data, directory, progress):
    """Train, or continue the run in ``directory``; its snapshots."""
    images, labels = data
    mx.random.seed(seed)
    net = build_net()
    net.initialize(mx.init.Xavier())
    schedule = go.lr_scheduler.CosineRestarts(step=cycle, base_lr=BASE_LR)
    trainer = gluon.Trainer(net.collect_params(), 'sgd_torch', {'momentum': 0.9, 'lr_scheduler': schedule})
    manager = go.CheckpointManager(directory, keep_last=1, save_every=50)
    snapshots = go.ensemble.Snapshots(manager, net, trainer, cycle=schedule)
    restored = manager.restore_latest(net=net, trainer=trainer)
    loss_function = gluon.loss.SoftmaxCrossEntropyLoss()
    for step in range(restored.step if restored else 0, steps):
        batch = digits.batch_indices(seed, step, len(images), BATCH_SIZE)
        with autograd.record():
            losses = loss_function(net(mx.nd.array(images[batch])), mx.nd.array(labels[batch]))
        losses.backward()
        trainer.step(BATCH_SIZE)
        snapshots.save(step + 1)
        progress.update()
    return snapshots


def judge(probabilities, labels):
    """(mean loss, accuracy)."""
    of_label = probabilities.asnumpy()[numpy.arange(len(labels)), labels]
    return -numpy.log(numpy.maximum(of_label, 1e-30)).mean(), (probabilities.asnumpy().argmax(axis=1) == labels).mean()


def run(options):
    """(loss, accuracy) of the mean of the newest 1, 2, ... networks, of each alone, and of one run without cycles, by seed."""
    data, (images, labels) = digits.load()
    steps = options.cycles * options.cycle
    together, alone, straight = [], [], []
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=2 * options.seeds * steps, disable=None) as progress:
        for seed in range(options.seeds):
            def of(name, cycle, seed=seed):
                return train(seed, cycle, steps, data, os.path.join(options.directory or scratch, f'{name}-{seed}'), progress)

            snapshots = of('cycles', options.cycle)
            together.append([judge(snapshots.predict(images, last=m), labels) for m in range(1, options.cycles + 1)])
            scores = snapshots.map(lambda net=snapshots.net: net(mx.nd.array(images)))
            alone.append([judge(each.softmax(), labels) for each in scores])
            straight.append(judge(of('straight', steps).net(mx.nd.array(images)).softmax(), labels))
    return tuple(map(numpy.array, (together, alone, straight)))


def table(together, straight):
    """Lines to print."""
    yield f'mean over {len(together)} runs       loss  accuracy  runs with a lower loss than the last network'
    last = together[:, 0, 0]
    for m, (loss, accuracy) in enumerate(together.mean(axis=0), 1):
        words = 'the last network' if m == 1 else f'the last {m} together'
        better = '' if m == 1 else f'{(together[:, m - 1, 0] < last).sum()} of {len(last)}'
        yield f'{words:20}  {loss:8.4f}  {accuracy:8.2%}  {better}'.rstrip()
    loss, accuracy = straight.mean(axis=0)
    yield f'{"one cycle as long":20}  {loss:8.4f}  {accuracy:8.2%}  {(straight[:, 0] < last).sum()} of {len(last)}'


def plot(together, alone, straight, path):
    """Loss and accuracy on held-out digits by the number of networks."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout='constrained')
    counts = numpy.arange(1, together.shape[1] + 1)
    for k, (axis, words, scale) in enumerate(zip(axes, ('loss', 'accuracy in %'), (1, 100))):
        mean, spread = scale * together[..., k].mean(axis=0), scale * together[..., k].std(axis=0) / len(together) ** 0.5
        axis.errorbar(counts, mean, spread, marker='o', capsize=3, label='the last m together')
        axis.plot(counts, scale * alone[:, ::-1, k].mean(axis=0), 'o:', color='0.6', label='the m-th last alone')
        axis.axhline(scale * straight[:, k].mean(), color='C1', linestyle='--', label='one cycle over all steps')
        axis.set_xlabel('number m of networks')
        axis.set_ylabel(f'{words} on held-out digits')
        axis.set_xticks(counts)
        axis.spines[['top', 'right']].set_visible(False)
    axes[1].legend(loc='lower left', frameon=False, fontsize=9)
    figure.suptitle(f'Snapshots of one run, mean and standard error over {len(together)} runs', fontsize=11)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=5, help='how many runs to average over (default: %(default)s)')
    parser.add_argument('--cycles', type=int, default=5, help='networks of a run (default: %(default)s)')
    parser.add_argument('--cycle', type=int, default=110, metavar='STEPS', help='steps of a cycle (default: %(default)s, 5 epochs)')
    parser.add_argument('--directory', help='keep the checkpoints here, and continue from those that are there')
    parser.add_argument('--picture', metavar='FILE', help='draw the result (needs matplotlib)')
    options = parser.parse_args(arguments)
    for name in ('seeds', 'cycles', 'cycle'):
        if getattr(options, name) < 1:
            parser.error(f'--{name} must be at least 1')
    return options


def main(arguments=None):
    options = parse(arguments)
    try:
        together, alone, straight = run(options)
    except (ValueError, TypeError, OSError) as error:
        print(f'snapshot_ensemble: {error}', file=sys.stderr)
        return 1
    print('\n'.join(table(together, straight)))
    if options.picture:
        plot(together, alone, straight, options.picture)
    loss = together[..., 0].mean(axis=0)
    return 0 if loss[-1] < loss[0] else 1


if __name__ == '__main__':
    sys.exit(main())
