"""What runs on a parameter server: MXNet's own process, to which a pickle brings this module."""
import base64
import json
import logging
import sys
import traceback
from typing import Any, Callable, Dict, Optional

# submodules, not attributes of `mxnet`: a parameter server imports this file while `mxnet` is still being imported
from mxnet.optimizer import optimizer as mx_optimizer

from .pages import Page

__all__ = ['ServerUpdater', 'call', 'message']


def message(arguments: str, payload: str) -> str:
    """The pickle, of protocol 0, that calls `call` on a server with two texts without a backslash or a line end."""
    return f'c{__name__}\ncall\n(V{arguments}\nV{payload}\ntR.'


def call(arguments: str, payload: str) -> None:
    """Execute a command of `Channel.tell`."""
    updater = install()
    about = json.loads(base64.b64decode(arguments))
    name, number, server = about.pop('call'), about.pop('number', None), about.pop('server', None)
    if server is not None and server != updater.rank:
        return
    if name == 'more':
        updater.page.more(number, **about)
        return
    answer = b''
    try:
        from . import held
        answer = getattr(held, name)(updater, payload=base64.b64decode(payload), **about)
    except Exception:
        traceback.print_exc()
        updater.failure = updater.failure or traceback.format_exc()
    if number is not None:
        updater.page.answer(number, (updater.failure or '').encode() or answer, bool(updater.failure))
        updater.failure = None


class ServerUpdater:
    """What MXNet calls with each sum of gradients."""

    def __init__(self, server: Any):
        self.store = server.kvstore
        self.rank = int(self.store.rank)
        self.page = Page()
        self.weights: Dict[int, Any] = {}       # as MXNet keeps them, by key; float32 where it has masters
        self.special: Dict[int, Callable[[int, Any, Any], None]] = {}
        self.instead: Optional[Callable[[int, Any, Any], None]] = None   # of an update
        self.failure: Optional[str] = None
        self.staged: Dict[int, Any] = {}
        self.posts: Dict[int, str] = {}
        self.board: Any = None                  # as MXNet keeps it, on the server that has it
        self._updater: Any = server.kvstore._updater

    @property
    def optimizer(self) -> Any:
        return self._updater.optimizer if self._updater else None

    @property
    def states(self) -> Dict[int, Any]:
        return self._updater.states if self._updater else {}

    def set_optimizer(self, optimizer: Any) -> None:
        if optimizer is None:
            return
        updater = mx_optimizer.get_updater(optimizer)
        if self._updater:
            updater.states, updater.states_synced = self._updater.states, self._updater.states_synced
        self._updater = updater

    def set_state(self, key: int, state: Any) -> None:
        self._updater.states[key], self._updater.states_synced[key] = state, True

    def __call__(self, key: int, pushed: Any, stored: Any) -> None:
        if key in self.special:
            self.special[key](key, pushed, stored)
            return
        self.weights[key] = stored
        if self.instead:
            self.instead(key, pushed, stored)
        else:
            self._updater(key, pushed, stored)


def install() -> ServerUpdater:
    frame: Any = sys._getframe()
    while type(frame.f_locals.get('self')).__name__ != 'KVStoreServer':
        frame = frame.f_back
    server = frame.f_locals['self']
    updater = getattr(server.kvstore, '_of_gluon_optim', None)
    if updater is None:
        logging.getLogger('numba').setLevel(logging.WARNING)  # MXNet shows everything that anybody logs on a server
        updater = server.kvstore._of_gluon_optim = ServerUpdater(server)
        server.kvstore._set_updater(updater)
        server.kvstore.set_optimizer = updater.set_optimizer
    return updater
