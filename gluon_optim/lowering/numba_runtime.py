"""The functions that generated kernels call, and the launch of kernels on several threads.

A kernel is a C function ``kernel(pass, lane, words)``: one pass over one lane's share of the work. ``words`` points to
int64 values, most of them addresses (`Words`). Kernels contain no parallelism: one driver, compiled once, runs any
kernel's passes one after the other, the lanes of a pass side by side. The work is cut into the same items for any
number of lanes, and partial sums belong to items, so results do not depend on the number of threads.
"""
import functools
import os
import threading
from typing import Any, Callable, Sequence, Tuple, TypeVar

import numba
import numpy
from llvmlite import binding, ir
from numba import njit, prange, types
from numba.extending import intrinsic as numba_intrinsic
from numba.np.arrayobj import populate_array

from ..rules import noise

__all__ = ['BLOCK', 'DESCRIBED', 'ITEM', 'add_f32', 'add_f64', 'bfloat_to_float', 'describe', 'f32_at', 'f64_at', 'fetch_addresses',
           'float_to_bfloat', 'float_to_half', 'half_to_float', 'i64_at', 'launch', 'no_sums', 'normals_f32', 'normals_f64',
           'prefetch_2', 'prefetch_4', 'prefetch_8', 'prefetch_once_2', 'prefetch_once_4', 'prefetch_once_8', 'sum_of', 'terms_f32',
           'terms_f64', 'u16_at']

BLOCK = noise.BLOCK  # elements per turn of a loop in a kernel
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


def _array(context: Any, builder: ir.IRBuilder, array_type: types.Array, data: ir.Value, size: ir.Value) -> ir.Value:
    """The array of ``size`` elements at the pointer ``data``."""
    array, itemsize = context.make_array(array_type)(context, builder), _I64(array_type.dtype.bitwidth // 8)
    populate_array(array, data=data, shape=[size], strides=[itemsize], itemsize=itemsize, meminfo=None)
    return array._getvalue()


def _pointer(numba_type: types.Type, llvm_type: ir.Type) -> Callable[[int, int], numpy.ndarray]:
    """A function of an address and a size that returns the array there, as `numba.carray` does; that one would be compiled, and
    inlined again and again, which is half of the time that a kernel takes to compile."""
    array_type = types.Array(numba_type, 1, 'C')

    @intrinsic
    def array_at(typing_context: Any, address: types.Type, size: types.Type) -> Typed:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
            return _array(context, builder, array_type, builder.inttoptr(args[0], llvm_type.as_pointer()), args[1])
        return array_type(types.int64, types.int64), generate
    return array_at


f32_at = _pointer(types.float32, ir.FloatType())
f64_at = _pointer(types.float64, ir.DoubleType())
i32_at = _pointer(types.int32, ir.IntType(32))
u16_at = _pointer(types.uint16, ir.IntType(16))
i64_at = _pointer(types.int64, _I64)


# Sums ----------------------------------------------------------------------------------------------------------------
# In float64 and in an order of their own, the same on every processor: element k of a block goes to sum k % LANES.

LANES = 8
_SUMS = ir.VectorType(ir.DoubleType(), LANES)


def _on_stack(builder: ir.IRBuilder, llvm_type: ir.Type, count: int = 1) -> ir.Value:
    """Room for ``count`` values on the stack of the calling function, the same for each turn of a loop."""
    with builder.goto_entry_block():
        place = builder.alloca(llvm_type, count)
        place.align = 64
    return place


@intrinsic
def no_sums(typing_context: Any) -> Typed:
    """The address of LANES sums, which are 0."""
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        place = _on_stack(builder, _SUMS)
        builder.store(ir.Constant(_SUMS, [ir.Constant(ir.DoubleType(), 0.0)] * LANES), place)
        return builder.ptrtoint(place, _I64)
    return types.int64(), generate


@intrinsic
def sum_of(typing_context: Any, sums: types.Type) -> Typed:
    """What the sums at that address are together."""
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        found = builder.load(builder.inttoptr(args[0], _SUMS.as_pointer()))
        return _tree(builder, [builder.extract_element(found, ir.Constant(ir.IntType(32), k)) for k in range(LANES)])
    return types.float64(types.int64), generate


def _tree(builder: ir.IRBuilder, values: Sequence[ir.Value]) -> ir.Value:
    while len(values) > 1:
        values = [builder.fadd(a, b) for a, b in zip(values[::2], values[1::2])]
    return values[0]


def _terms(numba_type: types.Type, llvm_type: ir.Type) -> Callable[[], numpy.ndarray]:
    """A function that returns an array of BLOCK numbers on the stack."""
    array_type = types.Array(numba_type, 1, 'C')

    @intrinsic
    def terms(typing_context: Any) -> Typed:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
            return _array(context, builder, array_type, _on_stack(builder, llvm_type, BLOCK), _I64(BLOCK))
        return array_type(), generate
    return terms


def _add(numba_type: types.Type, llvm_type: ir.Type) -> Callable[[int, numpy.ndarray], None]:
    """A function that adds an array of BLOCK numbers to the sums at an address."""
    @intrinsic
    def add(typing_context: Any, sums: types.Type, terms: types.Type) -> Typed:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
            vector = ir.VectorType(llvm_type, LANES)
            data = builder.bitcast(context.make_array(terms)(context, builder, args[1]).data, vector.as_pointer())
            values = [builder.load(builder.gep(data, [_I64(k)])) for k in range(BLOCK // LANES)]
            if llvm_type != _SUMS.element:
                values = [builder.fpext(value, _SUMS) for value in values]
            place = builder.inttoptr(args[0], _SUMS.as_pointer())
            builder.store(builder.fadd(builder.load(place), _tree(builder, values)), place)
            return context.get_dummy_value()
        return types.void(types.int64, terms), generate
    return add


terms_f32, terms_f64 = _terms(types.float32, ir.FloatType()), _terms(types.float64, ir.DoubleType())
add_f32, add_f64 = _add(types.float32, ir.FloatType()), _add(types.float64, ir.DoubleType())


def _prefetch(lines: int, locality: int) -> Callable[[int], None]:
    """A function that starts fetching so many cache lines from an address on. Any address is allowed, even one past the end.
    ``locality`` as LLVM has it: 3 fetches into all caches, 0 into the first one only, from where a line goes back to memory."""
    @intrinsic
    def prefetch(typing_context: Any, address: types.Type) -> Typed:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
            number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
            function = builder.module.declare_intrinsic('llvm.prefetch', [pointer], kind)
            for line in range(lines):
                at = builder.inttoptr(builder.add(args[0], _I64(64 * line)), pointer)
                builder.call(function, [at, number(0), number(locality), number(1)])
            return context.get_dummy_value()
        return types.void(types.int64), generate
    return prefetch


prefetch_2, prefetch_4, prefetch_8 = (_prefetch(lines, 3) for lines in (2, 4, 8))
prefetch_once_2, prefetch_once_4, prefetch_once_8 = (_prefetch(lines, 0) for lines in (2, 4, 8))


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
def _fetch_addresses(get_data: int, count: int, handles_at: int, addresses_at: int) -> int:
    handles = i64_at(handles_at, count)
    for i in range(count):
        if _get(get_data, handles[i], addresses_at + 8 * i) != 0:
            return i
    return -1


def fetch_addresses(get_data: int, handles: numpy.ndarray, addresses: numpy.ndarray) -> int:
    """Call ``int get_data(handle, void **out)`` for each handle; the index of the first failure, or -1."""
    return _fetch_addresses(get_data, handles.size, handles.ctypes.data, addresses.ctypes.data)


@compiled()
def _describe(functions_at: int, count: int, handles_at: int, found_at: int, answer_at: int) -> bool:
    functions, handles, answer = i64_at(functions_at, 4), i64_at(handles_at, count), i64_at(answer_at, 5)
    same = True
    for i in range(count):
        failed = _get(functions[0], handles[i], answer_at) | _get(functions[1], handles[i], answer_at + 8)
        failed |= _get_two(functions[2], handles[i], answer_at + 16, answer_at + 20)
        failed |= _get_two(functions[3], handles[i], answer_at + 24, answer_at + 32)
        found = i64_at(found_at + 8 * DESCRIBED * i, DESCRIBED)
        if failed or not 0 <= answer[3] <= DIMENSIONS:
            found[3] = -1  # equal to none
            return False
        shape = i32_at(answer[4], DIMENSIONS)
        for k in range(DESCRIBED):
            value = answer[k] if k < 4 else shape[k - 4] if k - 4 < answer[3] else 0
            same &= found[k] == value
            found[k] = value
    return same


def describe(functions: numpy.ndarray, handles: numpy.ndarray, found: numpy.ndarray) -> bool:
    """Write the storage type, type, device, number of dimensions and shape of each array into a row of ``found``.

    ``functions`` are the addresses of MXNet's MXNDArrayGetStorageType, GetDType, GetContext and GetShapeEx. Returns whether
    the rows are what they were before; False also where one of them fails, or an array has too many dimensions.
    """
    answer = numpy.zeros(5, numpy.int64)
    return _describe(functions.ctypes.data, handles.size, handles.ctypes.data, found.ctypes.data, answer.ctypes.data)


# Noise ---------------------------------------------------------------------------------------------------------------

_LLVM = {'bool': ir.IntType(1), 'int32': ir.IntType(32), 'uint32': ir.IntType(32), 'uint64': _I64, 'float32': ir.FloatType(),
         'float64': ir.DoubleType()}


class _Vector:
    """`noise.LANES` numbers of one type as a value of LLVM, with the operators and methods of NumPy's arrays that
    `noise.philox` and `noise.pair` use."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value, dtype: str):
        self.builder, self.value, self.dtype = builder, value, dtype

    def _made(self, value: ir.Value, dtype: str = '') -> '_Vector':
        return _Vector(self.builder, value, dtype or self.dtype)

    def _with(self, other: '_Vector', integer: str, real: str = '') -> '_Vector':
        operation = real if self.dtype.startswith('float') else integer
        return self._made(getattr(self.builder, operation)(self.value, other.value))

    def __add__(self, other: '_Vector') -> '_Vector': return self._with(other, 'add', 'fadd')
    def __sub__(self, other: '_Vector') -> '_Vector': return self._with(other, 'sub', 'fsub')
    def __mul__(self, other: '_Vector') -> '_Vector': return self._with(other, 'mul', 'fmul')
    def __and__(self, other: '_Vector') -> '_Vector': return self._with(other, 'and_')
    def __xor__(self, other: '_Vector') -> '_Vector': return self._with(other, 'xor')
    def __lshift__(self, other: '_Vector') -> '_Vector': return self._with(other, 'shl')
    def __rshift__(self, other: '_Vector') -> '_Vector': return self._with(other, 'lshr')
    def __invert__(self) -> '_Vector': return self._made(self.builder.not_(self.value))
    def __neg__(self) -> '_Vector': return self._made(self.builder.fneg(self.value))

    def __ge__(self, other: '_Vector') -> '_Vector':
        compare = self.builder.icmp_unsigned if self.dtype.startswith('u') else self.builder.icmp_signed
        return self._made(compare('>=', self.value, other.value), 'bool')

    def view(self, dtype: str) -> '_Vector':
        return self._made(self.builder.bitcast(self.value, _vector(dtype)), dtype)

    def astype(self, dtype: str) -> '_Vector':
        convert = {'uint64': self.builder.trunc, 'uint32': self.builder.uitofp, 'int32': self.builder.sitofp}[self.dtype]
        return self._made(convert(self.value, _vector(dtype)), dtype)


class _Vectors:
    """The namespace of `_Vector`."""

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder

    def __getattr__(self, name: str) -> Callable[[Any], _Vector]:
        if name in _LLVM:   # a number
            return lambda x: _Vector(self.builder, ir.Constant(_vector(name), [ir.Constant(_LLVM[name], x)] * noise.LANES), name)
        return functools.partial(self._call, name)

    def _call(self, name: str, x: _Vector) -> _Vector:
        """A function that LLVM has, or gets from the library of C."""
        name = f'llvm.{name}.v{noise.LANES}f{x.dtype[-2:]}'
        known = self.builder.module.globals
        if name not in known:
            ir.Function(self.builder.module, ir.FunctionType(x.value.type, [x.value.type]), name)
        return _Vector(self.builder, self.builder.call(known[name], [x.value]), x.dtype)

    def where(self, condition: _Vector, x: _Vector, y: _Vector) -> _Vector:
        return _Vector(self.builder, self.builder.select(condition.value, x.value, y.value), x.dtype)

    def repeated(self, x: ir.Value) -> _Vector:
        """The number ``x`` of 64 bits in all lanes."""
        undefined = ir.Constant(_vector('uint64'), ir.Undefined)
        one = self.builder.insert_element(undefined, x, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(_vector('uint32'), [ir.Constant(ir.IntType(32), 0)] * noise.LANES)
        return _Vector(self.builder, self.builder.shuffle_vector(one, undefined, zeros), 'uint64')


def _vector(dtype: str) -> ir.VectorType:
    return ir.VectorType(_LLVM[dtype], noise.LANES)


def _fill(module: ir.Module, precision: str) -> ir.Function:
    """A function of LLVM, void (out, key, stream, update, draw, start), that writes the samples of `noise.BLOCK` elements."""
    name = f'normals_{precision}'
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_LLVM[precision].as_pointer(), *[_I64] * 5]), name)
    function.linkage = 'internal'
    function.attributes.add('noinline')
    builder = ir.IRBuilder(function.append_basic_block())
    xp = _Vectors(builder)
    out, key, stream, update, draw, start = function.args
    lanes = ir.Constant(_vector('uint64'), [ir.Constant(_I64, lane) for lane in range(noise.LANES)])
    first = xp.repeated(builder.lshr(start, ir.Constant(_I64, 2))) + _Vector(builder, lanes, 'uint64')
    key_low, key_high = builder.and_(key, ir.Constant(_I64, 0xffffffff)), builder.lshr(key, ir.Constant(_I64, 32))
    words = noise.philox((first, *map(xp.repeated, (update, stream, draw))), (xp.repeated(key_low), xp.repeated(key_high)), xp)
    samples = [sample for k in (0, 2) for sample in noise.pair(precision, words[k], words[k + 1], xp)]
    for k, sample in enumerate(samples):
        place = builder.gep(out, [ir.Constant(_I64, k * noise.LANES)])
        builder.store(sample.value, builder.bitcast(place, sample.value.type.as_pointer()), align=8)
    builder.ret_void()
    return function


def _normals(numba_type: types.Type, precision: str) -> Callable[..., numpy.ndarray]:
    array_type = types.Array(numba_type, 1, 'C')

    @intrinsic
    def normals(typing_context: Any, key: types.Type, stream: types.Type, update: types.Type, draw: types.Type, start: types.Type
                ) -> Typed:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
            out = _on_stack(builder, _LLVM[precision], noise.BLOCK)
            builder.call(_fill(builder.module, precision), [out, *args])
            return _array(context, builder, array_type, out, _I64(noise.BLOCK))
        return array_type(*[types.int64] * 5), generate
    return normals


# `noise.normals` for `noise.BLOCK` elements from ``start`` on, a multiple of it, on the stack of the caller
normals_f32, normals_f64 = _normals(types.float32, 'float32'), _normals(types.float64, 'float64')


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
