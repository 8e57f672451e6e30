"""From a rule to Triton kernels, one per pass, each for a whole list of tensors.

A program of a pass over elements updates one item, a piece of a tensor; one of a pass over scalars updates the numbers of
one tensor. Addresses come from a table, so a launch takes any number of tensors. Every operation is rounded on its own, as
on the CPU: no multiplication is contracted with an addition, divisions and roots are correctly rounded. Sums are
accumulated lane by lane and then in a tree, whose order depends on the sizes alone: each run gives the same bits.

Nothing here needs a GPU or PyTorch: `source_of` prints, `kernel` imports what was printed.
"""
import functools
import pathlib
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple, Type

from ..rules.base import KernelKey, Rule
from ..rules.graph import WEIGHT, Node
from . import noise
from .plan import HALF, NOISE, LoopPass, Plan, ScalarPass, Storage, plan, variable, with_coefficients
from .source import load

__all__ = ['BLOCK', 'ITEM', 'Kernel', 'Storage', 'kernel', 'source_of']

ITEM = 8192     # elements that one program updates
BLOCK = 1024    # elements that it updates at a time


class Kernel(NamedTuple):
    """Compiled passes.

    ``passes``  a function of Triton for each, and whether it has a program per tensor (else one per item)
    """

    passes: Tuple[Tuple[Any, bool], ...]
    roles: Tuple[str, ...]
    coefficients: Tuple[str, ...]
    precision: str
    sums: int
    kept: int


@functools.lru_cache(maxsize=None)
def kernel(rule: Type[Rule], static: KernelKey, coefficients: Tuple[str, ...], storage: Storage) -> Kernel:
    """Print ``rule`` for tensors stored as ``storage``; Triton compiles it at the first launch."""
    planned = plan(rule, static, coefficients, storage)
    module = load(f'{rule.name}_triton', _Printer(planned).text, pathlib.Path(__file__))
    passes = tuple((getattr(module, f'pass_{k}'), isinstance(one, ScalarPass)) for k, one in enumerate(planned.passes))
    return Kernel(passes, planned.roles, coefficients, storage.precision, planned.sums, len(planned.kept))


def source_of(rule: Type[Rule], static: KernelKey, coefficients: Tuple[str, ...], storage: Storage) -> str:
    """The generated source, for reading."""
    return _Printer(plan(rule, static, coefficients, storage)).text


_HEAD = """\
import triton
import triton.language as tl
"""

_PASS = """

@triton.jit
def pass_{k}(addresses, items, first_item, partial, kept, table, rows, n, n_items, BLOCK: tl.constexpr):
"""

_FORMATS = {
    'constant': 'tl.full((), {name!r}, {T})', 'neg': '-{0}', 'exp': 'tl.exp({0})', 'abs': 'tl.abs({0})',
    'half': '{0}.to(tl.float16).to({T})', 'bfloat': '{0}.to(tl.bfloat16).to({T})',
    # NaN passes through minimum and maximum, as in MXNet
    'minimum': 'tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})', 'maximum': 'tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})',
    'sign': '({0} > 0).to({T}) - ({0} < 0).to({T})', 'where': 'tl.where({0}, {1}, {2})',
}
_NORMALS = """

@triton.jit
def normals(key, stream, update, draw, element):
    key, stream, update = key.to(tl.uint64), stream.to(tl.uint64), update.to(tl.uint64)
    draw, element = tl.full((), draw, tl.uint64), element.to(tl.uint64)
    {lines}
    return {result}
"""
_NOISE = {'assign': '{name} = {value}', 'number': 'tl.full((), {0!r}, tl.{T})', 'astype': '{0}.to(tl.{T})',
          'view': '{0}.to(tl.{T}, bitcast=True)', 'where': 'tl.where({0}, {1}, {2})', 'sqrt float32': 'tl.sqrt_rn({0})',
          'sqrt float64': 'tl.sqrt({0})', 'log': 'tl.log({0})', 'cos': 'tl.cos({0})', 'sin': 'tl.sin({0})'}
# in single precision Triton's own are approximations
_ROUNDED: Dict[str, Dict[str, str]] = {
    'float32': {'sqrt': 'tl.sqrt_rn({0})', '/': 'tl.div_rn({0}, {1})'},
    'float64': {'sqrt': 'tl.sqrt({0})', '/': '{0} / {1}'},
}


class _Printer:
    """A plan as source for Triton."""

    def __init__(self, plan: Plan):
        self.plan, self.storage = plan, plan.storage
        self.type = f'tl.{plan.storage.precision}'
        self.formats = {**_FORMATS, **_ROUNDED[plan.storage.precision]}

    @property
    def text(self) -> str:
        parts = [_HEAD]
        if NOISE[0] in self.plan.roles:
            lines, result = noise.normals(self.storage.precision, _NOISE)
            parts.append(_NORMALS.format(lines='\n    '.join(lines), result=result))
        for k, one in enumerate(self.plan.passes):
            body = self._scalar_pass(one) if isinstance(one, ScalarPass) else self._loop_pass(one)
            parts += [_PASS.format(k=k), '\n'.join('    ' + line for line in body), '\n']
        return ''.join(parts)

    def _scalar_pass(self, one: ScalarPass) -> List[str]:
        body = ['i = tl.program_id(0)', *self._coefficients(one.body)]
        body += [f'{variable(node)} = tl.load({self._kept(node)})' for node in one.loads]
        if one.sums:
            body += ['begin, end = tl.load(first_item + i), tl.load(first_item + i + 1)',
                     *[f'total{k} = tl.zeros((BLOCK,), tl.float64)' for k in range(len(one.sums))],
                     'for item in range(begin, end, BLOCK):',
                     '    j = item + tl.arange(0, BLOCK)',
                     *[f'    total{k} += tl.load(partial + j * {self.plan.sums} + {k}, mask=j < end, other=0.0)'
                       for k in range(len(one.sums))]]
        for node in one.body:
            if node.op == 'sum':
                place = [other is node for other in one.sums].index(True)
                value = f'tl.sum(total{place}, axis=0).to({self.type})'
            elif node.op == 'slot':
                value = f'tl.load({self._pointer(node.name)})'
            else:
                value = self._expression(node)
            body.append(f'{variable(node)} = {value}')
            if node in self.plan.kept:
                body.append(f'tl.store({self._kept(node)}, {variable(node)})')
        return body + [f'tl.store({self._pointer(slot)}, {variable(node)})' for slot, node in one.stores.items()]

    def _loop_pass(self, one: LoopPass) -> List[str]:
        return ['item = tl.program_id(0)',
                'i, start, size = tl.load(items + item), tl.load(items + n_items + item), tl.load(items + 2 * n_items + item)',
                *[f'{role}_at = {self._pointer(role)} + start' for role in one.roles],
                *self._coefficients(one.computed),
                *[f'{variable(node)} = tl.load({self._kept(node)})' for node in one.scalars],
                *[f'total{k} = tl.zeros((BLOCK,), {self.type})' for k in range(len(one.sums))],
                *([f'{role} = tl.load(addresses + {self.plan.roles.index(role)} * n + i)' for role in NOISE] if one.draws else []),
                'for done in range(0, size, BLOCK):',
                '    j = done + tl.arange(0, BLOCK)',
                '    inside = j < size',
                *['    ' + line for line in self._elements(one)],
                *[f'tl.store(partial + item * {self.plan.sums} + {k}, tl.sum(total{k}, axis=0).to(tl.float64))'
                  for k in range(len(one.sums))]]

    def _elements(self, one: LoopPass) -> List[str]:
        """The computation for a block of elements."""
        body = []
        for node in one.body:
            value = (f'tl.load({one.loads[node]}_at + j, mask=inside, other=0.0).to({self.type})' if node in one.loads
                     else f'normals({", ".join(NOISE)}, {node.name}, start + j)' if node.op == 'noise' else self._expression(node))
            body.append(f'{variable(node)} = {value}')
        body += [f'total{k} += tl.where(inside, {variable(node.args[0])}, 0.0)' for k, node in enumerate(one.sums)]
        for slot, node in one.stores.items():
            for role in [slot, HALF] if slot == WEIGHT and self.storage.master else [slot]:
                body.append(f'tl.store({role}_at + j, {variable(node)}.to(tl.{self.storage.element(role)}), mask=inside)')
        return body

    def _pointer(self, role: str) -> str:
        return (f'tl.load(addresses + {self.plan.roles.index(role)} * n + i)'
                f'.to(tl.pointer_type(tl.{self.storage.element(role)}))')

    def _kept(self, node: Node) -> str:
        return f'kept + i * {max(len(self.plan.kept), 1)} + {self.plan.kept[node]}'

    def _coefficients(self, nodes: Sequence[Node]) -> List[str]:
        """Load the coefficients that ``nodes`` use, from the row of tensor i."""
        names = self.plan.coefficients
        lines = [f'row = table + tl.load(rows + i) * {len(names)}']
        for node in with_coefficients(nodes):
            value = f'tl.load(row + {names.index(node.name)})' if node.op == 'coefficient' else self._expression(node)
            lines.append(f'{variable(node)} = {value}')
        return lines

    def _expression(self, node: Node) -> str:
        names = [variable(a) for a in node.args]
        if node.op in self.formats:
            return self.formats[node.op].format(*names, T=self.type, name=node.name)
        return f'{names[0]} {node.op} {names[1]}'
