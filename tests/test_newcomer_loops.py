"""The training loops of newcomer_runs.py: killed and resumed; and continued in PyTorch, on ONNX Runtime and in JAX.

The continuations start from newcomer/LOOP/step-30.safetensors, and are compared with what Gluon did from there.
"""
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('sklearn')

from newcomer_data import ROOT, image_batch, text, text_batch

import gluon_optim as go
from gluon_optim import cli

LOOPS = ['cnn', 'lstm', 'finetune', 'groups']
FIXTURES = Path(__file__).resolve().parent / 'newcomer'
START, END = 30, 40
ENVIRONMENT = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])}


# In Gluon

def start(*arguments):
    return subprocess.Popen([sys.executable, str(ROOT / 'tests' / 'newcomer_runs.py'), *map(str, arguments)], env=ENVIRONMENT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments):
    """Losses by step, and what stands at the end."""
    process = start(*arguments)
    out, err = process.communicate()
    assert process.returncode == 0, err
    *steps, end = map(json.loads, out.splitlines())
    return {step['step']: step['loss'] for step in steps}, end


def kill_at(step, *arguments):
    process = start(*arguments)
    for line in process.stdout:
        if json.loads(line)['step'] == step:
            process.kill()
            break
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='needs SIGKILL')
@pytest.mark.parametrize('loop', LOOPS)
def test_killed_and_resumed_on_other_devices(tmp_path, loop):
    pytest.importorskip('mxnet')
    kill_at(13, loop, tmp_path / 'killed', 10 ** 6, 0)
    saved = max(int(path.stem[len('step-'):]) for path in (tmp_path / 'killed').glob('step-*.safetensors'))
    losses, end = run(loop, tmp_path / 'killed', saved + 14, 3)
    straight, straight_end = run(loop, tmp_path / 'straight', saved + 14, 0)
    assert list(losses) == list(range(saved + 1, saved + 15))
    assert losses == {step: straight[step] for step in losses}
    assert end == straight_end


@pytest.mark.parametrize('loop', LOOPS)
def test_the_recorded_losses_are_those_of_gluon(tmp_path, loop):
    pytest.importorskip('mxnet')
    shutil.copy(str(FIXTURES / loop / f'step-{START}.safetensors'), str(tmp_path))
    losses, _ = run(loop, tmp_path, END, 0, 0)
    check_losses(loop, list(losses.values()))


def check_losses(loop, losses):
    """Rounding only. It is 2e-6 at most where the losses were recorded; without the optimizer's state, 0.05 to 0.26."""
    gluon = json.loads((FIXTURES / loop / 'losses.json').read_text())[START:]
    np.testing.assert_allclose(losses[0], gluon[0], atol=1e-5)
    np.testing.assert_allclose(losses, gluon, atol=1e-4)


# Elsewhere

def features(nn):
    return [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]


class CNN:
    """Each class here has the net in PyTorch, and the loss of a step."""

    def __init__(self, torch):
        self.torch, self.net = torch, torch.nn.Sequential(*features(torch.nn), torch.nn.Dropout(0), torch.nn.Linear(64, 10))

    def loss(self, step):
        images, labels = map(self.torch.tensor, image_batch(step))
        scores = self.torch.cat([self.net(half) for half in images.chunk(2)])  # batch norm saw what was on its own context
        return self.torch.nn.functional.cross_entropy(scores, labels.long())

    def after_backward(self):
        """What is done to the gradients."""


class LSTM(CNN):
    def __init__(self, torch):
        words = text()[1]
        self.torch, self.net = torch, torch.nn.ModuleDict({
            'embedding': torch.nn.Embedding(words, 12), 'lstm': torch.nn.LSTM(12, 20), 'output': torch.nn.Linear(20, words)})
        _, run = go.read_checkpoint(FIXTURES / 'lstm' / f'step-{START}.safetensors')
        self.hidden = [torch.tensor(array) for array in run.extra['hidden']]

    def loss(self, step):
        tokens, following = map(self.torch.tensor, text_batch(step))
        states, self.hidden = self.net['lstm'](self.net['embedding'](tokens), [array.detach() for array in self.hidden])
        return self.torch.nn.functional.cross_entropy(self.net['output'](states).flatten(0, 1), following.flatten())

    def after_backward(self):
        self.torch.nn.utils.clip_grad_norm_(self.net.parameters(), 0.25)  # of the mean loss: Gluon's norm over the number of tokens


class Finetune(CNN):
    def __init__(self, torch):
        self.torch, self.net = torch, torch.nn.ModuleDict({
            'features': torch.nn.Sequential(*features(torch.nn)), 'output': torch.nn.Linear(64, 5)})

    def loss(self, step):
        images, labels = map(self.torch.tensor, image_batch(step, 5, 9))
        return self.torch.nn.functional.cross_entropy(self.net['output'](self.net['features'](images)), labels.long())


class Groups(CNN):
    def __init__(self, torch):
        self.torch, self.net = torch, torch.nn.ModuleDict({
            'features': torch.nn.Sequential(*features(torch.nn)), 'output': torch.nn.Linear(64, 10)})

    def loss(self, step):
        images, labels = map(self.torch.tensor, image_batch(step))
        return self.torch.nn.functional.cross_entropy(self.net['output'](self.net['features'](images)), labels.long())


def in_torch(torch, states, net, target='mirror'):
    """Each of these returns what makes one update of ``net`` from its gradients."""
    state_dict = go.to_torch(states, target=target)
    groups = go.torch.param_groups(state_dict, net.parameters())
    optimizer = go.torch.create(states.optimizer, groups) if target == 'mirror' else torch.optim.AdamW(groups)
    optimizer.load_state_dict(state_dict)
    schedule = None
    if states.scheduler:
        base = go.schedules.schedule_of(states.scheduler)[1].base_lr  # a group's initial_lr is lr_mult times as high
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: go.rate(states.scheduler, done + 1) / base,
                                                     last_epoch=states.num_update - 1)

    def update(step):
        optimizer.step()
        if schedule:
            schedule.step()
    return update


def in_torch_optim(torch, states, net):
    return in_torch(torch, states, net, 'torch')


def trained(net):
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}


def replace(torch, net, arrays):
    with torch.no_grad():
        for name, parameter in trained(net).items():
            parameter.copy_(torch.tensor(np.asarray(arrays[name])))


def on_onnx_runtime(torch, states, net):
    runtime = pytest.importorskip('onnxruntime')
    weights = {name: parameter.detach().numpy().copy() for name, parameter in trained(net).items()}
    step_model, arrays = go.onnx.unpack(go.to_onnx(states, params=list(weights), weights=weights))
    session = runtime.InferenceSession(step_model.SerializeToString(), providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]

    def update(step):
        rate = go.rate(states.scheduler, step) if states.scheduler else states.hypers['learning_rate']
        gradients = {f'{name}/grad': parameter.grad.numpy() for name, parameter in trained(net).items()}
        new = session.run(None, {**arrays, **gradients, 'learning_rate': np.array(rate)})
        arrays.update((name[:-len('/new')], array) for name, array in zip(names, new))
        replace(torch, net, arrays)
    return update


def in_jax(torch, states, net):
    jax = pytest.importorskip('jax')
    optax = pytest.importorskip('optax')
    names = {name: name for name in trained(net)}
    params = {name: jax.numpy.array(parameter.detach().numpy()) for name, parameter in trained(net).items()}
    arguments = go.optax.arguments(states, names)
    if states.scheduler:
        arguments['learning_rate'] = lambda count: go.rate(states.scheduler, count + 1, jax.numpy)
    optimizer = go.optax.create(states.optimizer, **arguments)
    held = [params, go.to_optax(states, params=names)]

    @jax.jit
    def next_of(gradients, params, state):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def update(step):
        held[:] = next_of({name: parameter.grad.numpy() for name, parameter in trained(net).items()}, *held)
        replace(torch, net, held[0])
    return update


# Batch norm subtracts this bias again: its gradient is nothing but rounding errors, which NovoGrad makes as long as any other.
BEFORE_NORM = {CNN: '0.bias', Groups: 'features.0.bias'}


@pytest.mark.parametrize('loop, framework', [
    *((loop, framework) for loop in (CNN, LSTM, Finetune, Groups) for framework in (in_torch, on_onnx_runtime, in_jax)),
    (Finetune, in_torch_optim)])
def test_continued_elsewhere(loop, framework):
    torch = pytest.importorskip('torch')
    name, part = loop.__name__.lower(), loop(torch)
    before, after = (go.model_to_torch(FIXTURES / name / f'step-{step}.safetensors', like=part.net) for step in (START, END))
    part.net.load_state_dict(before.state_dict())
    before.freeze(part.net)
    update = framework(torch, before.states(), part.net)
    losses = []
    for step in range(START, END):
        part.net.zero_grad()
        loss = part.loss(step)
        loss.backward()
        part.after_backward()
        update(step + 1)
        losses.append(loss.item())
    check_losses(name, losses)
    for key, weight in part.net.named_parameters():
        moved = np.abs(after.weights[key] - before.weights[key]).max()
        assert (moved == 0) == (key in before.frozen)
        if key != BEFORE_NORM.get(loop):  # frozen ones are equal bit for bit; others measured at most 2e-5
            np.testing.assert_allclose(weight.detach(), after.weights[key], rtol=0, atol=1e-3 * moved, err_msg=key)


# What the user is told

def reports(loop):
    """Lines of the model's report, and by framework those of the states' report."""
    torch = pytest.importorskip('torch')
    model = go.model_to_torch(FIXTURES / loop.__name__.lower() / f'step-{START}.safetensors', like=loop(torch).net)
    found = {'model': model.report}
    for needs, verb in ({'torch': 'to_torch', 'onnx': 'to_onnx', 'optax': 'to_optax'}).items():
        if importlib.util.find_spec(needs):
            states = model.states()
            getattr(go, verb)(states)
            found[verb] = states.report
    return found


def test_one_line_says_what_is_frozen():
    found = reports(Finetune)
    for verb, report in found.items():
        lines = [line for line in report if 'features.1.weight' in line and 'in this order' not in line]
        begin = 'not trained in Gluon' if verb in ('model', 'to_torch') else 'left out, because Gluon does not train them'
        assert len(lines) == 1 and lines[0].startswith(f"{begin}: 'features.0."), report
        assert ('requires_grad' in lines[0]) == (verb in ('model', 'to_torch'))
        assert ('name them in params=' in lines[0]) == (verb in ('to_onnx', 'to_optax'))


def test_the_param_groups_have_lr_mult():
    torch = pytest.importorskip('torch')
    net = Finetune(torch).net
    states = go.model_to_torch(FIXTURES / 'finetune' / f'step-{START}.safetensors', like=net).states()
    state_dict = go.to_torch(states, target='torch')
    names = [name for name, _ in net.named_parameters()]
    rates = {names[k]: group['lr'] for group in state_dict['param_groups'] for k in group['params']}
    assert rates == {name: pytest.approx(0.01 if 'output' in name else 0.001) for name in names}
    assert sum('param groups, by (lr_mult, wd_mult) [(1.0, 1.0), (10.0, 1.0)]' in line for line in states.report) == 1


def test_the_report_tells_how_to_get_the_rates():
    for verb, report in reports(LSTM).items():
        lines = [line for line in report if 'the scheduler mxnet.lr_scheduler.CosineScheduler continues: ' in line]
        assert len(lines) == (verb != 'model')
        how = {'to_torch': "go.torch.scheduler(optimizer, checkpoint['scheduler'])", 'to_optax': 'go.optax.schedule(states)',
               'to_onnx': 'go.onnx.export_schedule(model)'}
        assert not lines or (lines[0].endswith('; the rate of update 31 is 0.011313') and how[verb] in lines[0])


def test_the_report_says_that_each_context_normalized_its_part():
    assert [line for line in reports(CNN)['model'] if 'mean of those of 2 devices' in line]
    assert not [line for line in reports(Finetune)['model'] if 'devices' in line]


def test_inspect_cuts_what_the_user_added(capsys):
    path = FIXTURES / 'lstm' / f'step-{START}.safetensors'
    assert cli.main(['inspect', str(path)]) == 0
    line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith('extra: {"hidden": [[[[0.9'))
    assert len(line) < 300 and line.endswith('characters; --json prints all of them)')
    assert cli.main(['inspect', str(path), '--json']) == 0
    assert json.loads(capsys.readouterr().out)['extra'] == go.read_checkpoint(path)[1].extra


def test_the_recipes_run_and_run_again(tmp_path, monkeypatch):
    """docs/RECIPES.md; the second time all is done already, but for what comes after the last checkpoint."""
    pytest.importorskip('mxnet')
    pytest.importorskip('torch')
    monkeypatch.chdir(tmp_path)
    begin, *blocks = re.findall('```python\n(.*?)```', (ROOT / 'docs/RECIPES.md').read_text(encoding='utf-8'), re.DOTALL)
    assert len(blocks) == 5
    for _ in range(2):
        names = {}
        for block in [begin, *blocks]:
            exec(compile(block, 'docs/RECIPES.md', 'exec'), names)  # noqa: S102
        assert names['restored'] is None or names['restored'].step == 100
        assert names['optimizer'].param_groups[0]['lr'] == go.rate(names['states'].scheduler, 101)
        assert {folder: max(manager.steps()) for folder in ('cnn', 'lstm', 'finetune')
                for manager in [go.CheckpointManager(folder)]} == {'cnn': 150, 'lstm': 100, 'finetune': 100}
    assert names['restored'].step == 100
