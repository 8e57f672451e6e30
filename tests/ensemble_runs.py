"""A run with a snapshot at the end of each cycle, which tests kill: python ensemble_runs.py FOLDER STEPS [THEN-SLEEP]

prints each step when it is on the disk, and at the end, as JSON, digests of weights and states and what the ensemble predicts.
"""
import json
import sys
import time

import mxnet as mx
import numpy as np
from checkpoint_runs import facts, make, train

import gluon_optim as go

CYCLE = 3


def start(folder, **options):
    """Net, trainer, snapshots, and the step that the run has reached."""
    net, trainer = make({'scheduler': ('CosineScheduler', {'max_update': 100, 'base_lr': 0.05})})
    manager = go.CheckpointManager(folder, **{'keep_last': 1, **options})
    restored = manager.restore_latest(net=net, trainer=trainer)
    return net, trainer, go.ensemble.Snapshots(manager, net, trainer, cycle=CYCLE), restored.step if restored else 0


def predicted(snapshots):
    x = mx.nd.array(np.random.RandomState(0).randn(5, 2, 6, 6))
    return snapshots.predict(x).asnumpy().tolist()


def run(folder, steps):
    net, trainer, snapshots, reached = start(folder)
    for step in range(reached + 1, steps + 1):
        train(net, trainer, 1)
        snapshots.save(step)
        print(step, flush=True)
    return {'facts': facts(net, trainer), 'kept': snapshots.steps(), 'predicted': predicted(snapshots)}


if __name__ == '__main__':
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]))))
    time.sleep(float(sys.argv[3]) if len(sys.argv) > 3 else 0)
