"""What a rule needs, what each runtime can do, and therefore where a rule runs. This is the only place that compares them.

Every runtime has elementwise functions and sums over the tensor. ``Rule.needs`` declares what a rule needs beyond them.
"""
from typing import FrozenSet, Mapping, Optional, Tuple, Type

from ..schema import Values
from .base import Rule

__all__ = ['CAN', 'draws_itself', 'mirrored', 'needs', 'runs_on', 'where_it_runs']

#: runtime -> what it has beyond elementwise functions and sums over the tensor
CAN: Mapping[str, FrozenSet[str]] = {
    'kernels': frozenset({'shared state', 'noise', 'several gradients'}),     # compiled loops, on MXNet's CPU contexts
    'numpy': frozenset({'shared state', 'noise', "MXNet's noise", 'several gradients', 'python'}),
    'torch': frozenset(),
    'onnx': frozenset(),
    'optax': frozenset(),
}


def needs(rule: Type[Rule], h: Optional[Values] = None) -> FrozenSet[str]:
    """What ``rule`` needs beyond elementwise functions and sums over the tensor, with the hyper-parameters ``h`` or its defaults.

    'shared state': numbers that belong to the optimizer as a whole; 'noise': random numbers; "MXNet's noise": those of its
    generator; 'several gradients': those of earlier calls; 'python': arbitrary Python, which cannot be traced.
    """
    found = frozenset(rule.needs) | ({'shared state'} if rule.supplied else set()) | (set() if rule.lowerable else {'python'})
    return found if draws_itself(rule, h) or 'noise' not in found else found | {"MXNet's noise"}


def draws_itself(rule: Type[Rule], h: Optional[Values] = None) -> bool:
    """Whether ``rule`` draws the noise of `rules.noise`; one that does not say where from has that of MXNet's generator."""
    given = {hyper.name: hyper.default for hyper in rule.hypers} if h is None else h.asdict()
    return 'noise' in rule.needs and given.get('noise') == 'philox'


def runs_on(rule: Type[Rule], runtime: str, h: Optional[Values] = None) -> bool:
    """Whether ``runtime`` can do everything that ``rule`` needs."""
    return needs(rule, h) <= CAN[runtime]


def mirrored(rule: Type[Rule]) -> bool:
    """Whether other frameworks can run it, because the rule alone is the whole update."""
    return all(runs_on(rule, runtime) for runtime in ('torch', 'onnx', 'optax'))


def where_it_runs(rule: Type[Rule]) -> Tuple[str, ...]:
    """The runtimes, for display: 'mxnet' with kernels, or 'mxnet (operators only)', and the others."""
    mxnet = 'mxnet' if runs_on(rule, 'kernels') else 'mxnet (operators only)'
    return (mxnet, *(runtime for runtime in ('numpy', 'torch', 'onnx', 'optax') if runs_on(rule, runtime)))
