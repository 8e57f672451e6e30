"""A generator and a discriminator, each with its own optimizer, that are trained against each other.

As a script it resumes in one process the runs that the JSON on its standard input lists, and prints what came out of each.
"""
# ruff: noqa: NPY002  the global generators are what a checkpoint brings back
import random

import checkpoint_runs
import jobs
import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

import gluon_optim as go

NAMES = ('generator', 'discriminator')


def make(contexts=(0,), update_on_kvstore=None, seed=0):
    """Nets and trainers by name. The generator normalises, so that its running statistics differ between devices."""
    mx.random.seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    generator, discriminator = gluon.nn.HybridSequential(), gluon.nn.HybridSequential()
    generator.add(gluon.nn.Dense(6, in_units=3), gluon.nn.BatchNorm(in_channels=6), gluon.nn.Dense(4, in_units=6))
    discriminator.add(gluon.nn.Dense(5, in_units=4, activation='tanh'), gluon.nn.Dropout(0.3), gluon.nn.Dense(1, in_units=5))
    nets = dict(zip(NAMES, (generator, discriminator)))
    optimizers = {'generator': go.create('adamw', lr_scheduler=mx.lr_scheduler.CosineScheduler(10, base_lr=0.02, warmup_steps=2)),
                  'discriminator': go.create('novograd', learning_rate=0.05, wd=0.01)}
    for net in nets.values():
        net.initialize(mx.init.Normal(0.1), ctx=[mx.cpu(k) for k in contexts])
    return nets, {name: gluon.Trainer(net.collect_params(), optimizers[name], kvstore='device',
                                      update_on_kvstore=update_on_kvstore) for name, net in nets.items()}


def train(nets, trainers, steps):
    """The discriminator takes two steps for each of the generator."""
    for step in range(steps):
        train_one(nets, trainers, 'discriminator')
        if step % 2:
            train_one(nets, trainers, 'generator')


def train_one(nets, trainers, name):
    loss = gluon.loss.SigmoidBinaryCrossEntropyLoss()
    contexts = trainers[name]._contexts
    noise, real = (gluon.utils.split_and_load(mx.nd.array(np.random.randn(8, size) * (1 + random.random())), contexts)
                   for size in (3, 4))
    with autograd.record():
        losses = []
        for z, x in zip(noise, real):
            fake = nets['discriminator'](nets['generator'](z))
            losses.append(loss(fake, mx.nd.ones_like(fake)) if name == 'generator' else
                          loss(fake, mx.nd.zeros_like(fake)) + loss(nets['discriminator'](x), mx.nd.ones_like(fake)))
    autograd.backward(losses)
    trainers[name].step(8)
    for net in nets.values():
        net.collect_params().zero_grad()


def facts(nets, trainers, noise=True):
    """All that two equal runs have in common. ``noise`` asks the generators of random numbers, which changes them."""
    return [checkpoint_runs.facts(nets[name], trainers[name], noise) for name in NAMES]


def resume(layout, path, steps):
    nets, trainers = make(**layout, seed=99)
    restored = go.load_checkpoint(path, net=nets, trainer=trainers)
    loaded = facts(nets, trainers, noise=False)
    train(nets, trainers, steps)
    return {'step': restored.step, 'loaded': loaded, 'end': facts(nets, trainers)}


if __name__ == '__main__':
    jobs.do_all(resume)
