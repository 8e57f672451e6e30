"""A rule as an `mx.optimizer.Optimizer`: `Runner`, the common part, and `RuleOptimizer`, the base of this package's own."""
import contextlib
import inspect
import math
import operator
import sys
import warnings
from typing import Any, ClassVar, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Set, Tuple, Type

import numpy

# submodules, not attributes of `mxnet`: a parameter server imports this file while `mxnet` is still being imported
from mxnet import ndarray as nd
from mxnet.optimizer import optimizer as mx_optimizer

from ..rules.base import BASE_HYPERS, Rule, scalars
from ..schema import Values, check_known, one_of
from ..states.model import MULTIPLIERS, ParameterInfo
from .executors import Executor, Update, check_weight
from .typing import TrainerLike
from .weights import keep_kvstore

__all__ = ['RuleOptimizer', 'Runner']

ROWS = 256  # sets of coefficients that are kept

# accepted by every MXNet optimizer, but not declared by rules
BASE_ARGUMENTS = ('lr_scheduler', 'begin_num_update', 'multi_precision', 'param_idx2name', 'param_dict', 'sym')


class Runner(mx_optimizer.Optimizer):
    """Updates lists of parameters with `rule`.

    A subclass defines its hyper-parameters (`_given`), the nesting of its states (`split_state`, `join_state`) and what
    counts as t (`_count`).
    """

    rule: ClassVar[Type[Rule]]
    _process_only: ClassVar[Tuple[str, ...]] = (  # never saved
        '_executor', '_read', '_checked', '_warned', '_followed', '_rows', '_rows_of', '_singly', '_skips', '_created',
        '_loaded_at')
    _checked: Tuple[Any, Values]
    begin_num_update: int
    _skips = False  # updates, until there is a finite `rescale_grad`

    def _set_up(self) -> None:
        """Create what lives as long as the process."""
        self._executor = Executor(self.rule, self.split_state, self.slot_dtype)
        self._read = operator.attrgetter(*self._attributes())
        self._checked = (None, Values())
        self._warned = False
        self._followed: Tuple[Any, Any] = (None, None)  # the parameters, and the contexts that they were on
        self._rows: Dict[Any, Dict[str, float]] = {}  # coefficients of the last steps with the hyper-parameters `_rows_of`
        self._rows_of: Any = None
        self._singly = False
        self._created: Optional[Set[Any]] = set()   # the parameters whose states were made here; None: of all, counts are known
        self._loaded_at: Optional[int] = None       # what begin_num_update was, where states without counts take t from it
        if 'mxnet.gluon.trainer' in sys.modules:  # a parameter server has none, and is still importing `mxnet`
            from .kvstore import update_together
            update_together()

    def __getstate__(self) -> Dict[str, Any]:
        state = super().__getstate__()
        for name in MULTIPLIERS:  # MXNet leaves out the parameters; without them, as on a server, it looks into these tables
            own = {index: getattr(parameter, name) for index, parameter in self.param_dict.items()}
            state[name] = {index: value for index, value in {**state[name], **own}.items() if index not in own or value != 1}
        return {name: value for name, value in state.items() if name not in self._process_only}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        self.rescale_grad = self.__dict__.pop('rescale_grad', 1.0)  # MXNet may have saved an array
        self._set_up()
        self._created = None
        # saved on some devices, continued on others
        self.set_update_counts(self.update_counts(), self.num_update)

    def for_servers(self) -> Any:
        """What becomes this optimizer where it is unpickled."""
        return self

    def __repr__(self) -> str:
        scheduler = self.lr_scheduler
        rate = {'learning_rate': self.lr} if scheduler is None else {'lr_scheduler': type(scheduler).__name__}
        values = ', '.join(f'{name}={value}' for name, value in {**rate, **self._given(), 'num_update': self.num_update}.items())
        return f'<{type(self).__name__}: {values}>'

    # -- hyper-parameters -------------------------------------------------------------------------------------------

    @property
    def rescale_grad(self) -> float:
        """The factor on gradients. It can be set to an array of one element too, as `Trainer.step(batch_size)` does where the
        batch size is one: if that is NaN or infinite, updates are skipped, and not counted, until the next one is set."""
        factor: float = self.__dict__['rescale_grad']
        return factor

    @rescale_grad.setter
    def rescale_grad(self, factor: Any) -> None:
        self._skips = False
        if isinstance(factor, nd.NDArray):
            if factor.size != 1:
                raise ValueError('`rescale_grad` must be one number, and so must the batch size. Received: an array of shape '
                                 f'{factor.shape}. Pass an array of one element, or a number.')
            factor = factor.asnumpy().item()
            self._skips = not math.isfinite(factor)
        if not self._skips:
            self.__dict__['rescale_grad'] = factor
        else:
            self.__dict__.setdefault('rescale_grad', 1.0)

    def _given(self) -> Dict[str, Any]:
        """The current hyper-parameters, except for the learning rate."""
        raise NotImplementedError

    def _attributes(self) -> List[str]:
        """The attributes that `_given` reads."""
        raise NotImplementedError

    def set_hyperparameters(self, h: Values) -> None:
        """Apply ``h``; its learning rate is ignored if there is a scheduler."""
        for name, value in h.asdict().items():
            if name != 'learning_rate':
                setattr(self, name, value)
            elif self.lr_scheduler is None:
                self.lr = value

    def hyperparameters(self) -> Values:
        """All current hyper-parameters, checked; with a scheduler, ``learning_rate`` is its ``base_lr``.

        Raises ValueError or TypeError, like the constructor.
        """
        rate = self.lr if self.lr_scheduler is None else self.lr_scheduler.base_lr
        attributes = rate, self._read(self)
        if attributes != self._checked[0]:
            self._checked = attributes, self.rule.hyperparameters(**self._given(), learning_rate=rate)
        return self._checked[1]

    # -- update counts ----------------------------------------------------------------------------------------------

    def update_counts(self) -> Dict[Any, int]:
        """The number of updates of each parameter index: the largest over all devices, begin_num_update not included."""
        merged = dict(self._restored_counts)
        for counts in self._all_index_update_counts.values():
            for index, count in counts.items():
                merged[index] = max(count, merged.get(index, count))
        return {index: count - self.begin_num_update for index, count in merged.items()}

    def set_update_counts(self, counts: Dict[Any, int], num_update: int) -> None:
        """Continue from ``counts`` (in the form of `update_counts`) on any devices."""
        self._restored_counts = {index: count + self.begin_num_update for index, count in counts.items()}
        self._all_index_update_counts = {0: dict(self._restored_counts)}
        self._index_update_count = self._all_index_update_counts[0]
        self.num_update = num_update

    def _set_current_context(self, device_id: int) -> None:
        self._follow_parameters()
        # MXNet starts a new device at begin_num_update, but a run resumed on it is further along
        if device_id not in self._all_index_update_counts:
            self._all_index_update_counts[device_id] = dict(self._restored_counts)
        super()._set_current_context(device_id)

    def _follow_parameters(self) -> None:
        """Look after the trainer whose parameters these are: it keeps its kvstore, and where `reset_ctx` has moved the
        parameters, counts, states and what is shared go with them."""
        parameter = next(iter(self.param_dict.values()), None)
        contexts = getattr(parameter, '_ctx_list', None)  # another list after each `reset_ctx`
        parameters, before = self._followed
        if parameters is self.param_dict and before is contexts:
            return
        trainer = getattr(parameter, '_trainer', None)
        if trainer is not None and trainer._optimizer is self:
            keep_kvstore(trainer)
            if contexts is not None and not trainer._update_on_kvstore:
                self._check_copies(trainer, contexts)
            if before is not None:
                self._move(trainer)
        self._followed = self.param_dict, contexts

    def _check_copies(self, trainer: TrainerLike, contexts: Sequence[Any]) -> None:
        """Refuse copies of the parameters, each updated where it is, that would drift apart or not be updated."""
        if len(contexts) > len(trainer._updaters):
            raise ValueError(f'The trainer updates as many copies of a parameter as there were when it was made, '
                             f'{len(trainer._updaters)}. Received: parameters on {contexts}. Save its states, and load them '
                             'into a new trainer.')

    def _move(self, trainer: TrainerLike) -> None:
        """Let any new devices start where the run is now."""
        self.set_update_counts(self.update_counts(), self.num_update)
        self.set_shared_state(self.shared_state())
        for updater in (*trainer._updaters, getattr(trainer._kvstore, '_updater', None)):
            if updater is not None:
                updater.states_synced = dict.fromkeys(updater.states, False)  # the updater moves them before the next update

    def _update_count(self, index: Any) -> None:
        counts = self._index_update_count
        for i in index if isinstance(index, (list, tuple)) else (index,):
            if i not in counts:
                counts[i] = self._first_count(i)
            counts[i] += 1
            self.num_update = max(counts[i], self.num_update)

    def _first_count(self, index: Any) -> int:
        """What MXNet's count of a parameter is before the first update here.

        A state that was not made here is from a file without counts, such as `Module.save_optimizer_states` writes:
        ``begin_num_update`` says how many updates it has seen, and is part of no other count from now on.
        """
        if self._created is None or index in self._created:
            return self.begin_num_update
        if self._loaded_at is None:
            self._loaded_at = self.begin_num_update
            self._take_begin()
        return self._loaded_at

    def _has_made(self, index: Any) -> None:
        """A state was made for the parameter: it has seen no update."""
        if self._created is not None:
            self._created.add(index)

    def _take_begin(self) -> None:
        begin = self.begin_num_update
        if not begin:
            self._warn_of_restart()
        for counts in (self._restored_counts, *self._all_index_update_counts.values()):
            counts.update([(index, count - begin) for index, count in counts.items()])
        self.begin_num_update = 0

    def _warn_of_restart(self) -> None:
        h = self.hyperparameters()
        if self.rule.all_coefficients(scalars, h, 1) != self.rule.all_coefficients(scalars, h, 2):
            warnings.warn(f'{self.rule.name} got states without update counts, as Module.save_optimizer_states and '
                          'Updater.get_states write them: its t restarts at 1. Pass begin_num_update, the number of updates '
                          'that the states have seen.', stacklevel=2)

    # -- states -----------------------------------------------------------------------------------------------------

    def split_state(self, state: Any, h: Values, mixed: bool) -> Tuple[Tuple[Any, ...], Any]:
        """The slots in the state of a parameter, in the order of ``rule.slots(h)``, and its float32 master where ``mixed``.

        Raises ValueError for a state of a different form.
        """
        raise NotImplementedError

    def join_state(self, slots: Tuple[Any, ...], master: Any, h: Values) -> Any:
        """The state made from ``slots`` and ``master``; the inverse of `split_state`."""
        raise NotImplementedError

    def slot_dtype(self, dtype: Any) -> str:
        """The type of the slots of a weight of type ``dtype``, or of its master."""
        return 'float64' if dtype == numpy.float64 else 'float32'

    def has_master(self, weight: Any) -> bool:
        return bool(self.multi_precision) and weight.dtype == numpy.float16

    # -- updates ----------------------------------------------------------------------------------------------------

    def update(self, index: Any, weight: Any, grad: Any, state: Any) -> None:
        """One update of one parameter, or of lists of parameters with the same dtype and context."""
        if not isinstance(index, (list, tuple)):
            index, weight, grad, state = [index], [weight], [grad], [state]
        self._update(index, weight, grad, state, False)

    def update_multi_precision(self, index: Any, weight: Any, grad: Any, state: Any) -> None:
        """`update`, with states as `create_state_multi_precision` makes them."""
        if not isinstance(index, (list, tuple)):
            index, weight, grad, state = [index], [weight], [grad], [state]
        self._update(index, weight, grad, state, bool(index) and self.has_master(weight[0]))

    def _update(self, indices: Sequence[Any], weights: Sequence[Any], gradients: Sequence[Any], states: Sequence[Any],
                mixed: bool) -> None:
        """``mixed``: the states contain masters."""
        if not indices or self._skips:
            return
        h = self.hyperparameters()
        key = (tuple(indices), weights[0].context)
        prepared = self._executor.prepare(key, Update(weights, gradients, states), h, mixed)
        prepared.run(*self._coefficients(h, indices, weights[0].dtype))

    def _coefficients(self, h: Values, indices: Sequence[Any], dtype: Any) -> Tuple[List[Dict[str, float]], List[int]]:
        """Count one update of each parameter. Returns the coefficients for each distinct `_count`, and for each parameter which
        of them it uses."""
        before = self._progress(), list(map(self._index_update_count.get, indices))
        try:
            keys = self._count_singly(indices) if self._singly else self._count(indices)
            distinct = {key: row for row, key in enumerate(dict.fromkeys(keys))}
            table = [self._known_row(h, key, dtype) for key in distinct]
        except Exception:  # including a scheduler's own: an update that does not happen is not counted
            self._uncount(indices, *before)
            raise
        return table, [distinct[key] for key in keys] if len(table) > 1 else [0] * len(keys)

    def _count_singly(self, indices: Sequence[Any]) -> List[Tuple[Any, ...]]:
        counts = set(map(self._index_update_count.get, indices))
        if len(counts) == 1 and not self.shared_state():
            return self._count(indices)  # the same, sooner
        return [key for index in indices for key in self._count([index])]

    @contextlib.contextmanager
    def counting_singly(self) -> Iterator[None]:
        """Count the parameters of a list one after the other, as if MXNet had asked for each alone.

        Where their counts differ a scheduler sees another one, and lars finds the ratio of rates for the first parameter only.
        """
        self._singly = True
        try:
            yield
        finally:
            self._singly = False

    def _known_row(self, h: Values, key: Tuple[Any, ...], dtype: Any) -> Dict[str, float]:
        """`_row`, computed once for all parameters that MXNet asks for one by one."""
        if h is not self._rows_of or len(self._rows) > ROWS:
            self._rows_of, self._rows = h, {}
        row = self._rows.get((key, dtype))
        if row is None:
            _, rate, wd, *_ = key
            if not (math.isfinite(rate) and math.isfinite(wd)):
                raise ValueError(f'Learning rate and decay must be finite. Received: learning_rate={rate!r}, wd={wd!r} for '
                                 f'update {self.num_update}. Check lr_scheduler, lr_mult and wd_mult. Nothing was updated.')
            row = self._row(h, key, dtype)
            if set(row) != set(self._executor.coefficients):
                raise ValueError(f'`coefficients` of {self.rule.name!r} must return the same names for every t: '
                                 f'{one_of(self._executor.coefficients)}. Received for t={key[0]}: {one_of(row)}. '
                                 'Return all of them each time. Nothing was updated.')
            self._rows[key, dtype] = row
        return row

    def _uncount(self, indices: Sequence[Any], progress: Dict[str, Any], counts: Sequence[Optional[int]]) -> None:
        """Undo the changes of `_count`."""
        self.__dict__.update(progress)
        for index, count in zip(indices, counts):
            if count is None:
                self._index_update_count.pop(index, None)
            else:
                self._index_update_count[index] = count

    def shared_state(self) -> Dict[str, Any]:
        """State of the optimizer as a whole, by attribute."""
        return {}

    def set_shared_state(self, values: Mapping[str, Any]) -> None:
        """Set what `shared_state` gives, for all devices."""
        self.__dict__.update(values)

    def variables(self, names: Mapping[Any, str]) -> Dict[str, numpy.ndarray]:
        """`shared_state` as it is saved; ``names`` are those of the parameters, by index. What is None is left out."""
        return {name: numpy.array(value, 'float64') for name, value in self.shared_state().items() if value is not None}

    def read_variables(self, variables: Mapping[str, numpy.ndarray], pairs: Mapping[Any, ParameterInfo]) -> Dict[str, Any]:
        """The `shared_state` that was saved as ``variables``; what is left out is as in a new optimizer. ``pairs`` are the saved
        parameters, by index.

        Raises ValueError for variables that are not those of this optimizer.
        """
        fresh = type(self)().shared_state() if self.shared_state() else {}
        self._check_variables(variables, fresh)
        for name, value in variables.items():
            if value.shape != () or not numpy.isfinite(value):
                raise ValueError(f'The variable {name!r} of {self.rule.name} must be one finite number. Received from the file: '
                                 f'{value.dtype}{list(value.shape)} {value.ravel()[:4].tolist()}. Restore another file.')
        return {name: variables[name].item() if name in variables else value for name, value in fresh.items()}

    def _check_variables(self, given: Iterable[str], known: Iterable[str]) -> None:
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f'The variables of {self.rule.name} must be among {one_of(sorted(known)) or "none"}. Received from '
                             f'the file: {one_of(unknown[:8])}. It was written by another version of gluon_optim.')

    def _progress(self) -> Dict[str, Any]:
        """The attributes that `_count` changes, besides the counts of the parameters."""
        return dict(self.shared_state(), num_update=self.num_update)

    def _count(self, indices: Sequence[Any]) -> List[Tuple[Any, ...]]:
        """Count one update of each parameter. Returns t, learning rate and decay of each, and whatever else `_row` needs."""
        self._update_count(indices)
        counts, begin = self._index_update_count, self.begin_num_update
        return list(zip([counts[index] - begin for index in indices], self._get_lrs(indices), self._get_wds(indices)))

    def _row(self, h: Values, key: Tuple[Any, ...], dtype: Any) -> Dict[str, float]:
        """The coefficients that go with ``key``, one of `_count`, for weights of type ``dtype``."""
        t, rate, wd = key
        return self.rule.all_coefficients(scalars, h.replace(learning_rate=rate, wd=wd), t)


class RuleOptimizer(Runner):
    """Base class of all optimizers of this package; a subclass only sets its `rule`.

    Parameters
    ----------
    learning_rate : float, optional
        Without it the scheduler's ``base_lr`` stays; without a scheduler the rule's default applies.
    wd, rescale_grad, clip_gradient, and the rule's own
        See the rule. Checked here, and again after every change. ``rescale_grad``, and with it the batch size given to
        `Trainer.step`, may be an array of one element: if it is NaN or infinite, updates are skipped and not counted.
    begin_num_update : int, optional
        The number of updates already done, for the scheduler. Each parameter's t starts at 1 all the same, unless its state
        comes from a file without counts, as `Module.save_optimizer_states` writes: then t continues from this number.
    lr_scheduler, multi_precision, param_idx2name, param_dict, sym
        As documented in `mx.optimizer.Optimizer`.

    Raises TypeError for an unknown argument or a wrong type, ValueError for a value out of range.

    float16 weights are updated in float32: from a float32 master with ``multi_precision=True``, else from the weight
    itself. Slots are float32, or float64 for float64 weights. Gradients are never modified.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if 'rule' in cls.__dict__:
            cls.__signature__ = _signature(cls.rule)
            cls.__doc__ = cls.__doc__ or cls.rule.__doc__

    def __init__(self, learning_rate: Any = None, **arguments: Any):
        declared = {hyper.name for hyper in self.rule.declared(arguments) + BASE_HYPERS}
        for name in arguments:
            check_known('argument', name, declared.union(BASE_ARGUMENTS), owner=self.rule.name)
        own = {name: arguments.pop(name) for name in declared.intersection(arguments)}
        factor = own.pop('rescale_grad', 1.0)
        if not isinstance(factor, nd.NDArray):  # else it is set when there is an optimizer
            own['rescale_grad'] = factor
        if learning_rate is not None:
            own['learning_rate'] = learning_rate
        h = self.rule.hyperparameters(**own)
        _check_begin(arguments.get('begin_num_update', 0))
        scheduler = arguments.get('lr_scheduler')
        rate = h.learning_rate if scheduler is None or learning_rate is not None else None
        if scheduler is not None and rate is not None:
            scheduler.base_lr = rate  # MXNet would do the same, and print a UserWarning object
        super().__init__(learning_rate=rate, wd=h.wd, rescale_grad=h.rescale_grad, clip_gradient=h.clip_gradient, **arguments)
        self._names = tuple(name for name in h.asdict() if name != 'learning_rate')
        for name in self._names:
            setattr(self, name, getattr(h, name))
        self.aggregate_num = 2 ** 31 - 1  # the updater passes all parameters of a dtype at once
        self._restored_counts: Dict[Any, int] = {}
        self._set_up()
        if isinstance(factor, nd.NDArray):
            self.rescale_grad = factor

    def _check_copies(self, trainer: TrainerLike, contexts: Sequence[Any]) -> None:
        super()._check_copies(trainer, contexts)
        if 'noise' in self.rule.needs and len(contexts) > 1:
            raise ValueError(f'{self.rule.name} must draw one noise for all copies of a parameter. Received: parameters on '
                             f'{contexts}, each updated where it is. Create the trainer with update_on_kvstore=True.')

    def _given(self) -> Dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def _attributes(self) -> List[str]:
        return list(self._names)

    def create_state(self, index: Any, weight: Any) -> Tuple[Any, ...]:
        """A tuple of the rule's slots for ``weight``, in the order of ``rule.slots``; shape (1,) for one number."""
        check_weight(self.rule, weight)
        self._has_made(index)
        dtype = 'float64' if weight.dtype == numpy.float64 else 'float32'
        return tuple(
            weight.astype(dtype) if slot.init == 'weight'
            else nd.full(slot.shape(weight.shape) or (1,), slot.init, ctx=weight.context, dtype=dtype)
            for slot in self.rule.slots(self.hyperparameters()))

    def create_state_multi_precision(self, index: Any, weight: Any) -> Any:
        """``(master, slots)`` for float16 weights with multi_precision, else the slots."""
        check_weight(self.rule, weight)
        if not self.has_master(weight):
            if weight.dtype == numpy.float16 and not self._warned:
                self._warned = True
                warnings.warn(f'{self.rule.name} updates float16 weights without a float32 master: small updates round away. '
                              'Pass multi_precision=True.', stacklevel=2)
            return self.create_state(index, weight)
        master = weight.astype('float32')
        return master, self.create_state(index, master)

    def split_state(self, state: Any, h: Values, mixed: bool) -> Tuple[Tuple[Any, ...], Any]:
        if not mixed:
            return state, None
        if not (isinstance(state, (tuple, list)) and len(state) == 2 and isinstance(state[1], (tuple, list))):
            raise ValueError(f'{self.rule.name} with multi_precision keeps (master, slots) per float16 parameter. '
                             'Received a state without a master. Load states that were saved with '
                             'multi_precision=True, or start without states.')
        return tuple(state[1]), state[0]

    def join_state(self, slots: Tuple[Any, ...], master: Any, h: Values) -> Any:
        return slots if master is None else (master, slots)


def _check_begin(begin: Any) -> None:
    if isinstance(begin, bool) or not isinstance(begin, int) or begin < 0:
        raise (ValueError if isinstance(begin, int) else TypeError)(
            f'`begin_num_update` must be a whole number, 0 or more. Received: begin_num_update={begin!r}. '
            'Pass the number of updates already done, for the scheduler.')


def _signature(rule: Type[Rule]) -> inspect.Signature:
    """The signature that ``help`` shows: MXNet's name for each argument, and its default."""
    own = [(hyper.name, None if hyper.name == 'learning_rate' else hyper.default) for hyper in rule.hypers + BASE_HYPERS]
    base = [('lr_scheduler', None), ('begin_num_update', 0), ('multi_precision', False)]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature([inspect.Parameter(name, keyword, default=default) for name, default in own + base])
