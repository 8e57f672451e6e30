"""`minimize`: a small net fitted on whole batches by SciPy's second-order and quasi-Newton methods."""
import contextlib
import functools
import math
import warnings
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy
from mxnet import MXNetError, autograd, gluon, nd
from mxnet.util import is_np_array

from ..requirements import missing
from ..schema import check_int, check_known, lower_name
from ..states.container import Path
from .manager import CheckpointManager
from .objective import Objective, progress_bar, trainable
from .typing import ParameterLike
from .weights import devices_of, remember, write_weight

__all__ = ['minimize']

METHODS = ('newton-cg', 'trust-ncg', 'bfgs', 'l-bfgs-b', 'cg')
WITH_PRODUCTS = ('newton-cg', 'trust-ncg')  # use Hessian times vector
STOPPED = 99  # the status that SciPy gives a run that its callback has ended


def minimize(net: Any, loss: Any, data: Any, method: str = 'newton-cg', *, wd: float = 0.0, reduction: str = 'mean',
             maxiter: Optional[int] = None, tol: Optional[float] = None, options: Optional[Mapping[str, Any]] = None,
             callback: Optional[Callable[[int, float], Any]] = None, train_mode: bool = True,
             manager: Union[CheckpointManager, Path, None] = None, progress: bool = True) -> Any:
    """Minimize the loss over all examples with ``scipy.optimize.minimize``, and leave the result in the net.

        f(w) = mean over the examples of loss(net(x), y) + sum over the parameters of wd wd_mult |w|^2 / 2

    For nets and data that are small enough for whole batches: here gradients have no noise, and the second-order methods that
    the lecture rules out for SGD work (McAllester, TTIC 31230, issues with quasi-Newton methods).

    Parameters
    ----------
    net : gluon.Block
        Its trainable parameters, float32 or float64, are the variables; frozen ones stay. With float32 the minimum is found as
        closely as float32 gradients allow; ``net.cast('float64')``, and data of that type, for all digits. Shapes that are not
        known yet are found by a forward pass over the first batch.
    loss : gluon.loss.Loss or callable
        ``loss(net(x), y)`` gives one value for each example. One value for a whole batch counts as the mean over that batch
        (with ``reduction='sum'``, the sum).
    data : (x, y), or an iterable of batches (x, y)
        Arrays of MXNet or NumPy; x may be a list of inputs. Batches are read once and kept, on the first device of the net, and
        floating-point arrays converted to the type of its parameters.
    method : 'newton-cg', 'trust-ncg', 'bfgs', 'l-bfgs-b' or 'cg'
        The first two use products with the Hessian, as `hvp` computes them; 'bfgs' keeps a matrix of the size of the Hessian.
    wd : float
        As a Trainer's: multiplied by the parameter's ``wd_mult``.
    reduction : 'mean' or 'sum'
        Of the losses of the examples.
    maxiter : int, optional
        Most iterations, those before a resume included; SciPy's default otherwise.
    tol, options
        As SciPy takes them.
    callback : callable, optional
        ``callback(iteration, value)`` is called after each iteration; raising StopIteration ends the run there.
    train_mode : bool
        Whether BatchNorm uses the statistics of the batch. At the end its moving statistics become those to which passes over the
        data would bring them. Dropout needs False.
    manager : CheckpointManager or str, optional
        Or a folder, for a manager with its defaults. The net is saved after each iteration, as often as the manager says, and
        the run continues from the newest checkpoint that is there. It restarts from those weights: what 'bfgs', 'l-bfgs-b' and
        'cg' know of earlier iterations is lost, so that they take other steps: to the same minimum if f is strictly convex,
        otherwise perhaps to another one.
    progress : bool
        Show progress on a terminal, if tqdm is installed.

    Returns
    -------
    scipy.optimize.OptimizeResult
        As SciPy's, with ``nit`` counted from the start of the run, ``method`` and ``hessian``: 'exact' or 'differences' where
        products with the Hessian were used, otherwise None.

    The weights are written on all devices when it returns. Where it raises, or is interrupted, the best weights so far are
    written; the initial ones, if none was better. Raises ImportError without SciPy, TypeError or ValueError where an argument
    is not as described, and for a loss that is not finite at the start.

    >>> import mxnet as mx, gluon_optim as go
    >>> net = mx.gluon.nn.Dense(1, in_units=1)
    >>> net.initialize()
    >>> net.cast('float64')
    >>> x = mx.nd.array([[0], [1], [2], [3]], dtype='float64')
    >>> result = go.minimize(net, mx.gluon.loss.L2Loss(), (x, 2 * x + 1), method='newton-cg')
    >>> result.success, net.weight.data().asnumpy().round(6), net.bias.data().asnumpy().round(6)
    (True, array([[2.]]), array([1.]))
    """
    try:
        import scipy.optimize
    except ImportError as error:
        raise missing('go.minimize', 'SciPy', 'curvature', error) from error
    method = lower_name(method)
    check_known('method', method, METHODS, ValueError)
    check_known('reduction', reduction, ('mean', 'sum'), ValueError)
    if not isinstance(net, gluon.Block):
        raise TypeError(f'`net` must be a gluon.Block. Received: {type(net).__name__}.')
    if isinstance(wd, bool) or not isinstance(wd, (int, float)) or not 0 <= wd < math.inf:
        raise ValueError(f'`wd` must be a number in [0, inf). Received: wd={wd!r}.')
    maxiter = None if maxiter is None else check_int('maxiter', maxiter)
    problem = _Problem(net, loss, data, float(wd), reduction, train_mode)
    saver = _Saver(manager, net, {'wd': float(wd), 'reduction': reduction})
    done = saver.restore()
    left = None if maxiter is None else max(maxiter - done, 0)
    settings = {**(options or {}), **({} if left is None else {'maxiter': left})}
    with problem, progress_bar(method, left, progress) as update:
        def after_iteration(point: numpy.ndarray, *more: Any) -> None:
            problem.iterations += 1
            iteration, (value, _) = done + problem.iterations, problem.value(point)
            update(loss=f'{value:.6g}')
            if saver:
                problem.write(point)
                saver.save(iteration, value)
            if callback is not None:
                callback(iteration, value)

        try:
            if left == 0:
                raise _Stopped(f'The run has done {done} of {maxiter} iterations.')
            with warnings.catch_warnings():
                warnings.filterwarnings('error', 'Unknown solver options', scipy.optimize.OptimizeWarning)
                result = scipy.optimize.minimize(
                    problem.value, problem.best, method=method, jac=True, tol=tol, options=settings,
                    hessp=problem.product if method in WITH_PRODUCTS else None, callback=_carried(after_iteration))
        except scipy.optimize.OptimizeWarning as error:
            raise ValueError(f'`options` must be those of scipy.optimize.minimize for {method!r}. Received: {error}.') from None
        except _Stopped as error:
            value, gradient = problem.value(problem.best)
            result = scipy.optimize.OptimizeResult(
                x=problem.best, fun=value, jac=gradient, nit=problem.iterations, nfev=problem.evaluations,
                njev=problem.evaluations, status=STOPPED, success=False, message=str(error))
        problem.finish(result.x)
    result.nit += done
    result.method, result.hessian = method, problem.objective.method or None
    if saver:
        saver.save(result.nit, float(result.fun), force=True)
    return result


class _Stopped(Exception):
    """The user's callback has ended the run. SciPy's versions differ in what they make of a StopIteration."""


def _carried(callback: Callable[..., None]) -> Callable[..., None]:
    """The callback for SciPy. Its argument must not be called ``intermediate_result``, which would change what it is."""
    def called(point: numpy.ndarray, *more: Any) -> None:
        try:
            callback(point)
        except StopIteration as error:
            raise _Stopped(str(error) or 'The callback ended the run.') from None
    return called


class _Problem:
    """What SciPy minimizes, and the best of what it has tried. Leaving its ``with`` block writes that into the net."""

    def __init__(self, net: Any, loss: Any, data: Any, wd: float, reduction: str, train_mode: bool):
        params = trainable(net.collect_params(), with_shapes=False)
        batches = _batches(data, devices_of(params[0])[0], params)
        if any(parameter._deferred_init for parameter in net.collect_params().values()):
            with autograd.pause():
                net(*batches[0][0])   # finds the shapes
        examples = sum(y.shape[0] for _, y in batches)
        self.objective = Objective([functools.partial(_loss_of, net, loss, x, y, reduction, examples) for x, y in batches],
                                   params, train_mode)
        self.iterations = self.evaluations = 0
        self.lowest = math.inf
        self._decay = numpy.repeat([wd * parameter.wd_mult for parameter in params], self.objective.sizes)
        self._last: Tuple[Any, float, Any] = (None, math.nan, None)
        self._settled: List[Tuple[Any, Any]] = []

    def __enter__(self) -> '_Problem':
        with contextlib.ExitStack() as undo:
            undo.enter_context(self.objective)
            self._start = self.objective.weights
            self.value(self._start)
            self.best = self._start
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._undo.close()
        if self.best is not self._start:
            self.write(self.best)
        for array, value in self._settled:
            value.copyto(array)

    def value(self, point: numpy.ndarray) -> Tuple[float, numpy.ndarray]:
        """f and its gradient."""
        last, value, gradient = self._last
        if last is None or not numpy.array_equal(last, point):
            self.objective.move(point)
            value, gradient = self.objective.gradient()
            value += float(self._decay @ (point * point)) / 2
            gradient = gradient + self._decay * point
            if not (math.isfinite(value) and numpy.isfinite(gradient).all()):
                # a step too far, for SciPy to take a shorter one. Of infinity its L-BFGS-B makes a run that has converged
                value, gradient = self.lowest + 10 * (1 + abs(self.lowest)), numpy.zeros_like(point)
            self._last = numpy.array(point), value, gradient
            self.evaluations += 1
            if value < self.lowest:
                self.lowest, self.best = value, self._last[0]
        return value, gradient

    def product(self, point: numpy.ndarray, vector: numpy.ndarray) -> numpy.ndarray:
        """The Hessian of f at ``point``, times ``vector``."""
        self.objective.move(point)
        return self.objective.product(vector) + self._decay * vector

    def finish(self, point: numpy.ndarray) -> None:
        """``point`` is the result."""
        self.objective.move(point)
        self._settled = self.objective.settled_statistics()
        self.best = numpy.array(point)

    def write(self, point: numpy.ndarray) -> None:
        """Write a point into the net, on all devices."""
        parameters = self.objective.parameters
        for parameter, piece in zip(parameters, numpy.split(point, numpy.cumsum(self.objective.sizes)[:-1])):
            values = piece.reshape(parameter.shape).astype(parameter.dtype)
            write_weight(parameter, [values] * len(parameter.list_data()))


def _loss_of(net: Any, loss: Any, x: Sequence[Any], y: Any, reduction: str, examples: int) -> Any:
    """The share of a batch in f, without decay."""
    try:
        losses = loss(net(*x), y)
    except MXNetError as error:
        if y.shape[0] in [array.shape[0] for array in x]:
            raise
        # not earlier: x may have the examples on another axis, as in layout TNC
        raise ValueError('`data` must have as many examples in x as in y. Received: the shapes '
                         f'{" and ".join(str(array.shape) for array in [*x, y])}.') from error
    if not isinstance(losses, nd.NDArray) or (losses.size > 1 and losses.shape[0] != y.shape[0]):
        received = f'the shape {losses.shape}' if isinstance(losses, nd.NDArray) else type(losses).__name__
        raise ValueError(f'`loss` must return an NDArray with one value for each of the {y.shape[0]} examples, or one for the '
                         f'whole batch. Received: {received}.')
    summed = reduction == 'sum' and losses.size == 1 < y.shape[0]
    mean = losses.astype('float64').mean()
    return mean if summed else mean * (y.shape[0] if reduction == 'sum' else y.shape[0] / examples)


def _batches(data: Any, context: Any, params: List[ParameterLike]) -> List[Tuple[List[Any], Any]]:
    """The batches of the user's data: inputs and labels, on the net's device."""
    advice = 'Pass (x, y), or batches of them: a DataLoader, or a list.'
    batches = [data] if isinstance(data, (list, tuple)) and len(data) == 2 and _is_array(data[1]) else data
    try:
        batches = list(batches)
    except TypeError:
        raise TypeError(f'`data` must hold arrays. Received: {type(data).__name__}. {advice}') from None
    if not batches:
        raise ValueError(f'`data` must hold at least one batch. Received: none. {advice}')
    kind = params[0].dtype
    found = []
    for batch in batches:
        inputs = batch[0] if isinstance(batch, (list, tuple)) and len(batch) == 2 else None
        x = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        if inputs is None or not all(map(_is_array, [*x, batch[1]])):
            raise TypeError(f'`data` must consist of batches (x, y) of arrays. Received: {type(batch).__name__}. {advice}')
        arrays = [_on(each, context, kind) for each in [*x, batch[1]]]
        if 0 in [array.shape[0] if array.ndim else 0 for array in arrays]:
            raise ValueError(f'Arrays in `data` must have one row for each example. Received: {[a.shape for a in arrays]}.')
        found.append((arrays[:-1], arrays[-1]))
    return found


def _is_array(value: Any) -> bool:
    return isinstance(value, (nd.NDArray, numpy.ndarray))


def _on(array: Any, context: Any, kind: Any) -> Any:
    """The array on a device, of the given type where it is one of floating-point numbers."""
    kind = kind if numpy.dtype(array.dtype).kind == 'f' else array.dtype
    if isinstance(array, numpy.ndarray):
        made = nd.array(array, dtype=kind, ctx=context)
        return made.as_np_ndarray() if is_np_array() else made
    return array.as_in_context(context).astype(kind, copy=False)


class _Saver:
    """Checkpoints of a run, or none."""

    def __init__(self, manager: Union[CheckpointManager, Path, None], net: Any, problem: Dict[str, Any]):
        self._manager = manager if manager is None or isinstance(manager, CheckpointManager) else CheckpointManager(manager)
        self._net, self._extra = net, {'minimize': problem}

    def restore(self) -> int:
        """The number of iterations that the run has done; the net gets its weights."""
        if self._manager is None:
            return 0
        with contextlib.ExitStack() as undo:
            remember(undo, self._net.collect_params().values())
            restored = self._manager.restore_latest(net=self._net)
            if restored is not None and dict(restored) != self._extra:
                raise ValueError(f'Checkpoints in {self._manager.directory!r} must be those of this run. Received: one of '
                                 f'{dict(restored)}, for a run of {self._extra}. Give each run its own folder.')
            undo.pop_all()
        return 0 if restored is None else restored.step or 0

    def __bool__(self) -> bool:
        return self._manager is not None

    def save(self, iteration: int, value: float, force: bool = False) -> None:
        if self._manager is not None:
            self._manager.save(iteration, net=self._net, extra=self._extra, metrics={'loss': value}, force=force)
            if force:
                self._manager.wait()
