"""A worker that trains by many optimizers, one after the other, each under keys of its own; and the same in its own process alone.

A process can have one store with servers only, and a second trainer's keys would be those of the first: so each trainer gets as
many frozen parameters in front as there were before, which the store never sees.
"""
import json
import sys
import traceback

import mxnet as mx
import numpy as np
from contract_nets import RATE, Run, gradients
from mxnet import gluon, nd

import gluon_optim as go

SHAPES = ((15, 10), (1,), (7,))
SHARES = (0.25, 0.75)
FROZEN = gluon.Parameter('frozen', shape=(1,), grad_req='null')
FROZEN.initialize()

STORE = mx.kv.create(sys.argv[1])
_keys = 0


def on_servers(run, name, arguments, update_on_kvstore):
    """``run`` with another trainer, on the store."""
    global _keys
    run.trainer = gluon.Trainer([FROZEN] * _keys + run.parameters, name, arguments, kvstore=STORE,
                                update_on_kvstore=update_on_kvstore)
    run.trainer._params_to_init = list(run.parameters)
    _keys += len(run.parameters)
    return run


def with_multipliers(run):
    for i, p in enumerate(run.parameters):
        p.lr_mult, p.wd_mult = (0.5, 1.0, 2.0)[i], (3.0, 0.0, 1.0)[i]
    return run


def train(run, steps, share=1.0, scheduled=False):
    """Under a scheduler, then with a rate set by hand, another decay and another batch size."""
    for t in range(steps):
        if t == steps // 2:
            run.optimizer.lr_scheduler = None
            run.trainer.set_learning_rate(RATE / 4)
        if t == steps * 3 // 4:
            run.optimizer.wd = 0.5 * run.optimizer.wd
            run.parameters[0].lr_mult = 0.25
        run.step([share * g for g in gradients(t, SHAPES)], batch_size=2 if t < steps * 3 // 4 else 4)
    return run.weights()


def arguments_of(name, given, steps):
    """Of an optimizer: `given`, a scheduler, and a decay where it has one."""
    scheduler = mx.lr_scheduler.FactorScheduler(step=max(steps // 10, 1), factor=0.75, base_lr=RATE)
    try:
        go.create(name, wd=0.125)
    except ValueError:
        return dict(given, lr_scheduler=scheduler)
    return dict(given, lr_scheduler=scheduler, wd=0.125)


def compare(name, given, update_on_kvstore, steps, dtype='float32'):
    """How far the weights are from those of one process, relative to the largest of a parameter; or why it was refused."""
    make = lambda: with_multipliers(Run('sgd', {}, dtype, shapes=SHAPES))  # noqa: E731
    run = on_servers(make(), go.create(name, **arguments_of(name, given, steps)), None, update_on_kvstore)
    begin = run.weights()
    try:
        found = train(run, steps, SHARES[STORE.rank])
    except ValueError as error:
        assert all((begin[key] == value).all() for key, value in run.weights().items())
        return str(error)
    alone = make()
    alone.trainer = gluon.Trainer(alone.parameters, go.create(name, **arguments_of(name, given, steps)), kvstore=None)
    expected = train(alone, steps)
    return max(float(np.max(np.abs(found[key] - expected[key])) / np.max(np.abs(expected[key]))) for key in expected)


def main():
    for case in json.loads(sys.argv[2]):
        try:
            answer = compare(*case)
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps([case, answer]), flush=True)
    nd.waitall()
    STORE._barrier()


if __name__ == '__main__':
    main()
