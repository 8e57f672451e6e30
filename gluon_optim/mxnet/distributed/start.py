"""The start of a distributed run: no gradient may overtake the initial weights.

A Trainer asks its store for the initial weights in the first step, when gradients are known already, and pushes these
without waiting. Where servers only add up what is pushed (``update_on_kvstore=False``), a worker that is late gets sums of
gradients for weights. Here all workers wait for their weights, and for each other, before the first push.
"""
import weakref
from typing import Any, MutableMapping

from mxnet import ndarray as nd

__all__ = ['for_every_trainer', 'start_together', 'starts_together']

_started: MutableMapping[Any, int] = weakref.WeakKeyDictionary()  # how many parameters of each store all workers have
_every_trainer = False


def for_every_trainer(every: bool) -> None:
    """Whether trainers with optimizers of others start together too."""
    global _every_trainer
    _every_trainer = every


def starts_together(ours: bool) -> bool:
    """Whether a trainer does; ``ours``: it has an optimizer of this package."""
    return ours or _every_trainer


def start_together(store: Any, initialised: int) -> None:
    """Wait until all workers have the initial weights from ``store``, of which ``initialised`` parameters are in it."""
    if _started.get(store) != initialised:
        nd.waitall()
        store._barrier()
        _started[store] = initialised
