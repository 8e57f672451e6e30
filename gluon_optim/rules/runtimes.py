"""What a rule needs, what each runtime can do, and so where a rule runs: compared here and nowhere else.

Every runtime has elementwise functions and sums over the tensor. What a rule needs beyond them it says in ``Rule.needs``.
"""
from typing import FrozenSet, Mapping, Tuple, Type

from .base import Rule

__all__ = ['CAN', 'mirrored', 'needs', 'runs_on', 'where_it_runs']

#: runtime -> what it has beyond elementwise functions and sums over the tensor
CAN: Mapping[str, FrozenSet[str]] = {
    'kernels': frozenset({'shared state'}),     # compiled loops, on MXNet's CPU contexts
    'numpy': frozenset({'shared state', 'noise', 'several gradients', 'python'}),
    'torch': frozenset(),
    'onnx': frozenset(),
    'optax': frozenset(),
}


def needs(rule: Type[Rule]) -> FrozenSet[str]:
    """What ``rule`` needs beyond elementwise functions and sums over the tensor.

    'shared state': numbers of the optimizer as a whole; 'noise': random numbers; 'several gradients': those of earlier calls;
    'python': anything, so that it cannot be traced.
    """
    return frozenset(rule.needs) | ({'shared state'} if rule.supplied else set()) | (set() if rule.lowerable else {'python'})


def runs_on(rule: Type[Rule], runtime: str) -> bool:
    """Whether ``runtime`` can do all that ``rule`` needs."""
    return needs(rule) <= CAN[runtime]


def mirrored(rule: Type[Rule]) -> bool:
    """Whether other frameworks can run it: the rule alone is the whole update."""
    return all(runs_on(rule, runtime) for runtime in ('torch', 'onnx', 'optax'))


def where_it_runs(rule: Type[Rule]) -> Tuple[str, ...]:
    """Names for people: 'mxnet' with kernels, or by operators only, and the others."""
    mxnet = 'mxnet' if runs_on(rule, 'kernels') else 'mxnet (operators only)'
    return (mxnet, *(runtime for runtime in ('numpy', 'torch', 'onnx', 'optax') if runs_on(rule, runtime)))
