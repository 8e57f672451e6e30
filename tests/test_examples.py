"""The examples, the README's code and the demonstration's promise, as a user runs them: in processes of their own."""
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip('mxnet')
pytest.importorskip('sklearn')

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))
import cluster  # noqa: E402

ENVIRONMENT = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONWARNINGS': 'error::RuntimeWarning'}
SHORT = ['--epochs', '2', '--checkpoint-every', '10']  # 44 steps


def start(script, *arguments):
    return subprocess.Popen([sys.executable, str(ROOT / 'examples' / script), *map(str, arguments)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, env=ENVIRONMENT)


def run(script, *arguments, code=0):
    """What the script prints: to stdout if it should succeed, else to stderr."""
    process = start(script, *arguments)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, out + err
    return err if code else out


def records(log):
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith('\n')]


def losses(log):
    return {record['step']: record['loss'] for record in records(log) if 'loss' in record}


def kill_at(step, log, *arguments):
    """Start, and SIGKILL when the log has reached ``step``."""
    process = start('train_digits.py', *arguments, '--log', log)
    while max(losses(log), default=0) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize('options', [
    ['--optimizer', 'novograd'],
    ['--optimizer', 'novograd', '--multi-precision'],
    ['--optimizer', 'adamw', '--learning-rate', '0.003'],
], ids=['novograd', 'novograd-float16', 'adamw'])
def test_a_killed_run_resumes_bit_for_bit_on_another_device(tmp_path, options):
    options = [*SHORT, *options]
    run('train_digits.py', *options, '--log', tmp_path / 'straight')
    kill_at(13, tmp_path / 'killed', *options, '--checkpoint-dir', tmp_path / 'run')
    said = run('train_digits.py', *options, '--checkpoint-dir', tmp_path / 'run', '--resume', '--device', '2',
               '--log', tmp_path / 'resumed')
    start = int(re.search(r'at step (\d+)', said).group(1))
    assert 10 <= start < 44
    straight, resumed = losses(tmp_path / 'straight'), losses(tmp_path / 'resumed')
    assert list(resumed) == list(range(start + 1, 45))
    assert resumed == {step: straight[step] for step in resumed}
    assert records(tmp_path / 'resumed')[-1] == records(tmp_path / 'straight')[-1]  # accuracy, and a digest of all parameters


def test_the_digits_are_learned(tmp_path):
    run('train_digits.py', '--log', tmp_path / 'log')
    assert records(tmp_path / 'log')[-1]['accuracy'] > 0.97


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    options = [*SHORT, '--checkpoint-dir', tmp_path / 'run']
    kill_at(22, tmp_path / 'log', *options)
    newest = max(int(path.stem[len('step-'):]) for path in (tmp_path / 'run').glob('step-*.safetensors'))
    damaged = tmp_path / f'run/step-{newest}.safetensors'
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert f'resumed at step {newest - 10}\n' in run('train_digits.py', *options, '--resume')


def test_resuming_refuses_with_a_reason(tmp_path):
    folder = ['--checkpoint-dir', tmp_path / 'run']
    assert 'finds no checkpoint' in run('train_digits.py', *folder, '--resume', code=1)
    kill_at(12, tmp_path / 'log', *SHORT, *folder)
    assert 'already holds a run' in run('train_digits.py', *SHORT, *folder, code=1)
    assert 'seed is 0 there, 1 here' in run('train_digits.py', *SHORT, *folder, '--resume', '--seed', '1', code=1)
    assert 'adamw' in run('train_digits.py', *SHORT, *folder, '--resume', '--optimizer', 'adamw', code=1)


@pytest.mark.parametrize('arguments', [['--resume'], ['--epochs', '0'], ['--batch-size', 'many'], ['--no-such-option']])
def test_unusable_arguments(arguments):
    assert 'usage:' in run('train_digits.py', *arguments, code=2)


def test_an_unknown_optimizer_is_refused():
    assert 'novgrad' in run('train_digits.py', '--optimizer', 'novgrad', code=1)


def distributed(*arguments, servers=2, grace=3):
    """What the worker of rank 0 says at the end, with two workers."""
    command = [sys.executable, str(ROOT / 'examples/train_distributed.py'), *map(str, arguments)]
    results = cluster.run(command, 120, grace, workers=2, servers=servers, environment=ENVIRONMENT)
    said = [re.search(r'rank (\d): (.*)', results[name].stdout).groups() for name in ('worker0', 'worker1')]
    return dict(said)['0']


def test_killed_workers_resume_bit_for_bit_on_more_servers(tmp_path):
    short = ['--epochs', '4']  # 88 steps
    said = distributed(*short, '--log', tmp_path / 'straight')
    saved = [*short, '--checkpoint-dir', tmp_path / 'run']
    with pytest.raises(cluster.ClusterError, match='gluon_optim.watch ends worker 0: worker 1 is lost') as death:
        distributed(*saved, '--kill-at', '50', '--log', tmp_path / 'killed', grace=25)
    assert sorted(re.findall(r'ended with (\S+)', str(death.value))) == ['-9', '1', '1', '1', '1']
    assert max(losses(tmp_path / 'killed')) in (50, 51)  # a loss is known before the step that needs the other worker
    assert distributed(*saved, '--resume', '--log', tmp_path / 'resumed', servers=3) == said  # digests of weights and states
    straight, resumed = losses(tmp_path / 'straight'), losses(tmp_path / 'resumed')
    assert list(resumed) == list(range(41, 89))
    assert resumed == {step: straight[step] for step in resumed}


def test_compressed_and_asynchronous_workers_learn():
    assert float(re.search(r'accuracy (\S+)%', distributed('--compress')).group(1)) > 95
    assert float(re.search(r'loss (\S+) in', distributed('--asynchronous', 'dcasgd')).group(1)) < 1.5  # 2.3 at first


def test_curvature_rises_to_the_edge_of_stability_and_newton_finds_the_minimum():
    said = run('curvature.py', '--steps', '640')
    _, (edge, first, last) = (tuple(map(float, row)) for row in re.findall(r'^ +0\.[23] +(\S+) +(\S+) +(\S+) ', said, re.MULTILINE))
    assert first < 0.95 * edge < last < 1.2 * edge
    above = {method: float(number) for method, number in re.findall(r'^ +([\w-]+) +\d+ +(\S+)$', said, re.MULTILINE)}
    assert set(above) == {'SGD', 'newton-cg', 'trust-ncg', 'l-bfgs-b', 'bfgs', 'cg'}
    assert max(above.values()) == above.pop('SGD') > 1e-7 > 1e-10 > max(above.values())


def test_linear_scaling_holds_up_to_the_measured_batch_size():
    said = run('batch_size.py', '--examples', '8192')
    b_star = float(re.search(r'B\* = (\S+),', said).group(1))
    assert 1144 * 0.85 < b_star < 1144 * 1.15  # computed from all digits: 1144
    apart = {int(size): float(percent) for size, percent in re.findall(r'^ *(\d+) .*? (\S+)%', said, re.MULTILINE)}
    assert list(apart) == [2 ** k for k in range(13)]
    for size, percent in apart.items():
        if size < b_star:
            assert abs(percent) < 1


@pytest.mark.parametrize('options', [[], ['--multi-precision']], ids=['float32', 'float16'])
def test_the_run_goes_on_in_pytorch(tmp_path, options):
    pytest.importorskip('torch')
    run('train_digits.py', *SHORT, *options, '--dropout', '0', '--checkpoint-dir', tmp_path / 'run', '--log', tmp_path / 'mxnet')
    run('continue_in_pytorch.py', tmp_path / 'run/step-20.safetensors', '--log', tmp_path / 'torch')
    mxnet, torch = losses(tmp_path / 'mxnet'), losses(tmp_path / 'torch')
    assert list(torch) == list(range(21, 45))
    # rounding of float32 only: without the optimizer's state the losses are apart by 0.08 within these steps
    assert max(abs(torch[step] - mxnet[step]) for step in torch) < 2e-3


def test_snapshots_are_better_than_the_last_network(tmp_path):
    said = run('snapshot_ensemble.py', '--seeds', '2', '--directory', tmp_path / 'run')
    losses = [float(loss) for loss in re.findall(r'the last .*?(0\.\d+)', said)]
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert sorted(path.name for path in (tmp_path / 'run/cycles-0').iterdir()) == [
        f'step-{step}.kept.safetensors' for step in (110, 220, 330, 440, 550)]
    assert run('snapshot_ensemble.py', '--seeds', '2', '--directory', tmp_path / 'run') == said  # nothing is left to train


def test_parameter_groups_are_shown_and_compared():
    said = run('parameter_groups.py', '--seeds', '1', '--steps', '20')
    assert re.search(r' 0 +2 +64 +norm +3.gamma, 3.beta\n', said)
    assert len(re.findall(r'^(?:one rate|\(|decay on all|NO_DECAY).*?(?: +\d\.\d{3}){4}', said, re.MULTILINE)) == 5


@pytest.mark.parametrize('script', ['snapshot_ensemble.py', 'parameter_groups.py'])
def test_numbers_of_runs(script):
    assert '--seeds must be at least 1' in run(script, '--seeds', '0', code=2)


def test_a_resnet_is_finished_in_pytorch(tmp_path):
    torch = pytest.importorskip('torch')
    in_gluon = run('train_resnet.py', '--checkpoint-dir', tmp_path / 'run', '--epochs', '2')
    said = run('finish_resnet_in_pytorch.py', tmp_path / 'run/step-22.safetensors', '--save', tmp_path / 'net.pt')
    apart = re.search(r'differ by (\S+) in .* most (\S+) in .* ten, (\S+) in all 22', said)
    first, ten, every = map(float, apart.groups())
    assert first < 1e-5  # rounding, and what 22 steps at full learning rate make of it
    assert ten < 1e-2
    assert every < 5e-2
    accuracies = [float(re.search(r'accuracy (\S+)%', text).group(1)) for text in (in_gluon, said)]
    assert abs(accuracies[0] - accuracies[1]) < 3
    assert 'downsample.1.running_var' in ' '.join(torch.load(tmp_path / 'net.pt', weights_only=True))
    assert 'already holds a run' in run('train_resnet.py', '--checkpoint-dir', tmp_path / 'run', code=1)


def test_a_chain_of_samples_is_continued(tmp_path):
    short = ['--burn-in', '600', '--thin', '20', '--samples', '5', '--directory', tmp_path]
    said = run('sample_posterior.py', *short)
    accuracy = re.search(r'mean of 5 samples +([0-9.]+)%', said).group(1)
    assert float(accuracy) > 85
    (tmp_path / 'chain/sample-700.safetensors').unlink()
    assert run('sample_posterior.py', *short) == 'resumed at step 500\n' + said  # samples after that step are drawn again
    assert 'must stay that of the chain, 2.0. Received: 1.0' in run('sample_posterior.py', *short, '--temperature', '2', code=1)


def test_the_code_of_the_readme_runs(tmp_path):
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        if 'import torch' in block and importlib.util.find_spec('torch') is None:
            continue
        done = subprocess.run([sys.executable, '-c', block], cwd=str(tmp_path), env=ENVIRONMENT, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr.decode()


def test_schedules_are_compared():
    header, *rows = run('compare_schedules.py', '--only', 'cosine', 'plateau', '--steps', '120').splitlines()
    assert header.split()[0] == 'schedule' and {row.split()[0] for row in rows} == {'cosine', 'plateau'}
    cells = {row.split()[0]: row.split()[1:] for row in rows}
    assert [cells[name][0] for name in ('cosine', 'plateau')] == ['0.1', '0.1'] and cells['cosine'][1] == '0'
    assert 'at least 120' in run('compare_schedules.py', '--steps', '100', code=2)
