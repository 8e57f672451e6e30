"""Runs of MXNet's own optimizers and of their drop-ins; also in a process where gluon_optim cannot be imported.

    python dropin_runs.py '[{"name": "adam", "options": {}, "load": null, "save": "a.states", "steps": [0, 4]}]'

trains with `gluon.Trainer` and MXNet's own optimizers, and prints what each run has come to.
"""
import hashlib
import json
import sys
import warnings

if __name__ == '__main__':
    sys.modules['gluon_optim'] = None  # an import raises ImportError

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

SHAPES = {'a_weight': (3, 4), 'b_bias': (7,), 'c_gamma': (1,), 'd_weight': (2, 3, 5), 'e_beta': (4,), 'f_weight': (40, 50)}
NAMES = list(SHAPES)
SCALES = (1.0, 0.03, 8.0, 0.4, 2.0, 1e-4, 0.7, 30.0, 0.2, 1.5, 0.0, 0.9)  # of the gradients, one step after the other


def gradients(steps, dtype='float32', seed=4):
    """For each step the gradients, as NumPy arrays."""
    random = np.random.RandomState(seed)
    return [[(SCALES[step % len(SCALES)] * random.standard_normal(shape)).astype(dtype) for shape in SHAPES.values()]
            for step in range(steps)]


class Run:
    """An optimizer with its weights; `step` updates them as a Trainer without kvstore does, or one by one."""

    def __init__(self, optimizer, dtype='float32', contexts=(0,), single=False):
        random = np.random.RandomState(3)
        values = [random.standard_normal(shape) for shape in SHAPES.values()]
        self.weights = [[mx.nd.array(v, dtype=dtype, ctx=mx.cpu(k)) for v in values] for k in contexts]
        self.updaters = [mx.optimizer.get_updater(optimizer) for _ in self.weights]
        self.single = single

    @property
    def optimizer(self):
        return self.updaters[0].optimizer

    def step(self, values, skip=()):
        indices = [i for i in range(len(values)) if i not in skip]
        for updater, held in zip(self.updaters, self.weights):
            arrays = [mx.nd.array(values[i], dtype=held[i].dtype, ctx=held[i].context) for i in indices]
            if self.single:
                for i, array in zip(indices, arrays):
                    updater(i, array, held[i])
            else:
                updater(indices, arrays, [held[i] for i in indices])

    def ndarrays(self):
        """All weights and states, by device, parameter and place in the state."""
        found = {}
        for k, (updater, held) in enumerate(zip(self.updaters, self.weights)):
            for i, weight in enumerate(held):
                found[k, NAMES[i], 'weight'] = weight
                found.update({(k, NAMES[i], place): array for place, array in flat(updater.states.get(i))})
        return found

    def arrays(self):
        return {key: None if array is None else array.asnumpy() for key, array in self.ndarrays().items()}


def flat(state, place='state'):
    """The arrays of a nested state, and where they are; None where it has None."""
    if isinstance(state, (tuple, list)):
        return [found for k, part in enumerate(state) for found in flat(part, f'{place}.{k}')]
    return [(place, state)]


# With a Trainer ------------------------------------------------------------------------------------------------------


def network(contexts=(0,)):
    mx.random.seed(1)
    net = gluon.nn.HybridSequential(prefix='net_')
    with net.name_scope():
        net.add(gluon.nn.Dense(6, activation='tanh', in_units=5), gluon.nn.Dense(3, in_units=6))
    net.initialize(mx.init.Xavier(), ctx=[mx.cpu(k) for k in contexts])
    return net


def train(net, trainer, begin, end):
    """Steps ``begin`` to ``end`` of one fixed sequence of batches."""
    contexts = trainer._contexts
    batches = np.random.RandomState(0).standard_normal((20, 8, 5)).astype('float32')
    for batch in batches[begin:end]:
        with autograd.record():
            losses = [(net(x) ** 2).sum() for x in gluon.utils.split_and_load(mx.nd.array(batch), contexts)]
        autograd.backward(losses)
        trainer.step(8)


def parameters(net):
    return [data.asnumpy() for p in net.collect_params().values() for data in p.list_data()]


def updaters(trainer):
    return [trainer._kvstore._updater] if trainer._update_on_kvstore else trainer._updaters


def fingerprint(net, trainer):
    """What a run has come to: bit-equal runs have equal ones."""
    sha = hashlib.sha256()
    for array in parameters(net):
        sha.update(array.tobytes())
    for updater in updaters(trainer):
        for index in sorted(updater.states):
            for _, array in flat(updater.states[index]):
                sha.update(b'none' if array is None else array.asnumpy().tobytes())
    optimizer = trainer._optimizer
    counts = {str(index): count for counts in optimizer._all_index_update_counts.values() for index, count in counts.items()}
    return dict(sha=sha.hexdigest(), num_update=optimizer.num_update, counts=counts, rate=trainer.learning_rate)


def continued(name, options, load, save, steps, kvstore='device', contexts=(0,)):
    """Train; ``load`` and ``save`` are paths of native states, or None. Returns the fingerprint."""
    net = network(contexts)
    scheduler = mx.lr_scheduler.FactorScheduler(2, 0.9, base_lr=0.05)
    options = dict(options, learning_rate=0.05, lr_scheduler=scheduler)
    trainer = gluon.Trainer(net.collect_params(), name, options, kvstore=kvstore)
    if load:
        net.load_parameters(load + '.params', ctx=[mx.cpu(k) for k in contexts])
        trainer.load_states(load)
    mx.random.seed(7)
    train(net, trainer, *steps)
    if save:
        net.save_parameters(save + '.params')
        trainer.save_states(save)
    return dict(fingerprint(net, trainer), module=type(trainer._optimizer).__module__)


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    print(json.dumps([continued(**job) for job in json.loads(sys.argv[1])]))
