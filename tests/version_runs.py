"""A run of a small net on the MXNet that is installed, which another MXNet may have begun.

    python version_runs.py '[{"name": "adam", "arguments": {}, "load": null, "save": "a", "steps": [0, 3], "dtype": "float32"}]'

prints the weights that each run comes to, by structural name.
"""
import json
import os
import sys
import warnings

import numpy as np
from contract_nets import array, backward_through, small_net, structural, trainer_with

import gluon_optim as go


def run(name, arguments, load, save, steps, dtype):
    net = small_net(dtype=dtype)
    for i, (_, p) in enumerate(sorted(structural(net).items())):
        p.set_data(array(np.random.RandomState(i).standard_normal(p.shape), dtype=p.dtype))
    trainer = trainer_with(net.collect_params(), go.create(name, **arguments))
    if load:
        go.load_checkpoint(load, net=net, trainer=trainer)
    for step in range(*steps):
        backward_through(net, step)
        trainer.step(1)
    if save:
        go.save_checkpoint(save, net=net, trainer=trainer)
    return {key: p.data().asnumpy().tolist() for key, p in structural(net).items()}


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    print(json.dumps([run(**job) for job in json.loads(sys.argv[1])]))
    sys.stdout.flush()
    os._exit(0)
