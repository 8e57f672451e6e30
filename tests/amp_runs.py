"""AMP with our Scaler and with its own, in this process: `amp.init` changes MXNet's operators. Prints what came out, as JSON."""
import json

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.contrib import amp

import gluon_optim as go


def start(scaler):
    parameter = gluon.Parameter('w', shape=(3,))
    parameter.initialize(mx.init.One())
    trainer = gluon.Trainer([parameter], 'adamw')
    amp.init_trainer(trainer)
    return parameter, trainer, go.gradients.Scaler(trainer) if scaler else None


def train(ours):
    """Weights after four steps, the third of which overflows; with our Scaler also the scale and the number of updates."""
    parameter, trainer, scaler = start(ours)
    weights, scales, updates = [], [], []
    for step, factor in enumerate((1e-4, 1e-4, 1e38, 1e-4)):
        with autograd.record():
            loss = (mx.nd.elemwise_mul(parameter.data(), parameter.data()).astype('float32') * factor).sum()
            if ours and step < 2:
                scaled = scaler.scale(loss)
            else:
                with amp.scale_loss(loss, trainer) as scaled:
                    pass
        scaled.backward()
        if ours and step < 2:
            scaler.step(1)
            scaler.update()
        else:
            trainer.step(1)
        weights.append(parameter.data().asnumpy().tobytes().hex())
        scales.append(trainer._amp_loss_scaler.loss_scale)
        updates.append(trainer.optimizer.num_update)
    assert np.isfinite(parameter.data().asnumpy()).all()
    return weights, scales, updates


def main():
    amp.init(target_precision_ops=['elemwise_mul'])  # of the operators that AMP runs in float16, the CPU has this one
    ours, scales, updates = train(True)
    theirs, *_ = train(False)
    _, trainer, scaler = start(True)
    amp.init_trainer(trainer)
    try:
        replaced = 'nothing'
        scaler.scale(mx.nd.ones(1))
    except ValueError as error:
        replaced = 'another loss scaler' if 'another loss scaler' in str(error) else str(error)
    print(json.dumps({'ours': ours, 'amp': theirs, 'scale': scales, 'updates': updates, 'replaced': replaced}))


if __name__ == '__main__':
    main()
