"""Horovod: two real processes that `horovodrun` starts. Runs where Horovod is installed (docs/DISTRIBUTED.md says how).

What the processes do is in horovod_runs.py; the rest is examples/train_horovod.py as a user runs it.
"""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip('horovod.mxnet')
pytest.importorskip('sklearn')

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tests'))
from contract_nets import environment  # noqa: E402
from test_examples import losses  # noqa: E402

TEN = ['novograd', 'lamb', 'lans', 'larc', 'lars', 'sngd', 'adamw', 'adam', 'nadam', 'sgd_torch']
GIVEN = {'lars': {'momentum': 0.9}, 'sgd_torch': {'momentum': 0.9}}
STEPS = {'instance': 200, 'name': 30}
HOW = ['everywhere', 'broadcast']
DEADLINE = 600  # seconds, for processes that wait for each other; each takes a tenth of it


def horovodrun(*command, code=0, options=('-np', '2')):
    """What the processes print on standard output and error, each line after the rank of its process."""
    launcher = [sys.executable, '-m', 'horovod.runner.launch', *options, '--gloo', '--network-interfaces', 'lo']
    variables = environment(OMP_NUM_THREADS='1', HOROVOD_CYCLE_TIME='0.1', HOROVOD_STALL_CHECK_TIME_SECONDS='20',
                            HOROVOD_STALL_SHUTDOWN_TIME_SECONDS='120')
    with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
        process = subprocess.Popen([*launcher, sys.executable, *map(str, command)], env=variables, stdin=subprocess.DEVNULL,
                                   stdout=out, stderr=err, start_new_session=True)
        try:
            process.wait(DEADLINE)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # which it passes to the processes
                process.wait()
            out.seek(0)
            err.seek(0)
            said = out.read(), err.read()
    assert bool(process.returncode) == bool(code), ''.join(said)
    return said


def answers(folder, jobs):
    """What each of two processes found, job by job."""
    horovodrun(ROOT / 'tests/horovod_runs.py', json.dumps(jobs), folder)
    found = [[json.loads(line) for line in (folder / f'{rank}.jsonl').read_text().splitlines()] for rank in range(2)]
    assert [len(one) for one in found] == [len(jobs)] * 2
    return list(zip(*found))


OTHER = [['clipped'], ['scaled'], ['summed_twice'], ['noisy', 'sgld'], ['noisy', 'psgld'], ['by_hand', 'novograd'],
         ['mismatch', 'weight'], ['mismatch', 'state'], ['mismatch', 'count']]
RESUMED = {'novograd': ({}, 'name', 'float32'), 'adamw': ({}, 'instance', 'float32'), 'nadam': ({}, 'instance', 'float32'),
           'lamb': ({'multi_precision': True}, 'instance', 'float16'),
           'sgd_torch': ({'multi_precision': 'kahan'}, 'name', 'float16')}


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    """What both processes found, by job."""
    folder = tmp_path_factory.mktemp('horovod')
    jobs = [['compare', name, GIVEN.get(name, {}), way, STEPS[way]] for name in TEN for way in STEPS]
    jobs += [['compare', 'novograd', {'multi_precision': True}, 'name', 40, 'float16'], *OTHER]
    for how in HOW:
        jobs += [['resume', name, given, way, how, str(folder / f'{name}-{how}'), dtype]
                 for name, (given, way, dtype) in RESUMED.items()]
        jobs.append(['deferred', how, str(folder / f'deferred-{how}')])
    jobs.append(['accumulated', str(folder)])
    pairs = answers(folder, jobs)
    return {tuple(str(argument) for argument in job): pair for job, pair in zip(jobs, pairs)}


def of(found, *job):
    """What both processes found in the one job that begins like this."""
    pair, = (pair for other, pair in found.items() if other[:len(job)] == job)
    for answer in pair:
        assert 'Traceback' not in str(answer), answer
    return pair


@pytest.mark.parametrize('way', STEPS)
@pytest.mark.parametrize('name', TEN)
def test_two_processes_are_one_with_the_whole_batch(found, name, way):
    """With multipliers, a scheduler, and a decay, a multiplier and a batch size that change. By name some are MXNet's own."""
    assert max(of(found, 'compare', name, str(GIVEN.get(name, {})), way)) <= 1e-6


def test_float16_with_masters(found):
    assert of(found, 'compare', 'novograd', "{'multi_precision': True}") == (0, 0)


@pytest.mark.parametrize('how', HOW)
@pytest.mark.parametrize('name', RESUMED)
def test_a_run_resumes_bit_for_bit_in_all_processes(found, name, how):
    given, way, _ = RESUMED[name]
    (loaded, straight, resumed), other = of(found, 'resume', name, str(given), way, how)
    assert loaded and straight == resumed and other == [loaded, straight, resumed]


@pytest.mark.parametrize('how', HOW)
def test_a_net_without_shapes_gets_them_from_the_file(found, how):
    assert of(found, 'deferred', how) == (True, True)


@pytest.mark.parametrize('what', ['weight', 'state', 'count'])
def test_a_process_that_would_train_something_else_is_named_by_all(found, what):
    for said in of(found, 'mismatch', what):
        assert said.startswith('All processes must have the weights and states of rank 0. Received: others in rank 1. ')


def test_clipping_takes_the_batch_size_of_a_process(found):
    for apart, norms_apart, smallest in of(found, 'clipped'):
        assert apart <= 1e-6 and norms_apart <= 1e-6 and smallest > 1  # all were clipped


def test_a_step_that_overflows_in_one_process_is_left_out_by_all(found):
    for apart, updated, scale in of(found, 'scaled'):
        assert apart <= 1e-6 and updated == [True, True, False, True, True, True] and scale == 512


def test_gradients_are_not_summed_twice(found):
    for said in of(found, 'summed_twice'):
        assert 'scaler.step(batch_size)' in said


def test_accumulated_gradients(found):
    assert max(of(found, 'accumulated')) <= 1e-6


@pytest.mark.parametrize('name', ['sgld', 'psgld'])
def test_processes_with_the_same_seed_draw_the_same_noise(found, name):
    assert of(found, 'noisy', name) == (True, True)


def test_gradients_that_are_averaged_by_hand(found):
    assert max(of(found, 'by_hand', 'novograd')) <= 1e-6


# The example

EXAMPLE = ROOT / 'examples/train_horovod.py'
SHORT = ['--epochs', '4']  # 88 steps


def results(said):
    """The last line of each process: accuracy, and digests of weights and states."""
    return dict(re.findall(r'rank (\d): (step .*)', said))


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """What a run says that was not interrupted, and its losses."""
    log = tmp_path_factory.mktemp('straight') / 'log'
    said, _ = horovodrun(EXAMPLE, *SHORT, '--losses', log)
    return results(said), losses(log)


@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    """The folder of a run of which one process was killed after step 50, and what the others said."""
    folder = tmp_path_factory.mktemp('killed')
    said = horovodrun(EXAMPLE, *SHORT, '--checkpoint-dir', folder / 'run', '--kill-at', '50', '--losses', folder / 'log', code=1)
    return folder, said


def test_where_one_process_is_killed_all_end(killed):
    folder, (out, _) = killed
    assert 'Process 1 exit with status code' in out and not results(out)
    assert max(losses(folder / 'log')) in (49, 50)  # for the next step rank 0 needs the other


def test_only_rank_0_writes(killed):
    folder, (_, err) = killed
    writers = re.findall(r'\[(\d)\]<stderr>:saved step (\d+)', err)
    assert writers == [('0', '20'), ('0', '40')]
    assert sorted(path.name for path in (folder / 'run').iterdir()) == ['step-20.safetensors', 'step-40.safetensors']


@pytest.mark.parametrize('how', HOW)
def test_the_killed_run_resumes_bit_for_bit(straight, killed, tmp_path, how):
    folder = tmp_path / 'run'
    folder.mkdir()
    for path in (killed[0] / 'run').iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    out, err = horovodrun(EXAMPLE, *SHORT, '--checkpoint-dir', folder, '--resume', how, '--losses', tmp_path / 'log')
    said, all_losses = straight
    assert set(said) == {'0', '1'} and said['0'] == said['1']
    assert results(out) == said
    assert losses(tmp_path / 'log') == {step: all_losses[step] for step in range(41, 89)}
    read = dict(re.findall(r'\[(\d)\]<stderr>:restored step 40 from (.*)/', err))
    assert read['0'] == str(folder) and (read['1'] == str(folder)) == (how == 'everywhere')


def test_three_processes_repeat_a_run_bit_for_bit_where_nothing_is_fused():
    """Else which gradients are sent together depends on when they are ready, and with it the order in which they are summed."""
    options = ['-np', '3', '--fusion-threshold-mb', '0']
    first, second = (results(horovodrun(EXAMPLE, '--epochs', '2', options=options)[0]) for _ in range(2))
    assert first == second and set(first) == {'0', '1', '2'} and len(set(first.values())) == 1


def test_the_digits_are_learned(straight):
    assert float(re.search(r'accuracy (\S+)%', straight[0]['0']).group(1)) > 80


def test_resuming_refuses_with_a_reason(killed, tmp_path):
    _, err = horovodrun(EXAMPLE, *SHORT, '--checkpoint-dir', tmp_path, '--resume', 'broadcast', code=1)
    assert 'finds no checkpoint' in err
    _, err = horovodrun(EXAMPLE, *SHORT, '--checkpoint-dir', killed[0] / 'run', '--resume', 'everywhere', '--seed', '1', code=1)
    assert 'seed is 0 there, 1 here' in err
