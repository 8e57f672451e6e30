"""The start of a distributed run: no gradient may overtake the initial weights.

A Trainer asks its store for the initial weights in the first step, when gradients are known already, and pushes these
without waiting. Where servers only add up what is pushed (``update_on_kvstore=False``), a worker that is late gets sums of
gradients for weights. Here all workers wait for their weights, and for each other, before the first push.

Nor may servers round what they get. Where a server of MXNet keeps float32 copies of all other types depends on a flag that only a
command sets, to true. Nothing initializes it: it is what happens to be in memory.
"""
import weakref
from typing import Any, Collection, MutableMapping

from mxnet import ndarray as nd

from .protocol import number_of_servers, precision_keys

__all__ = ['check_precision', 'for_every_trainer', 'start_together', 'starts_together']

_started: MutableMapping[Any, int] = weakref.WeakKeyDictionary()  # how many parameters of each store all workers have
_single: MutableMapping[Any, bool] = weakref.WeakKeyDictionary()  # whether a server of the store keeps float32 copies
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


def check_precision(store: Any, dtypes: Collection[str], updates: bool, masters: bool, named: bool = False) -> None:
    """ValueError where servers keep float32 copies of weights or gradients of another type, and nobody has asked for them.

    All workers call it. ``dtypes`` are those of the weights; ``updates``: servers update them; ``masters``: they are to have
    float32 masters of float16 weights.
    """
    if 'float64' in dtypes:
        if _keeps_single(store, named):
            raise ValueError('These servers would keep float64 weights and gradients as float32: MXNet does not initialize the '
                             'flag that says so, and here it happens to be set. Received: float64 parameters. Use float32, or '
                             'Horovod.')
    elif updates and 'float16' in dtypes and not masters and _keeps_single(store, named):
        raise ValueError('These servers would update float32 copies of float16 weights: MXNet does not initialize the flag that '
                         'says so, and here it happens to be set. Received: float16 parameters without multi_precision. Pass '
                         'multi_precision=True or update_on_kvstore=False.')


def _keeps_single(store: Any, named: bool) -> bool:
    """Asked once, by all workers together."""
    if store not in _single:
        keys, number = precision_keys(number_of_servers(), named), 1 + 2 ** -40
        store.init(keys, [nd.full((1,), number, dtype='float64') for _ in keys])
        found = [nd.zeros((1,), dtype='float64') for _ in keys]
        store.pull(keys, found)
        _single[store] = any(array.asscalar() != number for array in found)
    return _single[store]
