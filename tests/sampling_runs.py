"""A chain that is killed with SIGKILL again and again, and resumed from its newest checkpoint.

    python sampling_runs.py FOLDER KILLS OPTIMIZER

prints as JSON what was found: the samples of the killed run and of one without a kill, as hashes.
"""
import hashlib
import json
import os
import random
import sys

import mxnet as mx
import numpy as np
from kill_runs import in_child, kill_one, lines
from mxnet import autograd, gluon

import gluon_optim as go

WIDTH = 16
NOISES = {'sgld philox': ('sgld', 'philox'), 'psgld mxnet': ('psgld', 'mxnet')}   # those that are not the default


def make(folder, optimizer='sgld', contexts=(0,), seed=0, temperature=2.0, thin=2, **options):
    """Net, trainer and chain; the net has dropout, so its gradients depend on MXNet's generator too."""
    mx.random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the global generators are what a checkpoint brings back
    net = gluon.nn.Sequential()
    net.add(gluon.nn.Dense(WIDTH * 2, in_units=WIDTH), gluon.nn.Dropout(0.5), gluon.nn.Dense(1, in_units=WIDTH * 2))
    net.initialize(mx.init.Normal(0.1), ctx=[mx.cpu(i) for i in contexts])
    if optimizer == "MXNet's sgld":
        sampler, temperature = mx.optimizer.SGLD(learning_rate=1e-4, wd=1.0), 1.0
    else:
        name, noise = NOISES.get(optimizer, (optimizer, None))
        sampler = go.create(name, learning_rate=1e-4, wd=1.0, **({'noise': noise} if noise else {}))
    trainer = gluon.Trainer(net.collect_params(), sampler, **options)
    return net, trainer, go.sampling.Chain(trainer, folder + '/chain', burn_in=3, thin=thin, temperature=temperature, net=net)


def step(net, trainer, chain):
    """One update from a batch of 4 of 100 examples."""
    data = mx.nd.array(np.random.randn(4, WIDTH))  # noqa: NPY002
    parts = gluon.utils.split_and_load(data, trainer._contexts)
    with autograd.record():
        losses = [(net(part) - 1) ** 2 for part in parts]
    autograd.backward(losses)
    return chain.step(4, 100)


def run(folder, steps, optimizer, report):
    net, trainer, chain = make(folder, optimizer)
    manager = go.CheckpointManager(folder + '/checkpoints', keep_last=2, save_every=3)
    manager.restore_latest(net, trainer)
    report(chain.position)
    while chain.position < steps:
        step(net, trainer, chain)
        manager.save(chain.position, net, trainer)
        report(chain.position)
    return facts(folder)


def facts(folder):
    """The samples in the folder of a chain, as hashes by step."""
    return {str(number): hashlib.sha256(b''.join(weights[name].tobytes() for name in sorted(weights))).hexdigest()
            for number, weights in go.sampling.Samples(folder + '/chain')}


def main(folder, kills, optimizer):
    chance = random.Random(0)
    run(folder + '-warm', 2, optimizer, lambda position: None)  # children inherit what was imported and compiled
    reached = 0
    for _ in range(int(kills)):
        # its start and three steps, the last of which is in a checkpoint
        reached = max(reached, kill_one(lambda say: run(folder, 10 ** 6, optimizer, say), chance, 4))
    found = {'reached': reached}
    for name, where in (('resumed', folder), ('straight', folder + '-straight')):
        pid, read = in_child(lambda say, where=where: say(run(where, reached + 7, optimizer, lambda position: None)))
        found[name] = lines(read)[-1]
        os.waitpid(pid, 0)
    return found


if __name__ == '__main__':
    print(json.dumps(main(*sys.argv[1:]), indent=1))
