"""The examples that go on where there is no MXNet, from a checkpoint made with NumPy; beside it, how Gluon goes on from it."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gluon_optim import rules
from gluon_optim.schedules import after
from gluon_optim.states import container
from gluon_optim.states.model import OptimizerStates, ParameterInfo, Run, Weight

pytest.importorskip('sklearn')
pytest.importorskip('tqdm')

ROOT = Path(__file__).resolve().parent.parent
PATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
START, STEPS = 24, 44
RECIPE = {'net': 'resnet18_v1', 'optimizer': 'novograd', 'learning_rate': 0.002, 'epochs': 1, 'batch_size': 32, 'seed': 0}
# losses of MXNet 1.9.1 from the checkpoint below; `test_gluon_goes_on` computes them anew where there is MXNet
GLUON = [4.130782, 3.164134, 4.007163, 3.334312, 3.512271, 3.376692, 2.626306, 2.827872, 3.316741, 2.615974, 2.598062,
         2.128249, 2.744026, 2.655784, 2.558855, 2.668087, 2.556545, 2.75187, 2.279962, 2.477252]
VARIANCE = 0.18791  # of the same run at its end: the mean of the last layer's running_var


SCHEDULER = {'class': 'mxnet.lr_scheduler.CosineScheduler', 'attributes': dict(
    base_lr=0.002, warmup_steps=0, warmup_final_lr=0.002, warmup_begin_lr=0, warmup_mode='linear', base_lr_orig=0.002,
    max_update=STEPS, final_lr=0, max_steps=STEPS)}


def shapes():
    """Gluon's names of the parameters of resnet18_v1."""
    def norm(name, n):
        return {f'{name}.{what}': (n,) for what in ('gamma', 'beta', 'running_mean', 'running_var')}

    found, inputs = {'features.0.weight': (64, 3, 7, 7), **norm('features.1', 64)}, 64
    for stage, outputs in zip((4, 5, 6, 7), (64, 128, 256, 512)):
        for block in (f'features.{stage}.0', f'features.{stage}.1'):
            found.update({f'{block}.body.0.weight': (outputs, inputs, 3, 3), **norm(f'{block}.body.1', outputs),
                          f'{block}.body.3.weight': (outputs, outputs, 3, 3), **norm(f'{block}.body.4', outputs)})
            if inputs != outputs:
                found.update({f'{block}.downsample.0.weight': (outputs, inputs, 1, 1), **norm(f'{block}.downsample.1', outputs)})
            inputs = outputs
    return {**found, 'output.weight': (10, 512), 'output.bias': (10,)}


def make_checkpoint(path):
    """As train_resnet.py writes one, though nothing was learned: weights as an initializer draws them, momenta of length 1."""
    random, rule = np.random.RandomState(0), rules.get('novograd')
    h = rule.hyperparameters(learning_rate=0.002, wd=0.001, rescale_grad=1 / 32)
    states, weights = OptimizerStates('novograd', h.asdict(), START, [], {}, {}, scheduler=after(SCHEDULER, START)), []
    for name, shape in shapes().items():
        states.parameters.append(ParameterInfo(name, name, shape, 'float32'))
        states.counts[name] = 0 if 'running' in name else START
        weight = {'gamma': np.ones, 'running_var': np.ones, 'beta': np.zeros, 'running_mean': np.zeros, 'bias': np.zeros}.get(
            name.rpartition('.')[2], lambda shape: random.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:])))(shape)
        weights.append(Weight(name, name, [np.asarray(weight, 'f4')]))
        if states.counts[name]:
            mean = random.normal(size=shape) / np.sqrt(np.prod(shape))
            states.slots[name] = {'mean': np.asarray(mean, 'f4'), 'norm_sq': np.array(0.04, 'f4')}
    container.write(path, states, Run(weights, step=START, extra=RECIPE))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp('resnet')
    path = folder / f'step-{START}.safetensors'
    make_checkpoint(path)
    (folder / 'losses.jsonl').write_text(''.join(
        json.dumps({'step': START + k, 'loss': loss}) + '\n' for k, loss in enumerate(GLUON, 1)))
    yield path
    path.unlink()  # 90 MB


def run(script, *arguments, code=0):
    """What the script prints: to stdout if it should succeed, else to stderr."""
    done = subprocess.run([sys.executable, str(ROOT / 'examples' / script), *map(str, arguments)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH': PATH})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def check_distance(said):
    """Of the losses from Gluon's: rounding, and what 20 steps make of it. Without momenta they are 8e-3 and 4e-2 apart."""
    first, ten, every = map(float, re.search(r'differ by (\S+) in .* most (\S+) in .* ten, (\S+) in all 20', said).groups())
    assert first < 1e-5 and ten < 3e-3 and every < 2e-2


def test_gluon_goes_on(checkpoint, monkeypatch):
    mx = pytest.importorskip('mxnet')
    import gluon_optim as go
    monkeypatch.syspath_prepend(str(ROOT / 'examples'))
    import digits
    net = mx.gluon.model_zoo.vision.resnet18_v1(classes=10)
    net.initialize()
    net(mx.nd.zeros((1, 3, 32, 32)))
    trainer = mx.gluon.Trainer(net.collect_params(), 'novograd', {
        'wd': 0.001, 'lr_scheduler': mx.lr_scheduler.CosineScheduler(STEPS, base_lr=0.002)})
    go.load_checkpoint(checkpoint, net=net, trainer=trainer)
    (images, labels), _ = digits.load()
    losses = []
    for step in range(START, STEPS):
        batch = digits.batch_indices(0, step, len(images), 32)
        with mx.autograd.record():
            each = mx.gluon.loss.SoftmaxCrossEntropyLoss()(net(mx.nd.array(digits.photographs(images[batch]))),
                                                           mx.nd.array(labels[batch]))
        each.backward()
        trainer.step(32)
        losses.append(float(each.mean().asscalar()))
    np.testing.assert_allclose(losses[:10], GLUON[:10], atol=3e-3)
    np.testing.assert_allclose(losses, GLUON, atol=2e-2)
    variance = net._collect_params_with_prefix()['features.7.1.body.4.running_var'].data().asnumpy().mean()
    assert variance == pytest.approx(VARIANCE, rel=1e-2)


def test_pytorch_goes_on_as_gluon(checkpoint):
    pytest.importorskip('torch')
    check_distance(run('finish_resnet_in_pytorch.py', checkpoint))


def test_onnx_runtime_goes_on_as_gluon(checkpoint, tmp_path):
    pytest.importorskip('onnxruntime')
    pytest.importorskip('torch')
    said = run('onnx_train.py', checkpoint, '--save', tmp_path / 'trained.onnx')
    check_distance(said)
    shown = re.findall(r'update (\d+): loss (\S+), in Gluon (\S+)', said)
    assert [int(step) for step, _, _ in shown] == list(range(START + 1, STEPS + 1))
    assert [float(loss) for _, _, loss in shown] == GLUON
    assert re.search(r'agree bit for bit in \d+ of 62', said)  # how many depends on the CPU, whose kernels compute the gradients
    spacings = re.search(r'which is (\S+) of the spacing', said)  # PyTorch does not always round a root to the nearest number
    assert spacings is None or float(spacings.group(1)) <= 2

    from gluon_optim import onnx
    states, weights = onnx.read(tmp_path / 'trained.onnx')
    assert set(states.counts.values()) == {STEPS} and len(weights) == 62
    before = container.read_checkpoint(checkpoint)[1].weights[0].copies[0]
    assert 0 < np.abs(weights['conv1.weight'] - before).max() < 0.1


def test_jax_goes_on_as_gluon(checkpoint, tmp_path):
    pytest.importorskip('jax')
    check_distance(run('continue_in_jax.py', checkpoint, '--save', tmp_path / 'net.npz'))
    with np.load(tmp_path / 'net.npz') as arrays:
        assert {name: array.shape for name, array in arrays.items()} == shapes()
        assert arrays['features.7.1.body.4.running_var'].mean() == pytest.approx(VARIANCE, rel=1e-2)


MANY = """
import importlib, sys
for path in sys.argv[2:]:
    try:
        importlib.import_module(sys.argv[1]).main([path])
    except SystemExit as error:
        print('exit code', error.code, file=sys.stderr)
"""


@pytest.mark.parametrize('script, needs', [
    ('continue_in_pytorch', ['torch']), ('finish_resnet_in_pytorch', ['torch']), ('onnx_train', ['torch', 'onnxruntime']),
    ('continue_in_jax', ['jax'])])
def test_what_is_no_checkpoint_for_the_example_is_a_usage_error(tmp_path, script, needs):
    for package in needs:
        pytest.importorskip(package)

    def write(name, optimizer='adamw', step=3, extra=None):
        run = None if extra is None else Run([], step=step, extra=extra)
        container.write(tmp_path / name, OptimizerStates(optimizer, {}, 0, [], {}, {}), run)

    (tmp_path / 'foreign').write_bytes(b'foreign')
    write('states')
    write('little', extra={'seed': 0})
    write('digits', extra={**RECIPE, 'net': None})
    write('empty', extra=RECIPE)
    write('late', step=25, extra=RECIPE)
    cases = {'none': 'No such file', 'foreign': 'not a gluon_optim file', 'states': 'it does not contain step',
             'little': 'it does not contain learning_rate, epochs, batch_size',
             'digits': 'does not contain dropout' if script == 'continue_in_pytorch' else 'does not contain net'}
    if script != 'continue_in_pytorch':
        cases['empty'] = 'Nothing to convert'
    if script == 'onnx_train':
        cases['late'] = 'fewer than 20 updates are left'
    path = os.pathsep.join([str(ROOT / 'examples'), PATH])
    done = subprocess.run([sys.executable, '-c', MANY, script, *(str(tmp_path / name) for name in cases)],
                          stderr=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH': path})
    said = done.stderr.split('exit code 2\n')
    assert done.returncode == 0 and len(said) == len(cases) + 1, done.stderr
    for message, words in zip(said, cases.values()):
        assert 'usage:' in message and words in message
