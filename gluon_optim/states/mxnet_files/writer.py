"""MXNet's own `.states` files, written without MXNet: what `Trainer.load_states` of 1.x or 2.x reads.

These files are pickles of the states by index and of the optimizer. They are assembled here from pickle's opcodes, because
`pickle` would have to import the classes that it names.
"""
import struct
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy

from ... import rules
from ...rules.compensated import KAHAN, is_compensated
from ...schema import one_of
from ..atomic import Path, replacing
from ..model import Array, OptimizerStates, chunks, what_was_accumulated
from . import mxnet2
from .builtins import BUILTINS, Layout, MXNetClass, classes
from .ndarray_format import DTYPES, LIST_MAGIC, NUMPY_SHAPES, STORAGE_TYPES

__all__ = ['trainer_order', 'what_is_lost', 'write_params', 'write_states']


# names of the same argument in 1.x, in 2.x, and as an attribute
SYNONYMS = (('epsilon', 'eps', 'float_stable_eps'), ('rho', 'gamma1'), ('momentum', 'gamma2'))


def write_states(path: Path, states: OptimizerStates, version: int, names: Optional[Sequence[str]] = None, allow_lossy: bool = False
                 ) -> None:
    """Write ``states`` as a ``.states`` file that MXNet 1.x or 2.x loads with ``Trainer.load_states`` or ``Updater``.

    Parameters
    ----------
    path : str or os.PathLike
    states : OptimizerStates
        From an optimizer of that MXNet version, or of this package, which must then be installed where the file is loaded.
    version : 1 or 2
    names : list of str, optional
        The parameters in the order of the trainer that will load the file, which identifies them only by position. By
        default, the order of ``states``, or sorted as in trainers of that version if the net's names are known.
    allow_lossy : bool
        Write even if something is lost: `what_is_lost` says what, and so does ``states.report`` afterwards.

    Raises ValueError if MXNet has no such optimizer, the names are not those of ``states``, or something would be lost.
    """
    if version not in (1, 2):
        raise ValueError(f'`version` must be 1 or 2. Received: version={version!r}.')
    if states.trees:
        raise ValueError('The optimizer must be one of gluon_optim.list_optimizers(), or it is unknown what its arrays mean. '
                         f'Received: {states.optimizer!r}. '
                         "If it computes what one of them does, say which: states.as_rule('adamw').")
    target = _class(states, version)
    lost = what_is_lost(states, version)
    if lost and not allow_lossy:
        raise ValueError(f"MXNet {version}.x would lose {'; '.join(lost)}. Pass allow_lossy=True to convert anyway.")
    order = trainer_order(states, version, names)
    index = {name: place for place, name in enumerate(order) if name}
    indexed = {index[name]: _state(states, name, version) for name in states.slots}
    optimizer = _Object(target.path, _attributes(states, version, target, index))
    states.report.extend('lost: ' + line for line in lost if 'lost: ' + line not in states.report)
    with replacing(path) as file:
        file.write(b'\x80\x04')
        for piece in _pickled((indexed, optimizer), version):
            file.write(piece)
        file.write(b'.')


def what_is_lost(states: OptimizerStates, version: int) -> List[str]:
    """What a ``.states`` file of that version cannot hold, or its optimizer does differently, one phrase each."""
    target, hypers = _class(states, version), states.hypers
    known = {name for argument in (*target.arguments, *BASE) for name in _synonyms(argument)}
    lost = [f'{name}={value!r}, which its {states.optimizer} does not have' for name, value in hypers.items()
            if name not in known and (name, value) not in NEUTRAL]
    if _computed_by(states) != version:
        lost += mxnet2.differences(states)
    if states.scheduler and not states.scheduler['class'].startswith(SCHEDULERS):
        lost.append(f"the scheduler {states.scheduler['class']}: create the trainer with it")
    if states.loss_scaler:
        lost.append('the state of the AMP loss scaler')
    return lost + what_was_accumulated(states)


def _written_by(states: OptimizerStates) -> int:
    return 2 if states.producer.get('mxnet', '').startswith('2') else 1


def _computed_by(states: OptimizerStates) -> int:
    """The version of MXNet by whose formula they continue."""
    return {'1.x': 1, '2.x': 2}.get(states.hypers.get('variant', ''), _written_by(states))


BASE = ('learning_rate', 'wd', 'rescale_grad', 'clip_gradient', 'begin_epoch')
# values that need no such argument
NEUTRAL = [('momentum_correction', False), ('correct_bias', True), ('epsilon', 0.0), ('temperature', 1.0), ('noise', 'mxnet'),
           ('variant', '1.x'), ('variant', '2.x')]  # see _computed_by
SCHEDULERS = ('mxnet.lr_scheduler.', 'gluon_optim.mxnet.lr_scheduler.')


def _class(states: OptimizerStates, version: int) -> MXNetClass:
    known = classes(version)
    if states.optimizer in known:
        return known[states.optimizer]
    if states.optimizer in rules.names(samplers=True):
        rule = rules.get(states.optimizer)
        if rule.__module__.startswith('gluon_optim.rules.') and '.mx.' not in rule.__module__:
            arguments = dict(states.hypers)
            own = {'_names': tuple(name for name in arguments if name != 'learning_rate'), 'aggregate_num': 2 ** 31 - 1,
                   '_restored_counts': {}, **({'use_fused_step': False} if version == 2 else {})}
            return MXNetClass(f'gluon_optim.mxnet.registry.{rule.__name__}', arguments, own)
    raise ValueError(f'MXNet {version}.x must have the optimizer. Received: {states.optimizer!r}. It has {one_of(sorted(known))}, '
                     'and with gluon_optim installed also those of `gluon-optim list`. Convert to another target.')


def trainer_order(states: OptimizerStates, version: int, names: Optional[Sequence[str]]) -> List[str]:
    """The parameters in the order of that MXNet version's trainer; '' for a position with an unknown parameter."""
    if names is not None:
        strangers = sorted(set(states.slots) - set(names))
        if strangers or len(set(names)) < len(names):
            raise ValueError(f'`names` must list all parameters, each once. Missing or repeated: {one_of(strangers[:8])}.')
        return list(names)
    if all(name.isdecimal() for name in states.names):  # the indices of an old file
        order = [''] * (max(map(int, states.names), default=-1) + 1)
        for name in states.names:
            order[int(name)] = name
        return order
    if _written_by(states) == version:
        return states.names
    structural = any(info.name != info.full_name for info in states.parameters)
    if version == 2 and structural:
        states.report.append("The parameters are in the order of MXNet 2.x's trainers: sorted by structural name.")
        return sorted(states.names)
    states.report.append('The parameters are in the order of the trainer that wrote the states; trainers of another version may '
                         'order them differently. If so, pass their names in the right order, [p.name for p in trainer._params].')
    return states.names


def _synonyms(argument: str) -> Tuple[str, ...]:
    return next((group for group in SYNONYMS if argument in group), (argument,))


def _attributes(states: OptimizerStates, version: int, target: MXNetClass, index: Mapping[str, int]) -> Dict[str, Any]:
    """The optimizer's attributes: everything its constructor would have set."""
    hypers = states.hypers
    begin = states.num_update - max(states.counts.values(), default=0)
    counts = {index[name]: count + begin for name, count in states.counts.items() if count and name in index}
    attributes = {
        'rescale_grad': hypers.get('rescale_grad', 1.0), 'clip_gradient': hypers.get('clip_gradient'), 'wd': hypers.get('wd', 0.0),
        'lr': hypers.get('learning_rate'), 'lr_scheduler': _scheduler(states), 'lr_mult': _multipliers(states, 'lr_mult', index),
        'wd_mult': _multipliers(states, 'wd_mult', index), 'begin_num_update': begin, 'num_update': states.num_update,
        '_all_index_update_counts': {0: counts}, '_index_update_count': counts,
        'multi_precision': KAHAN if any(map(is_compensated, states.slots.values())) else bool(states.master),
        'aggregate_num': 1 if version == 2 else 0, 'idx2name': {}, 'sym_info': (), 'allow_np_array': version == 2,
    }
    for argument, default in target.arguments.items():
        if argument != 'learning_rate':
            attributes[argument] = next((hypers[name] for name in _synonyms(argument) if name in hypers), default)
    attributes.update(target.attributes)
    if states.optimizer == 'lbsgd':
        attributes['init_updates'] = hypers.get('begin_epoch', 0) * attributes['updates_per_epoch']
    attributes.update(_variables(states, target, index))
    return attributes


def _scheduler(states: OptimizerStates) -> Any:
    scheduler = states.scheduler
    return _with_objects(scheduler) if scheduler and scheduler['class'].startswith(SCHEDULERS) else None


def _with_objects(value: Any) -> Any:
    """``value`` with an object for each record of a scheduler."""
    if isinstance(value, dict) and set(value) == {'class', 'attributes'}:
        return _Object(value['class'], _with_objects(value['attributes']))
    if isinstance(value, dict):
        return {name: _with_objects(item) for name, item in value.items()}
    return [_with_objects(item) for item in value] if isinstance(value, list) else value


def _multipliers(states: OptimizerStates, which: str, index: Mapping[str, int]) -> Dict[int, float]:
    """Multipliers by index: Gluon trainers use those of their parameters instead, other users need these."""
    return {index[info.name]: getattr(info, which) for info in states.parameters
            if info.name in index and getattr(info, which) != 1}


def _variables(states: OptimizerStates, target: MXNetClass, index: Mapping[str, int]) -> Dict[str, Any]:
    """What belongs to the optimizer as a whole; ``part:name`` is one entry of lbsgd's gradients for a parameter."""
    found: Dict[str, Any] = {}
    for variable, array in states.variables.items():
        value = array.item() if array.ndim == 0 else array
        part, _, name = variable.partition(':')
        if not name and (part in target.attributes or part == 'seed'):
            found[part] = value
        elif name in index and part == 'stream':
            found.setdefault('streams', {})[index[name]] = value
        elif name in index and 'cumgrads' in target.attributes:
            found.setdefault('cumgrads', {}).setdefault(index[name], {})[part] = value
    return found


def _state(states: OptimizerStates, name: str, version: int) -> Any:
    """One parameter's state, nested as in its optimizer."""
    slots, master = states.slots[name], states.master.get(name)
    if states.optimizer in classes(version):
        builtin = BUILTINS[states.optimizer.replace('mxnet.', '')]
        state = _nested(slots, _layout(states.optimizer, slots, builtin.layouts(version)))
        last = builtin.is_master_last(version)
    else:
        state, last = tuple(array.reshape(array.shape or (1,)) for array in slots.values()), False
    if master is None:
        return state
    return (state, master) if last else (master, state)


def _layout(optimizer: str, slots: Mapping[str, Any], layouts: Sequence[Layout]) -> Layout:
    """The smallest of ``layouts`` that has a place for all ``slots``."""
    for layout in sorted(layouts, key=lambda layout: len(_places(layout))):
        if set(slots) <= set(_places(layout)):
            return layout
    raise ValueError(f'The slots of {optimizer} must be those of {one_of(layouts)}. Received: {one_of(slots)}.')


def _places(layout: Layout) -> Tuple[str, ...]:
    return (layout,) if isinstance(layout, str) else layout or ()


def _nested(slots: Mapping[str, Any], layout: Any) -> Any:
    if isinstance(layout, tuple):
        return tuple(slots.get(name) for name in layout)
    return slots.get(layout)


# Pickle

class _Object(NamedTuple):
    path: str
    attributes: Mapping[str, Any]


_FLAGS = {numpy.dtype(code): flag for flag, code in DTYPES.items() if code != 'bfloat16'}


def _pickled(value: Any, version: int) -> Iterator[Union[bytes, numpy.ndarray]]:
    """``value`` in opcodes of protocol 4, piece by piece."""
    if isinstance(value, numpy.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        yield {None: b'N', True: b'\x88', False: b'\x89'}[value]
    elif isinstance(value, int):
        yield b'\x8a\x08' + value.to_bytes(8, 'little', signed=True)
    elif isinstance(value, float):
        yield b'G' + struct.pack('>d', value)
    elif isinstance(value, str):
        text = value.encode()
        yield b'X' + struct.pack('<I', len(text)) + text
    elif isinstance(value, _Object):
        yield _global(value.path) + b')\x81'
        yield from _pickled(dict(value.attributes), version)
        yield b'b'
    elif isinstance(value, (tuple, list, dict)):
        yield b'('
        for item in value if not isinstance(value, dict) else (x for pair in value.items() for x in pair):
            yield from _pickled(item, version)
        yield b't' if isinstance(value, tuple) else b'l' if isinstance(value, list) else b'd'
    else:
        yield from _ndarray(value, version)


def _global(path: str) -> bytes:
    module, _, name = path.rpartition('.')
    return f'c{module}\n{name}\n'.encode('ascii')


def _ndarray(array: numpy.ndarray, version: int) -> Iterator[Union[bytes, numpy.ndarray]]:
    """An NDArray on the CPU, as written by MXNet's `NDArray.__reduce__` and `NDArray::Save`."""
    shape = array.shape if version == 2 else array.shape or (1,)
    head = _head(array, shape, version)
    yield _global('mxnet.ndarray.ndarray.NDArray') + b'N\x85R}X\x06\x00\x00\x00handle' + _global('builtins.bytearray')
    yield b'\x8e' + struct.pack('<Q', len(head) + array.nbytes) + head
    yield from chunks(array)
    yield b'\x85Rsb'


def _head(array: Array, shape: Sequence[int], version: int) -> bytes:
    """What `NDArray::Save` writes before the elements."""
    return struct.pack(f'<Iii{len(shape)}qiii', NUMPY_SHAPES if version == 2 else STORAGE_TYPES, 0, len(shape), *shape, 1, 0,
                       _FLAGS[numpy.dtype(array.dtype).newbyteorder('<')])


# Parameters

def write_params(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write ``arrays`` as `mx.nd.save` of MXNet 1.x does, complete or not at all. Those without dimensions get one."""
    with replacing(path) as file:
        file.write(struct.pack('<QQQ', LIST_MAGIC, 0, len(arrays)))
        for array in arrays.values():
            file.write(_head(array, array.shape or (1,), 1))
            for piece in chunks(array):
                file.write(piece)
        file.write(struct.pack('<Q', len(arrays)))
        for name in map(str.encode, arrays):
            file.write(struct.pack('<Q', len(name)) + name)
