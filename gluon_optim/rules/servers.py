"""What cannot be computed on parameter servers as in one process, and why.

A server has a few parameters, or slices of large ones, each as a vector; it updates one as soon as all gradients for it have
arrived.
"""
from typing import Any, Mapping, Type

from ..schema import Values, some_of
from .base import Rule, scalars
from .graph import trace
from .runtimes import needs

__all__ = ['check_servers']

_REASONS = {
    'nadam': 'has one schedule of the momentum for all parameters, which follows the order in which gradients arrive',
    'lbsgd': 'adds up gradients and warms up by counts of all parameters, which follow the order in which gradients arrive',
}


def check_servers(rule: Type[Rule], h: Values, multi_precision: Any, sizes: Mapping[str, int], half: bool, servers: int, bound: int
                  ) -> None:
    """ValueError where servers would compute something else than one process.

    ``sizes`` are the numbers of elements of the parameters, by name; ``half``: float16 weights are among them. Those of ``bound``
    elements and more are cut in parts, one for each of the ``servers``.
    """
    name = rule.name
    reason = _REASONS.get(name)
    if 'noise' in needs(rule):
        reason = 'draws random numbers, and every server would draw its own'
    elif reason is None and 'several gradients' in needs(rule):
        reason = 'needs several gradients for an update'
    elif half and multi_precision and rule.on_masters() is not rule:
        reason = 'with multi_precision takes norms of float16 weights, and servers have their float32 masters only'
    if reason is not None:
        raise ValueError(f'{name} {reason}. Received: a store that updates on parameter servers. Pass update_on_kvstore=False.')
    cut = [parameter for parameter, size in sizes.items() if size >= bound]
    if servers > 1 and cut and _reduces(rule, h):
        largest = max(sizes.values())
        raise ValueError(
            f'{name} takes norms of whole parameters, but parameters of MXNET_KVSTORE_BIGARRAY_BOUND elements and more are cut in '
            f'parts, one for each server. Received: {servers} servers, a bound of {bound}, and {some_of(cut)}, of up to {largest} '
            f'elements. Pass update_on_kvstore=False, set MXNET_KVSTORE_BIGARRAY_BOUND={largest + 1} for all workers, or use one '
            'server.')


def _reduces(rule: Type[Rule], h: Values) -> bool:
    """Whether an update of one element depends on others of the same parameter."""
    if not rule.lowerable:
        return True  # nobody knows
    graph = trace(rule, rule.static(h), tuple(rule.all_coefficients(rule.numbers(scalars, 'float32'), h, 1)))
    return any(node.size != 'tensor' and any(argument.size == 'tensor' for argument in node.args) for node in graph.nodes)
