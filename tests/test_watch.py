"""Deaths in a distributed run under `go.watch`: real processes on this machine, killed in the middle of training."""
import json
import os
import random
import re
import sys
import time
from pathlib import Path

import pytest

mx = pytest.importorskip('mxnet')

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / 'tools'), str(ROOT / 'tests')]
from cluster import Cluster, ClusterError, run  # noqa: E402
from contract_nets import environment  # noqa: E402
from mxnet import gluon  # noqa: E402
from server_states_worker import found_in, made, train  # noqa: E402

import gluon_optim as go  # noqa: E402

LONG = bool(os.environ.get('GLUON_OPTIM_SERVERS'))
WORKERS, SERVERS = ['worker0', 'worker1'], ['server0', 'server1']
DEADLINE = 15
LONGER = 10     # seconds that this test may need to notice, on a busy machine
ENDLESS = 10 ** 6


def command(options):
    return [sys.executable, str(ROOT / 'tests/watch_worker.py'), json.dumps(options)]


def started(options):
    """A cluster of two workers and two servers in which the workers have made steps."""
    for _ in range(5):
        found = Cluster(command(options), workers=2, servers=2, environment=environment(OMP_NUM_THREADS='1'))
        try:
            found.wait_for('step 2', WORKERS, deadline=120)
            return found
        except ClusterError:
            lost = found.lost_a_port()
            found.close()
            if not lost:
                raise
        except BaseException:
            found.close()
            raise
    raise AssertionError('no free port')


def ended(cluster, names, deadline=DEADLINE + LONGER):
    """What each of the processes with these names has printed on standard error, when they have ended."""
    end = time.monotonic() + deadline
    while set(names) & set(cluster.running()):
        assert time.monotonic() < end, f'{cluster.running()} did not end\n{cluster.story()}'
        time.sleep(0.05)
    for name in names:
        assert cluster[name].returncode == 1, cluster.story()
    return [cluster.printed(name, 'stderr') for name in names]


def rank_of(cluster, worker):
    return re.search(r'rank (\d)', cluster.printed(worker)).group(1)


def check_death(victim, options, pause=0.0):
    with started(options) as cluster:
        lost = {'w': lambda: f'worker {rank_of(cluster, victim)} is lost', 's': lambda: r'server \d is lost',
                'scheduler': lambda: 'the scheduler is lost: 127.0.0.1:'}[victim if victim == 'scheduler' else victim[0]]()
        time.sleep(pause)
        cluster.kill(victim)
        texts = ended(cluster, [name for name in cluster.processes if name != victim])
        for text in texts:
            assert re.search(f'gluon_optim.watch ends (worker \\d|server \\d|the scheduler): {lost}', text), cluster.story()
        assert len({re.search(r'(\w+ \d|scheduler) is lost', text).group() for text in texts}) == 1


def check_continuation(options):
    """From the newest checkpoint, like a run in one process that nobody stopped."""
    results = run(command(dict(options, steps=7)), 120, workers=2, servers=1, environment=environment(OMP_NUM_THREADS='1'))
    for worker in WORKERS:
        lines = results[worker].stdout.splitlines()
        begin = int(lines[0].partition('begins at ')[2])
        assert begin and begin % 5 == 0
        alone = made({'name': 'adamw'})
        alone.trainer = gluon.Trainer(alone.parameters, go.create('adamw', learning_rate=0.0625), kvstore=None)
        train(alone, begin + 7)
        assert json.loads(lines[-1]) == found_in(alone)


@pytest.mark.parametrize('victim', ['worker1', 'server1', 'scheduler'])
def test_when_a_process_is_killed_all_others_end_and_say_which(victim, tmp_path):
    options = {'folder': str(tmp_path / 'run')} if victim == 'server1' else {}
    check_death(victim, {'steps': ENDLESS, **options}, pause=1.0 if options else 0.0)
    if options:
        check_continuation(options)


@pytest.mark.skipif(not LONG, reason='minutes; set GLUON_OPTIM_SERVERS=1')
@pytest.mark.parametrize('moment', range(10))
@pytest.mark.parametrize('victim', ['worker1', 'server1', 'scheduler'])
def test_at_any_moment(victim, moment, tmp_path):
    options = {'folder': str(tmp_path / 'run')}
    check_death(victim, {'steps': ENDLESS, **options}, pause=1 + random.Random(moment).random())
    check_continuation(options)


@pytest.mark.skipif(not LONG, reason='minutes; set GLUON_OPTIM_SERVERS=1')
@pytest.mark.parametrize('victim', ['worker1', 'server1', 'scheduler'])
@pytest.mark.parametrize('options', [{'kvstore': 'dist_async'}, {'update_on_kvstore': False}], ids=['asynchronous', 'on workers'])
def test_with_other_stores(victim, options):
    check_death(victim, {'steps': ENDLESS, **options})


@pytest.mark.parametrize('stop', [None, pytest.param(0, marks=pytest.mark.skipif(not LONG, reason='GLUON_OPTIM_SERVERS=1'))])
def test_a_worker_that_ends_before_the_others_is_not_missed(stop):
    """It is silent for longer than one that counts as lost."""
    options = {'steps': 4, 'late': 1, 'seconds': 6, 'deadline': 7, 'stop': stop}
    results = run(command(options), 120, workers=2, servers=2, environment=environment(OMP_NUM_THREADS='1'))
    for result in results.values():
        assert result.returncode == 0 and 'gluon_optim' not in result.stderr, result


@pytest.mark.parametrize('options, reason', [
    ({'steps': ENDLESS, 'raise_at': 3, 'kvstore': 'dist_async'}, 'worker 1 ended with ArithmeticError: it has had enough'),
    ({'steps': 2, 'fails': True}, r'server \d has failed: ArithmeticError: the third update is too much')],
    ids=['on a worker', 'on a server, in the last step'])
def test_an_error_ends_all_and_is_named(options, reason):
    with started(options) as cluster:
        for text in ended(cluster, cluster.processes):
            assert re.search(f'gluon_optim.watch ends (worker \\d|server \\d|the scheduler): {reason}', text), cluster.story()


def test_what_cannot_be_watched():
    parameter = gluon.Parameter('weight', shape=(1,))
    parameter.initialize()
    with pytest.raises(ValueError, match="must have a store with servers. Received: kvstore='device'. Create it with"):
        go.watch(gluon.Trainer([parameter], 'adamw'))
    with pytest.raises(TypeError, match='must be a gluon.Trainer. Received: 3'):
        go.watch(3)
    trainer = gluon.Trainer([parameter], 'adamw', kvstore='dist_sync')  # which makes no store before its first step
    with pytest.raises(ValueError, match='`deadline` must be in '):
        go.watch(trainer, deadline=0)
    go.watch(trainer)
    with pytest.raises(ValueError, match='must not be watched already'):
        go.watch(trainer)
