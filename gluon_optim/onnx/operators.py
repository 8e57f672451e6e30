"""From a rule to standard ONNX operators, as plain tuples: the update of many parameters, including their coefficients.

`gluon_optim.onnx` turns them into a model. Nothing here imports onnx.
"""
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Set, Tuple, Type

import numpy

from ..rules.base import Rule, scalars
from ..rules.graph import WEIGHT, Graph, Node, trace
from ..rules.runtimes import mirrored
from ..schema import Values, compute_type, one_of

__all__ = ['Coefficients', 'Operator', 'Operators', 'Parameter', 'Scope', 'Step']

OPERATORS = {'+': 'Add', '-': 'Sub', '*': 'Mul', '/': 'Div', 'neg': 'Neg', '<': 'Less', '<=': 'LessOrEqual', '>': 'Greater',
             '>=': 'GreaterOrEqual', '==': 'Equal', 'sqrt': 'Sqrt', 'exp': 'Exp', 'log': 'Log', 'abs': 'Abs', 'sign': 'Sign',
             'minimum': 'Min', 'maximum': 'Max', 'where': 'Where', 'pow': 'Pow', 'floor': 'Floor', 'cos': 'Cos'}
ROUNDED = {'half': 'float16', 'single': 'float32'}
COMPARISONS = ('<', '<=', '>', '>=', '==', '!=')

Kind = Tuple[str, Tuple[int, ...]]  # type and shape


class Operator(NamedTuple):
    """One node; ``attributes`` hold NumPy arrays for tensors and type names for ``to``. The ``domain`` '' is standard ONNX."""

    op: str
    inputs: Tuple[str, ...]
    outputs: Tuple[str, ...]
    attributes: Dict[str, Any]
    domain: str = ''


class Parameter(NamedTuple):
    """One parameter. ``offset`` is its update number minus ``t``; with ``master`` it has float32 master weights."""

    name: str
    shape: Tuple[int, ...]
    dtype: str
    master: bool = False
    lr_mult: float = 1.0
    wd_mult: float = 1.0
    offset: int = 0

    @property
    def computed(self) -> str:
        """The type of its slots and of its update."""
        return compute_type(self.dtype)


class Coefficients(Graph):
    """The namespace in which `Rule.coefficients` is traced: every value is one double."""

    def apply(self, op: str, *operands: Any) -> Any:
        if not any(isinstance(x, Node) for x in operands):
            return getattr(scalars, op)(*operands)
        args = tuple(x if isinstance(x, Node) else self.leaf('constant', float(x), 'coefficient') for x in operands)
        return self._node(op, args, None, 'scalar')

    def log(self, x: Any) -> Any: return self.apply('log', x)
    def expm1(self, x: Any) -> Any: return self.apply('expm1', x)
    def single(self, x: Any) -> Any: return self.apply('single', x)  # rounded to float32


class Scope(NamedTuple):
    """Where nodes of a graph are computed: their type, their naming, known values, and how leaves are found."""

    dtype: str
    prefix: str
    leaf: Callable[[Node], str]
    known: Dict[Node, str]


class Operators:
    """A list of ``operators`` to which those for the nodes of a graph are added; each constant is added once."""

    def __init__(self) -> None:
        self.operators: List[Operator] = []
        self._shared: Dict[Tuple[Any, ...], str] = {}  # constants and coefficients
        self._bools: Set[str] = set()

    def add(self, op: str, inputs: Sequence[str], prefix: str = '', output: str = '', **attributes: Any) -> str:
        """Append an operator; return the name of its output."""
        output = output or f'{prefix}:{op}:{len(self.operators)}'
        self.operators.append(Operator(op, tuple(inputs), (output,), attributes))
        return output

    def constant(self, value: float, dtype: str) -> str:
        return self._once((repr(value), dtype), lambda: self.add('Constant', (), 'constant', value=numpy.array(value, dtype)))

    def _once(self, key: Tuple[Any, ...], make: Callable[[], str]) -> str:
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _cast(self, name: str, have: str, want: str, prefix: str) -> str:
        return name if have == want else self.add('Cast', [name], prefix, to=want)

    def value(self, node: Node, scope: Scope) -> str:
        """The name of the tensor for ``node``; operators are added for what it needs."""
        if node not in scope.known:
            scope.known[node] = self._operator(node, scope) if node.args else self._leaf(node, scope)
        return scope.known[node]

    def _leaf(self, node: Node, scope: Scope) -> str:
        return self.constant(node.name, scope.dtype) if node.op == 'constant' else scope.leaf(node)

    def _operator(self, node: Node, scope: Scope) -> str:
        def add(op: str, *inputs: str, **attributes: Any) -> str:
            return self.add(op, inputs, scope.prefix, **attributes)

        first, *others = [self.value(arg, scope) for arg in node.args]
        args = [add('Cast', arg, to=scope.dtype) if arg in self._bools else arg for arg in others]  # as a number
        if first in self._bools and node.op != 'where':
            first = add('Cast', first, to=scope.dtype)
        if node.op == 'sum':
            total = add('ReduceSum', self._cast(first, scope.dtype, 'float64', scope.prefix), keepdims=0)
            return self._cast(total, 'float64', scope.dtype, scope.prefix)
        if node.op in ROUNDED:
            rounded = self._cast(first, scope.dtype, ROUNDED[node.op], scope.prefix)
            return self._cast(rounded, ROUNDED[node.op], scope.dtype, scope.prefix)
        if node.op == 'expm1':  # tanh(x/2) (exp(x) + 1): loses no digits where x is small
            tanh = add('Tanh', add('Mul', first, self.constant(0.5, scope.dtype)))
            return add('Mul', tanh, add('Add', add('Exp', first), self.constant(1.0, scope.dtype)))
        output = add('Not', add('Equal', first, *args)) if node.op == '!=' else add(OPERATORS[node.op], first, *args)
        if node.op in COMPARISONS:
            self._bools.add(output)
        return output


class Step(Operators):
    """The update as ``operators``, from ``inputs`` to ``outputs`` (name -> type and shape, both in order).

    Inputs are ``learning_rate``, ``t`` and for each parameter ``<name>`` (or its master, if any), ``<name>/grad`` and
    ``<name>/<slot>``. Outputs have ``/new`` appended. Coefficients are computed in double and rounded once, for each distinct
    (lr_mult, wd_mult, offset); sums are accumulated in double.
    """

    def __init__(self, rule: Type[Rule], h: Values, parameters: Sequence[Parameter]):
        if not mirrored(rule):
            raise ValueError(f'{rule.name!r} cannot be written in ONNX operators: its update is more than elementwise functions, '
                             'sums and the state of one parameter. Continue in PyTorch, or with another optimizer.')
        self.rule, self.h, self.static = rule, h, rule.static(h)
        super().__init__()
        self.inputs: Dict[str, Kind] = {'learning_rate': ('float64', ()), 't': ('int64', ())}
        self.outputs: Dict[str, Kind] = {}
        names = tuple(rule.all_coefficients(scalars, h, 1))
        self._graphs = {master: trace(one, self.static, names) for master, one in ((False, rule), (True, rule.on_masters()))}
        for parameter in parameters:
            self._declare(parameter)
        self._groups = {key: self._coefficients(*key) for key in dict.fromkeys(p[-3:] for p in parameters)}
        for parameter in parameters:
            self._update(parameter)

    def _declare(self, p: Parameter) -> None:
        state = {f'{p.name}/{slot.name}': (p.computed, slot.shape(p.shape)) for slot in self.static.slots}
        if p.master:
            state[p.name + '/master'] = ('float32', p.shape)
        weight, gradient = {p.name: (p.dtype, p.shape)}, {p.name + '/grad': (p.dtype, p.shape)}
        taken = {*self.inputs, *self.outputs, *(name[:-len('/new')] for name in self.outputs)}
        twice = sorted(name for name in [*weight, *gradient, *state] if name in taken)
        if twice:
            raise ValueError('The names of parameters must differ from each other and from those of gradients and slots. '
                             f'Received: {one_of(twice)} twice. Rename the parameter {p.name!r}.')
        self.inputs.update({**({} if p.master else weight), **gradient, **state})
        self.outputs.update({name + '/new': kind for name, kind in {**weight, **state}.items()})

    def _coefficients(self, lr_mult: float, wd_mult: float, offset: int) -> Tuple[Dict[str, Any], Scope]:
        """Name -> number or node of a graph of doubles, and the scope in which it is computed."""
        graph = Coefficients()
        lr, t = graph.leaf('input', 'learning_rate', 'scalar'), graph.leaf('input', 't', 'scalar')
        h = self.h.replace(learning_rate=lr if lr_mult == 1 else lr * lr_mult, wd=self.h.wd * wd_mult)
        try:
            found = self.rule.all_coefficients(self.rule.numbers(graph, ''), h, t + offset if offset else t)
        except TypeError as error:
            raise ValueError(f'{self.rule.name!r} cannot be written in ONNX operators: its coefficients must be traceable in '
                             f'learning_rate and t. Received: {error}. Write them using only functions of `xp`.') from error

        def leaf(node: Node) -> str:
            return node.name if node is lr else self._once(('t',), lambda: self.add('Cast', ['t'], 't', to='float64'))
        return found, Scope('float64', 'coefficient', leaf, {})

    def _coefficient(self, key: Tuple[float, float, int], name: str, dtype: str) -> str:
        values, scope = self._groups[key]
        if not isinstance(values[name], Node):
            return self.constant(values[name], dtype)
        value = self.value(values[name], scope)
        return self._once((value, dtype), lambda: self._cast(value, 'float64', dtype, 'coefficient'))

    def _update(self, p: Parameter) -> None:
        def leaf(node: Node) -> str:
            if node.op == 'coefficient':
                return self._coefficient(p[-3:], node.name, p.computed)
            if node.op == 'gradient':
                return self._cast(p.name + '/grad', p.dtype, p.computed, p.name)
            if node.name != WEIGHT:
                return f'{p.name}/{node.name}'
            return p.name + '/master' if p.master else self._cast(p.name, p.dtype, p.computed, p.name)

        scope = Scope(p.computed, p.name, leaf, {})
        new = {name: self.value(node, scope) for name, node in self._graphs[p.master].outputs.items()}
        for slot in self.static.slots:
            self.add('Identity', [new[slot.name]], output=f'{p.name}/{slot.name}/new')
        if p.master:
            self.add('Identity', [new[WEIGHT]], output=p.name + '/master/new')
        self.add('Cast', [new[WEIGHT]], output=p.name + '/new', to=p.dtype)
