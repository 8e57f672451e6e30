"""A run that prints every rate and, at the end, a digest: python plateau_runs.py FOLDER [the step at which to die]."""
import os
import signal
import sys

import mxnet as mx
from mxnet import autograd, gluon

import gluon_optim as go

STEPS = 40
S = go.lr_scheduler


def main(folder, die=None):
    net = gluon.nn.Dense(1, in_units=4)
    net.initialize(mx.init.One())
    plateau = S.Plateau(0.05, factor=0.5, patience=0, threshold=0.3)
    schedule = S.Chain([(12, S.Warmup(S.Cosine(20, 0.05), 6)), (None, plateau)])
    trainer = gluon.Trainer(net.collect_params(), 'sgd_torch', {'momentum': 0.5, 'lr_scheduler': schedule})
    with go.CheckpointManager(folder) as manager:
        restored = manager.restore_latest(net=net, trainer=trainer)
        for step in range(restored.step + 1 if restored else 1, STEPS + 1):
            with autograd.record():
                loss = (net(mx.nd.array([[1, 2, 3, 4], [0, 1, 0, step % 3]])) ** 2).mean()
            loss.backward()
            trainer.step(2)
            print(step, repr(trainer.learning_rate), flush=True)
            if step > 12 and step % 4 == 0:
                plateau.observe(float(loss.asscalar()))
            if step % 5 == 0:
                manager.save(step, net=net, trainer=trainer)
            if step == die:
                manager.wait()
                os.kill(os.getpid(), signal.SIGKILL)
    print('digest', go.states_digest(trainer), net.weight.data().asnumpy().tobytes().hex())


if __name__ == '__main__':
    main(sys.argv[1], *map(int, sys.argv[2:]))
