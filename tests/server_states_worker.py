"""A worker of a cluster for test_server_states.py: trains, saves and loads as the options say, and prints what it found.

Gradients are multiples of 1/16, and each worker gives a part of them: their sum is exact in every order.
"""
import json
import sys

import mxnet as mx
from contract_nets import Run, gradients

import gluon_optim as go

SHAPES = ((3, 4), (1,), (2, 3, 25))  # with a bound of 20 the last is divided among servers


def share(kvstore, gradient):
    first = gradient * 0.25
    return gradient - first * (kvstore.num_workers - 1) if kvstore.rank == 0 else first


def main(options):
    kvstore = mx.kv.create(options.get('kvstore', 'dist_sync'))
    arguments = dict(options.get('arguments', {}))
    if options.get('scheduler'):
        arguments['lr_scheduler'] = mx.lr_scheduler.FactorScheduler(step=7, factor=0.75, base_lr=0.0625)
    run = Run(options['name'], arguments, options.get('dtype', 'float32'), shapes=SHAPES, kvstore=kvstore)
    found = {'rank': kvstore.rank}
    if options.get('load') and kvstore.rank != 0:
        run.parameters[0].set_data(run.parameters[0].data() * 0 - 7)  # what the first worker does not have
    if options.get('load'):
        restored = go.load_checkpoint(options['load'] if kvstore.rank == 0 else 'no such file', trainer=run.trainer)
        found['restored'] = [restored['fold'], restored.step, str(restored.states)]
        run.steps = restored.step
    for t in range(run.steps, run.steps + options['steps']):
        run.step([share(kvstore, g) for g in gradients(t, SHAPES)])
    if options.get('save'):
        go.save_checkpoint(options['save'] if kvstore.rank == 0 else '/no/such/folder/file', trainer=run.trainer,
                           extra={'fold': 3}, step=run.steps)
    found['digest'] = go.states_digest(run.trainer)
    found['weights'] = {name: array.tobytes().hex() for name, array in run.weights().items()}
    print(json.dumps(found), flush=True)


if __name__ == '__main__':
    main(json.loads(sys.argv[1]))
