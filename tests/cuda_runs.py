"""CUDA kernels without a GPU: the printed source compiled by NVRTC, or as C++ that plays blocks and threads on the CPU."""
import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np

from gluon_optim.lowering import cuda
from gluon_optim.rules.base import scalars

HEADER = Path(__file__).with_name('cuda_emulation.h')
COMPILER = shutil.which('g++') or shutil.which('clang++')


def printed(rule, h, storage, tensors=None):
    """The kernel for launches of so many tensors, or of as many as they take."""
    key = rule, rule.static(h), tuple(rule.all_coefficients(scalars, h, 1)), storage
    return cuda.kernel(*key, tensors or cuda.capacity(*key))


def joined(kernels):
    """One source with the kernels of all, {prefix: kernel}: pass_0 of 'adamw' is adamw_pass_0."""
    heads, parts = set(), []
    for prefix, kernel in kernels.items():
        head, begin, passes = kernel.source.partition('\n#define PARAMETERS_0')
        heads.add(head)
        parts.append(re.sub(r'\b(PARAMETERS|TENSOR|pass)_(?=\d)', rf'{prefix}_\1_', begin + passes))
    longest = max(heads, key=len)   # with noise
    assert all(map(longest.startswith, heads))
    return ''.join([longest, *parts])


def emulate(kernels, folder):
    """A library with a launching function for each pass of ``kernels``, {prefix: kernel}; see cuda_emulation.h."""
    names = [f'{prefix}_{one.name}' for prefix, kernel in kernels.items() for one in kernel.passes]
    text = '\n'.join([f'#include "{HEADER}"', joined(kernels), *(f'EMULATED({name})' for name in names)])
    source = folder / 'emulated.cpp'
    source.write_text(text)
    return compiled(source)


def compiled(source):
    """The C++ file ``source`` as a library."""
    options = ['-std=c++14', '-O1', '-ffp-contract=off', '-w', '-shared', '-fPIC']
    library = source.with_suffix('.so')
    done = subprocess.run([COMPILER, *options, str(source), '-o', str(library)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[:3000]
    return ctypes.CDLL(str(library))


class Batch(cuda.Batch):
    """A list of tensors in NumPy's memory: ``arrays`` are addresses."""

    by_address = True
    backwards = False

    def __init__(self, kernel, sizes, library, prefix):
        self._own = []
        self._functions = [getattr(library, f'launch_{prefix}_{one.name}') for one in kernel.passes]
        super().__init__(kernel, sizes)

    def _allocate(self, size, dtype):
        self._own.append(np.full(size, np.nan, dtype))
        return self._own[-1].ctypes.data

    def _launch(self, number, blocks, arguments):
        failed = self._functions[number](blocks, cuda.THREADS, ctypes.c_void_p(arguments), self.backwards)
        assert not failed, 'some threads ended while others waited at a barrier'


def guarded(array):
    """A copy of ``array`` between bytes that nobody may change, NaN for whoever reads them."""
    buffer = np.full(array.nbytes + 256, 0xff, np.uint8)
    copy = buffer[128:128 + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy, buffer


def intact(buffer):
    return (buffer[:128] == 0xff).all() and (buffer[-128:] == 0xff).all()


class Device:
    """What MXNet built with CUDA has and the one here lacks, at its C API: kernels that a GPU would run are emulated, on the memory
    of CPU contexts. As src/common/rtc.cc has it: arrays of other types than the signature says are refused; one that is there
    twice would make the engine wait for itself.

    ``launches``  name of the kernel, and how many arrays it was given to read and to write
    ``waits``     calls that wait for the device, or copy to or from it
    """

    WAITS = ('MXNDArrayWaitToRead', 'MXNDArrayWaitToWrite', 'MXNDArrayWaitAll', 'MXNDArraySyncCopyFromCPU',
             'MXNDArraySyncCopyToCPU', 'MXNDArraySyncCopyFromNDArray')

    def __init__(self, library, monkeypatch, folder):
        self.library, self._folder, self._libraries, self._kernels = library, folder, {}, {}
        self.launches, self.waits, self.sources = [], [], []
        self.fails = False   # to compile
        needed = 'MXNDArrayGetDType', 'MXNDArrayGetData', 'MXRtcCudaModuleCreate'
        self._real = {name: getattr(library, name) for name in (*self.WAITS, *needed)}
        for name in self.WAITS:
            monkeypatch.setattr(library, name, self._counted(name))
        for name in ('ModuleCreate', 'ModuleFree', 'KernelCreate', 'KernelFree', 'KernelCall'):
            monkeypatch.setattr(library, f'MXRtcCuda{name}', getattr(self, name))

    def _counted(self, name):
        def call(*arguments):
            self.waits.append(name)
            return self._real[name](*arguments)
        return call

    def ModuleCreate(self, source, n_options, options, n_exports, exports, out):
        self.sources.append(source.value.decode())
        assert tuple(options[k].decode() for k in range(n_options)) == cuda.OPTIONS
        if self.fails:   # as the MXNet here really does, with a message
            return self._real['MXRtcCudaModuleCreate'](source, n_options, options, n_exports, exports, out)
        names = re.findall(r'\b(pass_\d+|nothing)\(', self.sources[-1])
        path = self._folder / f'module{len(self.sources)}.cpp'
        path.write_text('\n'.join([f'#include "{HEADER}"', self.sources[-1], *(f'EMULATED({name})' for name in names)]))
        out._obj.value = len(self.sources)
        self._libraries[len(self.sources)] = compiled(path)
        return 0

    def ModuleFree(self, handle):
        return 0

    def KernelCreate(self, module, name, n, is_array, is_const, types, out):
        function = getattr(self._libraries[module.value], f'launch_{name.value.decode()}')
        arguments = [(bool(is_array[k]), bool(is_const[k]), types[k]) for k in range(n)]
        out._obj.value = len(self._kernels) + 1
        self._kernels[len(self._kernels) + 1] = name.value.decode(), function, arguments
        return 0

    def KernelFree(self, handle):
        return 0

    def KernelCall(self, kernel, device, arguments, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared):
        name, function, described = self._kernels[kernel.value]
        given = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))
        values, pointers, memories, const = np.zeros(len(described), np.int64), np.zeros(len(described), np.int64), [], []
        self._real['MXNDArrayWaitAll']()   # the engine's part
        for k, (is_array, is_const, dtype) in enumerate(described):
            if not is_array:
                pointers[k] = given[k]
                continue
            handle, known, data = ctypes.c_void_p(given[k]), ctypes.c_int(), ctypes.c_void_p()
            assert self._real['MXNDArrayGetDType'](handle, ctypes.byref(known)) == 0 and known.value == dtype
            assert self._real['MXNDArrayGetData'](handle, ctypes.byref(data)) == 0
            values[k], pointers[k] = data.value, values.ctypes.data + 8 * k
            memories.append(ctypes.c_void_p.from_address(given[k]).value)
            const += [data.value] if is_const else []
        assert len(set(memories)) == len(memories), 'the engine would wait for itself'
        assert (grid_y.value, grid_z.value, block_y.value, block_z.value, shared.value) == (1, 1, 1, 1, 0)
        before = [ctypes.string_at(address, 4) for address in const]
        assert function(grid_x.value, block_x.value, ctypes.c_void_p(pointers.ctypes.data), False) == 0
        assert before == [ctypes.string_at(address, 4) for address in const], 'a constant array was written'
        if name != 'nothing':
            self.launches.append((name, len(const), len(memories) - len(const)))
        return 0

