#!/usr/bin/env python
"""Train a net on handwritten digits with parameter groups: no decay on biases and normalizations, rates by layer and by fan-in.

    python examples/parameter_groups.py --picture groups.png

prints the groups before training, and held-out losses for several rates and decays, averaged over several runs. Exit codes: 0 done,
1 it cannot run, 2 unusable arguments.
"""
import argparse
import math
import sys

import digits
import mxnet as mx
import numpy
from mxnet import autograd, gluon
from mxnet.gluon import nn
from tqdm import tqdm

import gluon_optim as go

BATCH_SIZE = 64
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
DECAYS = (0.001, 0.003, 0.01, 0.03)
RATE, DECAY = 0.05, 0.0  # while the other one varies

RATE_RULES = {
    'one rate for all': lambda net: [],
    "('matrix', fan_in)": lambda net: [('matrix', go.groups.fan_in(net))],
    "('*', layer_decay 0.6)": lambda net: [('*', go.groups.layer_decay(net, 0.6))],
}
DECAY_RULES = {
    'decay on all': lambda net: [],
    'NO_DECAY': lambda net: go.groups.NO_DECAY,
}


def build_net():
    """8 x 8 pixels to 10 classes, 14 000 parameters."""
    net = nn.HybridSequential()
    net.add(nn.Conv2D(16, 3, padding=1, in_channels=1, activation='relu'), nn.MaxPool2D(),
            nn.Conv2D(32, 3, padding=1, in_channels=16), nn.BatchNorm(in_channels=32), nn.Activation('relu'), nn.MaxPool2D(),
            nn.Flatten(), nn.Dense(64, in_units=128, activation='relu'), nn.Dense(10, in_units=64))
    return net


def train(rules, rate, decay, steps, seed, data, held_out):
    """The loss on held-out digits after training with the groups of ``rules``."""
    images, labels = data
    mx.random.seed(seed)
    net = build_net()
    net.initialize(mx.init.Xavier())
    net.hybridize()
    go.param_groups(net, rules(net))
    schedule = go.lr_scheduler.Cosine(steps, base_lr=rate)
    trainer = gluon.Trainer(net.collect_params(), 'sgd_torch', {'momentum': 0.9, 'wd': decay, 'lr_scheduler': schedule})
    loss_function = gluon.loss.SoftmaxCrossEntropyLoss()
    for step in range(steps):
        batch = digits.batch_indices(seed, step, len(images), BATCH_SIZE)
        with autograd.record():
            losses = loss_function(net(mx.nd.array(images[batch])), mx.nd.array(labels[batch]))
        losses.backward()
        trainer.step(BATCH_SIZE)
    return float(loss_function(net(mx.nd.array(held_out[0])), mx.nd.array(held_out[1])).mean().asscalar())


def compare(options):
    """Mean losses: rules -> {rate: loss}, and rules -> {decay: loss}."""
    data, held_out = digits.load()
    jobs = [(RATE_RULES, RATES, lambda value: (value, DECAY)), (DECAY_RULES, DECAYS, lambda value: (RATE, value))]
    found = []
    with tqdm(total=sum(len(rules) * len(values) for rules, values, _ in jobs), disable=None) as progress:
        for rules, values, setting in jobs:
            found.append({name: {} for name in rules})
            for name, make in rules.items():
                for value in values:
                    losses = [train(make, *setting(value), options.steps, seed, data, held_out) for seed in range(options.seeds)]
                    found[-1][name][value] = numpy.mean(losses)
                    progress.update()
    return found


def table(found):
    """Lines to print."""
    for words, losses in zip(('learning rate', 'weight decay'), found):
        values = list(next(iter(losses.values())))
        yield ''
        yield f'{"loss on held-out digits for " + words:40}' + ''.join(f'{value:>9g}' for value in values)
        for name, by_value in losses.items():
            yield f'{name:40}' + ''.join(f'{by_value[value]:9.3f}' for value in values)


def plot(found, path):
    """Losses by rate and by decay."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout='constrained')
    for axis, words, losses in zip(axes, ('learning rate', 'weight decay'), found):
        for name, by_value in losses.items():
            drawn = [loss if math.isfinite(loss) else numpy.nan for loss in by_value.values()]
            axis.semilogx(list(by_value), drawn, marker='o', label=name)
        axis.set_xticks(list(by_value), [f'{value:g}' for value in by_value])
        axis.minorticks_off()
        axis.set_xlabel(words)
        axis.set_ylabel('loss on held-out digits')
        axis.legend(frameon=False, fontsize=9)
        axis.spines[['top', 'right']].set_visible(False)
    axes[0].set_yscale('log')
    axes[0].set_yticks((0.1, 1), ('0.1', '1'))
    axes[0].set_title('rates, without decay', loc='left', fontsize=10)
    axes[1].set_title(f'decays, at a rate of {RATE}', loc='left', fontsize=10)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=2, help='how many runs to average over (default: %(default)s)')
    parser.add_argument('--steps', type=int, default=150, help='default: %(default)s')
    parser.add_argument('--picture', metavar='FILE', help='draw the losses (needs matplotlib)')
    options = parser.parse_args(arguments)
    for name in ('seeds', 'steps'):
        if getattr(options, name) < 1:
            parser.error(f'--{name} must be at least 1')
    return options


def main(arguments=None):
    options = parse(arguments)
    net = build_net()
    print(go.param_groups(net, [('matrix', go.groups.fan_in(net)), *go.groups.NO_DECAY]), flush=True)
    try:
        found = compare(options)
    except (ValueError, TypeError, OSError) as error:
        print(f'parameter_groups: {error}', file=sys.stderr)
        return 1
    print('\n'.join(table(found)))
    if options.picture:
        plot(found, options.picture)
    return 0


if __name__ == '__main__':
    sys.exit(main())
