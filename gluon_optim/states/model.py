"""A training run's optimizer state as named NumPy arrays, independent of framework and device."""
import hashlib
from dataclasses import dataclass, field, replace
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

import numpy

from .. import rules
from ..display import Rows, table, text, without_none
from ..rules import Rule
from ..rules.base import BASE_HYPERS
from ..schema import Slot, Values, one_of, some_of

__all__ = ['ACCUMULATED', 'BATCHES_PER_UPDATE', 'MULTIPLIERS', 'NO_OPTIMIZER', 'STATISTICS', 'Array', 'OptimizerStates',
           'ParameterInfo', 'Parts', 'Run', 'Weight', 'chunks', 'digest', 'has_rule', 'is_accumulated', 'what_was_accumulated']

STATISTICS = ('running_mean', 'running_var', 'moving_mean', 'moving_var')  # name endings of parameters that no optimizer updates
MULTIPLIERS = ('lr_mult', 'wd_mult')  # of a parameter, as in Gluon
ACCUMULATED = 'accumulated'  # of variables with gradients summed for the next update: the name, or its part before a colon
BATCHES_PER_UPDATE = f'{ACCUMULATED}:k'  # the variable with the setting of that name
NO_OPTIMIZER = 'none'  # the optimizer's name in a checkpoint of a net alone
Array = Any  # a numpy.ndarray, or anything with `shape`, `dtype` and `chunks()`: a device's array, copied in pieces


@dataclass
class ParameterInfo:
    """One parameter as its trainer knew it, in trainer order."""

    name: str                      # the key of everything below: structural if the net was given, else Parameter.name
    full_name: str                 # Parameter.name
    shape: Tuple[int, ...]
    dtype: str                     # of the weight: 'float16', 'float32', 'float64'
    lr_mult: float = 1.0
    wd_mult: float = 1.0
    grad_req: Optional[str] = None  # 'write', 'add', 'null' of a frozen one; None where the source does not tell


@dataclass
class OptimizerStates:
    """An optimizer's state, ready to be saved, inspected or converted.

    ``optimizer``   registered name, e.g. 'novograd'
    ``hypers``      every hyper-parameter under MXNet's name, including learning_rate, wd, rescale_grad and clip_gradient
    ``num_update``  MXNet's global update number, which a scheduler sees (begin_num_update included)
    ``names``       parameters in trainer order
    ``counts``      number of updates of each parameter (t of its last update; begin_num_update not included)
    ``slots``       name -> slot -> array
    ``master``      name -> float32 weights, for parameters trained with multi_precision
    ``scheduler``   {'class': path, 'attributes': {...}} or None
    ``variables``   arrays that belong to the optimizer as a whole
    ``trees``       name -> how MXNet nests its slots ('0', '1.0', ...), for optimizers that have no rule here
    ``attributes``  of such optimizers, those that are not plain values: name -> tree (`gluon_optim.states.nesting`)
    ``facts``       what a conversion must know of the net's layers (docs/FORMAT.md), None where it is unknown
    ``report``      messages from the reader or a conversion, one string per line
    ``parameters``  one `ParameterInfo` for each name: shape and dtype of the weight, lr_mult, wd_mult
    ``loss_scaler``  what `gradients.Scaler` or AMP's loss scaler holds, or None
    ``producer``    name -> version of the programs that wrote the file

    Raises nothing: states are checked where they are written, loaded or converted.

    >>> import numpy
    >>> info = ParameterInfo('0.weight', 'dense0_weight', (3, 2), 'float32')
    >>> states = OptimizerStates('sgd_torch', {'momentum': 0.9}, 7, [info], {'0.weight': 7},
    ...                          {'0.weight': {'momentum_buffer': numpy.zeros((3, 2), 'float32')}})
    >>> states
    <OptimizerStates: sgd_torch at update 7, 1 parameters>
    >>> states.slots['0.weight']['momentum_buffer'].shape
    (3, 2)
    """

    optimizer: str
    hypers: Dict[str, Any]
    num_update: int
    parameters: List[ParameterInfo]
    counts: Dict[str, int]
    slots: Dict[str, Dict[str, numpy.ndarray]]
    master: Dict[str, numpy.ndarray] = field(default_factory=dict)
    scheduler: Optional[Dict[str, Any]] = None
    variables: Dict[str, numpy.ndarray] = field(default_factory=dict)
    loss_scaler: Optional[Dict[str, Any]] = None
    producer: Dict[str, str] = field(default_factory=dict)
    report: List[str] = field(default_factory=list)
    trees: Dict[str, Any] = field(default_factory=dict)
    attributes: Dict[str, Any] = field(default_factory=dict)
    facts: Optional[Dict[str, Any]] = None

    def __repr__(self) -> str:
        return (f'<OptimizerStates: {self.optimizer or "unknown optimizer"} at update {self.num_update}, '
                f'{len(self.parameters)} parameters>')

    def _repr_html_(self) -> str:
        hypers = {name: value for name, value in self.hypers.items() if value is not None}
        rows = [('hyper-parameters', ', '.join(f'{name} {value!r}' for name, value in hypers.items())),
                ('scheduler', (self.scheduler or {}).get('class')), *(('', line) for line in self.report[:4])]
        rows += [(info.name, f'{info.dtype}{list(info.shape)}, {self.counts.get(info.name, 0)} updates, '
                  f'{", ".join(self.slots.get(info.name) or ()) or "no slots"}') for info in self.parameters]
        return table(repr(self)[1:-1], without_none(rows))

    @property
    def names(self) -> List[str]:
        return [parameter.name for parameter in self.parameters]

    def as_rule(self, name: str, **hypers: Any) -> 'OptimizerStates':
        """The states as those of the rule ``name``, of which you know that it computes what an optimizer without a rule did.

        Its arrays become the rule's slots in their order, its attributes the hyper-parameters of the same names; ``hypers`` are
        those that it calls otherwise. ``report`` says what was taken on your word.

        Raises ValueError for states that have a rule, an unknown name, and arrays of another number or shape than the rule's slots.

        >>> info = ParameterInfo('w', 'w', (2,), 'float32')
        >>> arrays = {'0': numpy.zeros(2, 'float32'), '1': numpy.ones(2, 'float32')}
        >>> states = OptimizerStates('bertadam', {'beta1': 0.8}, 3, [info], {'w': 3}, {'w': arrays})
        >>> states.as_rule('adamw').hypers['beta1'], list(states.as_rule('adamw').slots['w'])
        (0.8, ['mean', 'var'])
        """
        return _as_rule(self, name, hypers)

    def under_own_names(self, arrays: Mapping[str, Any]) -> Dict[str, Any]:
        """``arrays`` by the names that these states have for them: a shared parameter may stand under its other name there."""
        first = {name: own for name, own in (self.facts or {}).get('shared', {}).items() if own not in arrays}
        return {first.get(name, name): array for name, array in arrays.items()}

    def renamed(self, names: Mapping[str, str]) -> 'OptimizerStates':
        """The same states with other names for the parameters in ``names``; itself where there are none."""
        if not names:
            return self

        def under(values: Dict[str, Any]) -> Dict[str, Any]:
            return {names.get(name, name): value for name, value in values.items()}

        infos = [replace(info, name=names.get(info.name, info.name)) for info in self.parameters]
        return replace(self, parameters=infos, counts=under(self.counts), slots=under(self.slots), master=under(self.master),
                       trees=under(self.trees))


class Weight(NamedTuple):
    """A parameter's value. ``copies`` has one array, or one per device where they differ (running statistics)."""

    name: str
    full_name: str
    copies: List[Array]
    grad_req: Optional[str] = None


@dataclass
class Run:
    """What a checkpoint holds besides the optimizer's states: the net, and the progress of the run.

    ``step, epoch, batch``  as the user counts them, None if not given
    ``metrics``             name -> value, used to keep the best checkpoint
    ``random``              the seed that MXNet was given when this was saved, and the states of NumPy's and Python's generators
    ``extra``               the user's own data, as JSON values
    """

    weights: List[Weight]
    step: Optional[int] = None
    epoch: Optional[int] = None
    batch: Optional[int] = None
    metrics: Dict[str, float] = field(default_factory=dict)
    random: Optional[Dict[str, Any]] = None
    extra: Dict[str, Any] = field(default_factory=dict)

    def _rows(self) -> Rows:
        position = {name: value for name in ('step', 'epoch', 'batch') for value in [getattr(self, name)] if value is not None}
        words = ', '.join(f'{name} {value}' for name, value in position.items())
        return without_none([('position', words), ('metrics', self.metrics), ('extra', self.extra)])

    def __repr__(self) -> str:
        return text(f'<Run: {len(self.weights)} weights>', self._rows())

    def _repr_html_(self) -> str:
        weights = [(weight.name, f'{numpy.dtype(copy.dtype).name}{list(copy.shape)}')
                   for weight in self.weights for copy in weight.copies[:1]]
        return table(f'Run: {len(self.weights)} weights', [*self._rows(), *weights])


# What a file holds: one, called '', or several under the user's names, as in GANs. These have the same producer, and
# their runs differ only in weights.
Parts = Mapping[str, Tuple[OptimizerStates, Optional[Run]]]


def chunks(array: Array) -> Iterator[numpy.ndarray]:
    """The elements in C order, little-endian, as contiguous pieces of at most 1 MiB.

    >>> [piece.tolist() for piece in chunks(numpy.arange(6, dtype='>i8').reshape(2, 3).T)]
    [[0, 3, 1, 4, 2, 5]]
    """
    if not isinstance(array, numpy.ndarray):
        yield from array.chunks()
        return
    dtype = array.dtype.newbyteorder('<')
    for piece in numpy.nditer(array, ['external_loop', 'buffered', 'zerosize_ok'], op_dtypes=[dtype], casting='equiv',
                              order='C', buffersize=(1 << 20) // dtype.itemsize):
        yield numpy.ascontiguousarray(piece)


def is_accumulated(variable: str) -> bool:
    """Whether a variable is of `gradients.Accumulate`: of the gradients that it has summed for the next update, or its k."""
    return variable.partition(':')[0] == ACCUMULATED


def what_was_accumulated(states: OptimizerStates) -> List[str]:
    """One phrase if there are gradients of batches that no update has used yet."""
    found = ACCUMULATED in states.variables
    return ['the gradients of batches that were accumulated for the next update: save after an update instead'] if found else []


def digest(states: OptimizerStates) -> str:
    """SHA-256 (hexadecimal) over what determines how training continues: the optimizer's name, ``num_update``, and by sorted
    name the type and shape of the weight, its count, and types, shapes and bytes of slots, master and the optimizer's
    variables. Hyper-parameters, rates, batches per update, the order of parameters and anything about devices are not included.
    """
    def add(arrays: Dict[str, Array]) -> None:
        for key, array in sorted(arrays.items()):
            sha.update(repr((key, numpy.dtype(array.dtype).name, tuple(array.shape))).encode())
            for piece in chunks(array):
                sha.update(piece)

    sha = hashlib.sha256(repr((states.optimizer.lower(), int(states.num_update))).encode())
    for info in sorted(states.parameters, key=lambda info: info.name):
        name, slots = info.name, dict(states.slots.get(info.name) or {})
        if name in states.master:
            slots['master'] = states.master[name]
        sha.update(repr((name, info.dtype, tuple(info.shape), int(states.counts.get(name, 0)), name in states.slots)).encode())
        add(slots)
    add({name: array for name, array in states.variables.items() if name != BATCHES_PER_UPDATE})
    return sha.hexdigest()


# States of an optimizer without a rule, given to the rule of which the user knows that it computes the same

def has_rule(states: OptimizerStates) -> bool:
    """Whether what the slots mean is known here."""
    return not states.trees and states.optimizer in rules.names(drop_ins=True, samplers=True)


def _as_rule(states: OptimizerStates, name: str, hypers: Dict[str, Any]) -> OptimizerStates:
    """`OptimizerStates.as_rule`."""
    rule: Type[Rule] = rules.get(name)
    if has_rule(states):
        raise ValueError(f'The states must be of an optimizer without a rule here. Received: those of {states.optimizer!r}, which '
                         'has one. Leave as_rule out.')
    known = {hyper.name for hyper in rule.declared({**states.hypers, **hypers}) + BASE_HYPERS}
    h = rule.hyperparameters(**{**{key: value for key, value in states.hypers.items() if key in known}, **hypers})
    result = replace(states, optimizer=rule.name, hypers=h.asdict(), slots={}, master={}, trees={}, attributes={}, variables={},
                     report=[*states.report, *_said(states, rule, h, hypers)])
    for info in states.parameters:
        if info.name in states.slots:
            result.slots[info.name], master = _slots(states, info, rule.slots(h))
            if master is not None:
                result.master[info.name] = master
    return result


def _slots(states: OptimizerStates, info: ParameterInfo, slots: Sequence[Slot]
           ) -> Tuple[Dict[str, numpy.ndarray], Optional[numpy.ndarray]]:
    """The arrays of one parameter by the names of the rule's slots, and its float32 master: MXNet puts that first."""
    arrays = list(states.slots[info.name].items())
    master = arrays.pop(0)[1] if info.dtype == 'float16' and len(arrays) == len(slots) + 1 else None
    if len(arrays) != len(slots):
        raise ValueError(f'{info.name!r} must have as many arrays as the rule has slots, {len(slots)}: '
                         f'{one_of(slot.name for slot in slots)}. Received: {len(arrays)}. Name another rule.')
    named = {}
    for slot, (place, array) in zip(slots, arrays):
        shape = slot.shape(info.shape)
        if array.shape != shape and not (shape == () and array.size == 1):
            raise ValueError(f'{slot.name!r} of {info.name!r} must have the shape {list(shape)}. Received: {list(array.shape)}, at '
                             f'the place {place} of the state. Name another rule.')
        named[slot.name] = array.reshape(shape)
    if master is not None and master.shape != tuple(info.shape):
        raise ValueError(f'The master of {info.name!r} must have the shape {list(info.shape)}. Received: {list(master.shape)}.')
    return named, master


def _said(states: OptimizerStates, rule: Type[Rule], h: Values, given: Dict[str, Any]) -> List[str]:
    """What was taken on the user's word."""
    names = one_of(slot.name for slot in rule.slots(h))
    lines = [f'{states.optimizer} is taken for {rule.name}, as you say: its arrays are {names}, in this order']
    assumed = {key: value for key, value in h.asdict().items() if key not in states.hypers and key not in given}
    if assumed:
        lines.append(f'not in the file, and taken to be {", ".join(f"{key}={value!r}" for key, value in assumed.items())}')
    left = [key for key in [*states.hypers, *states.attributes] if key not in h]
    if left:
        lines.append(f'{rule.name} has no {some_of(left)}, which {states.optimizer} had')
    return lines
