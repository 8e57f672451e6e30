"""A worker of a cluster for test_watch.py: trains as the options say, under `go.watch`."""
import json
import sys
import time

import mxnet as mx
from contract_nets import gradients
from failing_optimizer import FailsOnServers
from server_states_worker import SHAPES, found_in, made
from mxnet import gluon

import gluon_optim as go


def main(options):
    store = mx.kv.create(options.get('kvstore', 'dist_sync'))
    run = made(dict(options, name='adamw'), store)
    if options.get('fails'):
        run.trainer = gluon.Trainer(run.parameters, FailsOnServers(), kvstore=store)
    if options.get('update_on_kvstore') is False:
        run.trainer = gluon.Trainer(run.parameters, 'adamw', kvstore=store, update_on_kvstore=False)
    if options.get('watch', True):
        go.watch(run.trainer, deadline=options.get('deadline', 15))
    if options.get('load'):
        run.steps = go.load_checkpoint(options['load'], trainer=run.trainer).step
    for t in range(run.steps, options['steps']):
        run.step([g / store.num_workers for g in gradients(t, SHAPES)])
        if t + 1 == options.get('save_at'):
            go.save_checkpoint(options['save'], trainer=run.trainer, step=t + 1)
        if t == options.get('raise_at') and store.rank == 1:
            raise ArithmeticError('worker 1 has had enough')
        time.sleep(options.get('pause', 0))
        print(f'rank {store.rank} step {t + 1}', flush=True)
    if store.rank == options.get('late'):
        time.sleep(10)
    if options.get('found'):
        print(json.dumps(found_in(run)), flush=True)


if __name__ == '__main__':
    main(json.loads(sys.argv[1]))
