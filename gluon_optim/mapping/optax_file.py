"""The state of optimizers made by `gluon_optim.optax.create`, as NumPy arrays and as a file. Nothing here imports JAX.

The file is an ordinary .npz: `numpy.load` reads it, and `gluon_optim.optax.load` turns it into a state in JAX.

    gluon_optim.json       UTF-8 text as bytes: the optimizer, the arguments of `create`, the run
    count                  updates of all parameters; if they differ, counts/<name> for each
    slots/<slot>/<name>    the rule's arrays
    master/<name>          float32 weights of float16 parameters
"""
import dataclasses
import json
import zipfile
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type, Union

import numpy

from .. import rules
from ..rules import Rule
from ..schema import Values
from ..states import atomic, json_text, mxnet_files, record
from ..states.errors import StateFileError, UnreadableFile, reading
from ..states.files import OpenFile, Path, open_once
from ..states.model import MULTIPLIERS, OptimizerStates, ParameterInfo
from . import loss_scalers, scheduling
from .classes import Foreign, own_class
from .losses import LEAVE_OUT, what_is_lost, what_to_say
from .selection import normalize
from .state_dict import fresh_entry, to_state_dict, weight_of

__all__ = ['MULTIPLIERS', 'Packed', 'arguments', 'pack', 'read', 'write']

JSON = 'gluon_optim.json'
VERSION = 1


class Packed(NamedTuple):
    """The state of an optimizer, one entry for each of ``names``. Arrays are the states' own, not copies."""

    names: List[str]
    counts: List[int]
    slots: Dict[str, List[numpy.ndarray]]
    masters: List[Optional[numpy.ndarray]]


def pack(states: OptimizerStates, chosen: Sequence[ParameterInfo], weights: Optional[Mapping[str, Any]] = None,
         allow_lossy: bool = False) -> Packed:
    """The parameters ``chosen`` of ``states``; what is lost and what to do by hand goes to ``states.report``.

    ``weights`` are needed for parameters without any update if their state starts from the weight.
    Raises ValueError if the states do not fit the rule, or something would be lost.
    """
    states, rule, h = normalize(states, allow_lossy)
    mirrored = as_foreign(rule, h)
    lost = what_is_lost(mirrored, rule, h, states, chosen)
    if lost and not allow_lossy:
        raise ValueError(f"optax would lose {'; '.join(lost)}. Pass allow_lossy=True to convert anyway.")
    entries = to_state_dict(mirrored, rule, h, states, chosen)['state']
    known = weights or {}
    full = [entries.get(position)
            or fresh_entry(rule.slots(h), info, weight_of(info, known) if info.name in known else None)
            for position, info in enumerate(chosen)]
    lines = ['lost: ' + line for line in lost] + _say(mirrored, h, states, chosen)
    states.report.extend(line for line in lines if line not in states.report)
    return Packed([info.name for info in chosen], [int(entry.get('step', 0)) for entry in full],
                  {slot.name: [numpy.asarray(entry[slot.name]) for entry in full] for slot in rule.slots(h)},
                  [entry.get('master') for entry in full])


def arguments(states: OptimizerStates, chosen: Sequence[ParameterInfo]) -> Dict[str, Any]:
    """What `create` needs besides the name to continue from ``states``; multipliers are lists in the order of ``chosen``."""
    states, _, h = normalize(states, allow_lossy=True)  # `pack` has already checked
    found, rate = dict(h.asdict(), rescale_grad=1.0), scheduling.next_rate(states)
    if rate is not None:
        found['learning_rate'] = rate
    for name in MULTIPLIERS:
        mults = [getattr(info, name) for info in chosen]
        if set(mults) != {1.0}:
            found[name] = mults
    halves = {info.name for info in chosen if info.dtype == 'float16'} & set(states.slots)
    return dict(found, multi_precision=False) if halves - set(states.master) else found


def as_foreign(rule: Type[Rule], h: Values) -> Foreign:
    """How an optimizer made by `create` stores ``rule``: everything, under our own names."""
    own = {slot.name: slot.name for slot in rule.slots(h)}
    return own_class(rule, h.asdict())._replace(path=f'gluon_optim.optax.create({rule.name!r})', slots=own, compensations=False)


# Files

def write(path: Path, states: OptimizerStates, chosen: Sequence[ParameterInfo], weights: Optional[Mapping[str, Any]] = None,
          allow_lossy: bool = False) -> None:
    """Write the parameters ``chosen`` of ``states`` to ``path``, completely or not at all. Arrays are copied in small pieces.

    Raises what `pack` raises, and OSError if the file system refuses.
    """
    states, _, _ = normalize(states, allow_lossy)
    packed = pack(states, chosen, weights, allow_lossy)
    about = {'version': VERSION, 'optimizer': states.optimizer, 'states': record.record_of(states, chosen),
             'arguments': {key: dict(zip(packed.names, value)) if key in MULTIPLIERS else value
                           for key, value in arguments(states, chosen).items()}}
    with atomic.replacing(path) as file, zipfile.ZipFile(file, 'w') as archive:
        for key, array in _members(packed, about):
            with archive.open(zipfile.ZipInfo(key + '.npy'), 'w', force_zip64=True) as member:
                numpy.lib.format.write_array(member, numpy.asarray(array, order='C'), allow_pickle=False)


def _members(packed: Packed, about: Mapping[str, Any]) -> Iterator[Tuple[str, numpy.ndarray]]:
    yield JSON, numpy.frombuffer(json.dumps(about).encode(), 'uint8')
    if len(set(packed.counts)) == 1:
        yield 'count', numpy.array(packed.counts[0], 'int32')
    else:
        yield from ((f'counts/{name}', numpy.array(count, 'int32')) for name, count in zip(packed.names, packed.counts))
    for slot, arrays in packed.slots.items():
        yield from ((f'slots/{slot}/{name}', array) for name, array in zip(packed.names, arrays))
    yield from ((f'master/{name}', array) for name, array in zip(packed.names, packed.masters) if array is not None)


def read(path: Union[Path, OpenFile]) -> Tuple[OptimizerStates, Dict[str, Any]]:
    """The states in a file of `write`, and the arguments of `create`. Nothing in the file is executed.

    Raises StateFileError for a damaged or incomplete file or a different kind of file, OSError if it cannot be opened.
    """
    with open_once(path) as file:
        arrays, path = mxnet_files.read_params(file), file.path
    try:
        with reading(path, KeyError, TypeError):
            return _read(arrays)
    except UnreadableFile:
        raise
    except (KeyError, TypeError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else f'{JSON} must be present and complete. Received: {error!r}.'
        raise StateFileError(f'Cannot read {path!r}: {reason}') from None


def _read(arrays: Dict[str, numpy.ndarray]) -> Tuple[OptimizerStates, Dict[str, Any]]:
    about = json_text.loads(arrays.pop(JSON).tobytes(), JSON)
    if about['version'] != VERSION:
        raise StateFileError(f'its version must be {VERSION}. Received: {about["version"]!r}. Install a newer gluon_optim.')
    states = record.states_of(about['states'])
    rule = rules.get(states.optimizer)
    h = rule.hyperparameters(**states.hypers)
    for name in states.names:
        count = arrays.pop(f'counts/{name}', arrays.get('count'))
        if count is None:
            raise StateFileError(f"the number of updates of {name!r} must be there as 'count' or {'counts/' + name!r}.")
        if count.shape != () or not 0 <= count <= 2**53 or count % 1:
            raise StateFileError(f'the number of updates of {name!r} must be a whole number. Received: {count!r}.')
        states.counts[name] = int(count)
    renamed = {}
    for key in [key for key in arrays if key.startswith(('slots/', 'master/'))]:
        kind, _, rest = key.partition('/')
        slot, _, name = rest.partition('/') if kind == 'slots' else ('master', '', rest)
        renamed[f'{name}/{slot}'] = arrays.pop(key)
    before = max(about['states']['counts'].values(), default=0)
    updates = max(states.counts.values(), default=0) - before
    record.later(states, updates)
    record.take(states, about['states'], rule.slots(h), renamed, updates)
    return states, about['arguments']


# Parts

def _say(foreign: Foreign, h: Values, states: OptimizerStates, chosen: Sequence[ParameterInfo]) -> List[str]:
    """What the user must do by hand: lines for the report."""
    alike = [dataclasses.replace(info, lr_mult=1.0, wd_mult=1.0) for info in chosen]  # `arguments` has the multipliers
    lines = what_to_say(foreign, h, dataclasses.replace(states, master={}), alike, LEAVE_OUT)
    how = 'learning_rate is go.optax.schedule(states) in go.optax.arguments(states), and in what go.optax.load returns for a file'
    otherwise = 'pass a function of the number of updates done as learning_rate'
    return [*lines, *loss_scalers.what_becomes_of_it(states.loss_scaler, to_pytorch=False),
            *scheduling.what_becomes_of_it(states, how, otherwise)]
