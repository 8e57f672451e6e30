"""Real parameter servers: scheduler, servers and two workers as processes on this machine, in clusters that do many jobs each.

A server receives the optimizer as a pickle while it is still inside `import mxnet`. What the workers do is in server_runs.py.
"""
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / 'tests'), str(ROOT / 'tools')]
import cluster  # noqa: E402
from contract_nets import environment  # noqa: E402

import gluon_optim as go  # noqa: E402

LONG = bool(os.environ.get('GLUON_OPTIM_SERVERS'))  # minutes: more steps, a cluster for each of many starts
STEPS = 200 if LONG else 12
BOUND = '100'  # elements from which on a parameter is cut in parts, one for each server
NAMES = [*go.list_optimizers(), 'psgld']
NEVER = {'nadam': 'has one schedule', 'lbsgd': 'adds up gradients', 'sgld': 'draws random numbers', 'psgld': 'draws random numbers'}
CUT = dict.fromkeys(('lamb', 'lans', 'larc', 'lars', 'novograd', 'sngd'), 'takes norms of whole parameters')  # on two servers


def answers(jobs, servers=1, deadline=800, store='dist_sync', bound=BOUND, more=(), **options):
    """What each worker found, job by job."""
    variables = environment(MXNET_KVSTORE_BIGARRAY_BOUND=bound, OMP_NUM_THREADS='1', **dict(more))
    results = cluster.run([sys.executable, str(ROOT / 'tests/server_runs.py'), store, json.dumps(jobs)], deadline, workers=2,
                          servers=servers, environment=variables, **options)
    found = []
    for name in ('worker0', 'worker1'):
        lines = [json.loads(line) for line in results[name].stdout.splitlines() if line.startswith('[[')]
        assert [job for job, _ in lines] == json.loads(json.dumps(jobs))
        found.append([answer for _, answer in lines])
    return found


@functools.lru_cache(None)
def comparisons(servers):
    """(name, update_on_kvstore) -> what both workers found."""
    jobs = [['compare', name, {}, on_servers, STEPS] for on_servers in (False, True) for name in NAMES]
    found = answers(jobs, servers)
    return {(job[1], job[3]): pair for job, *pair in zip(jobs, *found)}


@pytest.mark.parametrize('servers', [1, 2])
def test_updates_on_the_workers_are_those_of_one_process(servers):
    for name in NAMES:
        assert max(comparisons(servers)[name, False]) <= 1e-6, name


@pytest.mark.parametrize('servers', [1, 2])
def test_updates_on_servers_are_those_of_one_process_or_are_refused(servers):
    """With multipliers, a scheduler, and a rate, a decay, a multiplier and a batch size that are changed by hand."""
    refused = {**NEVER, **(CUT if servers > 1 else {})}
    for name in NAMES:
        for answer in comparisons(servers)[name, True]:
            if name in refused:
                assert isinstance(answer, str) and answer.startswith(f'{name} {refused[name]}'), (name, answer)
            else:
                assert not isinstance(answer, str) and answer <= 1e-6, (name, answer)


def test_what_a_refusal_says():
    for answer in comparisons(2)['novograd', True]:
        assert answer == (
            'novograd takes norms of whole parameters, but parameters of MXNET_KVSTORE_BIGARRAY_BOUND elements and more are cut in '
            "parts, one for each server. Received: 2 servers, a bound of 100, and 'p0_weight', of up to 150 elements. Pass "
            'update_on_kvstore=False, set MXNET_KVSTORE_BIGARRAY_BOUND=151 for all workers, or use one server.')


ON_ONE = [
    ['starts', 'sgd_torch', 20], ['starts', '', 20, True], ['compare', 'adamw', {}, False, 12, 'float64'],
    ['failing_update'], ['unpicklable'], ['disagreement'], ['refused_changes'], ['skipped_step'],
    ['compare', 'lars', {'momentum': 0.9}, True, 12], ['compare', 'sgd', {'momentum': 0.9}, True, 12],
    *([['compare', name, {}, True, 12, 'float64'] for name in ('adamw', 'dcasgd', 'sgd')]),
    ['compare', 'novograd', {'multi_precision': True}, True, 12, 'float16'],
    ['compare', 'lars', {'multi_precision': True}, True, 12, 'float16'],
]


@functools.lru_cache(None)
def on_one_server():
    return {json.dumps(job): pair for job, *pair in zip(ON_ONE, *answers(ON_ONE))}


def both(*job):
    return on_one_server()[json.dumps(list(job))]


@pytest.mark.parametrize('job', ON_ONE[:2], ids=['ours', "MXNet's own, accelerated"])
def test_no_start_is_overtaken_by_gradients(job):
    """With MXNet's own way some of 20 go wrong: the late initial weights are sums of gradients."""
    assert both(*job) == [0, 0]


@pytest.mark.parametrize('job, step, text', [
    ('failing_update', 3, 'ArithmeticError: the third update is too much'),
    ('unpicklable', 1, "AttributeError: Can't get attribute 'OnlyHere'"),
    ('disagreement', 3, 'ValueError: All workers must make the same changes. Received for `lr` in step 2: ')])
def test_an_error_on_a_server_reaches_all_workers_in_the_next_step(job, step, text):
    for answer in both(job):
        arrived, message, again = answer
        assert message.startswith(f'The optimizer failed on parameter server 0, which updates no more weights: {text}')
        assert (arrived, again) == (step, True)


def test_changes_that_are_refused_are_not_sent():
    for errors, same, trained in both('refused_changes'):
        assert [error.partition(' ')[0] for error in errors] == ['`wd`', '`multi_precision`', 'A']
        assert 'must be in [0, inf). Received: wd=-1.0' in errors[0]
        assert 'cannot be changed once the servers have the optimizer' in errors[1]
        assert 'may not alter which states sgd_torch keeps' in errors[2]
        assert same and trained


def test_a_batch_size_of_nan_on_one_worker_skips_the_step_on_all():
    assert both('skipped_step') == [[True, False]] * 2


def test_rates_and_momentum_on_a_server():
    """lars corrects the momentum when the rate changes: on servers for each parameter, as one process does for a list."""
    assert max(both('compare', 'lars', {'momentum': 0.9}, True, 12)) <= 1e-6
    assert max(both('compare', 'sgd', {'momentum': 0.9}, True, 12)) <= 1e-6


def test_half_precision_with_masters():
    assert both('compare', 'novograd', {'multi_precision': True}, True, 12, 'float16') == [0, 0]
    for answer in both('compare', 'lars', {'multi_precision': True}, True, 12, 'float16'):
        assert answer.startswith('lars with multi_precision takes norms of float16 weights')


ROUNDED = 'These servers would keep float64 weights and gradients as float32'


def test_double_precision_on_servers_is_refused():
    for name in ('adamw', 'dcasgd', 'sgd'):
        for answer in both('compare', name, {}, True, 12, 'float64'):
            assert answer == (
                f'{name} has float64 weights, of which MXNet may keep float32 copies on servers, without saying so. Received: a '
                'store that updates on parameter servers. Pass update_on_kvstore=False, or use float32.')


def test_sums_of_double_precision_have_all_digits_or_are_refused():
    for answer in both('compare', 'adamw', {}, False, 12, 'float64'):
        assert answer.startswith(ROUNDED) if isinstance(answer, str) else answer <= 1e-15


def test_servers_that_round_are_found_out():
    """MXNet does not initialize a flag; here it is set, for the memory that a server gets is never 0."""
    jobs = [['compare', 'adamw', {}, False, 2, 'float64'], ['compare', 'adamw', {}, True, 2, 'float16'],
            ['mxnets_own', 'float64']]
    for double, half, own in answers(jobs, servers=2, more={'MALLOC_PERTURB_': '1'}):
        assert double == own == (
            ROUNDED + ': MXNet does not initialize the flag that says so, and here it happens to be set. Received: float64 '
            'parameters. Use float32, or Horovod.')
        assert half.startswith('These servers would update float32 copies of float16 weights: ')
        assert half.endswith('float16 parameters without multi_precision. Pass multi_precision=True or update_on_kvstore=False.')


def test_servers_without_the_package():
    code = 'import sys; sys.modules["gluon_optim"] = None; import mxnet'
    for answer, in answers([['not_installed']], bound=None, server_command=[sys.executable, '-c', code]):
        step, message, again = answer
        assert step == 1 and again
        assert message.startswith('Parameter server 0 of 1 does not run gluon_optim')
        assert 'Install it there, in the Python that starts the server, or pass update_on_kvstore=False.' in message


def test_a_module(tmp_path):
    """It is trained as in one process; its states are not reached, which is said before anything is read or written."""
    from server_runs import trained_module, weights_of
    alone = trained_module('adam_torch', None, slice(0, 8))
    expected = weights_of(alone)
    go.module_checkpoint(alone, tmp_path / 'model')(0)
    files = sorted(path.name for path in tmp_path.iterdir())
    for (found, refused), in answers([['module', 'adam_torch', str(tmp_path / 'model')]], servers=2, bound=None):
        assert refused == [
            "The states of a Module must be in this process. Received: kvstore 'dist_sync', which keeps them on its servers. Set "
            'MXNET_UPDATE_ON_KVSTORE=0 in the environment of the workers.'] * 3
        assert sorted(path.name for path in tmp_path.iterdir()) == files
        assert sorted(found) == sorted(expected)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-6)


@pytest.mark.skipif(not LONG, reason='minutes; set GLUON_OPTIM_SERVERS=1')
@pytest.mark.parametrize('job', ON_ONE[:2], ids=['ours', "MXNet's own, accelerated"])
def test_twenty_clusters_start_right(job):
    for _ in range(20):
        assert answers([[*job[:2], 1, *job[3:]]]) == [[0], [0]]


def command(*arguments, **options):
    """tools/cluster: its code and what it printed."""
    done = subprocess.run([str(ROOT / 'tools/cluster'), *arguments], env=environment(PYTHON=sys.executable, OMP_NUM_THREADS='1'),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=800, **options)
    return done.returncode, done.stdout, done.stderr


def test_the_script_in_the_documentation(tmp_path):
    text = (ROOT / 'docs/DISTRIBUTED.md').read_text(encoding='utf-8')
    (tmp_path / 'train.py').write_text(re.search('```python\n(.*?)```', text, re.DOTALL).group(1))
    code, out, err = command('--workers', '2', '--servers', '2', sys.executable, 'train.py', cwd=tmp_path)
    assert code == 0, out + err
    found = [re.fullmatch(r'worker\d: rank (\d): (\[\[.*\]\])', line) for line in sorted(out.splitlines())]
    assert sorted(match.group(1) for match in found) == ['0', '1']
    assert found[0].group(2) == found[1].group(2)


def test_the_command_fails_with_a_worker():
    code, _, err = command('--grace', '1', '--workers', '1', '--servers', '1', sys.executable, '-c', 'raise SystemExit(3)')
    assert code == 1
    assert 'worker0 ended with 3' in err


def test_an_error_in_asynchronous_training():
    for answer, in answers([['failing_update']], store='dist_async'):
        assert 'ArithmeticError: the third update is too much' in answer[1]


@pytest.mark.parametrize('update_on_kvstore', [True, False])
def test_compressed_gradients(update_on_kvstore):
    for found, in answers([['compressed', update_on_kvstore]], servers=2):
        assert found == [[0.0], [-1.0], [-1.0]]
