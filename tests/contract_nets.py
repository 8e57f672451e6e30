"""A `gluon.Trainer` whose gradients a test chooses, and a small convolutional net: what the contract is tested on.

All numbers are multiples of 1/16 between -2 and 2. They, a quarter of them and sums of some of them are exact in float16, so
a batch cut in parts, a scaled loss or a gradient that comes from two devices is the same gradient bit for bit.
"""
import os
import subprocess
import sys
from pathlib import Path

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon, nd

import gluon_optim as go

NEWER = hasattr(mx, 'npx') and not hasattr(mx, 'mod')  # MXNet 2.x
if NEWER:
    mx.npx.set_np()
array = mx.np.array if NEWER else nd.array   # what parameters and gradients are

#: What a test of the contract needs and MXNet 2.0.0b1 cannot do: what is tried, and how MXNet refuses it. test_contract.py asserts
#: that it does: an entry ends with the fault.
EXCEPTIONS_2 = {
    'gradients are set to zero by Parameter.zero_grad': (
        lambda: Run('sgd_torch').step().parameters[0].zero_grad(), TypeError, 'which can only accept legacy ndarrays'),
    'an Embedding has sparse gradients': (
        lambda: gluon.nn.Embedding(5, 3, sparse_grad=True), AssertionError, 'sparse feature is not supported in Gluon2.0'),
}
#: Names that mean MXNet 2.0's own optimizers in a Trainer; `gluon_optim.create` gives those of this package.
MXNETS_2 = ('adamw', 'adabelief', 'lans')


def optimizer_named(name, **arguments):
    """What MXNet makes of a name; in 2.x, which means its own by some of them, what `create` makes of it."""
    return (go.create if NEWER else mx.optimizer.create)(name, **arguments)


def trainer_with(parameters, name, arguments=None, **options):
    """A Trainer with the optimizer `optimizer_named`; with one that is an object, if ``name`` is that."""
    if isinstance(name, str):
        optimizer = [name, arguments] if not NEWER else [optimizer_named(name, **(arguments or {}))]
    else:
        optimizer = [name]
    return gluon.Trainer(parameters, *optimizer, **options)


def clear_gradient(parameter):
    """`Parameter.zero_grad`, also for arrays of mx.np."""
    for gradient in parameter.list_grad():
        gradient[:] = 0


ROOT = Path(__file__).resolve().parent.parent
SHAPES = ((3, 4), (1,), (2, 3, 5))
RATE = 0.0625
COLD = {'psgld': {'temperature': 1e-300}}  # its noise rounds to nothing: what is left can be compared bit for bit


def numbers(seed, shape):
    """Some of both signs, zero among them."""
    return np.random.RandomState(seed).randint(-32, 33, shape) / 16.0


def gradients(step, shapes=SHAPES):
    """The gradients of one step, float64."""
    return [numbers(1000 * (step + 1) + i, shape) for i, shape in enumerate(shapes)]


class Run:
    """Parameters of ``shapes`` under a real Trainer; the loss is linear in them, so that its gradients are the given ones.

    Parameters
    ----------
    name, arguments
        The optimizer: its name, or the object itself. The rate is RATE, unless it or a scheduler is among the arguments.
    contexts : sequence of int
        Ids of CPU contexts; with two, the first gets a quarter of each gradient, the other the rest.
    attributes
        ``grad_req``, ``lr_mult``, ``wd_mult`` of all parameters.
    """

    def __init__(self, name, arguments=None, dtype='float32', contexts=(0,), shapes=SHAPES, kvstore=None, update_on_kvstore=None,
                 weights=None, **attributes):
        if NEWER:
            mx.npx.set_np()  # in this thread too
        arguments = dict(COLD.get(name, {}) if isinstance(name, str) else {}, **(arguments or {}))
        if 'lr_scheduler' not in arguments and isinstance(name, str):
            arguments.setdefault('learning_rate', RATE)
        self.contexts = [mx.cpu(i) for i in contexts]
        self.shares = [0.25, 0.75] if len(contexts) == 2 else [1.0]
        self.parameters = [gluon.Parameter(f'p{i}_weight', shape=shape, dtype=dtype, **attributes)
                           for i, shape in enumerate(shapes)]
        for i, p in enumerate(self.parameters):
            p.initialize(ctx=self.contexts)
            p.set_data(array(numbers(i, p.shape) if weights is None else weights[i], dtype=dtype))
        self.trainer = trainer_with(self.parameters, name, arguments, kvstore=kvstore, update_on_kvstore=update_on_kvstore)
        self.shapes = shapes
        self.steps = 0

    @property
    def optimizer(self):
        return self.trainer._optimizer

    def backward(self, given=None, scale=1.0):
        """Compute the gradients ``given`` (those of this step by default), times ``scale``; None leaves a parameter out."""
        given = gradients(self.steps, self.shapes) if given is None else given
        with autograd.record():  # without a cast, whose backward overwrites gradients that should be added up
            losses = [(p.data(context) * array(share * g, ctx=context, dtype=p.dtype)).sum() * scale
                      for p, g in zip(self.parameters, given) if g is not None and p.grad_req != 'null'
                      for context, share in zip(self.contexts, self.shares)]
        autograd.backward(losses)

    def step(self, given=None, scale=1.0, batch_size=1, ignore_stale_grad=False):
        self.backward(given, scale)
        self.trainer.step(batch_size, ignore_stale_grad)
        self.steps += 1
        return self

    def train(self, steps):
        for _ in range(steps):
            self.step()
        return self

    def updaters(self):
        """Who holds the states."""
        return [self.trainer._kvstore._updater] if self.trainer._update_on_kvstore else self.trainer._updaters

    def weights(self):
        """One copy of the weights; those on other devices are checked to be the same."""
        nd.waitall()
        for p in self.parameters:
            first, *others = [data.asnumpy() for data in p.list_data()]
            for other in others:
                np.testing.assert_array_equal(first, other, err_msg=f'{p.name} differs between devices')
        return {p.name: p.list_data()[0].asnumpy() for p in self.parameters}

    def facts(self):
        """Weights, states and counts, by name: all that an update may change."""
        states = {f'{self.parameters[i].name}/{k}': array.asnumpy() for i, state in self.updaters()[0].states.items()
                  for k, array in enumerate(flat(state))}
        counts = {f'count of {i}': t for i, t in self.optimizer.update_counts().items()}
        return dict(self.weights(), **states, **counts, num_update=self.optimizer.num_update)


def flat(state):
    """The arrays of a nested state: a master first, where there is one."""
    return [array for item in state for array in flat(item)] if isinstance(state, (tuple, list)) else [state]


def assert_same(a, b, tolerance=0.0):
    """Two `Run.facts` are equal, bit for bit or within ``tolerance`` of the largest value of an array."""
    assert sorted(a) == sorted(b)
    for name in a:
        atol = tolerance and tolerance * float(np.max(np.abs(a[name])))
        np.testing.assert_allclose(b[name], a[name], rtol=0, atol=atol, err_msg=name)


def differ(a, b):
    """Whether something that both have differs: one slot more is no difference."""
    return any(not np.array_equal(a[name], b[name]) for name in set(a) & set(b))


def conv_net(contexts=None, seed=0):
    """Convolutions of the widths for which oneDNN keeps weights in blocks of its own, a deconvolution, and a dense layer."""
    mx.random.seed(seed)
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Conv2D(16, 3, padding=1, in_channels=3, activation='relu'),
            gluon.nn.Conv2D(32, 3, padding=1, in_channels=16, activation='relu'),
            gluon.nn.Conv2DTranspose(16, 3, in_channels=32, activation='relu'),
            gluon.nn.Flatten(), gluon.nn.Dense(10, in_units=16 * 10 * 10))
    net.initialize(mx.init.Xavier(), ctx=contexts)
    return net


def small_net(seed=0, dtype='float32'):
    """Two dense layers, and a normalization with its running statistics between them."""
    mx.random.seed(seed)
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Dense(4, in_units=3), gluon.nn.BatchNorm(in_channels=4), gluon.nn.Dense(2, in_units=4))
    net.initialize(mx.init.Normal(0.5))
    net.cast(dtype)
    return net


def structural(net):
    """Parameters under the names that files of weights have for them."""
    return net._collect_params_with_prefix() if hasattr(net, '_collect_params_with_prefix') else net.collect_params()


def backward_through(net, step):
    """Give the net's parameters gradients that depend on their names and on ``step`` only: its layers compute nothing."""
    with autograd.record():
        losses = [(p.data() * array(numbers(100 * step + i, p.shape), dtype=p.dtype)).sum()
                  for i, (_, p) in enumerate(sorted(structural(net).items())) if p.grad_req != 'null']
    autograd.backward(losses)


def images(seed, size=8):
    """A batch of images and their labels."""
    random = np.random.RandomState(seed)
    return nd.array(random.normal(size=(size, 3, 8, 8)), dtype='float32'), nd.array(random.randint(0, 10, size), dtype='float32')


def environment(**changes):
    """This process's environment for one that finds the package and the tests' modules; None removes a variable."""
    path = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])
    merged = {**os.environ, 'PYTHONPATH': path, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def in_process(code, *arguments, **variables):
    """Run Python ``code`` in a process of its own; what it printed, on both streams. Codes end by os._exit: MXNet's own exit
    takes a second."""
    process = subprocess.run([sys.executable, '-c', code, *map(str, arguments)], env=environment(**variables), timeout=120,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout, process.stderr
