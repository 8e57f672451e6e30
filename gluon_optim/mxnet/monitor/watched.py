"""Which parameters a monitor looks at, and what it reads of them: one copy to the host for all figures at once."""
import fnmatch
from typing import Any, Dict, List, NamedTuple, Optional, Protocol, Sequence

import numpy
from mxnet import ndarray as nd

from ...schema import some_of
from ..checkpoint import parameters
from ..trainer import check_trainer
from ..typing import BlockLike, ParameterLike, TrainerLike

__all__ = ['ScalarWriter', 'Watched', 'check_fresh', 'check_writer', 'fetched', 'named', 'number', 'plain', 'square',
           'update_number', 'watched']


class ScalarWriter(Protocol):
    """What writes TensorBoard's event files: a ``SummaryWriter`` of tensorboardX, torch.utils.tensorboard or mxboard."""

    def add_scalar(self, __tag: str, __value: float, __step: int) -> Any: ...


class Watched(NamedTuple):
    """A parameter, and its place in the trainer."""

    place: int
    parameter: ParameterLike


def named(trainer: TrainerLike, net: Optional[BlockLike]) -> Dict[str, Watched]:
    """All parameters of the trainer by name, in the order of the net, else in the trainer's."""
    check_trainer(trainer)
    places = {id(parameter): place for place, parameter in enumerate(trainer._params)}
    return {name: Watched(places[id(parameter)], parameter) for name, parameter in parameters(net, trainer).items()
            if id(parameter) in places}


def watched(trainer: TrainerLike, net: Optional[BlockLike], params: Optional[str]) -> Dict[str, Watched]:
    """Those of them that are not frozen, and have names that match the pattern ``params``."""
    if params is not None and not isinstance(params, str):
        raise TypeError(f"`params` must be a pattern of names. Received: {params!r}. Pass a string, such as '*weight'.")
    trained = {name: each for name, each in named(trainer, net).items() if each.parameter.grad_req != 'null'}
    if not trained:
        raise ValueError("A monitor must have parameters that are trained. Received: a trainer without any (grad_req='null').")
    chosen = {name: each for name, each in trained.items() if params is None or fnmatch.fnmatchcase(name, params)}
    if not chosen:
        raise ValueError(f'`params` must match names of parameters that are trained. Received: params={params!r}, which matches '
                         f'none of {some_of(trained)}.')
    sparse = [name for name, each in chosen.items() if each.parameter._stype != 'default']
    if sparse:
        raise ValueError(f'Parameters must be dense. Received: {some_of(sparse)}, stored as row_sparse. Leave them out by '
                         'params=, a pattern of names.')
    return chosen


def check_fresh(chosen: Dict[str, Watched]) -> None:
    """Raise ValueError where a parameter has no gradient since the last step."""
    stale = [name for name, each in chosen.items()
             if each.parameter._data is None or not all(data._fresh_grad for data in each.parameter.list_data())]
    if stale:
        raise ValueError(f'Gradients must be new. Received: {some_of(stale)}, of which backward() has made none since the last '
                         'step. Call this after backward() and before the step; leave out parameters that the loss does not use '
                         'by params=, a pattern of names.')


def check_writer(writer: Any) -> None:
    if writer is not None and not callable(getattr(writer, 'add_scalar', None)):
        raise TypeError(f'`writer` must have add_scalar(tag, value, step). Received: {type(writer).__name__}. Pass a SummaryWriter '
                        'of tensorboardX, torch.utils.tensorboard or mxboard.')


def update_number(trainer: TrainerLike) -> int:
    """How many updates there were. Raises ValueError where they are counted elsewhere."""
    store = trainer._kvstore
    if trainer._kv_initialized and trainer._update_on_kvstore and store._updater is None:
        raise ValueError(f'The updates must be made in this process. Received: kvstore {store.type!r}, which makes them on its '
                         'servers. Create the trainer with update_on_kvstore=False.')
    return int(trainer._optimizer.num_update)


def plain(array: Any) -> Any:
    """``array`` as a dense ``mx.nd.NDArray`` of at least single precision; not a copy where it is one."""
    array = array.as_nd_ndarray()
    if array.stype != 'default':
        array = array.tostype('default')
    return array if array.dtype in (numpy.float32, numpy.float64) else array.astype('float32')


def square(array: Any) -> Any:
    """The sum of the squares of the elements, in float64, as an array of shape (1,) on the same device."""
    wide = array.reshape(-1).astype('float64')
    return nd.dot(wide, wide).reshape(1)


def fetched(scalars: Sequence[Any]) -> List[float]:
    """The values of arrays of shape (1,), all on one device: the only place where a monitor waits for it."""
    values: List[float] = nd.concat(*scalars, dim=0).asnumpy().tolist()
    return values


def number(value: Optional[float], unknown: str) -> str:
    """A figure for a table."""
    return unknown if value is None else f'{value:.6g}'
