#!/usr/bin/env python
"""Train the same small net on handwritten digits under several learning-rate schedules; print a table, draw rates and losses.

    python examples/compare_schedules.py --picture schedules.png
    python examples/compare_schedules.py --only cosine one-cycle --steps 600

Exit codes: 0 done, 1 it cannot run here, 2 unusable arguments.
"""
import argparse
import sys
from typing import NamedTuple

import digits
import mxnet as mx
import numpy
from compare_optimizers import SEED, build_net, evaluate, smooth
from mxnet import autograd, gluon
from tqdm import tqdm

import gluon_optim as go

BATCH_SIZE = 8  # noisy gradients: for the loss to fall, the rate must
STEPS = 600
LEARNING_RATE = 0.1
EPOCH = 1437 // BATCH_SIZE
WARM = 60  # updates of a warm-up
OBSERVED = 60  # updates between two looks at the loss, for the one that reacts to it
S = go.lr_scheduler

# name -> a function of (steps, highest rate)
SCHEDULES = {
    'constant': lambda steps, rate: S.Constant(rate),
    'inverse time': lambda steps, rate: S.InverseTime(rate, decay=1.0, steps_per_epoch=EPOCH),
    'step': lambda steps, rate: S.MultiStep([steps // 2, steps * 3 // 4], 0.1, rate),
    'plateau': lambda steps, rate: S.Plateau(rate, factor=0.3, patience=0),
    'inverse square root': lambda steps, rate: S.Warmup(S.InverseSqrt(rate, step=WARM), WARM),
    'linear': lambda steps, rate: S.Linear(steps, rate),
    'cosine': lambda steps, rate: S.Warmup(S.Cosine(steps - WARM, rate), WARM),
    'one-cycle': lambda steps, rate: S.OneCycle(steps, rate),
}


class Run(NamedTuple):
    """Rate and loss of each step, and the results on the digits that were not trained on."""
    rates: numpy.ndarray
    losses: numpy.ndarray
    accuracy: float
    loss: float


def train(schedule, steps, data, judged_on, progress):
    """Train with SGD under a schedule; the seed fixes initial weights and batches for any."""
    images, labels = data
    mx.random.seed(SEED)
    net = build_net()
    net.initialize(mx.init.Xavier())
    trainer = gluon.Trainer(net.collect_params(), 'sgd_torch', {'momentum': 0.9, 'lr_scheduler': schedule})
    loss_function = gluon.loss.SoftmaxCrossEntropyLoss()
    rates, losses = [], []
    for step in range(steps):
        batch = digits.batch_indices(SEED, step, len(images), BATCH_SIZE)
        with autograd.record():
            batch_losses = loss_function(net(mx.nd.array(images[batch])), mx.nd.array(labels[batch]))
        batch_losses.backward()
        trainer.step(BATCH_SIZE)
        rates.append(trainer.learning_rate)
        losses.append(float(batch_losses.mean().asscalar()))
        if isinstance(schedule, S.Plateau) and (step + 1) % OBSERVED == 0:
            schedule.observe(numpy.mean(losses[-OBSERVED:]))
        progress.update()
    return Run(numpy.array(rates), numpy.array(losses), *evaluate(net, judged_on))


def compare(names, steps, learning_rate):
    data, held_out = digits.load()
    with tqdm(total=len(names) * steps, disable=None) as progress:
        return {name: train(SCHEDULES[name](steps, learning_rate), steps, data, held_out, progress) for name in names}


def table(runs):
    """Lines to print, the smallest loss first."""
    width = max(len('schedule'), *map(len, runs))
    yield f'{"schedule":{width}}  highest rate  last rate  training loss  held-out loss  accuracy'
    for name, run in sorted(runs.items(), key=lambda item: item[1].loss):
        yield (f'{name:{width}}  {run.rates.max():12.3g}  {run.rates[-1]:9.2g}  {smooth(run.losses, 0.98)[-1]:13.4f}  '
               f'{run.loss:13.4f}  {run.accuracy:8.1%}')


def draw(runs, path):
    """The rates over the steps, and below them the losses."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as pyplot
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, layout='constrained', figsize=(8, 6.4))
    for name, run in runs.items():
        steps = numpy.arange(1, len(run.rates) + 1)
        above.plot(steps, run.rates, linewidth=1.6, label=name)
        below.semilogy(steps, smooth(run.losses, 0.98), linewidth=1.3, label=name)
    above.set_ylabel('learning rate')
    below.set_ylabel('training loss (running mean)')
    below.set_xlabel('update')
    above.legend(loc='center left', bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    for axes in (above, below):
        axes.grid(color='#dddddd', linewidth=0.6)
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=96)
    pyplot.close(figure)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', nargs='+', metavar='NAME', choices=SCHEDULES, default=list(SCHEDULES), help='run only these')
    parser.add_argument('--steps', type=int, default=STEPS, help='default: %(default)s')
    parser.add_argument('--learning-rate', type=float, default=LEARNING_RATE, help='the highest of each (default: %(default)s)')
    parser.add_argument('--picture', metavar='FILE', help='draw rates and losses (needs matplotlib)')
    options = parser.parse_args(arguments)
    if options.steps < 2 * WARM:
        parser.error(f'--steps must be at least {2 * WARM}: {WARM} are the warm-up')
    return options


def main(arguments=None):
    options = parse(arguments)
    try:
        runs = compare(options.only, options.steps, options.learning_rate)
        print('\n'.join(table(runs)))
        if options.picture:
            draw(runs, options.picture)
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f'compare_schedules: {error}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
