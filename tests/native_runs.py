"""Runs of optimizers that this package did not make: MXNet's own, and other people's in all the ways that they keep their state.

As a script it resumes, in one process, the runs that the JSON on its standard input lists, and prints what came out of each.
"""
import hashlib

import jobs
import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

import gluon_optim as go

Optimizer = mx.optimizer.Optimizer


@Optimizer.register
class BERTAdam(Optimizer):
    """As GluonNLP has it: a tuple of two arrays, no bias correction."""

    def __init__(self, learning_rate=0.001, beta1=0.9, beta2=0.999, epsilon=1e-6, **kwargs):
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon

    def create_state(self, index, weight):
        return mx.nd.zeros_like(weight), mx.nd.zeros_like(weight)

    def update(self, index, weight, grad, state):
        self._update_count(index)
        mean, var = state
        grad = grad * self.rescale_grad
        mean[:] = self.beta1 * mean + (1 - self.beta1) * grad
        var[:] = self.beta2 * var + (1 - self.beta2) * grad * grad
        weight[:] -= self._get_lr(index) * (mean / (var.sqrt() + self.epsilon) + self._get_wd(index) * weight)


class Plain(Optimizer):
    """Steps by ``direction``, which subclasses make of their state."""

    def update(self, index, weight, grad, state):
        self._update_count(index)
        weight[:] -= self._get_lr(index) * self.direction(index, grad * self.rescale_grad, state)

    def direction(self, index, grad, state):
        return grad


@Optimizer.register
class Bare(Plain):
    def create_state(self, index, weight):
        return mx.nd.zeros_like(weight)

    def direction(self, index, grad, state):
        state[:] = 0.9 * state + grad
        return state


@Optimizer.register
class Nesting(Plain):
    """Everything that a state may be: None, a tuple in a tuple, a list, a dictionary, a number, an array of another shape."""

    def create_state(self, index, weight):
        if len(weight.shape) == 1:
            return None
        rows = mx.nd.zeros((weight.shape[0], 1), ctx=weight.context)
        return rows, (None, [mx.nd.zeros_like(weight), 0.5], {'calls': 0, 3: mx.nd.ones((1,), ctx=weight.context)})

    def direction(self, index, grad, state):
        if state is None:
            return grad
        rows, (_, momentum, memory) = state
        memory['calls'] += 1
        memory[3][:] = memory[3] * 0.9
        rows[:] += (grad * grad).mean(axis=1, keepdims=True)
        momentum[0][:] = momentum[1] * momentum[0] + grad / (rows + 1).sqrt()
        momentum[1] = min(0.9, momentum[1] + 0.05 * memory['calls'])
        return momentum[0] * memory[3].asscalar()


@Optimizer.register
class Remembering(Plain):
    """Keeps its state on itself: numbers, arrays by index, NumPy's, an infinity, a tuple."""

    def __init__(self, decay=0.5, **kwargs):
        super().__init__(**kwargs)
        self._decay, self.schedule, self.betas, self.least = decay, 1.0, (0.9, 0.99), float('inf')
        self.sums, self.numbers, self.scale = {}, np.zeros(2), np.float32(1.5)

    def direction(self, index, grad, state):
        self.schedule *= 0.99
        self.sums[index] = self.betas[0] * self.sums.get(index, 0 * grad).as_in_context(grad.context) + grad
        self.numbers[0] += 1
        self.scale = np.float32(self.scale * np.float32(0.97))
        self.least = min(self.least, float(grad.norm().asscalar()))
        return self.sums[index] * self.schedule * float(self.scale) * self._decay * min(self.least, 1) / self.numbers[0]


@Optimizer.register
class LAMB2(mx.optimizer.LAMB):
    """A class of somebody's who began with one of MXNet's."""


STRANGERS = {'bertadam': {}, 'bare': {}, 'nesting': {}, 'remembering': {'decay': 0.75}, 'lamb2': {}, 'ccsgd': {'momentum': 0.9}}
BUILTINS = {'sgd': {'momentum': 0.9}, 'nag': {'momentum': 0.9}, 'adagrad': {}, 'rmsprop': {'centered': True}, 'adadelta': {},
            'adam': {}, 'adamax': {}, 'nadam': {}, 'signum': {}, 'dcasgd': {}, 'ftrl': {}, 'ftml': {}, 'sgld': {}, 'lamb': {},
            'lars': {'momentum': 0.9}, 'lbsgd': {'momentum': 0.9, 'batch_scale': 2}}
X = np.random.RandomState(0).randn(8, 4)


def make(config):
    """Net and trainer; ``config`` has 'optimizer', and may have 'contexts', 'half', 'on_kvstore' and 'scheduler'."""
    mx.random.seed(0)
    contexts = [mx.cpu(k) for k in config.get('contexts', [0])]
    known = {'in_units': 4} if config.get('half') else {}, {'in_units': 3} if config.get('half') else {}  # it has no forward pass
    with mx.name.NameManager():  # counted from 0: where `dense10_` sorts before `dense9_`, noise is drawn in another order
        net = gluon.nn.HybridSequential()
        net.add(gluon.nn.Dense(3, **known[0]), gluon.nn.Dense(2, **known[1]))
    if config.get('half'):
        net.cast('float16')
    net.initialize(mx.init.Normal(0.5), ctx=contexts)
    arguments = dict({**STRANGERS, **BUILTINS}[config['optimizer']], learning_rate=0.05)
    if config.get('half'):
        arguments['multi_precision'] = True
    if config.get('scheduler'):
        arguments['lr_scheduler'] = mx.lr_scheduler.FactorScheduler(2, 0.5, base_lr=0.05)
    on_kvstore = {'kvstore': mx.kv.create('local'), 'update_on_kvstore': True} if config.get('on_kvstore') else {}
    return net, gluon.Trainer(net.collect_params(), config['optimizer'], arguments, **on_kvstore)


def train(net, trainer, steps):
    half = net[0].weight.dtype in ('float16', np.float16)
    for k in range(steps):
        parts = gluon.utils.split_and_load(mx.nd.array(X * (k + 1)), trainer._contexts)
        with autograd.record():
            if half:  # MXNet multiplies no float16 matrices on a CPU
                losses = [sum((parameter.data() * parameter.data()).sum() for parameter in trainer._params)]
            else:
                losses = [(net(part) ** 2).mean() for part in parts]
        autograd.backward(losses)
        trainer.step(8)


def facts(net, trainer):
    weights = [data.asnumpy().tobytes() for name, parameter in sorted(net._collect_params_with_prefix().items())
               for data in parameter.list_data()]
    optimizer = trainer._optimizer
    kept = {name: repr(value) for name, value in sorted(vars(optimizer).items()) if name in (
        'schedule', 'numbers', 'scale', 'least', 'betas', 'm_schedule', 'last_lr', 'cur_lr')}
    return {'weights': hashlib.sha256(b''.join(weights)).hexdigest(), 'states': go.states_digest(trainer, net),
            'rate': trainer.learning_rate, 'num_update': optimizer.num_update, 'kept': kept}


def resume(config, path, steps):
    net, trainer = make(config)
    go.load_checkpoint(path, net=net, trainer=trainer)
    loaded = facts(net, trainer)
    train(net, trainer, steps)
    return {'loaded': loaded, 'end': facts(net, trainer)}


if __name__ == '__main__':
    jobs.do_all(resume)
