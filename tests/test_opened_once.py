"""A file is opened once on its way through a command; what was found out about it travels with it."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gluon_optim.states import container
from gluon_optim.states.model import OptimizerStates, ParameterInfo, Run, Weight

ROOT = Path(__file__).resolve().parent.parent
OLD = ROOT / 'tests' / 'legacy' / '1.9.1'

# Every opening is an event of the interpreter: os.open has no mode, and open(..., opener=) is there with and without one.
WATCH = """
import collections, json, os, sys
opened, bare = collections.Counter(), collections.Counter()

def hook(event, arguments):
    if event == 'open' and isinstance(arguments[0], (str, bytes)):
        (opened if arguments[1] is None else bare)[os.path.basename(os.fsdecode(arguments[0]))] += 1

from gluon_optim import cli
sys.addaudithook(hook)
code = cli.main(sys.argv[1:])
print(json.dumps([code, {name: max(opened[name], bare[name]) for name in {*opened, *bare}}]))
"""


def openings(folder, *arguments):
    """How often a command opens each file, by name."""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', WATCH, *map(str, arguments)], cwd=str(folder), text=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    code, found = json.loads(done.stdout.splitlines()[-1])
    assert code == (1 if arguments[0] == 'diff' else 0), done.stderr
    return found


@pytest.fixture
def files(tmp_path):
    """A checkpoint `run`, MXNet's `adam.states`, and parameters for it, `net.params`, in a folder."""
    info = ParameterInfo('weight', 'dense0_weight', (2, 3), 'float32')
    slots = {'weight': {'mean': np.ones((2, 3), 'f4'), 'var': np.ones((2, 3), 'f4')}}
    states = OptimizerStates('adam', {'learning_rate': 0.1}, 3, [info], {'weight': 3}, slots)
    container.write(tmp_path / 'run', states, Run([Weight('weight', 'dense0_weight', [np.ones((2, 3), 'f4')])], step=3))
    for name, other in (('adam.states', 'adam.states'), ('net.params', 'dict.params')):
        (tmp_path / name).write_bytes((OLD / other).read_bytes())
    return tmp_path


@pytest.mark.parametrize('arguments', [
    ['inspect', 'run'], ['inspect', 'adam.states'], ['inspect', 'net.params'], ['verify', 'run'], ['diff', 'run', 'adam.states'],
    ['inspect', 'adam.states', '--params', 'w,b'], ['verify', 'adam.states'],
    ['convert', 'run', '--to', 'mxnet', '--mxnet-version', '1', '-o', 'x'], ['convert', 'run', '--to', 'optax', '-o', 'x'],
    ['convert', 'adam.states', '--to', 'mxnet', '-o', 'x'], ['convert', 'net.params', '--to', 'safetensors', '-o', 'x'],
], ids=' '.join)
def test_each_file_is_opened_once(files, arguments):
    found = openings(files, *arguments)
    assert {name: found[name] for name in found if name in arguments and name != 'x'} == {
        name: 1 for name in ('run', 'adam.states', 'net.params') if name in arguments}


def test_from_states_to_a_state_dict(files):
    pytest.importorskip('torch')
    found = openings(files, 'convert', 'adam.states', '--params', 'w,b', '--to', 'torch', '-o', 'x.pt')
    assert found['adam.states'] == 1
    found = openings(files, 'convert', 'run', '--to', 'torch', '--what', 'optimizer', '-o', 'y.pt')
    assert found['run'] == 1
    found = openings(files, 'convert', 'x.pt', '--to', 'mxnet', '-o', 'back')
    assert found['x.pt'] == 1
