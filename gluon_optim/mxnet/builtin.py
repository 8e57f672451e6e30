"""Drop-ins for the optimizers of MXNet 1.9.1: the same results, state and pickle, updated by compiled loops.

`accelerate` makes the built-in names create them; `gluon_optim.create` always does. Each class is a subclass of the one
that it replaces: constructor, states, multipliers and counts are MXNet's own code, the update is a rule from
`gluon_optim.rules.mx`. What MXNet keeps on the optimizer (nadam's momentum schedule, lars's rates, lbsgd's gradients)
stays there, once per device.
"""
import copy
import copyreg
import functools
import inspect
import logging
import numbers
import weakref
from typing import Any, ClassVar, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple, Type

import numpy

# submodules, not attributes of `mxnet`: a parameter server imports this file while `mxnet` is still being imported
from mxnet import ndarray as nd
from mxnet.ndarray import sparse
from mxnet.ndarray.ndarray import NDArray
from mxnet.ndarray.ndarray import array as nd_array
from mxnet.optimizer import optimizer as mx_optimizer

from .. import rules
from ..rules.base import BASE_HYPERS, scalars
from ..rules.compensated import KAHAN
from ..rules.mx import DROP_INS
from ..rules.mx.base import MXRule
from ..rules.mx.lbsgd import Accumulation
from ..rules.mx.nadam import momentum
from ..rules.runtimes import draws_itself, runs_on
from ..schema import Hyper, Values, check_known, one_of
from ..states.model import ParameterInfo
from ..states.mxnet_files.builtins import BUILTINS, Builtin
from .distributed.start import for_every_trainer
from .executors import Executor, Update, check_weight, has_kernels
from .noise import Sampler
from .optimizer import Runner

__all__ = ['accelerate', 'accelerated', 'create', 'drop_in', 'restore_builtins']

if not hasattr(mx_optimizer, 'SGD'):
    raise ImportError('The drop-ins are for the optimizers of MXNet 1.9.1, but this is another version. '
                      'Use its own: mx.optimizer.create.')

log = logging.getLogger('gluon_optim')
_in_use: 'weakref.WeakSet[DropIn]' = weakref.WeakSet()
_told: 'Set[Type[DropIn]]' = set()  # of which it was said that one of MXNet's own is in use beside them


class DropIn(Runner):
    """Base class of all drop-ins; a subclass derives from it and from the MXNet class that it replaces.

    ``declared``
        What the class of MXNet keeps, and how it nests that: its entry in `BUILTINS`. Its ``variables`` are state of the
        optimizer as a whole. Each device has its own, or replicas would drift apart.
    ``attributes``
        Arguments that MXNet keeps under another name.
    ``off_at_zero``
        Arguments for which MXNet ignores 0 and negative values.
    ``single_slots``
        Whether MXNet makes float32 slots for weights of any type, and then cannot update others. Here they are float64
        for float64 weights.

    float16 weights without a master are computed in float32, and rounded when they are stored, as are their slots.
    row_sparse weights and gradients are handed to MXNet's own update. A NaN or infinite rate is a ValueError.
    """

    rule: ClassVar[Type[MXRule]]
    replaces: ClassVar[Type[mx_optimizer.Optimizer]]
    declared: ClassVar[Builtin]
    attributes: ClassVar[Mapping[str, str]] = {}
    off_at_zero: ClassVar[Tuple[str, ...]] = ('clip_gradient',)
    single_slots: ClassVar[bool] = False

    _process_only = (*Runner._process_only, '_restored_counts', '_device', '_parked', '_rate')

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__bases__ == (DropIn,):
            return  # what several of them share
        cls.replaces = cls.__bases__[-1]
        cls.rule, cls.declared = DROP_INS[cls.__name__.lower()], BUILTINS[cls.__name__.lower()]
        cls.attributes = {argument: attribute for attribute, argument in cls.declared.arguments.items()}
        cls.__doc__ = cls.__doc__ or cls.rule.__doc__
        cls.__signature__ = inspect.signature(cls.replaces)
        CLASSES[cls.rule.name] = cls

    def __init__(self, *args: Any, **kwargs: Any):
        self.check_mode(kwargs.get('multi_precision'))
        super().__init__(*args, **kwargs)
        self._restored_counts: Dict[Any, int] = {}
        self._set_up()
        self.hyperparameters()

    @classmethod
    def check_mode(cls, multi_precision: Any) -> None:
        """Refuse compensations."""
        if multi_precision == KAHAN:
            raise ValueError(f"`multi_precision` of {cls.rule.name} must be False or True, because its state is MXNet's own. "
                             f"Received: multi_precision={KAHAN!r}. Pass True, for float32 masters, or create an optimizer of "
                             "gluon_optim, such as 'adamw' or 'sgd_torch': gluon_optim.list_optimizers() names them.")

    def _mode(self, weight: Any) -> Any:
        self.check_mode(self.multi_precision)   # it may have been set since
        return super()._mode(weight)

    def _set_up(self) -> None:
        super()._set_up()
        self.set_shared_state({})
        _in_use.add(self)
        _take_over_loading()

    # -- pickling: as MXNet's class ----------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> Any:
        # not copyreg.__newobj__, which refuses another class than that of the object
        return copyreg._reconstructor, (self.replaces, object, None), self.__getstate__()  # type: ignore[attr-defined]

    def __setstate__(self, state: Dict[str, Any]) -> None:
        mode = {'multi_precision': True} if state.get('multi_precision') == KAHAN else {}   # MXNet takes a text for True
        super().__setstate__(dict(state, **mode, _restored_counts={}))

    def __copy__(self) -> 'DropIn':
        return _restored(type(self), self.__getstate__())

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'DropIn':
        return _restored(type(self), copy.deepcopy(self.__getstate__(), memo))

    def for_servers(self) -> Any:
        return _AsDropIn(self)

    # -- hyper-parameters -------------------------------------------------------------------------------------------

    def _given(self) -> Dict[str, Any]:
        given = {hyper.name: getattr(self, attribute) for hyper, attribute in zip(self._hypers(), self._attributes())}
        for name in self.off_at_zero:
            if isinstance(given[name], numbers.Real) and given[name] <= 0:
                given[name] = None
        return given

    def _hypers(self) -> Tuple[Hyper, ...]:
        return self.rule.hypers[1:] + BASE_HYPERS

    def _attributes(self) -> List[str]:
        return [self.attributes.get(hyper.name, hyper.name) for hyper in self._hypers()]

    def set_hyperparameters(self, h: Values) -> None:
        super().set_hyperparameters(Values(**{self.attributes.get(name, name): value for name, value in h.asdict().items()}))

    # -- states -----------------------------------------------------------------------------------------------------

    def create_state(self, index: Any, weight: Any) -> Any:
        """MXNet's own state for ``weight``."""
        if weight.stype == 'default':
            check_weight(self.rule, weight)
        self._has_made(index)
        state = super().create_state(index, weight)
        if not self.single_slots or weight.dtype != numpy.float64:
            return state
        return state.astype('float64') if isinstance(state, NDArray) else tuple(array.astype('float64') for array in state)

    def slot_dtype(self, dtype: Any) -> str:
        return 'float32' if self.single_slots and dtype == numpy.float16 else numpy.dtype(dtype).name

    def split_state(self, state: Any, h: Values, mixed: Any) -> Tuple[Tuple[Any, ...], Any]:
        master = None
        if mixed:
            if not (isinstance(state, (tuple, list)) and len(state) == 2):
                raise ValueError(f'{self.rule.name} with multi_precision keeps a float32 master per float16 parameter. Received: a '
                                 'state without. Load states that were saved with multi_precision=True, or start without states.')
            state, master = state if self.declared.master_last else state[::-1]
        arrays = state if isinstance(self.declared.state, tuple) and isinstance(state, (tuple, list)) else (state,)
        return tuple(array for array in arrays if array is not None), master

    def join_state(self, slots: Tuple[Any, ...], master: Any, h: Values) -> Any:
        named = {slot.name: array for slot, array in zip(self.rule.slots(h), slots)}
        tree = self.declared.state
        state = tuple(map(named.get, tree)) if isinstance(tree, tuple) else named.get(tree or '')
        if master is None:
            return state
        return (state, master) if self.declared.master_last else (master, state)

    # -- what belongs to the optimizer as a whole -------------------------------------------------------------------

    def shared_state(self) -> Dict[str, Any]:
        """The variables of the most recently updated device."""
        return {name: copy.copy(getattr(self, name)) for name in self.declared.variables}

    def set_shared_state(self, values: Mapping[str, Any]) -> None:
        super().set_shared_state(values)
        self._device: Any = None                                            # the device they belong to; None: not known yet
        self._parked: Dict[Any, Dict[str, Any]] = {None: self.shared_state()}  # those of other devices; None: those for a new one

    def _enter_device(self, device_id: int) -> None:
        super()._enter_device(device_id)
        if self.declared.variables and device_id != self._device:
            if self._device is not None:
                self._parked[self._device] = self.shared_state()
            values = self._parked.get(device_id, self._parked[None])
            self.__dict__.update({name: copy.copy(value) for name, value in values.items()})
            self._device = device_id

    # -- updates ----------------------------------------------------------------------------------------------------

    def _update(self, indices: Sequence[Any], weights: Sequence[Any], gradients: Sequence[Any], states: Sequence[Any],
                mixed: Any) -> None:
        if self._skips:
            return
        if runs_on(self.rule, 'kernels') and {*map(type, weights), *map(type, gradients)} <= {NDArray}:
            super()._update(indices, weights, gradients, states, mixed)
            return
        self.hyperparameters()  # checked here too
        dense = []
        for one in zip(indices, weights, gradients, states):
            if runs_on(self.rule, 'kernels') and not any(isinstance(array, sparse.BaseSparseNDArray) for array in one[1:3]):
                dense.append(one)
            else:
                self._by_mxnet([one], mixed)
        if dense:
            indices, weights, gradients, states = zip(*dense)
            super()._update(indices, weights, gradients, states, mixed)

    def _by_mxnet(self, ones: Iterable[Tuple[Any, ...]], mixed: bool) -> None:
        """Hand index, weight, gradient and state of each parameter to MXNet's own update."""
        update = self.replaces.update_multi_precision if mixed else self.replaces.update
        for one in ones:
            update(self, *one)

    def _take_begin(self) -> None:
        if not self.begin_num_update:
            self._warn_of_restart()  # else MXNet's count, which is t here, begins there

    def _count(self, indices: Sequence[Any]) -> List[Tuple[Any, ...]]:
        rates = self._rates(indices)
        counts = self._index_update_count  # including begin_num_update
        return list(zip([counts[index] for index in indices], rates, self._get_wds(indices)))

    def _rates(self, indices: Sequence[Any]) -> List[float]:
        """Count and query the rates in MXNet's order: the scheduler sees what has been counted so far."""
        size = self._counted_together()
        if self.lr_scheduler is not None and size < len(indices):
            begin = self.begin_num_update
            seen = [self._index_update_count.get(index, begin) for index in indices]
            if seen[0] < max(seen):  # else the first parameter counts for all
                return [rate for i in range(0, len(indices), size) for rate in self._rates(indices[i:i + size])]
        self._update_count(indices)
        rates: List[float] = self._get_lrs(indices)
        return rates

    def _counted_together(self) -> int:
        """The number of parameters for which MXNet queries rates at once."""
        return 1

    def _row(self, h: Values, key: Tuple[Any, ...], dtype: Any) -> Dict[str, float]:
        t, rate, wd, *supplied = key
        values = dict(zip(self.rule.supplied, supplied), learning_rate=rate, wd=wd)
        numbers = self.rule.numbers(scalars, 'float64' if dtype == numpy.float64 else 'float32')
        return self.rule.all_coefficients(numbers, h.replace(**values), t)


class _AsDropIn:
    """A drop-in on its way to a server, which is to run the drop-in and not MXNet's class."""

    def __init__(self, optimizer: DropIn):
        self.optimizer = optimizer

    def __reduce__(self) -> Any:
        return _restored, (type(self.optimizer), self.optimizer.__getstate__())


CLASSES: Dict[str, Type[DropIn]] = {}


# The drop-ins --------------------------------------------------------------------------------------------------------

class WithMomentum(DropIn):
    def split_state(self, state: Any, h: Values, mixed: Any) -> Tuple[Tuple[Any, ...], Any]:
        slots, master = super().split_state(state, h, mixed)
        return (slots if h.momentum > 0 else ()), master  # it may have been set to 0 since


class SGD(WithMomentum, mx_optimizer.SGD):
    def _counted_together(self) -> int:
        return max(int(self.__dict__['aggregate_num']), 1)


class SGLD(Sampler, DropIn, mx_optimizer.SGLD):
    temperature = 1.0
    noise = 'mxnet'
    _rate: float

    def __init__(self, temperature: float = 1.0, noise: str = 'mxnet', **arguments: Any):
        self.temperature, self.noise = temperature, noise
        super().__init__(**arguments)

    def __getstate__(self) -> Dict[str, Any]:
        state = super().__getstate__()
        for name in ('temperature', 'noise'):
            if state.get(name) == getattr(SGLD, name):
                del state[name]  # as MXNet has it
        return state

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.temperature != 1:
            raise ValueError(f"The temperature of an sgld that is pickled must be 1, for MXNet's own has none. Received: "
                             f'temperature={self.temperature!r}. Save with go.save_states or go.save_checkpoint.')
        if self.noise != 'mxnet':
            raise ValueError("The noise of an sgld that is pickled must be MXNet's, for MXNet's own knows no other. Received: "
                             f'noise={self.noise!r}. Save with go.save_states or go.save_checkpoint.')
        return super().__reduce_ex__(protocol)

    def _count(self, indices: Sequence[Any]) -> List[Tuple[Any, ...]]:
        keys = super()._count(indices)
        for index, (_, rate, _) in zip(indices, keys):
            self._check_rate(index, rate)
        return keys

    def _check_rate(self, index: Any, rate: float) -> None:
        if not rate >= 0:
            parameter = self.param_dict.get(index)
            name = self.idx2name.get(index, index) if parameter is None else parameter.name
            raise ValueError(f'The learning rate of sgld must be 0 or more. Received: {rate!r} for the parameter '
                             f'{name!r}. Look at learning_rate, lr_scheduler and lr_mult. It was not updated.')

    def _update(self, indices: Sequence[Any], weights: Sequence[Any], gradients: Sequence[Any], states: Sequence[Any],
                mixed: Any) -> None:
        """MXNet's, where the rate is not 0. With that a parameter stays, and MXNet fails later: it has no normal distribution
        of deviation 0. The rule's, at another temperature and with noise of its own."""
        h = self.hyperparameters()
        if draws_itself(self.rule, h):
            Runner._update(self, indices, weights, gradients, states, mixed)
            return
        for index, weight, gradient, state in zip(indices, weights, gradients, states):
            if self._skips:
                return
            if h.temperature != 1:
                tempered = self._executor.prepare((index, weight.context), Update([weight], [gradient], [state]), h, mixed)
            before = self._progress(), [self._index_update_count.get(index)]
            self._rate, = self._rates([index])
            if self._rate == 0:
                continue
            if self._rate > 0 and h.temperature != 1:
                key = self._index_update_count[index], self._rate, *self._get_wds([index])
                try:
                    row = self._known_row(h, key, weight.dtype)
                except ValueError:
                    self._uncount([index], *before)
                    raise
                tempered.run([row], [0])
                continue
            self._uncount([index], *before)
            self._check_rate(index, self._rate)
            super()._update([index], [weight], [gradient], [state], mixed)

    def _get_lr(self, index: Any) -> float:
        """What MXNet's update takes: a scheduler is asked once."""
        return self._rate


class LBSGD(WithMomentum, mx_optimizer.LBSGD):
    _process_only = (*DropIn._process_only, '_accumulation', '_own_sums', '_numbers')

    def _set_up(self) -> None:
        super()._set_up()
        self._accumulation = Executor(Accumulation, lambda state, h, mixed: ((), None), self.slot_dtype)
        self._numbers: Dict[Any, int] = {}        # of gradients, with those of the update that is being counted
        self._own_sums: Dict[Any, NDArray] = {}   # by parameter and device: only these arrays are added to in place

    def _update(self, indices: Sequence[Any], weights: Sequence[Any], gradients: Sequence[Any], states: Sequence[Any],
                mixed: bool) -> None:
        """Add the gradients up, and update those parameters that have got the last one of batch_scale."""
        if not indices or self._skips:
            return
        h = self.hyperparameters()
        half = any(weight.dtype == numpy.float16 for weight in weights) and not mixed
        plain = {*map(type, weights), *map(type, gradients)} <= {NDArray} and has_kernels(weights[0].context)
        if not plain or (half and h.warmup_strategy == 'lars'):   # MXNet squares in float16 for the norms
            self._by_mxnet(zip(indices, weights, gradients, states), mixed)
            return
        if mixed and h.batch_scale > 1:   # MXNet adds up in float32
            slots, masters = zip(*[self.split_state(state, h, mixed) for state in states])
            self._update(indices, masters, [g.astype('float32') for g in gradients], [s[0] if s else None for s in slots], False)
            for weight, master in zip(weights, masters):
                nd.cast(master, dtype='float16', out=weight)
            return
        held = [self._get_cum_gradient(index) for index in indices]
        first = [not (one and one['num_cums'] > 0 and isinstance(one['cum_grad'], NDArray)) for one in held]
        numbers = [one['num_cums'] + 1 if one and one['num_cums'] > 0 else self.init_updates + 1 for one in held]
        due = [i for i, number in enumerate(numbers) if number % self.batch_scale == 0]
        context = weights[0].context   # a kvstore leaves gradients on others
        adding = self._adding(indices, gradients, held, first, context) if h.batch_scale > 1 else []
        sums = [self._own_sums[index, context] for index in indices] if adding else gradients
        own = [[values[i] for i in due] for values in (indices, weights, sums, states)]
        update = self._executor.prepare((tuple(own[0]), context), Update(*own[1:]), h, mixed) if due else None
        self._executor.use(h)
        self._numbers = dict(zip(indices, numbers))
        table, rows = self._coefficients(h, indices, weights[0].dtype)
        for prepared in adding:
            prepared.run([{'rescale_grad': 1.0}], [0] * len(prepared.update.weights))
        if update is not None:
            update.run(table, [rows[i] for i in due])
        self.cumgrads.update((index, {'cum_grad': 0 if number % self.batch_scale == 0 else total, 'num_cums': number})
                             for index, number, total in zip(indices, numbers, sums))

    def _adding(self, indices: Sequence[Any], gradients: Sequence[NDArray], held: Sequence[Dict[str, Any]], first: Sequence[bool],
                context: Any) -> List[Any]:
        """What adds the gradients to the sums of their parameters: those that start one, and those that have one."""
        for index, gradient, one, starts in zip(indices, gradients, held, first):
            own, total = self._own_sums.get((index, context)), None if starts else one['cum_grad']
            if own is None or own.shape != gradient.shape or own.dtype != gradient.dtype:
                own = self._own_sums[index, context] = nd.zeros(gradient.shape, context, gradient.dtype)
            if total is not None and total is not own:
                total.copyto(own)   # one that was loaded, perhaps on another device
        prepared = []
        for starts in (True, False):
            members = [i for i, one in enumerate(first) if one is starts]
            if members:
                sums = [self._own_sums[indices[i], context] for i in members]
                update = Update(sums, [gradients[i] for i in members], [()] * len(members))
                key = starts, tuple(map(indices.__getitem__, members)), context
                prepared.append(self._accumulation.prepare(key, update, Accumulation.hyperparameters(first=starts), False))
        return prepared

    def _count(self, indices: Sequence[Any]) -> List[Tuple[Any, ...]]:
        keys = super()._count(indices)
        # t of the rule counts gradients
        return [(number - self.init_updates, rate, wd) for number, (_, rate, wd) in
                zip(map(self._numbers.__getitem__, indices), keys)]

    def _rates(self, indices: Sequence[Any]) -> List[float]:
        """Each parameter's before it is counted."""
        rates = []
        for index in indices:
            rates.append(self._get_lr(index))
            self._update_count(index)
        return rates

    @property
    def begin_epoch(self) -> float:
        return float(self.init_updates / self.updates_per_epoch)

    def set_hyperparameters(self, h: Values) -> None:
        self.init_updates = int(h.begin_epoch * h.updates_per_epoch)
        super().set_hyperparameters(Values(**{name: value for name, value in h.asdict().items() if name != 'begin_epoch'}))

    def variables(self, names: Mapping[Any, str]) -> Dict[str, numpy.ndarray]:
        """Each parameter's sum of gradients and their number, under the same names as for MXNet's own files."""
        found = {}
        for index, held in self.cumgrads.items():
            total = held['cum_grad']  # the number 0 after an update
            found[f'cum_grad:{names[index]}'] = total.asnumpy() if isinstance(total, NDArray) else numpy.array(total, 'int64')
            found[f'num_cums:{names[index]}'] = numpy.array(held['num_cums'], 'int64')
        return found

    def read_variables(self, variables: Mapping[str, numpy.ndarray], pairs: Mapping[Any, ParameterInfo]) -> Dict[str, Any]:
        self._check_variables((key.partition(':')[0] for key in variables), ('cum_grad', 'num_cums'))
        cumgrads = {index: held for index, held in self.cumgrads.items() if index not in pairs}
        for index, info in pairs.items():
            total, number = variables.get(f'cum_grad:{info.name}'), variables.get(f'num_cums:{info.name}')
            if total is None and number is None:
                continue
            if total is None or number is None or not (_is_sum(total, info.shape) and _is_number(number)):
                raise ValueError(f'lbsgd keeps a sum of gradients of the shape {list(info.shape)} for {info.name}, or 0, and how '
                                 f'many they are. Received from the file: cum_grad {total!r:.200} and num_cums {number!r:.200}. '
                                 'Restore another file.')
            cumgrads[index] = {'cum_grad': nd_array(total, dtype=total.dtype) if total.shape else 0, 'num_cums': number.item()}
        return {'cumgrads': cumgrads}

    def _cumulate_gradient(self, grad: Any, index: Any) -> Dict[str, Any]:
        held = self._get_cum_gradient(index)
        if isinstance(held.get('cum_grad'), NDArray):
            held['cum_grad'] = held['cum_grad'].as_in_context(grad.context)  # perhaps saved on another device
        elif not held and self.batch_scale > 1:
            grad = grad.copy()  # MXNet keeps the array itself
        cumulated: Dict[str, Any] = super()._cumulate_gradient(grad, index)
        return cumulated


def _is_sum(total: numpy.ndarray, shape: Tuple[int, ...]) -> bool:
    """Whether ``total`` can be a sum of gradients; MXNet keeps the number 0 after an update."""
    return (total.shape == shape and total.dtype.kind == 'f') or (total.shape == () and bool(total == 0))


def _is_number(number: numpy.ndarray) -> bool:
    return number.shape == () and number.dtype.kind in 'iu' and bool(number >= 0)


class NAG(WithMomentum, mx_optimizer.NAG):
    pass


class LARS(WithMomentum, mx_optimizer.LARS):
    _get_lrs = mx_optimizer.LARS._get_lrs  # it remembers the rate

    def _counted_together(self) -> int:
        return 2 ** 31 - 1  # a second query would lose the last rate

    def _count(self, indices: Sequence[Any]) -> List[Tuple[Any, ...]]:
        keys = super()._count(indices)
        correct = self.momentum_correction and self.last_lr != 0
        correction = self.cur_lr / self.last_lr if correct else 1.0
        return [(*key, correction, self._adapts(index)) for key, index in zip(keys, indices)]

    def _adapts(self, index: Any) -> float:
        return 1.0 - str(self.idx2name.get(index, index)).endswith(('gamma', 'beta', 'bias'))


class Signum(DropIn, mx_optimizer.Signum):
    pass


class DCASGD(DropIn, mx_optimizer.DCASGD):
    pass


class Adam(DropIn, mx_optimizer.Adam):
    pass


class Adamax(DropIn, mx_optimizer.Adamax):
    pass


class Nadam(DropIn, mx_optimizer.Nadam):
    def _count(self, indices: Sequence[Any]) -> List[Tuple[Any, ...]]:
        h = self.hyperparameters()
        keys = []
        for t, rate, wd in super()._count(indices):
            self.m_schedule *= momentum(scalars, h, t)
            # with 0 for what is lost beside 1, hundreds of parameters have the same coefficients
            keys.append((t, rate, wd, self.m_schedule if 1 - self.m_schedule < 1 else 0.0))
        return keys


class LAMB(DropIn, mx_optimizer.LAMB):
    off_at_zero = ('clip_gradient', 'lower_bound', 'upper_bound')


class FTML(DropIn, mx_optimizer.FTML):
    pass


class Ftrl(DropIn, mx_optimizer.Ftrl):
    single_slots = True


class AdaGrad(DropIn, mx_optimizer.AdaGrad):
    off_at_zero = ()
    single_slots = True


class AdaDelta(DropIn, mx_optimizer.AdaDelta):
    off_at_zero = ()
    single_slots = True


class RMSProp(DropIn, mx_optimizer.RMSProp):
    off_at_zero = ('clip_gradient', 'clip_weights')
    single_slots = True

    def join_state(self, slots: Tuple[Any, ...], master: Any, h: Values) -> Any:
        return slots if master is None else (master, slots)  # what is not needed is left out


# Creating them -------------------------------------------------------------------------------------------------------

def create(name: str, *args: Any, **kwargs: Any) -> DropIn:
    """The drop-in for the built-in optimizer ``name``, with MXNet's arguments."""
    return CLASSES[name.lower()](*args, **kwargs)


def accelerate(*names: str) -> None:
    """Make built-in names create the drop-ins: in `gluon.Trainer`, `Module.fit`, `mx.optimizer.create` and everywhere else.

    Parameters
    ----------
    *names : str
        Such as 'adam', 'sgd'. Without any: all that have a drop-in.

    The drop-ins continue states that MXNet saved, and vice versa. Optimizers that already exist do not change until they
    load states, nor does what a class makes, ``mx.optimizer.Adam()``: pass that to `accelerated`. Where such a one is saved or
    restored, the log says so once.

    Raises ValueError for a name that is not one of MXNet's built-in optimizers.

    >>> import gluon_optim as go, mxnet as mx
    >>> go.accelerate('adam')
    >>> type(mx.optimizer.create('adam')).__module__
    'gluon_optim.mxnet.builtin'
    >>> go.restore_builtins()
    >>> type(mx.optimizer.create('adam')).__module__
    'mxnet.optimizer.optimizer'
    """
    from .kvstore import update_together  # not on a parameter server, which imports this file too early for it

    for name in names:
        _check_name(name)
    registry = mx_optimizer.Optimizer.opt_registry
    for name in map(str.lower, names or CLASSES):
        if registry[name] is CLASSES[name].replaces:  # a class registered by the user under that name stays
            registry[name] = CLASSES[name]
    _take_over_loading()
    update_together()
    for_every_trainer(True)


def accelerated(optimizer: mx_optimizer.Optimizer) -> mx_optimizer.Optimizer:
    """The drop-in in the state of ``optimizer``, for one that its class made: `accelerate` replaces names only.

    Parameters
    ----------
    optimizer : mx.optimizer.Optimizer
        Of a built-in class. It shares its scheduler and its multipliers with the drop-in, and is not to be used any more.
        One of this package is returned as it is.

    Raises TypeError for an optimizer of another class.

    >>> import gluon_optim as go, mxnet as mx
    >>> optimizer = go.accelerated(mx.optimizer.Adam(learning_rate=0.01, beta1=0.8))
    >>> type(optimizer).__module__, optimizer.lr, optimizer.beta1
    ('gluon_optim.mxnet.builtin', 0.01, 0.8)
    """
    if isinstance(optimizer, Runner):
        return optimizer
    cls = _of(optimizer)
    if cls is None:
        path = f'{type(optimizer).__module__}.{type(optimizer).__qualname__}'
        raise TypeError(f'`accelerated` takes an optimizer of one of the classes of MXNet: {one_of(sorted(CLASSES))}. '
                        f'Received: {path}. Others have no drop-in.')
    cls.check_mode(optimizer.multi_precision)
    return drop_in(optimizer)


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f'`accelerate` takes names of optimizers, one of {one_of(sorted(CLASSES))}. Received: {name!r}.')
    if name.lower() in rules.names(samplers=True) and name.lower() not in CLASSES:
        raise ValueError(f'{name!r} is an optimizer of gluon_optim, not a drop-in for one of MXNet. There is nothing to replace: '
                         f'gluon_optim.create({name!r}) creates it. The drop-ins are {one_of(sorted(CLASSES))}.')
    check_known('built-in optimizer', name.lower(), CLASSES, ValueError)
    registered, cls = mx_optimizer.Optimizer.opt_registry[name.lower()], CLASSES[name.lower()]
    if registered not in (cls, cls.replaces):
        raise ValueError(f'{name!r} must be the optimizer of MXNet. Received: a name under which '
                         f'{registered.__module__}.{registered.__qualname__} was registered. Use another name for that.')


def restore_builtins() -> None:
    """Undo `accelerate`: the built-in names create MXNet's classes again. Existing drop-ins stay.

    Raises nothing, even if there is nothing to undo.

    >>> import gluon_optim as go, mxnet as mx
    >>> go.accelerate('sgd')
    >>> go.restore_builtins()
    >>> type(mx.optimizer.create('sgd')).__module__
    'mxnet.optimizer.optimizer'
    """
    registry = mx_optimizer.Optimizer.opt_registry
    registry.update((name, cls.replaces) for name, cls in CLASSES.items() if registry[name] is cls)
    for_every_trainer(False)
    _told.clear()
    _give_back_loading()


def tell_of_class(optimizer: mx_optimizer.Optimizer) -> None:
    """Log, once for each class, that `accelerate` has not reached ``optimizer``: its name creates a drop-in, but it is none."""
    cls = _of(optimizer)
    if cls is not None and cls not in _told and mx_optimizer.Optimizer.opt_registry[cls.rule.name] is cls:
        _told.add(cls)
        path = f'{cls.replaces.__module__}.{cls.replaces.__qualname__}'
        log.warning('%s is not accelerated: it was made by its class, not by its name, or before accelerate(). Give the trainer '
                    'gluon_optim.accelerated(optimizer).', path)


def twin(optimizer: mx_optimizer.Optimizer) -> Optional[DropIn]:
    """A drop-in with the attributes of ``optimizer``, to read its states and write them, if it is of a class that has one."""
    if _of(optimizer) is None:
        return None
    copied: DropIn = drop_in(optimizer)
    _in_use.discard(copied)  # nobody trains with it
    _give_back_loading()
    return copied


def drop_in(optimizer: mx_optimizer.Optimizer) -> mx_optimizer.Optimizer:
    """The drop-in with the state of ``optimizer`` if its class has one; otherwise ``optimizer`` itself."""
    cls = _of(optimizer)
    if cls is None:
        return optimizer
    replacement = _restored(cls, optimizer.__getstate__())
    replacement.param_dict = optimizer.param_dict
    return replacement


def _of(optimizer: mx_optimizer.Optimizer) -> Optional[Type[DropIn]]:
    return next((cls for cls in CLASSES.values() if cls.replaces is type(optimizer)), None)


def _restored(cls: Type[DropIn], state: Dict[str, Any]) -> DropIn:
    optimizer = cls.__new__(cls)
    optimizer.__setstate__(state)
    return optimizer


# Loading -------------------------------------------------------------------------------------------------------------

_set_states = mx_optimizer.Updater.set_states  # MXNet's


def _take_over_loading() -> None:
    """Make updaters that ran a drop-in, or have an accelerated optimizer, continue with a drop-in after loading states."""
    mx_optimizer.Updater.set_states = _set_states_and_drop_in


def _give_back_loading() -> None:
    """Let MXNet load as it does on its own, where no drop-in is in use."""
    registry = mx_optimizer.Optimizer.opt_registry
    if not _in_use and not any(registry.get(name) is cls for name, cls in CLASSES.items()):
        mx_optimizer.Updater.set_states = _set_states


@functools.wraps(_set_states)
def _set_states_and_drop_in(self: mx_optimizer.Updater, states: bytes) -> None:
    ran_one = isinstance(self.optimizer, DropIn)
    _set_states(self, states)
    if ran_one or mx_optimizer.Optimizer.opt_registry.get(type(self.optimizer).__name__.lower()) is _of(self.optimizer):
        self.optimizer = drop_in(self.optimizer)
    # MXNet decides once, when the updater is made, and the next step of another optimizer would fail
    self.aggregate_updates = self.optimizer.aggregate_num > 0
