#!/usr/bin/env python
"""Train on handwritten digits in float16 with a loss scale, gradients clipped to a norm, and one batch that overflows.

    python examples/mixed_precision.py --picture mixed_precision.png

Three runs see the same batches: float32, float16 with a constant scale of 1, and float16 with `go.gradients.Scaler`. The loss has a
small weight, as one of several losses might: AdamW's steps do not depend on it, but float16 does.

Exit codes: 0 trained, 1 float16 with the Scaler is worse than float32 by more than two percent, 2 unusable arguments.
"""
import argparse
import sys
from typing import Any, Dict, List, NamedTuple

import digits
import mxnet as mx
import numpy
from mxnet import autograd, gluon
from tqdm import tqdm
from train_digits import accuracy, build_net

import gluon_optim as go

BATCH_SIZE = 64
WEIGHT = 1e-5  # of the loss
MAX_NORM = 1.0 * WEIGHT
SEED = 0
CONSTANT = dict(init_scale=1, scale_factor=1, backoff_factor=1)
RUNS: Dict[str, Any] = {
    'float32': ('float32', CONSTANT),
    'float16, scale 1': ('float16', CONSTANT),
    'float16, Scaler': ('float16', dict(init_scale=2.0 ** 36, max_scale=2.0 ** 40, scale_window=40)),
}


class Record(NamedTuple):
    """What a run was like at each step."""
    losses: List[float]     # without the weight
    norms: List[float]      # of gradients, before clipping; NaN or inf in a step that is left out
    scales: List[float]
    updated: List[bool]
    zeros: List[float]      # share of the elements of convolutions' and dense layers' gradients that are 0
    accuracy: float


def train(name, steps, overflow_at):
    """Train the net; the loss of step ``overflow_at`` is a million times as large."""
    dtype, settings = RUNS[name]
    (images, labels), held_out = digits.load()
    mx.random.seed(SEED)
    net = build_net()
    net.initialize(mx.init.Xavier())
    net.cast(dtype)  # but for batch norm, which stays float32
    schedule = mx.lr_scheduler.CosineScheduler(steps, base_lr=0.003)
    trainer = gluon.Trainer(net.collect_params(), go.create('adamw', learning_rate=0.003, epsilon=1e-12, lr_scheduler=schedule,
                                                            multi_precision=dtype == 'float16'))
    scaler = go.gradients.Scaler(trainer, **settings)
    loss_function = gluon.loss.SoftmaxCrossEntropyLoss()
    record = Record([], [], [], [], [], 0.0)
    for step in tqdm(range(steps), name, disable=None):
        batch = digits.batch_indices(SEED, step, len(images), BATCH_SIZE)
        with autograd.record():
            loss = loss_function(net(mx.nd.array(images[batch])), mx.nd.array(labels[batch])).mean()
            weighted = loss * WEIGHT * (1e6 if step + 1 == overflow_at else 1)
        record.scales.append(scaler.loss_scale)
        scaler.scale(weighted).backward()
        scaler.unscale()
        record.norms.append(go.gradients.clip_by_global_norm(trainer, MAX_NORM))
        record.updated.append(scaler.step(batch_size=1))  # the loss is the mean already
        scaler.update()
        record.losses.append(float(loss.asscalar()))
        record.zeros.append(share_of_zeros(trainer))
    return record._replace(accuracy=accuracy(net, *held_out, mx.cpu()))


def share_of_zeros(trainer):
    gradients = [p.grad().asnumpy() for p in trainer._params if p.grad_req != 'null' and 'batchnorm' not in p.name]
    return sum((gradient == 0).sum() for gradient in gradients) / sum(gradient.size for gradient in gradients)


def table(records):
    width = max(map(len, records))
    yield f'{"":{width}}  accuracy  last losses  steps left out  gradients that are 0  last scale'
    for name, record in records.items():
        zeros = numpy.mean([share for share, updated in zip(record.zeros, record.updated) if updated])
        yield (f'{name:{width}}  {record.accuracy:8.1%}  {numpy.mean(record.losses[-20:]):11.4f}  {record.updated.count(False):14}'
               f'  {zeros:20.1%}  {record.scales[-1]:10g}')


def draw(records, path):
    """The scale, the norms of gradients, and the losses over the steps."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as pyplot
    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(8, 7.5), layout='constrained')
    scaled = records['float16, Scaler']
    steps = numpy.arange(1, len(scaled.scales) + 1)
    left_out = [step for step, updated in zip(steps, scaled.updated) if not updated]
    axes[0].step(steps, scaled.scales, where='mid', color='C2')
    axes[0].plot(left_out, [scaled.scales[step - 1] for step in left_out], 'x', color='C3', label='step left out: not finite')
    axes[0].set_yscale('log', base=2)
    axes[0].set_ylabel('loss scale')
    axes[0].set_title('The Scaler halves the scale after an overflow, and doubles it after 40 good steps', loc='left', fontsize=10)
    finite = [norm if updated else numpy.nan for norm, updated in zip(scaled.norms, scaled.updated)]
    axes[1].semilogy(steps, finite, color='C2', linewidth=1, label='float16, Scaler, before clipping')
    axes[1].axhline(MAX_NORM, color='0.4', linestyle='--', linewidth=1, label=f'max_norm = {MAX_NORM:g}')
    axes[1].set_ylabel('norm of all gradients')
    axes[1].set_title('Norms are those of the gradients without the scale', loc='left', fontsize=10)
    for k, (name, record) in enumerate(records.items()):
        label = f'{name}: accuracy {record.accuracy:.1%}'
        axes[2].semilogy(steps, smooth(record.losses), color=f'C{k}', linewidth=1.2, label=label)
    axes[2].set_ylabel('training loss (smoothed)')
    axes[2].set_xlabel('step')
    for axis in axes:
        axis.legend(frameon=False, fontsize=9)
        axis.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def smooth(losses, keep=0.9):
    means, mean = [], losses[0]
    for loss in losses:
        mean = keep * mean + (1 - keep) * loss
        means.append(mean)
    return means


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=250, help='default: %(default)s')
    parser.add_argument('--overflow-at', type=int, default=160, metavar='STEP', help='default: %(default)s')
    parser.add_argument('--picture', metavar='FILE', help='draw scale, norms and losses (needs matplotlib)')
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error('--steps must be at least 1')
    return options


def main(arguments=None):
    options = parse(arguments)
    records = {name: train(name, options.steps, options.overflow_at) for name in RUNS}
    print('\n'.join(table(records)))
    if options.picture:
        draw(records, options.picture)
    worse = records['float32'].accuracy - records['float16, Scaler'].accuracy
    if worse > 0.02:
        print(f'mixed_precision: float16 with the Scaler is worse than float32 by {worse:.1%}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
