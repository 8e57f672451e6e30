"""One list of parameters per step where `gluon.Trainer` updates on its kvstore.

MXNet's trainer pushes one gradient, has its parameter updated and pulls the new weight before it pushes the next. With an
optimizer of this package it pushes all gradients, has all parameters updated by one call, and pulls all weights. Errors of
the optimizer reach the caller that way; out of a push they could not, which calls the updater through C.
"""
import ctypes
import functools
from typing import Any, List, Tuple

from mxnet.base import _LIB, NDArrayHandle, c_array, c_handle_array, check_call, mx_uint
from mxnet.gluon import Trainer
from mxnet.kvstore import KVStore
from mxnet.ndarray import NDArray

__all__ = ['update_together']

_allreduce_grads = Trainer._allreduce_grads  # MXNet's


def update_together() -> None:
    """Let trainers that update on their kvstore do so by one call of the optimizer, wherever it is one of this package."""
    Trainer._allreduce_grads = _allreduce_grads_together


@functools.wraps(_allreduce_grads)
def _allreduce_grads_together(self: Trainer) -> None:
    trained = [(i, parameter) for i, parameter in enumerate(self._params) if parameter.grad_req != 'null']
    if not trained or not _can_update_together(self):
        _allreduce_grads(self)
        return
    store, updater = self._kvstore, self._kvstore._updater
    pushed: List[Tuple[int, NDArray, NDArray]] = []  # key, sum of the gradients, stored weight
    gather = _UPDATER(lambda key, gradient, weight, _: pushed.append((key, _array(gradient), _array(weight))))
    _set_updater(store, gather)
    try:
        _call(_LIB.MXKVStorePush, store, [(i, gradient) for i, parameter in trained for gradient in parameter.list_grad()])
    finally:
        _set_updater(store, store._updater_func)
    with updater.optimizer.counting_singly():
        updater(*map(list, zip(*pushed)))
    _call(_LIB.MXKVStorePullWithSparse, store, [(i, weight) for i, parameter in trained for weight in parameter.list_data()],
          ctypes.c_bool(True))


def _can_update_together(trainer: Trainer) -> bool:
    """Whether dense weights are updated on a CPU in this process by an optimizer of this package."""
    store = trainer._kvstore
    return (trainer._update_on_kvstore and type(store) is KVStore and hasattr(store._updater, 'optimizer')
            and hasattr(store._updater.optimizer, 'counting_singly')
            and not trainer._contains_sparse_weight and not trainer._contains_sparse_grad
            and trainer._contexts[0].device_type.startswith('cpu'))


_UPDATER = ctypes.CFUNCTYPE(None, ctypes.c_int, NDArrayHandle, NDArrayHandle, ctypes.c_void_p)


def _array(handle: int) -> NDArray:
    return NDArray(NDArrayHandle(handle))


def _set_updater(store: KVStore, function: Any) -> None:
    """Let pushes call ``function``. The store's own way makes new functions for C each time."""
    check_call(_LIB.MXKVStoreSetUpdaterEx(store.handle, function, store._str_updater_func, None))


def _call(function: Any, store: KVStore, pairs: List[Tuple[int, NDArray]], *arguments: Any) -> None:
    """``store.push`` or ``pull`` of (key, array): their own way to make lists for C takes longer than the work on them."""
    keys, arrays = zip(*pairs)
    check_call(function(store.handle, mx_uint(len(keys)), c_array(ctypes.c_int, keys), c_handle_array(arrays), ctypes.c_int(0),
                        *arguments))
