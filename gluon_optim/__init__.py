"""Optimizers for MXNet Gluon, state that survives, and the way to PyTorch, ONNX and JAX.

    import gluon_optim as go
    trainer = gluon.Trainer(net.collect_params(), 'novograd', {'learning_rate': 0.01})

Importing registers the new optimizers where MXNet is installed. Without MXNet everything outside `gluon_optim.mxnet`
works: states are read, inspected and converted.
"""
import importlib
import importlib.util
import warnings
from typing import Any, List

from . import rules

__version__ = '0.1.0'

# public name -> where it lives; loaded when it is first used
_PUBLIC = {
    'Hyper': 'schema', 'Slot': 'schema', 'Rule': 'rules.base',
    'OptimizerStates': 'states.model',
    'list_optimizers': 'rules', 'optimizer_info': 'rules',
    'create': 'mxnet.registry', 'register': 'mxnet.registry',
    'accelerate': 'mxnet.builtin', 'restore_builtins': 'mxnet.builtin',
    'save_states': 'mxnet.trainer', 'load_states': 'mxnet.trainer', 'states_digest': 'mxnet.trainer',
    'save_checkpoint': 'mxnet.checkpoint', 'load_checkpoint': 'mxnet.checkpoint', 'CheckpointManager': 'mxnet.manager',
    'read_states': 'states.reader', 'read_checkpoint': 'states.container',
    'to_torch': 'torch', 'from_torch': 'torch', 'to_onnx': 'onnx', 'from_onnx': 'onnx', 'to_optax': 'optax', 'from_optax': 'optax',
    'model_to_torch': 'models', 'suggest_names': 'models',
    'rate': 'schedules',
}
_MODULES = ('models', 'torch', 'onnx', 'optax', 'rules', 'schedules', 'schema', 'states')

__all__ = sorted([*_PUBLIC, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f'.{name}', __name__)
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    if name == 'register' and importlib.util.find_spec('mxnet') is None:
        return rules.register
    if _PUBLIC[name].startswith('mxnet.') and importlib.util.find_spec('mxnet') is None:
        raise ImportError(f'gluon_optim.{name} needs MXNet, which is not installed here. '
                          'Install mxnet==1.9.1 and "numpy<1.24" on Python 3.8 to 3.11.')
    value = getattr(importlib.import_module(f'.{_PUBLIC[name]}', __name__), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted([*globals(), *__all__])


def _register_optimizers() -> None:
    if importlib.util.find_spec('mxnet') is None:
        return
    try:
        from .mxnet import registry  # noqa: F401
    except (ImportError, AttributeError, OSError) as error:
        warnings.warn(f'MXNet is installed but cannot be imported ({error}). MXNet 1.9.1 needs NumPy below 1.24: '
                      'pip install "numpy<1.24". What needs no MXNet works without it.', RuntimeWarning, stacklevel=3)


_register_optimizers()
