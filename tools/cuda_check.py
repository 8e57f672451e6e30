"""Steps by the CUDA kernels that MXNet launches on its GPU contexts, for gpu_check.py.

`MXNetSteps` are MXNet's own, by `mx.rtc`. Its CUDA wheels hold code for GPUs up to compute capability 8.6 and nothing that a later
one could compile; there `TorchSteps` compile the same source by NVRTC and launch it by the CUDA driver, on PyTorch's memory.
"""
import ctypes
import functools
import subprocess
import sys

import numpy
import torch
from nvrtc import compile_ptx

from gluon_optim.lowering import cuda
from gluon_optim.lowering.plan import NOISE
from gluon_optim.rules.base import initial_slot, scalars
from gluon_optim.rules.compensated import COMPENSATION, KAHAN, compensated
from gluon_optim.rules.mx.base import VARIANT

__all__ = ['KEY', 'MXNetSteps', 'TorchSteps', 'mxnet_runs']

KEY = 2 ** 53 - 5   # of rules that draw noise; a weight's stream is its number

MXNET = 'import mxnet as mx; assert (mx.nd.ones((2,), ctx=mx.gpu()) * 2).sum().asscalar() == 4'


def mxnet_runs():
    """Whether MXNet can compute on this machine's first GPU; tried in a process of its own, which may die of it."""
    return subprocess.run([sys.executable, '-c', MXNET], capture_output=True).returncode == 0


class TorchSteps:
    """Updates of copies of ``weights``, PyTorch's tensors, by a rule. Those of half precision have masters, or with
    ``multi_precision='kahan'`` compensations."""

    by = "NVRTC and the CUDA driver, on PyTorch's memory"

    def __init__(self, rule, h, weights, device=None, multi_precision=True):
        device = device or 'cuda'
        dtype = str(weights[0].dtype).partition('.')[2]
        half = dtype in ('float16', 'bfloat16')
        storage = cuda.Storage(dtype, master=half and multi_precision != KAHAN)
        if half and multi_precision == KAHAN:
            rule = compensated(rule, dtype)
        elif dtype == 'float16':
            rule = rule.on_masters()
        self.rule, self.h, self.storage, self.device = rule, h, storage, device
        self.weights = [w.to(device, copy=True) for w in weights]
        exact = getattr(torch, storage.precision)
        self.masters = [w.to(exact) for w in self.weights] if storage.master else self.weights
        self.slots = [{slot.name: torch.as_tensor(initial_slot(slot, w.to(exact).numpy()), device=device,
                                                  dtype=getattr(torch, storage.element(slot.name)))
                       for slot in rule.slots(h)} for w in weights]
        key = rule, rule.static(h), tuple(rule.all_coefficients(scalars, h, 1)), storage
        tensors = cuda.evenly(len(weights), cuda.capacity(*key))
        self.batch = Batch(cuda.kernel(*key, tensors), [w.numel() for w in weights], device)
        self.gradients = [torch.zeros_like(w) for w in self.weights]   # kernels keep their addresses
        for i, arrays in enumerate(zip(self.masters, self.weights, self.gradients, self.slots)):
            held = dict(zip(('weight', 'half', 'gradient'), arrays), **arrays[3])
            numbers, roles = dict(zip(NOISE, (KEY, i, 0))), self.batch.kernel.roles
            self.batch.arrays[:, i] = [numbers[role] if role in NOISE else held[role].data_ptr() for role in roles]
        self.batch.point()

    def step(self, t, gradients=None):
        for held, gradient in zip(self.gradients, gradients or ()):
            held.copy_(gradient)
        if NOISE[-1] in self.batch.kernel.roles:
            self.batch.arrays[self.batch.kernel.roles.index(NOISE[-1])] = t   # the update
        c = self.rule.all_coefficients(self.rule.numbers(scalars, self.storage.precision), self.h, t)
        self.batch.run([[c[name] for name in self.batch.kernel.coefficients]], [0] * len(self.weights))

    def exact(self):
        """The weights that count, in NumPy."""
        rest = [slots[COMPENSATION.name].double() if COMPENSATION.name in slots else 0.0 for slots in self.slots]
        return [(w.double() + lost).cpu().numpy() for w, lost in zip(self.masters, rest)]

    def launches(self):
        """How many a step makes, at most."""
        return len(self.batch.kernel.passes) * -(-len(self.weights) // self.batch.kernel.tensors)


class Batch(cuda.Batch):
    """A list of tensors in PyTorch's memory on ``device``: ``arrays`` are addresses."""

    by_address = True

    def __init__(self, kernel, sizes, device):
        self._device, self._own, self._functions = device, [], loaded(kernel)
        super().__init__(kernel, sizes)

    def _allocate(self, size, dtype):
        self._own.append(torch.empty(size, dtype=getattr(torch, dtype), device=self._device))
        return self._own[-1].data_ptr()

    def _launch(self, number, blocks, arguments):
        launch(self._functions[number], blocks, cuda.THREADS, ctypes.c_void_p(arguments))


@functools.lru_cache(maxsize=None)
def driver():
    return ctypes.CDLL('libcuda.so.1')


@functools.lru_cache(maxsize=None)
def loaded(kernel):
    """The kernel's passes on the current GPU."""
    torch.cuda.synchronize()   # makes the context that the driver's functions use
    major, minor = torch.cuda.get_device_capability()
    made = compile_ptx(kernel.source, [*cuda.OPTIONS, f'--gpu-architecture=sm_{major}{minor}'])
    module, functions = ctypes.c_void_p(), []
    succeeded(driver().cuModuleLoadData(ctypes.byref(module), made))
    for one in kernel.passes:
        functions.append(ctypes.c_void_p())
        succeeded(driver().cuModuleGetFunction(ctypes.byref(functions[-1]), module, one.name.encode()))
    return functions


def launch(function, blocks, threads, arguments):
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    succeeded(driver().cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, arguments, None))


def succeeded(result):
    if result:
        raise OSError(f'The CUDA driver failed: error {result}.')


class MXNetSteps:
    """`TorchSteps` as a user of MXNet has them."""

    by = 'mx.rtc'

    def __init__(self, rule, h, weights, device=None, multi_precision=True):
        import mxnet as mx

        import gluon_optim
        self.nd, self.context = mx.nd, device or mx.gpu()
        mixed = weights[0].dtype == torch.float16 and multi_precision
        seed = dict(seed=KEY) if 'noise' in rule.needs else {}
        arguments = h.asdict()
        if VARIANT in rule.hypers:   # follows from the MXNet that is installed
            del arguments[VARIANT.name]
        self.optimizer = gluon_optim.create(rule.name, multi_precision=mixed, **seed, **arguments)
        self.weights = [self.array(w) for w in weights]
        self.gradients = [self.nd.zeros_like(w) for w in self.weights]
        self.states = [self.optimizer.create_state_multi_precision(i, w) for i, w in enumerate(self.weights)]
        self.mixed = mixed

    def array(self, tensor):
        return self.nd.array(numpy.atleast_1d(tensor.numpy()), ctx=self.context, dtype=str(tensor.dtype).partition('.')[2])

    def step(self, t, gradients=None):
        for held, gradient in zip(self.gradients, gradients or ()):
            self.array(gradient).copyto(held)
        self.optimizer.update_multi_precision(list(range(len(self.weights))), self.weights, self.gradients, self.states)

    def exact(self):
        h, weights = self.optimizer.hyperparameters(), [w.asnumpy().astype(float) for w in self.weights]
        split = [self.optimizer.split_state(state, h, self.mixed) for state in self.states] if self.mixed else []
        if self.mixed == KAHAN:
            return [w + slots[-1].asnumpy() for w, (slots, _) in zip(weights, split)]
        return [master.asnumpy().astype(float) for _, master in split] or weights

    def launches(self):
        prepared = next(iter(self.optimizer._executor._prepared.values()))   # an AttributeError where operators ran
        return len(prepared._batch.kernel.passes) * -(-len(self.weights) // prepared._batch.kernel.tensors)
