"""The state of an optimizer that draws its own noise: the key, and the stream of each parameter."""
import hashlib
import itertools
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy

# submodules, not attributes of `mxnet`: a parameter server imports this file while `mxnet` is still being imported
from mxnet import ndarray as nd

from ..rules.noise import SEEDS, STREAMS
from ..rules.runtimes import draws_itself
from ..schema import Values, check_int
from ..states.model import ParameterInfo
from .executors import Counter
from .optimizer import Runner

__all__ = ['Sampler']

_STREAM = 'stream:'   # of a parameter, in files


class Sampler(Runner):
    """Base class of the optimizers of rules that draw noise.

    With ``noise='philox'`` the counter is the number of a parameter's update, its stream, which is its index here unless states
    from elsewhere were loaded, and the element. So copies of a parameter get the same noise, wherever they are updated.

    Parameters
    ----------
    seed : int, optional
        The key, 0 <= seed < 2**53. Without it, it is drawn from MXNet's generator when the first state is made, so that
        `mx.random.seed` decides. It is part of the state: what is loaded replaces it.
    """

    streams: Mapping[Any, int] = {}

    def __init__(self, *args: Any, seed: Optional[int] = None, **kwargs: Any):
        self.seed = seed
        super().__init__(*args, **kwargs)
        if seed is not None and not draws_itself(self.rule, self.hyperparameters()):
            raise ValueError(f"`seed` is that of noise='philox'. Received: seed={seed!r} for {self.rule.name}, which draws from "
                             "MXNet's generator. Use mx.random.seed, or pass noise='philox'.")

    @property
    def seed(self) -> Optional[int]:
        """The key; None until it is drawn. It can be set."""
        found: Optional[int] = self.__dict__.get('seed')
        return found

    @seed.setter
    def seed(self, seed: Any) -> None:
        self.__dict__['seed'] = None if seed is None else check_seed(seed)

    def __getstate__(self) -> Dict[str, Any]:
        state = super().__getstate__()
        unused = ('seed', 'streams') if state.get('noise') != 'philox' else ()
        return {name: value for name, value in state.items() if name not in unused}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        older = {name: value for name, value in self.rule.older.items() if name not in state}
        super().__setstate__({**state, **older, '_names': (*state['_names'], *older)} if older else state)

    def create_state(self, index: Any, weight: Any) -> Any:
        state = super().create_state(index, weight)
        if draws_itself(self.rule, self.hyperparameters()):
            self._start([index])
        return state

    def _start(self, indices: Sequence[Any]) -> None:
        """See to the seed, and to a stream for each parameter that no other one has."""
        if self.seed is None:
            high, low = nd.random.randint(0, 2 ** 26, shape=2, dtype='int32').asnumpy().tolist()
            self.seed = high << 26 | low
        new = [index for index in indices if index not in self.streams]
        if new:
            taken = set(self.streams.values())
            streams = dict(self.streams)
            for index in new:
                streams[index] = next(stream for stream in _streams_of(index) if stream not in taken)
                taken.add(streams[index])
            self.streams = streams

    def _noise(self, h: Values, indices: Sequence[Any]) -> Optional[List[Counter]]:
        if not draws_itself(self.rule, h):
            return None
        self._start(indices)
        counts, begin = self._index_update_count, self.begin_num_update
        return [(int(self.seed or 0), self.streams[index], counts[index] - begin) for index in indices]

    def shared_state(self) -> Dict[str, Any]:
        return dict(super().shared_state(), seed=self.seed, streams=self.streams)

    def variables(self, names: Mapping[Any, str]) -> Dict[str, numpy.ndarray]:
        if self.seed is None or not draws_itself(self.rule, self.hyperparameters()):
            return {}
        streams = {_STREAM + names[index]: numpy.array(stream, 'int64') for index, stream in self.streams.items() if index in names}
        return {'seed': numpy.array(self.seed, 'int64'), **streams}

    def read_variables(self, variables: Mapping[str, numpy.ndarray], pairs: Mapping[Any, ParameterInfo]) -> Dict[str, Any]:
        self._check_variables([_STREAM[:-1] if name.startswith(_STREAM) else name for name in variables], ('seed', 'stream'))
        for name, value in variables.items():
            if value.shape != () or value.dtype.kind not in 'iu' or not 0 <= value < (SEEDS if name == 'seed' else STREAMS):
                raise ValueError(f'The variable {name!r} of {self.rule.name} must be one whole number. Received from the file: '
                                 f'{value.dtype}{list(value.shape)} {value.ravel()[:4].tolist()}. Restore another file.')
        if 'seed' not in variables:
            return {}   # of a file in which MXNet drew
        streams = {index: int(variables[_STREAM + info.name]) for index, info in pairs.items() if _STREAM + info.name in variables}
        return {'seed': int(variables['seed']), 'streams': streams}


def check_seed(seed: Any) -> int:
    """``seed`` as a Python number; ValueError for one that is not a whole number below 2**53."""
    if check_int('seed', seed) >= SEEDS:
        raise ValueError(f'`seed` must be below 2**53. Received: seed={seed!r}.')
    return int(seed)


def _streams_of(index: Any) -> Any:
    """Streams for the parameter of that index, the best one first."""
    first = index if isinstance(index, int) else int.from_bytes(hashlib.sha256(str(index).encode()).digest()[:4], 'little')
    return (stream % STREAMS for stream in itertools.count(first))
