"""What runs on a parameter server: `receive` is called when a worker's command is unpickled there.

MXNet gives a server no way in but that: a command holds the pickle of an optimizer. This module is imported while the server
is still inside `import mxnet`, so it takes submodules only.
"""
import atexit
import base64
import logging
import pickle
import sys
import traceback
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import numpy
from mxnet.optimizer import optimizer as mx_optimizer

from ... import __version__
from . import held
from .lookout import Lookout, Peer, connect
from .protocol import is_introduction, write_status

__all__ = ['COMMANDS', 'Command', 'Server', 'receive']


class Command:
    """Unpickled, it calls ``COMMANDS[kind]`` with the server and ``arguments``."""

    def __init__(self, kind: str, *arguments: Any):
        self.kind, self.arguments = kind, arguments

    def __reduce__(self) -> Any:
        # a pickle of its own, in letters: what cannot be unpickled is then reported by `receive`, and MXNet sends texts only
        return receive, (self.kind, base64.b64encode(pickle.dumps(self.arguments)).decode('ascii'))


def receive(kind: str, arguments: str) -> 'Done':
    """Do what a command says, on the server that has just received it."""
    _server().execute(kind, arguments)
    return Done()


class Done:
    """In place of an optimizer: there is nothing left to do."""


def _server() -> 'Server':
    """The `Server` of this process, made for the first command. MXNet keeps its store only in the frames that receive."""
    frame: Any = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get('self')
        if type(owner).__name__ == 'KVStoreServer':
            store = owner.kvstore
            if not isinstance(vars(store).get('gluon_optim'), Server):
                store.gluon_optim = Server(store)
            server: Server = store.gluon_optim
            return server
        frame = frame.f_back
    raise RuntimeError('This process is not a parameter server: it receives no commands of workers.')


class Server:
    """The optimizer on a server, the states that it keeps there, and the first error.

    ``special``
        key -> function(pushed, stored), for keys that hold something else than a weight.
    ``weights``
        key -> what MXNet keeps there: the weight, or its float32 master.
    ``desk``
        What it does for checkpoints.
    ``lookout``
        Ends this process when another has died, where workers ask for it.
    """

    def __init__(self, store: Any):
        self.store = store
        self.updater: Any = None
        self.special: Dict[int, Callable[[Any, Any], None]] = {}
        self.weights: Dict[int, Any] = {}
        self.desk = held.Desk(self)
        self.error, self.error_step = '', 0
        self.lookout: Optional[Lookout] = None
        self._met: Dict[int, bool] = {}                     # the keys that have been pushed
        self._shared: Dict[int, Mapping[str, Any]] = {}     # key -> what the optimizer shares between parameters
        self._statuses: List[Any] = []                      # the arrays that workers pull
        self._changed: Dict[str, Tuple[int, int, bytes]] = {}   # attribute -> step, rank and value of the last change
        set_optimizer = store.set_optimizer

        def take(optimizer: Any) -> None:
            if not isinstance(optimizer, Done):  # one of MXNet's own, sent by MXNet
                self.updater = None
                set_optimizer(optimizer)
                if self.desk.is_open:
                    self.take_updates()
        store.set_optimizer = take
        logging.getLogger('numba').setLevel(logging.WARNING)  # MXNet has a server show whatever anybody logs

    # -- commands ---------------------------------------------------------------------------------------------------

    def execute(self, kind: str, arguments: str) -> None:
        if kind == 'optimizer':
            self.error, self.error_step = '', 0  # it was that of another
        try:
            COMMANDS[kind](self, *pickle.loads(base64.b64decode(arguments)))
        except Exception as error:
            self.fail(error)

    def set_optimizer(self, optimizer: mx_optimizer.Optimizer) -> None:
        """Update by ``optimizer`` from now on, with new states."""
        self.updater = mx_optimizer.Updater(optimizer)
        self._shared, self._changed = {}, {}
        self.store._set_updater(self.update)
        self.tell()

    def replace_optimizer(self, optimizer: Any) -> None:
        """Update by ``optimizer`` from now on, with the states that are here, for a checkpoint has its counts."""
        before, self.updater = self.updater, mx_optimizer.Updater(optimizer)
        self.updater.states, self.updater.states_synced = before.states, before.states_synced
        shared = getattr(optimizer, 'shared_state', dict)
        self._shared = {key: shared() for key in self.weights}

    def shared_state(self) -> Mapping[str, Any]:
        """What the optimizer shares between parameters, as that which has been updated most often has it."""
        counts = held.update_counts(self.updater.optimizer)
        latest = max(self._shared, key=lambda key: counts.get(key, 0), default=None)
        return {} if latest is None else self._shared[latest]

    def take_updates(self) -> None:
        """Let MXNet call `update`, also for an optimizer of its own."""
        if self.updater is None:
            self.updater = self.store._updater
        self.store._set_updater(self.update)

    def change(self, step: int, rank: int, attributes: Mapping[str, bytes], scheduler: Mapping[str, bytes]) -> None:
        """Set attributes of the optimizer, and of its scheduler, to the pickled values, for the updates from ``step`` on."""
        optimizer = self.updater.optimizer
        try:
            for owner, changes in ((optimizer, attributes), (optimizer.lr_scheduler, scheduler)):
                for name, value in changes.items():
                    self._check_agreement(f'{"" if owner is optimizer else "lr_scheduler."}{name}', step, rank, value)
                    vars(owner)[name] = pickle.loads(value)
            optimizer.hyperparameters()
        except Exception as error:
            self.fail(error, step)

    def watch(self, worker: str, address: Tuple[str, int], token: str, workers: int, deadline: float) -> None:
        """Connect to ``worker``, for each to notice the death of the other; there will be ``workers`` of them."""
        if self.lookout is None:
            self.lookout = Lookout(f'server {self.store.rank}', workers, deadline)
            atexit.register(self.lookout.leave)
        peer = Peer(worker, connect(address, deadline))
        peer.send(server=self.lookout.name, token=token)
        self.lookout.add(peer)
        if deadline != self.lookout.deadline:  # one would miss the other's beats
            self.lookout.end(f'all workers must pass the same `deadline` to watch. Received: {deadline:g} from {worker}, '
                             f'{self.lookout.deadline:g} before')

    def _check_agreement(self, name: str, step: int, rank: int, value: bytes) -> None:
        before = self._changed.get(name)
        if before is not None and before[0] == step and before[1] != rank and before[2] != value:
            one, other = pickle.loads(before[2]), pickle.loads(value)
            if getattr(one, '__dict__', one) != getattr(other, '__dict__', other):  # a scheduler is what it contains
                raise ValueError(f'All workers must make the same changes. Received for `{name}` in step {step}: {one!r:.60} from '
                                 f'rank {before[1]}, {other!r:.60} from rank {rank}.')
        self._changed[name] = step, rank, value

    # -- updates ----------------------------------------------------------------------------------------------------

    def update(self, key: int, pushed: Any, stored: Any) -> None:
        """What MXNet calls for each key, when all workers have pushed it (in dist_async: for each push)."""
        try:
            pushed.wait_to_read()  # MXNet adds up what it has received, and frees that when this returns
            if key not in self._met:
                self._meet(key, stored)
            if key in self.special:
                self.special[key](pushed, stored)
                return
            self.weights[key] = stored
            if self.desk.instead is not None:
                self.desk.instead(key, stored)
            elif not self.error:
                optimizer = self.updater.optimizer
                if key in self._shared:  # each parameter has its own: their order of arrival is nobody's
                    vars(optimizer).update(self._shared[key])
                self.updater(key, pushed, stored)
                self._shared[key] = getattr(optimizer, 'shared_state', dict)()
        except Exception as error:
            self.fail(error)

    def _meet(self, key: int, stored: Any) -> None:
        self._met[key] = True
        if stored.stype == 'default' and stored.dtype == numpy.float32 and is_introduction(stored[:8].asnumpy()):
            self.special[key] = lambda pushed, stored: self.tell(stored)

    # -- what workers are told --------------------------------------------------------------------------------------

    def fail(self, error: Exception, step: int = 0) -> None:
        """Keep the first error, update no more, and tell the workers; those that make ``step`` hear of it in the next one."""
        text = traceback.format_exc()
        sys.stderr.write(text)
        sys.stderr.flush()
        if not self.error:
            self.error, self.error_step = f'{type(error).__name__}: {error}\n{text}', step
        if self.updater is None:
            self.store._set_updater(self.update)  # else MXNet makes sums of gradients of the weights
        self.tell()
        if self.lookout is not None:
            self.lookout.fail(self.error)

    def tell(self, stored: Optional[Any] = None) -> None:
        """Write how this server is to where workers read it; ``stored`` is a new place."""
        if stored is not None:
            self._statuses.append(stored)
        for array in self._statuses:
            array._sync_copyfrom(write_status(array.size, version=__version__, server=self.store.rank, error=self.error,
                                              step=self.error_step))


#: kind -> what is called with the server and the arguments of the command
COMMANDS: Dict[str, Callable[..., None]] = {'optimizer': Server.set_optimizer, 'change': Server.change, 'watch': Server.watch,
                                          'ask': held.execute}
