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
    parts = []
    for prefix, kernel in kernels.items():
        head, begin, passes = kernel.source.partition('\n#define PARAMETERS_0')
        parts += [] if parts else [head]
        parts.append(re.sub(r'\b(PARAMETERS|TENSOR|pass)_(?=\d)', rf'{prefix}_\1_', begin + passes))
    return ''.join(parts)


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
