"""From any readable state file to another program's: what `gluon-optim convert` and tools/convert_states.py do."""
import contextlib
import os
import shutil
from typing import Any, Dict

from ..mapping.classes import APPROXIMATE, EXACT, find
from ..mapping.selection import normalize, select
from ..states.model import NO_OPTIMIZER, OptimizerStates
from ..states.mxnet_files import writer
from .programs import PROGRAMS, Job
from .read import read
from .refused import Refused, refusing
from .verify import Outcome, Replay, rates, replay, scheduled_rates, weights_of, worst

__all__ = ['convert', 'needs_weights', 'size_of']


def convert(job: Job, to: str) -> Dict[str, Any]:
    """Write ``job.output``, completely or not at all, and return the report of the conversion.

    Raises Refused if something does not fit or would be lost, a package is missing, or the file cannot be written.
    """
    with refusing():
        _check_optimizer(job)
        if to != 'mxnet':
            job = job._replace(states=normalize(job.states, job.allow_lossy, job.target)[0])
        if to in ('onnx', 'optax') and job.names is None:  # where the optimizer updates all that it is given
            job = job._replace(names=[info.name for info in select(job.states, frozen=False)])
        states = job.states
        outcome = _verified(job, to) if job.verify else PROGRAMS[to].write(job, job.output)
        chosen = states.parameters if to == 'mxnet' else select(states, job.names)
    return {'input': job.contents.path, 'output': job.output, 'to': to, 'target': job.target, 'optimizer': states.optimizer,
            'num_update': states.num_update, 'verified': outcome and outcome._asdict(), 'parameters': [
                {'name': info.name, 'shape': list(info.shape), 'dtype': info.dtype, 'updates': states.counts.get(info.name, 0),
                 'slots': sorted(states.slots.get(info.name, {})), 'master': info.name in states.master}
                for info in chosen],
            'lost': [line[6:] for line in states.report if line.startswith('lost: ')],
            'report': [line for line in states.report if not line.startswith('lost: ')]
            + ([f'verified: {outcome}'] if outcome else [])}


def _check_optimizer(job: Job) -> None:
    name, path = job.states.optimizer, job.contents.path
    if not name:
        raise Refused(f'{path!r} does not contain its optimizer: the meaning of its arrays and the update counts are unknown. Save '
                      'it again with trainer.save_states.')
    if name == NO_OPTIMIZER:
        raise Refused(f'{path!r} is a checkpoint of a net alone, without an optimizer. Pass --what model to convert its weights.')


def _verified(job: Job, to: str) -> Outcome:
    """Write under a temporary name, replay the file, and rename it if it continues as the run would have."""
    output = os.path.realpath(job.output)
    root, ending = os.path.splitext(output)
    partial = f'{root}.{os.getpid()}.partial{ending}'
    try:
        PROGRAMS[to].write(job, partial)
        outcome = _replayed(job, to, partial)
        if os.path.exists(output):
            shutil.copymode(output, partial)
        os.replace(partial, output)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)
    return outcome


def _replayed(job: Job, to: str, path: str) -> Outcome:
    states = job.states
    if to == 'mxnet':
        return _read_back(job, path)
    chosen = select(states, job.names)
    _, rule, h = normalize(states, job.allow_lossy, job.target)
    label = EXACT
    if to == 'torch':
        label = find(rule, job.target, states.hypers).label(h, min(states.counts.get(info.name, 0) for info in chosen))
    promised = label != APPROXIMATE and not any(line.startswith('lost: ') for line in states.report)
    weights, whose = weights_of(states, chosen, job.contents.parameters)
    whose += '' if label == EXACT else ', at a constant learning rate'
    steps = rates(job.verify, label != EXACT, h.learning_rate)
    outcome = replay(Replay(states, chosen, weights, job.target, steps), path, to, whose)
    own = scheduled_rates(states, job.verify) if promised and label == EXACT else []
    if own:
        whose += ', then as many at the rates of the scheduler'
        again = replay(Replay(states, chosen, weights, job.target, own, scheduled=True), path, to, whose)
        outcome = worst([outcome._replace(weights=whose), again])
    if promised and not outcome.equal:
        raise Refused(f'{outcome.parameter!r} differs by {outcome.difference:.2g} of the sum of its updates after {outcome.steps} '
                      f'steps in {outcome.runtime}, which is more than {outcome.limit:g}: the file would not continue '
                      "the run exactly, and was not kept. Convert to --target 'mirror', or report this as a bug in gluon_optim.")
    return outcome


def _read_back(job: Job, path: str) -> Outcome:
    """MXNet's files hold the arrays unchanged: they are read again and compared bit for bit."""
    names = None
    if job.mxnet_version is not None:
        said = len(job.states.report)
        names = writer.trainer_order(job.states, job.mxnet_version, job.names)
        del job.states.report[said:]  # already reported when writing
    back = read(path, names).states
    if back is None or not _same(back, job.states):
        raise Refused('The file that was written does not hold the same states when it is read again, so it was removed. '
                      'Check the disk; if it is fine, report this as a bug in gluon_optim.')
    return Outcome(0, '', 0.0, '', 0.0, False, 'read again and equal bit for bit')


def _same(a: OptimizerStates, b: OptimizerStates) -> bool:
    """Whether counts and arrays agree bit for bit; MXNet 1.x has no shape (): a single number has shape (1,) there."""
    one, other = ({**{(name, slot): array for name, own in states.slots.items() for slot, array in own.items()},
                   **{(name, 'master'): array for name, array in states.master.items()}} for states in (a, b))
    counts, others = ({name: count for name, count in states.counts.items() if count} for states in (a, b))
    return (a.num_update, counts, set(one)) == (b.num_update, others, set(other)) and all(
        array.dtype == other[key].dtype and array.size == other[key].size and array.tobytes() == other[key].tobytes()
        for key, array in one.items())


def needs_weights(states: OptimizerStates, to: str, verify: int) -> bool:
    """Whether weights are needed, not just their names: for an ONNX model, a replay, or parameters without state."""
    return to == 'onnx' or bool(verify) or any(name not in states.slots for name in states.names)


def size_of(job: Job) -> int:
    """Approximately how many bytes will be written."""
    states = job.states
    arrays = [array for slots in [*states.slots.values(), states.master] for array in slots.values()]
    return sum(int(array.nbytes) for array in arrays)
