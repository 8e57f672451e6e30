"""What a training run's optimizer holds, as NumPy arrays under names: no framework, no device."""
import hashlib
from dataclasses import dataclass, field, replace
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import numpy

__all__ = ['NO_OPTIMIZER', 'STATISTICS', 'Array', 'OptimizerStates', 'ParameterInfo', 'Run', 'Weight', 'chunks', 'digest']

STATISTICS = ('running_mean', 'running_var', 'moving_mean', 'moving_var')  # ends of names of what no optimizer updates
NO_OPTIMIZER = 'none'  # the name of the optimizer in a checkpoint of a net alone
Array = Any  # a numpy.ndarray, or what has `shape`, `dtype` and `chunks()`: an array of a device that is copied in pieces


@dataclass
class ParameterInfo:
    """One parameter as its trainer knew it, in trainer order."""

    name: str                      # the key of everything below: structural where the net was given, else Parameter.name
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
    ``hypers``      every hyper-parameter by MXNet's name; learning_rate, wd, rescale_grad, clip_gradient included
    ``num_update``  MXNet's global update number, what a scheduler sees (begin_num_update included)
    ``names``       parameters in trainer order
    ``counts``      updates that each parameter has seen (t of its last update; begin_num_update not included)
    ``slots``       name -> slot -> array
    ``master``      name -> float32 weights, for parameters trained with multi_precision
    ``scheduler``   {'class': path, 'attributes': {...}} or None
    ``variables``   arrays that belong to the optimizer as a whole
    ``trees``       name -> how MXNet nests its slots ('0', '1.0', ...), for optimizers that have no rule here
    ``attributes``  of such optimizers, those that are not plain values: name -> tree (`gluon_optim.states.nesting`)
    ``facts``       what a conversion must know of the net's layers (docs/FORMAT.md), None where it is unknown
    ``report``      what the reader or a conversion has to say, one string a line
    ``parameters``  one `ParameterInfo` for each name: shape and dtype of the weight, lr_mult, wd_mult
    ``loss_scaler``  what AMP's loss scaler holds, or None
    ``producer``    name -> version of the programs that wrote the file

    Raises nothing: states are checked where they are written, loaded or converted.

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

    @property
    def names(self) -> List[str]:
        return [parameter.name for parameter in self.parameters]

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
    """A parameter's value. ``copies`` has one array, or one of each device where they differ (running statistics)."""

    name: str
    full_name: str
    copies: List[Array]
    grad_req: Optional[str] = None


@dataclass
class Run:
    """What a checkpoint holds besides the optimizer's states: the net, and where the run stands.

    ``step, epoch, batch``  as the user counts them, None where not given
    ``metrics``             name -> value, by which the best checkpoint is kept
    ``random``              the seed that MXNet was given when this was saved, and the states of NumPy's and Python's generators
    ``extra``               the user's own, as JSON has it
    """

    weights: List[Weight]
    step: Optional[int] = None
    epoch: Optional[int] = None
    batch: Optional[int] = None
    metrics: Dict[str, float] = field(default_factory=dict)
    random: Optional[Dict[str, Any]] = None
    extra: Dict[str, Any] = field(default_factory=dict)


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


def digest(states: OptimizerStates) -> str:
    """SHA-256 (hexadecimal) over what decides how training goes on: the optimizer's name, ``num_update``, and by sorted
    name the type and shape of the weight, its count, and types, shapes and bytes of slots, master and the optimizer's
    variables. Not over hyper-parameters, rates, the order of parameters, or anything about devices.
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
    add(states.variables)
    return sha.hexdigest()
