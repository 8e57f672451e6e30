"""CUDA kernels without a GPU: the source of every rule compiles for GPUs, and as C++ that plays blocks and threads it computes what
the rule says, bit for bit. tools/gpu_check.py runs it on one."""
import ctypes
import functools
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conversion_runs import hyper_sets
from cuda_runs import COMPILER, HEADER, Batch, compiled, emulate, guarded, intact, joined, printed

pytest.importorskip('numba')

from test_lowering import Run as NumbaRun

from gluon_optim import rules
from gluon_optim.lowering import cuda
from gluon_optim.lowering.plan import NOISE, LoopPass, plan
from gluon_optim.rules.base import NOISE as NOISE_HYPER
from gluon_optim.rules.base import scalars, standard_normal
from gluon_optim.rules.noise import LANES, Noise, normals, pair, philox
from gluon_optim.rules.runtimes import runs_on
from gluon_optim.schema import Slot

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tools'))
import nvrtc


def drawing(name):
    """The argument of rules that draw noise with which they draw it themselves."""
    return {'noise': 'philox'} if 'noise' in rules.get(name).needs else {}


# MXNet itself updates by lbsgd on GPUs
NAMES = [name for name in rules.names(drop_ins=True, samplers=True) if name != 'lbsgd'
         and runs_on(rules.get(name), 'kernels', rules.get(name).hyperparameters(**drawing(name)))]
STORAGES = [('float32', False, False), ('float64', False, False), ('float16', True, False), ('float16', False, False),
            ('float16', False, True)]
BFLOATS = [('bfloat16', True, False), ('bfloat16', False, False)]
ITEM = cuda.ITEM
SHAPES = [(7, 5), (1,), (3, ITEM - 95), (0, 3), (2, ITEM), (300,)]  # a few blocks, none, and exactly two
TENSORS = 4   # of a launch: two launches, and the second is not full
# what belongs to the optimizer as a whole, in MXNet's own
SUPPLIED = {'m_schedule': 0.9, 'correction': 0.8, 'adapts': 1.0}

needs_compiler = pytest.mark.skipif(COMPILER is None, reason='no C++ compiler')
needs_nvrtc = pytest.mark.skipif(nvrtc.library() is None, reason='NVRTC is missing: pip install nvidia-cuda-nvrtc-cu12')


def hypers_of(name, which='other'):
    rule = rules.get(name)
    h = rule.hyperparameters(**{**hyper_sets(name)[which], **drawing(name)}, learning_rate=0.3, rescale_grad=0.7)
    return type(h)(**h.asdict(), **{key: SUPPLIED.get(key, 0.5) for key in rule.supplied})


def cases():
    """Rules with their hyper-parameters; with every switch turned too."""
    return [(name, which) for name in NAMES for which in hyper_sets(name) if which != 'usual']


def rule_of(name, storage):
    return rules.get(name).on_masters() if storage[:2] == ('float16', True) else rules.get(name)


def kernels(storage, tensors=None):
    return {f'{name}_{which}': printed(rule_of(name, storage), hypers_of(name, which), cuda.Storage(*storage), tensors)
            for name, which in cases()}


# -- compiled for GPUs ----------------------------------------------------------------------------------------------


def architecture(number, kind='compute'):
    return f'--gpu-architecture={kind}_{number}'   # the spelling that keeps MXNet from adding that of its first GPU


# what CUDA's logarithm, cosine and sine of double precision are made of is its own affair
WITHOUT_LIBRARY = '#define log\n#define cos\n#define sin\n'


@needs_nvrtc
@pytest.mark.parametrize('storage', STORAGES + BFLOATS)
def test_the_source_of_every_rule_compiles(storage):
    """In C++ of 2003, which the compilers of MXNet's wheels for CUDA 10 read; and rounded as on the CPU."""
    source = WITHOUT_LIBRARY + joined(kernels(storage, 2))
    for number in (70, 80, 90):
        ptx = nvrtc.compile_ptx(source, [*cuda.OPTIONS, '--std=c++03', architecture(number)]).decode()
        assert ptx.count('.visible .entry') == 1 + sum(len(kernel.passes) for kernel in kernels(storage, 2).values())
        assert not re.findall(r'\bfma\.rn|\bmad\.f|\.(?:approx|full)\b|\.ftz', ptx)
        assert not re.findall(r'\b(?:red|atom)\.', ptx)
    assert ('cvt.rn.f16.f32' in ptx) == (storage[0] == 'float16')


@needs_nvrtc
def test_contraction_would_show():
    """What the test above looks for is there without our options."""
    source = printed(rules.get('adamw'), hypers_of('adamw'), cuda.Storage('float32'), 2).source
    assert b'fma.rn.f32' in nvrtc.compile_ptx(source, [architecture(70)])


@needs_nvrtc
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_noise_is_drawn_once_for_four_elements_and_by_no_approximation(dtype):
    """Philox has two multiplications in each of ten rounds."""
    for name in ('sgld', 'psgld'):
        source = printed(rules.get(name), hypers_of(name), cuda.Storage(dtype), 2).source
        ptx = nvrtc.compile_ptx(source, [*cuda.OPTIONS, architecture(80)]).decode()
        assert 19 <= len(re.findall(r'\bmul\.lo\.s64', ptx)) <= 21
        stores = 1 + len(rules.get(name).slots(hypers_of(name)))
        assert len(re.findall(r'\bst\.global', ptx)) == 4 * stores
        assert not re.findall(r'\b(?:lg2|ex2|sin|cos)\.approx', ptx)


@needs_nvrtc
@pytest.mark.parametrize('number', [70, 80, 90])
def test_full_launches_fit(number):
    """The assembler refuses kernels with arguments of more than 4096 bytes."""
    for name, storage in (('adamw', STORAGES[0]), ('novograd', STORAGES[2]), ('sgd_torch', STORAGES[1]), ('psgld', STORAGES[0])):
        rule, h = rule_of(name, storage), hypers_of(name)
        kernel = printed(rule, h, cuda.Storage(*storage))
        assert kernel.tensors > 20
        made = nvrtc.compile_ptx(kernel.source, [*cuda.OPTIONS, architecture(number)]).decode()
        sizes = [bytes_of_arguments(entry) for entry in made.split('.visible .entry')[1:]]
        one = bytes_of_arguments(nvrtc.compile_ptx(printed(rule, h, cuda.Storage(*storage), 1).source,
                                                   [*cuda.OPTIONS, architecture(number)]).decode().split('.visible .entry')[-1])
        assert max(sizes) <= cuda.BYTES_OF_ARGUMENTS
        assert max(sizes) + one > cuda.BYTES_OF_ARGUMENTS
    nvrtc.compile_ptx(kernel.source, [*cuda.OPTIONS, architecture(number, 'sm')])


def bytes_of_arguments(entry):
    """Each argument lies at a multiple of its size."""
    end = 0
    for bits in re.findall(r'\.param \.[a-z](\d+) (?:\.ptr [^,]*)?', entry.partition('{')[0]):
        size = int(bits) // 8
        end = -(-end // size) * size + size
    return end


# -- run on the CPU -------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    """The compiled kernels of all rules for a storage."""
    return functools.lru_cache(maxsize=None)(
        lambda storage: emulate(kernels(storage, TENSORS), tmp_path_factory.mktemp('emulated')))


class Run(NumbaRun):
    """Steps by the emulated kernels and by NumPy, and by the rule in float64; all memory between bytes that stay as they are."""

    def __init__(self, library, name, which, storage, backwards):
        self._library, self._prefix, self._backwards, self._buffers = library(storage), f'{name}_{which}', backwards, []
        super().__init__(rule_of(name, storage), hypers_of(name, which), storage[0], storage[1], SHAPES, storage[2])
        self.weights, self.masters = ([self._guarded(a) for a in arrays] for arrays in (self.weights, self.masters))
        self.slots = [{name: self._guarded(a) for name, a in slots.items()} for slots in self.slots]
        self.exact = [(w.astype(float), {name: a.astype(float) for name, a in slots.items()}) for w, slots in self.expected]
        self.way = [0.0] * len(self.exact)

    def _guarded(self, array):
        array, buffer = guarded(array)
        self._buffers.append(buffer)
        return array

    def compile(self, names, sizes):
        kernel = cuda.kernel(self.rule, self.static, names, self.storage, TENSORS)
        batch = Batch(kernel, sizes, self._library, self._prefix)
        batch.backwards = self._backwards
        return kernel, batch

    def point(self, i, arrays):
        numbers = dict(zip(NOISE, self.counter(i, self._t)))
        self.batch.arrays[:, i] = [numbers[role] if role in numbers else arrays[role].ctypes.data for role in self.kernel.roles]
        self.batch.point()

    def counter(self, i, t):
        """The key, stream and update of tensor i."""
        return 2 ** 53 - 5, 2 ** 32 - 1 - 7 * i, t + 2 ** 31 * (i % 2)

    def namespace(self, i, t):
        return Noise(super().namespace(i, t), *self.counter(i, t))

    def step(self, t, gradients=None):
        self._t = t
        gradients = [self._guarded(self.random.normal(size=w.shape).astype(w.dtype)) for w in self.weights]
        super().step(t, gradients)
        assert all(map(intact, self._buffers))
        for i, (w, slots) in enumerate(self.exact):
            late = i % 2
            c = self.rule.all_coefficients(scalars, self.h.replace(learning_rate=0.3 / t), max(t - late, 1))
            with np.errstate(all='ignore'):
                xp = Noise(np, *self.counter(i, t))
                new, new_slots = self.rule.apply(xp, self.static, c, w, gradients[i].astype(float), slots)
            self.way[i] += np.abs(new - w).max(initial=0)
            self.exact[i] = new, new_slots

    def check_exact(self):
        """Against the rule in float64: by the rounding of the way that the weights have gone, and of the weights."""
        of_way, of_size = (1e-12, 1e-15) if self.storage.dtype == 'float64' else (2e-5, 4e-7)
        for a, (w, _), way in zip(self.masters or self.weights, self.exact, self.way):
            assert np.abs(a - w).max(initial=0) <= of_way * way + of_size * np.abs(w).max(initial=0)

    def half_slots_between_passes(self):
        """Whether a pass reads back what an earlier one has rounded to half precision, which the rule does not say."""
        passes = plan(self.rule, self.static, self.kernel.coefficients, self.storage).passes
        loads = [load for one in passes if isinstance(one, LoopPass) for load in one.loads.items()]
        return self.storage.half_slots and any(role != node.name for node, role in loads)

    def check_beside_numba(self):
        other = NumbaRun(self.rule, self.h, self.storage.dtype, self.storage.master, SHAPES, self.storage.half_slots)
        for t in range(1, 4):
            other.step(t)
        for mine, theirs in zip([*self.weights, *(a for s in self.slots for a in s.values())],
                                [*other.weights, *(a for s in other.slots for a in s.values())]):
            np.testing.assert_array_equal(mine, theirs)

    def check_close(self, limit):
        for i, (w, slots) in enumerate(self.expected):
            np.testing.assert_allclose(self.weights[i], w, rtol=0, atol=limit)
            for name, value in slots.items():
                np.testing.assert_allclose(self.slots[i][name].reshape(np.shape(value)), value, rtol=limit, atol=limit)


@needs_compiler
@pytest.mark.parametrize('storage', STORAGES)
def test_every_rule_is_what_it_is_in_numpy(library, storage):
    """Bit for bit, but for sums of float64, which are added in another order; with two rows of coefficients in each launch."""
    for name, which in cases():
        for backwards in (False, True):
            run = Run(library, name, which, storage, backwards)
            if backwards and not run.kernel.sums:
                continue   # no thread waits for another
            for t in range(1, 4):
                run.step(t)
            if storage[0] == 'float64':
                run.check_close(1e-12)
            elif run.half_slots_between_passes():
                run.check_beside_numba()
            else:
                run.check()
            # a weight without a master is rounded to half precision, and the sign of a sum that cancels can be either
            if storage[:2] != ('float16', False) and name != 'signum':
                run.check_exact()


def head_of(name, dtype='float32'):
    """The functions that passes call."""
    return printed(rules.get(name), hypers_of(name), cuda.Storage(dtype), 1).source.partition('\n#define PARAMETERS_0')[0]


@needs_compiler
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_noise_is_that_of_the_rules_wherever_an_element_is(tmp_path, dtype):
    """Bit for bit in single precision. In double precision the logarithm, cosine and sine of each library have some error in the
    last bit, which 8 roundings of the largest sample cover; another word of Philox would be another sample."""
    source = tmp_path / 'normals.cpp'
    source.write_text(f'#include "{HEADER}"\n{head_of("sgld", dtype)}\n' + '''
    extern "C" void samples(uint64 key, uint64 stream, uint64 update, uint64 draw, uint64 start, TYPE *out, int n)
    { for (int j = 0; j < n; j++) out[j] = normal(key, stream, update, draw, start + j); }'''.replace('TYPE', dtype + ' '))
    library, n = compiled(source), 2 ** 14
    limit = 0 if dtype == 'float32' else 8 * 2 ** -52 * 7
    for counter in [(0, 0, 1, 0), (2 ** 53 - 1, 2 ** 32 - 1, 2 ** 32 - 1, 3), (2 ** 32, 1, 2, 1)]:
        for start in (0, 2 ** 31 - 40, 2 ** 33 + 1):
            found = np.empty(n, dtype)
            library.samples(*map(ctypes.c_uint64, (*counter, start)), ctypes.c_void_p(found.ctypes.data), n)
            np.testing.assert_allclose(found, expected_noise(counter, start, n, dtype), rtol=0, atol=limit)
            if not start:
                np.testing.assert_allclose(found, normals(*counter, n, dtype), rtol=0, atol=limit)


def expected_noise(counter, start, n, dtype):
    """`rules.noise.normals` from element ``start`` on."""
    key, stream, update, draw = map(np.uint64, counter)
    j = np.arange(start, start + n, dtype=np.uint64)
    block, k, lane = j // np.uint64(4 * LANES), j // np.uint64(LANES) % np.uint64(4), j % np.uint64(LANES)
    words = philox((block * np.uint64(LANES) + lane, update, stream, draw), (key & np.uint64(2 ** 32 - 1), key >> np.uint64(32)))
    samples = [sample for first in (0, 2) for sample in pair(dtype, words[first], words[first + 1])]
    return np.choose(k.astype(int), samples)


@needs_compiler
def test_a_second_draw_of_an_update_is_another(tmp_path):
    class TwoDraws(rules.Rule):
        name, summary, needs = 'two_draws', 'two samples for each element', frozenset({'noise'})
        hypers = (*rules.get('sgd_torch').hypers, NOISE_HYPER)
        slots = staticmethod(lambda h: (Slot('second'),))
        coefficients = staticmethod(lambda xp, h, t: dict(lr=h.learning_rate))

        @staticmethod
        def step(xp, h, c, w, g, s):
            return w + c.lr * standard_normal(xp, w), dict(second=s.second + c.lr * standard_normal(xp, w))

    kernel = printed(TwoDraws, TwoDraws.hyperparameters(learning_rate=1.0), cuda.Storage('float32'), 1)
    held = {role: np.zeros(ITEM + 100, np.float32) for role in ('weight', 'gradient', 'second')}
    batch = Batch(kernel, [ITEM + 100], emulate({'two': kernel}, tmp_path), 'two')
    numbers = dict(zip(NOISE, (9, 8, 7)))
    batch.arrays[:, 0] = [numbers[role] if role in numbers else held[role].ctypes.data for role in kernel.roles]
    batch.point()
    batch.run([[1.0] * len(kernel.coefficients)], [0])
    for draw, role in enumerate(('weight', 'second')):
        np.testing.assert_array_equal(held[role], normals(9, 8, 7, draw, ITEM + 100, 'float32'))


@needs_compiler
def test_conversions_are_those_of_numpy(tmp_path):
    """Those of the header, as PTX's cvt has them, and bfloat16's in the source: the upper half of a float32."""
    source = tmp_path / 'conversions.cpp'
    head = head_of('adamw')
    loop = 'extern "C" void all_{0}(const {1} *x, {2} *y, int n) {{ for (int i = 0; i < n; i++) y[i] = {0}(x[i]); }}\n'
    bits = 'unsigned short'
    loops = ''.join(loop.format(f'{half}_to_float', bits, 'float') + loop.format(f'float_to_{half}', 'float', bits)
                    for half in ('half', 'bfloat'))
    source.write_text(f'#include "{HEADER}"\n{head}\n{loops}')
    library = compiled(source)

    def mapped(name, values, dtype):
        out = np.empty(values.shape, dtype)
        getattr(library, name)(ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(out.ctypes.data), values.size)
        return out

    bits = np.arange(65536, dtype=np.uint16)
    halves = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(mapped('all_half_to_float', bits, np.float32), halves)
    upper = bits.astype(np.uint32) << 16
    np.testing.assert_array_equal(mapped('all_bfloat_to_float', bits, np.float32), upper.view(np.float32))
    for exact in (halves.view(np.uint32), upper):
        near = (exact[:, None].astype(np.int64) + [-1, 0, 1, 0xfff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001]).astype(np.uint32)
        some = near.ravel().view(np.float32)
        number = ~np.isnan(some)
        with np.errstate(all='ignore'):
            rounded = some.astype(np.float16).view(np.uint16)
        np.testing.assert_array_equal(mapped('all_float_to_half', some, np.uint16)[number], rounded[number])
        lower, odd = near.ravel() & 0xffff, near.ravel() >> 16 & 1
        rounded = ((near.ravel() >> 16) + (lower + odd > 0x8000)).astype(np.uint16)
        result = mapped('all_float_to_bfloat', some, np.uint16)
        np.testing.assert_array_equal(result[number], rounded[number])
        assert np.isnan((result[~number].astype(np.uint32) << 16).view(np.float32)).all()


def test_a_rule_with_another_operation_is_refused():
    class Other(rules.Rule):
        name, summary, hypers = 'other', '', rules.get('sgd_torch').hypers
        slots = staticmethod(lambda h: ())
        coefficients = staticmethod(lambda xp, h, t: dict(lr=h.learning_rate))
        step = staticmethod(lambda xp, h, c, w, g, s: (w - xp.apply('tangent', c.lr * g), {}))
    h = Other.hyperparameters()
    with pytest.raises(NotImplementedError, match='tangent'):
        cuda.kernel(Other, Other.static(h), tuple(Other.all_coefficients(scalars, h, 1)), cuda.Storage('float32'), 1)


# -- tools/gpu_check.py ---------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize('name, kind, launches', [
    *(('novograd', kind, 3) for kind in ('float32', 'float64', 'float16', 'bfloat16', 'kahan-float16', 'kahan-bfloat16')),
    ('psgld', 'float32', 1), ('psgld', 'kahan-bfloat16', 1), ('sgld', 'float64', 1), ('sgld', 'float16', 1)])
def test_the_check_for_gpus(monkeypatch, tmp_path, name, kind, launches):
    """All of it but the driver's calls."""
    pytest.importorskip('torch')
    import cuda_check
    import gpu_check

    def loaded(kernel):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))   # a library of the same name would be the one that is loaded
        library = emulate({'x': kernel}, folder)
        return [getattr(library, f'launch_x_{one.name}') for one in kernel.passes]

    monkeypatch.setattr(cuda_check, 'loaded', functools.lru_cache(maxsize=None)(loaded))
    monkeypatch.setattr(cuda_check, 'launch', lambda function, *arguments: function(*arguments, False))
    row = gpu_check.check_kernels(cuda_check.TorchSteps, name, kind, 'cpu')
    assert row['holds'] and row['launches'] == launches, row
    if name == 'sgld':
        row = gpu_check.check_noise(cuda_check.TorchSteps, 'float64', 'cpu')
        assert row['holds'], row
    if name == 'psgld' and kind == 'float32':
        row = gpu_check.check_noise(cuda_check.TorchSteps, 'float32', 'cpu')
        assert row['holds'] and row['rule'] == 0, row
