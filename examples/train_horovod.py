#!/usr/bin/env python
"""Train a small net on handwritten digits with several processes under Horovod; kill one of them, resume.

    horovodrun -np 2 --gloo python examples/train_horovod.py --losses straight.jsonl
    horovodrun -np 2 --gloo python examples/train_horovod.py --checkpoint-dir run --kill-at 230 --losses killed.jsonl
    horovodrun -np 2 --gloo python examples/train_horovod.py --checkpoint-dir run --resume broadcast --losses resumed.jsonl

The last lines of the first and of the third are equal: the same weights and states, bit for bit. docs/DISTRIBUTED.md says how to
install Horovod.

Exit codes: 0 trained, 1 refused with a reason, 2 unusable arguments.
"""
import argparse
import json
import logging
import os
import signal
import sys
import tempfile

import digits
import horovod.mxnet as hvd
import mxnet as mx
import numpy
from mxnet import gluon
from train_distributed import SAMPLES, accuracy, gradient, make_schedule, parameters_digest

import gluon_optim as go

PIECE = 1 << 26  # bytes of a file that are sent at once: Horovod makes an array of them, which MXNet limits to 2 GB
RECIPE = ('learning_rate', 'epochs', 'seed')  # what a resumed run must share with the one it continues


def build_net(seed):
    mx.random.seed(seed)
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Dense(256, activation='relu', in_units=64), gluon.nn.Dropout(0.2),
            gluon.nn.Dense(64, activation='relu', in_units=256), gluon.nn.Dense(10, in_units=64))
    net.initialize(mx.init.Xavier())
    net.hybridize()
    return net


def train(options, log):
    """A step of all processes is the step of one process with the whole batch."""
    (images, labels), held_out = digits.load()
    recipe = {'processes': hvd.size(), **{key: getattr(options, key) for key in RECIPE}}
    batch_size = hvd.size() * SAMPLES
    steps = options.epochs * (len(images) // batch_size)
    net = build_net(options.seed)
    trainer = hvd.DistributedTrainer(
        net.collect_params(), 'sgd_torch', {'momentum': 0.9, 'lr_scheduler': make_schedule(options, steps, hvd.size())})
    manager = go.CheckpointManager(options.checkpoint_dir, save_every=20) if options.checkpoint_dir else None
    if options.resume:
        start = restore(options.resume, manager, net, trainer, recipe)
    else:
        start = 0
        hvd.broadcast_parameters(net.collect_params(), root_rank=0)
    check_equal(net, trainer)

    for step in range(start, steps):
        batch = digits.batch_indices(options.seed, step, len(images), batch_size)  # the same everywhere; each takes its part
        mine = batch[hvd.rank()::hvd.size()]
        mx.random.seed(dropout_seed(options.seed, step, hvd.rank()))
        loss = gradient(net, images[mine], labels[mine])
        trainer.step(SAMPLES)  # of this process: Horovod divides by the number of processes
        if manager and hvd.rank() == 0:  # the only writer; the others meet it in the next step
            manager.save(step + 1, net=net, trainer=trainer, extra=recipe, reseed=False)
        log.write(json.dumps({'step': step + 1, 'loss': loss}) + '\n')
        if step + 1 == options.kill_at and hvd.rank() == hvd.size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
    check_equal(net, trainer)
    return (f'step {steps}: accuracy {accuracy(net, *held_out):.2%} on {len(held_out[1])} held-out digits, '
            f'weights {parameters_digest(net)[:16]}, states {go.states_digest(trainer, net)[:16]}')


def dropout_seed(seed, step, rank):
    """Other random numbers in each step and process, and the same ones in a run that resumes at any step.

    A checkpoint could restore those of the process that writes it only.
    """
    return int(numpy.random.SeedSequence([seed, step, rank]).generate_state(1)[0] >> 1)


def restore(how, manager, net, trainer, recipe):
    """Restore the newest intact checkpoint; returns its step.

    Every process reads the folder ('everywhere'), or rank 0 does and sends the file to the others ('broadcast').
    """
    if how == 'everywhere' or hvd.rank() == 0:
        restored = manager.restore_latest(net=net, trainer=trainer)
        if restored is None:
            raise ValueError(f'--resume finds no checkpoint in {manager.directory}. Leave --resume out to start a new run there.')
    if how == 'broadcast':
        with tempfile.TemporaryDirectory() as folder:
            path = restored.path if hvd.rank() == 0 else os.path.join(folder, 'checkpoint.safetensors')
            broadcast_file(path)
            if hvd.rank() > 0:
                restored = go.load_checkpoint(path, net=net, trainer=trainer)
    differing = [f'{key} is {restored[key]!r} there, {value!r} here' for key, value in recipe.items() if restored[key] != value]
    if differing:
        raise ValueError(f'{manager.directory} holds another run: {"; ".join(differing)}.')
    print(f'resumed at step {restored.step}', flush=True)
    return restored.step


def broadcast_file(path):
    """Send the file that rank 0 has at ``path`` to the other processes, which write it to theirs."""
    with open(path, 'rb' if hvd.rank() == 0 else 'wb') as file:
        piece = b'.'
        while piece:
            # without a name it would be called by its type, and the processes would wait for different things
            piece = hvd.broadcast_object(file.read(PIECE) if hvd.rank() == 0 else None, name='piece')
            mx.nd.waitall()  # rank 0 does not wait until it is sent, and two pieces on their way may not have the same name
            if hvd.rank() > 0:
                file.write(piece)


def check_equal(net, trainer):
    """Raise ValueError in every process where the weights or states of one are not those of rank 0."""
    digests = hvd.allgather_object((parameters_digest(net), go.states_digest(trainer, net)), name='digests')
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise ValueError('All processes must have the weights and states of rank 0. Received: others in rank '
                         f'{", ".join(map(str, differing))}. Let all load the same file, or rank 0 load it and send it to them.')


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--learning-rate', type=float, default=0.01, help="for one process's batch (default: %(default)s)")
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--losses', default=os.devnull, help='append step and loss of rank 0 here, one JSON object per line')
    parser.add_argument('--checkpoint-dir', help='where rank 0 keeps the last three checkpoints; none are written without it')
    parser.add_argument('--resume', choices=['everywhere', 'broadcast'],
                        help='continue from the newest checkpoint in --checkpoint-dir: all processes read it, or rank 0 sends it')
    parser.add_argument('--kill-at', type=int, metavar='STEP', help='kill the last process after this step, as an accident would')
    options = parser.parse_args(arguments)
    if options.resume and not options.checkpoint_dir:
        parser.error('--resume needs --checkpoint-dir')
    if options.epochs < 1:
        parser.error('--epochs must be at least 1')
    return options


def main(arguments=None):
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format='%(message)s')  # shows what is saved and restored
    hvd.init()
    try:
        with open(options.losses if hvd.rank() == 0 else os.devnull, 'a', buffering=1) as log:
            print(f'rank {hvd.rank()}:', train(options, log), flush=True)
    except (ValueError, TypeError, OSError) as error:
        print(f'train_horovod: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
