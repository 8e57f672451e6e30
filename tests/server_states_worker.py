"""A worker of a cluster for test_server_states.py: does what the options say, and prints what it found.

Gradients are multiples of 1/16, and each worker gives a part of them: their sum is exact in every order, so that a cluster
computes what one process does.
"""
import json
import random
import sys
import time
import traceback
import warnings

import mxnet as mx
import numpy as np
import server_optimizers  # noqa: F401 (registers optimizers)
from contract_nets import Run, gradients
from mxnet import autograd, gluon

import gluon_optim as go
from gluon_optim.mxnet.distributed import remote

SHAPES = ((3, 4), (1,), (2, 3, 25))  # with a bound of 100 the last is divided among servers


def made(options, kvstore=None):
    """The run, in a cluster or in one process; with a scheduler where the options say so."""
    arguments = dict(options.get('arguments', {}))
    if options.get('scheduler'):
        arguments['lr_scheduler'] = mx.lr_scheduler.FactorScheduler(step=7, factor=0.75, base_lr=0.0625)
    if options.get('accelerate'):
        go.accelerate(options['name'])
    try:
        run = Run(options['name'], arguments, options.get('dtype', 'float32'), shapes=SHAPES, kvstore=kvstore)
        run.trainer._compression_params = options.get('compression')  # as the constructor keeps them
        return run
    finally:
        go.restore_builtins()


def train(run, steps, share=1.0, late=False):
    """``late``: the first parameter joins in the fourth step, so that counts differ."""
    for t in range(run.steps, steps):
        wanted = 'null' if late and t < 3 else 'write'
        if run.parameters[0].grad_req != wanted:
            run.parameters[0].grad_req = wanted
        run.step([share * g for g in gradients(t, SHAPES)])


def found_in(run):
    return {'digest': go.states_digest(run.trainer),
            'weights': {name: array.tobytes().hex() for name, array in run.weights().items()}}


def straight(options, kvstore, share, again=False):
    """Train, with a checkpoint in the middle, or from one. ``again``: another trainer of this store did so before."""
    run = made(options, kvstore)
    found = {}
    if 'load' in options:
        run.parameters[0].set_data(mx.nd.full(SHAPES[0], kvstore.rank - 7.0))  # the file has other weights
    if again:
        use_again(run.trainer, dict(enumerate(run.weights().values())))
    if 'load' in options:
        restored = go.load_checkpoint(options['load'] if kvstore.rank == 0 else 'there is no such file', trainer=run.trainer)
        found['restored'] = [restored['fold'], restored.step, str(restored.states)]
        run.steps = restored.step
    if 'save' in options:
        train(run, options['middle'], share, options.get('late'))
        go.save_checkpoint(options['save'] if kvstore.rank == 0 else '/no/such/folder/file', trainer=run.trainer,
                           extra={'fold': 3}, step=run.steps)
    train(run, options['steps'], share, options.get('late'))
    return dict(found, **found_in(run))


def many(options, kvstore, share):
    """The runs in ``jobs``, one after the other, each as `straight` does it, or the error of one that raises."""
    found = []
    for number, job in enumerate(options['jobs']):
        try:
            found.append(straight(dict(options, **job), kvstore, share, again=number > 0))
        except Exception:
            found.append({'error': traceback.format_exc()})
    return {'jobs': found}


def use_again(trainer, weights):
    """Let a new trainer have the keys of the one before, for a store gets initial weights for each of them only once."""
    trainer._params_to_init = []
    trainer._init_kvstore()
    remote.send(trainer, remote.Load({}, weights))


def refused(options, kvstore, share):
    """A file of another optimizer, and one that does not fit here on the second worker: before the first step and in the middle.

    Afterwards the run is as if nobody had tried.
    """
    run = made(options, kvstore)
    wrong = gluon.nn.Dense(1, in_units=2) if kvstore.rank == 1 else None
    found = []
    for steps in (0, options['steps'] // 2):
        train(run, steps, share)
        tried = []
        for load, path in ((lambda path: go.load_checkpoint(path, trainer=run.trainer), options['load']),
                           (lambda path: go.load_states(run.trainer, path), options['load']),
                           (lambda path: go.load_states(run.trainer, path, net=wrong), options['fits'])):
            try:
                load(path if kvstore.rank == 0 else 'there is no such file')
            except ValueError as error:
                tried.append(str(error))
        found.append({'tried': tried, 'started': run.trainer._kv_initialized})
    train(run, options['steps'], share)
    return dict(found_in(run), refused=found)


def absent(options, kvstore, share):
    """Only one worker saves."""
    run = made(options, kvstore)
    train(run, options['steps'], share)
    mx.nd.waitall()
    if kvstore.rank == options['rank']:
        go.save_states(run.trainer, options['save'])
    time.sleep(options['sleep'])
    return {}


def apart(options, kvstore, share):
    """One worker saves where the other loads."""
    run = made(options, kvstore)
    train(run, 2, share)
    try:
        (go.save_states if kvstore.rank else go.load_states)(run.trainer, options['save'])
    except ValueError as error:
        return {'error': str(error)}
    return {}


def unwritable(options, kvstore, share):
    """The first worker cannot write."""
    run = made(options, kvstore)
    train(run, 2, share)
    try:
        go.save_states(run.trainer, '/no/such/folder/file')
    except (OSError, ValueError) as error:
        return {'error': str(error), 'kind': type(error).__name__}
    return {}


def managed(options, kvstore, share):
    """A net with running statistics, dropout, and a part that is not trained, in a loop with a manager."""
    mx.random.seed(options['seed'])
    np.random.seed(kvstore.rank + options['seed'])  # noqa: NPY002  the global generator is what a checkpoint has
    random.seed(kvstore.rank + options['seed'])
    net = gluon.nn.HybridSequential(prefix='net_')
    with net.name_scope():
        net.add(gluon.nn.Dense(6, in_units=4), gluon.nn.BatchNorm(in_channels=6), gluon.nn.Dropout(0.5),
                gluon.nn.Dense(2, in_units=6))
    net.initialize(mx.init.Uniform(0.5))
    mx.random.seed(kvstore.rank + options['seed'])
    trained = {name: parameter for name, parameter in net.collect_params().items() if 'dense0' not in name}
    trainer = gluon.Trainer(trained, 'adamw', {'learning_rate': 0.125}, kvstore=kvstore)
    folder = options['folder'] if kvstore.rank == 0 else f'{options["folder"]}/not on this machine'
    drawn = []
    with go.CheckpointManager(folder, keep_last=2, save_every=2, background=options['background']) as manager:
        restored = manager.restore_latest(net=net, trainer=trainer)
        begin = restored.step if restored else 0
        after = {name: array.data().asnumpy().tolist() for name, array in net.collect_params().items()}
        for step in range(begin + 1, options['steps'] + 1):
            x = mx.nd.array(np.random.RandomState(step + 100 * kvstore.rank).normal(size=(8, 4)))
            with autograd.record():
                loss = (net(x) ** 2).mean()
            loss.backward()
            trainer.step(kvstore.num_workers)
            drawn.append([step, float(loss.asscalar()), np.random.rand(), random.random()])  # noqa: NPY002
            manager.save(step, net=net, trainer=trainer, metrics={'loss': float(loss.asscalar())})
        manager.wait()
        steps = manager.steps()
        digest = go.states_digest(trainer, net)
    return {'begin': begin, 'after': after, 'drawn': drawn, 'steps': steps, 'digest': digest,
            'path': restored.path if restored else None}


def main(options):
    warnings.simplefilter('ignore')
    kvstore = mx.kv.create(options.get('kvstore', 'dist_sync'))
    others = kvstore.num_workers - 1
    share = 0.25 if kvstore.rank else 1 - 0.25 * others
    found = globals()[options.get('do', 'straight')](options, kvstore, share)
    print(json.dumps(dict(found, rank=kvstore.rank)), flush=True)


if __name__ == '__main__':
    main(json.loads(sys.argv[1]))
