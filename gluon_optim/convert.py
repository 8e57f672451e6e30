"""From any readable file of states to another program's: what `gluon-optim convert` and tools/convert_states.py do."""
import contextlib
import importlib
import json
import os
import shutil
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy

from . import conversions, optax_states, replay, rules
from .foreign import APPROXIMATE, EXACT, find
from .states import atomic, container, inspection, legacy_writer
from .states.errors import StateFileError
from .states.neutral import OptimizerStates

__all__ = ['TARGETS', 'Job', 'Refused', 'convert', 'names_of']


class Refused(ValueError):
    """It would lose something, does not fit, or cannot be done here; no file was written."""

    exit_code = 1


class Job(NamedTuple):
    """One conversion: options of the command line, and what was read."""

    contents: inspection.Contents
    states: OptimizerStates
    output: str
    target: str = 'mirror'                  # class of the other framework, as in `gluon_optim.to_torch`
    names: Optional[List[str]] = None       # parameters, in the order in which they shall be written
    mxnet_version: Optional[int] = None     # 1 or 2: MXNet's own file of that version; None: ours
    allow_lossy: bool = False
    verify: int = 0                         # steps to replay on both sides before the file gets its name


def convert(job: Job, to: str) -> Dict[str, Any]:
    """Write ``job.output``, whole or not at all, and return the report of the conversion.

    Raises Refused where something does not fit or would be lost, a package is missing, or the file cannot be written.
    """
    with refusing():
        outcome = _verified(job, to) if job.verify else TARGETS[to].write(job, job.output)
    states = job.states
    return {'input': job.contents.path, 'output': job.output, 'to': to, 'target': job.target, 'optimizer': states.optimizer,
            'num_update': states.num_update, 'verified': outcome and outcome._asdict(), 'parameters': [
                {'name': info.name, 'shape': list(info.shape), 'dtype': info.dtype, 'updates': states.counts.get(info.name, 0),
                 'slots': sorted(states.slots.get(info.name, {})), 'master': info.name in states.master}
                for info in states.parameters],
            'lost': [line[6:] for line in states.report if line.startswith('lost: ')],
            'report': [line for line in states.report if not line.startswith('lost: ')]
            + ([f'verified: {outcome}'] if outcome else [])}


@contextlib.contextmanager
def refusing(reading: bool = False) -> Iterator[None]:
    """What goes wrong inside is no fault of the file that was read; where it is ``reading``, only what does not fit it."""
    try:
        yield
    except (StateFileError, OSError) as error:
        if reading:
            raise
        raise Refused(in_options(str(error))) from error
    except ImportError as error:
        raise Refused(str(error)) from error
    except (ValueError, TypeError, KeyError) as error:
        raise Refused(in_options(str(error.args[0] if error.args else error))) from error


def _verified(job: Job, to: str) -> replay.Outcome:
    """Write under another name, replay what was written, and give it its own name if it goes on as the run would have."""
    output = os.path.realpath(job.output)
    root, ending = os.path.splitext(output)
    partial = f'{root}.{os.getpid()}.partial{ending}'
    try:
        TARGETS[to].write(job, partial)
        outcome = _replayed(job, to, partial)
        if os.path.exists(output):
            shutil.copymode(output, partial)
        os.replace(partial, output)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)
    return outcome


def _replayed(job: Job, to: str, path: str) -> replay.Outcome:
    states = job.states
    if to == 'mxnet':
        return _read_back(job, path)
    chosen = conversions.select(states, job.names)
    label = EXACT
    if to == 'torch':
        rule = rules.get(states.optimizer)
        h, first = rule.hyperparameters(**states.hypers), min(states.counts.get(info.name, 0) for info in chosen)
        label = find(rule, job.target, states.hypers).label(h, first)
    promised = label != APPROXIMATE and not any(line.startswith('lost: ') for line in states.report)
    weights, whose = replay.weights_of(states, chosen, job.contents.parameters)
    steps = replay.rates(job.verify, label != EXACT, states.hypers['learning_rate'])
    outcome = replay.replay(replay.Run(states, chosen, weights, job.target, steps), path, to, whose)
    if promised and not outcome.equal:
        raise Refused(f'{outcome.parameter!r} differs by {outcome.difference:.2g} of the sum of its updates after {outcome.steps} '
                      f'steps in {outcome.runtime}, which is more than {outcome.limit:g}: the file would not go on as the run, and '
                      "was not kept. Convert to --target 'mirror', or report this as a fault of gluon_optim.")
    return outcome


def _read_back(job: Job, path: str) -> replay.Outcome:
    """MXNet's files hold the arrays as they are: they are read again and compared bit for bit."""
    names = None
    if job.mxnet_version is not None:
        said = len(job.states.report)
        names = legacy_writer.trainer_order(job.states, job.mxnet_version, job.names)
        del job.states.report[said:]  # writing has said it
    back = inspection.read(path, names).states
    if back is None or not _same(back, job.states):
        raise Refused('The file that was written does not hold the same states when it is read again, so it was removed. '
                      'Is the disk sound? If so, report this as a fault of gluon_optim.')
    return replay.Outcome(0, '', 0.0, '', 0.0, False, 'read again, and equal bit for bit')


def _same(a: OptimizerStates, b: OptimizerStates) -> bool:
    """Whether counts and arrays agree bit for bit; MXNet 1.x has no shape (), one number has shape (1,) there."""
    one, other = ({**{(name, slot): array for name, own in states.slots.items() for slot, array in own.items()},
                   **{(name, 'master'): array for name, array in states.master.items()}} for states in (a, b))
    return (a.num_update, a.counts, set(one)) == (b.num_update, b.counts, set(other)) and all(
        array.dtype == other[key].dtype and array.size == other[key].size and array.tobytes() == other[key].tobytes()
        for key, array in one.items())


def output_for(path: str, to: str, mxnet_version: Optional[int]) -> str:
    """Where the result goes if nothing is said: beside the input, with the ending of its kind."""
    ending = '.states' if to == 'mxnet' and mxnet_version else TARGETS[to].ending
    root = os.path.splitext(path)[0]
    return vacant(f'{root}.mxnet{mxnet_version}{ending}' if ending == '.states' else root + ending)


def vacant(output: str) -> str:
    """``output``, if no file has that name."""
    if os.path.exists(output):
        raise Refused(f'{output!r} exists. Give the file to be written as --output.')
    return output


def outline(array: Any) -> numpy.ndarray:
    """An array of the same shape and type that takes no memory: who names parameters need not keep their values."""
    return numpy.broadcast_to(numpy.zeros((), array.dtype), array.shape)


def needs_weights(states: OptimizerStates, to: str, verify: int) -> bool:
    """Whether the weights are more than names: they go into an ONNX model, a replay, and states that have not begun."""
    return to == 'onnx' or bool(verify) or any(name not in states.slots for name in states.names)


def size_of(job: Job) -> int:
    """About how many bytes will be written."""
    states = job.states
    arrays = [array for slots in [*states.slots.values(), states.master] for array in slots.values()]
    return sum(int(array.nbytes) for array in arrays)


def in_options(message: str) -> str:
    """A message with the options of the command line in place of the arguments of functions."""
    for argument, option in (('allow_lossy=True', '--allow-lossy'), ('params=', '--params'), ('target=', '--target '),
                             ('optimizer=', '--optimizer '), ('names=', '--map '), ('like=', '--like '),
                             ('suggest_names', '--map suggest')):
        message = message.replace(argument, option)
    return message


def names_of(params: Optional[str]) -> Tuple[Any, Optional[List[str]]]:
    """``--params`` as `read_states` takes it, and as an order: a .params file, a JSON list, lines of text, or 'a,b,c'."""
    if params is None:
        return None, None
    if not os.path.exists(params):
        if ',' not in params:
            raise FileNotFoundError(f'`--params` must be a file, or names with commas between them. Received: {params!r}, which '
                                    'does not exist.')
        return _list(params.split(','))
    if inspection.legacy.kind(params) in ('params', 'npz'):
        return params, None
    with open(params, encoding='utf-8') as file:
        text = file.read(1 << 24)
    if text.lstrip().startswith('['):
        names = json.loads(text)
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f'{params!r} must be a JSON list of names.')
        return _list(names)
    return _list(text.splitlines())


def _list(names: List[str]) -> Tuple[List[str], List[str]]:
    names = [name.strip() for name in names if name.strip()]
    return names, names


# Targets

class Target(NamedTuple):
    ending: str
    write: Callable[[Job, str], None]


def _to_torch(job: Job, path: str) -> None:
    mirror = importlib.import_module(f'{__package__}.torch')
    state_dict = mirror.to_torch(job.states, target=job.target, params=job.names, allow_lossy=job.allow_lossy, copy=False)
    with atomic.replacing(path) as file:
        mirror.torch.save(state_dict, file)


def _to_onnx(job: Job, path: str) -> None:
    mirror = importlib.import_module(f'{__package__}.onnx')
    mirror.write(path, job.states, job.target, job.names, job.contents.parameters or None, job.allow_lossy)


def _to_optax(job: Job, path: str) -> None:
    if job.target != 'mirror':
        raise Refused(f"'optax' has one target, 'mirror'. Received: target={job.target!r}.")
    chosen = conversions.select(job.states, job.names)
    optax_states.write(path, job.states, chosen, job.contents.parameters, job.allow_lossy)


def _to_mxnet(job: Job, path: str) -> None:
    if job.mxnet_version is not None:
        legacy_writer.write_states(path, job.states, job.mxnet_version, job.names, job.allow_lossy)
        return
    if job.contents.kind == 'states':
        raise Refused(f'{job.contents.path!r} is such a file already. Say which MXNet shall read it: --mxnet-version 1 or 2.')
    if not job.states.optimizer:
        raise Refused(f'{job.contents.path!r} does not contain its optimizer: what its arrays mean, and the update counts, are '
                      'unknown. Save it again with trainer.save_states.')
    container.write(path, job.states)


TARGETS: Dict[str, Target] = {
    'torch': Target('.pt', _to_torch),
    'onnx': Target('.onnx', _to_onnx),
    'optax': Target('.npz', _to_optax),
    'mxnet': Target('.safetensors', _to_mxnet),
}
