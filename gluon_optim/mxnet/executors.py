"""Ways to run a rule on MXNet arrays: compiled loops on CPU contexts, CUDA kernels on GPU contexts, MXNet's own operators anywhere.

`KERNELS` says which contexts have kernels. All compute the same numbers: elementwise arithmetic rounds after every operation, sums
are accumulated in float64.
"""
import collections
import ctypes
import functools
import logging
from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

import numpy

# submodules, not attributes of `mxnet`: a parameter server imports this file while `mxnet` is still being imported
from mxnet import base as mx_base
from mxnet import ndarray as nd

from ..lowering.plan import GRADIENT, HALF, NOISE, Storage
from ..rules.base import KernelKey, Rule, scalars
from ..rules.compensated import COMPENSATION, KAHAN, compensated, with_compensation
from ..rules.graph import WEIGHT
from ..rules.noise import Noise
from ..rules.runtimes import runs_on
from ..schema import Values, same_objects

log = logging.getLogger('gluon_optim')

__all__ = ['Counter', 'Executor', 'KERNELS', 'Update', 'check_weight', 'has_kernels']

Counter = Tuple[int, int, int]   # the key, the stream and the update of `Noise`

KEEP = 16384  # number of tensors to keep prepared between steps


class Update(NamedTuple):
    """One call of the optimizer: lists of one entry per parameter, all on one context and of one dtype."""

    weights: Sequence[Any]
    gradients: Sequence[Any]
    states: Sequence[Any]        # nested as in the optimizer


class Arrays(NamedTuple):
    """An `Update` with its states taken apart."""

    weights: Sequence[Any]
    gradients: Sequence[Any]
    slots: Sequence[Tuple[Any, ...]]
    masters: Sequence[Any]       # float32 copies of float16 weights, or empty


class Executor:
    """Runs one rule; keeps what it prepared between steps. Never pickled.

    Parameters
    ----------
    rule : Rule
    split : callable
        ``split(state, h, mixed)`` returns the slots in a state, its compensation among them, and its master, if it has one.
        Called for new arrays only.
    slot_dtype : callable
        ``slot_dtype(dtype)`` is the name of the type of the slots of a weight.
    """

    def __init__(self, rule: Type[Rule], split: Callable[[Any, Values, Any], Tuple[Tuple[Any, ...], Any]],
                 slot_dtype: Callable[[Any], str]):
        self.rule, self._split, self._slot_dtype = rule, split, slot_dtype
        self._prepared: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        self._tensors = 0
        self._h: Any = None  # hyper-parameters of the last call, and what follows from them
        self._static: Any = None
        self.coefficients: Tuple[str, ...] = ()  # their names

    def use(self, h: Values) -> None:
        """Find out what follows from ``h``."""
        if h is not self._h:
            self._h, self._static = h, self.rule.static(h)
            self.coefficients = tuple(self.rule.all_coefficients(scalars, h, 1))

    def prepare(self, key: Any, update: Update, h: Values, mixed: Any) -> Any:
        """Check ``update`` and return an object whose ``run(table, rows, noise)`` updates parameter i with the coefficients
        ``table[rows[i]]`` and, where the rule draws it, the noise of the key, the stream and the update ``noise[i]``. ``key``
        identifies the list of parameters between steps, ``mixed`` says whether states have masters, or for 'kahan' compensations.

        Raises TypeError or ValueError before anything is written.
        """
        self.use(h)
        rule, static, masters_too = self.rule, self._static, mixed not in (False, KAHAN)
        if mixed == KAHAN:
            rule, static = compensated(rule, 'float16'), static._replace(slots=with_compensation(static.slots))
        key = (key, mixed)
        prepared = self._prepared.get(key)
        if prepared is not None:
            if prepared.static == static and prepared.takes(update):
                self._prepared.move_to_end(key)
                return prepared
            del self._prepared[key]
            self._tensors -= len(prepared.update.weights)
        slots, masters = zip(*[self._split(state, h, mixed) for state in update.states])
        arrays = Arrays(update.weights, update.gradients, slots, masters if masters_too else ())
        _check(rule, static, arrays, self._slot_dtype('float32' if masters_too else update.weights[0].dtype))
        rule = rule.on_masters() if masters_too else rule
        kernels = KERNELS.get(update.weights[0].context.device_type) if runs_on(self.rule, 'kernels', h) else None
        prepared = kernels(rule, static, self.coefficients, arrays) if kernels is not None else None
        if prepared is None:
            prepared = _Operators(rule, static, self.coefficients, arrays)
        self._prepared[key] = prepared
        prepared.update = Update(*map(tuple, update))  # the caller's lists may change
        self._tensors += len(update.weights)
        while self._tensors > KEEP and len(self._prepared) > 1:
            self._tensors -= len(self._prepared.popitem(last=False)[1].update.weights)
        return prepared


def has_kernels(context: Any) -> bool:
    """Whether rules run in compiled kernels on ``context``."""
    return context.device_type.startswith('cpu') and _compiler() is not None


class _Loops:
    """A list of parameters for the compiled kernel.

    The addresses of weights and gradients are not kept: MXNet permutes a weight's bytes in place for oneDNN and turns
    them back when its address is asked for, so they are asked for at every launch, after everything pending has finished.
    """

    update: Update
    static: KernelKey

    def __init__(self, rule: Type[Rule], static: KernelKey, coefficients: Tuple[str, ...], arrays: Arrays):
        loops = _compiler()
        weights, gradients, slots, masters = arrays
        kernel = loops.kernel(rule, static, coefficients, _storage(static, arrays))
        self.static, self._names = static, coefficients
        self._batch = loops.Batch(kernel, [weight.size for weight in weights])
        roles = dict(zip((slot.name for slot in static.slots), zip(*slots)), weight=masters)
        nd.waitall()  # an array has its memory only when the operator that fills it has run
        addresses = dict(zip(kernel.roles, self._batch.addresses))
        for role in kernel.roles:
            if roles.get(role):
                _fetch(_handles(roles[role]), addresses[role])  # only this package touches slots and masters: once is enough
        first = kernel.roles.index('half' if masters else 'weight')
        self._fetched = self._batch.addresses[first:first + 2].reshape(-1)  # of weights, then of gradients
        self._handles = _handles([*weights, *gradients])
        self._described = numpy.zeros((self._handles.size, loops.numba_runtime.DESCRIBED), numpy.int64)
        _same_kind(self._handles, self._described)

    def takes(self, update: Update) -> bool:
        """Whether it can run ``update``: the arrays of the last one, or others of the same kind with the same states.

        A kvstore hands over new objects for the same arrays at every call.
        """
        weights, gradients, states = update
        if not same_objects(self.update.states, states):
            return False
        if not (same_objects(self.update.weights, weights) and same_objects(self.update.gradients, gradients)):
            if not len(weights) == len(gradients) == len(states):
                return False
            self._handles[:] = [array.handle.value for array in (*weights, *gradients)]
            self.update = Update(tuple(weights), tuple(gradients), tuple(states))
            return _same_kind(self._handles, self._described)
        return True

    def run(self, table: Sequence[Dict[str, float]], rows: Sequence[int], noise: Optional[Sequence[Counter]] = None) -> None:
        if noise is not None:
            self._batch.addresses[-3:] = numpy.transpose(noise)   # NOISE, the last roles
        coefficients = [[c[name] for name in self._names] for c in table]
        nd.waitall()  # gradients are complete, and nothing reads the weights any more
        _fetch(self._handles, self._fetched)
        self._batch.run(coefficients, rows)


def _storage(static: KernelKey, arrays: Arrays) -> Storage:
    half_slots = any(array.dtype == numpy.float16 for slot, array in zip(static.slots, arrays.slots[0]) if slot != COMPENSATION)
    return Storage(_name(arrays.weights[0].dtype), bool(arrays.masters), half_slots)


def _handles(arrays: Sequence[Any]) -> numpy.ndarray:
    return numpy.array([array.handle.value for array in arrays], numpy.int64)


def _fetch(handles: numpy.ndarray, addresses: numpy.ndarray) -> None:
    failed = _compiler().numba_runtime.fetch_addresses(_functions('GetData')[0], handles, addresses)
    if failed >= 0:
        mx_base.check_call(-1)


def _same_kind(handles: numpy.ndarray, described: numpy.ndarray) -> bool:
    """Whether the arrays have the device, type and shape that ``described`` says; afterwards it says theirs."""
    shape = 'GetShapeEx' if hasattr(mx_base._LIB, 'MXNDArrayGetShapeEx') else 'GetShape'  # 1.x, 2.x
    functions = _functions('GetStorageType', 'GetDType', 'GetContext', shape)
    return bool(_compiler().numba_runtime.describe(functions, handles, described))


@functools.lru_cache(maxsize=None)
def _functions(*names: str) -> numpy.ndarray:
    """The addresses of MXNet's C functions MXNDArray<name>."""
    functions = [getattr(mx_base._LIB, f'MXNDArray{name}') for name in names]
    return numpy.array([ctypes.cast(function, ctypes.c_void_p).value for function in functions], numpy.int64)


@functools.lru_cache(maxsize=None)
def _compiler() -> Any:
    """The compiler of loops, imported at the first update; None if numba is missing."""
    try:
        from ..lowering import numba
        return numba
    except ImportError as error:
        log.warning('Optimizers run on MXNet operators, several times slower: %s. `pip install numba` makes them fast.', error)
        return None


class _Launches:
    """A list of parameters for CUDA kernels, in as many launches as their arguments need. Nothing waits for a result."""

    update: Update

    def __init__(self, static: KernelKey, coefficients: Tuple[str, ...], arrays: Arrays, batch: Any):
        self.static, self._names, self._batch = static, coefficients, batch
        self._own = [array for slots in arrays.slots for array in slots] + list(arrays.masters)
        weights, gradients, slots, masters = arrays
        roles = {**dict(zip((slot.name for slot in static.slots), zip(*slots))), WEIGHT: masters or weights, HALF: weights}
        for role, handles in zip(batch.kernel.roles, batch.arrays):
            if role != GRADIENT and role not in NOISE:
                handles[:len(weights)] = _handles(roles[role])
        self._point(weights, gradients)

    def _point(self, weights: Sequence[Any], gradients: Sequence[Any]) -> None:
        roles, arrays = self._batch.kernel.roles, self._batch.arrays
        for role, found in ((HALF if HALF in roles else WEIGHT, weights), (GRADIENT, gradients)):
            arrays[roles.index(role), :len(found)] = _handles(found)
        self._batch.point()

    def takes(self, update: Update) -> bool:
        """As `_Loops.takes`."""
        weights, gradients, states = update
        if not same_objects(self.update.states, states):
            return False
        if not (same_objects(self.update.weights, weights) and same_objects(self.update.gradients, gradients)):
            old = [*self.update.weights, *self.update.gradients]
            if not _cuda_batch().are_alike(old, [*weights, *gradients]) \
                    or not _cuda_batch().are_apart([*weights, *gradients, *self._own]):
                return False
            self._point(weights, gradients)
            self.update = Update(tuple(weights), tuple(gradients), tuple(states))
        return True

    def run(self, table: Sequence[Dict[str, float]], rows: Sequence[int], noise: Optional[Sequence[Counter]] = None) -> None:
        if noise is not None:
            self._batch.arrays[-3:, :len(noise)] = numpy.transpose(noise)   # NOISE, the last roles
        self._batch.run([[c[name] for name in self._names] for c in table], rows)


def _loops(rule: Type[Rule], static: KernelKey, coefficients: Tuple[str, ...], arrays: Arrays) -> Optional[_Loops]:
    return _Loops(rule, static, coefficients, arrays) if _compiler() is not None else None


def _launches(rule: Type[Rule], static: KernelKey, coefficients: Tuple[str, ...], arrays: Arrays) -> Optional[_Launches]:
    weights, gradients, slots, masters = arrays
    if not _cuda_batch().are_apart([*weights, *gradients, *masters, *(array for each in slots for array in each)]):
        return None
    batch = _cuda_batch().batch(rule, static, coefficients, _storage(static, arrays), [weight.size for weight in weights],
                                weights[0].context)
    return None if batch is None else _Launches(static, coefficients, arrays, batch)


def _cuda_batch() -> Any:
    """Imported where there is a GPU."""
    from . import cuda_batch
    return cuda_batch


#: type of context -> what prepares a list of parameters for kernels there, or returns None where operators must run it
KERNELS: Mapping[str, Callable[[Type[Rule], KernelKey, Tuple[str, ...], Arrays], Any]] = {
    'cpu': _loops, 'cpu_pinned': _loops, 'cpu_shared': _loops, 'gpu': _launches}


class _Namespace:
    """The array namespace of rules on mx.nd."""

    sqrt, exp, abs, sign = staticmethod(nd.sqrt), staticmethod(nd.exp), staticmethod(nd.abs), staticmethod(nd.sign)
    minimum, maximum = staticmethod(nd.minimum), staticmethod(nd.maximum)

    @staticmethod
    def standard_normal(x: Any) -> Any:
        """Samples in the form of ``x``, from the generator of its device."""
        return nd.random.normal(shape=x.shape, dtype=_name(x.dtype), ctx=x.context)

    @staticmethod
    def sum(x: Any) -> Any:
        return nd.sum(x.astype('float64')).astype(x.dtype)

    @staticmethod
    def half(x: Any) -> Any:
        return x.astype('float16').astype(x.dtype)

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Any:
        arrays = [a for a in (condition, x, y) if isinstance(a, nd.NDArray)]
        full = max(arrays, key=lambda a: a.size)  # the others are numbers, or have shape (1,)
        return nd.where(*(nd.full(full.shape, a, full.context, full.dtype) if not isinstance(a, nd.NDArray)
                          else a if a.shape == full.shape else a.broadcast_to(full.shape) for a in (condition, x, y)))


def _like(values: numpy.ndarray, x: Any) -> Any:
    """NumPy's ``values`` as an array like ``x``."""
    return nd.array(values, ctx=x.context, dtype=values.dtype)


class _Operators:
    """A list of parameters for MXNet's operators: nothing waits for a result, and temporaries are not kept."""

    update: Update

    def __init__(self, rule: Type[Rule], static: KernelKey, coefficients: Tuple[str, ...], arrays: Arrays):
        self.rule, self.static, self._arrays = rule, static, arrays

    def takes(self, update: Update) -> bool:
        """Whether ``update`` has the arrays of the last one."""
        return all(map(same_objects, self.update, update))

    def run(self, table: Sequence[Dict[str, float]], rows: Sequence[int], noise: Optional[Sequence[Counter]] = None) -> None:
        weights, gradients, slots, masters = self._arrays
        for i, row in enumerate(rows):
            xp = _Namespace if noise is None else Noise(_Namespace, *noise[i], array=_like)
            self._one(xp, table[row], weights[i], gradients[i], slots[i], masters[i] if masters else None)

    def _one(self, xp: Any, c: Dict[str, float], weight: Any, gradient: Any, slots: Tuple[Any, ...], master: Any) -> None:
        named = dict(zip((slot.name for slot in self.static.slots), slots))
        precision = 'float64' if weight.dtype == numpy.float64 else 'float32'
        exact = weight.astype(precision, copy=False) if master is None else master
        wide = {name: array.astype(precision, copy=False) for name, array in named.items()}
        new_weight, new_slots = self.rule.apply(xp, self.static, c, exact, gradient.astype(precision, copy=False), wide)
        for name, value in new_slots.items():
            value.astype(named[name].dtype, copy=False).copyto(named[name])
        if exact is weight or exact is master:
            new_weight.copyto(exact)
        if weight.dtype == numpy.float16:
            nd.cast(new_weight, dtype='float16', out=weight)


DTYPES = (numpy.float16, numpy.float32, numpy.float64)


def check_weight(rule: Type[Rule], weight: Any) -> None:
    """Refuse weights that no rule can update."""
    if weight.stype != 'default':
        raise TypeError(f'{rule.name} updates dense weights. Received: a weight of stype {weight.stype!r}. '
                        "Create the Parameter with stype='default'.")
    if weight.dtype not in DTYPES:
        raise TypeError(f'{rule.name} updates float16, float32 and float64 weights. Received: dtype {weight.dtype}. '
                        "Cast the block (net.cast('float32')), or give the parameter grad_req='null'.")


def _check(rule: Type[Rule], static: KernelKey, arrays: Arrays, slot_dtype: str) -> None:
    """Refuse arrays that do not belong together."""
    first = arrays.weights[0]
    for i, (weight, gradient, slots) in enumerate(zip(arrays.weights, arrays.gradients, arrays.slots)):
        check_weight(rule, weight)
        if gradient.stype != 'default':
            raise TypeError(f'{rule.name} takes dense gradients. Received: a gradient of stype {gradient.stype!r}. '
                            'Create the Embedding with sparse_grad=False.')
        if gradient.shape != weight.shape or gradient.dtype != weight.dtype:
            raise ValueError(f'A gradient must have the shape and dtype of its weight, {weight.shape} {_name(weight.dtype)}. '
                             f"Received: {gradient.shape} {_name(gradient.dtype)}. Pass the weight's own gradient.")
        if weight.dtype != first.dtype or weight.context != first.context:
            raise ValueError('One call updates weights of one dtype on one context. '
                             f'Received: {_name(first.dtype)} on {first.context} and {_name(weight.dtype)} on {weight.context}. '
                             'Call once for each.')
        expected = [(slot.shape(weight.shape) or (1,), _name(weight.dtype) if slot == COMPENSATION else slot_dtype)
                    for slot in static.slots]
        if isinstance(slots, (tuple, list)) and any(isinstance(array, (tuple, list)) for array in slots):
            mode = KAHAN if COMPENSATION in static.slots else False
            setting = f'multi_precision={mode!r}' if weight.dtype == numpy.float16 else _name(weight.dtype)
            raise ValueError(f'The state of parameter number {i} holds a float32 master, which {rule.name} keeps for float16 '
                             f'weights with multi_precision=True. Received: {setting}. Set it back, or start without states.')
        received = [(a.shape, _name(a.dtype)) for a in slots] if isinstance(slots, (tuple, list)) else None
        if received != expected:
            raise ValueError(f'The state of parameter number {i} does not belong to {rule.name}. Expected the slots '
                             f'{[slot.name for slot in static.slots]} of {expected}. Received: {received}. '
                             'Load states of this optimizer, or start without states.')
        if arrays.masters and (arrays.masters[i].shape, _name(arrays.masters[i].dtype)) != (weight.shape, 'float32'):
            raise ValueError(f'The master of a float16 weight of shape {weight.shape} must be float32 of that shape. Received: '
                             f'{arrays.masters[i].shape} {_name(arrays.masters[i].dtype)}. Load states of this network.')


def _name(dtype: Any) -> str:
    return str(numpy.dtype(dtype).name)
