"""Runs with all that a checkpoint has to bring back: dropout, NumPy's and Python's random numbers, AMP's loss scaler, schedulers.

As a script it resumes, in one process, the runs that the JSON on its standard input lists, and prints what came out of each.
"""
# ruff: noqa: NPY002  the global generators are what a checkpoint brings back
import hashlib
import json
import random

import jobs
import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.contrib.amp.loss_scaler import LossScaler
from resume import HalfDense, UserScheduler

import gluon_optim as go
from gluon_optim.mxnet.trainer import export_states


def make_net(contexts, half=False, head=4, plain=False):
    """Convolution, batch norm, dropout, two dense layers; or two dense layers only."""
    with mx.name.NameManager():  # counted from 0: where `dense10_` sorts before `dense9_`, noise is drawn in another order
        return _make_net(contexts, half, head, plain)


def _make_net(contexts, half, head, plain):
    net = gluon.nn.HybridSequential()
    if plain:
        net.add(gluon.nn.Flatten(), gluon.nn.Dense(6, in_units=2 * 6 * 6, activation='tanh'), gluon.nn.Dense(head, in_units=6))
    else:
        net.add(gluon.nn.Conv2D(3, 3, in_channels=2), gluon.nn.BatchNorm(in_channels=3), gluon.nn.Flatten(), gluon.nn.Dropout(0.3),
                HalfDense(6, 3 * 4 * 4) if half else gluon.nn.Dense(6, in_units=3 * 4 * 4), gluon.nn.Dense(head, in_units=6))
    net.initialize(mx.init.Normal(0.1), ctx=[mx.cpu(k) for k in contexts])
    return net


def make(config, seed=0):
    """Net and trainer; ``config`` is what is asked of it below."""
    mx.random.seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    contexts = config.get('contexts', [0])
    net = make_net(contexts, config.get('half', False), config.get('head', 4), config.get('plain', False))
    arguments = dict(config.get('arguments', {}))
    if config.get('scheduler'):
        name, options = config['scheduler']
        cls = UserScheduler if name == 'UserScheduler' else getattr(mx.lr_scheduler, name)
        arguments['lr_scheduler'] = cls(**options)
    trainer = gluon.Trainer(net.collect_params(), go.create(config.get('optimizer', 'novograd'), **arguments),
                            kvstore=config.get('kvstore', 'device'), update_on_kvstore=config.get('update_on_kvstore'))
    if config.get('amp'):
        scaler = trainer._amp_loss_scaler = LossScaler()  # as amp.init_trainer does
        scaler._loss_scale, scaler._next_loss_scale, scaler._scale_seq_len = 8.0, 8.0, 4
    return net, trainer


def train(net, trainer, steps):
    for _ in range(steps):
        data, label = np.random.randn(8, 2, 6, 6) * (1 + random.random()), np.random.randint(0, 4, 8)
        scaler = getattr(trainer, '_amp_loss_scaler', None)
        scale = scaler.loss_scale if scaler else 1
        loss = gluon.loss.SoftmaxCrossEntropyLoss()
        batches = zip(*(gluon.utils.split_and_load(mx.nd.array(array), trainer._contexts) for array in (data, label)))
        with autograd.record():
            losses = [loss(net(x), y) * scale for x, y in batches]
        autograd.backward(losses)
        trainer.step(8 * scale)


def facts(net, trainer, noise=True):
    """All that two equal runs have in common, as JSON has it. ``noise`` asks the generators, which goes on with them."""
    states = export_states(trainer, net)
    scaler = getattr(trainer, '_amp_loss_scaler', None)
    found = {
        # every copy of every parameter: the running statistics of two devices differ
        'weights': {name: [hashlib.sha256(data.asnumpy().tobytes()).hexdigest() for data in parameter.list_data()]
                    for name, parameter in net._collect_params_with_prefix().items()},
        'states': go.states_digest(trainer, net), 'counts': states.counts, 'num_update': states.num_update,
        'rate': trainer.learning_rate, 'scheduler': states.scheduler and states.scheduler['attributes'],
        'hypers': {name: value for name, value in states.hypers.items() if name != 'rescale_grad'},  # set by each step
        'scaler': scaler and {key: value for key, value in vars(scaler).items() if isinstance(value, (int, float))},
    }
    if noise:
        found['noise'] = [np.random.rand(), np.random.randn(), random.gauss(0, 1), random.gauss(0, 1)] + [
            mx.nd.random.normal(shape=(3,), ctx=context).asnumpy().tolist() for context in trainer._contexts]
    return json.loads(json.dumps(found))


def resume(config, path, steps):
    net, trainer = make(config, seed=99)  # another seed: nothing that is right may come from the first one
    restored = go.load_checkpoint(path, net=net, trainer=trainer)
    loaded = facts(net, trainer, noise=False)
    train(net, trainer, steps)
    return {'extra': restored, 'epoch': restored.epoch, 'batch': restored.batch, 'loaded': loaded, 'end': facts(net, trainer)}


if __name__ == '__main__':
    jobs.do_all(resume)
