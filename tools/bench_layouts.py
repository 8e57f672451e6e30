"""How long `gluon.Trainer.step` takes wherever MXNet can keep and update weights: the case `layouts` of tools/bench.py.

A layout is a kvstore or none, whether the update happens on it, and the number of CPU contexts. In each of them MXNet's own
optimizers, those that `gluon_optim.accelerate()` puts in their place, and two of this package take turns, step by step in
changing order, each with a net of its own. Gradients come from a real backward pass before each step, which is not timed.
"""
import random
import time

import mxnet as mx
import numpy
from bench_competitors import RATE, Competitor
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn
from tqdm import tqdm

import gluon_optim as go

LAYOUTS = [(None, False, contexts) for contexts in (1, 2)] + [
    (kvstore, on_kvstore, contexts) for kvstore in ('local', 'device') for on_kvstore in (False, True) for contexts in (1, 2)]
OPTIMIZERS = ('mxnet:adam', 'gluon_optim:adam', 'mxnet:sgd', 'gluon_optim:sgd', 'gluon_optim:novograd', 'gluon_optim:adamw')
BESIDE = {'gluon_optim:adam': 'mxnet:adam', 'gluon_optim:sgd': 'mxnet:sgd', 'gluon_optim:novograd': 'gluon_optim:adam',
          'gluon_optim:adamw': 'gluon_optim:adam'}  # what each is compared with
WARM_UP = 3
STEPS = 2  # of each competitor in a round


def small_cnn():
    net = nn.HybridSequential()
    net.add(nn.Conv2D(16, 3, activation='relu'), nn.MaxPool2D(), nn.Conv2D(32, 3, activation='relu'), nn.MaxPool2D(),
            nn.Dense(64, activation='relu'), nn.Dense(10))
    return net, (4, 1, 28, 28)


def mobilenet(width):
    return gluon.model_zoo.vision.get_mobilenet(width, classes=10), (2, 3, 32, 32)


class Parameters(gluon.HybridBlock):
    """Parameters that are all added up: gradients without a network."""

    def __init__(self, count, size):
        super().__init__()
        with self.name_scope():
            for i in range(count):
                setattr(self, f'p{i}', self.params.get(f'p{i}_weight', shape=(size,)))

    def hybrid_forward(self, F, x, **parameters):
        return x * F.add_n(*[F.sum(p * p) for p in parameters.values()])


NETS = {
    'cnn': small_cnn,                                  # 8 tensors, 57 thousand elements
    'mobilenet': lambda: mobilenet(1.0),               # MobileNet v1
    'mobilenet0.25': lambda: mobilenet(0.25),
    '56x3000': lambda: (Parameters(56, 3000), (1,)),   # so many tensors of so many elements
    '56x100000': lambda: (Parameters(56, 100000), (1,)),
}


def competitor(make_net, optimizer, kvstore, on_kvstore, contexts):
    """One optimizer under a Trainer of that layout, with a net of its own."""
    family, name = optimizer.split(':')
    arguments = dict(learning_rate=RATE, **({'momentum': 0.9} if name == 'sgd' else {}))
    made = go.create(name, **arguments) if family == 'gluon_optim' else mx.optimizer.create(name, **arguments)
    contexts = [mx.cpu(i) for i in range(contexts)]
    mx.random.seed(0)
    net, shape = make_net()
    net.initialize(mx.init.Normal(0.05), ctx=contexts)
    net.hybridize(static_alloc=True, static_shape=True)
    data = [nd.random.uniform(shape=shape, ctx=context) for context in contexts]
    for x in data:
        net(x)
    parameters = net.collect_params()
    trainer = gluon.Trainer(parameters, made, kvstore=kvstore and mx.kv.create(kvstore), update_on_kvstore=on_kvstore)
    first = next(p for p in parameters.values() if p.grad_req != 'null')

    def backward():
        with autograd.record():
            losses = [net(x).square().mean() for x in data]
        autograd.backward(losses)
        nd.waitall()

    def step():
        trainer.step(1)
        nd.waitall()

    return Competitor(step, lambda: first.list_data()[0].asnumpy(), 0, prepare=backward)


def measure(options):
    """A row for each net and layout: medians of milliseconds by optimizer, and their ratios."""
    rows = []
    with tqdm(total=len(options.nets) * len(LAYOUTS), desc='layouts', disable=None, leave=False) as bar:
        for net in options.nets:
            for kvstore, on_kvstore, contexts in LAYOUTS:
                bar.set_postfix_str(net)
                milliseconds = _measure(NETS[net], kvstore, on_kvstore, contexts, options.rounds)
                ratios = {name: milliseconds[name] / milliseconds[other] for name, other in BESIDE.items()}
                rows.append(dict(net=net, kvstore=kvstore, update_on_kvstore=on_kvstore, contexts=contexts, ms=milliseconds,
                                 ratios=ratios))
                bar.update()
    return rows


def _measure(make_net, kvstore, on_kvstore, contexts, rounds):
    competitors = {name: competitor(make_net, name, kvstore, on_kvstore, contexts) for name in OPTIMIZERS}
    seconds = {name: [] for name in OPTIMIZERS}
    before = {name: one.weight() for name, one in competitors.items()}
    order, shuffle = list(OPTIMIZERS), random.Random(0).shuffle
    for turn in range(WARM_UP + STEPS * rounds):
        shuffle(order)
        for name in order:
            competitors[name].prepare()
            begin = time.perf_counter()
            competitors[name].step()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - begin)
    for name, one in competitors.items():
        problem = one.problem(before[name])
        if problem:
            raise SystemExit(f'{name}: {problem}. Its figures mean nothing.')
    return {name: float(numpy.median(found)) * 1e3 for name, found in seconds.items()}


def table(rows):
    """Text for people."""
    lines = ["gluon.Trainer.step, ms: MXNet's own, accelerated and the ratio; novograd and adamw beside the accelerated adam",
             f'{"":48}{"adam":^24}  {"sgd, momentum 0.9":^24}  {"novograd":^15}  {"adamw":^15}',
             f'{"net":14}{"kvstore":9}{"update there":14}{"contexts":11}'
             + 2 * f'{"MXNet":>8}{"ours":>8}{"ratio":>8}  ' + 2 * f'{"ms":>7}{"x adam":>8}  ']
    for row in rows:
        there = 'yes' if row['update_on_kvstore'] else 'no'
        cells = [f'{row["net"]:14}{row["kvstore"] or "None":9}{there:14}{row["contexts"]:<11}']
        for name, other in BESIDE.items():
            ours = f'{row["ms"][name]:{8 if other.startswith("mxnet") else 7}.2f}{row["ratios"][name]:8.2f}  '
            cells.append(f'{row["ms"][other]:8.2f}{ours}' if other.startswith('mxnet:') else ours)
        lines.append(''.join(cells).rstrip())
    return '\n'.join(lines)
