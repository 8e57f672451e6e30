"""Launches CUDA kernels on MXNet's GPU contexts, compiled by MXNet itself (`mx.rtc`). Nothing waits for the device.

Arrays are arguments of a launch, so MXNet's engine runs it when they are complete, and whatever uses them afterwards when it is
done. An array may not be in a launch twice: the engine would wait for itself.
"""
import ctypes
import functools
import logging
import operator
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type

import numpy

# submodules, not attributes of `mxnet`: a parameter server imports this package while `mxnet` is still being imported
from mxnet import base as mx_base
from mxnet import ndarray as nd

from ..lowering import cuda
from ..lowering.plan import NOISE
from ..rules.base import KernelKey, Rule

__all__ = ['Batch', 'are_alike', 'are_apart', 'batch']

log = logging.getLogger('gluon_optim')


class Batch(cuda.Batch):
    """A list of tensors on ``context``, updated by ``functions``, the compiled passes: ``arrays`` are handles of NDArrays."""

    def __init__(self, kernel: cuda.Kernel, sizes: Sequence[int], context: Any, functions: Sequence[Any]):
        self._context, self._functions = context, functions
        self._own: List[Any] = []
        super().__init__(kernel, sizes)
        for role, handles in zip(kernel.roles, self.arrays):
            if role in NOISE:
                continue   # numbers
            handles[len(sizes):] = [self._allocate(1, kernel.storage.element(role)) for _ in handles[len(sizes):]]

    def _allocate(self, size: int, dtype: str) -> int:
        array = nd.empty((size,), self._context, dtype)
        self._own.append(array)
        return int(array.handle.value)

    def _launch(self, number: int, blocks: int, arguments: int) -> None:
        _launch(self._functions[number], self._context, blocks, cuda.THREADS, arguments)


def _launch(function: Any, context: Any, blocks: int, threads: int, arguments: int) -> None:
    # not function.launch, which makes a NumPy array of each number
    one = mx_base.mx_uint(1)
    mx_base.check_call(mx_base._LIB.MXRtcCudaKernelCall(
        function.handle, context.device_id, ctypes.c_void_p(arguments), mx_base.mx_uint(blocks), one, one,
        mx_base.mx_uint(threads), one, one, mx_base.mx_uint(0)))


def batch(rule: Type[Rule], static: KernelKey, coefficients: Tuple[str, ...], storage: cuda.Storage, sizes: Sequence[int],
          context: Any) -> Optional[Batch]:
    """A `Batch`, or None where its kernels cannot be compiled, which is said once."""
    try:
        tensors = cuda.evenly(len(sizes), cuda.capacity(rule, static, coefficients, storage))  # type: ignore[arg-type]
        kernel = cuda.kernel(rule, static, coefficients, storage, tensors)  # type: ignore[arg-type]
    except NotImplementedError as error:
        _say_once(rule.name, str(error))
        return None
    functions, reason = _compiled(kernel, context)
    if reason:
        _say_once(rule.name, reason)
        return None
    return Batch(kernel, sizes, context, functions)


@functools.lru_cache(maxsize=None)
def _say_once(name: str, reason: str) -> None:
    log.warning('%s runs on MXNet operators on GPUs, many launches for each parameter, not in compiled kernels: %s', name, reason)


@functools.lru_cache(maxsize=None)
def _compiled(kernel: cuda.Kernel, context: Any) -> Tuple[List[Any], str]:
    """The compiled passes, or none and why.

    They are loaded onto the device, which may be of another architecture than the first, for which MXNet compiles.
    """
    number = numpy.zeros(1, numpy.int32)
    pointers = numpy.array([number.ctypes.data])
    try:
        functions = _functions(kernel)
        _launch(functions['nothing'], context, 1, 1, pointers.ctypes.data)
    except (NotImplementedError, mx_base.MXNetError) as error:
        return [], str(error)
    return [functions[one.name] for one in kernel.passes], ''


@functools.lru_cache(maxsize=None)
def _functions(kernel: cuda.Kernel) -> Dict[str, Any]:
    from mxnet import rtc, runtime
    if not runtime.Features().is_enabled('CUDA_RTC'):
        raise NotImplementedError('This MXNet is built without mx.rtc.')
    module = rtc.CudaModule(kernel.source, cuda.OPTIONS)
    signatures = {'nothing': 'int', **{one.name: one.signature for one in kernel.passes}}
    return {name: module.get_kernel(name, signature) for name, signature in signatures.items()}


def are_apart(arrays: Sequence[Any]) -> bool:
    """Whether no two of ``arrays`` share memory, be it the same array twice or parts of one.

    MXNet does not tell. An NDArray begins with a pointer to its memory; where it does not, the answer is no.
    """
    return _is_laid_out() and len({_memory(array) for array in arrays}) == len(arrays)


def _memory(array: Any) -> Optional[int]:
    return ctypes.c_void_p.from_address(array.handle.value).value


@functools.lru_cache(maxsize=None)
def _is_laid_out() -> bool:
    one, other = nd.empty((2, 2)), nd.empty((2, 2))
    return _memory(one[:1]) == _memory(one[1:]) == _memory(one.reshape((4,))) == _memory(one) != _memory(other)


_KIND = operator.attrgetter('stype', 'shape', 'dtype', 'context')


def are_alike(old: Sequence[Any], new: Sequence[Any]) -> bool:
    """Whether the arrays ``new`` have the types, shapes and contexts of ``old``."""
    return list(map(_KIND, old)) == list(map(_KIND, new))
