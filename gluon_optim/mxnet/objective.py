"""A loss as a function of a net's weights: its value, its gradient, and its Hessian times a vector, without a trace left behind."""
import contextlib
import math
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy
from mxnet import autograd, gluon, nd
from mxnet.base import MXNetError

from ..schema import some_of
from .typing import ParameterLike

__all__ = ['Objective', 'progress_bar', 'trainable']

Term = Callable[[], Any]  # computes an NDArray with one element

TOLERANCE = {'float64': 1e-6, 'float32': 1e-2}       # of an exact product, in norm, against differences
SAME = {'float64': 1e-10, 'float32': 1e-5}           # of two values of a loss at the same weights


def trainable(params: Any, with_shapes: bool = True) -> List[ParameterLike]:
    """The parameters that are not frozen, each once. Raises TypeError or ValueError for what has no second derivative here, and
    where ``with_shapes`` for parameters of unknown shapes."""
    given = list(params.values()) if hasattr(params, 'values') else params
    if not isinstance(given, (list, tuple)) or not all(isinstance(each, gluon.Parameter) for each in given):
        raise TypeError('`params` must be a list of Parameters or a ParameterDict. '
                        f'Received: {type(params).__name__}. Write net.collect_params().')
    parameters: List[ParameterLike] = list(dict.fromkeys(each for each in given if each.grad_req != 'null'))
    if not parameters:
        raise ValueError('`params` must hold at least one trainable parameter. '
                         f'Received: {len(given)} parameters{", all with grad_req null" if given else ""}.')
    for parameter in parameters:
        if with_shapes and parameter._deferred_init:
            raise ValueError(f'Shapes of parameters must be known. Received: the deferred parameter {parameter.name}. '
                             'Run one forward pass first: net(batch).')
        if parameter._data is None and not parameter._deferred_init:
            raise ValueError(f'Parameters must be initialized. Received: {parameter.name}, which is not. Call net.initialize().')
        if parameter._stype != 'default':
            raise ValueError(f'Parameters must be dense. Received: {parameter.name}, which is {parameter._stype}.')
        if numpy.dtype(parameter.dtype).name not in TOLERANCE:
            raise ValueError(f'Parameters must be float32 or float64. Received: {parameter.name}, which is '
                             f"{numpy.dtype(parameter.dtype).name}. Write net.cast('float32'), and cast the data too.")
    return parameters


class Frozen(NamedTuple):
    """An array of a frozen parameter, and its values before it was used."""

    parameter: ParameterLike
    array: Any
    before: Any


class Objective:
    """The sum of ``terms`` as a function of the weights, all in one float64 vector.

    Parameters
    ----------
    terms : sequence of callables without arguments
        Each computes an NDArray with one element from the parameters. Their sum must be the same whenever it is computed.
    params : list of Parameter, or ParameterDict
        Those with ``grad_req='null'`` are left out.
    train_mode : bool
        Whether layers like BatchNorm behave as in training.

    Inside a ``with`` block the weights can be moved; after it they are bit for bit what they were, and so are the moving
    statistics of BatchNorm. Gradients in `Parameter.grad()` are never touched. A parameter that is on several devices counts
    once: its gradient is the sum over those on which the terms use it.

    Raises ValueError, when the block is entered, for terms whose sum is not one finite number, or not twice the same.
    """

    def __init__(self, terms: Sequence[Term], params: Any, train_mode: bool = True):
        self.parameters = trainable(params)
        self.method = ''  # of products: 'exact' or 'differences', known after the first one
        self.gradients = self.products = 0  # how many were computed
        self.sizes = [int(numpy.prod(parameter.shape)) for parameter in self.parameters]
        self.size = sum(self.sizes)
        self.dtype = min(numpy.dtype(parameter.dtype).name for parameter in self.parameters)  # float32 where there is any
        self.frozen: Dict[int, Frozen] = {}  # what the terms use of other parameters
        self._terms, self._train_mode = terms, train_mode
        self._used: List[Any] = []    # the arrays that the terms depend on
        self._owner: List[int] = []   # the parameter of each

    def __enter__(self) -> 'Objective':
        arrays = [array for parameter in self.parameters for array in parameter.list_data()]
        saved = [array.copy() for array in arrays]
        with contextlib.ExitStack() as undo:
            undo.callback(_copy_all, arrays, saved)
            undo.callback(self._restore_frozen)
            with _reading_frozen(self.frozen):
                self._check(self._find_used(), self.value())
            self.weights = self.flat([saved[k] for k in self._first_copies()])
            self._at = self.weights
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._undo.close()

    def _restore_frozen(self) -> None:
        for frozen in self.frozen.values():
            frozen.before.copyto(frozen.array)

    def _first_copies(self) -> List[int]:
        counts = [len(parameter.list_data()) for parameter in self.parameters]
        return [sum(counts[:k]) for k in range(len(counts))]

    def _find_used(self) -> float:
        """Find which arrays the terms depend on: MXNet computes no gradient with respect to the others. Returns the value."""
        pairs = [(k, array) for k, parameter in enumerate(self.parameters) for array in parameter.list_data()]
        found: Dict[int, Tuple[int, Any]] = {}
        total = 0.0
        for term in self._terms:
            with autograd.record(train_mode=self._train_mode):
                loss = _checked(term())
            total += _number(loss)
            left = {number: pair for number, pair in enumerate(pairs) if number not in found}
            if left and _depends(loss, [array for _, array in left.values()], self._train_mode):
                found.update(left)
            else:
                found.update((number, pair) for number, pair in left.items() if _depends(loss, [pair[1]], self._train_mode))
        if not found:
            names = [parameter.name for parameter in self.parameters]
            raise ValueError(f'The loss must depend on the parameters. Received: one that depends on none of {some_of(names)}. '
                             'It must compute with them each time it is called.')
        self._owner = [found[number][0] for number in sorted(found)]
        self._used = [found[number][1] for number in sorted(found)]
        return total

    def _check(self, first: float, second: float) -> None:
        if not math.isfinite(first):
            raise ValueError(f'The loss must be finite. Received: {first}.')
        if not abs(first - second) <= SAME[self.dtype] * (abs(first) + abs(second)):
            raise ValueError(f'The loss must be the same each time it is computed. Received: {first:.9g}, then {second:.9g}. Pass '
                             'train_mode=False where dropout is the reason, or call mx.random.seed(0) at the start of the loss.')

    def settled_statistics(self) -> List[Tuple[Any, Any]]:
        """The arrays that the terms change as they are computed, with the values at which passes at the present weights end.

        Those are the moving statistics of BatchNorm. Each pass makes a s + b of a statistic s; so a and b are found from
        two passes, one from 0 and one from 1.
        """
        if not self.frozen:
            return []
        parameters, arrays, _ = zip(*self.frozen.values())
        before = [array.copy() for array in arrays]
        self.gradient()
        changed = [k for k, differs in enumerate(_differ(arrays, before)) if differs]
        ends = []
        for begin in (0, 1):
            for k in changed:
                arrays[k][:] = begin
            self.gradient()
            ends.append([arrays[k].copy() for k in changed])
        return [(array, (zero / (1 - (one - zero))).as_in_context(array.context))
                for k, zero, one in zip(changed, *ends) for array in parameters[k].list_data()]

    # -- between NDArrays and vectors -------------------------------------------------------------------------------

    def flat(self, arrays: Sequence[Any]) -> numpy.ndarray:
        """One vector of all ``arrays``, one for each parameter."""
        pieces = [array.as_nd_ndarray().reshape((-1,)).astype('float64') for array in arrays]
        return nd.concat(*pieces, dim=0).asnumpy()

    def split(self, vector: numpy.ndarray) -> List[Any]:
        """The opposite: arrays of the shapes, types and (first) devices of the parameters."""
        pieces = numpy.split(vector, numpy.cumsum(self.sizes)[:-1])
        return [_array_like(parameter.list_data()[0], piece) for parameter, piece in zip(self.parameters, pieces)]

    def move(self, vector: numpy.ndarray) -> None:
        """Set the weights on all devices on which the terms use them."""
        pieces = numpy.split(vector, numpy.cumsum(self.sizes)[:-1])
        for owner, array in zip(self._owner, self._used):
            _array_like(array, pieces[owner]).copyto(array)
        self._at = numpy.array(vector, 'float64')

    # -- what is computed -------------------------------------------------------------------------------------------

    def value(self) -> float:
        """The sum of the terms."""
        total = 0.0
        for term in self._terms:
            with autograd.record(train_mode=self._train_mode):
                loss = _checked(term())
            total += _number(loss)
        return total

    def gradient(self) -> Tuple[float, numpy.ndarray]:
        """The value and its gradient."""
        total, parts = 0.0, []
        for term in self._terms:
            with autograd.record(train_mode=self._train_mode):
                loss = _checked(term())
            parts.append(self._sum_of(self._gradients_of(loss)))
            total += _number(loss)
        self.gradients += 1
        return total, sum(parts[1:], parts[0])

    def _gradients_of(self, loss: Any) -> List[Any]:
        if len(self._terms) == 1:
            return autograd.grad(loss, self._used, train_mode=self._train_mode)  # type: ignore[no-any-return]
        return _gradients(loss, self._used, self._train_mode)

    def _sum_of(self, gradients: Sequence[Any]) -> numpy.ndarray:
        """The gradients of ``self._used`` as one vector; a parameter that is not used gets 0."""
        total: List[Any] = [None] * len(self.parameters)
        for owner, array in zip(self._owner, gradients):
            array = array.as_nd_ndarray().tostype('default')
            total[owner] = array if total[owner] is None else total[owner] + array.as_in_context(total[owner].context)
        first = self._used[0].context
        return self.flat([nd.zeros(parameter.shape, dtype=parameter.dtype, ctx=first) if gradient is None
                          else gradient.as_in_context(first) for parameter, gradient in zip(self.parameters, total)])

    def product(self, vector: numpy.ndarray) -> numpy.ndarray:
        """The Hessian at the present weights, times ``vector``."""
        self.products += 1
        if not self.method:
            self.method = self._choose()
        exact = self._exact(vector) if self.method == 'exact' else None
        if exact is None:
            self.method = 'differences'
            return self._differences(vector)
        return exact

    def _choose(self) -> str:
        """Whether MXNet has second derivatives, and they are right: in 1.9.1 those of FullyConnected, arcsinh and arccosh are wrong
        without an error. One direction, drawn at random, tells: the error is linear in the direction."""
        direction = numpy.random.RandomState(0).standard_normal(self.size)
        exact = self._exact(direction)
        if exact is None:
            return 'differences'
        differences = self._differences(direction)
        apart = numpy.linalg.norm(exact - differences)
        return 'exact' if apart <= TOLERANCE[self.dtype] * numpy.linalg.norm(differences) else 'differences'

    def _exact(self, vector: numpy.ndarray) -> Optional[numpy.ndarray]:
        """Through the graph of the gradient; None where MXNet cannot."""
        pieces = numpy.split(vector, numpy.cumsum(self.sizes)[:-1])
        heads = [_array_like(array, pieces[owner]) for owner, array in zip(self._owner, self._used)]
        total = numpy.zeros(self.size)
        for term in self._terms:
            with autograd.record(train_mode=self._train_mode):
                loss = _checked(term())
                try:
                    gradients = autograd.grad(loss, self._used, create_graph=True, retain_graph=True, train_mode=self._train_mode)
                    products = autograd.grad(gradients, self._used, head_grads=heads, train_mode=self._train_mode)
                    total += self._sum_of(products)
                except MXNetError:
                    return None
        return total

    def _differences(self, vector: numpy.ndarray) -> numpy.ndarray:
        """(g(w + h v) - g(w - h v)) / (2 h), with h |v| = eps^(1/3) (1 + |w|): the step at which the error of the difference, that
        grows with h^2, is as large as that of rounding, eps / h."""
        length = float(numpy.linalg.norm(vector))
        if length == 0:
            return numpy.zeros(self.size)
        at = self._at
        h = float(numpy.finfo(self.dtype).eps) ** (1 / 3) * (1 + float(numpy.linalg.norm(at))) / length
        try:
            self.move(at + h * vector)
            _, above = self.gradient()
            self.move(at - h * vector)
            _, below = self.gradient()
        finally:
            self.move(at)
        return (above - below) / (2 * h)


def _checked(loss: Any) -> Any:
    if not isinstance(loss, nd.NDArray) or loss.size != 1:
        received = f'the shape {loss.shape}' if isinstance(loss, nd.NDArray) else type(loss).__name__
        raise ValueError(f'The loss must be an NDArray with one element. Received: {received}. End it with .mean() or .sum().')
    return loss


def _number(loss: Any) -> float:
    return float(loss.asnumpy().reshape(-1)[0])


def _array_like(array: Any, values: numpy.ndarray) -> Any:
    made = nd.array(values.reshape(array.shape), dtype=array.dtype, ctx=array.context)
    return made if type(array) is nd.NDArray else made.as_np_ndarray()


def _copy_all(arrays: Sequence[Any], values: Sequence[Any]) -> None:
    for array, value in zip(arrays, values):
        value.copyto(array)


def _differ(arrays: Sequence[Any], others: Sequence[Any]) -> List[bool]:
    """Which pairs differ, with one synchronisation for all."""
    first = arrays[0].context
    counts = [(a != b).as_nd_ndarray().astype('float32').sum().reshape((1,)).as_in_context(first) for a, b in zip(arrays, others)]
    return [bool(count) for count in nd.concat(*counts, dim=0).asnumpy()]


def _depends(loss: Any, arrays: List[Any], train_mode: bool) -> bool:
    """Whether ``loss`` depends on each of the arrays. Its graph stays."""
    try:
        autograd.grad(loss, arrays, retain_graph=True, train_mode=train_mode)
    except MXNetError as error:
        if 'unreachable' in str(error) or 'computational graph' in str(error):
            return False
        raise
    return True


def _gradients(loss: Any, arrays: List[Any], train_mode: bool) -> List[Any]:
    """The gradients of one of several terms, which need not depend on all ``arrays``."""
    try:
        return autograd.grad(loss, arrays, retain_graph=True, train_mode=train_mode)  # type: ignore[no-any-return]
    except MXNetError:
        used = [_depends(loss, [array], train_mode) for array in arrays]
        if all(used):
            raise
    found = iter(autograd.grad(loss, [a for a, each in zip(arrays, used) if each], train_mode=train_mode) if any(used) else [])
    return [next(found) if each else array.zeros_like() for array, each in zip(arrays, used)]


@contextlib.contextmanager
def _reading_frozen(seen: Dict[int, Frozen]) -> Iterator[None]:
    """Notes in ``seen`` the arrays of frozen parameters that are read inside the block, each with a copy of what it was at first.

    BatchNorm changes its moving statistics whenever it computes in training mode, and a loss does not say which layers it uses.
    """
    original = gluon.Parameter._check_and_get

    def check_and_get(parameter: Any, arrays: Any, context: Any) -> Any:
        found = original(parameter, arrays, context)
        if parameter.grad_req == 'null' and parameter._stype == 'default' and arrays is parameter._data:
            for array in found if isinstance(found, list) else [found]:
                if id(array) not in seen:
                    seen[id(array)] = Frozen(parameter, array, array.copy())
        return found

    gluon.Parameter._check_and_get = check_and_get
    try:
        yield
    finally:
        gluon.Parameter._check_and_get = original


@contextlib.contextmanager
def progress_bar(what: str, total: Optional[int] = None, shown: bool = True) -> Iterator[Callable[..., None]]:
    """Shows a progress bar inside the block, on a terminal, if tqdm is installed and it takes longer than a second or two.

    Gives a function to call after each step, with what to show beside the bar.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        shown = False
    if not shown:
        yield lambda **values: None
        return
    with tqdm(desc=what, total=total, leave=False, delay=1.5, disable=None) as bar:
        def update(**values: Any) -> None:
            bar.set_postfix(values, refresh=False)
            bar.update()
        yield update
