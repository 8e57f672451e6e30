"""What we use of MXNet's classes, which carry no types: the attributes and methods that another version must have too."""
from typing import Any, Callable, Dict, List, Mapping, Optional, Protocol, Sequence, Tuple

__all__ = ['BlockLike', 'KVStoreLike', 'ParameterLike', 'TrainerLike', 'UpdaterLike']


class ParameterLike(Protocol):
    """A ``gluon.Parameter``."""

    name: str
    shape: Tuple[int, ...]
    dtype: Any                              # as NumPy takes it
    grad_req: str
    lr_mult: float
    wd_mult: float
    _stype: str                             # 'default' where it is dense
    _deferred_init: Any                     # (), or what initialises it when its shape is known
    _data: Optional[List[Any]]              # of each device; None before it is initialised
    _trainer: Optional['TrainerLike']       # the one that updates it

    def _check_and_get(self, arrays: Any, context: Any) -> Any: ...
    def list_ctx(self) -> List[Any]: ...    # in 1.x
    def list_device(self) -> List[Any]: ...  # in 2.x
    def list_data(self) -> List[Any]: ...
    def list_grad(self) -> List[Any]: ...
    def _load_init(self, data: Any, ctx: Any) -> None: ...
    def _finish_deferred_init(self) -> None: ...


class BlockLike(Protocol):
    """A ``gluon.Block``."""

    def collect_params(self) -> Mapping[str, ParameterLike]: ...


class UpdaterLike(Protocol):
    """An ``mx.optimizer.Updater``: what holds the states, by index of the parameter."""

    states: Dict[Any, Any]
    states_synced: Dict[Any, bool]


class KVStoreLike(Protocol):
    """An ``mx.kv.KVStore``."""

    type: str
    _updater: UpdaterLike                   # None where the states are on servers

    def _set_updater(self, updater: Any) -> None: ...
    def push(self, key: Any, value: Any) -> None: ...


class TrainerLike(Protocol):
    """A ``gluon.Trainer``."""

    _params: List[ParameterLike]
    _params_to_init: List[ParameterLike]    # not sent to the kvstore yet
    _optimizer: Any
    _scale: float                           # what gradients are multiplied by, besides 1/batch_size
    _contexts: Sequence[Any]                # in 1.x
    _devices: Sequence[Any]                 # in 2.x
    _updaters: List[UpdaterLike]            # one for each device
    _kvstore: KVStoreLike                   # None before the first step, and where none is needed
    _kvstore_params: Dict[str, Any]         # as the constructor got it
    _kv_initialized: bool
    _update_on_kvstore: bool
    _distributed: bool
    _init_kvstore: Callable[[], None]
    _allreduce_grads: Callable[[], None]
    _check_and_rescale_grad: Callable[[float], None]    # sets rescale_grad for an update
    _reset_kvstore: Callable[..., None]     # that of the class takes the trainer

    def _init_params(self) -> None: ...
