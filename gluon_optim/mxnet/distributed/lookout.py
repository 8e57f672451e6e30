"""Who notices that a process of the cluster has died: a thread in each worker and each server.

MXNet's main threads wait in C for what a dead process would have sent. So each server opens a connection to each worker, beside
MXNet's own. The kernel closes it when one of them is killed; both send a line several times in ``deadline``, for machines that
vanish; and both look whether the scheduler still takes connections. The first that notices a death tells the others, and ends.
In dist_sync workers also say how many steps they have begun: one that has ended after fewer would never be there for the others.
The scheduler has no such connections: nobody sends it commands. It gets datagrams at the number of its port, from servers.

Nothing here calls MXNet, which knows nothing of this thread, nor holds a store: that would keep a worker from ending.
"""
import atexit
import contextlib
import json
import logging
import multiprocessing
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import warnings
from typing import Any, Iterator, List, Optional, Tuple

from ...schema import some_of

__all__ = ['Lookout', 'Peer', 'connect', 'described', 'end_process', 'give_up', 'scheduler_address', 'script_error',
           'watch_as_scheduler']

log = logging.getLogger('gluon_optim')

BEATS = 15      # in ``deadline``
SILENT = 10     # beats that may be missing until a process counts as lost
UNREACHED = 4   # attempts to connect to the scheduler that may fail
FAILED = 5      # beats for which a server that has failed stays, for workers to raise its error in their next step
MAGIC = b'gluon_optim.watch '  # before each datagram
WORDS = 1000    # letters of a reason that fit in one
ALONE = 4 * BEATS   # beats for which a worker of dist_async that is done waits for one that has not begun
PARTING = 0.3   # seconds between the last words and the end, for others to read them


_of_workers: List['Lookout'] = []


def scheduler_address() -> Tuple[str, int]:
    return os.environ['DMLC_PS_ROOT_URI'], int(os.environ['DMLC_PS_ROOT_PORT'])


def connect(address: Tuple[str, int], timeout: float) -> socket.socket:
    connection = socket.create_connection(address, timeout)
    connection.settimeout(1)
    return connection


def end_process() -> None:
    """End without giving back the store: MXNet would wait for the others, for ever."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    for child in multiprocessing.active_children():  # of a DataLoader, say: they would wait for tasks, for ever
        child.kill()
    os._exit(1)


def script_error() -> Optional[BaseException]:
    """What ended the script; None too for what is from an interactive session."""
    return None if hasattr(sys, 'ps1') else getattr(sys, 'last_value', None)


def described(error: BaseException) -> str:
    try:
        return f'{type(error).__name__}: {error}'.rstrip(': ')
    except Exception:   # its own
        return type(error).__name__


def give_up() -> None:
    """Let this process end when its program does: to give back the store MXNet would wait for the missing workers, for ever."""
    atexit.register(_end_after_failure)


def _end_after_failure() -> None:
    for lookout in _of_workers:
        error = script_error()
        lookout.end(f'{lookout.name} ended ' + (f'with {described(error)}' if error else
                                                'after a call in which not all workers took part'))
    end_process()


def _say_why(name: str, reason: str) -> None:
    text = f'gluon_optim.watch ends {name}: {reason}'
    with contextlib.suppress(Exception):
        sys.stderr.write(f'\n{text}\n')
        if log.hasHandlers():
            log.error(text)


class Peer:
    """A process at the other end of a connection."""

    def __init__(self, name: str, connection: socket.socket):
        self.name, self.connection = name, connection
        self.received = b''     # of a line that is not complete
        self.silent = 0         # beats since something arrived
        self.steps = 0          # that it has begun, where these are counted
        self.done = False       # or has left

    def send(self, **message: Any) -> None:
        """A line; every line is a beat. That nobody is there is found out when reading."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b'\n')

    def receive(self) -> Any:
        """The messages that have arrived; None where the connection is closed, or somebody else is there."""
        try:
            data = self.connection.recv(1 << 16)
            *lines, self.received = (self.received + data).split(b'\n')
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        self.silent = 0
        return messages if data else None


class Lookout:
    """Watches the scheduler, and the processes at the other ends of connections, until all of these have left.

    A worker listens for the connections of servers, which they make on its command. A worker says that it is *done* at the end of
    its script, and waits. A server says so when all workers have. A worker for which all servers are done *leaves*, and servers
    let it.

    ``name``
        Of this process, in what it says.
    ``number``
        How many processes there will be.
    ``listener``, ``token``
        Of a worker: where servers connect, and what they know.
    ``complete``
        When all have connected.
    ``over``
        When nobody is watched any more.
    """

    def __init__(self, name: str, number: int, deadline: float, listener: Optional[socket.socket] = None, token: str = ''):
        self.name, self.deadline = name, deadline
        self.complete, self.over = threading.Event(), threading.Event()
        self._listener, self._token, self._beats = listener, token, 0
        self._steps = 0
        self._leaving = False
        self._number, self._done, self._left = number, 0, 0
        self._is_server = name.startswith('server')
        self._peers: List[Peer] = []
        self._selector = selectors.DefaultSelector()
        self._datagrams = socket.socket(type=socket.SOCK_DGRAM)
        self._unreached = 0
        self._failure, self._remaining = '', FAILED
        self._alone = 0         # beats since a worker has been done and another has never been there
        if listener is not None:
            self._selector.register(listener, selectors.EVENT_READ)
            _of_workers.append(self)
        threading.Thread(target=self._run, name='gluon_optim.watch', daemon=True).start()

    def add(self, peer: Peer) -> None:
        self._peers.append(peer)
        self._selector.register(peer.connection, selectors.EVENT_READ, peer)

    def missing(self) -> List[str]:
        """The servers that have not connected yet."""
        return sorted({f'server {number}' for number in range(self._number)} - {peer.name for peer in list(self._peers)})

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step of dist_sync, in which all workers wait for each other. One that is refused does not count."""
        self._steps += 1
        try:
            yield
        except BaseException:
            self._steps -= 1
            raise

    def fail(self, text: str) -> None:
        """Let the cluster end because of an error in this process, soon."""
        self._failure = self._failure or f'{self.name} has failed: {text}'

    def done(self) -> None:
        """This process has nothing left to do, but watches until the others are done."""
        for peer in list(self._peers):
            peer.send(done=True, steps=self._steps)

    def leave(self) -> None:
        """Watch no more; nobody is to miss this process from now on."""
        self._leaving = True  # at once, for the others then close their connections
        self._tell_scheduler(left=True)
        for peer in list(self._peers):
            peer.send(left=True, steps=self._steps)
        self.over.set()

    def forget(self) -> None:
        """In a child that was forked: it is not this process, and must not keep its connections open when that dies."""
        self._leaving = True
        for peer in self._peers:
            peer.connection.close()

    def end(self, reason: str) -> None:
        """End this process, and all others, because of ``reason``; not while it leaves, or ends already."""
        if self._leaving:
            return
        self._leaving = True
        reason = reason if len(reason) <= WORDS else reason[:WORDS] + '...'
        for peer in list(self._peers):
            peer.send(end=reason)
            with contextlib.suppress(OSError):
                peer.connection.shutdown(socket.SHUT_WR)
        self._tell_scheduler(end=reason)
        _say_why(self.name, reason)
        time.sleep(PARTING)
        end_process()

    # -- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        interval = self.deadline / BEATS
        due = time.monotonic() + interval
        while not self.over.is_set():
            for key, _ in self._selector.select(max(due - time.monotonic(), 0)):
                if key.data is None:
                    self._accept(key.fileobj)
                else:
                    self._read(key.data)
            if time.monotonic() >= due:
                self._beat(interval)
                due = time.monotonic() + interval
        registered: List[Any] = [key.fileobj for key in list(self._selector.get_map().values())]
        for one in [*registered, *(peer.connection for peer in self._peers), self._datagrams]:
            one.close()
        self._selector.close()

    def _accept(self, listener: Any) -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            connection.settimeout(1)
            self._selector.register(connection, selectors.EVENT_READ, Peer('', connection))

    def _introduced(self, peer: Peer, messages: Any) -> Any:
        """What a process says besides its name, of which the first is the token; else it is somebody else."""
        with contextlib.suppress(LookupError, TypeError):
            if secrets.compare_digest(messages[0]['token'], self._token):
                peer.name = messages[0]['server']
                self._peers.append(peer)
                if self._listener is not None and not self.missing():
                    self._selector.unregister(self._listener)
                    self._listener.close()
                    self.complete.set()
                return messages[1:]
        self._selector.unregister(peer.connection)
        peer.connection.close()
        return []

    def _read(self, peer: Peer) -> None:
        messages = peer.receive()
        if not peer.name:
            messages = self._introduced(peer, messages)
        if messages is None:
            self._selector.unregister(peer.connection)
            self.end(f'{peer.name} is lost: it has closed its connections, as a process does that is killed')
            return
        for message in messages:
            if 'end' in message:
                self.end(message['end'])
            peer.steps = message.get('steps', 0)
            if not peer.done and ('done' in message or 'left' in message):
                peer.done = True
                self._note_done()
            if 'left' in message:
                self._selector.unregister(peer.connection)
                self._left += 1
                if self._left == self._number:
                    self.leave()
                return

    def _note_done(self) -> None:
        self._done += 1
        if self._done < self._number:
            return
        if self._failure:  # in the last step
            self.end(self._failure)
        if self._is_server:
            self.done()
        else:
            self.leave()

    def _beat(self, interval: float) -> None:
        self._beats += 1
        if self._listener is not None and self._beats > 2 * BEATS and self.missing():  # the main thread still waits for it, in C
            self.end(f'{self.missing()[0]} is lost: it has not connected')
        for peer in [key.data for key in list(self._selector.get_map().values()) if key.data is not None and key.data.name]:
            peer.send(steps=self._steps)
            peer.silent += 1  # counted, not measured: where this process was asleep, the others need not have been
            if peer.silent > SILENT:
                self.end(f'{peer.name} is lost: nothing has been heard of it for {SILENT * interval:.3g} s')
        self._look_for_steps()
        self._look_for_strangers()
        self._tell_scheduler(deadline=self.deadline)
        self._look_for_scheduler(interval)
        if self._failure:
            self._remaining -= 1
            if not self._remaining:
                self.end(self._failure)

    def _look_for_steps(self) -> None:
        last = max(self._peers, key=lambda peer: peer.steps, default=None)
        for peer in self._peers:
            if last is not None and peer.done and peer.steps < last.steps:
                self.end(f'{peer.name} has ended after {peer.steps} steps, and {last.name} waits for it in step {peer.steps + 1}: '
                         'all workers must make the same number of steps')

    def _look_for_strangers(self) -> None:
        """A worker that is done waits until all are; one that has not made the call would never say so."""
        if self._is_server and self._done and len(self._peers) < self._number:
            self._alone += 1
            if self._alone > (SILENT if any(peer.steps for peer in self._peers) else ALONE):
                present = {peer.name for peer in self._peers}
                absent = [f'worker {rank}' for rank in range(self._number) if f'worker {rank}' not in present]
                self.end(f'{some_of(absent)} never called `watch`, which every worker must, in the same place')

    def _tell_scheduler(self, **message: Any) -> None:
        """Where it is one of MXNet alone, nobody listens."""
        if self._is_server:
            with contextlib.suppress(OSError):
                self._datagrams.sendto(MAGIC + json.dumps(message).encode(), scheduler_address())

    def _look_for_scheduler(self, interval: float) -> None:
        try:
            connect(scheduler_address(), interval).close()
            self._unreached = 0
        except OSError as error:
            self._unreached += 1
            if self._unreached > UNREACHED:
                self.end(f'the scheduler is lost: {":".join(map(str, scheduler_address()))} takes no connections ({error})')


def watch_as_scheduler() -> None:
    """End this process, a scheduler, when servers say so, or when none of those that did say something does any more."""
    port = scheduler_address()[1]
    listener = socket.socket(type=socket.SOCK_DGRAM)
    try:
        listener.bind(('', port))
    except OSError as error:
        listener.close()
        warnings.warn(f'This scheduler does not end when other processes die: UDP port {port} cannot be had ({error}).',
                      RuntimeWarning, stacklevel=2)
        return
    threading.Thread(target=_listen, args=(listener,), name='gluon_optim.watch', daemon=True).start()


def _listen(listener: socket.socket) -> None:
    reason = ''
    while not reason:
        try:
            data = listener.recv(1 << 16)
        except socket.timeout:
            reason = f'no server is left: none has been heard of for {listener.gettimeout():g} s'
            break
        try:
            message = json.loads(data[len(MAGIC):]) if data.startswith(MAGIC) else {}
            if 'left' in message:
                return
            reason = str(message.get('end', ''))
            listener.settimeout(message.get('deadline', listener.gettimeout()))
        except (AttributeError, TypeError, ValueError):  # it is somebody else's
            continue
    _say_why('the scheduler', reason)
    end_process()
