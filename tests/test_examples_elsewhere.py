"""The examples that go on where there is no MXNet, from a checkpoint made with NumPy."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gluon_optim import rules
from gluon_optim.states import container
from gluon_optim.states.neutral import OptimizerStates, ParameterInfo, Run, Weight

pytest.importorskip('sklearn')
pytest.importorskip('tqdm')

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {'0.weight': (32, 1, 3, 3), '0.bias': (32,), '1.gamma': (32,), '1.beta': (32,), '1.running_mean': (32,),
          '1.running_var': (32,), '3.weight': (64, 32, 3, 3), '3.bias': (64,), '4.gamma': (64,), '4.beta': (64,),
          '4.running_mean': (64,), '4.running_var': (64,), '9.weight': (64, 1024), '9.bias': (64,), '11.weight': (10, 64),
          '11.bias': (10,)}
STEPS = 44  # two epochs of the digits


@pytest.fixture(scope='module', params=['float32', 'float16'])
def checkpoint(request, tmp_path_factory):
    """As train_digits.py writes one after 20 steps, though nothing was learned: the net of the examples, and NovoGrad's state."""
    random, rule = np.random.RandomState(0), rules.get('novograd')
    h = rule.hyperparameters(learning_rate=0.01, wd=0.001, rescale_grad=1 / 64)
    states = OptimizerStates('novograd', h.asdict(), 20, [], {}, {})
    weights = []
    for name, shape in SHAPES.items():
        dtype = 'float32' if name[0] in '14' and name[1] == '.' else request.param
        states.parameters.append(ParameterInfo(name, name, shape, dtype))
        states.counts[name] = 0 if 'running' in name else 20
        weight = np.ones(shape) if name.endswith(('gamma', 'var')) else random.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        weights.append(Weight(name, name, [np.asarray(0 * weight if name.endswith('mean') else weight, dtype)]))
        if states.counts[name]:
            states.slots[name] = {'mean': np.asarray(0.01 * random.normal(size=shape), 'f4'), 'norm_sq': np.array(0.04, 'f4')}
            if dtype == 'float16':
                states.master[name] = weights[-1].copies[0].astype('f4')
    recipe = dict(optimizer='novograd', learning_rate=0.01, epochs=2, batch_size=64, dropout=0.0, seed=0)
    path = tmp_path_factory.mktemp('run') / 'step-20.safetensors'
    container.write(path, states, Run(weights, step=20, extra=recipe))
    return path


PATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])


def run(script, *arguments):
    done = subprocess.run([sys.executable, str(ROOT / 'examples' / script), *map(str, arguments)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH': PATH})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(log):
    return {record['step']: record['loss'] for record in map(json.loads, log.read_text().splitlines())}


def test_onnx_runtime_goes_on_as_pytorch(checkpoint):
    pytest.importorskip('onnxruntime')
    pytest.importorskip('torch')
    said = run('onnx_train.py', checkpoint)
    found = [float(loss) for loss in re.findall(r'loss ([\d.]+)', said)]
    assert len(found) == 20 and found[-1] < 0.7 * found[0]
    assert float(re.search(r'differ by (\S+) of the sum', said).group(1)) < 1e-5  # most of it the rounding of large weights


def test_jax_goes_on(checkpoint, tmp_path):
    pytest.importorskip('jax')
    said = run('continue_in_jax.py', checkpoint, '--log', tmp_path / 'jax')
    jax = losses(tmp_path / 'jax')
    assert list(jax) == list(range(21, STEPS + 1)) and jax[STEPS] < 0.5 * jax[21]
    assert float(re.search(r'accuracy ([\d.]+)%', said).group(1)) > 50


def test_jax_goes_on_as_pytorch(checkpoint, tmp_path):
    pytest.importorskip('jax')
    pytest.importorskip('torch')
    run('continue_in_jax.py', checkpoint, '--log', tmp_path / 'jax')
    run('continue_in_pytorch.py', checkpoint, '--log', tmp_path / 'torch')
    jax, torch = losses(tmp_path / 'jax'), losses(tmp_path / 'torch')
    assert max(abs(torch[step] - jax[step]) for step in jax) < 2e-3


@pytest.mark.parametrize('script, needs', [('continue_in_pytorch.py', 'torch'), ('finish_resnet_in_pytorch.py', 'torch'),
                                           ('onnx_train.py', 'onnxruntime'), ('continue_in_jax.py', 'jax')])
def test_a_file_that_is_no_checkpoint_of_an_example_is_a_usage_error(tmp_path, script, needs):
    pytest.importorskip('torch' if needs == 'onnxruntime' else needs)
    pytest.importorskip(needs)
    empty = OptimizerStates('adamw', {}, 0, [], {}, {})
    container.write(tmp_path / 'states', empty)
    container.write(tmp_path / 'checkpoint', empty, Run([], step=3, extra={'seed': 0}))
    (tmp_path / 'foreign').write_bytes(b'foreign')
    for name, words in (('none', 'No such file'), ('foreign', 'no container of gluon_optim'), ('states', 'it does not say step'),
                        ('checkpoint', 'it does not say learning_rate, epochs, batch_size')):
        done = subprocess.run([sys.executable, str(ROOT / 'examples' / script), str(tmp_path / name)], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH': PATH})
        assert done.returncode == 2 and 'usage:' in done.stderr and words in done.stderr, done.stderr
