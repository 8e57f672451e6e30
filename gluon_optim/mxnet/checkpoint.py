"""Checkpoints: net, optimizer, random state and the user's own data in one file that is either complete or absent.

    go.save_checkpoint('run.safetensors', net=net, trainer=trainer, extra={'fold': 3}, epoch=7, batch=120)
    extra = go.load_checkpoint('run.safetensors', net=net, trainer=trainer)      # extra.epoch == 7

docs/CHECKPOINTS.md describes the file and what is guaranteed when.
"""
import contextlib
import logging
import math
import os
import random
import time
import warnings
from dataclasses import replace
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import mxnet
import numpy
from mxnet import gluon
from mxnet import ndarray as nd

from ..display import of_part
from ..schema import check_int, one_of
from ..states import container
from ..states.errors import StateFileError
from ..states.manifest import check_name, run_record
from ..states.matching import completes, match
from ..states.model import NO_OPTIMIZER, Array, OptimizerStates, ParameterInfo, Parts, Run, Weight, chunks
from .distributed import remote
from .distributed.ranks import agreeing, sharing
from .distributed.received import received
from .scheduler_states import keep
from .trainer import (
    LoadReport,
    Pieces,
    StandIn,
    StatesPlan,
    contexts_of,
    export_states,
    facts_of,
    other_names,
    plan_import,
    producer,
    shape_of,
    start,
    weights_written,
)
from .typing import BlockLike, ParameterLike, TrainerLike
from .weights import devices_of, initialize, remember, trainer_of, write_weight

__all__ = ['Restored', 'load_checkpoint', 'save_checkpoint']

log = logging.getLogger('gluon_optim')

Net = Union[BlockLike, Mapping[str, BlockLike], None]            # one, or several under names, or none
Trainer = Union[TrainerLike, Mapping[str, TrainerLike], None]
Subjects = Dict[str, Tuple[Optional[BlockLike], Optional[TrainerLike]]]  # net and trainer of each name; '' where there are no names


class Restored(Dict[str, Any]):
    """The user's ``extra``, with everything else that was restored as attributes.

    ``step, epoch, batch`` as passed to `save_checkpoint`, otherwise None; ``metrics``; ``states`` is the
    report of `load_states`, for several trainers a dictionary of them; ``skipped`` has one sentence for each weight that did not
    fit (with ``strict=False``); ``path`` is that of the file.
    """

    step: Optional[int]
    epoch: Optional[int]
    batch: Optional[int]
    metrics: Dict[str, float]
    states: Union[LoadReport, Dict[str, LoadReport], None]
    skipped: List[str]
    path: str

    def __repr__(self) -> str:
        position = {name: value for name in ('step', 'epoch', 'batch') for value in [getattr(self, name)] if value is not None}
        words = [f'{name} {value}' for name, value in position.items()] + [f'from {self.path!r}']
        reports = self.states if isinstance(self.states, dict) else {'': self.states} if self.states else {}
        words += [of_part(name, str(report)) for name, report in reports.items()]
        words += [f'{len(self.skipped)} weights skipped'] if self.skipped else []
        text = dict.__repr__(self)
        return f'<Restored: {", ".join(words)}, extra {text if len(text) <= 200 else text[:200] + "..."}>'

    def __bool__(self) -> bool:
        return True  # ``if restored:`` asks whether there was a checkpoint, not whether ``extra`` is empty


def save_checkpoint(path: container.Path, net: Net = None, trainer: Trainer = None,
                    extra: Optional[Dict[str, Any]] = None, *, step: Optional[int] = None, epoch: Optional[int] = None,
                    batch: Optional[int] = None, metrics: Optional[Dict[str, float]] = None, reseed: bool = True) -> None:
    """Save everything that a run needs to continue as if it had never stopped.

    Parameters
    ----------
    path : str or os.PathLike
        One file. Afterwards the complete new file is there or, after an error, whatever was there before.
    net : gluon.Block, or dict of str to gluon.Block, optional
        Its parameters are saved under their structural names. The trainer's are saved in any case.
    trainer : gluon.Trainer, or dict of str to gluon.Trainer, optional
        With an optimizer of this package. Its states, masters, counts, hyper-parameters, scheduler and loss scaler are saved.
        Without it the net is saved, but no random state: a checkpoint to be loaded into a net.

        Where there are several, as in a GAN, ``net`` and ``trainer`` are dictionaries with the same names,
        ``trainer={'generator': g, 'discriminator': d}``. A net may do without a trainer.
    extra : dict, optional
        Whatever else JSON can hold; `load_checkpoint` returns it.
    step, epoch, batch : int, optional
        Where the run stands.
    metrics : dict of str to number, optional
        Used by `CheckpointManager` to keep the best; for a ``gluon.metric``, ``dict(metric.get_name_value())``. Non-finite
        values are left out.
    reseed : bool
        MXNet's generators cannot be read. Instead, a seed is drawn from them, saved, and used to reseed them: from then on
        the run that continues and the one that is resumed draw the same numbers. The states of NumPy's and Python's
        global generators are saved as they are. False neither saves nor changes any of them.

    Raises TypeError or ValueError for anything that cannot be saved (a scheduler with other attributes than numbers,
    strings, lists and schedulers, and without ``get_config``; parameters without a shape, ``extra`` that is not JSON,
    ``metrics`` that are not numbers), OSError if the file system refuses.

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
    ...     go.save_checkpoint(f'{folder}/run.safetensors', net=net, trainer=trainer, extra={'fold': 3}, step=7)
    ...     restored = go.load_checkpoint(f'{folder}/run.safetensors', net=net, trainer=trainer)
    >>> restored['fold'], restored.step
    (3, 7)
    """
    run = checked_run(step, epoch, batch, metrics, extra)
    begun = time.monotonic()
    with saving(net, trainer, 'save_checkpoint', reseed) as shared:
        if shared.first:
            container.write_parts(path, take(run, net, trainer, Pieces, reseed, shared))
    log.info('saved %s in %.2f s: %s', called(run), time.monotonic() - begun, os.fspath(path))


def load_checkpoint(path: container.Path, net: Net = None, trainer: Trainer = None,
                    strict: bool = True, hyperparameters: str = 'file', states: bool = True) -> Restored:
    """Restore what `save_checkpoint` saved, on whatever devices net and trainer have.

    Everything is checked first. Then the parameters are loaded, then the optimizer's states; float16 weights that differ
    from their rounded masters are rewritten from them.

    Parameters
    ----------
    path, net
        As for `save_checkpoint`.
    trainer : gluon.Trainer, or dict of str to gluon.Trainer, optional
        Without it only the net's parameters are loaded, for example for inference. Of a file that holds several,
        ``net={'generator': net}`` loads one. Trainers continue together: all that the file holds
        must be given, or ``strict=False``.
    strict, hyperparameters
        As for `load_states`. With ``strict=False`` weights that do not fit are left alone too, and are listed in ``skipped``.

    states : bool
        False restores the parameters of net and trainer and nothing else, as to train them on with another optimizer: the trainer's
        own states, counts and schedule stay, and so do the random generators.

    Returns
    -------
    Restored
        ``extra``, a dictionary, with the attributes ``step``, ``epoch``, ``batch``, ``metrics``, ``states`` and ``skipped``.

    Raises StateFileError (a ValueError) for a damaged file or one that is not a checkpoint, ValueError if something does not
    fit. In that case nothing has been changed.

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
    ...     go.save_checkpoint(f'{folder}/run.safetensors', net=net, trainer=trainer, extra={'fold': 3}, step=7)
    ...     restored = go.load_checkpoint(f'{folder}/run.safetensors', net=net, trainer=trainer)
    >>> restored['fold'], restored.step, str(restored.states)
    (3, 7, 'restored 2 of 2 parameters at step 1')
    """
    subjects = subjects_of(net, trainer)
    parts, _ = read_together(subjects, 'load_checkpoint', lambda: (container.read_parts(path), os.fspath(path)))
    return restore(path, parts, net, trainer, strict, hyperparameters, states)


def called(run: Run) -> str:
    """What the log calls it."""
    return 'a checkpoint' if run.step is None and run.epoch is None else (
        f'step {run.step}' if run.step is not None else f'epoch {run.epoch}')


# Out of a run

@contextlib.contextmanager
def saving(net: Any, trainer: Any, what: str, reseed: bool) -> Iterator['SavedTogether']:
    """Where weights are on servers, all workers save together, and the first of them `take`s and writes everything."""
    subjects = subjects_of(net, trainer)
    trainers = [own for _, own in subjects.values()]
    ranks = remote.ranks_of(trainers)
    if ranks is None:
        yield SavedTogether(True, [])
        return
    contexts = _contexts(subjects)
    with sharing(ranks, what) as shared:
        for own in trainers:
            if own is not None and remote.on_servers(own):
                start(own)
                remote.pull(own)  # in dist_async a worker has them as they were at its own last step
        together = SavedTogether(shared.first, ranks.gather(what, _generators() if reseed else None)[1:])
        yield together
        shared.result = together.seed
    if shared.result is not None and not ranks.first:
        _seed(shared.result, contexts, ranks.rank)


class SavedTogether:
    """What the first worker knows of the others."""

    def __init__(self, first: bool, generators: List[Any]):
        self.first, self.generators = first, generators
        self.seed: Optional[int] = None     # that it drew for all


def read_together(subjects: Subjects, what: str, read: Callable[[], Tuple[Optional[Parts], str]]) -> Tuple[Any, str]:
    """What ``read`` gives, a file's parts and its path; where weights are on servers only the first worker reads, for all."""
    trainers = {name: trainer for name, (_, trainer) in subjects.items()}
    return received(remote.ranks_of(trainers.values()), what, trainers, read)


def take(run: Run, net: Net, trainer: Trainer, copy: Callable[[Any], Array], reseed: bool,
         together: Optional[SavedTogether] = None) -> Parts:
    """The states as they are now, each with ``run`` and its weights. ``copy`` turns an NDArray into something that
    `container.write_parts` can write. ``together`` is told the seed that was drawn."""
    subjects = subjects_of(net, trainer)
    parts = {}
    for name, subject in subjects.items():
        with naming(name):
            parts[name] = _take_one(run, *subject, copy)
    contexts = _contexts(subjects)
    state = _reseed(contexts) if reseed and contexts else None
    if together is not None and state is not None:
        together.seed = state['mxnet']
        state.update({'workers': together.generators} if together.generators else {})
    return {name: (states, replace(own, random=state)) for name, (states, own) in parts.items()}


def _take_one(run: Run, net: Optional[BlockLike], trainer: Optional[TrainerLike], copy: Callable[[Any], Array]
              ) -> Tuple[OptimizerStates, Run]:
    states = no_states(net) if trainer is None else export_states(trainer, net, copy)
    return states, replace(run, weights=weights_of(net, trainer, copy))


def no_states(net: Optional[BlockLike]) -> OptimizerStates:
    """What stands for the states in a file of weights alone."""
    return OptimizerStates(NO_OPTIMIZER, {}, 0, [], {}, {}, producer=producer(), facts=facts_of(net))


def weights_of(net: Optional[BlockLike], trainer: Optional[TrainerLike], copy: Callable[[Any], Array]) -> List[Weight]:
    """The values of the parameters of net and trainer, on each device where they differ."""
    weights = []
    for name, parameter in parameters(net, trainer).items():
        arrays = _data(name, parameter)
        copies = arrays if any(_differ(arrays[0], other) for other in arrays[1:]) else arrays[:1]
        weights.append(Weight(name, parameter.name, [copy(array) for array in copies], parameter.grad_req))
    return weights


def subjects_of(net: Any, trainer: Any) -> Subjects:
    """``net`` and ``trainer`` by name; one without a name goes by ''. Raises TypeError or ValueError."""
    if net is None and trainer is None:
        raise ValueError('`net` or `trainer` must be given. Received: neither. Pass the one to save.')
    given = [value for value in (net, trainer) if value is not None]
    if not any(isinstance(value, Mapping) for value in given):
        _check_trainer(trainer)
        return {'': (net, trainer)}
    if not all(isinstance(value, Mapping) for value in given):
        raise TypeError('`net` and `trainer` must both be dictionaries, or neither. Received: '
                        f'{type(net).__name__} and {type(trainer).__name__}. Pass dictionaries with the same names.')
    nets, trainers = net or {}, trainer or {}
    strangers = [name for name in trainers if net is not None and name not in nets]
    if strangers or not (nets or trainers):
        raise ValueError('`net` and `trainer` must be dictionaries with the same names. Received: '
                         f'{one_of(nets) or "no name"} in net, {one_of(trainers) or "no name"} in trainer.')
    for name in {**nets, **trainers}:
        check_name(name)
        if nets.get(name) is None and trainers.get(name) is None:
            raise TypeError(f'`net` and `trainer` must hold Blocks and trainers. Received: None for {name!r}. Leave it out.')
        _check_trainer(trainers.get(name))
    return {name: (nets.get(name), trainers.get(name)) for name in {**nets, **trainers}}


def _check_trainer(trainer: Any) -> None:
    if not isinstance(trainer, (gluon.Trainer, StandIn, type(None))):
        raise TypeError('`trainer` must be a gluon.Trainer, a dictionary of names and trainers, or None. '
                        f"Received: {type(trainer).__name__}. Pass several as trainer={{'generator': g, 'discriminator': d}}.")


def _contexts(subjects: Subjects) -> List[Any]:
    """The devices of all trainers, in their order."""
    trainers = [trainer for _, trainer in subjects.values() if trainer is not None]
    return list(dict.fromkeys(context for trainer in trainers for context in contexts_of(trainer)))


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors about one of several nets and trainers say which."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if name and type(error) in (ValueError, TypeError, StateFileError):  # others may take no message
            raise type(error)(f'Of {name!r}: {error}') from error
        raise


# What the user says about a run, checked before anything is touched

def checked_run(step: Any, epoch: Any, batch: Any, metrics: Any, extra: Any) -> Run:
    """A run without its weights. Raises TypeError or ValueError."""
    if extra is not None and not isinstance(extra, dict):
        raise TypeError(f'`extra` must be a dictionary. Received: {type(extra).__name__}. Write extra={{"name": value}}.')
    finite = {name: value for name, value in _checked_metrics(metrics).items() if math.isfinite(value)}
    run = Run([], _optional('step', step), _optional('epoch', epoch), _optional('batch', batch), finite, extra=dict(extra or {}))
    run_record(run)  # raises if there is anything JSON cannot hold
    return run


def _optional(name: str, value: Any) -> Optional[int]:
    return None if value is None else check_int(name, value)


def _checked_metrics(metrics: Any) -> Dict[str, float]:
    """The metrics as Python numbers, converted from NumPy's and from arrays with one element."""
    advice = 'Pass a dictionary of names and numbers; for a gluon.metric, dict(metric.get_name_value()).'
    if not isinstance(metrics, (Mapping, type(None))):
        raise TypeError(f'`metrics` must be a dictionary. Received: {metrics!r}. {advice}')
    numbers = {}
    for name, value in (metrics or {}).items():
        try:
            if not isinstance(name, str) or isinstance(value, (str, bytes)):
                raise TypeError
            numbers[name] = float(value.asnumpy() if isinstance(value, nd.NDArray) else value)
        except (TypeError, ValueError):
            received = ' '.join(repr(value).split())  # on one line
            raise TypeError(f'`metrics` must have names and real numbers. Received: {name!r}: {received}. {advice}') from None
    return numbers


def parameters(net: Optional[BlockLike], trainer: Optional[TrainerLike]) -> Dict[str, ParameterLike]:
    """The parameters of net and trainer under the names used by `load_states`; a shared one goes by its first name."""
    pairs: List[Tuple[str, Any]] = []
    if net is not None:
        collect = getattr(net, '_collect_params_with_prefix', None) or net.collect_params  # MXNet 1.x, 2.x
        pairs.extend(collect().items())
    if trainer is not None:
        pairs.extend((parameter.name, parameter) for parameter in trainer._params)
    named: Dict[str, Any] = {}
    seen = set()
    for name, parameter in pairs:
        if id(parameter) not in seen and name in named:
            raise ValueError(f'Parameter names must be unique. Received twice: {name}. Pass net=, the Block that they belong to.')
        if id(parameter) not in seen:
            named[name] = parameter
        seen.add(id(parameter))
    return named


def _data(name: str, parameter: ParameterLike) -> List[Any]:
    """The parameter's array on each device."""
    if parameter._deferred_init:
        raise ValueError(f'Shapes of parameters must be known. Received: the deferred parameter {name}. '
                         'Run one forward pass first: net(batch).')
    check_initialized(name, parameter)
    return list(parameter.list_data())


def check_initialized(name: str, parameter: ParameterLike) -> None:
    if parameter._data is None and not parameter._deferred_init:
        raise ValueError(f'Parameters must be initialized. Received: {name}, which is not. Call net.initialize(ctx=...) first.')
    if parameter._stype != 'default':
        raise ValueError(f'Parameters must be dense. Received: {name}, which is {parameter._stype}. '
                         'Use net.save_parameters, net.load_parameters, go.save_states and go.load_states.')


def _differ(a: Any, b: Any) -> bool:
    return any((x.view('u1') != y.view('u1')).any() for x, y in zip(chunks(Pieces(a)), chunks(Pieces(b))))


# Into a run

def restore(path: container.Path, parts: Parts, net: Net, trainer: Trainer, strict: bool, hyperparameters: str,
            with_states: bool = True) -> Restored:
    """`load_checkpoint` of what has been read."""
    subjects = subjects_of(net, trainer)
    ranks = remote.ranks_of(own for _, own in subjects.values())
    plans = {}
    states_plans: Dict[str, StatesPlan] = {}
    reports: Dict[str, LoadReport] = {}
    contexts = _contexts(subjects) if with_states else []
    with contextlib.ExitStack() as undo:  # what is done below is taken back where something fails
        with agreeing(ranks, 'load_checkpoint'):
            left = _left_out(os.fspath(path), parts, subjects, strict, with_states)
            for name, subject in subjects.items():
                with naming(name):
                    plans[name] = plan_part(path, *parts[name], *subject, strict, with_states)
            run = next(plan.run for plan in plans.values())
            for plan in plans.values():
                plan.weights.initialize(undo)
            for name, plan in plans.items():
                if plan.trainer is not None:
                    with naming(name):
                        states_plans[name] = plan_import(plan.trainer, plan.states, plan.net, strict, hyperparameters)
            set_random = _plan_random(run.random, contexts, ranks.rank if ranks else 0) if contexts and run.random else None
            for set_states in states_plans.values():
                set_states.warn()

        # everything is known to fit: from here on nets and trainers change
        for plan in plans.values():
            remember(undo, (parameter for parameter in plan.present.values() if parameter._data is not None))
        sent = {name: _sent_weights(plan, subjects[name][1]) for name, plan in plans.items()}
        for plan in plans.values():
            if plan.trainer is not None:
                start(plan.trainer, undo)  # the first step would make the copies of each device those of the first one
        for plan in plans.values():
            plan.weights.apply()
        for name, set_states in states_plans.items():
            reports[name] = set_states.apply(undo, sent[name])
        for name, (_, own) in subjects.items():
            if not with_states and own is not None and remote.on_servers(own):
                start(own)
                remote.send(own, remote.Load({}, sent[name]))
        for plan in plans.values():
            weights_written(plan.trainer, undo)
        if set_random:
            set_random.apply(undo)
        undo.pop_all()
    for report in reports.values():
        report.log()
    restored = Restored(run.extra)
    restored.step, restored.epoch, restored.batch, restored.metrics = run.step, run.epoch, run.batch, run.metrics
    restored.states, restored.path = reports.get('') if '' in subjects else reports or None, os.fspath(path)
    restored.skipped = [*left, *(of_part(name, line) for name, plan in plans.items() for line in plan.weights.skipped)]
    log.info('restored %s from %s', called(run), restored.path)
    for line in restored.skipped:
        log.warning('not loaded: %s', line)
    return restored


def newest_intact(paths: Iterable[str], where: str) -> Optional[Tuple[str, Parts]]:
    """The first of ``paths`` that can be read, newest first, and what is in it; None if there are none in ``where``.

    Raises StateFileError if all are damaged, OSError if one cannot be read: it may be intact.
    """
    failures = []
    for path in paths:
        try:
            return path, container.read_parts(path)
        except FileNotFoundError:
            continue  # its writer has just deleted it
        except StateFileError as error:
            failures.append(str(error))
            log.warning('skipping a damaged checkpoint: %s', error)
    if failures:
        raise StateFileError(f'No checkpoint in {where!r} can be read. Received: {len(failures)} damaged ones, the newest: '
                             f'{failures[0]} Move them away to start over.')
    return None


def _left_out(path: str, parts: Parts, subjects: Subjects, strict: bool, with_states: bool) -> List[str]:
    """One sentence for each part of the file that a run does not continue with. Raises ValueError where names do not fit."""
    if '' in subjects and '' not in parts:
        raise ValueError(f'Cannot load {path!r} into one net or trainer: it holds several, {one_of(parts)}. Pass '
                         f'net={{{next(iter(parts))!r}: net}}, or dictionaries with all of these names.')
    if '' in parts and '' not in subjects:
        raise ValueError(f'Cannot load {path!r} under names. Received: {one_of(subjects)}, for a file that holds one net or '
                         'trainer without a name. Pass it alone, not in a dictionary.')
    unknown = [name for name in subjects if name not in parts]
    if unknown:
        raise ValueError(f'The names of nets and trainers must be among those in {path!r}: {one_of(parts)}. '
                         f'Received: {one_of(unknown)}.')
    if not with_states or all(trainer is None for _, trainer in subjects.values()):
        return []  # no run continues: nets are only looked at
    left = [name for name, (states, _) in parts.items()
            if name not in subjects or (states.optimizer != NO_OPTIMIZER and subjects[name][1] is None)]
    if left and strict:
        raise ValueError(f'A run must continue with every net and trainer in {path!r}: {one_of(parts)}. Received: none for '
                         f'{one_of(left)}. Nothing was changed. Pass strict=False to leave out what is not given.')
    return [f'the optimizer states of {name!r} are in the file only' if name in subjects else f'{name!r} is in the file only'
            for name in left]


class PartPlan(NamedTuple):
    """A net and its trainer, and what they get."""

    net: Optional[BlockLike]
    trainer: Optional[TrainerLike]      # None where it keeps its states
    states: OptimizerStates
    run: Run
    present: Dict[str, ParameterLike]
    weights: 'WeightsPlan'


def plan_part(path: container.Path, states: OptimizerStates, run: Optional[Run], net: Optional[BlockLike],
               trainer: Optional[TrainerLike], strict: bool, with_states: bool) -> PartPlan:
    if run is None:
        raise StateFileError(f'Cannot load {os.fspath(path)!r} as a checkpoint: it holds only optimizer states. Use load_states.')
    present = parameters(net, trainer)
    trainer = trainer if with_states else None
    if trainer is not None and states.optimizer == NO_OPTIMIZER:
        raise ValueError(f'Cannot load {os.fspath(path)!r} into a trainer: it was saved without one. Load it with only net=, or '
                         'pass states=False.')
    weights = [weight._replace(copies=weight.copies[:1]) if weight.name in states.master else weight for weight in run.weights]
    others = other_names([weight.name for weight in weights], list(present), states, net)
    weights, states = [w._replace(name=others.get(w.name, w.name)) for w in weights], states.renamed(others)
    return PartPlan(net, trainer, states, run, present, _plan_weights(weights, present, strict))


def _sent_weights(plan: PartPlan, trainer: Optional[TrainerLike]) -> Dict[int, numpy.ndarray]:
    """The weights that servers must get, by index, where they do not get them at the start of ``trainer``."""
    if trainer is None or not remote.on_servers(trainer):
        return {}
    values = {id(parameter): arrays[0] for parameter, arrays in plan.weights.values}
    if not trainer._kv_initialized:
        plan.weights.apply()
        return {}
    return {i: values[id(parameter)] for i, parameter in enumerate(trainer._params) if id(parameter) in values}


class WeightsPlan(NamedTuple):
    """Weights known to fit."""

    values: List[Tuple[Any, List[numpy.ndarray]]]   # parameters, and their values on each device
    skipped: List[str]                              # one sentence for each that does not fit

    def initialize(self, undo: contextlib.ExitStack) -> None:
        """Initialize parameters with shapes left out, as `Block.load_parameters` does."""
        for parameter, values in self.values:
            if parameter._data is None:
                keep(undo, vars(parameter))
                initialize(parameter, values[0])

    def apply(self) -> None:
        for parameter, values in self.values:
            trainer = trainer_of(parameter)
            write_weight(parameter, values, trainer is not None and remote.on_servers(trainer))


def _plan_weights(weights: List[Weight], present: Dict[str, Any], strict: bool) -> WeightsPlan:
    names = list(present)
    for name, parameter in present.items():
        check_initialized(name, parameter)
    infos = [ParameterInfo(name, parameter.name, shape_of(parameter), numpy.dtype(parameter.dtype).name)
             for name, parameter in present.items()]
    pairs, note = match([_info(w.name, w.full_name, w.copies[0]) for w in weights], infos)
    if note:
        warnings.warn(note, stacklevel=5)
    fitting = {names[i]: weights[j].copies for i, j in pairs.items() if _fits(present[names[i]], infos[i], weights[j].copies[0])}
    problems = [f'{name} is not in the file' for i, name in enumerate(names) if i not in pairs]
    problems += [f'{weight.name} is in the file only' for j, weight in enumerate(weights) if j not in pairs.values()]
    problems += [f'{names[i]} is {_words(infos[i].dtype, infos[i].shape)}, in the file {_words(copy.dtype, copy.shape)}'
                 for i, j in pairs.items() if names[i] not in fitting for copy in weights[j].copies[:1]]
    if strict and problems:
        more = f'; and {len(problems) - 8} more' if len(problems) > 8 else ''
        raise ValueError(f'The checkpoint must have the same parameters. Received: {"; ".join(problems[:8])}{more}. '
                         'Nothing was changed. Pass strict=False to load what fits.')
    return WeightsPlan([(present[name], _for_devices(copies, len(devices_of(present[name])))) for name, copies in fitting.items()],
                       problems)


def _fits(parameter: ParameterLike, info: ParameterInfo, value: numpy.ndarray) -> bool:
    """Whether the saved value can become that of the parameter, whose shape may have been left out."""
    alike = info.shape == value.shape if parameter._data is not None else 0 not in value.shape and completes(
        value.shape, parameter.shape)
    return alike and info.dtype == numpy.dtype(value.dtype).name


def _for_devices(copies: List[numpy.ndarray], devices: int) -> List[numpy.ndarray]:
    """Each device gets its own copy if there are as many; otherwise all get the mean, as MXNet saves such parameters."""
    if len(copies) == devices:
        return copies
    return [copies[0] if len(copies) == 1 else numpy.mean(copies, axis=0).astype(copies[0].dtype)] * devices


def _info(name: str, full_name: str, array: Any) -> ParameterInfo:
    return ParameterInfo(name, full_name, tuple(array.shape), numpy.dtype(array.dtype).name)


def _words(dtype: Any, shape: Sequence[int]) -> str:
    return f'{numpy.dtype(dtype).name}{list(shape)}'


# Random state

_SEEDS = 2 ** 31 - 2 ** 10  # so that a seed, and those after it for further devices, stay within MXNet's range


def _reseed(contexts: List[Any]) -> Dict[str, Any]:
    """Draw a seed from MXNet, give it to all its generators, and return it with the states of the other generators."""
    seed = int(nd.random.randint(0, _SEEDS, shape=(1,), dtype='int32', ctx=contexts[0]).asscalar())
    _seed(seed, contexts)
    return {'mxnet': seed, **_generators()}


def _generators() -> Dict[str, Any]:
    """The states of the generators that can be read."""
    kind, words, *rest = numpy.random.get_state(legacy=True)  # noqa: NPY002  samplers use the global generator
    version, state, gauss = random.getstate()
    return {'numpy': [kind, words.tolist(), *rest], 'python': [version, list(state), gauss]}


def _seed(seed: int, contexts: List[Any], rank: int = 0) -> None:
    """Seed all devices; the run's by their order rather than their ids, which may differ when it is resumed. ``rank`` is that of
    this worker: each draws numbers of its own."""
    mxnet.random.seed((seed + rank * len(contexts)) % 2 ** 31)
    for k, context in enumerate(contexts):
        mxnet.random.seed((seed + rank * len(contexts) + k) % 2 ** 31, context)


class RandomPlan(NamedTuple):
    """States known to be valid for the generators."""

    seed: int
    rank: int
    of_numpy: Tuple[Any, ...]
    of_python: Tuple[Any, ...]
    contexts: List[Any]

    def apply(self, undo: contextlib.ExitStack) -> None:
        """Must come last: the previous state of MXNet's generators can be neither read nor put back."""
        undo.callback(numpy.random.set_state, numpy.random.get_state())  # noqa: NPY002
        undo.callback(random.setstate, random.getstate())
        numpy.random.set_state(self.of_numpy)  # noqa: NPY002
        random.setstate(self.of_python)
        _seed(self.seed, self.contexts, self.rank)


def _plan_random(saved: Dict[str, Any], contexts: List[Any], rank: int = 0) -> RandomPlan:
    """Check the saved states on generators of our own; ``rank`` is that of this worker."""
    try:
        seed = saved['mxnet']
        saved = [saved, *saved.get('workers', ())][rank] if rank <= len(saved.get('workers', ())) else _new_generators(seed + rank)
        of_numpy = tuple(saved['numpy'])
        version, state, gauss = saved['python']
        of_python = version, tuple(state), gauss
        numpy.random.RandomState().set_state(of_numpy)
        random.Random().setstate(of_python)
        if type(seed) is not int or not 0 <= seed < _SEEDS:
            raise ValueError(f'the seed {seed!r}')
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise StateFileError(f'The random state in the checkpoint must be one of NumPy and Python. Received: {error}. '
                             'It was written by a program with other generators.') from error
    return RandomPlan(seed, rank, of_numpy, of_python, contexts)


def _new_generators(seed: int) -> Dict[str, Any]:
    """For a worker that the saved run did not have."""
    kind, words, *rest = numpy.random.RandomState(seed % 2 ** 32).get_state()
    version, state, gauss = random.Random(seed).getstate()
    return {'numpy': [kind, words, *rest], 'python': [version, state, gauss]}
