"""From a rule to CUDA kernels, one per pass, each for as many tensors as a launch takes.

Tensors are the kernels' arguments, so MXNet's engine knows what a launch reads and writes. CUDA allows `BYTES_OF_ARGUMENTS`
for a launch: a list of tensors is divided among launches. Sizes and coefficients are arguments too, numbers that go with the
launch; nothing is copied to the device.

Every operation is rounded on its own, as on the CPU: `OPTIONS` contract no multiplication with an addition, and divisions and
roots are correctly rounded. Sums are accumulated in float64, thread by thread and then in a tree, whose order depends on the
sizes alone: each run gives the same bits. Noise is that of `rules.noise`, from the numbers that a tensor has for it: bit for bit
in single precision; in double precision logarithm, cosine and sine are CUDA's.

Nothing here needs a GPU: `kernel` prints, and a subclass of `Batch` launches what somebody has compiled.
"""
import functools
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple, Type

import numpy

from ..rules.base import KernelKey, Rule
from ..rules.graph import WEIGHT, Node
from ..rules.noise import BLOCK, LANES
from .noise import normals
from .plan import HALF, NOISE, LoopPass, Pass, Plan, ScalarPass, Storage, plan, variable, with_coefficients

__all__ = ['BYTES_OF_ARGUMENTS', 'ITEM', 'OPTIONS', 'THREADS', 'Batch', 'Kernel', 'Printed', 'Storage', 'capacity', 'evenly',
           'kernel']

THREADS = 256               # of a block, a power of two
ITEM = 4096                 # elements that a block updates
BYTES_OF_ARGUMENTS = 4096   # of one launch

#: for NVRTC; the first is what makes the bits those of the CPU, the others are its defaults
OPTIONS = ('--fmad=false', '--prec-div=true', '--prec-sqrt=true', '--ftz=false')


class Printed(NamedTuple):
    """One kernel of the source.

    ``scalars``       whether it has a block per tensor (else one per item of a tensor)
    ``scratch``       of 'partial' and 'kept', those that are arguments, in this order
    ``roles``         then for each tensor: these arrays, and where it draws noise the numbers `NOISE` (int64),
    ``sized``         where this is true its size (int64) and the number of its first item in the launch (int32),
    ``coefficients``  and these numbers
    ``signature``     all of them as `mx.rtc.CudaModule.get_kernel` wants them
    """

    name: str
    scalars: bool
    scratch: Tuple[str, ...]
    roles: Tuple[str, ...]
    sized: bool
    coefficients: Tuple[str, ...]
    signature: str


class Kernel(NamedTuple):
    """Source in CUDA C++ (of 2003, which the compilers of all MXNet wheels read), with a kernel for each pass, and what is in it.
    ``tensors`` is how many a launch takes."""

    source: str
    passes: Tuple[Printed, ...]
    tensors: int
    roles: Tuple[str, ...]
    coefficients: Tuple[str, ...]
    storage: Storage
    sums: int
    kept: int


@functools.lru_cache(maxsize=None)
def kernel(rule: Type[Rule], static: KernelKey, coefficients: Tuple[str, ...], storage: Storage, tensors: int) -> Kernel:
    """Print ``rule`` for launches of ``tensors`` tensors stored as ``storage``; a second call returns the same kernel.

    Raises NotImplementedError for a rule with an operation that has no text here.
    """
    planned = plan(rule, static, coefficients, storage)
    printer = _Printer(planned, tensors)
    return Kernel(printer.text, tuple(printer.passes), tensors, planned.roles, coefficients, storage, planned.sums,
                  len(planned.kept))


@functools.lru_cache(maxsize=None)
def capacity(rule: Type[Rule], static: KernelKey, coefficients: Tuple[str, ...], storage: Storage) -> int:
    """How many tensors a launch can take: those with arguments of 4096 bytes in the pass that needs most for each."""
    printer = _Printer(plan(rule, static, coefficients, storage), 1)
    return min((BYTES_OF_ARGUMENTS - 16) // printer.bytes_of(one) for one in printer.passes)


def evenly(count: int, most: int) -> int:
    """The size of as few parts of ``count`` as possible, of at most ``most`` each.

    >>> evenly(161, 60)
    54
    """
    return -(-count // -(-count // most))


class Batch:
    """A list of tensors, ready to be updated by ``kernel``.

    A subclass allocates (`_allocate`) and launches (`_launch`). Fill ``arrays`` (one row per role, one column per tensor; also the
    columns from the number of tensors on, whose arrays the last launch does not use), call `point`, then `run`. The rows of
    `NOISE` are the numbers themselves; they may change between calls of `run`.
    """

    #: whether an array's argument is, as the driver has it, the address of what is in ``arrays``, or that itself
    by_address = False

    def __init__(self, kernel: Kernel, sizes: Sequence[int]):
        self.kernel, self._tensors = kernel, len(sizes)
        launches = -(-len(sizes) // kernel.tensors)
        total = launches * kernel.tensors
        self.arrays = numpy.zeros((len(kernel.roles), total), numpy.int64)
        self._sizes = numpy.zeros(total, numpy.int64)
        self._sizes[:len(sizes)] = sizes
        ends = (-(-self._sizes // ITEM)).reshape(launches, kernel.tensors).cumsum(axis=1)
        self._items = ends[:, -1]
        self._first = numpy.zeros(ends.shape, numpy.int32)
        self._first[:, 1:] = ends[:, :-1]
        self._values = numpy.zeros((len(kernel.coefficients), total), kernel.storage.precision)
        self._scratch = {
            'partial': numpy.array([self._allocate(max(int(items) * kernel.sums, 1), 'float64') for items in self._items]),
            'kept': numpy.array([self._allocate(max(kernel.tensors * kernel.kept, 1), kernel.storage.precision)
                                 for _ in self._items])}
        self._arguments = [[numpy.zeros(len(one.scratch) + kernel.tensors * _fields(one), numpy.int64) for one in kernel.passes]
                           for _ in self._items]

    def _allocate(self, size: int, dtype: str) -> int:
        """What stands in ``arrays`` for new memory of the device, which lives as long as this object."""
        raise NotImplementedError

    def _launch(self, number: int, blocks: int, arguments: int) -> None:
        """Launch pass ``number`` with the array of addresses at the address ``arguments``."""
        raise NotImplementedError

    def point(self) -> None:
        """Take over what is in ``arrays``."""
        for launch, lists in enumerate(self._arguments):
            columns = slice(launch * self.kernel.tensors, (launch + 1) * self.kernel.tensors)
            for one, arguments in zip(self.kernel.passes, lists):
                arguments[:len(one.scratch)] = [self._array(self._scratch[name])[launch] for name in one.scratch]
                tensors = arguments[len(one.scratch):].reshape(self.kernel.tensors, -1)
                fields = [self._argument(role, self.arrays[self.kernel.roles.index(role)]) for role in one.roles]
                fields += [_addresses(self._sizes), _addresses(self._first.reshape(-1))] if one.sized else []
                fields += [_addresses(self._values[self.kernel.coefficients.index(name)]) for name in one.coefficients]
                for k, field in enumerate(fields):
                    tensors[:, k] = field[columns]

    def _argument(self, role: str, words: numpy.ndarray) -> numpy.ndarray:
        return _addresses(words) if role in NOISE else self._array(words)

    def _array(self, words: numpy.ndarray) -> numpy.ndarray:
        return _addresses(words) if self.by_address else words

    def run(self, coefficients: Any, rows: Sequence[int]) -> None:
        """Update all tensors; tensor i uses row ``rows[i]`` of ``coefficients``, rows of numbers in the kernel's order."""
        self._values[:, :self._tensors] = numpy.asarray(coefficients, self.kernel.storage.precision)[list(rows)].T
        for launch, lists in enumerate(self._arguments):
            tensors = min(self._tensors - launch * self.kernel.tensors, self.kernel.tensors)
            for number, (one, arguments) in enumerate(zip(self.kernel.passes, lists)):
                blocks = tensors if one.scalars else int(self._items[launch])
                if blocks:
                    self._launch(number, blocks, arguments.ctypes.data)


def _fields(one: Printed) -> int:
    """How many arguments each tensor has."""
    return len(one.roles) + 2 * one.sized + len(one.coefficients)


def _addresses(row: numpy.ndarray) -> numpy.ndarray:
    """The address of each number in ``row``."""
    return row.ctypes.data + row.itemsize * numpy.arange(row.size)


_HEAD = """\
#define THREADS {threads}
#define ITEM {item}

#ifdef __CUDA_ARCH__
static __device__ float half_to_float(unsigned short bits)
{{
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}}

static __device__ unsigned short float_to_half(float x)
{{
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}}

static __device__ float bits_to_float(unsigned bits) {{ return __uint_as_float(bits); }}
static __device__ unsigned float_to_bits(float x) {{ return __float_as_uint(x); }}
#endif

static __device__ float bfloat_to_float(unsigned short bits) {{ return bits_to_float((unsigned)bits << 16); }}

static __device__ unsigned short float_to_bfloat(float x)
{{
    const unsigned bits = float_to_bits(x);
    return x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fc0u;
}}

// the sum of the numbers of all threads of a block, for the first of them
static __device__ double sum_of_block(double x)
{{
    __shared__ double values[THREADS];
    values[threadIdx.x] = x;
    for (unsigned n = THREADS / 2; n > 0; n /= 2) {{
        __syncthreads();
        if (threadIdx.x < n)
            values[threadIdx.x] += values[threadIdx.x + n];
    }}
    x = values[0];
    __syncthreads();  // before the next sum
    return x;
}}

// loads a module onto a device without doing anything there
extern "C" __global__ void nothing(int) {{ }}
"""

_PASS = """
#define PARAMETERS_{k}(k) {parameters}
#define TENSOR_{k}(k) {{ {choice} }}

extern "C" __global__ void __launch_bounds__(THREADS) pass_{k}(
    {arguments})
{{
    const int block = blockIdx.x;
    int i;
{body}
}}
"""

# a sample of `rules.noise`; types have NumPy's names there
_NORMAL = """
typedef unsigned long long uint64;
typedef unsigned uint32;
typedef int int32;
typedef float float32;
typedef double float64;

static __device__ float32 view_float32(uint32 bits) {{ return bits_to_float(bits); }}
static __device__ uint32 view_uint32(float32 x) {{ return float_to_bits(x); }}
static __device__ int32 view_int32(float32 x) {{ return (int32)float_to_bits(x); }}
static __device__ int32 view_int32(uint32 bits) {{ return (int32)bits; }}

static __device__ {T} normal(uint64 key, uint64 stream, uint64 update, uint64 draw, uint64 element)
{{
    {lines}
    return {result};
}}
"""
_NOISE = {'assign': 'const {T} {name} = {value};', 'number': '({T}){0!r}', 'astype': '({T}){0}', 'view': 'view_{T}({0})',
          'where': '{0} ? {1} : {2}', 'sqrt float32': 'sqrtf({0})', 'sqrt float64': 'sqrt({0})', 'log': 'log({0})',
          'cos': 'cos({0})', 'sin': 'sin({0})'}

_TYPES = {'float16': 'unsigned short', 'bfloat16': 'unsigned short', 'float32': 'float', 'float64': 'double'}
_LOADS = {'float16': 'half_to_float({0})', 'bfloat16': 'bfloat_to_float({0})'}
_STORES = {'float16': 'float_to_half({0})', 'bfloat16': 'float_to_bfloat({0})'}
# what mx.rtc calls types in a signature
_NAMES = {'unsigned short': '__half', 'long long': 'int64_t'}
_BYTES = {'long long': 8, 'int': 4, 'float': 4, 'double': 8}

_COMPARISONS = ('<', '<=', '>', '>=', '==', '!=')
_FORMATS = {
    **{op: f'{{0}} {op} {{1}}' for op in ('+', '-', '*', '/', *_COMPARISONS)},
    'constant': '({T}){name}', 'neg': '-{0}', 'half': '({T})half_to_float(float_to_half({0}))',
    'bfloat': '({T})bfloat_to_float(float_to_bfloat({0}))',
    # NaN passes through minimum and maximum, as in MXNet
    'minimum': '{0} < {1} || {0} != {0} ? {0} : {1}', 'maximum': '{0} > {1} || {0} != {0} ? {0} : {1}',
    'sign': '({T})(({0} > 0) - ({0} < 0))', 'where': '{0} ? {1} : {2}',
}
_FUNCTIONS = {
    'float': {'sqrt': 'sqrtf({0})', 'exp': 'expf({0})', 'abs': 'fabsf({0})'},
    'double': {'sqrt': 'sqrt({0})', 'exp': 'exp({0})', 'abs': 'fabs({0})'},
}


class _Argument(NamedTuple):
    """Of one tensor: its type in C, its name, and the local variable that gets it."""

    type: str
    name: str
    local: str


class _Printer:
    """A plan as CUDA source for launches of ``tensors``."""

    def __init__(self, plan: Plan, tensors: int):
        self.plan, self.storage, self.tensors = plan, plan.storage, tensors
        self.type = _TYPES[plan.storage.precision]
        self.formats = {**_FORMATS, **_FUNCTIONS[self.type]}

    @property
    def passes(self) -> List[Printed]:
        return [self._printed(k, one) for k, one in enumerate(self.plan.passes)]

    def bytes_of(self, one: Printed) -> int:
        """How many bytes the arguments of a tensor take; the next tensor's begin with a pointer."""
        size = 8 * len(one.roles) + 12 * one.sized   # an address has as many as a number of `NOISE`
        number = _BYTES[self.type]
        return -(-(-(-size // number) * number + number * len(one.coefficients)) // 8) * 8

    @property
    def text(self) -> str:
        parts = [_HEAD.format(threads=THREADS, item=ITEM)]
        if NOISE[0] in self.plan.roles:
            lines, result = normals(self.storage.precision, _NOISE)
            parts.append(_NORMAL.format(T=self.storage.precision, lines='\n    '.join(lines), result=result))
        for k, one in enumerate(self.plan.passes):
            printed = self._printed(k, one)
            body = self._scalar_pass(one) if isinstance(one, ScalarPass) else self._loop_pass(one)
            arguments = self._arguments(one, printed)
            locals_ = [f'{a.type}{"" if "*" in a.type else " "}{a.local};' for a in arguments]
            scratch = [f'{self._scratch(one, name)}{name}' for name in printed.scratch]
            parts.append(_PASS.format(
                k=k, parameters=', '.join(f'{a.type}{"" if "*" in a.type else " "}{a.name}_##k' for a in arguments),
                choice=' '.join(['i = k;', *[f'{a.local} = {a.name}_##k;' for a in arguments]]),
                arguments=', '.join([*scratch, *[f'PARAMETERS_{k}({n})' for n in range(self.tensors)]]),
                body='\n'.join('    ' + line for line in [*locals_, *self._choose(k, printed, 0, self.tensors), *body])))
        return ''.join(parts)

    # -- arguments --------------------------------------------------------------------------------------------------

    def _printed(self, k: int, one: Pass) -> Printed:
        scalars = isinstance(one, ScalarPass)
        own = [node for node in one.body if node.op == 'slot'] if isinstance(one, ScalarPass) else []
        roles = [role for role in self.plan.roles if role in one.stores or role in {node.name for node in own}] \
            if isinstance(one, ScalarPass) else [*one.roles, *(NOISE if one.draws else ())]
        keeps = self._keeps(one)
        scratch = [*(['partial'] if one.sums else []), *(['kept'] if keeps or self._needs(one) else [])]
        used = with_coefficients(one.body if isinstance(one, ScalarPass) else one.computed)
        names = [node.name for node in used if node.op == 'coefficient']
        printed = Printed(f'pass_{k}', scalars, tuple(scratch), tuple(roles), not scalars or bool(one.sums), tuple(names), '')
        words = [self._scratch(one, name) + name for name in scratch]
        words += [f'{a.type} {a.name}_{n}' for n in range(self.tensors) for a in self._arguments(one, printed)]
        signature = ', '.join(words)
        for name, known in _NAMES.items():
            signature = signature.replace(name, known)
        return printed._replace(signature=signature)

    def _needs(self, one: Pass) -> Sequence[Node]:
        """What the pass reads of the kept numbers."""
        return one.loads if isinstance(one, ScalarPass) else one.scalars

    def _keeps(self, one: Pass) -> List[Node]:
        return [node for node in one.body if node in self.plan.kept] if isinstance(one, ScalarPass) else []

    def _scratch(self, one: Pass, name: str) -> str:
        """The declaration of scratch memory; ``const`` is what makes MXNet's engine let others read it too."""
        if name == 'partial':
            return 'const double *' if isinstance(one, ScalarPass) else 'double *'
        return f'{"" if self._keeps(one) else "const "}{self.type} *'

    def _arguments(self, one: Pass, printed: Printed) -> List[_Argument]:
        """Those of each tensor."""
        written = {*one.stores, *([HALF] if WEIGHT in one.stores else [])}
        found = [_Argument('long long', role, role) if role in NOISE else
                 _Argument(('' if role in written else 'const ') + _TYPES[self.storage.element(role)] + ' *', f'at_{role}',
                           f'{role}_at') for role in printed.roles]
        if printed.sized:
            found += [_Argument('long long', 'size', 'size'), _Argument('int', 'first', 'first')]
        return found + [_Argument(self.type, f'c_{name}', f'coefficient_{name}') for name in printed.coefficients]

    def _choose(self, k: int, printed: Printed, begin: int, end: int) -> List[str]:
        """Find the block's tensor among those from ``begin`` to ``end``: arguments cannot be indexed."""
        if end - begin == 1:
            return [f'TENSOR_{k}({begin})']
        middle = (begin + end) // 2
        test = f'block < {middle}' if printed.scalars else f'block < first_{middle}'
        return [f'if ({test}) {{', *['    ' + line for line in self._choose(k, printed, begin, middle)],
                '} else {', *['    ' + line for line in self._choose(k, printed, middle, end)], '}']

    # -- passes -----------------------------------------------------------------------------------------------------

    def _scalar_pass(self, one: ScalarPass) -> List[str]:
        body: List[str] = []
        if one.sums:
            sums = range(len(one.sums))
            body = [*[f'double total{k} = 0.0;' for k in sums],
                    'for (long long j = threadIdx.x; j < (size + ITEM - 1) / ITEM; j += THREADS) {',
                    *[f'    total{k} += partial[(first + j) * {self.plan.sums} + {k}];' for k in sums], '}',
                    *[f'total{k} = sum_of_block(total{k});' for k in sums]]
        body += ['if (threadIdx.x > 0)', '    return;', *self._coefficients(one.body)]
        body += [self._declared(node, self._kept(node)) for node in one.loads]
        for node in one.body:
            if node.op == 'sum':
                body.append(self._declared(node, f'({self.type})total{[other is node for other in one.sums].index(True)}'))
            elif node.op == 'slot':
                body.append(self._declared(node, self._load(node.name, '0')))
            else:
                body.append(self._declared(node, self._expression(node)))
            if node in self.plan.kept:
                body.append(f'{self._kept(node)} = {variable(node)};')
        return body + [self._store(slot, '0', node) for slot, node in one.stores.items()]

    def _loop_pass(self, one: LoopPass) -> List[str]:
        sums = range(len(one.sums))
        return ['const long long start = (long long)(block - first) * ITEM;',
                'const int count = size - start < ITEM ? (int)(size - start) : ITEM;',
                *[f'{role}_at += start;' for role in one.roles],
                *self._coefficients(one.computed),
                *[self._declared(node, self._kept(node)) for node in one.scalars],
                *[f'double total{k} = 0.0;' for k in sums],
                *self._loop(one),
                *[f'total{k} = sum_of_block(total{k});' for k in sums],
                *(['if (threadIdx.x == 0) {',
                   *[f'    partial[(long long)block * {self.plan.sums} + {k}] = total{k};' for k in sums], '}'] if sums else [])]

    def _loop(self, one: LoopPass) -> List[str]:
        """The loop over a thread's elements. Where they need noise, four of a turn share a counter: written like this, the compiler
        sees it, and computes Philox once for them."""
        elements = self._elements(one)
        if not one.draws:
            return ['for (int j = threadIdx.x; j < count; j += THREADS) {', *['    ' + line for line in elements], '}']
        numbers = ', '.join(NOISE)
        draws = [self._declared(node, f'normal({numbers}, {node.name}, start + turn | k * {LANES})') for node in one.draws]
        return [f'for (int turn = threadIdx.x / {LANES} * {BLOCK} + threadIdx.x % {LANES}; turn < count; turn += 4 * THREADS) {{',
                '#pragma unroll',
                '    for (int k = 0; k < 4; k++) {',
                f'        const int j = turn + k * {LANES};',
                *['        ' + line for line in draws],
                '        if (j < count) {', *['            ' + line for line in elements], '        }', '    }', '}']

    def _elements(self, one: LoopPass) -> List[str]:
        """The computation for element j, without its noise."""
        body = [self._declared(node, self._load(one.loads[node], 'j') if node in one.loads else self._expression(node))
                for node in one.body if node.op != 'noise']
        body += [f'total{k} += (double){variable(node.args[0])};' for k, node in enumerate(one.sums)]
        for slot, node in one.stores.items():
            body += [self._store(role, 'j', node) for role in ([slot, HALF] if slot == WEIGHT and self.storage.master else [slot])]
        return body

    def _load(self, role: str, index: str) -> str:
        return _LOADS.get(self.storage.element(role), '{0}').format(f'{role}_at[{index}]')

    def _store(self, role: str, index: str, node: Node) -> str:
        return f'{role}_at[{index}] = ' + _STORES.get(self.storage.element(role), '{0}').format(variable(node)) + ';'

    def _kept(self, node: Node) -> str:
        return f'kept[i * {len(self.plan.kept)} + {self.plan.kept[node]}]'

    def _coefficients(self, nodes: Sequence[Node]) -> List[str]:
        """Constants and negated coefficients; coefficients themselves are arguments."""
        return [self._declared(node, self._expression(node)) for node in with_coefficients(nodes) if node.op != 'coefficient']

    def _declared(self, node: Node, value: str) -> str:
        return f'const {"bool" if node.op in _COMPARISONS else self.type} {variable(node)} = {value};'

    def _expression(self, node: Node) -> str:
        if node.op not in self.formats:
            raise NotImplementedError(f'CUDA kernels have no {node.op!r}.')
        names: Dict[str, Any] = dict(T=self.type, name=_SPELLED.get(repr(node.name), repr(node.name)))
        return self.formats[node.op].format(*map(variable, node.args), **names)


_SPELLED = {'inf': '(1.0 / 0.0)', '-inf': '(-1.0 / 0.0)', 'nan': '(0.0 / 0.0)'}
