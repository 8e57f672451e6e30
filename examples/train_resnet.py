#!/usr/bin/env python
"""Train ResNet-18 from Gluon's model zoo on handwritten digits, with a checkpoint halfway, to be finished elsewhere.

    python examples/train_resnet.py --checkpoint-dir resnet                       # saves step-44 and step-88
    python examples/finish_resnet_in_pytorch.py resnet/step-44.safetensors
    python examples/onnx_train.py resnet/step-44.safetensors
    python examples/continue_in_jax.py resnet/step-44.safetensors

These continue from there without MXNet, and compare their losses with the ones that this run logged.
"""
import argparse
import json
import logging
import os
import sys

import digits
import mxnet as mx
import numpy
from mxnet import autograd, gluon
from mxnet.gluon.model_zoo import vision
from tqdm import tqdm

import gluon_optim as go

RECIPE = ('optimizer', 'learning_rate', 'epochs', 'batch_size', 'seed')  # what another program must know to continue


def train_step(net, trainer, images, labels):
    """One forward, backward and update; returns the mean loss."""
    with autograd.record():
        losses = gluon.loss.SoftmaxCrossEntropyLoss()(net(mx.nd.array(images)), mx.nd.array(labels))
    losses.backward()
    trainer.step(len(images))
    return float(losses.mean().asscalar())


def run(options):
    """Train as the options say; returns the share of held-out digits recognized at the end."""
    manager = go.CheckpointManager(options.checkpoint_dir)
    if manager.steps():
        raise ValueError(f'{manager.directory} already holds a run. Pass another --checkpoint-dir.')
    (images, labels), (test_images, test_labels) = digits.load()
    steps = options.epochs * (len(images) // options.batch_size)
    recipe = {'net': 'resnet18_v1', **{key: getattr(options, key) for key in RECIPE}}

    mx.random.seed(options.seed)
    net = vision.resnet18_v1(classes=10)
    net.initialize(mx.init.Xavier())
    net.hybridize()
    schedule = mx.lr_scheduler.CosineScheduler(steps, base_lr=options.learning_rate)
    trainer = gluon.Trainer(net.collect_params(), options.optimizer, {
        'learning_rate': options.learning_rate, 'lr_scheduler': schedule})

    os.makedirs(manager.directory, exist_ok=True)
    with open(os.path.join(manager.directory, 'losses.jsonl'), 'w', buffering=1) as log:
        for step in tqdm(range(steps), 'training ResNet-18', disable=None):
            batch = digits.batch_indices(options.seed, step, len(images), options.batch_size)
            loss = train_step(net, trainer, digits.photographs(images[batch]), labels[batch])
            log.write(json.dumps({'step': step + 1, 'loss': loss}) + '\n')
            if step + 1 in (steps // 2, steps):
                manager.save(step + 1, net=net, trainer=trainer, extra=recipe)
    predictions = net(mx.nd.array(digits.photographs(test_images))).argmax(axis=1).asnumpy()
    return float(numpy.mean(predictions == test_labels))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--checkpoint-dir', required=True, help='where the checkpoints go; losses.jsonl, too')
    parser.add_argument('--optimizer', default='novograd', help='one of `gluon-optim list` (default: %(default)s)')
    parser.add_argument('--learning-rate', type=float, default=0.01, help='at the start; falls to 0 (default: %(default)s)')
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format='%(message)s')  # shows what is saved and restored
    try:
        print(f'Gluon: accuracy {run(options):.2%} on held-out digits')
    except (ValueError, TypeError, OSError) as error:
        print(f'train_resnet: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
