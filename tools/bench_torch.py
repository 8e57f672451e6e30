"""The competitors of tools/bench.py in PyTorch: ours, its own, and those of torch_optimizer, pytorch_optimizer and timm."""
import importlib
import sys
import types
from importlib import util
from pathlib import Path

from bench_competitors import DECAY, NOVOGRAD_BETAS, RATE, Competitor, Framework, arguments_of, slots_of


def on_parameters(data, create, slots, dtype='float32'):
    """A Competitor; ``create`` makes the optimizer from a list of parameters."""
    import torch
    dtype_of = getattr(torch, dtype)
    parameters = [torch.nn.Parameter(torch.from_numpy(weight).to(dtype_of, copy=True)) for weight in data.weights()]
    for parameter, gradient in zip(parameters, data.gradients()):
        parameter.grad = torch.from_numpy(gradient).to(dtype_of, copy=True)
    return Competitor(create(parameters).step, lambda: parameters[0].detach().float().numpy().copy(), slots, dtype)


def ours(fused):
    """Our optimizers by kernels on PyTorch's memory, or by PyTorch's operations."""
    def make(name, data, dtype):
        from gluon_optim.torch import create
        hypers = arguments_of(name)
        return on_parameters(data, lambda parameters: create(name, parameters, fused=fused, **hypers), slots_of(name), dtype)
    return make


def own(name, slots, **options):
    """A class of torch.optim, in float32."""
    def make(data, dtype):
        import torch
        return on_parameters(data, lambda parameters: getattr(torch.optim, name)(parameters, RATE, **options), slots)
    return make


def family(**options):
    return {'adamw': own('AdamW', 2, **options), 'adam': own('Adam', 2, **options), 'sgd': own('SGD', 1, momentum=0.9, **options)}


def elsewhere(module, name, slots, **options):
    """A class of a package that follows PyTorch's interface, in float32."""
    def make(data, dtype):
        create = getattr(importlib.import_module(module), name)
        return on_parameters(data, lambda parameters: create(parameters, lr=RATE, weight_decay=DECAY, **options), slots)
    return make


def timm(name, slots, **options):
    def make(data, dtype):
        # timm's own __init__ imports every model, and torchvision with them; its optimizers need neither
        if 'timm' not in sys.modules:
            spec = util.find_spec('timm')
            if spec is None:
                raise ModuleNotFoundError("No module named 'timm'")
            for package, folder in (('timm', ''), ('timm.optim', 'optim')):
                sys.modules[package] = types.ModuleType(package)
                sys.modules[package].__path__ = [str(Path(spec.origin).parent / folder)]
        return elsewhere(f'timm.optim.{name.lower()}', name, slots, **options)(data, dtype)
    return make


FAMILIES = {
    'torch_fused': family(fused=True),
    'torch_default': family(),
    'torch_foreach': family(foreach=True),
    'torch_optimizer': {
        'novograd': elsewhere('torch_optimizer', 'NovoGrad', 1, betas=NOVOGRAD_BETAS),
        'lamb': elsewhere('torch_optimizer', 'Lamb', 2)},
    'pytorch_optimizer': {
        'novograd': elsewhere('pytorch_optimizer', 'NovoGrad', 1, betas=NOVOGRAD_BETAS),
        'lamb': elsewhere('pytorch_optimizer', 'Lamb', 2)},
    'timm': {
        'novograd': timm('NvNovoGrad', 1, betas=NOVOGRAD_BETAS),
        'lamb': timm('Lamb', 2)},
}

FRAMEWORK = Framework(
    needs=('torch',), dtypes=('float32', 'float16', 'bfloat16'), cases=('resnet50', '2000'),
    ours={'gluon_optim.torch': ours(fused=True), 'gluon_optim.torch_operations': ours(fused=False)},
    others={f'{name}:{kind}': make for name, peers in FAMILIES.items() for kind, make in peers.items()},
    beside=('torch_fused:*', 'torch_default:adamw', 'torch_foreach:adamw', 'torch_optimizer:*', 'pytorch_optimizer:*', 'timm:*',
            'optax:novograd'))
