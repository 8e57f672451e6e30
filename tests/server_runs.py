"""A worker of a cluster: does a list of jobs on one store, and prints what it found.

A process can have one store with servers only, and a second trainer's keys would be those of the first: so each trainer gets as
many frozen parameters in front as there were before, which the store never sees.
"""
import json
import os
import sys
import traceback

import mxnet as mx
import numpy as np
from contract_nets import RATE, Run, gradients
from failing_optimizer import FailsOnServers
from mxnet import autograd, gluon, nd

import gluon_optim as go
from gluon_optim.mxnet.distributed.protocol import ServerError

SHAPES = ((15, 10), (1,), (7,))
SHARES = (0.25, 0.75)
FROZEN = gluon.Parameter('frozen', shape=(1,), grad_req='null')
FROZEN.initialize()

STORE = mx.kv.create(sys.argv[1]) if __name__ == '__main__' else None
_keys = 0


def trainer_on_servers(parameters, optimizer, **options):
    global _keys
    trainer = gluon.Trainer([FROZEN] * _keys + parameters, optimizer, kvstore=STORE, **options)
    trainer._params_to_init = list(parameters)
    _keys += len(parameters)
    return trainer


def make_run(dtype='float32'):
    run = Run('sgd', {}, dtype, shapes=SHAPES)
    for i, p in enumerate(run.parameters):
        p.lr_mult, p.wd_mult = (0.5, 1.0, 2.0)[i], (3.0, 0.0, 1.0)[i]
    return run


def train(run, steps, share=1.0):
    """Under a scheduler, another one, the same with another factor; then with a rate set by hand, another decay, another multiplier
    and another batch size."""
    mx.random.seed(7)
    for t in range(steps):
        if t == steps // 4:
            run.optimizer.lr_scheduler = mx.lr_scheduler.FactorScheduler(step=1, factor=0.5, base_lr=RATE / 2)
        if t == steps // 3:
            run.optimizer.lr_scheduler.factor = 0.875
        if t == steps // 2:
            run.optimizer.lr_scheduler = None
            run.trainer.set_learning_rate(RATE / 4)
        if t == steps * 3 // 4:
            run.optimizer.wd = 0.5 * run.optimizer.wd
            run.parameters[0].lr_mult = 0.25
        run.step([share * g for g in gradients(t, SHAPES)], batch_size=2 if t < steps * 3 // 4 else 4)
    return run.weights()


def make_optimizer(name, given, steps):
    """With a scheduler, and a decay where it has one."""
    scheduler = mx.lr_scheduler.FactorScheduler(step=max(steps // 10, 1), factor=0.75, base_lr=RATE)
    arguments = dict(given, learning_rate=RATE, lr_scheduler=scheduler)
    if name == 'psgld':  # else its noise depends on the places in the trainer, which differ here
        arguments['noise'] = 'mxnet'
    try:
        return go.create(name, wd=0.125, **arguments)
    except ValueError:
        return go.create(name, **arguments)


def compare(name, given, update_on_kvstore, steps, dtype='float32'):
    """How far the weights are from those of one process, relative to the largest of a parameter; or why it was refused."""
    run = make_run(dtype)
    run.trainer = trainer_on_servers(run.parameters, make_optimizer(name, given, steps), update_on_kvstore=update_on_kvstore)
    before = run.weights()
    try:
        found = train(run, steps, SHARES[STORE.rank])
    except ValueError as error:
        assert all((before[key] == value).all() for key, value in run.weights().items())
        return str(error)
    alone = make_run(dtype)
    alone.trainer = gluon.Trainer(alone.parameters, make_optimizer(name, given, steps), kvstore=None)
    expected = train(alone, steps)
    return max(float(np.max(np.abs(found[key] - expected[key])) / np.max(np.abs(expected[key]))) for key in expected)


def starts(name, times, accelerate=False):
    """How many of ``times`` first steps of a net went wrong: its trainer asks for the weights when gradients are known.

    Without a ``name``: MXNet's own optimizer.
    """
    wrong = 0
    if accelerate:
        go.accelerate()
    for number in range(times):
        mx.random.seed(number)
        net = gluon.nn.HybridSequential()
        for _ in range(10):
            net.add(gluon.nn.Dense(20, activation='tanh'))  # its inputs are known after the first forward pass
        net.add(gluon.nn.Dense(3))
        net.initialize(mx.init.Xavier())
        net.hybridize()
        x, y = nd.random.normal(shape=(8, 20)), nd.array(np.arange(8) % 3)
        with autograd.record():
            loss = gluon.loss.SoftmaxCrossEntropyLoss()(net(x), y).mean()
        loss.backward()
        parameters = list(net.collect_params().values())
        optimizer = go.create(name, learning_rate=0.5) if name else mx.optimizer.SGD(learning_rate=0.5)
        expected = [(p.data() - 0.5 * STORE.num_workers * p.grad()).asnumpy() for p in parameters]
        trainer = trainer_on_servers(parameters, optimizer, update_on_kvstore=False)
        trainer.step(1)
        wrong += not all(np.allclose(p.data().asnumpy(), e, atol=1e-5) for p, e in zip(parameters, expected))
    go.restore_builtins()
    return wrong


def failure(optimizer, steps=6, rate=None):
    """The step in which a server's error arrived, its text, and whether the next step raises it again."""
    run = make_run()
    run.trainer = trainer_on_servers(run.parameters, optimizer)
    for t in range(steps):
        try:
            if t == 1 and rate is not None:
                run.trainer.set_learning_rate(rate)
            run.step()
        except ServerError as error:
            try:
                run.step()
            except ServerError as again:
                return t + 1, str(error), str(again) == str(error)
    return 'no error'


class OnlyHere(go.Rule):
    """In the main module of the workers, which is another one on a server."""

    name = 'only_here'
    hypers = (go.Hyper('learning_rate', 0.5, '[0, inf)'), go.Hyper('wd', 0.0, '[0, inf)'))
    slots = staticmethod(lambda h: ())
    coefficients = staticmethod(lambda xp, h, t: dict(lr=h.learning_rate))
    step = staticmethod(lambda xp, h, c, w, g, s: (w - c.lr * g, {}))


def unpicklable():
    go.register(OnlyHere)  # not when tests import this file
    return failure(go.create('only_here'))


def failing_update():
    return failure(FailsOnServers(learning_rate=RATE))


def disagreement():
    return failure(go.create('adamw', learning_rate=RATE), rate=RATE * (2 + STORE.rank))


def not_installed():
    return failure(go.create('adamw'))


def refused_changes():
    """What is raised here, before anything is sent."""
    run = make_run()
    run.trainer = trainer_on_servers(run.parameters, go.create('sgd_torch', learning_rate=RATE))
    run.step()
    before, found = run.weights(), []
    for name, value in (('wd', -1.0), ('multi_precision', True), ('momentum', 0.5)):
        kept = getattr(run.optimizer, name)
        setattr(run.optimizer, name, value)
        try:
            run.step()
        except ValueError as error:
            found.append(str(error))
        setattr(run.optimizer, name, kept)
    same = all((before[key] == value).all() for key, value in run.weights().items())
    run.step()
    return found, same, not all((before[key] == value).all() for key, value in run.weights().items())


def skipped_step():
    """A batch size that makes rescale_grad NaN on one worker: nobody updates."""
    run = make_run()
    run.trainer = trainer_on_servers(run.parameters, go.create('adamw', learning_rate=RATE))
    run.step()
    before = run.weights()
    run.step(batch_size=nd.array([float('nan') if STORE.rank else 1.0]))
    between = run.weights()
    run.step()
    after = run.weights()
    return [all((a[key] == b[key]).all() for key in a) for a, b in ((before, between), (between, after))]


def compressed(update_on_kvstore):
    """What is in a weight after each of three gradients of 0.3 from each worker: 0.5 is sent once as much has added up."""
    p = gluon.Parameter('w', shape=(10, 16))
    p.initialize(mx.init.Zero())
    trainer = gluon.Trainer([p], go.create('sgd_torch', learning_rate=1.0), kvstore=STORE, update_on_kvstore=update_on_kvstore,
                            compression_params={'type': '2bit', 'threshold': 0.5})
    found = []
    for _ in range(3):
        with autograd.record():
            loss = (p.data() * 0.3).sum()
        loss.backward()
        trainer.step(1)
        found.append(sorted(set(p.data().asnumpy().ravel().tolist())))
    return found


def module(name):
    """The parameters of a Module after some steps on this worker's half of each batch."""
    return trained_module(name, STORE, [slice(0, 4), slice(4, 8)][STORE.rank])


def trained_module(name, store, rows):
    """As `module`; in one process ``rows`` are all."""
    data = mx.sym.Variable('data')
    net = mx.sym.FullyConnected(mx.sym.Activation(mx.sym.FullyConnected(data, num_hidden=5, name='first'), 'tanh'), num_hidden=3,
                                name='second')
    random = np.random.RandomState(0)
    shapes = dict(first_weight=(5, 4), first_bias=(5,), second_weight=(3, 5), second_bias=(3,))
    module = mx.mod.Module(mx.sym.SoftmaxOutput(net, name='softmax'))
    size = len(range(8)[rows])
    module.bind([('data', (size, 4))], [('softmax_label', (size,))])
    module.init_params(arg_params={key: nd.array(random.normal(size=shape)) for key, shape in shapes.items()})
    scheduler = mx.lr_scheduler.FactorScheduler(step=2, factor=0.5, base_lr=0.125)
    module.init_optimizer(store, name, dict(lr_scheduler=scheduler, learning_rate=0.125, wd=0.125))
    for t in range(6):
        if t == 4:
            module._optimizer.wd = 0.25
        x, y = random.normal(size=(8, 4)), random.randint(0, 3, 8)
        module.forward_backward(mx.io.DataBatch([nd.array(x[rows])], [nd.array(y[rows])]))
        module.update()
    return {key: array.asnumpy().ravel().tolist() for key, array in module.get_params()[0].items()}


def main():
    for name, *arguments in json.loads(sys.argv[2]):
        try:
            answer = globals()[name](*arguments)
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps([[name, *arguments], answer]), flush=True)
        STORE._barrier()  # the optimizer of the next job clears the error that the other worker may still wait for
    nd.waitall()
    STORE._barrier()
    # the jobs' trainers keep the store, and where it is not freed MXNet's own exit aborts
    STORE.__del__()
    os._exit(0)


if __name__ == '__main__':
    main()
