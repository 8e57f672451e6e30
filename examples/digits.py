"""The data of the examples: UCI's handwritten digits, which ship inside scikit-learn, and the order in which they come.

No framework here, so that a run carried over from MXNet to PyTorch sees the same batches.
"""
import json
import os

import numpy
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gluon_optim as go


def load():
    """1797 images of 8 x 8 pixels in [0, 1]: ((1437 images, labels) to train on, (360 images, labels) held out)."""
    digits = load_digits()
    images = (digits.images / 16).astype('float32')[:, None]  # NCHW
    labels = digits.target.astype('int32')
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return (train_x, train_y), (test_x, test_y)


def batch_indices(seed, step, samples, batch_size):
    """The samples in the batch of step number ``step`` = 0, 1, ...

    Depends only on (seed, step): a run that resumes at any step needs no generator's state.
    """
    per_epoch = samples // batch_size
    epoch, batch = divmod(step, per_epoch)
    order = numpy.random.default_rng([seed, epoch]).permutation(samples)
    return order[batch * batch_size:(batch + 1) * batch_size]


def photographs(images):
    """The images in ResNet's format: 32 x 32 pixels in three equal color channels."""
    return numpy.broadcast_to(images, (len(images), 3, 8, 8)).repeat(4, axis=2).repeat(4, axis=3)


def read_checkpoint(parser, path, *recipe):
    """States and run of a checkpoint that records its step and, in ``extra``, its ``recipe``; otherwise a parser error."""
    try:
        states, run = go.read_checkpoint(path)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    said = {} if run is None else {'step': run.step, **run.extra}
    missing = [word for word in ('step', 'learning_rate', 'epochs', 'batch_size', 'seed', *recipe) if said.get(word) is None]
    if missing:
        parser.error(f'{path} must be a checkpoint of the example to continue: it does not contain {", ".join(missing)}')
    return states, run


def logged(checkpoint):
    """The losses of the run that continued in Gluon, step -> loss, if its log is next to the checkpoint; otherwise none."""
    log = os.path.join(os.path.dirname(checkpoint), 'losses.jsonl')
    if not os.path.exists(log):
        return {}
    with open(log) as file:
        return {record['step']: record['loss'] for record in map(json.loads, file)}


def compare(losses, gluon, where):
    """Print the differences between the losses of two runs, each step -> loss."""
    apart = [abs(loss - gluon[step]) for step, loss in losses.items() if step in gluon]
    if apart:
        print(f'losses in Gluon and {where} differ by {apart[0]:.1e} in the first step, '
              f'at most {max(apart[:10]):.1e} in the first ten, {max(apart):.1e} in all {len(apart)}')
