"""The functions that generated kernels call, and the launch of kernels on several threads.

A kernel is a C function ``kernel(pass, lane, words)``: one pass over one lane's share of the work. ``words`` points to
int64 values, most of them addresses (`Words`). Kernels contain no parallelism: one driver, compiled once, runs any
kernel's passes one after the other, the lanes of a pass side by side. The work is cut into the same items for any
number of lanes, and partial sums belong to items, so results do not depend on the number of threads.
"""
import os
import threading
from typing import Any, Callable, Sequence, Tuple, TypeVar

import numba
import numpy
from llvmlite import binding, ir
from numba import carray, njit, prange, types
from numba.extending import intrinsic as numba_intrinsic

__all__ = ['DESCRIBED', 'ITEM', 'accumulate', 'bfloat_to_float', 'describe', 'f32_at', 'f64_at', 'fetch_addresses',
           'float_to_bfloat', 'float_to_half', 'half_to_float', 'i64_at', 'launch', 'prefetch', 'prefetch_once',
           'u16_at']

ITEM = 16384       # elements in one piece of work
SMALL = 2 ** 18    # a launch over fewer elements gains nothing from a second thread, and waits long for it on a busy machine

DIMENSIONS = 6     # of arrays that `describe` can tell apart
DESCRIBED = 4 + DIMENSIONS

_I64 = ir.IntType(64)

# numba's decorators carry no types: those of this file say what they make of a function
F = TypeVar('F', bound=Callable[..., Any])
Generator = Callable[[Any, ir.IRBuilder, Any, Sequence[ir.Value]], ir.Value]   # (context, builder, signature, args)
Typed = Tuple[Any, Generator]   # an intrinsic's signature, and what generates its instructions


def intrinsic(function: Callable[..., Typed]) -> Callable[..., Any]:
    """``numba.extending.intrinsic``: ``function`` gets numba's types of the arguments, the result their values."""
    made: Callable[..., Any] = numba_intrinsic(function)
    return made


def inlined(function: F) -> F:
    """``numba.njit`` for what is always part of its caller."""
    made: F = njit(inline='always')(function)
    return made


def compiled(**options: Any) -> Callable[[F], F]:
    """``numba.njit`` with the result cached on disk, if numba finds a folder for it."""
    def decorate(function: F) -> F:
        made: F
        try:
            made = njit(cache=True, nogil=True, error_model='numpy', **options)(function)
        except RuntimeError:  # "no locator available": nowhere to write
            made = njit(nogil=True, error_model='numpy', **options)(function)
        return made
    return decorate


def _pointer(numba_type: types.Type, llvm_type: ir.Type) -> Callable[[int, int], numpy.ndarray]:
    @intrinsic
    def pointer(typing_context: Any, address: types.Type) -> Typed:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
            return builder.inttoptr(args[0], llvm_type.as_pointer())
        return types.CPointer(numba_type)(types.int64), generate

    @inlined
    def array_at(address: int, size: int) -> numpy.ndarray:
        return carray(pointer(address), size)
    return array_at


f32_at = _pointer(types.float32, ir.FloatType())
f64_at = _pointer(types.float64, ir.DoubleType())
i32_at = _pointer(types.int32, ir.IntType(32))
u16_at = _pointer(types.uint16, ir.IntType(16))
i64_at = _pointer(types.int64, _I64)


@intrinsic
def accumulate(typing_context: Any, total: types.Type, value: types.Type) -> Typed:
    """total + value in float64, in any order. Only here may the compiler reorder, so that sums vectorize while everything
    else stays bit for bit equal to MXNet's operators."""
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        return builder.fadd(args[0], args[1], flags=('reassoc',))
    return types.float64(types.float64, types.float64), generate


def _prefetch(locality: int) -> Callable[[int], None]:
    """Start fetching the cache line at an address. Any address is allowed, even one past the end. ``locality`` as LLVM has it:
    3 fetches into all caches, 0 into the first one only, from where the line goes back to memory."""
    @intrinsic
    def fetch(typing_context: Any, address: types.Type) -> Typed:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
            number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
            function = builder.module.declare_intrinsic('llvm.prefetch', [pointer], kind)
            builder.call(function, [builder.inttoptr(args[0], pointer), number(0), number(locality), number(1)])
            return context.get_dummy_value()
        return types.void(types.int64), generate
    return fetch


prefetch, prefetch_once = _prefetch(3), _prefetch(0)


@intrinsic
def _call(typing_context: Any, function: types.Type, stage: types.Type, lane: types.Type, words: types.Type) -> Typed:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        pointer = builder.inttoptr(args[0], ir.FunctionType(_I64, [_I64] * 3).as_pointer())
        return builder.call(pointer, args[1:])
    return types.int64(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def _get(typing_context: Any, function: types.Type, handle: types.Type, out: types.Type) -> Typed:
    """Call ``int function(handle, out)`` of a C library."""
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        pointer = builder.inttoptr(args[0], ir.FunctionType(ir.IntType(32), [_I64] * 2).as_pointer())
        return builder.sext(builder.call(pointer, args[1:]), _I64)
    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
def _get_two(typing_context: Any, function: types.Type, handle: types.Type, out: types.Type, other: types.Type) -> Typed:
    """Call ``int function(handle, out, other)`` of a C library."""
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        pointer = builder.inttoptr(args[0], ir.FunctionType(ir.IntType(32), [_I64] * 3).as_pointer())
        return builder.sext(builder.call(pointer, args[1:]), _I64)
    return types.int64(types.int64, types.int64, types.int64, types.int64), generate


def _convert(source: types.Type, target: types.Type, instructions: Callable[[ir.IRBuilder, ir.Value], ir.Value]
             ) -> Callable[[Any], Any]:
    @intrinsic
    def convert(typing_context: Any, value: types.Type) -> Typed:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
            return instructions(builder, args[0])
        return target(source), generate
    return convert


_float_bits = _convert(types.float32, types.uint32, lambda builder, x: builder.bitcast(x, ir.IntType(32)))
_bits_float = _convert(types.uint32, types.float32, lambda builder, x: builder.bitcast(x, ir.FloatType()))

# Numba has no float16 on the CPU, but LLVM does: one instruction for eight values where the processor has F16C.
_half_to_float_f16c = _convert(types.uint16, types.float32, lambda builder, x: builder.fpext(
    builder.bitcast(x, ir.HalfType()), ir.FloatType()))
_float_to_half_f16c = _convert(types.float32, types.uint16, lambda builder, x: builder.bitcast(
    builder.fptrunc(x, ir.HalfType()), ir.IntType(16)))


@inlined
def _half_to_float_integer(half: Any) -> Any:
    """IEEE float16 bits to float32, by integer operations."""
    sign = numpy.uint32(half & numpy.uint16(0x8000)) << numpy.uint32(16)
    rest = numpy.uint32(half & numpy.uint16(0x7fff)) << numpy.uint32(13)
    # the multiplication moves the exponent's bias from 15 to 127, subnormals included
    finite = _float_bits(_bits_float(numpy.uint32(rest)) * numpy.float32(2.0 ** 112))
    bits = rest | numpy.uint32(0x7f800000) if rest >= numpy.uint32(0x0f800000) else finite
    return _bits_float(numpy.uint32(bits | sign))


@inlined
def _float_to_half_integer(value: Any) -> Any:
    """float32 to IEEE float16 bits, rounded to nearest even, by integer operations."""
    bits = _float_bits(value)
    sign = bits & numpy.uint32(0x80000000)
    rest = numpy.uint32(bits ^ sign)
    # below 2^-14, adding 0.5 makes the floating-point unit round at the last bit of a subnormal half
    subnormal = _float_bits(_bits_float(rest) + numpy.float32(0.5)) - numpy.uint32(0x3f000000)
    odd = (rest >> numpy.uint32(13)) & numpy.uint32(1)
    normal = (rest + numpy.uint32(0xc8000fff) + odd) >> numpy.uint32(13)
    special = numpy.uint32(0x7e00) if rest > numpy.uint32(0x7f800000) else numpy.uint32(0x7c00)
    half = subnormal if rest < numpy.uint32(0x38800000) else normal
    half = special if rest >= numpy.uint32(0x47800000) else half
    return numpy.uint16(half | (sign >> numpy.uint32(16)))


@inlined
def bfloat_to_float(half: Any) -> Any:
    """bfloat16 bits to float32, of which they are the first half."""
    return _bits_float(numpy.uint32(half) << numpy.uint32(16))


@inlined
def float_to_bfloat(value: Any) -> Any:
    """float32 to bfloat16 bits, rounded to nearest even."""
    bits = _float_bits(value)
    odd = (bits >> numpy.uint32(16)) & numpy.uint32(1)
    rounded = numpy.uint32(bits + numpy.uint32(0x7fff) + odd) >> numpy.uint32(16)
    return numpy.uint16(rounded) if value == value else numpy.uint16(0x7fc0)


def _has_f16c() -> bool:
    """Whether compiled code may use F16C; no if the user named a processor for numba, which is not examined."""
    return not numba.config.CPU_NAME and bool(binding.get_host_cpu_features().get('f16c'))


half_to_float = _half_to_float_f16c if _has_f16c() else _half_to_float_integer
float_to_half = _float_to_half_f16c if _has_f16c() else _float_to_half_integer


# Two functions rather than one with and without prange: numba's cache distinguishes them by name.
@compiled(parallel=True)
def _drive(kernel: int, passes: int, lanes: int, groups: int, words: int, stride: int, returned: numpy.ndarray) -> None:
    for group in range(groups):
        for stage in range(passes):
            for lane in prange(lanes):
                returned[lane] = _call(kernel, stage, lane, words + group * stride)


@compiled()
def _drive_alone(kernel: int, passes: int, groups: int, words: int, stride: int) -> None:
    for group in range(groups):
        for stage in range(passes):
            _call(kernel, stage, 0, words + group * stride)


@compiled()
def fetch_addresses(get_data: int, handles: numpy.ndarray, addresses: numpy.ndarray) -> int:
    """Call ``int get_data(handle, void **out)`` for each handle; the index of the first failure, or -1."""
    for i in range(handles.size):
        if _get(get_data, handles[i], addresses.ctypes.data + 8 * i) != 0:
            return i
    return -1


@compiled()
def describe(functions: numpy.ndarray, handles: numpy.ndarray, found: numpy.ndarray) -> bool:
    """Write the storage type, type, device, number of dimensions and shape of each array into a row of ``found``.

    ``functions`` are the addresses of MXNet's MXNDArrayGetStorageType, GetDType, GetContext and GetShapeEx. Returns whether
    the rows are what they were before; False also where one of them fails, or an array has too many dimensions.
    """
    answer = numpy.zeros(5, numpy.int64)
    at = answer.ctypes.data
    same = True
    for i in range(handles.size):
        failed = _get(functions[0], handles[i], at) | _get(functions[1], handles[i], at + 8)
        failed |= _get_two(functions[2], handles[i], at + 16, at + 20) | _get_two(functions[3], handles[i], at + 24, at + 32)
        if failed or not 0 <= answer[3] <= DIMENSIONS:
            found[i, 3] = -1  # equal to none
            return False
        shape = i32_at(answer[4], DIMENSIONS)
        for k in range(DESCRIBED):
            value = answer[k] if k < 4 else shape[k - 4] if k - 4 < answer[3] else 0
            same &= found[i, k] == value
            found[i, k] = value
    return same


_home = os.getpid()
_one_at_a_time = threading.Lock()  # numba's workqueue layer kills the process if two threads launch at once


def lane_count(elements: int) -> int:
    """How many threads a launch over ``elements`` uses: numba's setting, at most OMP_NUM_THREADS; one in a forked child, to
    which OpenMP's threads are not copied."""
    if elements < SMALL or os.getpid() != _home:
        return 1
    openmp = os.environ.get('OMP_NUM_THREADS', '')
    limit = int(openmp) if openmp.isdigit() else 0
    threads: int = numba.get_num_threads()
    return min(threads, limit or threads)


def launch(kernel: int, passes: int, lanes: int, groups: int, words: int, stride: int) -> None:
    """Run all passes of the kernel at address ``kernel``, for one row of words after the other: ``groups`` rows at address
    ``words``, ``stride`` bytes apart."""
    if lanes == 1:
        _drive_alone(kernel, passes, groups, words, stride)
    else:
        with _one_at_a_time:
            _drive(kernel, passes, lanes, groups, words, stride, numpy.empty(lanes, numpy.int64))


def split(costs: numpy.ndarray, parts: int) -> numpy.ndarray:
    """Bounds of ``parts`` consecutive ranges of about equal cost.

    >>> split(numpy.array([1, 1, 1, 3]), 2)
    array([0, 3, 4])
    """
    total = numpy.concatenate([[0], numpy.cumsum(costs)])
    return numpy.searchsorted(total, total[-1] * numpy.arange(parts + 1) / parts).astype(numpy.int64)
