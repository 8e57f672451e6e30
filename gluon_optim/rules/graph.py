"""A rule as a graph: `trace` runs `Rule.apply` once on symbols."""
from typing import Any, Dict, List, Tuple, Type

from .base import KernelKey, Rule

__all__ = ['WEIGHT', 'Graph', 'Node', 'trace']

WEIGHT = 'weight'


class Node:
    """One value of the computation. ``size`` is 'coefficient' (the same for many tensors), 'scalar' (one per tensor)
    or 'tensor' (one per element); ``level`` counts the sums that must be complete before it can be computed."""

    __slots__ = ('args', 'graph', 'index', 'level', 'name', 'op', 'size')

    def __init__(self, graph: 'Graph', op: str, args: Tuple['Node', ...], name: Any, size: str):
        self.graph, self.op, self.args, self.name, self.size = graph, op, args, name, size
        self.index = len(graph.nodes)
        self.level: int = max((a.level for a in args), default=0) + (op == 'sum')

    def __add__(self, other: Any) -> 'Node': return self.graph.apply('+', self, other)
    def __radd__(self, other: Any) -> 'Node': return self.graph.apply('+', other, self)
    def __sub__(self, other: Any) -> 'Node': return self.graph.apply('-', self, other)
    def __rsub__(self, other: Any) -> 'Node': return self.graph.apply('-', other, self)
    def __mul__(self, other: Any) -> 'Node': return self.graph.apply('*', self, other)
    def __rmul__(self, other: Any) -> 'Node': return self.graph.apply('*', other, self)
    def __truediv__(self, other: Any) -> 'Node': return self.graph.apply('/', self, other)
    def __rtruediv__(self, other: Any) -> 'Node': return self.graph.apply('/', other, self)
    def __neg__(self) -> 'Node': return self.graph.apply('neg', self)
    def __lt__(self, other: Any) -> 'Node': return self.graph.apply('<', self, other)
    def __le__(self, other: Any) -> 'Node': return self.graph.apply('<=', self, other)
    def __gt__(self, other: Any) -> 'Node': return self.graph.apply('>', self, other)
    def __ge__(self, other: Any) -> 'Node': return self.graph.apply('>=', self, other)
    def __eq__(self, other): return self.graph.apply('==', self, other)
    def __ne__(self, other): return self.graph.apply('!=', self, other)

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise TypeError('A rule may not branch on the value of an array or a coefficient. Use xp.where(condition, x, y).')


class Graph:
    """The traced computation of one rule; equal subexpressions are one node, of the class ``kind``."""

    kind: Type[Node] = Node

    def __init__(self) -> None:
        self.nodes: List[Node] = []
        self.outputs: Dict[str, Node] = {}     # new weight and slots
        self._known: Dict[Tuple[Any, ...], Node] = {}

    def leaf(self, op: str, name: Any, size: str) -> Node:
        return self._node(op, (), name, size)

    def apply(self, op: str, *operands: Any) -> Node:
        args = tuple(x if isinstance(x, Node) else self.leaf('constant', float(x), 'coefficient') for x in operands)
        sizes = {a.size for a in args}
        if sizes == {'coefficient'} and op != 'neg':
            # other runtimes would compute this in float64 and round once, the kernel in the weights' precision
            raise TypeError(f'A rule combined two coefficients by {op!r} in `step`. Combine them in `coefficients`.')
        return self._node(op, args, None, 'tensor' if 'tensor' in sizes else 'scalar' if 'scalar' in sizes else 'coefficient')

    def _node(self, op: str, args: Tuple[Node, ...], name: Any, size: str) -> Node:
        key = (op, tuple(a.index for a in args), name, size)
        if key not in self._known:
            self._known[key] = self.kind(self, op, args, name, size)
            self.nodes.append(self._known[key])
        return self._known[key]

    # the array namespace of rules
    def sum(self, x: Node) -> Node:
        if not isinstance(x, Node) or x.size != 'tensor':
            raise TypeError('xp.sum sums a tensor with the shape of the weight. Received: a scalar.')
        return self._node('sum', (x,), None, 'scalar')

    def standard_normal(self, like: Node) -> Node:
        """The next samples of `rules.noise`, one for each element; their name is the number of the draw."""
        if not isinstance(like, Node) or like.size != 'tensor':
            raise TypeError('xp.standard_normal draws for each element of a tensor of the shape of the weight. Received: a scalar.')
        return self._node('noise', (), sum(node.op == 'noise' for node in self.nodes), 'tensor')

    def sqrt(self, x: Any) -> Node: return self.apply('sqrt', x)
    def exp(self, x: Any) -> Node: return self.apply('exp', x)
    def abs(self, x: Any) -> Node: return self.apply('abs', x)
    def sign(self, x: Any) -> Node: return self.apply('sign', x)
    def half(self, x: Any) -> Node: return self.apply('half', x)  # rounded to float16; for rules on float32 masters
    def bfloat(self, x: Any) -> Node: return self.apply('bfloat', x)  # rounded to bfloat16
    def minimum(self, x: Any, y: Any) -> Node: return self.apply('minimum', x, y)
    def maximum(self, x: Any, y: Any) -> Node: return self.apply('maximum', x, y)
    def where(self, condition: Any, x: Any, y: Any) -> Node: return self.apply('where', condition, x, y)


def trace(rule: Type[Rule], static: KernelKey, coefficients: Tuple[str, ...]) -> Graph:
    """Run ``rule.apply`` once on symbols.

    >>> from gluon_optim import rules
    >>> rule = rules.get('sgd_torch')
    >>> h = rule.hyperparameters(momentum=0.9)
    >>> names = tuple(rule.all_coefficients(rules.base.scalars, h, 1))
    >>> sorted(trace(rule, rule.static(h), names).outputs)
    ['momentum_buffer', 'weight']
    """
    graph = Graph()
    c = {name: graph.leaf('coefficient', name, 'coefficient') for name in coefficients}
    slots = {s.name: graph.leaf('slot', s.name, 'tensor' if s.like == 'weight' else 'scalar') for s in static.slots}
    weight, gradient = graph.leaf('slot', WEIGHT, 'tensor'), graph.leaf('gradient', 'gradient', 'tensor')
    new_weight, new_slots = rule.apply(graph, static, c, weight, gradient, slots)
    if set(new_slots) != set(slots):
        raise ValueError(f'{rule.name}: `step` must return every slot that `slots` declares. '
                         f'Declared: {sorted(slots)}. Returned: {sorted(new_slots)}.')
    graph.outputs = {**new_slots, WEIGHT: new_weight}
    for name, leaf in {**slots, WEIGHT: weight}.items():
        new = graph.outputs[name]
        if not isinstance(new, Node) or new.size != leaf.size:
            raise TypeError(f'{rule.name}: `step` must return {name} as {_KINDS[leaf.size]}. '
                            f'Received: {_KINDS[new.size] if isinstance(new, Node) else repr(new)}.')
    return graph


_KINDS = {'tensor': 'a tensor of the shape of the weight', 'scalar': 'one number per parameter', 'coefficient': 'a coefficient'}
