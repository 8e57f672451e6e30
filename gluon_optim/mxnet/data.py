"""Where a run stands in its data: an order of samples that depends on the epoch alone, and can be entered in the middle."""
from typing import Iterator

import numpy
from mxnet.gluon.data import Sampler

from ..schema import check_int

__all__ = ['EpochSampler']


class EpochSampler(Sampler):
    """Shuffled indices, drawn anew for each epoch from ``seed`` and the number of the epoch, so that a resumed run sees the same.

    MXNet's `RandomSampler` draws from the global generator when an epoch begins, and so begins a resumed epoch with another order.

    Parameters
    ----------
    length : int
        Samples in the data set.
    seed : int
        Of the run; runs of different seeds shuffle differently.

    Raises ValueError for what is not a whole number, 0 or more.

    >>> sampler = EpochSampler(6, seed=1)
    >>> list(sampler.at(epoch=2)), list(sampler.at(epoch=2, skip=4)), list(sampler.at(epoch=3))
    ([2, 4, 1, 5, 3, 0], [3, 0], [5, 2, 0, 1, 3, 4])
    """

    def __init__(self, length: int, seed: int = 0):
        self.length, self.seed = check_int('length', length), check_int('seed', seed)
        self.epoch = self.skip = 0

    def at(self, epoch: int, skip: int = 0) -> 'EpochSampler':
        """Go to ``epoch``, without its first ``skip`` samples (of batches: their number times the batch size), and return the
        sampler. A `DataLoader` that has it goes through what is left of that epoch whenever it is iterated."""
        self.epoch, self.skip = check_int('epoch', epoch), min(check_int('skip', skip), self.length)
        return self

    def __iter__(self) -> Iterator[int]:
        order = numpy.random.RandomState([self.seed, self.epoch]).permutation(self.length)
        return iter(order[self.skip:].tolist())

    def __len__(self) -> int:
        return self.length - self.skip
