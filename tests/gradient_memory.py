"""Prints by how many megabytes a process grows at most in a call on 100 MB of gradients. Arguments: dtype, function."""
import json
import re
import sys
from pathlib import Path

import mxnet as mx

import gluon_optim as go


def trainer_of(elements, dtype):
    """A trainer of one parameter with a gradient of ones."""
    parameter = mx.gluon.Parameter('w', shape=(elements,), dtype=dtype)
    parameter.initialize(mx.init.Zero())
    trainer = mx.gluon.Trainer([parameter], 'sgd')
    with mx.autograd.record():
        loss = parameter.data().sum().astype('float32')
    loss.backward()
    return trainer


def call(trainer, function):
    if function == 'Scaler':
        scaler = go.gradients.Scaler(trainer)
        scaler.scale(mx.nd.ones(1))
        scaler.unscale()
    else:
        getattr(go.gradients, function)(trainer, *([0.7] if function.startswith('clip') else []))
    mx.nd.waitall()


def megabytes(what):
    return int(re.search(rf'{what}:\s+(\d+) kB', Path('/proc/self/status').read_text()).group(1)) / 1024


def main(dtype, function):
    trainer = trainer_of(100 * 2 ** 20 // {'float16': 2, 'float32': 4}[dtype], dtype)
    call(trainer_of(70000, dtype), function)      # so that libraries have what they need
    Path('/proc/self/clear_refs').write_text('5')  # the largest size from now on
    before = megabytes('VmRSS')
    call(trainer, function)
    print(json.dumps(megabytes('VmHWM') - before))


if __name__ == '__main__':
    main(*sys.argv[1:])
