"""Prints by how many megabytes a process grows at most in a call on 100 MB of gradients. Arguments: dtype, function."""
import json
import resource
import sys

import mxnet as mx

import gluon_optim as go

dtype, function = sys.argv[1:]
elements = 100 * 2 ** 20 // {'float16': 2, 'float32': 4}[dtype]
parameter = mx.gluon.Parameter('w', shape=(elements,), dtype=dtype)
parameter.initialize(mx.init.Zero())
trainer = mx.gluon.Trainer([parameter], 'sgd')
with mx.autograd.record():
    loss = parameter.data().sum().astype('float32')
loss.backward()
warm = mx.gluon.Parameter('v', shape=(70000,), dtype=dtype)  # so that libraries have what they need
warm.initialize(mx.init.Zero())
small = mx.gluon.Trainer([warm], 'sgd')
with mx.autograd.record():
    loss = warm.data().sum().astype('float32')
loss.backward()


def call(trainer):
    if function == 'Scaler':
        scaler = go.gradients.Scaler(trainer)
        scaler.scale(mx.nd.ones(1))
        scaler.unscale()
    else:
        getattr(go.gradients, function)(trainer, *([0.7] if function.startswith('clip') else []))
    mx.nd.waitall()


call(small)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(trainer)
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
