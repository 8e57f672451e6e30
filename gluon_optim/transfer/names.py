"""``--params`` in all its forms: names of parameters, and perhaps their arrays."""
import os
from typing import Any, List, Mapping, NamedTuple, Optional

import numpy

from ..states import json_text, mxnet_files
from ..states.files import Kind, OpenFile, open_once

__all__ = ['Params', 'read_params']

LONGEST = 1 << 24  # bytes of a list of names


class Params(NamedTuple):
    """The value of ``--params``: a list of names in order, or the arrays of a file by name; None and None if not given."""

    names: Optional[List[str]] = None
    arrays: Optional[Mapping[str, numpy.ndarray]] = None

    def naming(self) -> Any:
        """In the form for `read_states`. The arrays' values are not kept: naming parameters needs only shapes and types."""
        return self.names if self.arrays is None else {name: _outline(array) for name, array in self.arrays.items()}


def read_params(text: Optional[str]) -> Params:
    """``text`` is a .params or .npz file, a JSON list, a file with one name per line, or 'a,b,c'.

    >>> read_params('0.weight,').names
    ['0.weight']
    """
    if text is None:
        return Params()
    if not os.path.exists(text):
        if ',' not in text:
            raise FileNotFoundError('--params must be a file, or names with commas between them; end a single name with a comma. '
                                    f'Received: {text!r}, which does not exist.')
        return _listed(text, text.split(','))
    if not os.path.isfile(text):
        raise _no_names(text, 'a folder, a pipe or a device')
    with open_once(text) as file:
        if file.kind.holds_parameters:
            return Params(arrays=mxnet_files.read_params(file))
        return _listed(text, _lines(file))


def _outline(array: Any) -> numpy.ndarray:
    """An array of the same shape and type that uses no memory."""
    return numpy.broadcast_to(numpy.zeros((), array.dtype), array.shape)


def _lines(file: OpenFile) -> List[str]:
    if file.kind is Kind.MXNET_STATES:
        raise _no_names(file.path, 'a .states file of MXNet')
    if file.kind is not Kind.UNKNOWN:
        raise _no_names(file.path, 'a safetensors file' if file.kind.is_ours or file.kind is Kind.SAFETENSORS
                        else f'a file of kind {file.kind.value!r}')
    data = file.file.read(min(file.size, LONGEST) + 1)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = '\0'
    if '\0' in text or len(data) > LONGEST:
        raise _no_names(file.path, 'a file of an unknown kind')
    return _json_list(file.path, text) if text.lstrip().startswith('[') else text.splitlines()


def _json_list(path: str, text: str) -> List[str]:
    try:
        names = json_text.loads(text.encode(), 'it')
    except ValueError as error:
        raise _no_names(path, f'a file that looks like JSON but is invalid ({error})') from None
    if not all(isinstance(name, str) for name in names):
        raise _no_names(path, 'a list containing non-strings')
    return list(names)


def _listed(text: str, names: List[str]) -> Params:
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise _no_names(text, 'no name')
    return Params(names)


def _no_names(text: str, what: str) -> ValueError:
    return ValueError('--params must be a .params or .npz file, a JSON list of names, a text file with one name per line, or names '
                      f'with commas. Received: {text!r}, {what}.')
