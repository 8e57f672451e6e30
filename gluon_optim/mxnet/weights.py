"""Setting weights without losing the states on a kvstore, and with a way to undo it."""
import contextlib
import ctypes
import weakref
from typing import Any, Iterable, List, Optional, Sequence, Tuple

# submodules, not attributes of `mxnet`: a parameter server imports this file while `mxnet` is still being imported
from mxnet import base as mx_base
from mxnet import ndarray as nd
from mxnet import numpy as mx_numpy
from mxnet.ndarray.ndarray import array as nd_array
from mxnet.util import is_np_array

from .typing import KVStoreLike, ParameterLike, TrainerLike

__all__ = ['devices_of', 'initialize', 'keep_kvstore', 'remember', 'send_weights', 'store_keys', 'trainer_of', 'write_weight']


def initialize(parameter: ParameterLike, value: Any) -> None:
    """Initialize a deferred parameter with the NumPy array ``value``, on all its devices."""
    make = mx_numpy.array if is_np_array() else nd_array
    parameter._load_init(make(value, dtype=value.dtype), None)


def devices_of(parameter: ParameterLike) -> List[Any]:
    """The contexts on which ``parameter`` is, or will be when its shape is known."""
    return list(parameter.list_ctx() if hasattr(parameter, 'list_ctx') else parameter.list_device())  # MXNet 1.x, 2.x


def trainer_of(parameter: ParameterLike) -> Optional[TrainerLike]:
    """The trainer that updates ``parameter``."""
    trainer: Any = parameter._trainer
    return trainer() if isinstance(trainer, weakref.ref) else trainer  # MXNet 2.x, 1.x


def store_keys(trainer: TrainerLike) -> List[int]:
    """The key in the kvstore of each of the trainer's parameters."""
    numbers = getattr(trainer, '_param2idx', {})
    # in 1.x their places; in 2.x, where a parameter that is given twice is left out, those of the list that was given
    return [numbers.get(getattr(parameter, '_uuid', None), i) for i, parameter in enumerate(trainer._params)]


def keep_kvstore(trainer: TrainerLike) -> None:
    """Let the states survive `Parameter.set_data` and `net.load_parameters`.

    Both make a trainer that updates on its kvstore discard it with all states, and MXNet's next one starts fresh while the
    counts continue. This trainer keeps its kvstore, and sends it the new weights before the next step.
    """
    if '_reset_kvstore' in vars(trainer):
        return
    reset, start = trainer._reset_kvstore, trainer._init_kvstore

    def reset_kvstore() -> None:
        if trainer._update_on_kvstore and not trainer._distributed:
            trainer._kv_initialized = False  # asks for `_init_kvstore` before the next step
        else:
            reset()

    def init_kvstore() -> None:
        if trainer._kvstore is None:
            start()
        else:
            started = [one for one in zip(store_keys(trainer), trainer._params) if one[1] not in trainer._params_to_init]
            send_weights(trainer._kvstore, [(key, _arrays(parameter)[0]) for key, parameter in started])
            trainer._kv_initialized = True

    trainer._reset_kvstore, trainer._init_kvstore = reset_kvstore, init_kvstore


def send_weights(store: KVStoreLike, weights: Iterable[Tuple[Any, Any]]) -> None:
    """Make the copy that ``store`` has under each key that of the first device, as MXNet does when it makes a kvstore."""
    updater = store._updater
    store._set_updater(lambda key, new, stored: new.copyto(stored))
    try:
        for key, weight in weights:
            store.push(key, weight)
        nd.waitall()
    finally:
        store._set_updater(updater)


def write_weight(parameter: ParameterLike, values: Sequence[Any], sent: bool = False) -> None:
    """Write the NumPy arrays ``values`` into ``parameter``, one for each of its devices. ``sent``: servers get them otherwise.

    Like `Parameter.set_data`, but nothing is allocated, and errors are raised here rather than at a later step.
    """
    trainer = trainer_of(parameter)
    if not sent and trainer and trainer._kv_initialized and trainer._update_on_kvstore and parameter not in trainer._params_to_init:
        keep_kvstore(trainer)
        trainer._reset_kvstore()
    for array, value in zip(_arrays(parameter), values):
        if array.stype == 'default':
            _restore_layout(array)
        array[:] = value


def _restore_layout(array: Any) -> None:
    """Turn back what an inference has permuted for oneDNN: `NDArray._sync_copyfrom` takes no such array.

    One that still runs would do it afterwards, and only counts as a reader: so wait for readers too.
    """
    mx_base.check_call(mx_base._LIB.MXNDArrayWaitToWrite(array.handle))
    mx_base.check_call(mx_base._LIB.MXNDArrayGetData(array.handle, ctypes.byref(ctypes.c_void_p())))


def remember(undo: contextlib.ExitStack, parameters: Iterable[ParameterLike]) -> None:
    """Let ``undo`` restore the current values of the parameters, on all devices."""
    for parameter in parameters:
        trainer = trainer_of(parameter)
        undo.callback(write_weight, parameter, [array.asnumpy() for array in _arrays(parameter)],
                      trainer is not None and trainer._distributed)


def _arrays(parameter: ParameterLike) -> Any:
    return parameter._check_and_get(parameter._data, list)  # `list_data` refuses row_sparse ones
