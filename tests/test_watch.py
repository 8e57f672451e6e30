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
            found.wait_for('step 3', WORKERS, deadline=120)
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
        lost = {'worker': lambda: f'worker {rank_of(cluster, victim)} is lost', 'server': lambda: r'server \d is lost',
                'schedu': lambda: 'the scheduler is lost: 127.0.0.1:'}[victim[:6]]()
        time.sleep(pause)
        cluster.kill(victim)
        texts = ended(cluster, [name for name in WORKERS + SERVERS if name != victim])
        for text in texts:
            assert re.search(f'gluon_optim.watch ends (worker|server) \\d: {lost}', text), cluster.story()
        assert len({re.search(r'(\w+ \d|scheduler) is lost', text).group() for text in texts}) == 1


@pytest.mark.parametrize('victim', ['worker1', 'server1', 'scheduler'])
def test_when_a_process_is_killed_all_others_end_and_say_which(victim):
    check_death(victim, {'steps': ENDLESS})


