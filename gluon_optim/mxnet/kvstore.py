"""One list of parameters per step, wherever `gluon.Trainer` or `Module` updates them; and what stores with servers need.

On a kvstore MXNet pushes one gradient, has its parameter updated and pulls the new weight before it pushes the next. With an
optimizer of this package it pushes all gradients, has all parameters updated by one call, and pulls all weights. Errors of the
optimizer reach the caller that way; out of a push they could not, which calls the updater through C.

MXNet 2.x refuses updates on a kvstore, and with them dist_async, to an optimizer that says at the outset that it takes lists:
there its updaters learn of it at the first update.

With parameter servers (dist_sync, dist_async) they receive the optimizer by `distributed.worker`, which is asked before each push.
"""
import contextlib
import ctypes
import functools
from typing import Any, Iterable, List, Sequence, Set, Tuple

import numpy
from mxnet import model
from mxnet.base import _LIB, NDArrayHandle, c_array, c_handle_array, c_str_array, check_call, mx_uint
from mxnet.gluon import Trainer
from mxnet.kvstore import KVStore
from mxnet.ndarray import NDArray

try:
    from mxnet.module import module
except ImportError:  # MXNet 2.x has none
    module = None

from .distributed.pages import channel
from .distributed.start import check_precision, start_together, starts_together
from .distributed.worker import send_optimizer, session
from .weights import store_keys

__all__ = ['update_together']

# MXNet's
_allreduce_grads, _update, _update_params_on_kvstore = Trainer._allreduce_grads, Trainer._update, model._update_params_on_kvstore
_init_params = Trainer._init_params
_set_optimizer = KVStore.set_optimizer


def update_together() -> None:
    """Let trainers and modules that update on their kvstore do so by one call of the optimizer, where it is of this package."""
    Trainer._allreduce_grads = _allreduce_grads_together
    Trainer._init_params = _init_params_unrounded
    KVStore.set_optimizer = _set_optimizer_here_or_on_servers
    if module is None:
        Trainer._update = _update_together
        return
    model._update_params_on_kvstore = module._update_params_on_kvstore = _update_params_together


@functools.wraps(_set_optimizer)
def _set_optimizer_here_or_on_servers(self: KVStore, optimizer: Any) -> None:
    if 'dist' in self.type and _is_ours(optimizer):
        send_optimizer(self, optimizer)
    else:
        _set_optimizer(self, optimizer)


@functools.wraps(_init_params)
def _init_params_unrounded(self: Trainer) -> None:
    if self._distributed and starts_together(_is_ours(self._optimizer)):
        trained = [parameter for parameter in self._params if parameter.grad_req != 'null']
        others = _dtypes(self._params) & {'float64'}  # their initial values go through servers too
        check_precision(self._kvstore, _dtypes(trained) | others, self._update_on_kvstore, self._optimizer.multi_precision)
    _init_params(self)


@functools.wraps(_allreduce_grads)
def _allreduce_grads_together(self: Trainer) -> None:
    trained = [one for one in zip(store_keys(self), self._params) if one[1].grad_req != 'null']
    dense = not self._contains_sparse_weight and not self._contains_sparse_grad
    if self._distributed:
        safe = _prepare_push(self, [parameter for _, parameter in trained])
        if safe and dense and self._compression_params:  # for which MXNet's way, `pushpull`, is an error
            for key, parameter in trained:
                self._kvstore.push(key, parameter.list_grad(), priority=-key)
                pulled = parameter.list_data() if self._update_on_kvstore else parameter.list_grad()
                self._kvstore.pull(key, pulled, priority=-key)
            return
    if not (trained and dense and self._update_on_kvstore
            and _can_update_together(self._kvstore, trained[0][1].list_data()[0].context)):
        _allreduce_grads(self)
        return
    keys, parameters = zip(*trained)
    _push_update_pull(self._kvstore, keys, [p.list_grad() for p in parameters], [p.list_data() for p in parameters])


@functools.wraps(_update)
def _update_together(self: Trainer, ignore_stale_grad: bool = False) -> None:
    take_lists = getattr(self._optimizer, 'taking_lists', None)
    with contextlib.nullcontext() if take_lists is None else take_lists(*self._updaters):
        _update(self, ignore_stale_grad)


@functools.wraps(_update_params_on_kvstore)
def _update_params_together(param_arrays: Sequence[Any], grad_arrays: Sequence[Any], kvstore: KVStore, param_names: Sequence[str]
                            ) -> None:
    trained = [one for one in zip(param_names, grad_arrays, param_arrays) if one[1][0] is not None]
    servers = session(kvstore)
    if servers is not None:
        if not servers.steps:
            weights = {name: copies[0] for name, _, copies in trained}
            servers.check(weights)
            check_precision(kvstore, _dtypes(weights.values()), True, servers.optimizer.multi_precision, named=True)
        start_together(kvstore, len(param_names))
        servers.before_push(kvstore, [copy for *_, copies in trained for copy in copies], named=True)
    dense = all(copies[0].stype == 'default' for _, *arrays in trained for copies in arrays)
    if not (trained and dense and _can_update_together(kvstore, trained[0][1][0].context)):
        _update_params_on_kvstore(param_arrays, grad_arrays, kvstore, param_names)
        return
    _push_update_pull(kvstore, *zip(*trained))


def _prepare_push(trainer: Trainer, trained: Sequence[Any]) -> bool:
    """What must be done before a trainer pushes gradients to servers. Returns whether it is one of those that it is done for."""
    together = starts_together(_is_ours(trainer._optimizer))
    if together:
        start_together(trainer._kvstore, len(trainer._params) - len(trainer._params_to_init))
    servers = session(trainer._kvstore)
    if servers is not None:
        channel(trainer._kvstore)  # now, while all workers are here, for the checkpoints to come
        servers.before_push(trainer._kvstore, [copy for parameter in trained for copy in parameter.list_data()], named=False)
    return together


def _dtypes(arrays: Iterable[Any]) -> Set[str]:
    return {numpy.dtype(array.dtype).name for array in arrays}


def _is_ours(optimizer: Any) -> bool:
    return hasattr(optimizer, 'counting_singly')


def _can_update_together(store: Any, context: Any) -> bool:
    """Whether the weights in ``store`` are updated on a CPU, in this process, by an optimizer of this package."""
    return (type(store) is KVStore and _is_ours(getattr(store._updater, 'optimizer', None))
            and context.device_type.startswith('cpu'))


_BY_NUMBER, _BY_NAME = (ctypes.CFUNCTYPE(None, key, NDArrayHandle, NDArrayHandle, ctypes.c_void_p)
                        for key in (ctypes.c_int, ctypes.c_char_p))


def _push_update_pull(store: KVStore, keys: Sequence[Any], gradients: Sequence[List[NDArray]], weights: Sequence[List[NDArray]]
                      ) -> None:
    """Update what ``store`` has under ``keys``. There are several copies of each gradient and weight, one for each device."""
    pushed: List[Tuple[Any, NDArray, NDArray]] = []  # key, sum of the gradients, stored weight

    def take(key: Any, gradient: int, weight: int, _: Any) -> None:
        pushed.append((key, NDArray(NDArrayHandle(gradient)), NDArray(NDArrayHandle(weight))))

    functions = _BY_NUMBER(take), _BY_NAME(take)  # C knows their addresses only: they must live until the pushes are done
    _set_updater(store, *functions)
    try:
        _call('MXKVStorePush', store, keys, gradients)
    finally:
        _set_updater(store, store._updater_func, store._str_updater_func)
    updater = store._updater
    with updater.optimizer.counting_singly(), updater.optimizer.taking_lists(updater):
        updater(*map(list, zip(*pushed)))
    _call('MXKVStorePullWithSparse', store, keys, weights, ctypes.c_bool(True))


def _set_updater(store: KVStore, by_number: Any, by_name: Any) -> None:
    """Let pushes call these functions. The store's own way makes new ones each time."""
    check_call(_LIB.MXKVStoreSetUpdaterEx(store.handle, by_number, by_name, None))


def _call(name: str, store: KVStore, keys: Sequence[Any], arrays: Sequence[List[NDArray]], *arguments: Any) -> None:
    """``store.push`` or ``pull``: their own way to make lists for C takes longer than the work on them."""
    repeated = [key for key, copies in zip(keys, arrays) for _ in copies]
    handles = c_handle_array([array for copies in arrays for array in copies])
    named = isinstance(keys[0], str)
    function = getattr(_LIB, name + 'Ex' if named else name)
    check_call(function(store.handle, mx_uint(len(repeated)), c_str_array(repeated) if named else c_array(ctypes.c_int, repeated),
                        handles, ctypes.c_int(0), *arguments))
