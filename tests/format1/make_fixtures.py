"""Files of version 1 of the format, as they were written while it was the current one: tests/test_format.py reads them for ever.

    python make_fixtures.py        # needs MXNet 1.9.1 and commit e8483f4 or an earlier one, which writes version 1

``expected.json`` holds what was in them as another program finds it: digest, counts, the sums of all arrays.
"""
import json
import os
import platform
import sys
from pathlib import Path

import mxnet as mx
import numpy as np

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

import checkpoint_runs as runs  # noqa: E402

import gluon_optim as go  # noqa: E402
from gluon_optim.states import container  # noqa: E402

RUN = {'contexts': [0, 1], 'half': True, 'arguments': {'multi_precision': True},
       'scheduler': ['FactorScheduler', {'step': 2, 'factor': 0.5, 'base_lr': 0.1}]}


def write():
    from test_container import example
    container.write(FOLDER / 'example.safetensors', example())  # all that a file can hold, no framework
    net, trainer = runs.make(RUN)
    runs.train(net, trainer, 3)
    go.save_checkpoint(FOLDER / 'run.safetensors', net, trainer, {'fold': 3}, step=3, epoch=1, batch=2, metrics={'loss': 0.5})
    go.save_checkpoint(FOLDER / 'net.safetensors', net=net)
    net, trainer = runs.make({'optimizer': 'nadam', 'plain': True})
    runs.train(net, trainer, 2)
    go.save_states(trainer, FOLDER / 'nadam.safetensors', net=net)


def expected(path):
    from gluon_optim.states.neutral import digest  # as it was called then
    states, run = container.read_checkpoint(path)
    return {'digest': digest(states), 'optimizer': states.optimizer, 'num_update': states.num_update, 'counts': states.counts,
            'hypers': states.hypers, 'scheduler': states.scheduler, 'loss_scaler': states.loss_scaler,
            'sums': {f'{name}/{slot}': float(array.astype('float64').sum()) for name, slots in states.slots.items()
                     for slot, array in slots.items()},
            'run': run and {'step': run.step, 'epoch': run.epoch, 'batch': run.batch, 'metrics': run.metrics, 'extra': run.extra,
                            'weights': {weight.name: [float(copy.astype('float64').sum()) for copy in weight.copies]
                                        for weight in run.weights}}}


def main():
    if container.VERSION != 1:
        sys.exit('This commit writes another version. The files are kept as they are.')
    write()
    files = {path.name: expected(path) for path in sorted(FOLDER.glob('*.safetensors'))}
    provenance = {'gluon_optim': go.__version__, 'commit': 'e8483f4', 'mxnet': mx.__version__, 'numpy': np.__version__,
                  'python': platform.python_version(), 'command': 'python make_fixtures.py', 'license': 'Apache-2.0'}
    (FOLDER / 'expected.json').write_text(json.dumps({'provenance': provenance, 'files': files}, indent=1) + '\n')


if __name__ == '__main__':
    main()
    sys.stdout.flush()
    os._exit(0)
