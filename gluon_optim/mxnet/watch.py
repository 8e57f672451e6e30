"""`watch`: where a process of a distributed run dies, the others end instead of waiting for it in C, for ever and silently."""
import atexit
import contextlib
import os
import secrets
import socket
from typing import Any

from mxnet import MXNetError, gluon, nd

from ..schema import Hyper, some_of
from .distributed import ServerError
from .distributed.lookout import Lookout, connect, described, give_up, scheduler_address, script_error
from .distributed.protocol import number_of_servers
from .distributed.worker import send
from .typing import TrainerLike

__all__ = ['watch']


class Watch:
    """What `watch` returns."""

    def __init__(self, deadline: float):
        self.deadline = deadline
        self._lookout: Any = None
        self._stopped = False

    def stop(self) -> None:
        """End no more when others die; the others do not miss this process from now on. For a worker that leaves before its
        script ends, as by ``os._exit``."""
        self._stopped = True
        if self._lookout is not None:
            atexit.unregister(self._leave)
            self._lookout.leave()

    def _wrap(self, trainer: TrainerLike) -> None:
        """Count the steps of ``trainer``, and begin with the first where it makes its store then."""
        allreduce_grads = trainer._allreduce_grads

        def allreduce_grads_watched() -> None:
            if self._lookout is None and not self._stopped:
                self._start(trainer._kvstore)
            with contextlib.ExitStack() as step:
                if self._lookout is not None and 'async' not in trainer._kvstore.type:
                    step.enter_context(self._lookout.step())
                allreduce_grads()
        trainer._allreduce_grads = allreduce_grads_watched

    def _start(self, store: Any) -> None:
        """Tell all servers where this worker can be reached, and wait until each of them has connected to it."""
        name, servers, token = f'worker {store.rank}', number_of_servers(), secrets.token_hex()
        try:
            with connect(scheduler_address(), self.deadline) as way:
                host = way.getsockname()[0]
        except OSError as error:
            give_up()
            raise ServerError(f'The scheduler at {":".join(map(str, scheduler_address()))} takes no connections: {error}. It may '
                              'have ended because another process died; start all processes again.') from error
        listener = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET)
        listener.bind((host, 0))
        listener.listen(servers)
        self._lookout = Lookout(name, servers, self.deadline, listener, token)
        send(store, 'watch', name, listener.getsockname()[:2], token, store.num_workers, self.deadline)
        if not self._lookout.complete.wait(self.deadline):
            missing = some_of(self._lookout.missing())
            self._lookout.leave()
            give_up()  # others may end before this process gives back its store
            raise ServerError(
                f'All servers must connect to {host}, to be watched by {name}. Received: no connection of {missing} within '
                f'{self.deadline:g} s. Its standard error says why: install this gluon_optim there, in the Python that '
                'starts the server, and let servers connect to workers.')
        atexit.register(self._leave)
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        atexit.unregister(self._leave)
        self._lookout.forget()

    def _leave(self) -> None:
        """At the end of the script: wait for the other workers, as MXNet would, but in Python, where their deaths are noticed."""
        error = script_error()
        try:
            if error is None:
                nd.waitall()  # a server may fail in the last step
        except MXNetError as late:
            error = late
        if error is not None:
            self._lookout.end(f'{self._lookout.name} ended with {described(error)}')
        self._lookout.done()
        self._lookout.over.wait()


def watch(trainer: TrainerLike, deadline: float = 15) -> Watch:
    """End this process, with a message that names the reason, when another process of a distributed run is lost.

    For trainers with a store with servers, ``dist_sync`` or ``dist_async``; every worker makes the call, in the same place, before
    its first step. Without it a killed worker or server leaves all others waiting, silently and for ever. With it each worker and
    server ends with code 1 when

    - a worker, a server or the scheduler has died or cannot be reached,
    - a worker ended with an exception, after fewer steps than the others make (``dist_sync``), or without having made this call,
    - an update by an optimizer of this package failed on a server; workers that make another step in time raise it as ServerError.

    The reason is on the standard error of each, and in its log. Resume from the newest checkpoint: MXNet has no way to rejoin.

    Parameters
    ----------
    trainer : gluon.Trainer
        One that keeps its weights on servers, or adds up its gradients there. It is watched from now on, or where it makes its
        store by itself, as ``kvstore='dist_sync'`` lets it, from the first step on.
    deadline : float
        Seconds within which all have ended, the same on all workers. A killed process is noticed at once; the time is needed for
        the scheduler, for a machine that vanishes, and for processes that are stopped. Default: 15.

    Returns
    -------
    An object with the method ``stop()``, for a worker that leaves early on purpose. A script that ends needs none: it waits for
    the other workers, as MXNet does anyway.

    Raises ValueError where there are no servers, or for a ``deadline`` below 1; ServerError, then or in the first
    step, where a server does not have this package or cannot connect to this worker.

    >>> import gluon_optim as go
    >>> from mxnet import gluon
    >>> net = gluon.nn.Dense(1, in_units=2)
    >>> net.initialize()
    >>> trainer = gluon.Trainer(net.collect_params(), 'adamw')
    >>> go.watch(trainer, deadline=15)
    Traceback (most recent call last):
        ...
    ValueError: `trainer` must have a store with servers. Received: kvstore='device'. Create it with kvstore='dist_sync' ...
    """
    if not isinstance(trainer, gluon.Trainer):
        raise TypeError(f'`trainer` must be a gluon.Trainer. Received: {trainer!r:.100}.')
    deadline = Hyper('deadline', 15.0, '[1, inf)').check(deadline)
    given = trainer._kvstore_params['kvstore']
    store = trainer._kvstore if trainer._kv_initialized and trainer._kvstore is not None else given
    kind = str(getattr(store, 'type', store))
    if 'dist' not in kind:
        raise ValueError(f"`trainer` must have a store with servers. Received: kvstore={kind!r}. "
                         "Create it with kvstore='dist_sync' or 'dist_async', or leave the call out: there is nobody to watch.")
    if '_watch' in vars(trainer):
        raise ValueError('`trainer` must not be watched already. Received: a second call.')
    found = Watch(deadline)
    if not isinstance(store, str):
        found._start(store)
    vars(trainer)['_watch'] = found
    found._wrap(trainer)
    return found
