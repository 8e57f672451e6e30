"""From a rule to one compiled kernel that updates a whole list of tensors.

`kernel` plans the update, prints the plan as Python source and lets numba compile it; the source and what numba made
of it stay in the user's cache folder, so the next process compiles nothing. `Batch` prepares a list of tensors for it.
"""
import functools
import pathlib
from typing import Any, List, NamedTuple, Sequence, Tuple, Type

import numpy

from ..rules.base import KernelKey, Rule
from ..rules.graph import WEIGHT, Node
from . import numba_runtime
from .plan import HALF, NOISE, LoopPass, Plan, ScalarPass, Storage, plan, variable, with_coefficients
from .source import load

__all__ = ['Batch', 'Kernel', 'Storage', 'kernel', 'source_of']

BLOCK = numba_runtime.BLOCK     # elements per turn of a loop
AHEAD = 512     # elements between the block being computed and the block being prefetched
GROUP = 2 ** 19  # elements per thread that go through all passes before the next group: their gradients are still cached


class Kernel(NamedTuple):
    """A compiled kernel. ``roles`` names the rows of a batch's addresses: weight (its master, where there is one, and then
    half, the weight of half precision that follows it), gradient, and the slots."""

    address: int
    passes: int
    roles: Tuple[str, ...]
    coefficients: Tuple[str, ...]
    precision: str
    sums: int
    kept: int
    owner: Any  # keeps the code alive


@functools.lru_cache(maxsize=None)
def kernel(rule: Type[Rule], static: KernelKey, coefficients: Tuple[str, ...], storage: Storage) -> Kernel:
    """Compile ``rule`` for tensors stored as ``storage``; a second call returns the same kernel."""
    planned = plan(rule, static, coefficients, storage)
    module = load(rule.name, _Printer(planned).text, pathlib.Path(numba_runtime.__file__))
    return Kernel(module.kernel.address, len(planned.passes), planned.roles, coefficients, storage.precision,
                  planned.sums, len(planned.kept), module)


def source_of(rule: Type[Rule], static: KernelKey, coefficients: Tuple[str, ...], storage: Storage) -> str:
    """The generated Python source, for reading."""
    return _Printer(plan(rule, static, coefficients, storage)).text


class Batch:
    """A list of tensors, ready to be updated by ``kernel``.

    Fill ``addresses`` (one row per role, one column per tensor), then `run`.

    Parameters
    ----------
    kernel : Kernel
    sizes : sequence of int
        Number of elements of each tensor.
    """

    def __init__(self, kernel: Kernel, sizes: Sequence[int]):
        self.kernel = kernel
        self.elements, self._sizes = int(sum(sizes)), sizes
        self.addresses = numpy.zeros((len(kernel.roles), len(sizes)), numpy.int64)
        pieces = [(i, start, min(numba_runtime.ITEM, size - start))
                  for i, size in enumerate(sizes) for start in range(0, size, numba_runtime.ITEM)]
        self._items = numpy.array(pieces, numpy.int64).reshape(-1, 3).T.copy()
        self._first_item = numpy.searchsorted(self._items[0], numpy.arange(len(sizes) + 1)).astype(numpy.int64)
        self._partial = numpy.empty((len(pieces), max(kernel.sums, 1)))
        self._kept = numpy.empty((len(sizes), max(kernel.kept, 1)), kernel.precision)
        self._table = numpy.empty((1, len(kernel.coefficients)), kernel.precision)
        self._rows = numpy.zeros(len(sizes), numpy.int64)
        self._lanes = 0
        self.threads = 0   # at most so many, if not 0

    def run(self, coefficients: Any, rows: Sequence[int]) -> None:
        """Update all tensors; tensor i uses row ``rows[i]`` of ``coefficients``, rows of numbers in the kernel's order."""
        lanes = min(numba_runtime.lane_count(self.elements), self.threads or 2 ** 30)
        if len(coefficients) > len(self._table):
            self._table, self._lanes = numpy.empty((len(coefficients), len(self.kernel.coefficients)), self.kernel.precision), 0
        if lanes != self._lanes:
            self._assign(lanes)
        self._table[:len(coefficients)] = coefficients  # float64 up to here: rounded once
        self._rows[:] = rows
        numba_runtime.launch(self.kernel.address, self.kernel.passes, lanes, *self._launched)

    def _assign(self, lanes: int) -> None:
        """Divide items and tensors among ``lanes`` threads."""
        self._lanes = lanes
        groups = self._groups(lanes)
        costs = self._items[2] + 256
        self._item_bounds = numpy.array([a + numba_runtime.split(costs[a:b], lanes) for a, b in self._first_item[groups]])
        self._tensor_bounds = numpy.array([a + numba_runtime.split(numpy.ones(b - a), lanes) for a, b in groups])
        arrays = (self._items, self._first_item, self._partial, self._kept, self.addresses)
        # one row per group, as _PROLOGUE unpacks it
        self._words = numpy.array([[items.ctypes.data, tensors.ctypes.data, *[a.ctypes.data for a in arrays],
                                    self._items.shape[1], self.addresses.shape[1], self._table.ctypes.data, self._rows.ctypes.data]
                                   for items, tensors in zip(self._item_bounds, self._tensor_bounds)], numpy.int64)
        self._launched = len(groups), self._words.ctypes.data, self._words.strides[0]

    def _groups(self, lanes: int) -> numpy.ndarray:
        """First and last + 1 of consecutive tensors of about GROUP elements per lane; all tensors if a single pass is enough."""
        ends = numpy.cumsum(self._sizes) if self.kernel.passes > 1 else numpy.zeros(len(self._sizes))
        first = numpy.flatnonzero(numpy.diff(ends // (GROUP * lanes), prepend=-1))
        return numpy.stack([first, [*first[1:], len(ends)]], axis=1)


_PROLOGUE = """\
from math import exp, sqrt

from numba import cfunc, float32, float64, int64

from gluon_optim.lowering.numba_runtime import (add_f32, add_f64, bfloat_to_float, f32_at, f64_at, float_to_bfloat, float_to_half,
                                                half_to_float, i64_at, no_sums, normals_f32, normals_f64, prefetch_2, prefetch_4,
                                                prefetch_8, prefetch_once_2, prefetch_once_4, prefetch_once_8, sum_of,
                                                terms_f32, terms_f64, u16_at)


@cfunc('int64(int64, int64, int64)', error_model='numpy', cache={cache})
def kernel(stage, lane, address):
    words = i64_at(address, 11)
    item_bounds, tensor_bounds = i64_at(words[0] + 8 * lane, 2), i64_at(words[1] + 8 * lane, 2)
    n_items, n = words[7], words[8]
    items, first_item = i64_at(words[2], 3 * n_items), i64_at(words[3], n + 1)
    partial, kept = f64_at(words[4], n_items * {sums}), {at}(words[5], n * {kept})
    addresses = i64_at(words[6], n * {roles})
    rows = i64_at(words[10], n)
"""

_FORMATS = {
    'constant': '{T}({name!r})', 'neg': '-{0}', 'sqrt': 'sqrt({0})', 'exp': 'exp({0})', 'abs': 'abs({0})',
    'half': 'half_to_float(float_to_half({0}))', 'bfloat': 'bfloat_to_float(float_to_bfloat({0}))',
    # NaN passes through minimum and maximum, as in MXNet
    'minimum': '({0} if ({0} < {1}) | ({0} != {0}) else {1})', 'maximum': '({0} if ({0} > {1}) | ({0} != {0}) else {1})',
    'sign': '{T}({0} > {T}(0)) - {T}({0} < {T}(0))', 'where': '({1} if {0} else {2})',
}


_ARRAYS = {'float16': 'u16_at', 'bfloat16': 'u16_at', 'float32': 'f32_at', 'float64': 'f64_at'}
_LOADS = {'float16': 'half_to_float({0})', 'bfloat16': 'bfloat_to_float({0})'}
_STORES = {'float16': 'float_to_half({0})', 'bfloat16': 'float_to_bfloat({0})'}


class _Printer:
    """A plan as Python source for numba."""

    def __init__(self, plan: Plan):
        self.plan, self.storage = plan, plan.storage
        self.at = _ARRAYS[plan.storage.precision]
        self.itemsize = 8 if plan.storage.precision == 'float64' else 4  # of a coefficient
        self.columns = max(len(plan.kept), 1)

    @property
    def text(self) -> str:
        lines = [_PROLOGUE.format(cache='{cache}', at=self.at, sums=max(self.plan.sums, 1), kept=self.columns,
                                  roles=len(self.plan.roles))]
        for k, one in enumerate(self.plan.passes):
            lines.append(f'    {"if" if k == 0 else "elif"} stage == {k}:')
            body = self._scalar_pass(one) if isinstance(one, ScalarPass) else self._loop_pass(one)
            lines.extend('        ' + line for line in body)
        return '\n'.join(lines + ['    return 0', ''])

    def _scalar_pass(self, one: ScalarPass) -> List[str]:
        body = ['for i in range(tensor_bounds[0], tensor_bounds[1]):', *self._coefficients(one.body)]
        body += [f'    {variable(node)} = {self._kept(node)}' for node in one.loads]
        for node in one.body:
            if node.op == 'sum':
                place = [other is node for other in one.sums].index(True)
                body += ['    total = 0.0', '    for item in range(first_item[i], first_item[i + 1]):',
                         f'        total += partial[item * {self.plan.sums} + {place}]',
                         f'    {variable(node)} = {self.storage.precision}(total)']
            elif node.op == 'slot':
                body.append(f'    {variable(node)} = {self.at}({self._address(node.name)}, 1)[0]')
            else:
                body.append(f'    {variable(node)} = {self._expression(node)}')
            if node in self.plan.kept:
                body.append(f'    {self._kept(node)} = {self.storage.precision}({variable(node)})')
        for slot, node in one.stores.items():
            body.append(f'    {self.at}({self._address(slot)}, 1)[0] = {variable(node)}')
        return body

    def _loop_pass(self, one: LoopPass) -> List[str]:
        return ['for item in range(item_bounds[0], item_bounds[1]):',
                '    i, start, size = items[item], items[n_items + item], items[2 * n_items + item]',
                *[f'    {role}_at = {self._address(role)} + {self.storage.itemsize(role)} * start' for role in one.roles],
                *self._coefficients(one.computed),
                *[f'    {variable(node)} = {self._kept(node)}' for node in one.scalars],
                *[f'    sums{k}, terms{k} = no_sums(), terms_{self.at[:3]}()' for k in range(len(one.sums))],
                f'    for done in range(0, size // {BLOCK} * {BLOCK}, {BLOCK}):',
                *['    ' + line for line in self._ask_for(one.roles) + self._turn(one, 'done', str(BLOCK))],
                f'    done = size // {BLOCK} * {BLOCK}',
                *self._turn(one, 'done', 'size - done'),
                *[f'    partial[item * {self.plan.sums} + {k}] = sum_of(sums{k})' for k in range(len(one.sums))]]

    def _ask_for(self, roles: Sequence[str]) -> List[str]:
        """Prefetch a later block: on its own, a processor may have too few reads in flight to keep the memory busy. What no
        other pass reads takes no room from what one does."""
        passes = [one.roles for one in self.plan.passes if isinstance(one, LoopPass)]
        how = {role: 'prefetch' if sum(role in others for others in passes) > 1 else 'prefetch_once' for role in roles}
        sizes = {role: self.storage.itemsize(role) for role in roles}
        return [f'    {how[role]}_{size * BLOCK // 64}({role}_at + {size} * (done + {AHEAD}))' for role, size in sizes.items()]

    def _turn(self, one: LoopPass, start: str, size: str) -> List[str]:
        """The loop over ``size`` elements from ``start`` on."""
        # the terms of sums wait in an array: added up right there, in float64, they would halve the elements per instruction
        rest = [f'    for j in range({size}, {BLOCK}):', *[f'        terms{k}[j] = 0.0' for k in range(len(one.sums))]]
        return [*[f'    {role}_array = {_ARRAYS[self.storage.element(role)]}'
                  f'({role}_at + {self.storage.itemsize(role)} * {start}, {size})' for role in one.roles],
                *[f'    {variable(node)}_array = {self._normals(node, start)}' for node in one.draws],
                f'    for j in range({size}):', *self._elements(one),
                *(rest if one.sums and size != str(BLOCK) else []),
                *[f'    add_{self.at[:3]}(sums{k}, terms{k})' for k in range(len(one.sums))]]

    def _elements(self, one: LoopPass) -> List[str]:
        """The computation for element j of each array."""
        body = []
        for node in one.body:
            value = (self._load(one.loads[node]) if node in one.loads else f'{variable(node)}_array[j]' if node.op == 'noise'
                     else self._expression(node))
            body.append(f'        {variable(node)} = {value}')
        body += [f'        terms{k}[j] = {variable(node.args[0])}' for k, node in enumerate(one.sums)]
        for slot, node in one.stores.items():
            body += self._store(slot, node)
        return body

    def _address(self, role: str) -> str:
        return f'addresses[{self.plan.roles.index(role)} * n + i]'

    def _normals(self, node: Node, start: str) -> str:
        """The samples for BLOCK elements from ``start`` on."""
        return f'normals_{self.at[:3]}({", ".join(map(self._address, NOISE))}, {node.name}, start + {start})'

    def _kept(self, node: Node) -> str:
        return f'kept[i * {self.columns} + {self.plan.kept[node]}]'

    def _load(self, role: str) -> str:
        return _LOADS.get(self.storage.element(role), '{0}').format(f'{role}_array[j]')

    def _store(self, role: str, node: Node) -> List[str]:
        roles = [role, HALF] if role == WEIGHT and self.storage.master else [role]
        return [f'        {one}_array[j] = ' + _STORES.get(self.storage.element(one), '{0}').format(variable(node))
                for one in roles]

    def _coefficients(self, nodes: Sequence[Node]) -> List[str]:
        """Load the coefficients that ``nodes`` use, from the row of tensor i."""
        names = self.plan.coefficients
        lines = [f'    table = {self.at}(words[9] + {self.itemsize * len(names)} * rows[i], {len(names)})']
        for node in with_coefficients(nodes):
            if node.op == 'coefficient':
                lines.append(f'    {variable(node)} = table[{names.index(node.name)}]')
            else:
                lines.append(f'    {variable(node)} = {self._expression(node)}')
        return lines

    def _expression(self, node: Node) -> str:
        names = [variable(a) for a in node.args]
        if node.op in _FORMATS:
            return _FORMATS[node.op].format(*names, T=self.storage.precision, name=node.name)
        return f'{names[0]} {node.op} {names[1]}'
