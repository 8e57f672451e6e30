"""What the competitors of tools/bench.py share: the tensors, the numbers in them, and how they take turns. Needs NumPy only."""
import sys
import time
from pathlib import Path
from typing import Callable, Mapping, NamedTuple, Sequence

import numpy

sys.path.append(str(Path(__file__).resolve().parent.parent))  # an environment without this package measures this folder's

RATE, DECAY, NOVOGRAD_BETAS = 1e-4, 1e-4, (0.95, 0.98)
# so that each optimizer keeps its usual state, and none has less to compute than its peers
ARGUMENTS = {name: dict(momentum=0.9) for name in ('sgd', 'nag', 'signum', 'lars', 'lbsgd', 'sgd_torch')}
ARGUMENTS['novograd'] = dict(wd=DECAY)
STEPS, TURN = 10, 0.05  # a competitor's turn is at most this many steps and about this many seconds


class Framework(NamedTuple):
    """The competitors of one framework.

    ``needs``   packages without which nothing of it runs
    ``dtypes``  types of weights that our optimizers take there; those of half precision have float32 masters
    ``cases``   what is measured unless ``--case`` says otherwise
    ``ours``    family -> ``make(name, data, dtype)`` for the rule ``name``
    ``others``  'family:name' -> ``make(data, dtype)``
    ``beside``  patterns: what ours are measured beside, unless ``--peers`` says otherwise

    ``make`` returns a `Competitor`, or a dictionary of them by route.
    """

    needs: Sequence[str]
    dtypes: Sequence[str]
    cases: Sequence[str]
    ours: Mapping[str, Callable]
    others: Mapping[str, Callable]
    beside: Sequence[str]


def kind(name):
    """What a competitor computes, whoever made it: 'adamw' of 'torch_fused:adamw'."""
    return name.partition(':')[2].replace('_torch', '')


def arguments_of(name):
    """The arguments with which our optimizer ``name`` is measured."""
    return dict(ARGUMENTS.get(name, {}), learning_rate=RATE)


def slots_of(name):
    """How many arrays of the weight's size our optimizer ``name`` keeps."""
    from gluon_optim import rules
    rule = rules.get(name)
    return sum(slot.like == 'weight' for slot in rule.slots(rule.hyperparameters(**arguments_of(name))))


def resnet50():
    """The 161 trainable tensors of ResNet-50 (25.6 million elements): convolutions without biases, batch norms, one dense layer."""
    def convolution(inputs, outputs, kernel):
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]  # with the scale and shift of its batch norm

    shapes, inputs = convolution(3, 64, 7), 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += convolution(inputs, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            if block == 0:
                shapes += convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


class Data:
    """Weights and gradients that every competitor copies: the same numbers in separate memory."""

    def __init__(self, shapes):
        self.shapes = [tuple(shape) for shape in shapes]
        self.elements = sum(int(numpy.prod(shape)) for shape in self.shapes)
        random = numpy.random.default_rng(0)
        self._weights = random.random(self.elements, numpy.float32) - numpy.float32(0.5)
        self._gradients = random.standard_normal(self.elements, numpy.float32) * numpy.float32(1e-3)

    def weights(self):
        return self._split(self._weights)

    def gradients(self):
        return self._split(self._gradients)

    def _split(self, flat):
        ends = numpy.cumsum([int(numpy.prod(shape)) for shape in self.shapes])
        return [part.reshape(shape) for part, shape in zip(numpy.split(flat, ends[:-1]), self.shapes)]


class Competitor:
    """One optimizer with its own arrays.

    Parameters
    ----------
    step : callable
        One update of all tensors, complete when it returns.
    weight : callable
        The first weight, as a NumPy array.
    slots : int or None
        Number of arrays of the weight's size that it keeps; None if it updates nothing.
    dtype : str
        Type of weights and gradients.
    prepare : callable
        What must be done before each step but is not part of it.
    """

    def __init__(self, step, weight, slots, dtype='float32', prepare=lambda: None):
        self.step, self.weight, self.slots, self.dtype, self.prepare = step, weight, slots, dtype, prepare

    def turn(self):
        """Seconds of each of some steps."""
        seconds = []
        while len(seconds) < STEPS and sum(seconds) < TURN:
            self.prepare()
            begin = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - begin)
        return seconds

    def problem(self, before):
        """Why the measured steps were not updates, or '' if they were."""
        after = self.weight()
        if not numpy.isfinite(after).all():
            return 'the weights are not finite'
        return 'the weights have not changed' if self.slots is not None and numpy.array_equal(after, before) else ''
