"""The second derivatives of a loss: Hessian times vector, the largest and smallest eigenvalues, the trace.

The lecture's gradient drift (McAllester, TTIC 31230: second order SGD). A loss is a function without arguments that computes an
NDArray with one element from the parameters, on the same examples each time:

>>> import mxnet as mx, gluon_optim as go
>>> net = mx.gluon.nn.Dense(1, use_bias=False, in_units=2)
>>> net.initialize()
>>> data, target = mx.nd.array([[1, 0], [0, 3]]), mx.nd.array([[1], [1]])
>>> def loss():
...     return ((net(data) - target) ** 2).sum() / 2
>>> go.curvature.eigenvalues(loss, net.collect_params(), k=1).round(2)    # the Hessian is [[1, 0], [0, 9]]
array([9.])

docs/CURVATURE.md says how accurate they are, and what they are good for.
"""
import math
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import numpy
from mxnet import nd

from ..requirements import missing
from ..schema import check_int, check_known
from .objective import Objective, progress_bar

__all__ = ['Trace', 'eigenvalues', 'hvp', 'trace']

ENDS = ('LA', 'SA', 'LM', 'BE')
ACCURACY = {'float64': 1e-7, 'float32': 1e-3}  # of eigenvalues, relative: what the products allow


def hvp(loss: Any, params: Any, vectors: Sequence[Any], train_mode: bool = True) -> Tuple[List[Any], str]:
    """The Hessian H of the loss with respect to the parameters, times a vector.

        H v = d/dw (g(w) . v)                              'exact', g is the gradient at the weights w
        H v = (g(w + h v) - g(w - h v)) / (2 h)            'differences', h |v| = eps^(1/3) (1 + |w|)

    The first form is the lecture's (McAllester, TTIC 31230, Hessian-vector products), through ``autograd.grad(create_graph=True)``.
    It is used where MXNet has the second derivatives and they agree with differences along a random direction. MXNet 1.9.1 has
    them for elementwise functions; for convolution, normalization, pooling, softmax and sums it has none, and those of
    FullyConnected are wrong without an error. So it is nearly always the second form, whose error was at most 1e-8 of the product
    for float64 and 2e-3 for float32 on the nets of the tests.

    Parameters
    ----------
    loss : callable
        Without arguments; returns an NDArray with one element, the same each time it is called with the same weights. It may
        compute on several devices.
    params : ParameterDict or list of Parameter
        float32 or float64. Those with ``grad_req='null'`` are left out.
    vectors : list of NDArray
        One for each of the remaining parameters, in their order and of their shapes. NumPy's arrays are taken too.
    train_mode : bool
        True: BatchNorm uses the statistics of the batch, as in training; dropout is then refused. False: as in inference.

    Returns
    -------
    list of NDArray, str
        H v, in the shapes and types of the parameters, and 'exact' or 'differences'.

    Weights, gradients and BatchNorm's moving statistics are afterwards what they were, also when an error was raised. Raises
    TypeError or ValueError where parameters, vectors or loss are not as described.

    >>> import mxnet as mx, gluon_optim as go
    >>> w = mx.gluon.Parameter('w', shape=(1,), init=mx.init.Constant(2), dtype='float64')
    >>> w.initialize()
    >>> product, method = go.curvature.hvp(lambda: w.data().exp(), [w], [mx.nd.array([3])])
    >>> product[0].asnumpy().round(4), method      # 3 exp(2)
    (array([22.1672]), 'exact')
    """
    objective = Objective([loss], params, train_mode)
    vector = _flat(vectors, objective)
    with objective:
        product = objective.split(objective.product(vector))
    return product, objective.method


def eigenvalues(loss: Any, params: Any, k: int = 1, which: str = 'LA', tol: Optional[float] = None,
                maxiter: Optional[int] = None, seed: int = 0, train_mode: bool = True, progress: bool = True) -> numpy.ndarray:
    """Some eigenvalues of the Hessian of the loss, by Lanczos iteration: only products with vectors are computed.

    The largest one is the lecture's L, the curvature that limits the learning rate: gradient descent with a rate above 2/L
    leaves the minimum. What `noise_adaptive_sgd` takes as ``curvature``:

        L = float(go.curvature.eigenvalues(loss, net.collect_params())[0])
        trainer = gluon.Trainer(net.collect_params(), 'noise_adaptive_sgd', {'curvature': L, 'batch_size': 64})

    Parameters
    ----------
    loss, params, train_mode
        As for `hvp`.
    k : int
        How many, fewer than there are weights.
    which : 'LA', 'SA', 'LM' or 'BE'
        Largest, smallest, largest in magnitude, or both ends: k/2 of each, one more of the large where k is odd.
    tol : float, optional
        Relative accuracy at which the iteration stops; 1e-7 for float64 and 1e-3 for float32, that of the products.
    maxiter : int, optional
        Most restarts of the iteration; SciPy's default is 10 times the number of weights.
    seed : int
        Of the vector that the iteration starts from.
    progress : bool
        Show on a terminal how many products were computed, if tqdm is installed.

    Returns
    -------
    numpy.ndarray
        The eigenvalues in ascending order, float64.

    Needs SciPy, ``scipy.sparse.linalg.eigsh``. Raises ImportError without it, TypeError or ValueError where an argument is not as
    described or the iteration has not converged.

    >>> import mxnet as mx, gluon_optim as go
    >>> w = mx.gluon.Parameter('w', shape=(4,), init=mx.init.One(), dtype='float64')
    >>> w.initialize()
    >>> factors = mx.nd.array([1, -5, 3, 2], dtype='float64')
    >>> go.curvature.eigenvalues(lambda: (factors * w.data() ** 2).sum() / 2, [w], k=2, which='BE').round(6)
    array([-5.,  3.])
    """
    try:
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ImportError as error:
        raise missing('go.curvature.eigenvalues', 'SciPy', 'curvature', error) from error
    check_known('end of the spectrum', which, ENDS, ValueError)
    objective = Objective([loss], params, train_mode)
    if check_int('k', k, 1) >= objective.size:
        raise ValueError(f'`k` must be less than the number of weights, {objective.size}. Received: k={k}.')
    start = numpy.random.RandomState(check_int('seed', seed)).standard_normal(objective.size)
    with objective, progress_bar('eigenvalues: products', shown=progress) as update:
        def times(vector: numpy.ndarray) -> numpy.ndarray:
            update()
            return objective.product(_finite(vector.reshape(-1)))

        hessian = LinearOperator((objective.size, objective.size), matvec=times, dtype='float64')
        try:
            values = eigsh(hessian, k=k, which=which, v0=start, tol=ACCURACY[objective.dtype] if tol is None else tol,
                           maxiter=maxiter, return_eigenvectors=False)
        except ArpackNoConvergence as error:
            raise ValueError(f'The Lanczos iteration must converge. Received: {len(error.eigenvalues)} of {k} eigenvalues after '
                             f'{objective.products} products. Pass a larger maxiter or tol.') from error
    return numpy.sort(values)


class Trace(NamedTuple):
    """An estimate of a trace, and its standard error: the true one is within 2 errors in 19 of 20 cases. Raises nothing.

    >>> from gluon_optim.mxnet.curvature import Trace
    >>> Trace(value=10.0, error=0.5)
    Trace(value=10.0, error=0.5)
    """

    value: float
    error: float


def trace(loss: Any, params: Any, samples: int = 100, seed: int = 0, train_mode: bool = True, progress: bool = True) -> Trace:
    """The trace of the Hessian, the sum of all its eigenvalues, estimated from random vectors v of signs (Hutchinson, 1990).

        trace = mean of v . H v,   standard error = standard deviation of v . H v / sqrt(samples)

    Parameters
    ----------
    loss, params, train_mode
        As for `hvp`.
    samples : int
        How many vectors, at least 2; each takes one product, that is two gradients.
    seed : int
        Of the vectors.
    progress : bool
        Show progress on a terminal, if tqdm is installed.

    Returns
    -------
    Trace
        ``value`` and ``error``, the standard error. Where the Hessian is diagonal each sample is the trace, and the error is 0.

    Raises TypeError or ValueError where an argument is not as described.

    >>> import mxnet as mx, gluon_optim as go
    >>> w = mx.gluon.Parameter('w', shape=(2,), init=mx.init.One(), dtype='float64')
    >>> w.initialize()
    >>> value, error = go.curvature.trace(lambda: (w.data() ** 2).sum() + w.data()[0] * w.data()[1], [w], samples=400)
    >>> abs(value - 4) < 3 * error < 0.5
    True
    """
    objective, samples = Objective([loss], params, train_mode), check_int('samples', samples, 2)
    random = numpy.random.RandomState(check_int('seed', seed))
    found = []
    with objective, progress_bar('trace', samples, progress) as update:
        for _ in range(samples):
            vector = random.randint(0, 2, objective.size) * 2.0 - 1
            found.append(vector @ _finite(objective.product(vector)))
            update()
    return Trace(float(numpy.mean(found)), float(numpy.std(found, ddof=1) / math.sqrt(samples)))


def _flat(vectors: Any, objective: Objective) -> numpy.ndarray:
    """The user's vectors as one."""
    parameters = objective.parameters
    if not isinstance(vectors, (list, tuple)) or len(vectors) != len(parameters):
        received = len(vectors) if isinstance(vectors, (list, tuple)) else type(vectors).__name__
        raise ValueError(f'`vectors` must be a list with one array for each of the {len(parameters)} trainable parameters. '
                         f'Received: {received}.')
    for parameter, vector in zip(parameters, vectors):
        if not isinstance(vector, (nd.NDArray, numpy.ndarray)):
            raise TypeError(f'`vectors` must hold NDArrays. Received: {type(vector).__name__} for {parameter.name}.')
        if vector.shape != parameter.shape:
            raise ValueError(f'`vectors` must have the shapes of the parameters. Received: {vector.shape} for {parameter.name}, '
                             f'which is {parameter.shape}.')
    arrays = [nd.array(vector, dtype='float64') if isinstance(vector, numpy.ndarray) else vector for vector in vectors]
    return _finite(objective.flat([array.as_in_context(arrays[0].context) for array in arrays]))


def _finite(vector: numpy.ndarray) -> numpy.ndarray:
    if not numpy.isfinite(vector).all():
        raise ValueError(f'Vectors and their products must be finite. Received: {int((~numpy.isfinite(vector)).sum())} of '
                         f'{vector.size} elements that are NaN or infinite.')
    return vector
