"""A process under Horovod: does a list of jobs, each together with the other processes, and writes down what it found."""
import json
import sys
import tempfile
import traceback
from pathlib import Path

import mxnet as mx
import numpy as np
from contract_nets import RATE, Run, gradients
from mxnet import autograd, gluon, nd

import gluon_optim as go

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'examples'))
SHAPES = ((15, 10), (1,), (7,))
SHARES = (0.25, 0.75)  # of each gradient, for two processes


class Given(gluon.Block):
    """Parameters of SHAPES, as a net."""

    def __init__(self, dtype):
        super().__init__(prefix='given_')
        for i, shape in enumerate(SHAPES):
            setattr(self, f'p{i}', self.params.get(f'p{i}_weight', shape=shape, dtype=dtype, init=mx.init.Normal(1)))


class Together(Run):
    """A Run whose trainer is Horovod's; or, not ``together``, that of one process. ``optimizer`` is what the trainer gets."""

    def __init__(self, optimizer, arguments=None, dtype='float32', together=True, seed=0):
        super().__init__('sgd', {}, dtype, shapes=SHAPES)
        mx.random.seed(seed)
        self.net = Given(dtype)
        self.net.initialize()
        parameters = self.net.collect_params()
        self.parameters = list(parameters.values())
        for i, p in enumerate(self.parameters):
            p.lr_mult, p.wd_mult = (0.5, 1.0, 2.0)[i], (3.0, 0.0, 1.0)[i]
        self.share = SHARES[hvd.rank()] if together else 1 / hvd.size()
        self.divisor = 7 if dtype == 'float32' else 1  # sums of sevenths are rounded; those in float16 are exact
        self.trainer = (hvd.DistributedTrainer(parameters, optimizer, arguments) if together
                        else gluon.Trainer(parameters, optimizer, arguments, kvstore=None))

    def train(self, steps):
        """Horovod takes the mean of the processes' gradients. In the middle decay, multiplier and batch size change."""
        for _ in range(steps):
            if self.steps == 20:
                self.optimizer.wd, self.parameters[0].lr_mult = 0.5 * self.optimizer.wd, 0.25
            given = [self.share * g / self.divisor for g in gradients(self.steps, SHAPES)]
            self.step(given, batch_size=2 if self.steps < 20 else 4)
        return self

    def apart(self, expected):
        """How far the weights are from those of another Run, relative to the largest weight."""
        found, values = (np.concatenate([array.ravel() for array in run.weights().values()])
                         for run in (self, expected))
        return float(np.max(np.abs(found - values)) / np.max(np.abs(values)))

    def digests(self):
        return example.parameters_digest(self.net), go.states_digest(self.trainer, self.net)


def given_to_trainer(name, given, way, steps):
    """The optimizer and its arguments, with a scheduler and, where it has one, a decay. ``way`` is 'name' or 'instance'."""
    scheduler = mx.lr_scheduler.FactorScheduler(step=max(steps // 10, 1), factor=0.75, base_lr=RATE)
    arguments = dict(given, learning_rate=RATE, lr_scheduler=scheduler)
    try:
        instance = go.create(name, wd=0.125, **arguments)
        arguments['wd'] = 0.125
    except ValueError:
        instance = go.create(name, **arguments)
    return (name, arguments) if way == 'name' else (instance,)


def compare(name, given, way, steps, dtype='float32'):
    """How far the weights are from those of one process with all gradients."""
    found, alone = (Together(*given_to_trainer(name, given, way, steps), dtype=dtype, together=together).train(steps)
                    for together in (True, False))
    return found.apart(alone)


def resume(name, given, way, how, folder, dtype='float32'):
    """Whether what was saved after 20 steps is loaded; digests after 40 steps of one trainer, and after 20 each of two."""
    straight = Together(*given_to_trainer(name, given, way, 40), dtype=dtype).train(40)
    begun = Together(*given_to_trainer(name, given, way, 40), dtype=dtype).train(20)
    manager = go.CheckpointManager(folder)
    if hvd.rank() == 0:
        manager.save(20, net=begun.net, trainer=begun.trainer, reseed=False)
    wait()
    resumed = Together(*given_to_trainer(name, given, way, 40), dtype=dtype, seed=1 + hvd.rank())  # weights that differ
    resumed.steps = example.restore(how, manager, resumed.net, resumed.trainer, {})
    example.check_equal(resumed.net, resumed.trainer)
    return resumed.digests() == begun.digests(), straight.digests(), resumed.train(20).digests()


def wait():
    """Until all processes are here."""
    hvd.allreduce(nd.zeros(1), name='wait').wait_to_read()


def mismatch(what):
    """What is raised where the last process has another ``what``."""
    run = Together('novograd', {'learning_rate': RATE}).train(3)
    example.check_equal(run.net, run.trainer)
    if hvd.rank() == hvd.size() - 1:
        if what == 'weight':
            run.parameters[1].set_data(run.parameters[1].data() + 1)
        elif what == 'state':
            slot = run.trainer._updaters[0].states[2][0]
            slot += 1
        else:  # as after a file of another step
            with tempfile.TemporaryDirectory() as folder:
                go.save_states(Together('novograd', {'learning_rate': RATE}, together=False).trainer, f'{folder}/states')
                go.load_states(run.trainer, f'{folder}/states')
    try:
        example.check_equal(run.net, run.trainer)
    except ValueError as error:
        return str(error)
    return 'equal'


def clipped(optimizer='novograd', steps=6):
    """Clipping, with the batch size of a process, against one process."""
    found, alone = [], []
    for norms, together in ((found, True), (alone, False)):
        run = Together(optimizer, {'learning_rate': RATE}, together=together)
        for t in range(steps):
            run.backward([run.share * g for g in gradients(t, SHAPES)])
            run.trainer.allreduce_grads()
            norms.append(go.gradients.clip_by_global_norm(run.trainer, 1.0, batch_size=4))
            run.trainer.update(4)
        norms.append(run)
    return found[-1].apart(alone[-1]), max(abs(a - b) / b for a, b in zip(found[:-1], alone[:-1])), min(alone[:-1])


def scaled(overflow_of=1):
    """With a loss scale, against one process without; in the third step only one process has an infinite gradient."""
    run = Together('adamw', {'learning_rate': RATE})
    scaler = go.gradients.Scaler(run.trainer, init_scale=1024)
    updated = []
    for t in range(6):
        infinite = float('inf') if t == 2 and hvd.rank() == overflow_of else 1.0
        with autograd.record():
            loss = sum((p.data() * nd.array(run.share * g * infinite)).sum() for p, g in zip(run.parameters, gradients(t, SHAPES)))
        scaler.scale(loss).backward()
        scaler.unscale()
        updated.append(scaler.step(2))
        scaler.update()
    alone = Together('adamw', {'learning_rate': RATE}, together=False)
    for t in range(6):
        if t != 2:
            alone.step([alone.share * g for g in gradients(t, SHAPES)], batch_size=2)
    return run.apart(alone), updated, scaler.loss_scale


def summed_twice():
    """What is raised by a step of the trainer after `Scaler.unscale`, which has summed the gradients of all processes."""
    run = Together('sgd_torch', {'learning_rate': RATE})
    scaler = go.gradients.Scaler(run.trainer, init_scale=1024)
    with autograd.record():
        loss = sum((p.data() * nd.array(g)).sum() for p, g in zip(run.parameters, gradients(0, SHAPES)))
    scaler.scale(loss).backward()
    scaler.unscale()
    try:
        run.trainer.step(1)
    except ValueError as error:
        return str(error)
    return 'not refused'


def accumulated(folder):
    """Updates from three batches each, saved by rank 0 between two of them and loaded by all; against one process."""
    run, alone = (Together('novograd', {'learning_rate': RATE}, together=together) for together in (True, False))
    for one in (run, alone):
        accumulate = go.gradients.Accumulate(one.trainer, 3)
        for t in range(12):
            if t == 6 and one is run:
                path = f'{folder}/accumulated.safetensors'
                if hvd.rank() == 0:
                    go.save_checkpoint(path, net=run.net, trainer=run.trainer, reseed=False)
                wait()
                go.load_checkpoint(path, net=run.net, trainer=run.trainer)
                example.check_equal(run.net, run.trainer)
            one.backward([one.share * g for g in gradients(t, SHAPES)])
            accumulate.step(2)
    return run.apart(alone)


def noisy(name):
    """Whether all processes have the same weights where each draws the noise of its own updates, from the same seed."""
    mx.random.seed(7)
    run = Together(name, {'learning_rate': RATE / 100}).train(5)
    example.check_equal(run.net, run.trainer)
    return True


def by_hand(name):
    """A Trainer of each process, with gradients that `hvd.allreduce_` has averaged, against one process."""
    run, alone = (Together(name, {'learning_rate': RATE}, together=False) for _ in range(2))
    for t in range(6):
        run.backward([SHARES[hvd.rank()] * g for g in gradients(t, SHAPES)])
        for p in run.parameters:
            hvd.allreduce_(p.grad(), average=True, name=p.name)
        run.trainer.step(2)
        alone.step([alone.share * g for g in gradients(t, SHAPES)], batch_size=2)
    return run.apart(alone)


def deferred(how, folder):
    """Whether a net without shapes gets those, the weights and the states of rank 0's file in every process."""
    def make(seed, **units):
        mx.random.seed(seed)
        net = gluon.nn.HybridSequential(prefix='net_')
        with net.name_scope():
            net.add(gluon.nn.Dense(4, activation='relu', **units), gluon.nn.Dense(3))
        net.initialize(mx.init.Xavier())
        return net, hvd.DistributedTrainer(net.collect_params(), 'novograd', {'learning_rate': RATE})

    net, trainer = make(0)
    example.gradient(net, np.ones((2, 5), 'f4'), np.zeros(2))
    trainer.step(2)
    manager = go.CheckpointManager(folder)
    if hvd.rank() == 0:
        manager.save(1, net=net, trainer=trainer, reseed=False)
    wait()
    other, trainer_of_other = make(1 + hvd.rank())
    example.restore(how, manager, other, trainer_of_other, {})
    example.check_equal(other, trainer_of_other)
    return example.parameters_digest(other) == example.parameters_digest(net)


def main():
    jobs, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    example.PIECE = 1000  # so that a file is sent in several
    with open(folder / f'{hvd.rank()}.jsonl', 'w') as file:
        for name, *arguments in jobs:
            try:
                answer = globals()[name](*arguments)
            except Exception:
                answer = traceback.format_exc()
            file.write(json.dumps(answer) + '\n')
            file.flush()
    wait()


if __name__ == '__main__':
    import horovod.mxnet as hvd
    import train_horovod as example
    hvd.init()
    main()
