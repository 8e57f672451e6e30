"""A small training run that can be saved and resumed, here or (as a script) in a process of its own."""
import hashlib
import json
import os
import sys

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

import gluon_optim as go
from gluon_optim.mxnet.trainer import export_states

BATCH = 8


class HalfDense(gluon.nn.HybridBlock):
    """A dense layer with float16 parameters that computes in float32: MXNet multiplies no float16 matrices on the CPU."""

    def __init__(self, units, inputs, **kwargs):
        super().__init__(**kwargs)
        self.weight = self.params.get('weight', shape=(units, inputs), dtype='float16', init=mx.init.Normal(0.1))

    def hybrid_forward(self, F, x, weight):
        return F.dot(x, F.cast(weight, 'float32'), transpose_b=True)


class UserScheduler:
    """A user's own: halves the rate at every third question."""

    def __init__(self, base_lr=0.1):
        self.base_lr, self.asked = base_lr, 0

    def __call__(self, num_update):
        self.asked += 1
        return self.base_lr * 0.5 ** (self.asked // 3)

    def get_config(self):
        return {'base_lr': self.base_lr, 'asked': self.asked}

    def set_config(self, config):
        self.base_lr, self.asked = config['base_lr'], config['asked']


def make_net(contexts, half=False, norm=True):
    """Convolution, batch norm (its running statistics are parameters without gradient) and two dense layers."""
    mx.random.seed(0)
    net = gluon.nn.HybridSequential()
    with net.name_scope():
        net.add(gluon.nn.Conv2D(3, 3, in_channels=2),
                gluon.nn.BatchNorm(in_channels=3) if norm else gluon.nn.Activation('relu'),
                gluon.nn.Flatten(),
                HalfDense(6, 3 * 4 * 4) if half else gluon.nn.Dense(6, in_units=3 * 4 * 4), gluon.nn.Dense(4, in_units=6))
    net.initialize(mx.init.Normal(0.1), ctx=contexts)
    return net


def make(config):
    """Net and trainer of a configuration: contexts, half, norm, optimizer, arguments, scheduler, kvstore, update_on_kvstore."""
    net = make_net([mx.cpu(i) for i in config.get('contexts', [0])], config.get('half', False), config.get('norm', True))
    arguments = dict(config.get('arguments', {}))
    if config.get('scheduler'):
        name, options = config['scheduler']
        scheduler = UserScheduler if name == 'UserScheduler' else getattr(mx.lr_scheduler, name)
        arguments['lr_scheduler'] = scheduler(**options)
    kvstore = config.get('kvstore', 'device')
    if kvstore and config.get('update_on_kvstore') and len(config.get('contexts', [0])) == 1:
        kvstore = mx.kv.create(kvstore)  # given its name, MXNet makes none for one device
    trainer = gluon.Trainer(net.collect_params(), config.get('optimizer', 'novograd'), arguments, kvstore=kvstore,
                            update_on_kvstore=config.get('update_on_kvstore'))
    return net, trainer


def train(net, trainer, start, stop):
    """Steps ``start`` to ``stop``; the data of a step depend on its number only."""
    for step in range(start, stop):
        chance = np.random.RandomState(step)
        data, label = chance.randn(BATCH, 2, 6, 6).astype('float32'), chance.randint(0, 4, BATCH)
        contexts = trainer._contexts
        loss = gluon.loss.SoftmaxCrossEntropyLoss()
        with autograd.record():
            losses = [loss(net(x), y) for x, y in zip(gluon.utils.split_and_load(mx.nd.array(data), contexts),
                                                      gluon.utils.split_and_load(mx.nd.array(label), contexts))]
        autograd.backward(losses)
        trainer.step(BATCH)


def facts(net, trainer):
    """All that two equal runs have in common, as JSON has it."""
    states = export_states(trainer, net)
    weights = hashlib.sha256()
    for name, parameter in sorted(net._collect_params_with_prefix().items()):
        copies = {data.asnumpy().tobytes() for data in parameter.list_data()}
        if parameter.grad_req != 'null':  # the devices' running statistics differ, and are saved as their mean
            assert len(copies) == 1, f'{name} differs between devices'
            weights.update(copies.pop())
    return {
        'weights': weights.hexdigest(),
        'slots': {f'{name}/{slot}': hashlib.sha256(array.tobytes()).hexdigest() for name, slots in states.slots.items()
                  for slot, array in slots.items()},
        'masters': {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in states.master.items()},
        'counts': states.counts,
        'num_update': states.num_update,
        'rate': trainer.learning_rate,
        'scheduler': states.scheduler and states.scheduler['attributes'],
        'hypers': {name: value for name, value in states.hypers.items() if name != 'rescale_grad'},  # set by each step
    }


def resume(config, path, start, stop, loader='go'):
    """Load what was saved under ``path`` into a new net and trainer and go on. The facts after loading and at the end."""
    net, trainer = make(config)
    net.load_parameters(path + '.params', ctx=trainer._contexts)
    report = go.load_states(trainer, path + '.states', net) if loader == 'go' else trainer.load_states(path + '.native')
    loaded = facts(net, trainer)
    train(net, trainer, start, stop)
    return {'report': str(report), 'loaded': loaded, 'end': facts(net, trainer)}


if __name__ == '__main__':
    json.dump(resume(*json.loads(sys.argv[1])), sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # MXNet's own exit takes a second
