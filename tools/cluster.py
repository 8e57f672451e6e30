"""A cluster of MXNet on this machine: a scheduler, servers and workers, as processes that find each other on 127.0.0.1.

    tools/cluster --workers 2 --servers 2 python examples/train_distributed.py

Each process gets the variables that MXNet's own launchers set on real machines:

    DMLC_ROLE               scheduler, server or worker
    DMLC_PS_ROOT_URI        address of the machine with the scheduler
    DMLC_PS_ROOT_PORT       a free port there
    DMLC_NUM_SERVER         the number of servers
    DMLC_NUM_WORKER         the number of workers
    DMLC_INTERFACE          the network interface; lo here

A server is `python -c 'import mxnet'`, a scheduler `python -c 'import gluon_optim'`: they run inside that import until the workers
have gone. Needs nothing but Python; `Cluster` is for programs that want to look at the processes, and to kill some.
"""
import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

ROLE = [sys.executable, '-c', 'import mxnet']  # scheduler and servers live in this import
# which gluon_optim makes too, and lets a scheduler end with the others
SCHEDULER = [sys.executable, '-c', 'try: import gluon_optim\nexcept ImportError: import mxnet']
STARTS = 5  # another process may take the port between its choice and its use


class ClusterError(Exception):
    """A process of the cluster failed, or not all ended in time. The message holds what each of them printed."""


class Result(NamedTuple):
    """A process that has ended."""

    name: str           # scheduler, server0, worker1: numbers are in the order of the start, which MXNet's ranks need not follow
    returncode: int     # negative: the signal that killed it
    stdout: str
    stderr: str


class Cluster:
    """The processes of one cluster; whatever happens, leaving the ``with`` block kills those that are left.

    Parameters
    ----------
    command : sequence of str
        What each worker runs.
    workers, servers : int
    environment : mapping, optional
        Variables for all processes, besides those of this one. None removes one.
    worker_environments : sequence of mappings, optional
        Variables for each worker alone.
    server_command : sequence of str, optional
        What a server runs in place of `python -c 'import mxnet'`.

    >>> with Cluster([sys.executable, 'train.py'], workers=2, servers=1) as cluster:  # doctest: +SKIP
    ...     cluster['server0'].kill()
    ...     cluster.wait(60)['worker1'].stderr
    """

    def __init__(self, command: Sequence[str], workers: int = 2, servers: int = 1,
                 environment: Optional[Mapping[str, Optional[str]]] = None,
                 worker_environments: Sequence[Mapping[str, Optional[str]]] = (), server_command: Sequence[str] = ROLE):
        self.processes: Dict[str, subprocess.Popen[bytes]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix='cluster-')  # files, for a pipe that nobody reads fills up
        shared = {**os.environ, **(environment or {})}
        shared.update(DMLC_PS_ROOT_URI='127.0.0.1', DMLC_PS_ROOT_PORT=str(free_port()), DMLC_NUM_SERVER=str(servers),
                      DMLC_NUM_WORKER=str(workers), DMLC_INTERFACE='lo', DMLC_NODE_HOST='127.0.0.1')
        own = [*worker_environments, *[{}] * (workers - len(worker_environments))]
        try:
            self._start('scheduler', SCHEDULER, dict(shared, DMLC_ROLE='scheduler'))
            for i in range(servers):
                self._start(f'server{i}', server_command, dict(shared, DMLC_ROLE='server'))
            for i in range(workers):
                self._start(f'worker{i}', command, dict(shared, DMLC_ROLE='worker', **own[i]))
        except BaseException:
            self.close()
            raise

    def _start(self, name: str, command: Sequence[str], variables: Mapping[str, Optional[str]]) -> None:
        with open(self.path(name, 'stdout'), 'wb') as out, open(self.path(name, 'stderr'), 'wb') as err:
            self.processes[name] = subprocess.Popen(
                command, env={key: value for key, value in variables.items() if value is not None}, stdin=subprocess.DEVNULL,
                stdout=out, stderr=err, start_new_session=True)  # a session of its own: its children die with it

    def __enter__(self) -> 'Cluster':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __getitem__(self, name: str) -> 'subprocess.Popen[bytes]':
        return self.processes[name]

    def close(self) -> None:
        """Kill what still runs, and forget what was printed."""
        self.kill()
        self._folder.cleanup()

    def kill(self, *names: str) -> None:
        """Kill these processes (all, without names) with their children; no process is told why."""
        for name in names or self.processes:
            process = self.processes[name]
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def running(self) -> List[str]:
        """The names of the processes that have not ended."""
        return [name for name, process in self.processes.items() if process.poll() is None]

    def failed(self) -> List[str]:
        """The names of those that ended with another code than 0."""
        return [name for name, process in self.processes.items() if process.poll()]

    def printed(self, name: str, stream: str = 'stdout') -> str:
        """What a process has printed so far, on 'stdout' or 'stderr'."""
        with open(self.path(name, stream), encoding='utf-8', errors='replace') as file:
            return file.read()

    def wait_for(self, text: str, names: Sequence[str], deadline: float) -> None:
        """Wait until each of these processes has printed ``text``.

        ClusterError after ``deadline`` seconds, and where one ends before.
        """
        end = time.monotonic() + deadline
        waiting = list(names)
        while waiting:
            waiting = [name for name in waiting if text not in self.printed(name)]
            gone = [name for name in waiting if name not in self.running() and text not in self.printed(name)]
            if gone or time.monotonic() > end:
                raise ClusterError(f'{gone or waiting} did not print {text!r}\n{self.story()}')
            time.sleep(0.02)

    def wait(self, deadline: float, grace: Optional[float] = None) -> Dict[str, Result]:
        """Wait for all processes to end; what has become of them, by name.

        ClusterError after ``deadline`` seconds. With ``grace``, also that many seconds after one has failed: MXNet leaves
        the others waiting for it.
        """
        end, dead = time.monotonic() + deadline, False
        while self.running():
            if grace is not None and not dead and self.failed():
                dead, end = True, min(end, time.monotonic() + grace)
            if time.monotonic() > end:
                left = self.running()
                self.kill()
                raise ClusterError((f'a process failed and {left} did not end' if dead else f'{left} did not end in {deadline} s')
                                   + f'\n{self.story()}')
            time.sleep(0.02)
        return {name: Result(name, process.returncode, self.printed(name), self.printed(name, 'stderr'))
                for name, process in self.processes.items()}

    def story(self) -> str:
        """What each process has printed and how it ended, for messages."""
        return '\n'.join(f'--- {name}: {"runs" if process.poll() is None else f"ended with {process.returncode}"}\n'
                         f'{self.printed(name)}{self.printed(name, "stderr")}' for name, process in self.processes.items())

    def lost_a_port(self) -> bool:
        """Whether a process ended because another program had taken its port."""
        return any('van.cc' in text and ('bind failed' in text or 'Address already in use' in text)
                   for text in (self.printed(name, 'stderr') for name in self.failed()))

    def path(self, name: str, stream: str) -> Path:
        """The file with what a process prints on 'stdout' or 'stderr'."""
        return Path(self._folder.name, f'{name}.{stream}')


def run(command: Sequence[str], deadline: float, grace: float = 3, **arguments: Any) -> Dict[str, Result]:
    """Run a `Cluster` to its end, started again where a port was taken. ClusterError where a process fails, or after ``deadline``
    seconds; see `Cluster.wait` for ``grace``."""
    for _ in range(STARTS):
        with Cluster(command, **arguments) as cluster:
            try:
                results = cluster.wait(deadline, grace)
            except ClusterError:
                if cluster.lost_a_port():
                    continue
                raise
            if cluster.failed():
                if cluster.lost_a_port():
                    continue
                raise ClusterError(f'{cluster.failed()} failed\n{cluster.story()}')
            return results
    raise ClusterError(f'no free port in {STARTS} tries')


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        port: int = listener.getsockname()[1]
        return port


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser('tools/cluster', description=__doc__.partition('\n')[0], allow_abbrev=False)
    parser.add_argument('--workers', type=int, default=2, help='how many processes run COMMAND; 2 by default')
    parser.add_argument('--servers', type=int, default=2, help='how many processes hold the weights; 2 by default')
    parser.add_argument('--grace', type=float, default=20, metavar='SECONDS',
                        help='how long the others may run when one has failed, until they are killed; 20 by default')
    parser.add_argument('--logs', action='store_true', help='also print what scheduler and servers say when all goes well')
    parser.add_argument('command', nargs=argparse.REMAINDER, metavar='COMMAND', help='what each worker runs, with its arguments')
    given = parser.parse_args(arguments)
    if not given.command or given.workers < 1 or given.servers < 1:
        parser.error('at least one worker, one server, and a command, such as: python train.py')
    if shutil.which(given.command[0]) is None:
        parser.error(f'{given.command[0]!r} is no program that can be run here')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that __exit__ kills the others
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    for _ in range(STARTS):
        with Cluster(given.command, given.workers, given.servers) as cluster:
            code = _follow(cluster, given.logs, given.grace)
            if not cluster.lost_a_port():
                return code
    print(f'tools/cluster: no free port in {STARTS} tries', file=sys.stderr)
    return 1


def _follow(cluster: Cluster, logs: bool, grace: float) -> int:
    """Print what the processes print, each line after the name of its process, until all have ended.

    Returns 0, or 1 if one failed.
    """
    with contextlib.ExitStack() as files:
        streams = [(name, stream, files.enter_context(open(cluster.path(name, stream), encoding='utf-8', errors='replace')))
                   for name in cluster.processes for stream in ('stdout', 'stderr') if logs or name.startswith('worker')]
        dead = None
        while True:
            running = cluster.running()
            for name, stream, file in streams:
                for line in file:
                    print(f'{name}: {line.rstrip()}', file=getattr(sys, stream), flush=True)
            if not running:
                break
            if cluster.failed() and dead is None:
                dead = time.monotonic()
            if dead is not None and time.monotonic() > dead + grace:
                print(f'tools/cluster: {cluster.failed()} failed; killing {running}, which wait for it', file=sys.stderr)
                cluster.kill()
            time.sleep(0.05)
    for name in cluster.failed():
        print(f'tools/cluster: {name} ended with {cluster[name].returncode}', file=sys.stderr)
        if not (logs or name.startswith('worker')):
            print(cluster.printed(name, 'stderr'), file=sys.stderr)
    return 1 if cluster.failed() else 0


if __name__ == '__main__':
    sys.exit(main())
