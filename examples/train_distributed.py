#!/usr/bin/env python
"""Train a small net on handwritten digits with several workers and parameter servers; kill one, resume on other servers.

    tools/cluster --workers 2 --servers 2 python examples/train_distributed.py --log straight.jsonl
    tools/cluster --workers 2 --servers 2 python examples/train_distributed.py --checkpoint-dir run --kill-at 230 --log killed.jsonl
    tools/cluster --workers 2 --servers 3 python examples/train_distributed.py --checkpoint-dir run --resume --log resumed.jsonl

In the second, all other processes end and say why. The last line of the first and of the third are equal: the same weights and
states, bit for bit. With dist_async, one worker late:

    tools/cluster --workers 2 --servers 2 python examples/train_distributed.py --asynchronous sgd_torch --log sgd.jsonl
    tools/cluster --workers 2 --servers 2 python examples/train_distributed.py --asynchronous dcasgd --log dcasgd.jsonl
    python examples/train_distributed.py --picture losses.png straight.jsonl killed.jsonl resumed.jsonl sgd.jsonl dcasgd.jsonl

Exit codes: 0 trained, 1 refused with a reason, 2 unusable arguments.
"""
import argparse
import collections
import hashlib
import json
import logging
import os
import re
import signal
import sys
from pathlib import Path

import digits
import mxnet as mx
import numpy
from mxnet import autograd, gluon

import gluon_optim as go

S = go.lr_scheduler
SAMPLES = 32  # of each worker, in each step
UPDATES = 500  # of each worker, in dist_async
LOSS = gluon.loss.SoftmaxCrossEntropyLoss()
THRESHOLD = 0.5  # of 2bit compression, for the sum of a worker's gradients
RECIPE = ('learning_rate', 'epochs', 'seed', 'compress')  # what a resumed run must share with the one it continues


def build_net(seed):
    mx.random.seed(seed)  # dist_sync and dist_async start from the weights of rank 0
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Dense(256, activation='relu', in_units=64), gluon.nn.Dense(64, activation='relu', in_units=256),
            gluon.nn.Dense(10, in_units=64))
    net.initialize(mx.init.Xavier())
    net.hybridize()
    return net


def gradient(net, images, labels):
    """Compute the gradients of this worker's samples; returns their mean loss."""
    with autograd.record():
        losses = LOSS(net(mx.nd.array(images)), mx.nd.array(labels))
    losses.backward()
    return float(losses.mean().asscalar())


def make_schedule(options, steps, workers):
    """The rate for one worker times the number of workers, as their batches are one; a warm-up from the one to the other."""
    warm = steps // 10
    cosine = S.Cosine(steps - warm, base_lr=options.learning_rate)
    scaled = S.scaled(cosine, batch_size=workers * SAMPLES, reference=SAMPLES)
    return S.Warmup(scaled, warm, begin=min(options.learning_rate, scaled(1)))


def train(options, store, log):
    """dist_sync: a step of all workers is the step of one process with the whole batch."""
    (images, labels), held_out = digits.load()
    recipe = {'workers': store.num_workers, **{key: getattr(options, key) for key in RECIPE}}
    batch_size = store.num_workers * SAMPLES
    steps = options.epochs * (len(images) // batch_size)
    net = build_net(options.seed)
    trainer = gluon.Trainer(
        net.collect_params(), 'sgd_torch', {'momentum': 0.9, 'lr_scheduler': make_schedule(options, steps, store.num_workers)},
        kvstore=store, compression_params={'type': '2bit', 'threshold': THRESHOLD} if options.compress else None)
    go.watch(trainer)  # when a process dies, the others end instead of waiting for it
    manager = go.CheckpointManager(options.checkpoint_dir, save_every=20) if options.checkpoint_dir else None
    start = restore(manager, net, trainer, recipe) if options.resume else 0

    for step in range(start, steps):
        batch = digits.batch_indices(options.seed, step, len(images), batch_size)  # the same on all workers; each takes its part
        mine = batch[store.rank::store.num_workers]
        loss = gradient(net, images[mine], labels[mine])
        trainer.step(batch_size)  # of all workers: the servers add up their gradients
        if manager:  # all workers call it, and rank 0 writes
            manager.save(step + 1, net=net, trainer=trainer, extra=recipe)
        log.write(json.dumps({'step': step + 1, 'loss': loss}) + '\n')
        if step + 1 == options.kill_at and store.rank == store.num_workers - 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return (f'step {steps}: accuracy {accuracy(net, *held_out):.2%} on {len(held_out[1])} held-out digits, '
            f'weights {parameters_digest(net)[:16]}, states {go.states_digest(trainer, net)[:16]}')


def restore(manager, net, trainer, recipe):
    """Restore the newest intact checkpoint, with rank 0 reading it for all; returns its step."""
    restored = manager.restore_latest(net=net, trainer=trainer)
    if restored is None:
        raise ValueError(f'--resume finds no checkpoint in {manager.directory}. Leave --resume out to start a new run there.')
    differing = [f'{key} is {restored[key]!r} there, {value!r} here' for key, value in recipe.items() if restored[key] != value]
    if differing:
        raise ValueError(f'{manager.directory} holds another run: {"; ".join(differing)}.')
    print(f'resumed at step {restored.step}', flush=True)
    return restored.step


def train_asynchronously(options, store, log):
    """dist_async: servers apply each gradient when it arrives. Those of the last worker are late: the weights have moved since.

    Batches of one digit, because dcasgd takes squares of gradients for curvature, and those of a mean of many are far smaller.
    """
    (images, labels), _ = digits.load()
    net = build_net(options.seed)
    hypers = {'lamda': options.lamda} if options.asynchronous == 'dcasgd' else {}
    trainer = gluon.Trainer(net.collect_params(), options.asynchronous, {'learning_rate': options.learning_rate, **hypers},
                            kvstore=store)
    go.watch(trainer)
    parameters = list(net.collect_params().values())
    delay = options.delay if store.rank == store.num_workers - 1 else 0
    waiting = collections.deque()
    random = numpy.random.default_rng([options.seed, store.rank])
    seen = []
    for step in range(1 - delay, UPDATES + 1):  # the last worker, too, sends UPDATES gradients
        digit = random.choice(len(images), 1)
        gradient(net, images[digit], labels[digit])
        waiting.append([parameter.grad().copy() for parameter in parameters])
        if step < 1:
            continue
        for parameter, late in zip(parameters, waiting.popleft()):
            late.copyto(parameter.grad())
        trainer.step(1)
        if step % 20 == 0:
            seen.append(float(LOSS(net(mx.nd.array(images)), mx.nd.array(labels)).mean().asscalar()))
            log.write(json.dumps({'step': step, 'loss': seen[-1], 'asynchronous': options.asynchronous}) + '\n')
    go.states_digest(trainer, net)  # waits for all workers, so that none leaves early
    return f'{UPDATES} updates: loss {numpy.mean(seen[-len(seen) // 4:]):.3f} in the last quarter'


def accuracy(net, images, labels):
    return float(numpy.mean(net(mx.nd.array(images)).argmax(axis=1).asnumpy() == labels))


def parameters_digest(net):
    """SHA-256 over the bytes of all weights."""
    return hashlib.sha256(b''.join(parameter.data().asnumpy().tobytes() for parameter in net.collect_params().values())).hexdigest()


def draw(logs, path):
    """The losses in the logs, of dist_sync on the left, of dist_async on the right; mean and range of a-0.jsonl, a-1.jsonl, ..."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as pyplot
    figure, panels = pyplot.subplots(1, 2, layout='constrained', figsize=(8, 3.6))
    runs = [{}, {}]  # name -> losses of each log, by step
    for log in map(Path, logs):
        records = [json.loads(line) for line in log.read_text().splitlines()]
        losses = {record['step']: record['loss'] for record in records}
        runs['asynchronous' in records[0]].setdefault(re.sub(r'-\d+$', '', log.stem), []).append(losses)
    for axes, named in zip(panels, runs):
        for (name, several), width, color in zip(named.items(), (4, 1.2, 1.2), ('#a0a0a0', '#d1495b', '#00798c')):
            steps, losses = list(several[0]), numpy.array([list(losses.values()) for losses in several])
            axes.semilogy(steps, losses.mean(axis=0), label=name, linewidth=width, color=color)
            axes.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.2, linewidth=0)
    panels[0].set(title='dist_sync', xlabel='step', ylabel="training loss, rank 0's part of a batch")
    panels[1].set(title='dist_async, one worker late', xlabel='update of rank 0', ylabel='loss on all training digits')
    panels[1].set_yscale('linear')
    for axes in panels:
        axes.legend(frameon=False)
        axes.grid(color='#dddddd', linewidth=0.6)
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--learning-rate', type=float, help="for one worker's batch (default: 0.01; in dist_async 0.03)")
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--log', default=os.devnull, help='append step and loss of rank 0 here, one JSON object per line')
    parser.add_argument('--compress', action='store_true',
                        help=f'send 2 bits per gradient: -{THRESHOLD}, 0 or {THRESHOLD}; the rest is kept for the next step, but '
                             'not in checkpoints: with it a resumed run is not the same bit for bit')
    parser.add_argument('--checkpoint-dir', help='where rank 0 keeps the last three checkpoints; none are written without it')
    parser.add_argument('--resume', action='store_true', help='continue from the newest checkpoint in --checkpoint-dir')
    parser.add_argument('--kill-at', type=int, metavar='STEP', help='kill the last worker after this step, as an accident would')
    parser.add_argument('--asynchronous', metavar='OPTIMIZER', help='use dist_async, with the last worker late')
    parser.add_argument('--delay', type=int, default=4, metavar='STEPS', help='by which its gradients are late (default: 4)')
    parser.add_argument('--lamda', type=float, default=1.0, help='how much dcasgd compensates (default: %(default)s)')
    parser.add_argument('--picture', metavar='FILE', help='draw the losses of LOGS (needs matplotlib), and nothing else')
    parser.add_argument('logs', nargs='*', metavar='LOG')
    options = parser.parse_args(arguments)
    if bool(options.picture) != bool(options.logs):
        parser.error('--picture FILE needs logs, and logs need --picture FILE')
    if options.resume and not options.checkpoint_dir:
        parser.error('--resume needs --checkpoint-dir')
    if options.epochs < 1 or options.delay < 0:
        parser.error('--epochs must be at least 1, and --delay at least 0')
    if options.learning_rate is None:
        options.learning_rate = 0.03 if options.asynchronous else 0.01
    return options


def main(arguments=None):
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format='%(message)s')  # shows what is saved and restored
    os.environ.setdefault('MXNET_KVSTORE_BIGARRAY_BOUND', '10000')  # so that servers share even a matrix of this small net
    try:
        if options.picture:
            draw(options.logs, options.picture)
            return 0
        store = mx.kv.create('dist_async' if options.asynchronous else 'dist_sync')
        with open(options.log if store.rank == 0 else os.devnull, 'a', buffering=1) as log:
            print(f'rank {store.rank}:', (train_asynchronously if options.asynchronous else train)(options, store, log), flush=True)
    except (ValueError, TypeError, OSError) as error:
        print(f'train_distributed: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
