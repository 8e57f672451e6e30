"""The states of a `gluon.Trainer`: saved, restored, and their digest.

Everything is checked before anything is changed. What is saved does not depend on devices: one copy of the slots under
each parameter's name, and the number of updates of each parameter.
"""
import contextlib
import itertools
import logging
import os
import platform
import warnings
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import mxnet
import numpy
from mxnet import gluon, kvstore
from mxnet import ndarray as nd

from ..display import Rows, table, text
from ..models.gluon import facts_of as facts_of_block
from ..rules.compensated import COMPENSATION, KAHAN, mode_of, with_compensation
from ..schema import Slot, Values, one_of, some_of
from ..states import container
from ..states.matching import completes, match
from ..states.model import (
    ACCUMULATED,
    BATCHES_PER_UPDATE,
    MULTIPLIERS,
    STATISTICS,
    Array,
    OptimizerStates,
    ParameterInfo,
    digest,
    is_accumulated,
)
from ..states.mxnet_files import mxnet2
from .distributed import remote
from .distributed.ranks import agreeing, sharing
from .distributed.received import is_hollow, received
from .distributed.start import start_together
from .native import Builtin, Stranger, adapted, how_to_continue, to_mxnet_state
from .old_files import read_for
from .scheduler_states import SchedulerPlan, export_scheduler, keep, plan_scheduler
from .typing import BlockLike, ParameterLike, TrainerLike, UpdaterLike
from .weights import devices_of, keep_kvstore, remember, write_weight

__all__ = ['LoadReport', 'export_states', 'import_states', 'load_states', 'save_states', 'states_digest']

log = logging.getLogger('gluon_optim')
_PIECE = 1 << 18  # number of elements copied from a device at once
# what AMP's loss scaler does and our Scaler can do otherwise
_OF_AMP = {'scale_factor': 2.0, 'backoff_factor': 0.5, 'min_loss_scale': 0.0}


@dataclass(repr=False)
class LoadReport:
    """What `load_states` did; ``str(report)`` is the line that it logs."""

    total: int                                              # parameters that are trained or have a state
    step: int                                               # num_update
    restored: List[str] = field(default_factory=list)       # names whose state was restored
    missing: List[str] = field(default_factory=list)        # trained here, but not in the file
    unexpected: List[str] = field(default_factory=list)     # in the file, but not in the trainer
    mismatched: List[str] = field(default_factory=list)     # in both: one sentence each why it does not fit
    rewritten: List[str] = field(default_factory=list)      # weights that were not the rounded master, but now are
    warnings: List[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return text(f'<LoadReport: {self}>', self._rows())

    def _repr_html_(self) -> str:
        return table(f'LoadReport: {self}', self._rows())

    def _rows(self) -> Rows:
        lists = [(word, getattr(self, word)) for word in ('missing', 'unexpected', 'mismatched', 'rewritten')]
        return [*((word, some_of(names)) for word, names in lists if names), *(('warning', line) for line in self.warnings)]

    def __str__(self) -> str:
        return f'restored {len(self.restored)} of {self.total} parameters at step {self.step}'

    def log(self) -> None:
        log.info('%s', self)
        if self.rewritten:
            log.info('rewrote %d weights from their float32 masters: %s', len(self.rewritten), one_of(self.rewritten))


def save_states(trainer: TrainerLike, path: container.Path, net: Optional[BlockLike] = None) -> None:
    """Save the optimizer's state, update counts, hyper-parameters and scheduler to ``path``.

    Parameters
    ----------
    trainer : gluon.Trainer
    path : str or os.PathLike
        Afterwards the complete new file is there or, after an error, whatever was there before. docs/FORMAT.md describes it.
    net : gluon.Block, optional
        With it, parameters are saved under their structural names (``0.weight``), which are the same in every process;
        otherwise under ``Parameter.name``.

    Raises TypeError for a scheduler, or an attribute or state of somebody else's optimizer, that cannot be saved, ValueError for
    parameters that have no shape yet or names that repeat, OSError where the file system refuses.

    >>> import tempfile, gluon_optim as go
    >>> import mxnet as mx
    >>> net = mx.gluon.nn.Dense(1, in_units=2)
    >>> net.initialize()
    >>> trainer = mx.gluon.Trainer(net.collect_params(), 'novograd')
    >>> with mx.autograd.record():
    ...     loss = net(mx.nd.ones((4, 2))).sum()
    >>> loss.backward()
    >>> trainer.step(batch_size=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     go.save_states(trainer, f'{folder}/trainer.states', net=net)
    ...     go.read_states(f'{folder}/trainer.states').names
    ['bias', 'weight']
    """
    check_trainer(trainer)
    with sharing(remote.ranks_of([trainer]), 'save_states') as shared:
        if shared.ranks:
            start(trainer)
        if shared.first:
            container.write(path, export_states(trainer, net, Pieces))


def load_states(trainer: TrainerLike, path: container.Path, net: Optional[BlockLike] = None, strict: bool = True,
                hyperparameters: str = 'file', part: Optional[str] = None) -> LoadReport:
    """Restore what `save_states` saved, or MXNet's `Trainer.save_states`, on whatever devices the trainer has.

    Parameters
    ----------
    trainer : gluon.Trainer
        Must run the same optimizer. Parameters may be loaded before or after. Parameters with shapes left out
        (``in_units``) take them from the file, and are initialized.
    path, net
        As for `save_states`; the states in one of MXNet's ``.states`` files follow the trainer's order of parameters, and
        nothing in it is executed. Structural names are compared first, then `Parameter.name`; if no name matches, names
        that differ only in their automatic numbers are matched in order, with a warning.
    strict : bool
        False restores every parameter that fits and leaves the others unchanged; the report lists them.
    hyperparameters : 'file' or 'current'
        Which hyper-parameters apply after loading. 'file' restores the saved hyper-parameters and the scheduler; 'current' keeps
        the trainer's and advances its scheduler to the saved number of updates. Both warn of each value that differs, those of
        the schedule included. ``lr_mult`` and ``wd_mult`` of parameters are among them, but those in MXNet's own files never
        apply.
    part : str, optional
        Which trainer, by the name it was saved under, of a checkpoint that holds several.

    Returns
    -------
    LoadReport
        Its text, "restored N of M parameters at step T", is also logged to 'gluon_optim'.

    Raises StateFileError (a ValueError) for a damaged file, ValueError for states of another optimizer, or names, shapes
    or types that do not fit. In that case nothing has been changed. Any other error, such as too little memory, puts back
    whatever was changed before it.

    >>> import tempfile, gluon_optim as go
    >>> import mxnet as mx
    >>> net = mx.gluon.nn.Dense(1, in_units=2)
    >>> net.initialize()
    >>> trainer = mx.gluon.Trainer(net.collect_params(), 'novograd')
    >>> with mx.autograd.record():
    ...     loss = net(mx.nd.ones((4, 2))).sum()
    >>> loss.backward()
    >>> trainer.step(batch_size=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     go.save_states(trainer, f'{folder}/trainer.states', net=net)
    ...     print(go.load_states(trainer, f'{folder}/trainer.states', net=net))
    restored 2 of 2 parameters at step 1
    """
    check_trainer(trainer)
    ranks = remote.ranks_of([trainer])
    parts, _ = received(ranks, 'load_states', {'': trainer}, lambda: (
        {'': (read_for(path, trainer, _parameters(trainer, net), part), None)}, os.fspath(path)))
    return import_states(trainer, parts[''][0], net, strict, hyperparameters)


def states_digest(trainer: TrainerLike, net: Optional[BlockLike] = None) -> str:
    """SHA-256 over the state: equal exactly if two trainers would continue alike, given the same rates and gradients.

    It covers the optimizer's name, num_update and, by sorted name, the types and shapes of weights, counts, and the bytes of
    slots and masters, but not devices, hyper-parameters or paths.

    ``trainer`` and ``net`` as for `save_states`; raises the same TypeError and ValueError.

    >>> import gluon_optim as go
    >>> from mxnet import gluon
    >>> def digest_of(name):
    ...     net = gluon.nn.Dense(1, in_units=2, prefix='dense_')
    ...     net.initialize()
    ...     return go.states_digest(gluon.Trainer(net.collect_params(), name))
    >>> digest_of('novograd') == digest_of('novograd'), digest_of('novograd') == digest_of('adamw')
    (True, False)
    """
    check_trainer(trainer)
    with sharing(remote.ranks_of([trainer]), 'states_digest') as shared:
        if shared.ranks:
            start(trainer)
        if shared.first:
            shared.result = digest(export_states(trainer, net, Pieces))
    return str(shared.result)


def import_states(trainer: TrainerLike, states: OptimizerStates, net: Optional[BlockLike] = None, strict: bool = True,
                  hyperparameters: str = 'file') -> LoadReport:
    """Put ``states`` into ``trainer``. Parameters, report and errors are those of `load_states`."""
    ranks = remote.ranks_of([trainer])
    with contextlib.ExitStack() as undo:
        with agreeing(ranks, 'load_states'):
            states = by_either_name(states, net, _parameters(trainer, net))
            finish_deferred(undo, trainer, states, net)
            plan = plan_import(trainer, states, net, strict, hyperparameters)
            plan.warn()
        remember(undo, plan.may_write())
        report = plan.apply(undo)
        undo.pop_all()
    report.log()
    return report


def plan_import(trainer: TrainerLike, states: OptimizerStates, net: Optional[BlockLike], strict: bool,
                hyperparameters: str) -> 'StatesPlan':
    """The part of `import_states` that can fail; the trainer's weights, states and optimizer stay unchanged.

    Weights may be loaded before the plan is applied: only then are they compared with their masters.
    """
    optimizer = _optimizer(trainer, states.optimizer)
    if getattr(getattr(optimizer, 'twin', optimizer), 'version', 1) == 2:  # a drop-in on MXNet 2.x
        states = mxnet2.as_drop_in(states)
    if states.optimizer == 'mxnet.adamw':  # which has no rule to be put under
        raise _other_optimizer(trainer, optimizer, states.optimizer)
    otherwise = mxnet2.not_in_rule(states)
    saved = states
    states = replace(states, variables={name: array for name, array in states.variables.items() if not is_accumulated(name)})
    states = mxnet2.as_rule(states, allow_lossy=True)
    if hyperparameters not in ('file', 'current'):
        raise ValueError(f"`hyperparameters` must be 'file' or 'current'. Received: hyperparameters={hyperparameters!r}.")
    if states.optimizer.lower() != name_of(optimizer).lower():
        raise _other_optimizer(trainer, optimizer, states.optimizer)
    stranger = isinstance(optimizer, Stranger)
    h = optimizer.merged(states.hypers, hyperparameters) if stranger else _hyperparameters(optimizer, states, hyperparameters)
    scheduler = plan_scheduler(optimizer.lr_scheduler, optimizer.num_update, states.scheduler, states.num_update, hyperparameters)
    present = _parameters(trainer, net)
    fit = _match(trainer, optimizer, states, present, () if stranger else optimizer.rule.slots(h), strict)
    _check_shapes(trainer)
    keyed = {key: info for i, info in fit.pairs.items() for key in keys_of(trainer, i)}
    if stranger:
        optimizer.check_order(states, keyed)
    shared = (optimizer.read_others(states, contexts_of(trainer)[0]) if stranger
              else optimizer.read_variables(states.variables, keyed))
    # a Module has them from its symbol, or from the user
    multipliers = 'current' if isinstance(trainer, StandIn) else hyperparameters
    notes = [*fit.notes, *(f'The optimizers here are those of MXNet 1.x, which lose {line}.' for line in otherwise),
             *_differences(trainer, optimizer, states, hyperparameters),
             *_other_multipliers(trainer, fit.pairs, present, multipliers), *scheduler.notes]
    scaler, scales = _loss_scaler(trainer, states, hyperparameters, notes)
    accumulated = _accumulated(trainer, saved, fit.pairs, notes)
    if remote.on_servers(trainer):
        arrays: Dict[int, List[Any]] = {i: [] for i, info in fit.pairs.items() if info.name in states.slots}
    else:
        _start_kvstore(trainer)
        arrays = _to_devices(trainer, optimizer, states, fit, h)
    return StatesPlan(trainer, optimizer, states, present, fit, h, fit.pairs if multipliers == 'file' else {}, arrays, scheduler,
                      shared, scaler, scales, accumulated, notes)


def _other_optimizer(trainer: TrainerLike, optimizer: Any, saved: str) -> ValueError:
    word, name = word_of(trainer), name_of(optimizer)
    return ValueError(f'The states are of {saved!r}, the {word} runs {name!r}. '
                      f'{how_to_continue(saved, word)}, or load states of {name!r}.')


class StatesPlan(NamedTuple):
    """States known to fit a trainer, on its devices: all that remains is to put them in place."""

    trainer: TrainerLike
    optimizer: Any                      # one of ours, or what stands for another
    states: OptimizerStates
    present: List[ParameterInfo]
    fit: '_Fit'
    h: Values
    multipliers: Dict[int, ParameterInfo]  # index -> what has the multipliers that it gets
    arrays: Dict[int, List[Any]]        # the states of each index, for each updater
    scheduler: SchedulerPlan
    shared: Dict[str, Any]              # the optimizer's `shared_state`
    scaler: Any
    scales: Dict[str, Any]
    accumulated: Dict[str, Any]
    notes: List[str]

    def warn(self) -> None:
        """Warn about differences before anything changes, so that warnings turned into errors leave everything unchanged."""
        for note in self.notes:
            warnings.warn(note, stacklevel=4)

    def may_write(self) -> List[Any]:
        """The parameters with weights that `apply` may change."""
        # MXNet overwrites all copies of a weight with the first device's
        starts = bool(self.trainer._params_to_init) and len(contexts_of(self.trainer)) > 1
        return [parameter for i, parameter in enumerate(self.trainer._params)
                if starts or (i in self.fit.pairs and self.fit.pairs[i].name in self.states.master)]

    def apply(self, undo: contextlib.ExitStack, weights: Optional[Mapping[int, numpy.ndarray]] = None) -> LoadReport:
        """Restore the states; ``undo`` gets what takes back everything but the weights, which the caller remembers, and what is
        on servers. ``weights``, by index, are those that servers get with them."""
        trainer, optimizer, pairs = self.trainer, self.optimizer, self.fit.pairs
        keep(undo, vars(trainer._optimizer))
        optimizer.lr_scheduler = self.scheduler.apply(undo)
        optimizer.set_hyperparameters(self.h)
        for i, info in self.multipliers.items():
            _set_multipliers(trainer._params[i], info, undo)
        optimizer.set_shared_state(self.shared)
        _set_counts(trainer, optimizer, self.states, pairs)
        if self.scales:
            keep(undo, vars(self.scaler))
            vars(self.scaler).update(self.scales)
        if self.accumulated:
            accumulate: Any = trainer._accumulate  # type: ignore[attr-defined]
            keep(undo, vars(accumulate))
            vars(accumulate).update(self.accumulated)
        start(trainer, undo)
        rewritten = _rewrite_weights(trainer, self.states, pairs)
        if remote.on_servers(trainer):
            load = remote.load_of(optimizer, self.states, pairs, self.fit.slots, self.h)
            load.weights.update((i, value) for i, value in (weights or {}).items() if i not in load.weights)
            remote.send(trainer, load)
        else:
            for updater in _updaters(trainer):
                keep(undo, updater.states)
                keep(undo, updater.states_synced)
            _install(trainer, self.arrays, pairs)
        names = [info.name for info in self.present]
        trained = sum(i in self.arrays or parameter.grad_req != 'null' for i, parameter in enumerate(trainer._params))
        return LoadReport(trained, self.states.num_update, [names[i] for i in self.arrays], self.fit.missing, self.fit.unexpected,
                          self.fit.mismatched, [names[i] for i in rewritten], self.notes)


class StandIn:
    """Base class of what is saved and restored like a `gluon.Trainer`, and has its attributes (`TrainerLike`)."""

    word = 'trainer'  # what errors call it

    def keys(self, index: int) -> List[Any]:
        """`keys_of` this."""
        raise NotImplementedError

    def facts(self) -> Optional[Dict[str, Any]]:
        """What a conversion must know about the layers, as `facts_of`."""
        raise NotImplementedError

    def weights_written(self, undo: contextlib.ExitStack) -> None:
        """What a Trainer does before its next step; ``undo`` gets what takes it back."""
        raise NotImplementedError


def weights_written(trainer: Optional[TrainerLike], undo: contextlib.ExitStack) -> None:
    """To be called after `write_weight` for all weights."""
    if isinstance(trainer, StandIn):
        trainer.weights_written(undo)


def word_of(trainer: TrainerLike) -> str:
    return trainer.word if isinstance(trainer, StandIn) else 'trainer'


# Checks of a trainer

def check_trainer(trainer: TrainerLike) -> None:
    if not isinstance(trainer, (gluon.Trainer, StandIn)):
        raise TypeError(f'`trainer` must be a gluon.Trainer. Received: {type(trainer).__name__}.')


def _optimizer(trainer: TrainerLike, saved_as: str = '') -> Any:
    """The optimizer of ``trainer`` if it is one of ours, else what stands for it; ``saved_as`` is what a file calls it."""
    check_trainer(trainer)
    return adapted(trainer._optimizer, contexts_of(trainer), saved_as)


def name_of(optimizer: Any) -> str:
    """What files call the optimizer."""
    return optimizer.name if isinstance(optimizer, Stranger) else optimizer.rule.name


def _check_shapes(trainer: TrainerLike) -> None:
    deferred = [p.name for p in trainer._params if p._deferred_init]
    if deferred:
        raise ValueError(f'Shapes of parameters must be known. Received: deferred parameters {some_of(deferred)}. '
                         'Run one forward pass first: net(batch).')


def check_savable(trainer: TrainerLike, net: Optional[BlockLike] = None) -> None:
    """Raise what `export_states` would raise of a trainer that has not trained yet; nothing is copied or started."""
    optimizer = _optimizer(trainer)
    _parameters(trainer, net)
    export_scheduler(optimizer.lr_scheduler)
    optimizer.hyperparameters()
    if trainer._kv_initialized:
        _start_kvstore(trainer)  # which then has nothing to start, and refuses states that are on servers
    if isinstance(optimizer, Stranger):
        optimizer.others()
        held = _updaters(trainer)[0].states if trainer._kv_initialized and not remote.on_servers(trainer) else {}
        for index, state in held.items():
            optimizer.take_apart(trainer._params[index].name, state)


def finish_deferred(undo: contextlib.ExitStack, trainer: TrainerLike, states: OptimizerStates, net: Optional[BlockLike]) -> None:
    """Initialize the trainer's parameters with shapes left out that the file has, as the first forward pass would.

    Those that do not fit stay as they are, for `plan_import` to refuse.
    """
    deferred = {i: parameter for i, parameter in enumerate(trainer._params) if parameter._deferred_init}
    if not deferred:
        return
    present = _parameters(trainer, net)
    for i, j in match(states.parameters, present).pairs.items():
        shape = tuple(states.parameters[j].shape)
        if i in deferred and 0 not in shape and completes(shape, deferred[i].shape):
            keep(undo, vars(deferred[i]))
            deferred[i].shape = shape
            deferred[i]._finish_deferred_init()


def by_either_name(states: OptimizerStates, net: Optional[BlockLike], present: Sequence[ParameterInfo]) -> OptimizerStates:
    """``states`` under the present names where a shared parameter has another name in the file."""
    return states.renamed(other_names(states.names, [info.name for info in present], states, net))


def other_names(saved: Sequence[str], present: Sequence[str], states: OptimizerStates, net: Optional[BlockLike]) -> Dict[str, str]:
    """Of saved names that are not present: the present name of the same shared parameter, as the net or the file has it."""
    missing = set(saved) - set(present)
    if not missing or net is None:
        return {}
    here = {name: first for name, first in facts_of_block(net).shared.items() if name in missing}
    there = {first: name for name, first in (states.facts or {}).get('shared', {}).items() if first in missing and name in present}
    return {**there, **here}


def start(trainer: TrainerLike, undo: Optional[contextlib.ExitStack] = None) -> None:
    """Do what the first step does before it updates."""
    _start_kvstore(trainer)
    waiting, deferred = trainer._params_to_init, []
    fresh = len(waiting) == len(trainer._params) and not trainer._distributed
    if undo is not None and fresh and not isinstance(trainer._kvstore_params['kvstore'], kvstore.KVStoreBase):
        undo.callback(type(trainer)._reset_kvstore, trainer)  # a user's own kvstore cannot be recreated
    try:
        while waiting:  # one by one: when one fails, those before it must not be initialized again, which a kvstore refuses
            trainer._params_to_init = waiting[:1]
            trainer._init_params()
            deferred += trainer._params_to_init
            waiting = waiting[1:]
    finally:
        trainer._params_to_init = deferred + waiting
    if trainer._distributed:
        start_together(trainer._kvstore, len(trainer._params) - len(trainer._params_to_init))


def _start_kvstore(trainer: TrainerLike) -> None:
    """The part of `start` that does not change weights."""
    keep_kvstore(trainer)
    if not trainer._kv_initialized:
        trainer._init_kvstore()


def _updaters(trainer: TrainerLike) -> List[UpdaterLike]:
    """The holders of the states: the kvstore's single updater, or one per context."""
    return [trainer._kvstore._updater] if trainer._update_on_kvstore else trainer._updaters


def keys_of(trainer: TrainerLike, index: int) -> List[Any]:
    """The keys of a parameter in the updaters, and in the counts of their optimizer: one for each of `_updaters`."""
    return trainer.keys(index) if isinstance(trainer, StandIn) else [index] * len(_updaters(trainer))


def contexts_of(trainer: TrainerLike) -> List[Any]:
    """The devices of the parameters, in their order: `reset_ctx` may have moved them since the trainer was made."""
    for parameter in trainer._params:
        return devices_of(parameter)
    return list(trainer._contexts if hasattr(trainer, '_contexts') else trainer._devices)


def _parameters(trainer: TrainerLike, net: Optional[BlockLike]) -> List[ParameterInfo]:
    """The trainer's parameters in its order, with their structural names if ``net`` has them."""
    places: Dict[int, str] = {}
    if net is not None:
        if not isinstance(net, gluon.Block):
            raise TypeError(f'`net` must be the gluon.Block that is trained. Received: {type(net).__name__}.')
        collect = getattr(net, '_collect_params_with_prefix', None) or net.collect_params  # MXNet 1.x, 2.x
        for place, parameter in collect().items():
            places.setdefault(id(parameter), place)  # a shared parameter goes by its first name
        if trainer._params and not any(id(parameter) in places for parameter in trainer._params):
            raise ValueError(f"`net` must be the Block that is trained. Received: one that has none of the trainer's parameters, "
                             f'{one_of([parameter.name for parameter in trainer._params][:4])}, ... Pass the net that '
                             'gave the trainer its parameters.')
    infos = [ParameterInfo(places.get(id(p), p.name), p.name, shape_of(p), numpy.dtype(p.dtype).name,
                           float(p.lr_mult), float(p.wd_mult), p.grad_req) for p in trainer._params]
    names = [info.name for info in infos]
    if len(set(names)) < len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f'Parameter names must be unique. Received twice: {one_of(repeated[:8])}. '
                         'Pass net=, the Block that they belong to.')
    return infos


def shape_of(parameter: ParameterLike) -> Tuple[int, ...]:
    """The shape of the parameter's data: `Parameter.shape` of a SymbolBlock is None for ever."""
    return tuple(parameter.shape or () if parameter._data is None else parameter._data[0].shape)


def facts_of(net: Optional[BlockLike]) -> Optional[Dict[str, Any]]:
    """What a conversion must know about the layers of ``net``, in the form used in files; None without a net."""
    return None if net is None else facts_of_block(net).record()


# Out of a trainer

class Pieces:
    """An NDArray for `container.write` and `digest`, which copy it piece by piece."""

    def __init__(self, array: Any, shape: Optional[Tuple[int, ...]] = None):
        self.array = array
        self.shape = tuple(array.shape) if shape is None else shape
        self.dtype = numpy.dtype(array.dtype)

    def reshape(self, shape: Tuple[int, ...]) -> 'Pieces':
        return Pieces(self.array, shape)

    def chunks(self) -> Iterator[numpy.ndarray]:
        flat = self.array.reshape(-1)
        for i in range(0, flat.size, _PIECE):
            yield flat[i:i + _PIECE].asnumpy()


def export_states(trainer: TrainerLike, net: Optional[BlockLike] = None,
                  copy: Callable[[Any], Array] = nd.NDArray.asnumpy) -> OptimizerStates:
    """The state of ``trainer``, by default as separate NumPy arrays. Raises what `save_states` raises."""
    optimizer = _optimizer(trainer)
    _check_shapes(trainer)
    infos = _parameters(trainer, net)
    scheduler = export_scheduler(optimizer.lr_scheduler)
    h = optimizer.hyperparameters()
    start(trainer)
    keys = [keys_of(trainer, index) for index in range(len(infos))]
    if remote.on_servers(trainer):
        optimizer, scheduler, held = remote.held_by(trainer, infos)
    else:
        held = _updaters(trainer)[0].states
    counts = optimizer.update_counts()
    slots: Dict[str, Dict[str, Array]] = {}
    masters, trees = {}, {}
    attributes: Dict[str, Any] = {}
    for info, (key, *_) in zip(infos, keys):
        if key not in held:
            continue
        if isinstance(optimizer, Stranger):
            trees[info.name], arrays = optimizer.take_apart(info.name, held[key])
            slots[info.name] = {place: _copied(array, copy) for place, array in arrays.items()}
            continue
        arrays, master = optimizer.split_state(held[key], h, mode_of(optimizer.multi_precision, info.dtype))
        slots[info.name] = {slot.name: _copied(array, copy).reshape(()) if slot.like == 'scalar' else _copied(array, copy)
                            for slot, array in zip(_slots(optimizer, info, optimizer.rule.slots(h)), arrays)}
        if master is not None:
            masters[info.name] = _copied(master, copy)
    if isinstance(optimizer, Stranger):
        attributes, arrays = optimizer.others()
        variables = {key: _copied(array, copy) for key, array in arrays.items()}
    else:
        variables = optimizer.variables({key: info.name for info, own in zip(infos, keys) for key in own})
    accumulate = getattr(trainer, '_accumulate', None)
    if accumulate is not None:
        variables = {**variables, **accumulate.variables(copy)}
    return OptimizerStates(
        optimizer=name_of(optimizer),
        hypers=h.asdict(),
        num_update=optimizer.num_update,
        parameters=infos,
        counts={info.name: max(counts.get(key, 0) for key in own) for info, own in zip(infos, keys)},
        slots=slots,
        master=masters,
        scheduler=scheduler,
        variables=variables,
        loss_scaler=_scaler_state(trainer),
        producer=producer(),
        trees=trees,
        attributes=attributes,
        facts=trainer.facts() if isinstance(trainer, StandIn) else facts_of(net))


def _copied(array: Any, copy: Callable[[Any], Array]) -> Array:
    """``copy`` of an array of MXNet; NumPy's, which optimizers of other people may keep, are copied at once, and those on servers
    where they are not read in pieces."""
    if isinstance(array, remote.Remote):
        return array if copy is Pieces else array.asnumpy()
    return copy(array) if isinstance(array, nd.NDArray) else numpy.array(array)


def _scaler_state(trainer: TrainerLike) -> Optional[Dict[str, Any]]:
    """What the trainer's loss scaler holds: a `gradients.Scaler`, or AMP's."""
    scaler: Any = getattr(trainer, '_amp_loss_scaler', None)
    if scaler is None:
        return None
    return dict(scaler.state_dict()) if _is_ours(scaler) else {key.lstrip('_'): value for key, value in vars(scaler).items()}


def _is_ours(scaler: Any) -> bool:
    return hasattr(scaler, 'read_state')


def _slots(optimizer: Any, info: ParameterInfo, slots: Sequence[Slot]) -> Sequence[Slot]:
    """What the optimizer keeps of a parameter besides its master; ``slots`` are those of the rule."""
    return with_compensation(tuple(slots)) if mode_of(optimizer.multi_precision, info.dtype) == KAHAN else slots


def producer() -> Dict[str, str]:
    from .. import __version__
    return {'gluon_optim': __version__, 'mxnet': mxnet.__version__, 'python': platform.python_version()}


# Into a trainer: checks

class _Fit(NamedTuple):
    pairs: Dict[int, ParameterInfo]    # the trainer's index -> the saved parameter that provides its state
    slots: Sequence[Slot]
    missing: List[str]
    unexpected: List[str]
    mismatched: List[str]
    notes: List[str]


def _match(trainer: TrainerLike, optimizer: Any, states: OptimizerStates, present: List[ParameterInfo], slots: Sequence[Slot],
           strict: bool) -> _Fit:
    """Match the parameters. Raises ValueError if something does not fit and ``strict`` is true."""
    pairs, note = match(states.parameters, present)
    missing = [info.name for i, info in enumerate(present) if i not in pairs and trainer._params[i].grad_req != 'null']
    unexpected = [info.name for j, info in enumerate(states.parameters)
                  if j not in pairs.values() and (info.name in states.slots or not info.name.endswith(STATISTICS))]
    misfits = {i: _misfit(trainer, i, optimizer, slots, present[i], states.parameters[j], states) for i, j in pairs.items()}
    mismatched = [misfit for misfit in misfits.values() if misfit]
    if strict and (missing or unexpected or mismatched):
        problems = [f'{what}: {"; ".join(found[:8])}{f"; and {len(found) - 8} more" if len(found) > 8 else ""}' for what, found in (
            (f'in the {word_of(trainer)} only', missing), ('in the file only', unexpected), ('different', mismatched)) if found]
        raise ValueError(f'The states must have the same parameters. Received: {". ".join(problems)}. Nothing was changed. '
                         'Pass strict=False to restore what fits.')
    fitting = {i: states.parameters[j] for i, j in pairs.items() if not misfits[i]}
    return _Fit(fitting, slots, missing, unexpected, mismatched, [note] if note else [])


def _misfit(trainer: TrainerLike, index: int, optimizer: Any, slots: Sequence[Slot], present: ParameterInfo, saved: ParameterInfo,
            states: OptimizerStates) -> str:
    """Why the saved state does not fit the present parameter, or '' if it does."""
    if tuple(saved.shape) != present.shape or saved.dtype != present.dtype:
        return f'{present.name} is {present.dtype}{list(present.shape)}, in the file {saved.dtype}{list(saved.shape)}'
    if saved.name not in states.slots:
        return ''
    if isinstance(optimizer, Stranger):
        return optimizer.misfit(keys_of(trainer, index)[0], trainer._params[index], saved, states)
    master = states.master.get(saved.name)
    kept = True if master is not None else KAHAN if COMPENSATION.name in states.slots[saved.name] else False
    mode = mode_of(optimizer.multi_precision, present.dtype)
    if kept != mode:
        have = {True: 'has a float32 master', KAHAN: 'has a compensation', False: 'has no float32 master'}[kept]
        return (f'{present.name} {have} in the file, the {word_of(trainer)} has multi_precision={mode!r}: create it with '
                f'multi_precision={kept!r}')
    dtype = optimizer.slot_dtype(numpy.dtype('float32' if master is not None else present.dtype))
    needed = {slot.name: (present.dtype if slot == COMPENSATION else dtype, slot.shape(present.shape))
              for slot in _slots(optimizer, present, slots)}
    arrays = dict(states.slots[saved.name])
    if master is not None:
        needed['master'], arrays['master'] = ('float32', present.shape), master
    found = {name: (numpy.dtype(array.dtype).name, tuple(array.shape)) for name, array in arrays.items()}
    return '' if found == needed else f'the arrays of {present.name} must be {needed}, in the file they are {found}'


def _hyperparameters(optimizer: Any, states: OptimizerStates, mode: str) -> Values:
    """The hyper-parameters that will apply, checked by the rule."""
    now: Values = optimizer.hyperparameters()
    if mode == 'current':
        return now
    try:
        saved: Values = optimizer.rule.hyperparameters(**{**optimizer.rule.older, **states.hypers})
    except (TypeError, ValueError) as error:
        raise ValueError(f'The hyper-parameters in the file must be those of {optimizer.rule.name}. {error} '
                         'Pass hyperparameters="current" to keep the trainer\'s.') from error
    if set(saved.asdict()) != set(now.asdict()):
        raise ValueError(f'The file has the hyper-parameters {one_of(saved.asdict())}, the trainer {one_of(now.asdict())}. '
                         'Create the trainer with the same `base`.')
    if isinstance(optimizer, Builtin):
        optimizer.check(saved)
    # the trainer sets rescale_grad at every step, from its batch size
    return saved.replace(rescale_grad=now.rescale_grad)


def _differences(trainer: TrainerLike, optimizer: Any, states: OptimizerStates, mode: str) -> List[str]:
    """One sentence for each hyper-parameter that differs between file and trainer, and which of the two applies."""
    now, saved = optimizer.hyperparameters().asdict(), dict(states.hypers)
    word = word_of(trainer)
    skipped = {'rescale_grad'} | ({'learning_rate'} if optimizer.lr_scheduler or states.scheduler else set())
    if isinstance(optimizer, Stranger):  # what is not an argument is state
        now = {name: now[name] for name in optimizer.arguments()}
    notes = [f'{name} is {now[name]!r} in the {word} and {saved[name]!r} in the file: {_whose(word, mode)}.'
             for name in now if name in saved and name not in skipped and now[name] != saved[name]]
    if isinstance(trainer, StandIn) and now['rescale_grad'] != saved.get('rescale_grad', now['rescale_grad']):
        notes.append(f'rescale_grad is {now["rescale_grad"]!r} in the {word} and {saved["rescale_grad"]!r} in the file, as for '
                     f"another batch size: the {word}'s applies.")
    return notes


def _other_multipliers(trainer: TrainerLike, pairs: Dict[int, ParameterInfo], present: List[ParameterInfo], mode: str
                       ) -> List[str]:
    """One sentence for all parameters that differ alike in a multiplier."""
    names: Dict[Tuple[str, float, float], List[str]] = {}
    word = word_of(trainer)
    for i, info in pairs.items():
        for name in MULTIPLIERS:
            mine, theirs = getattr(present[i], name), getattr(info, name)
            if mine != theirs:
                names.setdefault((name, mine, theirs), []).append(present[i].name)
    return [f'{name} of {some_of(found) if len(found) > 1 else found[0]} is {mine!r} in the {word} and {theirs!r} in the file: '
            f'{_whose(word, mode)}.' for (name, mine, theirs), found in names.items()]


def _whose(word: str, mode: str) -> str:
    return "the file's applies" if mode == 'file' else f"the {word}'s applies"


def _loss_scaler(trainer: TrainerLike, states: OptimizerStates, hyperparameters: str, notes: List[str]
                 ) -> Tuple[Any, Dict[str, Any]]:
    """The trainer's loss scaler, and the attributes that it gets from the file."""
    scaler: Any = getattr(trainer, '_amp_loss_scaler', None)
    if states.loss_scaler is None:
        return scaler, {}
    if scaler is None:
        notes.append('The file holds the state of a loss scaler and the trainer has none: it is not restored. '
                     'Create go.gradients.Scaler(trainer), or call amp.init_trainer(trainer), before load_states.')
        return scaler, {}
    if _is_ours(scaler):
        attributes, differing = scaler.read_state(states.loss_scaler, hyperparameters)
        notes += differing
        return scaler, attributes
    here = {key: value for key, value in states.loss_scaler.items() if '_' + key in vars(scaler)}
    unknown = sorted(set(states.loss_scaler) - set(here) - set(_OF_AMP))
    if unknown:
        raise ValueError(f'The loss scaler has no {one_of(unknown)}. It was saved by another version of MXNet.')
    notes += [f"{key} of the loss scaler is {value!r} in the file, and always {_OF_AMP[key]!r} in AMP's: use go.gradients.Scaler."
              for key, value in states.loss_scaler.items() if key not in here and value != _OF_AMP[key]]
    return scaler, {'_' + key: value for key, value in here.items()}


def _accumulated(trainer: TrainerLike, states: OptimizerStates, pairs: Dict[int, ParameterInfo], notes: List[str]
                 ) -> Dict[str, Any]:
    """The attributes that the trainer's `gradients.Accumulate` gets from the file; none if it has no Accumulate."""
    accumulate: Any = getattr(trainer, '_accumulate', None)
    if accumulate is not None:
        attributes, differing = accumulate.read(states, pairs)
        notes += differing
        return dict(attributes)
    if ACCUMULATED in states.variables:
        notes.append('The file holds gradients of batches that were accumulated for the next update, and the trainer has no '
                     'Accumulate: they are not restored. Create go.gradients.Accumulate(trainer, k) before load_states.')
    elif BATCHES_PER_UPDATE in states.variables:
        notes.append(f'k of Accumulate is {states.variables[BATCHES_PER_UPDATE]} in the file, and the trainer has no Accumulate: '
                     'each batch is an update. Create go.gradients.Accumulate(trainer, k) before load_states.')
    return {}


# Into a trainer: changes

def _to_devices(trainer: TrainerLike, optimizer: Any, states: OptimizerStates, fit: _Fit, h: Values) -> Dict[int, List[Any]]:
    """The states in MXNet's form: for each index one per updater, on its context."""
    def state(info: ParameterInfo, context: Any) -> Any:
        if isinstance(optimizer, Stranger):
            return optimizer.put_together(states, info.name, context)
        slots = tuple(to_mxnet_state(states.slots[info.name][slot.name], context) for slot in _slots(optimizer, info, fit.slots))
        master = to_mxnet_state(states.master[info.name], context) if info.name in states.master else None
        return optimizer.join_state(slots, master, h)

    contexts = contexts_of(trainer)[:len(_updaters(trainer))]
    return {i: [state(info, context) for context in contexts] for i, info in fit.pairs.items() if info.name in states.slots}


def _set_multipliers(parameter: ParameterLike, info: ParameterInfo, undo: contextlib.ExitStack) -> None:
    for name in MULTIPLIERS:
        undo.callback(setattr, parameter, name, getattr(parameter, name))
        setattr(parameter, name, getattr(info, name))


def _set_counts(trainer: TrainerLike, optimizer: Any, states: OptimizerStates, pairs: Dict[int, ParameterInfo]) -> None:
    counts = optimizer.update_counts()
    counts.update((key, states.counts.get(info.name, 0)) for i, info in pairs.items() for key in keys_of(trainer, i))
    # MXNet keeps num_update = begin_num_update + the largest count: otherwise the schedule would stall or jump
    optimizer.begin_num_update = states.num_update - max(states.counts.values(), default=0)
    optimizer.set_update_counts(counts, states.num_update)


def _rewrite_weights(trainer: TrainerLike, states: OptimizerStates, pairs: Dict[int, ParameterInfo]) -> List[int]:
    """Set each weight to its rounded master on all devices; returns the indices of those that differed."""
    rewritten = []
    for i, info in pairs.items():
        if info.name not in states.master or is_hollow(states.master[info.name]):
            continue
        parameter = trainer._params[i]
        with numpy.errstate(over='ignore'):
            weight = states.master[info.name].astype(info.dtype)
        copies = parameter.list_data()
        if any(data.asnumpy().tobytes() != weight.tobytes() for data in copies):
            write_weight(parameter, [weight] * len(copies), remote.on_servers(trainer))  # and in the kvstore before the next step
            rewritten.append(i)
    return rewritten


def _install(trainer: TrainerLike, arrays: Dict[int, List[Any]], pairs: Dict[int, ParameterInfo]) -> None:
    for i in pairs:
        for updater, key, state in zip(_updaters(trainer), keys_of(trainer, i), arrays.get(i) or itertools.repeat(None)):
            updater.states.pop(key, None)
            updater.states_synced.pop(key, None)
            if i in arrays:
                updater.states[key] = state
                updater.states_synced[key] = False  # the kvstore's copy of a weight may be on another context
