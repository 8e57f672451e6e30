"""Optimizers that this package did not make, MXNet's and other people's, in the words in which `trainer` asks ours.

MXNet's built-in ones have a rule here, that of their drop-in: `Builtin` reads and writes their states under its slots. Of all
others (`Stranger`) nothing is known but what MXNet itself relies on: states that nest arrays, and attributes.
"""
import copy
import inspect
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import mxnet
import numpy
from mxnet.ndarray.ndarray import NDArray
from mxnet.ndarray.ndarray import array as nd_array
from mxnet.ndarray.sparse import BaseSparseNDArray
from mxnet.optimizer.optimizer import Optimizer

from .. import rules
from ..rules.mx import DROP_INS
from ..schema import Values, one_of, some_of
from ..states.model import OptimizerStates, ParameterInfo
from ..states.mxnet_files.reader import BOOKKEEPING
from ..states.nesting import leaves, put_together, take_apart
from .optimizer import Runner
from .typing import ParameterLike

__all__ = ['Builtin', 'Elsewhere', 'Native', 'Stranger', 'adapted', 'how_to_continue', 'is_stranger', 'path_of', 'to_mxnet_state']

SET_BY_TRAINER = ('rescale_grad', 'multi_precision')


def adapted(optimizer: Any, contexts: Sequence[Any], saved_as: str = '') -> Any:
    """``optimizer`` itself where it is one of ours, else what stands for it here; ``contexts`` are those of its parameters,
    ``saved_as`` is what a file calls it: by its path if it was written when there was no drop-in on MXNet 2.x."""
    if isinstance(optimizer, Runner):
        return optimizer
    from .builtin import tell_of_class, twin  # when it is needed
    tell_of_class(optimizer)
    counterpart = None if saved_as == path_of(optimizer) else twin(optimizer)
    return Stranger(optimizer, contexts) if counterpart is None else Builtin(optimizer, contexts, counterpart)


def is_stranger(optimizer: Any) -> bool:
    """Whether ``optimizer`` has no rule here."""
    return isinstance(adapted(optimizer, ()), Stranger)


def how_to_continue(name: str, word: str) -> str:
    """How to make a trainer (the ``word`` for it) with the optimizer that files call ``name``, on the MXNet that is installed."""
    if name == 'mxnet.adamw':
        name = 'mxnet.optimizer.adamW.AdamW'
    short = name.rpartition('.')[2].lower()
    registered = Optimizer.opt_registry.get(short)
    if registered is not None and name == f'{registered.__module__}.{registered.__qualname__}':
        return f'Create the {word} with {short!r}'
    if name.startswith('mxnet.') or (registered is None and name in rules.names(drop_ins=True, samplers=True)):
        return f'MXNet {mxnet.__version__} does not have it: continue with the MXNet that saved it'
    meant = registered is None or issubclass(registered, Runner) or name in DROP_INS
    return f'Create the {word} with {name!r}' if meant else f'Create the {word} with go.create({name!r})'


class Elsewhere:
    """Base class of arrays of MXNet that are not in this process."""


class Native:
    """What both kinds have in common: MXNet's own counts, which it keeps for each device id."""

    def __init__(self, optimizer: Optimizer, contexts: Sequence[Any]):
        self.optimizer, self._devices = optimizer, {0, *(context.device_id for context in contexts)}

    @property
    def lr_scheduler(self) -> Any:
        return self.optimizer.lr_scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, scheduler: Any) -> None:
        self.optimizer.lr_scheduler = scheduler

    @property
    def multi_precision(self) -> bool:
        return bool(self.optimizer.multi_precision)

    @property
    def num_update(self) -> int:
        return int(self.optimizer.num_update)

    @property
    def begin_num_update(self) -> int:
        return int(self.optimizer.begin_num_update)

    @begin_num_update.setter
    def begin_num_update(self, begin: int) -> None:
        self.optimizer.begin_num_update = begin

    def update_counts(self) -> Dict[Any, int]:
        """As `Runner.update_counts`."""
        merged: Dict[Any, int] = {}
        for counts in self.optimizer._all_index_update_counts.values():
            for index, count in counts.items():
                merged[index] = max(count, merged.get(index, count))
        return {index: count - self.begin_num_update for index, count in merged.items()}

    def set_update_counts(self, counts: Mapping[Any, int], num_update: int) -> None:
        """As `Runner.set_update_counts`: on all devices, for MXNet begins with `begin_num_update` on one that it does not know."""
        absolute = {index: count + self.begin_num_update for index, count in counts.items()}
        devices = sorted(self._devices.union(self.optimizer._all_index_update_counts))
        self.optimizer._all_index_update_counts = {device: dict(absolute) for device in devices}
        self.optimizer._index_update_count = self.optimizer._all_index_update_counts[devices[0]]
        self.optimizer.num_update = num_update

    def set_shared_state(self, values: Mapping[str, Any]) -> None:
        vars(self.optimizer).update(values)


class Builtin(Native):
    """One of MXNet's own, through its drop-in with the same attributes (the ``twin``), which is thrown away afterwards."""

    def __init__(self, optimizer: Optimizer, contexts: Sequence[Any], twin: Any):
        super().__init__(optimizer, contexts)
        self.twin, self.rule, self._contexts = twin, twin.rule, contexts

    def hyperparameters(self) -> Values:
        h: Values = self.twin.hyperparameters()
        return h

    def check(self, h: Values) -> None:
        """Raise ValueError where only the drop-in can do what ``h`` says."""
        arguments, twin = inspect.signature(type(self.optimizer)).parameters, self.twin
        for hyper in self.rule.hypers[2:]:  # after the rate and the decay, which all have
            if not {hyper.name, twin.attributes.get(hyper.name)}.intersection(arguments) \
                    and getattr(h, hyper.name) != twin.constants.get(hyper.name, hyper.default):
                raise ValueError(f"MXNet's own {self.rule.name} has no `{hyper.name}`. Received from the file: {hyper.name}="
                                 f'{getattr(h, hyper.name)!r}. Create the trainer with go.create({self.rule.name!r}).')

    def set_hyperparameters(self, h: Values) -> None:
        self.twin.lr_scheduler = self.lr_scheduler
        before = dict(vars(self.twin))
        self.twin.set_hyperparameters(h)
        changed = {name: value for name, value in vars(self.twin).items() if name not in before or before[name] is not value}
        vars(self.optimizer).update((name, value) for name, value in changed.items() if name in vars(self.optimizer))

    def split_state(self, state: Any, h: Values, mixed: Any) -> Any:
        return self.twin.split_state(state, h, mixed)

    def join_state(self, slots: Tuple[Any, ...], master: Any, h: Values) -> Any:
        return self.twin.join_state(slots, master, h)

    def slot_dtype(self, dtype: Any) -> str:
        # MXNet keeps float32 slots where the drop-in has wider ones
        return 'float32' if self.twin.single_slots else self.twin.slot_dtype(dtype)

    def variables(self, names: Mapping[Any, str]) -> Any:
        return self.twin.variables(names)

    def read_variables(self, variables: Mapping[str, numpy.ndarray], pairs: Mapping[Any, ParameterInfo]) -> Dict[str, Any]:
        return {name: _moved(value, self._contexts[0]) for name, value in self.twin.read_variables(variables, pairs).items()}


class Stranger(Native):
    """One without a rule. Its states are kept as MXNet nests them, its attributes as they are."""

    def __init__(self, optimizer: Optimizer, contexts: Sequence[Any]):
        super().__init__(optimizer, contexts)
        cls = type(optimizer)
        self.name = cls.__name__.lower()
        if self.name in rules.names(drop_ins=True, samplers=True):  # somebody's own LAMB is not the one that has a rule
            self.name = f'{cls.__module__}.{cls.__qualname__}'

    # -- attributes -------------------------------------------------------------------------------------------------

    def _attributes(self) -> Dict[str, Any]:
        """Those that belong to the optimizer and not to its trainer."""
        held = self.optimizer.__getstate__()  # where a class leaves out what cannot be pickled either
        return {name: value for name, value in held.items() if name not in BOOKKEEPING and name != 'param_dict'}

    def hyperparameters(self) -> Values:
        """The attributes that are plain numbers, texts and None."""
        rate = self.optimizer.lr if self.lr_scheduler is None else self.lr_scheduler.base_lr
        plain = {name: value for name, value in self._attributes().items() if _is_plain(value)}
        return Values(**{'learning_rate': rate, **plain})

    def others(self) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        """The other attributes as trees, and the arrays in them as variables; TypeError for one that cannot be saved."""
        trees: Dict[str, Any] = {}
        variables: Dict[str, Any] = {}
        for name, value in self._attributes().items():
            if _is_plain(value):
                continue
            try:
                trees[name], arrays = take_apart(value, NDArray)
            except TypeError as error:
                raise TypeError(f'The attribute {name!r} of {path_of(self.optimizer)} cannot be saved: {error}. Leave it out of '
                                'its __getstate__ if the run does not need it, or keep it in such values.') from None
            variables.update((f'{name}:{place}', array) for place, array in arrays.items())
        return trees, variables

    def set_hyperparameters(self, h: Values) -> None:
        for name, value in h.asdict().items():
            if name != 'learning_rate':
                setattr(self.optimizer, name, value)
            elif self.lr_scheduler is None:
                self.optimizer.lr = value

    def merged(self, saved: Mapping[str, Any], mode: str) -> Values:
        """The plain attributes that hold after loading: the file's, but with ``mode='current'`` not those that are arguments."""
        now = self.hyperparameters().asdict()
        keep = {name for name in now if name in SET_BY_TRAINER or (mode == 'current' and name in self.arguments())}
        return Values(**{**now, **{name: value for name, value in saved.items() if name not in keep}})

    def arguments(self) -> List[str]:
        """Attributes that are arguments of the constructor, by name; all others are taken for state of the optimizer."""
        constructors = [vars(cls)['__init__'] for cls in type(self.optimizer).__mro__[:-1] if '__init__' in vars(cls)]
        names = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
        return [name for name in self.hyperparameters().asdict() if name.lstrip('_') in names]

    def read_others(self, states: OptimizerStates, context: Any) -> Dict[str, Any]:
        """The inverse of `others`, on ``context``."""
        return {name: put_together(tree, _Arrays(states.variables, f'{name}:', context))
                for name, tree in states.attributes.items()}

    def check_order(self, states: OptimizerStates, pairs: Mapping[Any, ParameterInfo]) -> None:
        """Raise ValueError where an attribute is kept by the index of a parameter, and the file's parameters have other indices."""
        place = {info.name: j for j, info in enumerate(states.parameters)}
        moved = [info.name for key, info in pairs.items() if isinstance(key, int) and place[info.name] != key]
        by_index = [name for name, tree in states.attributes.items() if _has_whole_keys(tree)]
        if moved and by_index:
            raise ValueError(f'The parameters must be in the order of the file, because {path_of(self.optimizer)} keeps '
                             f'{one_of(by_index)} by their index. Received: another place for {some_of(moved)}. Create the trainer '
                             'as it was.')

    # -- states -----------------------------------------------------------------------------------------------------

    def take_apart(self, name: str, state: Any) -> Tuple[Any, Dict[str, Any]]:
        """The tree of the state of the parameter ``name``, and its arrays. TypeError where it cannot be saved."""
        try:
            tree, arrays = take_apart(state, (NDArray, Elsewhere))
        except TypeError as error:
            raise TypeError(f'The state that {path_of(self.optimizer)} keeps for {name} cannot be saved: {error}.') from None
        sparse = [place for place, array in arrays.items() if isinstance(array, BaseSparseNDArray)]
        if sparse:
            raise TypeError(f'The state that {path_of(self.optimizer)} keeps for {name} cannot be saved: it must be dense. '
                            f'Received: a sparse array at {sparse[0]}. Use trainer.save_states.')
        return tree, arrays

    def put_together(self, states: OptimizerStates, name: str, context: Any) -> Any:
        """The state of the saved parameter ``name``, as MXNet has it on ``context``."""
        return put_together(states.trees[name], _Arrays(states.slots[name], '', context))

    def misfit(self, index: Any, parameter: ParameterLike, saved: ParameterInfo, states: OptimizerStates) -> str:
        """Why the saved state cannot be that of ``parameter``, '' if it can: it must nest as the one that the optimizer makes."""
        tree = states.trees.get(saved.name)
        if tree is None:
            return f'the state of {saved.name} has the slots {one_of(states.slots[saved.name])}, of an optimizer with a rule'
        fresh = copy.copy(self.optimizer).create_state_multi_precision(index, parameter.list_data()[0])
        here, arrays = self.take_apart(saved.name, fresh)
        if not _is_fixed(here) or not _is_fixed(tree):  # lists and dictionaries may grow
            return ''
        needed = {place: _kind(array) for place, array in arrays.items()}
        found = {place: _kind(states.slots[saved.name][place]) for place in leaves(tree)}
        return '' if here == tree and needed == found else (
            f'the state of {saved.name} must be {_words(here, needed)}, in the file it is {_words(tree, found)}')


class _Arrays:
    """Saved arrays as MXNet has them, for `put_together`."""

    def __init__(self, arrays: Mapping[str, numpy.ndarray], prefix: str, context: Any):
        self.arrays, self.prefix, self.context = arrays, prefix, context

    def __call__(self, place: str, kind: str) -> Any:
        value = self.arrays[self.prefix + place]
        if kind == 'number':
            return value[()]
        return numpy.array(value) if kind == 'numpy' else to_mxnet_state(value, self.context)


def _moved(value: Any, context: Any) -> Any:
    """A variable with its arrays on ``context``."""
    if isinstance(value, dict):
        return {key: _moved(item, context) for key, item in value.items()}
    return value.as_in_context(context) if isinstance(value, NDArray) else value


def to_mxnet_state(values: numpy.ndarray, context: Any) -> NDArray:
    """An array of a state on its device; MXNet 1.x has no shape ()."""
    return nd_array(values if values.shape else values.reshape(1), ctx=context, dtype=values.dtype)


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, str) or (type(value) is float and value - value == 0)


def _is_fixed(tree: Any) -> bool:
    """Whether nothing in the tree can change its size: None, arrays and tuples."""
    return isinstance(tree, str) or (list(tree) == ['tuple'] and all(map(_is_fixed, tree['tuple'])))


def _has_whole_keys(tree: Any) -> bool:
    """Whether a dictionary in the tree has whole numbers for keys."""
    (kind, content), = tree.items() if isinstance(tree, dict) else [('', ())]
    if kind == 'dict':
        return any(type(key) is int or _has_whole_keys(item) for key, item in content)
    return kind in ('tuple', 'list') and any(map(_has_whole_keys, content))


def _kind(array: Any) -> Tuple[str, Tuple[int, ...]]:
    return numpy.dtype(array.dtype).name, tuple(array.shape)


def _words(tree: Any, arrays: Mapping[str, Tuple[str, Tuple[int, ...]]]) -> str:
    kinds = (f'{dtype}{list(shape)}' for dtype, shape in arrays.values())
    return f'{tree!r} of {", ".join(kinds)}' if arrays else repr(tree)


def path_of(value: Any) -> str:
    return f'{type(value).__module__}.{type(value).__qualname__}'

