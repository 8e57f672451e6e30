"""Deaths in a distributed run under `go.watch`: real processes on this machine, killed in the middle of training.

    GLUON_OPTIM_SERVERS=1 pytest -s tests/test_watch.py     ten moments for each victim, and how long it took until all had ended
"""
import contextlib
import json
import os
import random
import re
import signal
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

long_run = pytest.mark.skipif(not os.environ.get('GLUON_OPTIM_SERVERS'), reason='minutes; set GLUON_OPTIM_SERVERS=1')
WORKERS, SERVERS = ['worker0', 'worker1'], ['server0', 'server1']
DEADLINE = 15
LONGER = 10     # seconds that this test may need to notice, on a busy machine
ENDLESS = 10 ** 6


def command(options):
    return [sys.executable, str(ROOT / 'tests/watch_worker.py'), json.dumps(options)]


def started(options, printed='step 2'):
    """A cluster of two workers and two servers in which the workers have ``printed`` this."""
    for _ in range(5):
        found = Cluster(command(options), workers=2, servers=2,
                        environment=environment(OMP_NUM_THREADS='1', GLUON_OPTIM_DEADLINE='5'))
        try:
            found.wait_for(printed, WORKERS, deadline=120)
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


def ended(cluster, names, reason, deadline=DEADLINE + LONGER):
    """Check that the processes with these names end, and that each says why; returns what they have printed on standard error."""
    end = time.monotonic() + deadline
    while set(names) & set(cluster.running()):
        assert time.monotonic() < end, f'{cluster.running()} did not end\n{cluster.story()}'
        time.sleep(0.05)
    texts = [cluster.printed(name, 'stderr') for name in names]
    for name, text in zip(names, texts):
        assert cluster[name].returncode == 1, cluster.story()
        assert re.search(f'(gluon_optim.watch ends (worker \\d|server \\d|the scheduler)|Error): {reason}', text), cluster.story()
    return texts


def name_of(cluster, victim):
    """In the words of those who miss it. Which of the servers it is only MXNet knows."""
    if victim.startswith('worker'):
        return 'worker ' + re.search(r'rank (\d)', cluster.printed(victim)).group(1)
    return 'the scheduler' if victim == 'scheduler' else r'server \d'


def check_death(victim, options, printed='step 2', pause=0.0):
    with started(options, printed) as cluster:
        how = r'127\.0\.0\.1:\d+ takes no connections' if victim == 'scheduler' else 'it has closed its connections'
        reason = f'{name_of(cluster, victim)} is lost: {how}'
        time.sleep(pause)
        begin = time.monotonic()
        cluster.kill(victim)
        texts = ended(cluster, [name for name in cluster.processes if name != victim], reason)
        print(f'\n{victim}: all have ended after {time.monotonic() - begin:.1f} s')
        assert len({re.search(r'(\w+ \d|scheduler) is lost', text).group() for text in texts}) == 1


def check_continuation(options):
    """From the newest checkpoint, like a run in one process that nobody stopped."""
    results = run(command(dict(options, steps=7)), 120, workers=2, servers=1, environment=environment(OMP_NUM_THREADS='1'))
    for worker in WORKERS:
        lines = results[worker].stdout.splitlines()
        begin = int(lines[1].partition('begins at ')[2])
        assert begin and begin % 5 == 0
        alone = made({'name': 'adamw'})
        alone.trainer = gluon.Trainer(alone.parameters, go.create('adamw', learning_rate=0.0625), kvstore=None)
        train(alone, begin + 7)
        assert json.loads(lines[-1]) == found_in(alone)


@pytest.mark.parametrize('victim', ['server1', 'scheduler'])  # a worker: see below
def test_when_a_process_is_killed_all_others_end_and_say_which(victim, tmp_path):
    if victim == 'server1':
        options = {'folder': str(tmp_path / 'run')}
        check_death(victim, {'steps': ENDLESS, **options}, printed='step 7')
        check_continuation(options)
    else:
        check_death(victim, {'steps': ENDLESS})


@long_run
@pytest.mark.parametrize('moment', range(10))
@pytest.mark.parametrize('victim', ['worker1', 'server1', 'scheduler'])
def test_at_any_moment(victim, moment, tmp_path):
    options = {'folder': str(tmp_path / 'run')}
    check_death(victim, {'steps': ENDLESS, **options}, printed='step 7', pause=2 * random.Random(moment).random())
    check_continuation(options)


@long_run
@pytest.mark.parametrize('victim', ['worker1', 'server1', 'scheduler'])
@pytest.mark.parametrize('options', [
    {'kvstore': 'dist_async'}, {'update_on_kvstore': False}, {'mxnet': 'sgd'}, {'mxnet': 'sgd', 'kvstore': 'dist_sync'}],
    ids=['asynchronous', 'on workers', "MXNet's own", "MXNet's own, from the first step on"])
def test_with_other_stores_and_optimizers(victim, options):
    check_death(victim, {'steps': ENDLESS, **options})


@pytest.mark.parametrize('victim', ['worker1', pytest.param('server0', marks=long_run)])
def test_a_process_that_has_stopped_is_missed_and_ends_when_it_continues(victim):
    with started({'steps': ENDLESS, 'deadline': 6}) as cluster:
        reason = f'{name_of(cluster, victim)} is lost: nothing has been heard of it for 4 s'
        cluster[victim].send_signal(signal.SIGSTOP)
        ended(cluster, [name for name in cluster.processes if name != victim], reason)
        cluster[victim].send_signal(signal.SIGCONT)
        ended(cluster, [victim], reason)


def living(group):
    """The processes of a group that have not ended; zombies have."""
    found = []
    for path in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, its_group = path.read_text().rpartition(')')[2].split()[:3]
            found += [path] if int(its_group) == group and state not in 'ZX' else []
    return found


def test_when_a_worker_is_killed_processes_that_load_its_data_do_not_hide_it_and_those_of_others_end():
    """They are forked, with all that their parents have open."""
    with started({'steps': ENDLESS, 'loader': True}) as cluster:
        reason = f'{name_of(cluster, "worker1")} is lost: it has closed its connections'
        cluster['worker1'].kill()  # it alone
        ended(cluster, [name for name in cluster.processes if name != 'worker1'], reason)
        os.killpg(cluster['worker1'].pid, signal.SIGKILL)  # nobody could end these
        assert not living(cluster['worker0'].pid)


@pytest.mark.parametrize('options', [
    {'pauses': {'sleep': 5, 'hold_the_lock': 1.5}, 'late': 1, 'deadline': 6},
    pytest.param({'pauses': {'sleep': 15, 'compute': 15, 'wait_in_c': 15, 'hold_the_lock': 2}}, marks=long_run),
    pytest.param({'late': 1, 'stop': 0}, marks=long_run),
    pytest.param({'late': 0, 'kvstore': 'dist_async'}, marks=long_run)],
    ids=['in a step and after the last', 'in a step, long', 'after the last, without the other', 'asynchronous'])
def test_nobody_is_missed_who_is_only_late(options):
    """The others wait for longer than it takes until somebody counts as lost, or three times the deadline."""
    options = {'steps': 4, 'deadline': 5, 'late_seconds': 5 if 'pauses' in options else 15, **options}
    results = run(command(options), 200, workers=2, servers=2, environment=environment(OMP_NUM_THREADS='1'))
    for result in results.values():
        assert result.returncode == 0 and 'gluon_optim' not in result.stderr, result


@pytest.mark.parametrize('options, reason', [
    ({'steps': ENDLESS, 'raise_at': 3, 'kvstore': 'dist_async'}, 'worker 1 ended with ArithmeticError: it has had enough'),
    ({'steps': ENDLESS, 'save_at': 3}, r'worker 1 ended with TimeoutError: All 2 workers must call save_states\. .*worker 0'),
    ({'steps': ENDLESS, 'exit_at': 3}, 'worker 1 has ended after 4 steps, and worker 0 waits for it in step 5: '),
    ({'steps': ENDLESS, 'fails': True},
     r'worker \d ended with ServerError: The optimizer failed on parameter server \d, .*ArithmeticError: the third update'),
    ({'steps': 2, 'fails': True}, r'server \d has failed: ArithmeticError: the third update is too much')],
    ids=['on a worker', 'of a call that one worker makes alone', 'of a worker that ends too early', 'on a server',
         'on a server, in the last step'])
def test_an_error_ends_all_and_is_named(options, reason):
    with started(options) as cluster:
        ended(cluster, cluster.processes, reason)


def test_a_worker_that_does_not_make_the_call_is_named():
    """At the end, where it would be waited for. It hangs there itself, as without `watch`."""
    with Cluster(command({'steps': 3, 'only': 1, 'deadline': 6}), workers=2, servers=2, environment=environment()) as cluster:
        ended(cluster, [*SERVERS, 'scheduler'], "'worker 0' never called `watch`, which every worker must", deadline=120)


@long_run
def test_a_worker_that_makes_the_call_when_the_others_have_ended():
    with Cluster(command({'steps': ENDLESS, 'wait': 10}), servers=2, environment=environment()) as cluster:
        while not any('watches' in cluster.printed(worker) for worker in WORKERS):
            time.sleep(0.05)
        time.sleep(0.5)
        cluster.kill('server1')
        others = [name for name in cluster.processes if name != 'server1']
        ended(cluster, others, r'(server \d is lost|The scheduler at 127\.0\.0\.1:\d+ takes no connections)', deadline=60)


@long_run
def test_deadlines_that_differ():
    with Cluster(command({'steps': ENDLESS, 'deadlines': {'0': 60, '1': 5}}), servers=2, environment=environment()) as cluster:
        ended(cluster, cluster.processes, 'all workers must pass the same `deadline` to watch. Received: (60|5) from', deadline=60)


@long_run
def test_servers_without_the_package_leave_no_worker_behind():
    server = [sys.executable, '-c', "import sys; sys.modules['gluon_optim'] = None; import mxnet"]
    with Cluster(command({'steps': ENDLESS, 'deadline': 5}), environment=environment(), server_command=server) as cluster:
        ended(cluster, WORKERS, 'All servers must connect to 127.0.0.1, .*no connection of .server 0. within', deadline=60)


def test_what_cannot_be_watched():
    parameter = gluon.Parameter('weight', shape=(1,))
    parameter.initialize()
    with pytest.raises(ValueError, match="must have a store with servers. Received: kvstore='device'. Create it with"):
        go.watch(gluon.Trainer([parameter], 'adamw'))
    with pytest.raises(TypeError, match='must be a gluon.Trainer. Received: 3'):
        go.watch(3)
    trainer = gluon.Trainer([parameter], 'adamw', kvstore='dist_sync')  # which makes no store before its first step
    with pytest.raises(ValueError, match='`deadline` must be in '):
        go.watch(trainer, deadline=0.5)
    go.watch(trainer)
    with pytest.raises(ValueError, match='must not be watched already'):
        go.watch(trainer)
