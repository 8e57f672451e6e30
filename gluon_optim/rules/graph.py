"""From a rule to loops: trace `Rule.apply` on symbols, then cut the graph at its sums.

A sum over the tensor is the only barrier: everything before it is one pass over the elements, everything after it the
next. Between two passes lie a few numbers per tensor (running norms, trust ratios).
"""
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Set, Tuple, Type

from .base import KernelKey, Rule

__all__ = ['Graph', 'Node', 'Stage', 'schedule', 'trace']

WEIGHT = 'weight'


class Node:
    """One value of the computation. ``size`` is 'coefficient' (the same for many tensors), 'scalar' (one per tensor)
    or 'tensor' (one per element); ``level`` counts the sums that must be complete before it can be computed."""

    __slots__ = ('args', 'graph', 'index', 'level', 'name', 'op', 'size')

    def __init__(self, graph: 'Graph', op: str, args: Tuple['Node', ...], name: Any, size: str):
        self.graph, self.op, self.args, self.name, self.size = graph, op, args, name, size
        self.index = len(graph.nodes)
        self.level: int = max((a.level for a in args), default=0) + (op == 'sum')

    def __add__(self, other): return self.graph.apply('+', self, other)
    def __radd__(self, other): return self.graph.apply('+', other, self)
    def __sub__(self, other): return self.graph.apply('-', self, other)
    def __rsub__(self, other): return self.graph.apply('-', other, self)
    def __mul__(self, other): return self.graph.apply('*', self, other)
    def __rmul__(self, other): return self.graph.apply('*', other, self)
    def __truediv__(self, other): return self.graph.apply('/', self, other)
    def __rtruediv__(self, other): return self.graph.apply('/', other, self)
    def __neg__(self): return self.graph.apply('neg', self)
    def __lt__(self, other): return self.graph.apply('<', self, other)
    def __le__(self, other): return self.graph.apply('<=', self, other)
    def __gt__(self, other): return self.graph.apply('>', self, other)
    def __ge__(self, other): return self.graph.apply('>=', self, other)
    def __eq__(self, other): return self.graph.apply('==', self, other)
    def __ne__(self, other): return self.graph.apply('!=', self, other)

    __hash__ = object.__hash__

    def __bool__(self):
        raise TypeError('A rule may not branch on the value of an array or a coefficient. Use xp.where(condition, x, y).')


class Graph:
    """The traced computation of one rule; equal subexpressions are one node."""

    def __init__(self) -> None:
        self.nodes: List[Node] = []
        self.outputs: Dict[str, Node] = {}     # new weight and slots
        self._known: Dict[Tuple, Node] = {}

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
            self._known[key] = Node(self, op, args, name, size)
            self.nodes.append(self._known[key])
        return self._known[key]

    # the array namespace of rules
    def sum(self, x: Node) -> Node:
        if not isinstance(x, Node) or x.size != 'tensor':
            raise TypeError('xp.sum sums a tensor with the shape of the weight. Received: a scalar.')
        return self._node('sum', (x,), None, 'scalar')

    def sqrt(self, x): return self.apply('sqrt', x)
    def exp(self, x): return self.apply('exp', x)
    def abs(self, x): return self.apply('abs', x)
    def sign(self, x): return self.apply('sign', x)
    def half(self, x): return self.apply('half', x)  # rounded to float16; for rules on float32 masters
    def minimum(self, x, y): return self.apply('minimum', x, y)
    def maximum(self, x, y): return self.apply('maximum', x, y)
    def where(self, condition, x, y): return self.apply('where', condition, x, y)



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


@dataclass
class Stage:
    """One pass over the elements, together with the scalars computed before it.

    ``scalars``  nodes of size 'scalar' in the order of computation
    ``stores``   slot -> node, written in this pass ('tensor' size) or before it ('scalar' size)
    ``loads``    node -> slot, values that an earlier pass has computed and stored
    ``body``     nodes of size 'tensor', loads included, in the order of computation
    ``sums``     sum nodes that this pass accumulates
    """

    scalars: List[Node] = field(default_factory=list)
    scalar_stores: Dict[str, Node] = field(default_factory=dict)
    loads: Dict[Node, str] = field(default_factory=dict)
    body: List[Node] = field(default_factory=list)
    stores: Dict[str, Node] = field(default_factory=dict)
    sums: List[Node] = field(default_factory=list)


def schedule(graph: Graph) -> List[Stage]:
    """Cut ``graph`` into stages.

    A slot is stored in the first pass that knows its new value, unless a later pass still needs the old one; passes
    after the store read the new value back instead of computing it again.
    """
    tensors = {name: node for name, node in graph.outputs.items() if node.size == 'tensor'}
    sums = [node for node in _order(set(graph.outputs.values()), stop=lambda _: False) if node.op == 'sum']
    last = max(node.level for node in graph.outputs.values())
    stored_in = {name: node.level for name, node in tensors.items()}
    while True:
        stages = [_loop(k, tensors, sums, stored_in) for k in range(last + 1)]
        late = {leaf.name: k for k, stage in enumerate(stages) for leaf in stage.body
                if leaf.op == 'slot' and leaf.name in stored_in and stored_in[leaf.name] < k
                and leaf is not tensors[leaf.name]}
        if not late:
            break
        stored_in.update(late)

    # scalar slots are written last, once nothing needs their old values
    stages[-1].scalar_stores = {name: node for name, node in graph.outputs.items() if node.size == 'scalar'}
    _place_scalars(stages)
    return stages


def _place_scalars(stages: List[Stage]) -> None:
    """Compute each scalar right before the first pass that needs it."""
    place: Dict[Node, int] = {}

    def need(nodes: Iterable[Node], stage: int) -> None:
        for node in nodes:
            if node.size == 'scalar':
                place[node] = min(stage, place.get(node, stage))

    for k, stage in enumerate(stages):
        need((a for node in stage.body if node not in stage.loads for a in node.args), k)
        need(stage.scalar_stores.values(), k)
    roots = set(place)
    for node in reversed(_order(roots, stop=lambda node: node.size != 'scalar' or node.op == 'sum')):
        if node.op == 'sum':
            stages[node.level].scalars.insert(0, node)  # immediately: the next loop overwrites the partial sums
        elif node.size == 'scalar':
            stages[place[node]].scalars.insert(0, node)
            need(node.args, place[node])


def _loop(k: int, tensors: Dict[str, Node], sums: List[Node], stored_in: Dict[str, int]) -> Stage:
    stage = Stage(sums=[node for node in sums if node.args[0].level == k],
                  stores={name: node for name, node in tensors.items() if stored_in[name] == k})
    stage.loads = {tensors[name]: name for name, stored in stored_in.items() if stored < k}
    roots = {node.args[0] for node in stage.sums} | set(stage.stores.values())
    stage.body = [node for node in _order(roots, stop=lambda node: node in stage.loads or node.size != 'tensor')
                  if node.size == 'tensor']
    return stage


def _order(roots: Set[Node], stop: Any) -> List[Node]:
    """``roots`` and what they need, arguments first; a node for which ``stop`` is true is kept, but its arguments are not."""
    seen: Set[Node] = set()
    pending = list(roots)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            if not stop(node):
                pending.extend(node.args)
    return sorted(seen, key=lambda node: node.index)

