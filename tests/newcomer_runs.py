"""The three training loops that most people write first in Gluon, with a checkpoint every ten steps.

    python newcomer_runs.py LOOP FOLDER STEPS DEVICE [DROPOUT]

trains to step STEPS from the newest checkpoint in FOLDER, on contexts from mx.cpu(DEVICE) on. It prints step and loss after each
step, and at the end, as JSON, all that two equal runs have in common.

    python newcomer_runs.py record [LOOP...]

writes newcomer/: what each loop saved at steps 30 and 40, and its losses; without dropout, which draws other numbers elsewhere.
test_newcomer_loops.py continues from step 30 in other frameworks and compares with Gluon's continuation.
"""
# ruff: noqa: NPY002  the global generators are what a checkpoint brings back
import json
import os
import random
import sys
from pathlib import Path

import mxnet as mx
import numpy as np
from checkpoint_runs import facts
from mxnet import autograd, gluon
from mxnet.gluon import nn, rnn
from newcomer_data import COLUMNS, IMAGES, image_batch, text, text_batch

import gluon_optim as go

FIXTURES = Path(__file__).resolve().parent / 'newcomer'


def cnn(folder, steps, device, say, dropout=0.2):
    """Layers that are not told the size of their inputs, hybridized, on two contexts."""
    contexts = [mx.cpu(device), mx.cpu(device + 1)]
    net = nn.HybridSequential()
    net.add(nn.Conv2D(8, 3, padding=1), nn.BatchNorm(), nn.Activation('relu'), nn.MaxPool2D(),
            nn.Conv2D(16, 3, padding=1, activation='relu'), nn.MaxPool2D(), nn.Flatten(), nn.Dropout(dropout), nn.Dense(10))
    net.initialize(mx.init.Xavier(), ctx=contexts)
    net.hybridize()
    trainer = gluon.Trainer(net.collect_params(), 'novograd', {'learning_rate': 0.01, 'wd': 1e-3})
    loss = gluon.loss.SoftmaxCrossEntropyLoss()

    with go.CheckpointManager(folder, save_every=10) as manager:
        restored = manager.restore_latest(net=net, trainer=trainer)
        for step in range(restored.step if restored else 0, steps):
            halves = zip(*(gluon.utils.split_and_load(mx.nd.array(array), contexts) for array in image_batch(step)))
            with autograd.record():
                losses = [loss(net(x), y) for x, y in halves]
            autograd.backward(losses)
            trainer.step(IMAGES)
            say(step + 1, np.mean([each.asnumpy() for each in losses]))
            manager.save(step + 1, net=net, trainer=trainer)
    return net, trainer


class LanguageModel(gluon.HybridBlock):
    def __init__(self, words, dropout, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.embedding = nn.Embedding(words, 12)
            self.lstm = rnn.LSTM(20)
            self.dropout = nn.Dropout(dropout)
            self.output = nn.Dense(words, flatten=False)

    def hybrid_forward(self, F, tokens, hidden):
        states, hidden = self.lstm(self.embedding(tokens), hidden)
        return self.output(self.dropout(states)), hidden


def lstm(folder, steps, device, say, dropout=0.2):
    """The gradient is clipped, the rate scheduled, and the hidden state goes from one batch to the next."""
    context, words = mx.cpu(device), text()[1]
    net = LanguageModel(words, dropout)
    net.initialize(mx.init.Xavier(), ctx=context)
    net.hybridize()
    schedule = mx.lr_scheduler.CosineScheduler(max_update=60, base_lr=0.02, final_lr=0.001, warmup_steps=5)
    trainer = gluon.Trainer(net.collect_params(), 'adam', {'learning_rate': 0.02, 'lr_scheduler': schedule})
    loss = gluon.loss.SoftmaxCrossEntropyLoss()

    with go.CheckpointManager(folder, save_every=10) as manager:
        restored = manager.restore_latest(net=net, trainer=trainer)
        hidden = net.lstm.begin_state(COLUMNS, ctx=context)
        if restored:
            hidden = [mx.nd.array(array, ctx=context) for array in restored['hidden']]
        for step in range(restored.step if restored else 0, steps):
            tokens, following = (mx.nd.array(array, ctx=context) for array in text_batch(step))
            hidden = [array.detach() for array in hidden]
            with autograd.record():
                scores, hidden = net(tokens, hidden)
                losses = loss(scores.reshape((-1, words)), following.reshape(-1))
            losses.backward()
            gradients = [parameter.grad(context) for parameter in net.collect_params().values()]
            gluon.utils.clip_global_norm(gradients, 0.25 * losses.size)
            trainer.step(losses.size)
            say(step + 1, losses.mean().asscalar())
            manager.save(step + 1, net=net, trainer=trainer, extra={'hidden': [array.asnumpy().tolist() for array in hidden]})
    return net, trainer


class Classifier(gluon.HybridBlock):
    """As in the model zoo: ``features`` to keep, ``output`` to replace."""

    def __init__(self, classes, features=None, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.features = features or nn.HybridSequential()
            if features is None:
                self.features.add(nn.Conv2D(8, 3, padding=1), nn.BatchNorm(), nn.Activation('relu'), nn.MaxPool2D(),
                                  nn.Conv2D(16, 3, padding=1, activation='relu'), nn.MaxPool2D(), nn.Flatten())
            self.output = nn.Dense(classes)

    def hybrid_forward(self, F, x):
        return self.output(self.features(x))


def train_classifier(net, trainer, batch):
    x, y = (mx.nd.array(array, ctx=trainer._contexts[0]) for array in batch)
    with autograd.record():
        loss = gluon.loss.SoftmaxCrossEntropyLoss()(net(x), y)
    loss.backward()
    trainer.step(IMAGES)
    return loss.mean().asscalar()


def pretrained(context):
    """The features of a net that knows the digits 0 to 4."""
    net = Classifier(5)
    net.initialize(mx.init.Xavier(), ctx=context)
    trainer = gluon.Trainer(net.collect_params(), 'adam', {'learning_rate': 0.01})
    for step in range(20):
        train_classifier(net, trainer, image_batch(step, 0, 4))
    return net.features


def finetune(folder, steps, device, say, dropout=None):
    """The digits 5 to 9 with a new head, which learns faster; the first layers are frozen."""
    net = Classifier(5, pretrained(mx.cpu(device)))
    net.output.initialize(mx.init.Xavier(), ctx=mx.cpu(device))
    net.features[:4].collect_params().setattr('grad_req', 'null')
    net.output.collect_params().setattr('lr_mult', 10)
    net.hybridize()
    trainer = gluon.Trainer(net.collect_params(), 'adamw', {'learning_rate': 0.001, 'wd': 0.01})

    with go.CheckpointManager(folder, save_every=10) as manager:
        restored = manager.restore_latest(net=net, trainer=trainer)
        for step in range(restored.step if restored else 0, steps):
            say(step + 1, train_classifier(net, trainer, image_batch(step, 5, 9)))
            manager.save(step + 1, net=net, trainer=trainer)
    return net, trainer


def groups(folder, steps, device, say, dropout=None):
    """Each layer has its rate, biases and normalizations no decay; the momentum has the rate in it, which is scheduled."""
    net = Classifier(10)
    net.initialize(mx.init.Xavier(), ctx=mx.cpu(device))
    go.param_groups(net, [('*', go.groups.layer_decay(net, 0.5)), *go.groups.NO_DECAY, ('output.weight', {'wd_mult': 3})])
    schedule = mx.lr_scheduler.CosineScheduler(max_update=60, base_lr=0.2)
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'momentum': 0.9, 'wd': 0.01, 'lr_scheduler': schedule})

    with go.CheckpointManager(folder, save_every=10) as manager:
        restored = manager.restore_latest(net=net, trainer=trainer)
        for step in range(restored.step if restored else 0, steps):
            say(step + 1, train_classifier(net, trainer, image_batch(step)))
            manager.save(step + 1, net=net, trainer=trainer)
    return net, trainer


LOOPS = {'cnn': cnn, 'lstm': lstm, 'finetune': finetune, 'groups': groups}


def seed():
    mx.random.seed(0)
    np.random.seed(0)
    random.seed(0)


def run(loop, folder, steps, device, dropout=0.2):
    """Train; the losses are printed."""
    go.accelerate()
    seed()

    def say(step, loss):
        print(json.dumps({'step': step, 'loss': float(loss)}), flush=True)
    return facts(*LOOPS[loop](folder, int(steps), int(device), say, float(dropout)))


def record(*names):
    go.accelerate()
    for name in names or LOOPS:
        seed()
        losses = []
        LOOPS[name](FIXTURES / name, 40, 0, lambda step, loss, losses=losses: losses.append(float(loss)), 0)
        (FIXTURES / name / 'step-20.safetensors').unlink()
        (FIXTURES / name / 'losses.json').write_text(json.dumps(losses) + '\n')


if __name__ == '__main__':
    if sys.argv[1:2] == ['record']:
        record(*sys.argv[2:])
    else:
        print(json.dumps(run(*sys.argv[1:])))
    sys.stdout.flush()
    os._exit(0)  # MXNet's own exit takes a second
