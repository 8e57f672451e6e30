"""From any readable file of states to another program's: what `gluon-optim convert` and tools/convert_states.py do."""
import importlib
import json
import os
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from .states import atomic, container, inspection, legacy_writer
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


def convert(job: Job, to: str) -> Dict[str, Any]:
    """Write ``job.output``, whole or not at all, and return the report of the conversion.

    Raises Refused where something does not fit or would be lost, a package is missing, or the file cannot be written.
    """
    try:
        TARGETS[to].write(job)
    except ImportError as error:
        raise Refused(str(error)) from error
    except OSError as error:
        raise Refused(str(error)) from error
    except (ValueError, TypeError, KeyError) as error:
        raise Refused(in_options(str(error.args[0] if error.args else error))) from error
    states = job.states
    return {'input': job.contents.path, 'output': job.output, 'to': to, 'target': job.target, 'optimizer': states.optimizer,
            'num_update': states.num_update, 'parameters': [
                {'name': info.name, 'shape': list(info.shape), 'dtype': info.dtype, 'updates': states.counts.get(info.name, 0),
                 'slots': sorted(states.slots.get(info.name, {})), 'master': info.name in states.master}
                for info in states.parameters],
            'lost': [line[6:] for line in states.report if line.startswith('lost: ')],
            'report': [line for line in states.report if not line.startswith('lost: ')]}


def output_for(path: str, to: str, mxnet_version: Optional[int]) -> str:
    """Where the result goes if nothing is said: beside the input, with the ending of its kind."""
    ending = '.states' if to == 'mxnet' and mxnet_version else TARGETS[to].ending
    root = os.path.splitext(path)[0]
    output = f'{root}.mxnet{mxnet_version}{ending}' if ending == '.states' else root + ending
    if os.path.exists(output):
        raise Refused(f'{output!r} exists. Give the file to be written as --output.')
    return output


def in_options(message: str) -> str:
    """A message with the options of the command line in place of the arguments of functions."""
    for argument, option in (('allow_lossy=True', '--allow-lossy'), ('params=', '--params'), ('target=', '--target ')):
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
    write: Callable[[Job], None]


def _to_torch(job: Job) -> None:
    mirror = importlib.import_module(f'{__package__}.torch')
    state_dict = mirror.to_torch(job.states, target=job.target, params=job.names, allow_lossy=job.allow_lossy)
    with atomic.replacing(job.output) as file:
        mirror.torch.save(state_dict, file)


def _to_onnx(job: Job) -> None:
    mirror = importlib.import_module(f'{__package__}.onnx')
    model = mirror.to_onnx(job.states, target=job.target, params=job.names, weights=job.contents.parameters or None,
                           allow_lossy=job.allow_lossy)
    with atomic.replacing(job.output) as file:
        file.write(model.SerializeToString())


def _to_mxnet(job: Job) -> None:
    if job.mxnet_version is not None:
        legacy_writer.write_states(job.output, job.states, job.mxnet_version, job.names, job.allow_lossy)
        return
    if job.contents.kind == 'states':
        raise Refused(f'{job.contents.path!r} is such a file already. Say which MXNet shall read it: --mxnet-version 1 or 2.')
    if not job.states.optimizer:
        raise Refused(f'{job.contents.path!r} does not contain its optimizer: what its arrays mean, and the update counts, are '
                      'unknown. Save it again with trainer.save_states.')
    container.write(job.output, job.states)


TARGETS: Dict[str, Target] = {
    'torch': Target('.pt', _to_torch),
    'onnx': Target('.onnx', _to_onnx),
    'mxnet': Target('.safetensors', _to_mxnet),
}
