"""Where results go, and that no output is an input."""
import os
from typing import Mapping, Optional

from ..transfer.refused import Refused
from ..transfer.targets import PROGRAMS

__all__ = ['check_absent', 'keep_apart', 'output_for']


def output_for(path: str, to: str, mxnet_version: Optional[int]) -> str:
    """Where the result goes if nothing is said: beside the input, with the ending of its kind."""
    ending = '.states' if to == 'mxnet' and mxnet_version else PROGRAMS[to].ending
    root = os.path.splitext(path)[0]
    return check_absent(f'{root}.mxnet{mxnet_version}{ending}' if ending == '.states' else root + ending)


def check_absent(output: str) -> str:
    """Return ``output``; Refused where a file has that name."""
    if os.path.exists(output):
        raise Refused(f'{output!r} exists. Give the file to be written as --output.')
    return output


def keep_apart(written: Mapping[str, Optional[str]], read: Mapping[str, Optional[str]]) -> None:
    """Refuse where a file that is to be written, by option, is one that is read, or two are the same: one would be lost."""
    others = dict(read)
    for option, path in written.items():
        for other, its in others.items():
            if path and its and _same_file(path, its):
                raise Refused(f'{option} must be another file than {other}, which would be lost. Received: {path!r}.')
        others[option] = path


def _same_file(a: str, b: str) -> bool:
    both = os.path.exists(a) and os.path.exists(b)
    return os.path.samefile(a, b) if both else os.path.realpath(a) == os.path.realpath(b)
