#!/usr/bin/env python
"""Train a small convolutional Gluon net on handwritten digits; kill it at any instant, resume bit for bit.

    python examples/train_digits.py --optimizer novograd
    python examples/train_digits.py --checkpoint-dir run              # kill it whenever you like, then
    python examples/train_digits.py --checkpoint-dir run --resume --device 2

Exit codes: 0 trained, 1 refused with a reason, 2 unusable arguments.
"""
import argparse
import hashlib
import json
import logging
import os
import sys

import digits
import mxnet as mx
import numpy
from mxnet import autograd, gluon
from tqdm import tqdm

import gluon_optim as go

# What a resumed run must share with the one it continues. The device and file locations may differ.
RECIPE = ('optimizer', 'learning_rate', 'epochs', 'batch_size', 'dropout', 'multi_precision', 'seed')


class Refused(Exception):
    """The run cannot start or continue; the message gives the reason."""


def in_float32(layer):
    """``layer``, a class, computing in float32 whatever type its parameters are stored in.

    MXNet has no float16 matrix product on the CPU. The gradients return to float16 through the cast.
    """
    class Layer(layer):
        def hybrid_forward(self, F, x, **parameters):
            single = {name: F.cast(parameter, dtype='float32') for name, parameter in parameters.items()}
            return super().hybrid_forward(F, x, **single)
    return Layer


def build_net(dropout=0.0):
    """8 x 8 pixels to 10 classes, 85 000 parameters."""
    Conv2D, Dense = in_float32(gluon.nn.Conv2D), in_float32(gluon.nn.Dense)
    net = gluon.nn.HybridSequential()
    net.add(Conv2D(32, 3, padding=1, in_channels=1), gluon.nn.BatchNorm(in_channels=32), gluon.nn.Activation('relu'),
            Conv2D(64, 3, padding=1, in_channels=32), gluon.nn.BatchNorm(in_channels=64), gluon.nn.Activation('relu'),
            gluon.nn.MaxPool2D(2), gluon.nn.Flatten(), gluon.nn.Dropout(dropout),
            Dense(64, in_units=1024), gluon.nn.Activation('relu'), Dense(10, in_units=64))
    net.hybridize()
    return net


def restore(manager, net, trainer, recipe):
    """Restore the newest intact checkpoint if it is from a run with the same recipe; returns its step."""
    restored = manager.restore_latest(net=net, trainer=trainer)
    if restored is None:
        raise Refused(f'--resume finds no checkpoint in {manager.directory}. Leave --resume out to start a new run there.')
    differing = [f'{key} is {restored[key]!r} there, {recipe[key]!r} here' for key in RECIPE if restored[key] != recipe[key]]
    if differing:
        raise Refused(f'{manager.directory} holds another run: {"; ".join(differing)}. '
                      'Pass its arguments or another --checkpoint-dir.')
    return restored.step


def parameters_digest(net):
    """SHA-256 over names and bytes of all parameters, including the running means of batch norm."""
    digest = hashlib.sha256()
    for name, parameter in sorted(net._collect_params_with_prefix().items()):
        digest.update(name.encode() + parameter.data().asnumpy().tobytes())
    return digest.hexdigest()


def accuracy(net, images, labels, device):
    predictions = net(mx.nd.array(images, ctx=device)).argmax(axis=1).asnumpy()
    return float(numpy.mean(predictions == labels))


def train_step(net, trainer, images, labels, device):
    """One forward, backward and update; returns the mean loss."""
    with autograd.record():
        losses = gluon.loss.SoftmaxCrossEntropyLoss()(net(mx.nd.array(images, ctx=device)), mx.nd.array(labels, ctx=device))
    losses.backward()
    trainer.step(len(images))
    return float(losses.mean().asscalar())


def run(options):
    """Train as the options say; returns the last line to show."""
    device = mx.cpu(options.device)
    recipe = {key: getattr(options, key) for key in RECIPE}
    (images, labels), held_out = digits.load()
    manager = go.CheckpointManager(options.checkpoint_dir, save_every=options.checkpoint_every) if options.checkpoint_dir else None
    if manager and manager.steps() and not options.resume:
        raise Refused(f'{manager.directory} already holds a run. Pass --resume to continue it, or another --checkpoint-dir.')

    mx.random.seed(options.seed)
    net = build_net(options.dropout)
    if options.multi_precision:
        net.cast('float16')
    net.initialize(mx.init.Xavier(), ctx=device)
    steps = options.epochs * (len(images) // options.batch_size)
    schedule = mx.lr_scheduler.CosineScheduler(steps, base_lr=options.learning_rate)
    trainer = gluon.Trainer(net.collect_params(), options.optimizer, {
        'learning_rate': options.learning_rate, 'lr_scheduler': schedule, 'multi_precision': options.multi_precision})

    start = 0
    if options.resume:
        start = restore(manager, net, trainer, recipe)
        print(f'resumed at step {start}')

    with open(options.log or os.devnull, 'a', buffering=1) as log:
        for step in tqdm(range(start, steps), 'training', initial=start, total=steps, disable=None):
            batch = digits.batch_indices(options.seed, step, len(images), options.batch_size)
            mx.random.seed(options.seed * 1_000_003 + step, ctx=device)  # dropout, too, depends only on (seed, step)
            loss = train_step(net, trainer, images[batch], labels[batch], device)
            if manager:  # no need to save random states: they follow from the step
                manager.save(step + 1, net=net, trainer=trainer, extra=recipe, reseed=False)
            log.write(json.dumps({'step': step + 1, 'loss': loss}) + '\n')
        result = {'step': steps, 'accuracy': accuracy(net, *held_out, device), 'parameters': parameters_digest(net)}
        log.write(json.dumps(result) + '\n')
    return (f"step {steps}: accuracy {result['accuracy']:.2%} on {len(held_out[1])} held-out digits, "
            f"parameters {result['parameters'][:16]}")


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--optimizer', default='novograd',
                        help="one of `gluon-optim list`; MXNet's own train without checkpoints (default: %(default)s)")
    parser.add_argument('--learning-rate', type=float, default=0.01, help='at the start; falls to 0 (default: %(default)s)')
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--dropout', type=float, default=0.2)
    parser.add_argument('--multi-precision', action='store_true', help='float16 weights with float32 masters')
    parser.add_argument('--device', type=int, default=0, metavar='ID', help='train on mx.cpu(ID)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--checkpoint-dir', help='where to keep the last three checkpoints; none are written without it')
    parser.add_argument('--checkpoint-every', type=int, default=20, metavar='STEPS')
    parser.add_argument('--resume', action='store_true', help='continue from the newest checkpoint in --checkpoint-dir')
    parser.add_argument('--log', help='append step and loss here, one JSON object per line; at the end accuracy and digest')
    options = parser.parse_args(arguments)
    if options.resume and not options.checkpoint_dir:
        parser.error('--resume needs --checkpoint-dir')
    for name in ('epochs', 'batch_size', 'checkpoint_every'):
        if getattr(options, name) < 1:
            parser.error(f'--{name.replace("_", "-")} must be at least 1')
    return options


def main(arguments=None):
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format='%(message)s')  # shows what is saved and restored
    try:
        print(run(options))
    except (Refused, ValueError, TypeError, OSError) as error:
        print(f'train_digits: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
