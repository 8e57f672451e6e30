"""Optimizers for MXNet Gluon, training state that survives a crash, and a way to PyTorch, ONNX and JAX.

    import gluon_optim as go
    trainer = gluon.Trainer(net.collect_params(), 'novograd', {'learning_rate': 0.01})

Importing registers the new optimizers where MXNet is installed. Without MXNet everything outside `gluon_optim.mxnet`
works: states are read, inspected and converted.
"""
import importlib
import importlib.util
import warnings
from typing import Any, List, Set

from . import rules

__version__ = '1.0.0'

# public name -> the module that defines it; loaded on first use
_PUBLIC = {
    'Hyper': 'schema', 'Slot': 'schema', 'Rule': 'rules.base',
    'OptimizerStates': 'states.model',
    'list_optimizers': 'rules', 'optimizer_info': 'rules',
    'create': 'mxnet.registry', 'register': 'mxnet.registry',
    'accelerate': 'mxnet.builtin', 'accelerated': 'mxnet.builtin', 'restore_builtins': 'mxnet.builtin',
    'save_states': 'mxnet.trainer', 'load_states': 'mxnet.trainer', 'states_digest': 'mxnet.trainer',
    'save_checkpoint': 'mxnet.checkpoint', 'load_checkpoint': 'mxnet.checkpoint', 'CheckpointManager': 'mxnet.manager',
    'module_checkpoint': 'mxnet.module', 'load_module_checkpoint': 'mxnet.module',
    'EstimatorCheckpoints': 'mxnet.estimator', 'EpochSampler': 'mxnet.data',
    'read_states': 'states.reader', 'read_checkpoint': 'states.container',
    'to_torch': 'torch', 'from_torch': 'torch', 'to_onnx': 'onnx', 'from_onnx': 'onnx', 'to_optax': 'optax', 'from_optax': 'optax',
    'model_to_torch': 'models', 'suggest_names': 'models',
    'rate': 'schedules',
    'param_groups': 'mxnet.groups',
    'minimize': 'mxnet.minimize',
    'watch': 'mxnet.watch',
}
# public name -> the module that it is
_MODULES = {
    'lr_scheduler': 'mxnet.lr_scheduler',
    'models': 'models', 'torch': 'torch', 'onnx': 'onnx', 'optax': 'optax',
    'rules': 'rules', 'schedules': 'schedules', 'schema': 'schema', 'states': 'states',
    'monitor': 'mxnet.monitor',
    'sampling': 'mxnet.sampling',
    'groups': 'mxnet.groups',
    'ensemble': 'mxnet.ensemble',
    'gradients': 'mxnet.gradients',
    'curvature': 'mxnet.curvature',
}

_NEEDS = {'torch': ('torch',), 'onnx': ('onnx',), 'optax': ('jax', 'optax'), 'mxnet': ('mxnet',)}
_broken: Set[str] = set()  # rooms that were found not to work here


def __getattr__(name: str) -> Any:
    if name == '__all__':  # what `from gluon_optim import *` takes, and `help` shows
        return _working()
    if name in _MODULES:
        return importlib.import_module(f'.{_MODULES[name]}', __name__)
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    if name == 'register' and not _installed('mxnet'):
        return rules.register
    value = getattr(importlib.import_module(f'.{_PUBLIC[name]}', __name__), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    """The public names that work here, as far as this is known without importing what they need."""
    names = [name for name in [*_PUBLIC, *_MODULES] if name == 'register' or _installed(_room(name))]
    return sorted([*names, *(name for name in globals() if name.startswith('__'))])


def _room(name: str) -> str:
    return (_PUBLIC.get(name) or _MODULES.get(name, name)).partition('.')[0]


def _installed(room: str) -> bool:
    return room not in _broken and all(importlib.util.find_spec(package) for package in _NEEDS.get(room, ()))


def _working() -> List[str]:
    """The public names that work here. Imports what they need."""
    for room in _NEEDS:
        if _installed(room):
            try:
                importlib.import_module(f'.{room}', __name__)
            except Exception:  # whatever a damaged package raises; using one of these names says it
                _broken.add(room)
    return [name for name in __dir__() if not name.startswith('__')]


def _register_optimizers() -> None:
    if not _installed('mxnet'):
        return
    try:
        from .mxnet import registry  # noqa: F401
    except ImportError as error:
        _broken.add('mxnet')
        warnings.warn(f'{error} The parts that do not need MXNet still work.', RuntimeWarning, stacklevel=3)


_register_optimizers()
