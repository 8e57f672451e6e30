"""From any readable file of states to another program's: what `gluon-optim convert` and tools/convert_states.py do."""
import contextlib
import importlib
import json
import os
import re
import shutil
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import numpy

from . import conversions, optax_states, readers, replay, rules
from .foreign import APPROXIMATE, EXACT, FOREIGN, find
from .states import atomic, container, inspection, legacy_writer
from .states.errors import StateFileError
from .states.neutral import NO_OPTIMIZER, OptimizerStates

__all__ = ['CLASSES', 'TARGETS', 'Job', 'Refused', 'convert', 'names_of']

LONGEST = 1 << 24  # bytes of a list of names


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
        _check_optimizer(job, to)
        if to != 'mxnet':
            job = job._replace(states=conversions.understood(job.states, job.allow_lossy)[0])
        states = job.states
        outcome = _verified(job, to) if job.verify else TARGETS[to].write(job, job.output)
        chosen = states.parameters if to == 'mxnet' else conversions.select(states, job.names)
    return {'input': job.contents.path, 'output': job.output, 'to': to, 'target': job.target, 'optimizer': states.optimizer,
            'num_update': states.num_update, 'verified': outcome and outcome._asdict(), 'parameters': [
                {'name': info.name, 'shape': list(info.shape), 'dtype': info.dtype, 'updates': states.counts.get(info.name, 0),
                 'slots': sorted(states.slots.get(info.name, {})), 'master': info.name in states.master}
                for info in chosen],
            'lost': [in_options(line[6:]) for line in states.report if line.startswith('lost: ')],
            'report': [in_options(line) for line in states.report if not line.startswith('lost: ')]
            + ([f'verified: {outcome}'] if outcome else [])}


def _check_optimizer(job: Job, to: str) -> None:
    name, path = job.states.optimizer, job.contents.path
    if not name:
        raise Refused(f'{path!r} does not contain its optimizer: what its arrays mean, and the update counts, are unknown. Save '
                      'it again with trainer.save_states.')
    if name == NO_OPTIMIZER:
        raise Refused(f'{path!r} is a checkpoint of a net alone, without an optimizer. Pass --what model to convert its weights.')
    if to != 'mxnet' and name not in rules.names(drop_ins=True):
        raise Refused(f'The optimizer must be one of `gluon-optim list`. Received: {name!r}. If it is your own, convert in Python, '
                      'after importing the module that registers it: '
                      f'gluon_optim.to_{to}(gluon_optim.read_states({path!r})).')


@contextlib.contextmanager
def refusing(reading: bool = False) -> Iterator[None]:
    """What goes wrong inside is no fault of the file that was read; where it is ``reading``, only what does not fit it."""
    try:
        yield
    except (StateFileError, OSError) as error:
        if reading:
            raise
        raise Refused(in_options(words(error))) from error
    except (ImportError, ValueError, TypeError, KeyError) as error:
        raise Refused(in_options(words(error), reading)) from error


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
    _, rule, h = conversions.understood(states, job.allow_lossy)
    label = EXACT
    if to == 'torch':
        label = find(rule, job.target, states.hypers).label(h, min(states.counts.get(info.name, 0) for info in chosen))
    promised = label != APPROXIMATE and not any(line.startswith('lost: ') for line in states.report)
    weights, whose = replay.weights_of(states, chosen, job.contents.parameters)
    whose += '' if label == EXACT else ', at a constant learning rate'
    steps = replay.rates(job.verify, label != EXACT, h.learning_rate)
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
    counts, others = ({name: count for name, count in states.counts.items() if count} for states in (a, b))
    return (a.num_update, counts, set(one)) == (b.num_update, others, set(other)) and all(
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


def keep_apart(written: Mapping[str, Optional[str]], read: Mapping[str, Optional[str]]) -> None:
    """Refuse where a file that is to be written, by option, is one that is read, or two are the same: one would be lost."""
    others = dict(read)
    for option, path in written.items():
        for other, its in others.items():
            if path and its and _same_file(path, its):
                raise Refused(f'{option} must be another file than {other}, which would be lost. Received: {path!r}.')
        others[option] = path


def _same_file(a: str, b: str) -> bool:
    both = os.path.exists(a) and os.path.exists(b)
    return os.path.samefile(a, b) if both else os.path.realpath(a) == os.path.realpath(b)


# Messages

def words(error: BaseException) -> str:
    """What an error says, without numbers and quotes that Python adds."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f': {error.filename!r}' if error.filename else '')
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error) or type(error).__name__


ARGUMENT = re.compile(r'(?<![\w.])(?:`(params|target|optimizer|names|like|weights)`|(params|target|optimizer|names|like)=)')
OPTIONS = {'`names`': 'params', '`weights`': 'params', 'names=': 'map'}  # where an option is not called as the argument
PHRASES = (('allow_lossy=True', '--allow-lossy'), ('suggest_names', '--map suggest'), ('like= the module or a', '--like a'),
           ('`params` as a dictionary of names to weights', '--params a .params file with the weights'),
           ('Set states.', 'In Python, set states.'))


def in_options(message: str, reading: bool = False) -> str:
    """A message with the options of the command line in place of the arguments of functions; those of ``reading`` or writing.

    >>> in_options("Leave `params` out, or pass target='mirror' or allow=['lions.Lion'].")
    "Leave --params out, or pass --target 'mirror' or --allow lions.Lion."
    """
    def option(match: Any) -> str:
        name = OPTIONS.get(match[0], match[1] or match[2])
        name = 'source' if reading and name == 'target' else name
        return f'--{name}' + (' ' if match[0].endswith('=') and message[match.end():match.end() + 1] in ("'", '"') else '')

    for argument, phrase in PHRASES:
        message = message.replace(argument, phrase)
    message = re.sub(r'(?<!in Python, )set states\.', 'in Python, set states.', message)
    message = re.sub(r"\ballow=\['([^']*)'\]", r'--allow \1', message)
    return ARGUMENT.sub(option, message)


# Names

def names_of(params: Optional[str]) -> Tuple[Any, Optional[List[str]]]:
    """``--params`` as `read_states` takes it, and as an order: a .params file, a JSON list, lines of text, or 'a,b,c'.

    >>> names_of('0.weight,')[1]
    ['0.weight']
    """
    if params is None:
        return None, None
    if not os.path.exists(params):
        if ',' not in params:
            raise FileNotFoundError('--params must be a file, or names with commas between them; one name alone has a comma '
                                    f'behind it. Received: {params!r}, which does not exist.')
        return _list(params, params.split(','))
    if not os.path.isfile(params):
        raise _no_names(params, 'a folder, a pipe or a device')
    kind = readers.kind(params)
    if kind in ('params', 'npz'):
        return params, None
    if kind != 'unknown':
        raise _no_names(params, {'states': 'a .states file of MXNet', 'container': 'a safetensors file'}.get(kind, kind))
    with open(params, 'rb') as file:
        data = file.read(LONGEST + 1)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = '\0'
    if '\0' in text or len(data) > LONGEST:
        raise _no_names(params, 'a file of an unknown kind')
    return _list(params, _json_list(params, text) if text.lstrip().startswith('[') else text.splitlines())


def _json_list(path: str, text: str) -> List[str]:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _no_names(path, f'a file that begins as JSON and is none ({error})') from None
    if not all(isinstance(name, str) for name in names):
        raise _no_names(path, 'a list of other things')
    return list(names)


def _list(params: str, names: List[str]) -> Tuple[List[str], List[str]]:
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise _no_names(params, 'no name')
    return names, names


def _no_names(params: str, what: str) -> ValueError:
    return ValueError('--params must be a .params or .npz file, a JSON list of names, a text file with one name a line, or names '
                      f'with commas. Received: {params!r}, {what}.')


# Targets

class Target(NamedTuple):
    ending: str
    write: Callable[[Job, str], None]
    classes: Tuple[str, ...] = ('mirror',)   # what --target may be


def _to_torch(job: Job, path: str) -> None:
    mirror = importlib.import_module(f'{__package__}.torch')
    state_dict = mirror.to_torch(job.states, target=job.target, params=job.names, allow_lossy=job.allow_lossy, copy=False)
    with atomic.replacing(path) as file:
        mirror.torch.save(state_dict, file)


def _to_onnx(job: Job, path: str) -> None:
    mirror = importlib.import_module(f'{__package__}.onnx')
    mirror.write(path, job.states, job.target, job.names, job.contents.parameters or None, job.allow_lossy)


def _to_optax(job: Job, path: str) -> None:
    chosen = conversions.select(job.states, job.names)
    optax_states.write(path, job.states, chosen, job.contents.parameters, job.allow_lossy)


def _to_mxnet(job: Job, path: str) -> None:
    if job.mxnet_version is not None:
        legacy_writer.write_states(path, job.states, job.mxnet_version, job.names, job.allow_lossy)
        return
    if job.contents.kind == 'states':
        raise Refused(f'{job.contents.path!r} is such a file already. Say which MXNet shall read it: --mxnet-version 1 or 2.')
    nameless = all(name.isdecimal() for name in job.states.names)
    if readers.NO_NAMES in job.states.report:
        raise Refused(f'{job.contents.path!r} has no names of parameters, and their numbers in PyTorch are not those of a Gluon '
                      'trainer. Give the names as --params, in the order of the optimizer.')
    container.write(path, job.states)
    if nameless:
        job.states.report.append('the names in the new file are the indices of an old one: load_states gives the states to the '
                                 'parameters at these places of the trainer. Convert with params= for names that stay')


CLASSES = tuple(dict.fromkeys(['mirror', 'torch', *(foreign.target for foreign in FOREIGN)]))
TARGETS: Dict[str, Target] = {
    'torch': Target('.pt', _to_torch, CLASSES),
    'onnx': Target('.onnx', _to_onnx, ('mirror', 'preview')),
    'optax': Target('.npz', _to_optax),
    'mxnet': Target('.safetensors', _to_mxnet),
}
