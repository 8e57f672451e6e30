"""A worker of a cluster for test_watch.py: trains as the options say, under `go.watch`."""
import json
import sys
import time

import mxnet as mx
from contract_nets import gradients
from failing_optimizer import FailsOnServers
from mxnet import gluon
from server_states_worker import SHAPES, found_in, made

import gluon_optim as go


def trainer_of(run, options, kvstore):
    """Where the options name a kind of store, the trainer makes it in its first step."""
    kvstore = options.get('kvstore', kvstore)
    optimizer = FailsOnServers() if options.get('fails') else go.create('adamw', learning_rate=0.0625)
    return gluon.Trainer(run.parameters, optimizer, kvstore=kvstore, update_on_kvstore=options.get('update_on_kvstore'))


def main(options):
    store = None if 'kvstore' in options else mx.kv.create('dist_sync')
    run = made({'name': 'adamw'})
    run.trainer = trainer_of(run, options, store)
    watched = go.watch(run.trainer, options.get('deadline', 15)) if options.get('watch', True) else None
    with go.CheckpointManager(options.get('folder', 'nowhere'), save_every=5 if 'folder' in options else 10 ** 9) as manager:
        if 'folder' in options:
            restored = manager.restore_latest(trainer=run.trainer)
            run.steps = restored.step if restored else 0
            print(f'begins at {run.steps}', flush=True)
        for t in range(run.steps, run.steps + options['steps']):
            run.step([0.5 * g for g in gradients(t, SHAPES)])
            rank = run.trainer._kvstore.rank
            if t == options.get('raise_at') and rank == 1:
                raise ArithmeticError('it has had enough')
            print(f'rank {rank} step {t + 1}', flush=True)
            if 'folder' in options:
                manager.save(t + 1, trainer=run.trainer)
    if options.get('stop') == rank:
        watched.stop()
    if options.get('late') == rank:
        time.sleep(options['seconds'])
    if 'folder' in options:
        print(json.dumps(found_in(run)), flush=True)


if __name__ == '__main__':
    main(json.loads(sys.argv[1]))
