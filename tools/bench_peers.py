"""The peers of tools/bench.py: the optimizers of PyTorch, torch_optimizer, pytorch_optimizer, timm and optax.

tools/bench.py imports this file. With `--peer-python` it also runs it in another environment, where it steps on request:
one JSON object per line comes in on standard input, one answer goes out on standard output. Neither MXNet nor gluon_optim
is needed there.
"""
import functools
import importlib
import json
import os
import subprocess
import sys
import time
import types
from importlib import metadata, util
from pathlib import Path

import numpy

RATE, DECAY, NOVOGRAD_BETAS = 1e-4, 1e-4, (0.95, 0.98)
STEPS, TURN = 10, 0.05  # a competitor's turn is at most this many steps and about this many seconds
PACKAGES = ('numpy', 'torch', 'torch_optimizer', 'pytorch_optimizer', 'timm', 'jax', 'optax')


def resnet50():
    """The 161 trainable tensors of ResNet-50 (25.6 million elements): convolutions without biases, batch norms, one dense layer."""
    def convolution(inputs, outputs, kernel):
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]  # with the scale and shift of its batch norm

    shapes, inputs = convolution(3, 64, 7), 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += convolution(inputs, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            if block == 0:
                shapes += convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


class Data:
    """Weights and gradients that every competitor copies: the same numbers in separate memory."""

    def __init__(self, shapes):
        self.shapes = [tuple(shape) for shape in shapes]
        self.elements = sum(int(numpy.prod(shape)) for shape in self.shapes)
        random = numpy.random.default_rng(0)
        self._weights = random.random(self.elements, numpy.float32) - numpy.float32(0.5)
        self._gradients = random.standard_normal(self.elements, numpy.float32) * numpy.float32(1e-3)

    def weights(self):
        return self._split(self._weights)

    def gradients(self):
        return self._split(self._gradients)

    def _split(self, flat):
        ends = numpy.cumsum([int(numpy.prod(shape)) for shape in self.shapes])
        return [part.reshape(shape) for part, shape in zip(numpy.split(flat, ends[:-1]), self.shapes)]


class Competitor:
    """One optimizer with its own arrays.

    Parameters
    ----------
    step : callable
        One update of all tensors, complete when it returns.
    weight : callable
        The first weight, as a NumPy array.
    slots : int
        Number of arrays of the weight's size that it keeps.
    prepare : callable
        What must be done before each step but is not part of it.
    """

    def __init__(self, step, weight, slots, prepare=lambda: None):
        self.step, self.weight, self.slots, self.prepare = step, weight, slots, prepare

    def turn(self):
        """Seconds of each of some steps."""
        seconds = []
        while len(seconds) < STEPS and sum(seconds) < TURN:
            self.prepare()
            begin = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - begin)
        return seconds

    def problem(self, before):
        """Why the measured steps were not updates, or '' if they were."""
        after = self.weight()
        if not numpy.isfinite(after).all():
            return 'the weights are not finite'
        return 'the weights have not changed' if numpy.array_equal(after, before) else ''


# Peers: `make(data)` returns a Competitor

def _torch(create, slots):
    """``create(torch, parameters)`` returns an optimizer; ``slots`` as in `Competitor`."""
    def make(data):
        import torch
        parameters = [torch.nn.Parameter(torch.from_numpy(weight.copy())) for weight in data.weights()]
        for parameter, gradient in zip(parameters, data.gradients()):
            parameter.grad = torch.from_numpy(gradient.copy())
        return Competitor(create(torch, parameters).step, lambda: parameters[0].detach().numpy().copy(), slots)
    return make


def _torch_family(**options):
    return {
        'adamw': _torch(lambda torch, p: torch.optim.AdamW(p, RATE, **options), 2),
        'adam': _torch(lambda torch, p: torch.optim.Adam(p, RATE, **options), 2),
        'sgd': _torch(lambda torch, p: torch.optim.SGD(p, RATE, momentum=0.9, **options), 1),
    }


def _of(module, name, slots, **options):
    """An optimizer of a package that follows torch's interface."""
    return _torch(lambda torch, p: getattr(importlib.import_module(module), name)(p, lr=RATE, weight_decay=DECAY, **options), slots)


def _timm(name, slots, **options):
    def make(data):
        # timm's own __init__ imports every model, and torchvision with them; its optimizers need neither
        if 'timm' not in sys.modules:
            spec = util.find_spec('timm')
            if spec is None:
                raise ModuleNotFoundError("No module named 'timm'")
            for package, folder in (('timm', ''), ('timm.optim', 'optim')):
                sys.modules[package] = types.ModuleType(package)
                sys.modules[package].__path__ = [str(Path(spec.origin).parent / folder)]
        return _of(f'timm.optim.{name.lower()}', name, slots, **options)(data)
    return make


def _optax(create, slots):
    """``create(optax)`` returns a GradientTransformation, which runs compiled, in place where JAX can."""
    def make(data):
        import jax
        import optax
        weights = [jax.numpy.array(weight) for weight in data.weights()]
        gradients = [jax.numpy.array(gradient) for gradient in data.gradients()]
        transformation = create(optax)
        now = [weights, jax.jit(transformation.init)(weights)]

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(weights, state, gradients):
            updates, state = transformation.update(gradients, state, weights)
            return optax.apply_updates(weights, updates), state

        def step():
            now[:] = jax.block_until_ready(update(*now, gradients))
        return Competitor(step, lambda: numpy.array(now[0][0]), slots)
    return make


def _ours(fused):
    """Our own optimizers in PyTorch: by kernels on its memory, or by its operations."""
    def made(name, slots, **options):
        def create(torch, parameters):
            from gluon_optim.torch import create
            return create(name, parameters, lr=RATE, fused=fused, **options)
        return _torch(create, slots)
    return {'adamw': made('adamw', 2), 'novograd': made('novograd', 1, beta1=NOVOGRAD_BETAS[0], beta2=NOVOGRAD_BETAS[1], wd=DECAY),
            'lamb': made('lamb', 2), 'sgd_torch': made('sgd_torch', 1, momentum=0.9)}


_FAMILIES = {
    'gluon_optim.torch': _ours(fused=True),
    'gluon_optim.torch_operations': _ours(fused=False),
    'torch_fused': _torch_family(fused=True),
    'torch_default': _torch_family(),
    'torch_foreach': _torch_family(foreach=True),
    'torch_optimizer': {
        'novograd': _of('torch_optimizer', 'NovoGrad', 1, betas=NOVOGRAD_BETAS),
        'lamb': _of('torch_optimizer', 'Lamb', 2)},
    'pytorch_optimizer': {
        'novograd': _of('pytorch_optimizer', 'NovoGrad', 1, betas=NOVOGRAD_BETAS),
        'lamb': _of('pytorch_optimizer', 'Lamb', 2)},
    'timm': {
        'novograd': _timm('NvNovoGrad', 1, betas=NOVOGRAD_BETAS),
        'lamb': _timm('Lamb', 2)},
    'optax': {
        'novograd': _optax(lambda optax: optax.novograd(RATE, *NOVOGRAD_BETAS, weight_decay=DECAY), 1),
        'adamw': _optax(lambda optax: optax.adamw(RATE), 2),
        'lamb': _optax(lambda optax: optax.lamb(RATE), 2)},
}

PEERS = {f'{family}:{name}': make for family, peers in _FAMILIES.items() for name, make in peers.items()}


def build(name, data):
    """(Competitor, '') with one step done, so that everything is compiled, or (None, why this environment lacks it)."""
    try:
        competitor = PEERS[name](data)
        competitor.step()
        return competitor, ''
    except Exception as error:  # whatever a package of another version raises explains why there is no figure
        return None, f'{type(error).__name__}: {error}'.splitlines()[0]


def versions(packages=PACKAGES):
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# Peers of another environment

class Server:
    """This file, running under another Python. Its competitors step when asked, so that turns stay interleaved."""

    def __init__(self, python, data):
        self.python = python
        self._process = subprocess.Popen([python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self.ask(shapes=data.shapes)

    def build(self, name):
        """As `build`."""
        slots, why = self.ask(build=name)
        return (None if why else Remote(self, name, slots)), why

    def ask(self, **request):
        try:
            self._process.stdin.write(json.dumps(request) + '\n')
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise SystemExit(f'The peers under {self.python} have stopped (exit code {self._process.poll()}). '
                             'Does that Python have NumPy? Its own message is above.') from error

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Remote:
    """A competitor in another process, which measures its own time."""

    def __init__(self, server, name, slots):
        self._server, self._name, self.slots = server, name, slots

    def turn(self):
        return self._server.ask(turn=self._name)

    def weight(self):
        return None  # the server remembers it

    def problem(self, before):
        return self._server.ask(problem=self._name)


def serve():
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # packages' output must not get between the answers
    data, competitors, before = None, {}, {}
    for line in sys.stdin:
        (what, value), = json.loads(line).items()
        if what == 'shapes':
            data, answer = Data(value), versions()
        elif what == 'build':
            competitor, why = build(value, data)
            if not why:
                competitors[value], before[value] = competitor, competitor.weight()
            answer = competitor.slots if not why else None, why
        elif what == 'turn':
            answer = competitors[value].turn()
        else:
            answer = competitors[value].problem(before[value])
        answers.write(json.dumps(answer) + '\n')
        answers.flush()


if __name__ == '__main__':
    serve()
