"""Runs of optimizers on given gradients, for comparing drop-ins with MXNet's own; also without gluon_optim."""
import numpy as np

import mxnet as mx

SHAPES = {'a_weight': (3, 4), 'b_bias': (7,), 'c_gamma': (1,), 'd_weight': (2, 3, 5), 'e_beta': (4,), 'f_weight': (40, 50)}
NAMES = list(SHAPES)
SCALES = (1.0, 0.03, 8.0, 0.4, 2.0, 1e-4, 0.7, 30.0, 0.2, 1.5, 0.0, 0.9)  # of the gradients, one step after the other


def weights(dtype='float32', seed=3, contexts=1):
    """For each context the same weights."""
    random = np.random.RandomState(seed)
    values = [random.standard_normal(shape) for shape in SHAPES.values()]
    return [[mx.nd.array(v, dtype=dtype, ctx=mx.cpu(k)) for v in values] for k in range(contexts)]


def gradients(steps, dtype='float32', seed=4):
    """For each step the gradients, as NumPy arrays."""
    random = np.random.RandomState(seed)
    return [[(SCALES[step % len(SCALES)] * random.standard_normal(shape)).astype(dtype) for shape in SHAPES.values()]
            for step in range(steps)]


class Run:
    """An optimizer with its weights; `step` updates them as a Trainer without kvstore does, or one by one."""

    def __init__(self, optimizer, dtype='float32', contexts=1, single=False):
        self.weights = weights(dtype, contexts=contexts)
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

    def arrays(self):
        """All weights and states, by what they are."""
        found = {}
        for k, (updater, held) in enumerate(zip(self.updaters, self.weights)):
            for i, weight in enumerate(held):
                found[k, NAMES[i], 'weight'] = weight.asnumpy()
                for place, array in flat(updater.states.get(i)):
                    found[k, NAMES[i], place] = array
        return found


def flat(state, place=''):
    """The arrays in a nested state, and where they are; None where there is none."""
    if isinstance(state, (tuple, list)):
        return [x for k, part in enumerate(state) for x in flat(part, f'{place}.{k}')]
    return [(place, None if state is None else state.asnumpy())]


def ulps(a, b, beside):
    """The largest difference of two arrays in units of the last place of the larger of both and ``beside``."""
    size = np.maximum(np.maximum(abs(a), abs(b)), abs(beside))
    with np.errstate(all='ignore'):
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, abs(a.astype('float64') - b) / np.spacing(size))
    return float(np.max(np.where(np.isnan(apart), np.inf, apart)))
