#!/usr/bin/env python
"""Batch size and learning rate: measure B* on handwritten digits, and see how far eta_B = B eta_1 carries.

    python examples/batch_size.py --picture batch_size.png
    python examples/batch_size.py --hidden 32

At the initial weights of a softmax regression, or of a net with a hidden layer, go.monitor.NoiseScale measures sigma^2 and g^2, and
the largest eigenvalue of the Hessian is taken for L. They give B* = 16 sigma^2/g^2 and eta_1 = 1/(2 L B*) (McAllester's lecture on
SGD). Then the net is trained anew for each batch size B = 1, 2, 4, ... with the learning rate B eta_1, on the same examples in the
same order, without any tuning.

Exit codes: 0 done, 1 cannot run, 2 unusable arguments.
"""
import argparse
import sys
from typing import Any, NamedTuple

import digits
import mxnet as mx
import numpy
from mxnet import autograd, gluon
from tqdm import tqdm

import gluon_optim as go

EXAMPLES = 2 ** 15      # in each training, drawn with replacement: about 23 epochs
LARGEST = 2 ** 13       # batch size
MEASURED = 2 ** 15      # examples in a measurement of the noise
PARTS = 4               # of a batch, in a measurement
POINTS = 16             # of a curve
CLASSES, PIXELS = 10, 64


class Data(NamedTuple):
    images: Any
    labels: Any


class Run(NamedTuple):
    """What became of one training: examples seen and loss on the whole training set, and the net."""
    batch_size: int
    learning_rate: float
    curve: numpy.ndarray
    net: Any

    @property
    def loss(self):
        return self.curve[-1, 1]


def load():
    (images, labels), _ = digits.load()
    return Data(mx.nd.array(images.reshape(-1, PIXELS)), mx.nd.array(labels))


def build_net(options):
    mx.random.seed(options.seed)
    net = gluon.nn.HybridSequential()
    if options.hidden:
        net.add(gluon.nn.Dense(options.hidden, activation='tanh', in_units=PIXELS))
    net.add(gluon.nn.Dense(CLASSES, in_units=options.hidden or PIXELS))
    net.initialize(mx.init.Xavier() if options.hidden else mx.init.Zero())
    net.hybridize(static_alloc=True, static_shape=True)
    return net


def losses(net, data, which):
    """The loss of each of the examples ``which``."""
    return LOSS(net(data.images.take(which)), data.labels.take(which))


LOSS = gluon.loss.SoftmaxCrossEntropyLoss()
LOSS.hybridize(static_alloc=True)


def drawn(seed, count):
    """Indices of training digits, with replacement, so that examples are independent and a batch can be of any size."""
    return mx.nd.array(numpy.random.default_rng(seed).integers(0, 1437, count))


def curvature(net, data):
    """The largest eigenvalue of the Hessian."""
    largest, = go.curvature.eigenvalues(lambda: LOSS(net(data.images), data.labels).mean(), net.collect_params())
    return float(largest)


def measure(net, data, seed, bound):
    """The noise of the gradient at the net's weights, which stay as they are."""
    noise = go.monitor.NoiseScale(gluon.Trainer(net.collect_params(), 'sgd'), net, averaging=0.0, curvature=bound)
    parts = drawn([seed, 1], MEASURED).reshape((-1, PARTS, 128))
    for batch in parts:
        for k, part in enumerate(batch):
            with autograd.record():
                loss = losses(net, data, part)
            loss.backward()
            noise.observe(part.size, last=k == PARTS - 1)
    return noise


def train(net, data, order, batch_size, learning_rate, progress):
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': learning_rate})
    everything = mx.nd.arange(len(data.images))
    curve = [(0, losses(net, data, everything).mean().asscalar())]
    for seen in range(0, len(order), batch_size):
        with autograd.record():
            loss = losses(net, data, order[seen:seen + batch_size])
        loss.backward()
        trainer.step(batch_size)
        progress.update()
        done = seen + batch_size
        if done % max(len(order) // POINTS, batch_size) == 0:
            curve.append((done, losses(net, data, everything).mean().asscalar()))
    return Run(batch_size, learning_rate, numpy.array(curve), net)


def compare(options):
    """The noise at the start and at the end of training with single examples, and a run for each batch size."""
    data = load()
    net = build_net(options)
    bound = curvature(net, data)
    begin = measure(net, data, options.seed, bound)
    order = drawn([options.seed, 0], options.examples)
    sizes = [2 ** k for k in range(LARGEST.bit_length()) if 2 ** k <= min(LARGEST, options.examples // 2)]
    with tqdm(total=sum(options.examples // size for size in sizes), disable=None) as progress:
        runs = []
        for size in sizes:
            progress.set_description(f'batches of {size}')
            runs.append(train(build_net(options), data, order, size, size * begin.eta_1, progress))
    return begin, measure(runs[0].net, data, options.seed, bound), runs


def table(runs, b_star):
    """A line for each batch size."""
    yield f'{"B":>6} {"eta_B":>10} {"updates":>8} {"loss":>8} {"against B = 1":>14}'
    for run in runs:
        seen = int(run.curve[-1, 0])
        apart = run.loss / runs[0].loss - 1
        note = '  above 4 B*: eta_B > 2/L' if run.batch_size > 4 * b_star else '  above B*' if run.batch_size > b_star else ''
        yield f'{run.batch_size:6} {run.learning_rate:10.3g} {seen // run.batch_size:8} {run.loss:8.4f} {apart:14.2%}{note}'


def draw(runs, b_star, path):
    """Losses over examples, and how far the last one is from that of single examples, over batch sizes."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 4), layout='constrained')
    shown = [run for run in runs if run.batch_size in (1, 64, 1024, 2048, 4096, 8192)]
    for run, color in zip(shown, ('black', '#56b4e9', '#0072b2', '#009e73', '#e69f00', '#d55e00')):
        left.plot(run.curve[:, 0], run.curve[:, 1], color=color, marker='.', label=f'B = {run.batch_size}',
                  linewidth=4 if run is runs[0] else 1.5, alpha=0.35 if run is runs[0] else 1)
    left.set(xlabel='examples seen', ylabel='training loss', title='batches of B at $\\eta_B = B\\,\\eta_1$')
    left.legend(frameon=False)
    apart = [100 * abs(run.loss / runs[0].loss - 1) for run in runs]
    right.plot([run.batch_size for run in runs[1:]], apart[1:], color='#0072b2', marker='o', markersize=4)
    right.axhline(1, color='#999999', linewidth=1, label='1 %')
    right.axvline(b_star, color='#009e73', linestyle='--', label=f'measured $B^* = {b_star:.0f}$')
    right.axvline(4 * b_star, color='#d55e00', linestyle=':', label='$4\\,B^*$: $\\eta_B = 2/L$')
    right.set(xscale='log', yscale='log', xlabel='batch size B', ylabel='difference from the loss of B = 1, %',
              title=f'after {int(runs[0].curve[-1, 0])} examples')
    right.legend(frameon=False, loc='upper left')
    for axes in (left, right):
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--hidden', type=int, default=0, metavar='UNITS', help='of a hidden layer (default: none)')
    parser.add_argument('--examples', type=int, default=EXAMPLES, help='seen by each training, a power of 2 (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--picture', metavar='FILE', help='draw the losses (needs matplotlib)')
    options = parser.parse_args(arguments)
    if options.hidden < 0:
        parser.error('--hidden must be at least 0')
    if options.examples < POINTS or options.examples & (options.examples - 1):
        parser.error(f'--examples must be a power of 2, at least {POINTS}')
    return options


def main(arguments=None):
    options = parse(arguments)
    try:
        if options.picture:
            import matplotlib  # noqa: F401  where it is missing, before the work
        begin, end, runs = compare(options)
        print(begin.table())
        print(f'L = {begin.curvature:.4g}; after {options.examples} single examples B* is {end.b_star:.0f}\n')
        print('\n'.join(table(runs, begin.b_star)))
        if options.picture:
            draw(runs, begin.b_star, options.picture)
    except (ValueError, OSError, ImportError) as error:
        print(f'batch_size: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
