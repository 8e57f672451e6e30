"""From a rule's graph to passes over lists of tensors, in a language-independent form shared by all back ends.

A sum over the tensor is the only barrier: everything before it is one pass over the elements, everything after it the
next. Between two passes lie a few numbers per tensor (running norms, trust ratios), which are kept in a table. A back end
prints a `Plan` in its language, and launches what it printed.
"""
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, NamedTuple, Sequence, Set, Tuple, Type, Union

from ..rules.base import KernelKey, Rule
from ..rules.compensated import COMPENSATION
from ..rules.graph import WEIGHT, Graph, Node, trace
from ..schema import compute_type

__all__ = ['BYTES', 'GRADIENT', 'HALF', 'NOISE', 'LoopPass', 'Plan', 'ScalarPass', 'Stage', 'Storage', 'cut', 'moved', 'plan',
           'variable', 'with_coefficients']

GRADIENT, HALF = 'gradient', 'half'
NOISE = 'noise_key', 'noise_stream', 'noise_update'   # roles of a rule that draws: numbers of a tensor in the place of addresses
BYTES = {'float16': 2, 'bfloat16': 2, 'float32': 4, 'float64': 8}


class Storage(NamedTuple):
    """How weights and gradients lie in memory: 'float16', 'bfloat16', 'float32' or 'float64', whether weights of half
    precision have a float32 master, and whether slots are of half precision too. Computation, and slots otherwise, are
    float64 for float64 weights, else float32. The compensation, a slot of rules that keep the rounding error of half-precision
    weights instead of a master (`gluon_optim.rules.compensated` says how), is of the weights' type."""

    dtype: str
    master: bool = False
    half_slots: bool = False

    @property
    def precision(self) -> str:
        return compute_type(self.dtype)

    def element(self, role: str) -> str:
        """The type of the elements of the tensors of that role."""
        halves = (GRADIENT, HALF, COMPENSATION.name)
        if role in halves or (role == WEIGHT and not self.master) or (role != WEIGHT and self.half_slots):
            return self.dtype
        return self.precision

    def itemsize(self, role: str) -> int:
        """Bytes of an element."""
        return BYTES[self.element(role)]


class ScalarPass(NamedTuple):
    """Numbers per tensor, computed between two loops.

    ``sums``    those accumulated by the preceding loop, in the same order
    ``loads``   nodes that an earlier pass has kept
    ``body``    nodes in the order of computation
    ``stores``  scalar slot -> node
    """

    sums: Sequence[Node]
    loads: Sequence[Node]
    body: Sequence[Node]
    stores: Dict[str, Node]


class LoopPass(NamedTuple):
    """One pass over the elements.

    ``roles``    the tensors that it reads or writes
    ``scalars``  kept numbers that it needs
    ``loads``    node -> role, values read from memory: leaves, and what an earlier pass has stored
    ``body``     nodes in the order of computation, loads included
    ``sums``     sum nodes that it accumulates
    ``stores``   slot -> node
    """

    roles: Sequence[str]
    scalars: Sequence[Node]
    loads: Dict[Node, str]
    body: Sequence[Node]
    sums: Sequence[Node]
    stores: Dict[str, Node]

    @property
    def computed(self) -> List[Node]:
        """Nodes that are not read from memory."""
        return [node for node in self.body if node not in self.loads]

    @property
    def draws(self) -> List[Node]:
        """Samples of the standard normal distribution (`rules.noise`), by the number of the draw."""
        return [node for node in self.body if node.op == 'noise']


Pass = Union[ScalarPass, LoopPass]


class Plan(NamedTuple):
    """The update of a list of tensors.

    ``roles``         what a tensor is to the update: weight (its master, where there is one, and then half, the
                      weight of half precision that follows it), gradient, the slots, and where it draws noise, `NOISE`
    ``coefficients``  names, in the order of a row of the table that the kernel gets
    ``passes``        in the order of execution
    ``kept``          node -> its column in the table of numbers that are used outside the pass that computes them
    ``sums``          the largest number of sums that a loop accumulates
    """

    storage: Storage
    roles: Tuple[str, ...]
    coefficients: Tuple[str, ...]
    passes: Tuple[Pass, ...]
    kept: Dict[Node, int]
    sums: int


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


def cut(graph: Graph) -> List[Stage]:
    """Cut ``graph`` at its sums into stages.

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


def plan(rule: Type[Rule], static: KernelKey, coefficients: Tuple[str, ...], storage: Storage) -> Plan:
    """Trace ``rule`` and divide it into passes for tensors that are stored as ``storage``."""
    graph = trace(rule, static, coefficients)
    stages = cut(graph)
    roles = (WEIGHT, *([HALF] if storage.master else []), GRADIENT, *(s.name for s in static.slots),
             *(NOISE if any(node.op == 'noise' for node in graph.nodes) else ()))
    passes: List[Pass] = []
    for k, stage in enumerate(stages):
        if stage.scalars:
            passes.append(ScalarPass(stages[k - 1].sums if k else [], _missing(stage.scalars), stage.scalars, stage.scalar_stores))
        if stage.sums or stage.stores:
            passes.append(_loop_pass(stage, roles, storage))
    return Plan(storage, roles, coefficients, tuple(passes), _kept(stages), max(len(stage.sums) for stage in stages))


def moved(planned: Plan) -> Tuple[int, List[int]]:
    """Bytes per element that must be read and written: what each pass is the first to read, and everything that is written; and,
    for each pass, what an earlier one has read too, and the cache may still have.

    >>> from gluon_optim import rules
    >>> rule = rules.get('lamb')
    >>> h = rule.hyperparameters()
    >>> names = tuple(rule.all_coefficients(rules.base.scalars, h, 1))
    >>> moved(plan(rule, rule.static(h), names, Storage('float32')))
    (28, [0, 12])
    """
    once, again = 0, []
    read: Set[str] = set()

    def size(roles: Iterable[str]) -> int:
        return sum(map(planned.storage.itemsize, roles))

    for one in planned.passes:
        if isinstance(one, LoopPass):
            roles = set(one.loads.values())
            written = [role for role in one.roles if role in one.stores or (role == HALF and WEIGHT in one.stores)]
            once += size(roles - read) + size(written)
            again.append(size(roles & read))
            read |= roles
    return once, again


def _loop_pass(stage: 'Stage', roles: Sequence[str], storage: Storage) -> LoopPass:
    loads = {node: stage.loads.get(node, node.name) for node in stage.body
             if node in stage.loads or (not node.args and node.op != 'noise')}
    used = {*loads.values(), *stage.stores}
    if WEIGHT in stage.stores and storage.master:
        used.add(HALF)
    scalars = {a for node in stage.body if node not in stage.loads for a in node.args if a.size == 'scalar'}
    return LoopPass([role for role in roles if role in used], _sorted(scalars), loads, stage.body, stage.sums, stage.stores)


def _missing(scalars: Sequence[Node]) -> List[Node]:
    """Scalars that ``scalars`` need and an earlier pass has computed."""
    own = set(scalars)
    return _sorted({a for node in scalars if node.op != 'sum' for a in node.args if a.size == 'scalar' and a not in own})


def _kept(stages: Sequence[Stage]) -> Dict[Node, int]:
    """Scalars that are used outside the pass that computes them, numbered."""
    kept: Set[Node] = set()
    for stage in stages:
        own = set(stage.scalars)
        kept |= {a for node in stage.body if node not in stage.loads for a in node.args if a.size == 'scalar'}
        kept |= {a for node in stage.scalars if node.op != 'sum' for a in node.args if a.size == 'scalar' and a not in own}
        kept |= {node for node in stage.scalar_stores.values() if node not in own}
    return {node: k for k, node in enumerate(_sorted(kept))}


def with_coefficients(nodes: Sequence[Node]) -> List[Node]:
    """Coefficients and constants that ``nodes`` use, each negated one after the one it negates."""
    found: Set[Node] = set()
    pending = [a for node in nodes for a in node.args if a.size == 'coefficient']
    while pending:
        node = pending.pop()
        found.add(node)
        pending.extend(node.args)
    return _sorted(found)


def _sorted(nodes: Set[Node]) -> List[Node]:
    return sorted(nodes, key=lambda node: node.index)


def variable(node: Node) -> str:
    """A readable name for a node in printed source: the leaf's own, or a number."""
    return f'{node.op}_{node.name}' if node.op in ('coefficient', 'slot', 'gradient') else f'x{node.index}'
