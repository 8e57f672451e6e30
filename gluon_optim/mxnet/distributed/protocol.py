"""What a worker and a server agree on: the keys under which servers say how they are, and how that is written.

A worker can only push and pull arrays, and send commands that are not answered. So each server has an array of its own, which it
fills with a text, and workers pull.
"""
import json
import os
from typing import Any, Dict, List, Optional

import numpy

__all__ = ['ServerError', 'bound', 'introduction', 'is_introduction', 'number_of_servers', 'precision_keys',
           'read_status', 'status_keys', 'status_size', 'write_status']

_MAGIC = b'gluon_optim/1 '      # at the beginning of each of these arrays, with the version of this protocol
_FIRST_KEY = 214000             # ps-lite computes key * 9973 in 32 bits: 215330 is the last that fits
_FIRST_OF_PRECISION = 213000
_SMALL, _LARGE = 32, 1024       # numbers of float32 in such an array


class ServerError(RuntimeError):
    """A parameter server cannot update the weights; the message has its own words."""


def status_keys(servers: int, named: bool) -> List[Any]:
    """One key for each server: ps-lite puts a small array under ``key`` on server ``key * 9973 % servers``.

    ``named``: where the keys are names, MXNet counts them in the order in which they are initialised.
    """
    return [f'gluon_optim.status.{i}' if named else _FIRST_KEY + i for i in range(servers)]


def precision_keys(servers: int, named: bool) -> List[Any]:
    """One more key for each server, for float64 numbers."""
    return [f'gluon_optim.precision.{i}' if named else _FIRST_OF_PRECISION + i for i in range(servers)]


def status_size(bound: int) -> int:
    """The number of float32 values that say how a server is. ValueError where arrays of ``bound`` values, which are cut in parts,
    are too small for it."""
    if bound <= _SMALL:
        raise ValueError(f"MXNET_KVSTORE_BIGARRAY_BOUND must be above {_SMALL}. Received: {bound}. MXNet's default is 1000000.")
    return min(bound - 1, _LARGE)


def introduction(size: int) -> Any:
    """The initial value, by which a server knows what the key is for."""
    return _padded(_MAGIC, size)


def is_introduction(values: Any) -> bool:
    data: bytes = values.tobytes()
    return data.startswith(_MAGIC) and not data[len(_MAGIC):].strip(b'\0')


def write_status(size: int, **status: Any) -> Any:
    """An array with ``status``; an ``error`` in it is cut to fit."""
    room = 4 * size - len(_MAGIC)
    text = json.dumps(status)
    while len(text) > room:
        status['error'] = status['error'][:-(len(text) - room)]
        text = json.dumps(status)
    return _padded(_MAGIC + text.encode('ascii'), size)


def read_status(values: Any) -> Optional[Dict[str, Any]]:
    """What `write_status` wrote; None where nobody has."""
    data: bytes = values.tobytes()
    text = data[len(_MAGIC):].rstrip(b'\0')
    if not data.startswith(_MAGIC) or not text:
        return None
    status: Dict[str, Any] = json.loads(text)
    return status


def _padded(data: bytes, size: int) -> Any:
    return numpy.frombuffer(data.ljust(4 * size, b'\0'), 'float32')


def bound() -> int:
    """The number of elements from which on arrays are cut in parts, one for each server."""
    return int(os.environ.get('MXNET_KVSTORE_BIGARRAY_BOUND') or 1000 * 1000)


def number_of_servers() -> int:
    return int(os.environ.get('DMLC_NUM_SERVER') or 1)
