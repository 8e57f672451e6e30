"""One list of parameters per step where `gluon.Trainer` updates on its kvstore.

MXNet's trainer pushes one gradient, has its parameter updated and pulls the new weight before it pushes the next. With an
optimizer of this package it pushes all gradients, has all parameters updated by one call, and pulls all weights. Errors of
the optimizer reach the caller that way; out of a push they could not, which calls the updater through C.
"""
import ctypes
import functools
from typing import Any, List, Optional, Tuple

from mxnet.base import _LIB, c_array, c_handle_array, check_call, mx_uint
from mxnet.gluon import Trainer
from mxnet.kvstore import KVStore

__all__ = ['update_together']

_allreduce_grads = Trainer._allreduce_grads  # MXNet's


def update_together() -> None:
    """Let trainers that update on their kvstore do so by one call of the optimizer, wherever it is one of this package."""
    Trainer._allreduce_grads = _allreduce_grads_together


@functools.wraps(_allreduce_grads)
def _allreduce_grads_together(self: Trainer) -> None:
    indices = _indices(self)
    if indices is None:
        _allreduce_grads(self)
        return
    store, updater = self._kvstore, self._kvstore._updater
    parameters = [self._params[i] for i in indices]
    pushed: List[Tuple[int, Any, Any]] = []  # key, sum of the gradients, stored weight
    store._set_updater(lambda *arguments: pushed.append(arguments))
    try:
        _call(_LIB.MXKVStorePush, store, indices, [parameter.list_grad() for parameter in parameters])
    finally:
        store._set_updater(updater)
    with updater.optimizer.counting_singly():
        updater(*map(list, zip(*pushed)))
    _call(_LIB.MXKVStorePullWithSparse, store, indices, [parameter.list_data() for parameter in parameters], ctypes.c_bool(True))


def _call(function: Any, store: KVStore, indices: List[int], arrays: List[List[Any]], *arguments: Any) -> None:
    """``store.push`` or ``pull`` of many keys: their own way to make lists for C takes longer than the work on them."""
    keys = [index for index, copies in zip(indices, arrays) for _ in copies]
    values = [array for copies in arrays for array in copies]
    check_call(function(store.handle, mx_uint(len(keys)), c_array(ctypes.c_int, keys), c_handle_array(values),
                        ctypes.c_int(0), *arguments))


def _indices(trainer: Trainer) -> Optional[List[int]]:
    """The parameters to be updated together; None where MXNet has to take them one by one."""
    store = trainer._kvstore
    if not trainer._update_on_kvstore or type(store) is not KVStore:
        return None
    if not hasattr(getattr(store._updater, 'optimizer', None), 'counting_singly'):
        return None  # an optimizer of MXNet, or that of a server
    trained = [i for i, parameter in enumerate(trainer._params) if parameter.grad_req != 'null']
    kinds = {kind for i in trained for kind in (trainer._params[i]._stype, trainer._params[i]._grad_stype)}
    return trained if kinds == {'default'} else None
