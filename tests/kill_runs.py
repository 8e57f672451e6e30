"""One training run that is killed with SIGKILL again and again at random instants, most of them while it saves.

    python kill_runs.py FOLDER KILLS [SEED]

prints as JSON what was found: each child resumes from the newest checkpoint, trains, and saves after each step, until it is
killed. What stands in the folder then is checked. At the end a run without any kill must have the same parameters and states.
"""
# ruff: noqa: NPY002  the global generators are what a checkpoint brings back
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

import gluon_optim as go
from gluon_optim.states import container

WIDTH = 64  # two dense layers: about 100 KB of parameters and 200 KB of states


def make():
    mx.random.seed(0)
    np.random.seed(0)
    net = gluon.nn.Sequential()
    net.add(gluon.nn.Dense(WIDTH * 4, in_units=WIDTH), gluon.nn.Dropout(0.5), gluon.nn.Dense(WIDTH, in_units=WIDTH * 4))
    net.initialize(mx.init.Normal(0.1))
    return net, gluon.Trainer(net.collect_params(), 'adamw', {'learning_rate': 0.01}, kvstore=None)


def run(folder, steps, background, report):
    """From the newest checkpoint to ``steps``; ``report`` is called after each step that is safely on the disk."""
    net, trainer = make()
    manager = go.CheckpointManager(folder, keep_last=2, background=background)
    restored = manager.restore_latest(net, trainer)
    start = restored.step if restored else 0
    report(start)
    for step in range(start + 1, steps + 1):
        data = mx.nd.array(np.random.randn(4, WIDTH))
        with autograd.record():
            loss = (net(data) ** 2).sum()
        loss.backward()
        trainer.step(4)
        manager.save(step, net, trainer)
        report(step - background)  # the one before it has been waited for
    manager.wait()
    return facts(net, trainer)


def facts(net, trainer):
    weights = hashlib.sha256(b''.join(p.data().asnumpy().tobytes() for _, p in sorted(net._collect_params_with_prefix().items())))
    return {'weights': weights.hexdigest(), 'states': go.states_digest(trainer, net), 'noise': float(np.random.rand())}


def in_child(function):
    """Run ``function`` in a forked process, which has what was imported; returns its id and the end of a pipe from it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    try:
        os.close(read)
        function(lambda line: os.write(write, f'{json.dumps(line)}\n'.encode()))
    except BaseException:
        os.write(write, (json.dumps(traceback.format_exc()) + '\n').encode())
    finally:
        os._exit(0)


def lines(read):
    with os.fdopen(read, 'rb') as file:
        return [json.loads(line) for line in file.read().splitlines(keepends=True) if line.endswith(b'\n')]


def kill_one(function, chance, least):
    """Run ``function`` in a child, and kill it some time after the line number ``least`` from it; returns the largest of all."""
    pid, read = in_child(function)
    first = b''
    while first.count(b'\n') < least:
        first += os.read(read, 1 << 16) or b'"ended"\n' * least
    time.sleep(chance.uniform(0, 0.05))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    said = [json.loads(line) for line in first.splitlines()] + lines(read)
    if any(isinstance(line, str) for line in said):
        raise RuntimeError(said[-1])
    return max(said)


def main(folder, kills, seed=0):
    chance = random.Random(int(seed))
    found = {'kills': int(kills), 'damaged': [], 'lost': [], 'in the middle': 0, 'most leftovers': 0}
    reached = 0
    run(folder + '-warm', 2, False, lambda step: None)  # children inherit the compiled kernel
    for k in range(int(kills)):
        reached = max(reached, kill_one(lambda say, background=k % 2 == 1: run(folder, 10 ** 6, background, say), chance, 2))
        names = os.listdir(folder) if os.path.isdir(folder) else []
        leftovers = [name for name in names if name.endswith('.tmp')]
        found['in the middle'] += bool(leftovers)
        found['most leftovers'] = max(found['most leftovers'], len(leftovers))
        steps = []
        for name in names:
            if name.endswith('.safetensors'):
                try:
                    steps.append(container.read_checkpoint(os.path.join(folder, name))[1].step)
                except ValueError as error:
                    found['damaged'].append(f'kill {k}: {error}')
        if max(steps, default=0) < reached:
            found['lost'].append(f'kill {k}: step {reached} was saved, {steps} are there')
    last = reached + 5
    for name, where in (('resumed', folder), ('straight', folder + '-straight')):
        pid, read = in_child(lambda say, where=where: say(run(where, last, False, lambda step: None)))
        found[name] = lines(read)[-1]
        os.waitpid(pid, 0)
    found['steps'] = last
    return found


if __name__ == '__main__':
    print(json.dumps(main(*sys.argv[1:]), indent=1))
