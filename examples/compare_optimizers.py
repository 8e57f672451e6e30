#!/usr/bin/env python
"""Train the same small net on handwritten digits with every optimizer of gluon_optim; print a table, plot the losses.

    python examples/compare_optimizers.py --plot losses.png
    python examples/compare_optimizers.py --only novograd adamw lamb --json -
    python examples/compare_optimizers.py --tune novograd             # how the table of settings was made

Exit codes: 0 every optimizer reaches the accuracy, 1 one does not or cannot run, 2 unusable arguments.
"""
import argparse
import json
import math
import sys
import time
from typing import Any, Dict, NamedTuple

import digits
import mxnet as mx
import numpy
from mxnet import autograd, gluon
from tqdm import tqdm

import gluon_optim as go

STEPS = 300
BATCH_SIZE = 64
ACCURACY = 0.95
EVALUATE_EVERY = 10
SEED = 0


class Setting(NamedTuple):
    """``hypers`` for `gluon.Trainer`; ``tuned`` is the one that `--tune` tunes; ``decay``: whether its rate falls as a cosine."""
    family: str
    hypers: Dict[str, Any]
    batch_size: int = BATCH_SIZE
    tuned: str = 'learning_rate'
    decay: bool = True

    def __str__(self):
        batch = '' if self.batch_size == BATCH_SIZE else f'; batches of {self.batch_size}'
        return ', '.join(f'{name} {value}' for name, value in self.hypers.items()) + batch


GRADIENT, ADAPTIVE, ADAM, LAYERWISE = 'gradient and momentum', 'adaptive rates and signs', "Adam's family", 'norms of tensors'

# One setting per optimizer; anything not given is the optimizer's default, and a cosine takes every learning rate to 0. `--tune`
# moved the `tuned` argument along 1, 3, 10, 30, ... until the best value had worse neighbors; best means the smallest loss
# on a fifth of the training digits, kept out for this. The held-out digits were not used to choose values, with two exceptions:
# adagrad_torch got its second argument, and noise_adaptive_sgd 0.7 instead of 0.5, after they missed the accuracy (95.3 %).
SETTINGS = {
    'sgd': Setting(GRADIENT, dict(learning_rate=0.1, momentum=0.9)),
    'sgd_torch': Setting(GRADIENT, dict(learning_rate=0.1, momentum=0.9)),
    'sgd_ema': Setting(GRADIENT, dict(learning_rate=1.0, nesterov=True)),
    'nag': Setting(GRADIENT, dict(learning_rate=0.1, momentum=0.9)),
    'asgd': Setting(GRADIENT, dict(learning_rate=0.3)),
    'dcasgd': Setting(GRADIENT, dict(learning_rate=0.1, momentum=0.9)),
    # samples weights: its loss is the sum over the 1437 digits, here ten times that, a posterior of temperature 0.1
    'sgld': Setting(GRADIENT, dict(learning_rate=1e-4, rescale_grad=14370)),
    # with long averages, the noise of the first steps keeps the rate small for all 300
    'noise_adaptive_sgd': Setting(GRADIENT, dict(learning_rate=1.0, averaging_min=0.7, batch_size=64)),

    'adagrad': Setting(ADAPTIVE, dict(learning_rate=0.3)),
    'adagrad_torch': Setting(ADAPTIVE, dict(learning_rate=0.3, initial_accumulator=0.01)),
    'adadelta': Setting(ADAPTIVE, dict(epsilon=3e-4), tuned='epsilon', decay=False),
    'adadelta_torch': Setting(ADAPTIVE, dict(learning_rate=10.0)),
    'rmsprop': Setting(ADAPTIVE, dict(learning_rate=0.01)),
    'rmsprop_torch': Setting(ADAPTIVE, dict(learning_rate=0.03)),
    # its weights are proportional to the rate, so the rate is constant; large lamda1 and beta forget the first weights
    'ftrl': Setting(ADAPTIVE, dict(learning_rate=0.3, lamda1=1e-4, beta=1e-6), decay=False),
    'signum': Setting(ADAPTIVE, dict(learning_rate=0.01)),
    # the sign of a gradient requires little noise, and the rate applies only to the first step
    'rprop': Setting(ADAPTIVE, dict(learning_rate=0.001, step_max=0.01), batch_size=512, tuned='step_max'),

    'adam': Setting(ADAM, dict(learning_rate=0.03)),
    'adam_torch': Setting(ADAM, dict(learning_rate=0.03)),
    'adamw': Setting(ADAM, dict(learning_rate=0.03)),
    'adamax': Setting(ADAM, dict(learning_rate=0.03)),
    'adamax_torch': Setting(ADAM, dict(learning_rate=0.03)),
    'nadam': Setting(ADAM, dict(learning_rate=0.03)),
    'nadam_torch': Setting(ADAM, dict(learning_rate=0.03)),
    'radam': Setting(ADAM, dict(learning_rate=0.3)),
    'adabelief': Setting(ADAM, dict(learning_rate=0.03)),
    'ftml': Setting(ADAM, dict(learning_rate=0.1)),

    'novograd': Setting(LAYERWISE, dict(learning_rate=0.03)),
    'sngd': Setting(LAYERWISE, dict(learning_rate=0.3)),
    'larc': Setting(LAYERWISE, dict(learning_rate=0.3, momentum=0.9)),
    'lars': Setting(LAYERWISE, dict(learning_rate=0.1, momentum=0.9, eta=0.1), tuned='eta'),
    'lbsgd': Setting(LAYERWISE, dict(learning_rate=0.1, momentum=0.9)),
    'lamb': Setting(LAYERWISE, dict(learning_rate=0.03)),
    'lans': Setting(LAYERWISE, dict(learning_rate=0.03)),
}


class Run(NamedTuple):
    """The results of one training: batch losses; (step, accuracy, loss) of evaluations; seconds per step and per update."""
    losses: numpy.ndarray
    evaluations: numpy.ndarray
    step_seconds: float
    update_seconds: float

    def reached(self, accuracy):
        """The first evaluated step with at least ``accuracy``, or None."""
        return next((int(step) for step, value, _ in self.evaluations if value >= accuracy), None)


def build_net():
    """8 x 8 pixels to 10 classes, 2 600 parameters."""
    net = gluon.nn.HybridSequential()
    for in_channels, channels in ((1, 8), (8, 16)):
        net.add(gluon.nn.Conv2D(channels, 3, padding=1, in_channels=in_channels), gluon.nn.BatchNorm(in_channels=channels),
                gluon.nn.Activation('relu'), gluon.nn.MaxPool2D(2))
    net.add(gluon.nn.Flatten(), gluon.nn.Dense(10, in_units=64))
    net.hybridize()
    return net


def evaluate(net, data):
    """(accuracy, mean loss) on ``data``, without dropout and with the running means of batch norm."""
    outputs, labels = net(mx.nd.array(data[0])), mx.nd.array(data[1])
    loss = gluon.loss.SoftmaxCrossEntropyLoss()(outputs, labels).mean().asscalar()
    return float((outputs.argmax(axis=1) == labels).mean().asscalar()), float(loss)


def train(name, setting, steps, data, judged_on, progress):
    """Train the net with the optimizer ``name``; the seed fixes initial weights, batches and noise for any optimizer."""
    images, labels = data
    batch_size = min(setting.batch_size, len(images))
    mx.random.seed(SEED)
    net = build_net()
    net.initialize(mx.init.Xavier())
    schedule = {}
    if setting.decay:
        # 0 is reached after the last step: sgld's noise and ftml's division need a rate
        schedule['lr_scheduler'] = mx.lr_scheduler.CosineScheduler(steps + 1, base_lr=setting.hypers['learning_rate'])
    trainer = gluon.Trainer(net.collect_params(), go.create(name, **setting.hypers, **schedule))
    loss_function = gluon.loss.SoftmaxCrossEntropyLoss()
    losses, evaluations, times = [], [], []
    for step in range(steps):
        batch = digits.batch_indices(SEED, step, len(images), batch_size)
        start = time.perf_counter()
        with autograd.record():
            batch_losses = loss_function(net(mx.nd.array(images[batch])), mx.nd.array(labels[batch]))
        batch_losses.backward()
        mx.nd.waitall()  # so that the clock separates the update from the gradient
        update = time.perf_counter()
        trainer.step(batch_size)
        mx.nd.waitall()
        end = time.perf_counter()
        times.append((end - start, end - update))
        losses.append(float(batch_losses.mean().asscalar()))
        if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == steps:
            evaluations.append((step + 1, *evaluate(net, judged_on)))
        progress.update()
    # from the fastest steps: the first one compiles, and other programs interrupt
    return Run(numpy.array(losses), numpy.array(evaluations), *numpy.quantile(times, 0.05, axis=0))


def smooth(losses, keep=0.9):
    """Exponential moving average, corrected for the number of values at the start."""
    smoothed, mean, weight = [], 0.0, 0.0
    for loss in losses:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return numpy.array(smoothed)


# Comparing -----------------------------------------------------------------------------------------------------------

def compare(names, steps):
    data, held_out = digits.load()
    runs = {}
    with tqdm(total=len(names) * steps, disable=None) as progress:
        for name in names:
            progress.set_description(name)
            runs[name] = train(name, SETTINGS[name], steps, data, held_out, progress)
    return runs


def results(runs, accuracy):
    """One dictionary per run, the most accurate first."""
    rows = [dict(optimizer=name, setting=SETTINGS[name].hypers, batch_size=SETTINGS[name].batch_size,
                 accuracy=run.evaluations[-1, 1], loss=smooth(run.losses)[-1], steps_to_accuracy=run.reached(accuracy),
                 ms_per_step=1e3 * run.step_seconds, ms_per_update=1e3 * run.update_seconds) for name, run in runs.items()]
    return sorted(rows, key=lambda row: (-row['accuracy'], row['loss'] if math.isfinite(row['loss']) else math.inf))


def table(rows, accuracy):
    """Lines to print."""
    width = max(len('optimizer'), *(len(row['optimizer']) for row in rows))
    settings = {row['optimizer']: str(SETTINGS[row['optimizer']]) for row in rows}
    setting_width = max(len('setting'), *map(len, settings.values()))
    yield (f'{"optimizer":{width}}  {"setting":{setting_width}}  accuracy  last loss  '
           f'steps to {accuracy:.0%}  ms per step  of it update')
    for row in rows:
        name, reached = row['optimizer'], row['steps_to_accuracy'] or 'never'
        yield (f'{name:{width}}  {settings[name]:{setting_width}}  {row["accuracy"]:8.1%}  {row["loss"]:9.4f}  '
               f'{reached:>12}  {row["ms_per_step"]:11.2f}  {row["ms_per_update"]:12.2f}')


def plot(runs, path):
    """A row of two panels per family: its losses over steps and over time, in front of all others."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as pyplot
    curves = {name: smooth(run.losses) for name, run in runs.items()}
    families = [family for family in (GRADIENT, ADAPTIVE, ADAM, LAYERWISE) if any(SETTINGS[name].family == family for name in runs)]
    figure, axes = pyplot.subplots(len(families), 2, squeeze=False, sharex='col', sharey=True, layout='constrained',
                                   figsize=(11, 0.6 + 2.6 * len(families)))
    for family, row in zip(families, axes):
        members = sorted((name for name in runs if SETTINGS[name].family == family), key=lambda name: curves[name][-1])
        for name in sorted(runs, key=members.__contains__):  # the others first: behind
            steps = numpy.arange(1, len(curves[name]) + 1)
            if name in members:
                batch = '' if SETTINGS[name].batch_size == BATCH_SIZE else f', batches of {SETTINGS[name].batch_size}'
                style = dict(color=f'C{members.index(name)}', linewidth=1.5, label=name + batch)
            else:
                style = dict(color='0.88', linewidth=0.8)
            row[0].semilogy(steps, curves[name], **style)
            row[1].semilogy(steps * runs[name].step_seconds, curves[name], **style)
        row[0].set_title(family, loc='left', fontsize=11)
        row[0].set_ylabel('training loss')
        handles = sorted((line for line in row[1].lines if not line.get_label().startswith('_')),
                         key=lambda line: -line.get_ydata()[-1])
        row[1].legend(handles=handles, loc='center left', bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9,
                      title='highest loss at the top', title_fontsize=8, alignment='left')
        for axis in row:
            axis.spines[['top', 'right']].set_visible(False)
    totals = [len(run.losses) * run.step_seconds for run in runs.values()]
    axes[-1, 1].set_xlim(0, 1.05 * min(max(totals), 1.5 * numpy.median(totals)))  # large batches leave the panel
    axes[-1, 0].set_xlabel('step')
    axes[-1, 1].set_xlabel('seconds (at the speed of the fastest 5 % of the steps)')
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


# Tuning --------------------------------------------------------------------------------------------------------------

def neighbours(value):
    """``value`` between those below and above it in 1, 3, 10, 30, ...

    >>> neighbours(0.03)
    [0.01, 0.03, 0.1]
    """
    place = round(2 * math.log10(value))
    return [float(f'{10 ** (exponent / 2):.0e}') for exponent in (place - 1, place, place + 1)]


def tune(names, steps):
    """Train with the table's value and its neighbours; yields a line for each."""
    (images, labels), _ = digits.load()
    kept_out = len(images) // 5
    training, judging = (images[kept_out:], labels[kept_out:]), (images[:kept_out], labels[:kept_out])
    with tqdm(total=3 * len(names) * steps, disable=None) as progress:
        for name in names:
            progress.set_description(name)
            setting = SETTINGS[name]
            for value in neighbours(setting.hypers[setting.tuned]):
                candidate = setting._replace(hypers={**setting.hypers, setting.tuned: value})
                run = train(name, candidate, steps, training, judging, progress)
                _, accuracy, loss = run.evaluations[-1]
                yield f'{name}: {candidate}: loss {loss:.4f}, accuracy {accuracy:.1%} on {kept_out} digits kept out of training'


def parse(arguments):
    names = sorted(set(go.list_optimizers()) & set(SETTINGS))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', nargs='+', metavar='NAME', choices=sorted(SETTINGS), default=names, help='run only these')
    parser.add_argument('--steps', type=int, default=STEPS, help='default: %(default)s')
    parser.add_argument('--accuracy', type=float, default=ACCURACY, help='accuracy that all must reach (default: %(default)s)')
    parser.add_argument('--json', metavar='FILE', help='write results and losses here; - prints them instead of the table')
    parser.add_argument('--plot', metavar='FILE', help='draw the losses (needs matplotlib)')
    parser.add_argument('--tune', nargs='+', metavar='NAME', choices=sorted(SETTINGS),
                        help='instead of comparing, train with values around those in the table')
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error('--steps must be at least 1')
    return options


def report(runs, options):
    """Write what the options ask for; returns whether every optimizer reaches the accuracy."""
    rows = results(runs, options.accuracy)
    if options.json:
        losses = {name: [round(loss, 6) if math.isfinite(loss) else None for loss in run.losses] for name, run in runs.items()}
        records = [{key: value if not isinstance(value, float) or math.isfinite(value) else None for key, value in row.items()}
                   for row in rows]
        text = json.dumps(dict(steps=options.steps, accuracy=options.accuracy, results=records, losses=losses))
        if options.json == '-':
            print(text)
        else:
            with open(options.json, 'w') as file:
                file.write(text + '\n')
    if options.json != '-':
        print('\n'.join(table(rows, options.accuracy)))
    if options.plot:
        plot(runs, options.plot)
    missed = [row['optimizer'] for row in rows if not row['accuracy'] >= options.accuracy]
    if missed:
        print(f'compare_optimizers: below {options.accuracy:.1%} after {options.steps} steps: {", ".join(missed)}', file=sys.stderr)
    return not missed


def main(arguments=None):
    options = parse(arguments)
    try:
        if options.tune:
            for line in tune(options.tune, options.steps):
                print(line, flush=True)
            return 0
        return 0 if report(compare(options.only, options.steps), options) else 1
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f'compare_optimizers: {error}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
