#!/usr/bin/env python
"""Sample the posterior of a small net on handwritten digits, and ask it how sure it is of digits that it has not seen.

    python examples/sample_posterior.py
    python examples/sample_posterior.py --sampler sgld --picture sampling.png
    python examples/sample_posterior.py --directory run          # kill it whenever you like, then start it again

Exit codes: 0 sampled, 1 refused with a reason, 2 unusable arguments.
"""
import argparse
import contextlib
import os
import sys
import tempfile
from typing import NamedTuple

import digits
import mxnet as mx
import numpy
from mxnet import autograd, gluon
from scipy import ndimage
from tqdm import tqdm

import gluon_optim as go

BATCH_SIZE, HIDDEN, SEED = 100, 50, 0
PRIOR = 5.0                                     # the precision of each weight's Gaussian prior
RATES = {'sgld': 2e-4, 'psgld': 5e-3}           # constant: the chain shall stay where it has arrived
ANGLES = range(0, 181, 15)


class Predictions(NamedTuple):
    """Of one network or of the mean of several, on one set of images."""

    accuracy: float
    loss: float         # mean of -log p(label)
    entropy: float      # mean of -sum p log p, in nats: log 10 = 2.3 is knowing nothing

    @classmethod
    def of(cls, probabilities, labels):
        p = numpy.maximum(probabilities, 1e-12)
        return cls(float(numpy.mean(p.argmax(1) == labels)), float(-numpy.log(p[numpy.arange(len(labels)), labels]).mean()),
                   float(-(p * numpy.log(p)).sum(1).mean()))


def build_net():
    """8 x 8 pixels to 10 classes, 6 360 weights; no batch norm and no dropout, so that the loss is a function of the weights."""
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Flatten(), gluon.nn.Dense(HIDDEN, activation='tanh', in_units=64),
            gluon.nn.Dense(HIDDEN, activation='tanh', in_units=HIDDEN), gluon.nn.Dense(10, in_units=HIDDEN))
    net.hybridize()
    net.initialize(mx.init.Xavier())
    return net


def backward(net, images, labels, step):
    """The gradient of the sum of the losses of a batch, whose examples follow from the step."""
    batch = digits.batch_indices(SEED, step, len(images), BATCH_SIZE)
    with autograd.record():
        loss = gluon.loss.SoftmaxCrossEntropyLoss()(net(mx.nd.array(images[batch])), mx.nd.array(labels[batch]))
    loss.backward()


def optimize(images, labels, steps):
    """One network for comparison: the most probable weights, near enough, found by adam under the same prior."""
    mx.random.seed(SEED)
    net = build_net()
    trainer = gluon.Trainer(net.collect_params(), 'adam', {'learning_rate': 0.003, 'wd': PRIOR / len(images)})
    for step in range(steps):
        backward(net, images, labels, step)
        trainer.step(BATCH_SIZE)
    return net


def sample(images, labels, options, directory):
    """Run the chain to its end, from its newest checkpoint if there is one; returns net and chain."""
    mx.random.seed(SEED)
    net = build_net()
    sampler = go.create(options.sampler, learning_rate=RATES[options.sampler], wd=PRIOR)
    trainer = gluon.Trainer(net.collect_params(), sampler)
    chain = go.sampling.Chain(trainer, os.path.join(directory, 'chain'), options.burn_in, options.thin, options.temperature, net)
    manager = go.CheckpointManager(os.path.join(directory, 'checkpoints'), save_every=500)
    if manager.restore_latest(net=net, trainer=trainer):
        print(f'resumed at step {chain.position}')
    end = options.burn_in + options.thin * options.samples
    for step in tqdm(range(chain.position, end), 'sampling', initial=chain.position, total=end, disable=None):
        backward(net, images, labels, step)
        chain.step(BATCH_SIZE, len(images))
        manager.save(chain.position, net=net, trainer=trainer)
    return net, chain


def each_prediction(net, samples, images):
    """The probabilities that each sample gives, (samples, images, classes): what `Samples.predict` averages."""
    outputs = []

    def softmax(logits):
        outputs.append(mx.nd.softmax(logits).asnumpy())
        return logits

    samples.predict(net, mx.nd.array(images), softmax)
    return numpy.array(outputs)


def rotated(images, angle):
    return ndimage.rotate(images, angle, axes=(2, 3), reshape=False, order=1)


def compare(net, chain, one, images, labels):
    """(number of samples -> Predictions of their mean, angle -> those of the mean of all, of one sample, of ``one``)."""
    probabilities = each_prediction(net, chain, images)
    means = numpy.cumsum(probabilities, axis=0) / numpy.arange(1, len(probabilities) + 1)[:, None, None]
    by_number = {n: Predictions.of(mean, labels) for n, mean in enumerate(means, 1)}
    by_angle = {}
    for angle in ANGLES:
        turned = mx.nd.array(rotated(images, angle))
        mean, _ = chain.predict(net, turned, mx.nd.softmax)
        of_one = mx.nd.softmax(one(turned))
        by_angle[angle] = [Predictions.of(p.asnumpy(), labels) for p in (mean, of_one)]
    return by_number, by_angle, [Predictions.of(p, labels) for p in probabilities]


def table(by_number, by_angle, singles):
    """Lines to print."""
    alone = numpy.mean(singles, axis=0)
    number = max(by_number)
    yield f'{"held-out digits":32}  accuracy  -log p  entropy'
    for words, row in [('one network, found by adam', by_angle[0][1]), ('one sample, on average', Predictions(*alone)),
                       *((f'mean of {n} samples', by_number[n]) for n in (2, 5, 10, 20, number) if n <= number)]:
        yield f'{words:32}  {row.accuracy:8.1%}  {row.loss:6.3f}  {row.entropy:7.3f}'
    yield ''
    yield f'{"turned by":10}' + ''.join(f'{angle:>7}' for angle in by_angle)
    for k, words in enumerate((f'{number} samples', 'adam')):
        for what in ('accuracy', 'entropy'):
            yield f'{words}, {what}'.ljust(26) + ''.join(f'{getattr(rows[k], what):7.2f}' for rows in by_angle.values())


def draw(by_number, by_angle, singles, options):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout='constrained')
    left.plot(range(1, len(singles) + 1), [100 * row.accuracy for row in singles], '.', color='0.6', label='each sample alone')
    left.plot(list(by_number), [100 * row.accuracy for row in by_number.values()], color='C0', label='mean of the first n samples')
    left.axhline(100 * by_angle[0][1].accuracy, color='C3', linestyle='--', label='one network, found by adam')
    lowest, highest = left.get_ylim()
    left.set(xlabel='number of samples n', ylabel='accuracy on held-out digits, %',
             ylim=(lowest - 0.4 * (highest - lowest), highest + 0.4))  # the legend's place
    left.set_title(f'Samples of {options.sampler} at temperature {options.temperature:g}', loc='left', fontsize=11)
    for k, (words, style) in enumerate(((f'mean of {len(singles)} samples', 'C0-'), ('one network, found by adam', 'C3--'))):
        right.plot(list(by_angle), [row[k].entropy for row in by_angle.values()], style, label=words)
    right.set(xlabel='digits turned by, degrees', ylabel='entropy of the prediction, nats', ylim=(0, None),
              xticks=list(by_angle)[::2])
    right.set_title('Uncertainty about turned digits', loc='left', fontsize=11)
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=9, loc='lower right')
        axis.spines[['top', 'right']].set_visible(False)
    figure.savefig(options.picture, dpi=100)
    pyplot.close(figure)


def run(options):
    (images, labels), (held_out, held_labels) = digits.load()
    with contextlib.ExitStack() as stack:
        directory = options.directory or stack.enter_context(tempfile.TemporaryDirectory())
        net, chain = sample(images, labels, options, directory)
        one = optimize(images, labels, chain.burn_in)
        by_number, by_angle, singles = compare(net, chain, one, held_out, held_labels)
    print('\n'.join(table(by_number, by_angle, singles)))
    if options.picture:
        draw(by_number, by_angle, singles, options)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sampler', choices=sorted(RATES), default='psgld', help='default: %(default)s')
    parser.add_argument('--burn-in', type=int, default=1500, help='updates before the first sample (default: %(default)s)')
    parser.add_argument('--thin', type=int, default=50, help='updates from one sample to the next (default: %(default)s)')
    parser.add_argument('--samples', type=int, default=40, help='default: %(default)s')
    parser.add_argument('--temperature', type=float, default=1.0, help='default: %(default)s, the posterior')
    parser.add_argument('--directory', help='where samples and checkpoints are kept; nothing is kept without it')
    parser.add_argument('--picture', metavar='FILE', help='draw the results (needs matplotlib)')
    options = parser.parse_args(arguments)
    if options.samples < 1:
        parser.error('--samples must be at least 1')
    return options


def main(arguments=None):
    try:
        run(parse(arguments))
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f'sample_posterior: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
