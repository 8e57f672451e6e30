#!/usr/bin/env python
"""Second derivatives on handwritten digits: what limits the learning rate, and what Newton's method does where there is no noise.

    python examples/curvature.py --picture curvature.png

First a net with two hidden layers is trained by gradient descent on whole batches, at two learning rates. The largest eigenvalue
of the Hessian rises until it reaches 2/lr, beyond which gradient descent leaves a quadratic's minimum, and stays there: the edge of
stability (Cohen et al., arXiv:2103.00065). Then a softmax regression is fitted by SGD and by go.minimize, and all are compared
by how often they read the data.

Exit codes: 0 done, 1 cannot run, 2 unusable arguments.
"""
import argparse
import sys
from typing import List, NamedTuple

import digits
import mxnet as mx
import numpy
from mxnet import autograd, gluon
from tqdm import tqdm

import gluon_optim as go

STEPS, EVERY = 1600, 80         # of gradient descent; of these the eigenvalue is computed
RATES = 0.2, 0.3
EXAMPLES, HIDDEN = 500, 48
WD = 1e-3
EPOCHS, BATCH_SIZE, SGD_RATE = 180, 64, 0.3  # the best rate of 0.1, 0.3, 1, 3
CLASSES, PIXELS = 10, 64


class Descent(NamedTuple):
    """One run of gradient descent: largest eigenvalue and loss at some of the steps."""
    learning_rate: float
    steps: List[int]
    eigenvalues: List[float]
    losses: List[float]

    @property
    def edge(self):
        return 2 / self.learning_rate


class Fit(NamedTuple):
    """One fit of the softmax regression: its loss after so many passes over the data."""
    method: str
    passes: List[float]
    losses: List[float]


# The edge of stability ------------------------------------------------------------------------------------------------

def descend(learning_rate, steps, progress):
    """Gradient descent on half the squared distance to the labels, each a vector of 0 and 1."""
    (images, labels), _ = digits.load()
    images = images[:EXAMPLES].reshape(-1, PIXELS)
    data, target = mx.nd.array(images - images.mean(0)), mx.nd.one_hot(mx.nd.array(labels[:EXAMPLES]), CLASSES)
    mx.random.seed(0)
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Dense(HIDDEN, activation='tanh', in_units=PIXELS),
            gluon.nn.Dense(HIDDEN, activation='tanh', in_units=HIDDEN), gluon.nn.Dense(CLASSES, in_units=HIDDEN))
    net.initialize(mx.init.Xavier())
    net.hybridize(static_alloc=True, static_shape=True)
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': learning_rate, 'momentum': 0, 'wd': 0})

    def loss():
        return ((net(data) - target) ** 2).sum() / (2 * EXAMPLES)

    run = Descent(learning_rate, [], [], [])
    for step in range(steps + 1):
        if step % EVERY == 0:
            run.steps.append(step)
            run.eigenvalues.append(go.curvature.eigenvalues(loss, net.collect_params(), tol=1e-2, progress=False)[0])
            run.losses.append(float(loss().asscalar()))
        with autograd.record():
            value = loss()
        value.backward()
        trainer.step(1)
        progress.update()
    return run


# Fitting a softmax regression -----------------------------------------------------------------------------------------

class Regression:
    """A softmax regression in float64, all zero at first, and how many examples its loss has seen."""

    def __init__(self):
        (images, self.labels), _ = digits.load()
        self.images = images.reshape(-1, PIXELS).astype('float64')
        self.net = gluon.nn.Dense(CLASSES, in_units=PIXELS)
        self.net.initialize(mx.init.Zero())
        self.net.cast('float64')
        self.seen = 0
        self.cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()

    def loss(self, outputs, labels):
        self.seen += len(labels)
        return self.cross_entropy(outputs, labels)

    @property
    def passes(self):
        return self.seen / len(self.labels)

    def value(self):
        """The loss of all examples, with decay."""
        losses = self.cross_entropy(self.net(mx.nd.array(self.images, dtype='float64')), mx.nd.array(self.labels))
        decay = sum((parameter.data() ** 2).sum().asscalar() for parameter in self.net.collect_params().values())
        return losses.mean().asscalar() + WD * decay / 2


def minimize(method):
    regression, fit = Regression(), Fit(method, [], [])

    def note(iteration, value):
        fit.passes.append(regression.passes)
        fit.losses.append(value)

    go.minimize(regression.net, regression.loss, (regression.images, regression.labels), method, wd=WD, tol=1e-12,
                callback=note)
    return fit


def stochastic(epochs):
    """SGD with momentum, at a rate that falls to 0."""
    regression, fit = Regression(), Fit('SGD', [], [])
    per_epoch = len(regression.labels) // BATCH_SIZE
    schedule = mx.lr_scheduler.CosineScheduler(epochs * per_epoch + 1, base_lr=SGD_RATE)
    trainer = gluon.Trainer(regression.net.collect_params(), 'sgd', {'momentum': 0.9, 'wd': WD, 'lr_scheduler': schedule})
    for step in range(epochs * per_epoch):
        batch = digits.batch_indices(0, step, len(regression.labels), BATCH_SIZE)
        data, labels = mx.nd.array(regression.images[batch], dtype='float64'), mx.nd.array(regression.labels[batch])
        with autograd.record():
            losses = regression.loss(regression.net(data), labels)
        losses.backward()
        trainer.step(BATCH_SIZE)
        if (step + 1) % per_epoch == 0:
            fit.passes.append(regression.passes)
            fit.losses.append(regression.value())
    return fit


# ----------------------------------------------------------------------------------------------------------------------

def table(runs, fits):
    """Lines to print."""
    yield f'{"learning rate":>13}  {"2/lr":>6}  {"largest eigenvalue: at first":>28}  {"in the last quarter":>19}  {"loss":>7}'
    for run in runs:
        last = run.eigenvalues[-max(1, len(run.steps) // 4):]
        yield (f'{run.learning_rate:13}  {run.edge:6.2f}  {run.eigenvalues[0]:28.2f}  {numpy.mean(last):19.2f}  '
               f'{run.losses[-1]:7.4f}')
    lowest = min(min(fit.losses) for fit in fits)
    yield f'\n{"method":>13}  {"passes":>6}  {"loss above the minimum":>28}'
    for fit in fits:
        yield f'{fit.method:>13}  {fit.passes[-1]:6.0f}  {max(fit.losses[-1] - lowest, 0):28.1e}'


def draw(runs, fits, path):
    """The eigenvalues over steps, with 2/lr, and the losses over passes, above the minimum."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 4), layout='constrained')
    for run, color in zip(runs, ('#0072b2', '#d55e00')):
        left.plot(run.steps, run.eigenvalues, color=color, marker='.', label=f'lr = {run.learning_rate}')
        left.axhline(run.edge, color=color, linestyle='--', linewidth=1)
        left.annotate(f'2/lr\n= {run.edge:.1f}', (1.01, run.edge), xycoords=('axes fraction', 'data'), color=color,
                      verticalalignment='center', annotation_clip=False)
    left.set(xlabel='step of gradient descent', ylabel='largest eigenvalue of the Hessian', title='the edge of stability',
             ylim=(0, 1.15 * max(run.edge for run in runs)))
    left.legend(frameon=False, loc='lower right')
    lowest = min(min(fit.losses) for fit in fits)
    for fit, color in zip(fits, ('#cc79a7', '#009e73', '#0072b2', '#d55e00', '#e69f00', 'black')):
        above = numpy.maximum(numpy.array(fit.losses) - lowest, 1e-15)
        right.plot(fit.passes, above, color=color, label=fit.method, linewidth=2.5 if fit.method == 'SGD' else 1.5)
    right.set(yscale='log', xlabel='passes over the data', ylabel='loss above the minimum', ylim=(3e-15, 10),
              title='a softmax regression, with decay', xlim=(0, 1.05 * max(fit.passes[-1] for fit in fits)))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=STEPS, help='of gradient descent (default: %(default)s)')
    parser.add_argument('--picture', metavar='FILE', help='draw both parts (needs matplotlib)')
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error('--steps must be at least 1')
    return options


def main(arguments=None):
    options = parse(arguments)
    try:
        if options.picture:
            import matplotlib  # noqa: F401  where it is missing, before the work
        with tqdm(total=len(RATES) * (options.steps + 1), desc='gradient descent', disable=None, leave=False) as progress:
            runs = [descend(rate, options.steps, progress) for rate in RATES]
        fits = [stochastic(EPOCHS), *map(minimize, ('newton-cg', 'trust-ncg', 'l-bfgs-b', 'bfgs', 'cg'))]
        print('\n'.join(table(runs, fits)))
        if options.picture:
            draw(runs, fits, options.picture)
    except (ValueError, OSError, ImportError) as error:
        print(f'curvature: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
