"""A worker that trains parameters of a given size for three steps, says so, and waits: its memory is then looked at."""
import json
import sys
import time

import mxnet as mx
from mxnet import gluon

import gluon_optim as go


def main(optimizer, arguments, params, tensors, dtype, updates):
    store = mx.kv.create('dist_sync')
    parameters = [gluon.Parameter(f'p{i}_weight', shape=(params // tensors,), dtype=dtype, init=mx.init.One())
                  for i in range(tensors)]
    for parameter in parameters:
        parameter.initialize()
    trainer = gluon.Trainer(parameters, go.create(optimizer, learning_rate=0.001, **arguments), kvstore=store,
                            update_on_kvstore=updates)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad()[:] = 0.5
            parameter.data()._fresh_grad = True  # as backward says it
        trainer.step(1)
        mx.nd.waitall()
    print('trained', flush=True)
    time.sleep(600)


if __name__ == '__main__':
    main(**json.loads(sys.argv[1]))
