"""A worker of a cluster for test_watch.py: trains as the options say, under `go.watch`."""
import ctypes
import json
import multiprocessing
import sys
import time

import mxnet as mx
import numpy as np
from contract_nets import gradients
from failing_optimizer import FailsOnServers
from mxnet import gluon
from server_states_worker import SHAPES, found_in, made

import gluon_optim as go


def trainer_of(run, options, kvstore):
    """Where the options name a kind of store, the trainer makes it in its first step."""
    kvstore = options.get('kvstore', kvstore)
    optimizer = FailsOnServers() if options.get('fails') else options.get('mxnet') or go.create('adamw', learning_rate=0.0625)
    return gluon.Trainer(run.parameters, optimizer, kvstore=kvstore, update_on_kvstore=options.get('update_on_kvstore'))


def sleep(seconds):
    time.sleep(seconds)


def compute(seconds):
    """Products of large matrices, each of which takes long."""
    matrix = np.ones((1500, 1500))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        matrix @ matrix


def wait_in_c(seconds):
    """One call, which does not hold Python's lock."""
    ctypes.CDLL(None).usleep(int(1e6 * seconds))


def hold_the_lock(seconds):
    """One call, during which no other thread runs Python."""
    ctypes.PyDLL(None).usleep(int(1e6 * seconds))


def pause(kinds):
    for kind, seconds in kinds.items():
        globals()[kind](seconds)


def refused_step(run):
    """One that is an error before anything is sent, for a reason that can be taken back."""
    optimizer = run.trainer._optimizer
    optimizer.begin_num_update += 1
    try:
        run.trainer.step(1)
    except ValueError:
        optimizer.begin_num_update -= 1
    else:
        raise AssertionError('no error')


def loader():
    """Loads by two processes that are forked from this one; and a third that does not care about the others."""
    multiprocessing.Process(target=time.sleep, args=(600,), daemon=True).start()
    return gluon.data.DataLoader(gluon.data.ArrayDataset(mx.nd.zeros((8, 1))), 2, num_workers=2)


def main(options):
    store = None if 'kvstore' in options else mx.kv.create('dist_sync')
    run = made({'name': 'adamw'})
    run.trainer = trainer_of(run, options, store)
    deadline = options.get('deadlines', {}).get(str(store.rank) if store else '', options.get('deadline', 15))
    if store and store.rank == 1:
        time.sleep(options.get('wait', 0))
    if options.get('only') in (None, store and store.rank):
        watched = go.watch(run.trainer, deadline)
        print('watches', flush=True)
    batches = loader() if options.get('loader') else []
    with go.CheckpointManager(options.get('folder', 'nowhere'), save_every=5 if 'folder' in options else 10 ** 9) as manager:
        if 'folder' in options:
            restored = manager.restore_latest(trainer=run.trainer)
            run.steps = restored.step if restored else 0
            print(f'begins at {run.steps}', flush=True)
        for t in range(run.steps, run.steps + options['steps']):
            run.step([0.5 * g for g in gradients(t, SHAPES)])
            rank = run.trainer._kvstore.rank
            if t == options.get('save_at') and rank == 1:
                go.save_states(run.trainer, 'nowhere.states')
            if t == options.get('raise_at') and rank == 1:
                raise ArithmeticError('it has had enough')
            if t == options.get('exit_at') and rank == 1:
                sys.exit(3)
            if t == 2 and rank == 1 and 'pauses' in options:
                refused_step(run)
                pause(options['pauses'])
            for _ in batches:
                pass
            print(f'rank {rank} step {t + 1}', flush=True)
            if 'folder' in options:
                manager.save(t + 1, trainer=run.trainer)
    if options.get('stop') == rank:
        watched.stop()
    if options.get('late') == rank:
        time.sleep(options['late_seconds'])
    if 'folder' in options:
        print(json.dumps(found_in(run)), flush=True)


if __name__ == '__main__':
    main(json.loads(sys.argv[1]))
