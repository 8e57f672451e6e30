"""MXNet's updater for lists of parameters that are the same at each step."""
import operator
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

# submodules, not attributes of `mxnet`: a parameter server imports this file while `mxnet` is still being imported
from mxnet.ndarray import NDArray
from mxnet.optimizer import optimizer as mx_optimizer

from .typing import TrainerLike

__all__ = ['remember_lists']


# MXNet 2.x has another, elsewhere, and hands over arrays that it wraps anew at each call: there is nothing to remember
_Updater: Any = getattr(mx_optimizer, 'Updater', object)


class _Known(NamedTuple):
    """The list of the last call. ``groups`` are the places of the weights of each type, or empty where there is one type."""

    indices: Tuple[Any, ...]
    weights: Tuple[Any, ...]
    groups: Sequence[Sequence[int]]


class _ListUpdater(_Updater):
    """MXNet's updater, except that it asks weights for their types once and not at every step, which for MXNet takes a
    millisecond for a thousand of them."""

    _known: Optional[_Known] = None

    def __call__(self, index: Any, grad: Any, weight: Any) -> None:
        states = self._states(index, grad, weight)
        if states is None:
            super().__call__(index, grad, weight)
            self._known = _known(index, grad, weight)
            return
        self.optimizer._set_current_context(weight[0].context.device_id)
        groups = self._known.groups if self._known else ()
        if not groups:
            self.optimizer.update_multi_precision(index, weight, grad, states)
        for places in groups:
            self.optimizer.update_multi_precision(*([all_of[k] for k in places] for all_of in (index, weight, grad, states)))

    def _states(self, index: Any, grad: Any, weight: Any) -> Optional[List[Any]]:
        """The states of the parameters of the last call; None where anything has changed that MXNet's own updater looks at."""
        known = self._known
        if (known is None or not isinstance(index, (list, tuple)) or tuple(index) != known.indices
                or len(weight) != len(known.weights) or not all(map(operator.is_, weight, known.weights))
                or set(map(type, grad)) != {NDArray} or not all(map(self.states_synced.get, index))
                or not self.aggregate_updates or self.optimizer.aggregate_num < len(index)):
            return None
        try:
            return list(map(self.states.__getitem__, index))
        except KeyError:
            return None


def _known(index: Any, grad: Any, weight: Any) -> Optional[_Known]:
    if not isinstance(index, (list, tuple)) or not index or set(map(type, weight)) != {NDArray}:
        return None   # arrays of mx.np, which MXNet wraps anew at each call, or sparse ones
    places: Dict[Any, List[int]] = {}
    for k, one in enumerate(weight):
        places.setdefault(one.dtype, []).append(k)
    return _Known(tuple(index), tuple(weight), list(places.values()) if len(places) > 1 else ())


def remember_lists(trainer: TrainerLike) -> None:
    """Let the updaters of ``trainer`` remember the lists that they get."""
    for updater in trainer._updaters:
        if type(updater) is _Updater:
            updater.__class__ = _ListUpdater
