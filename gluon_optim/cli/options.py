"""What the commands share: options for files, reading them, progress bars."""
import contextlib
import dataclasses
import os
import sys
from argparse import ArgumentParser, Namespace
from typing import Any, Callable, Collection, Dict, Iterator, Optional

from ..schema import one_of
from ..states.files import Kind, OpenFile, open_once
from ..states.inspection import Contents
from ..states.progress import watched
from ..transfer.names import Params
from ..transfer.programs import CLASS_TARGETS
from ..transfer.read import NAMELESS, READABLE, read, read_parts
from .paths import STANDARD, standard_input
from .text import escaped

__all__ = ['NAMELESS_FILES', 'add_command', 'add_common', 'check_used', 'opened', 'progress', 'read_contents',
           'read_all']

DELAY = 0.5  # seconds before a progress bar is worthwhile
NAMES = "a .params or .npz file, a JSON list, a text file with one per line, or a,b,c (a single name: 'a,')"
NAMELESS_FILES = f"names for a file that has none (MXNet's .states or PyTorch's), in the order of the trainer: {NAMES}"
# options that apply only to some kinds of files
SPECIAL = {'params': (NAMELESS, "files without names: MXNet's .states and PyTorch's optimizer states"),
           'optimizer': ((Kind.PYTORCH,), "PyTorch's optimizer states, which may not contain it"),
           'source': ((Kind.PYTORCH,), "PyTorch's optimizer states, which may not contain it"),
           'allow': ((Kind.MXNET_STATES,), "MXNet's .states, which name classes"),
           'part': ((Kind.CHECKPOINT,), 'checkpoints of several nets or trainers')}


def add_command(commands: Any, name: str, run: Callable[[Any], int], summary: str, params: str = NAMELESS_FILES
                ) -> ArgumentParser:
    """A command about one file."""
    command: ArgumentParser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + '.')
    command.add_argument('file', help=f"{READABLE}; '-' for standard input")
    add_common(command, params)
    command.set_defaults(run=run)
    return command


def add_common(command: ArgumentParser, params: str = NAMELESS_FILES) -> None:
    command.add_argument('--params', metavar='NAMES', help=params)
    command.add_argument('--allow', metavar='CLASS', action='append', default=[],
                         help="of MXNet's .states: the import path of a class of your own in it, a scheduler's say; its "
                         'attributes are read, nothing is imported. May be repeated')
    command.add_argument('--optimizer', metavar='NAME', help='for a PyTorch file that lacks it: the name in `gluon-optim list`')
    command.add_argument('--source', metavar='CLASS', choices=CLASS_TARGETS,
                         help=f'for a PyTorch file: the origin of the class that wrote it, one of {one_of(CLASS_TARGETS)}')
    command.add_argument('--part', metavar='NAME',
                         help='of a checkpoint of several nets or trainers: the name that the one to take was saved under')
    command.add_argument('--json', action='store_true', help='for machines')


def check_used(options: Namespace, *files: OpenFile, names: Collection[str] = tuple(SPECIAL)) -> None:
    """Refuse those of the options ``names`` that apply to none of the files: they would be ignored."""
    kinds = {file.kind for file in files}
    for name in names:
        users, what = SPECIAL[name]
        if getattr(options, name) not in (None, []) and not kinds & {*users, Kind.UNKNOWN}:
            received = ' and '.join(repr(file.path) for file in files)
            raise ValueError(f'--{name} is for {what}. Received: {received}. Leave it out.')


@contextlib.contextmanager
def opened(path: str) -> Iterator[OpenFile]:
    """The file at ``path``, opened once, with a progress bar over what is read from it. '-' is standard input."""
    if path == STANDARD:
        with standard_input() as copy, open_once(copy) as file:
            yield dataclasses.replace(file, path='standard input')
        return
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    with progress(f'reading {os.path.basename(path)}', size, 'read'), open_once(path) as file:
        yield file


def read_contents(file: OpenFile, options: Namespace, params: Optional[Params] = None) -> Contents:
    """`transfer.read.read` with the options of the command line."""
    naming = params.naming() if params is not None and file.kind in NAMELESS else None
    return read(file, naming, options.optimizer, options.source, getattr(options, 'allow_lossy', False), options.allow,
                options.part)


def read_all(file: OpenFile, options: Namespace, params: Optional[Params] = None) -> Dict[str, Contents]:
    """`read_contents` of each part of the file that ``options`` do not leave out; one without a name is called ''."""
    return read_parts(file) if file.kind.is_ours and options.part is None else {'': read_contents(file, options, params)}


@contextlib.contextmanager
def progress(what: str, size: int, way: str) -> Iterator[None]:
    """Shows a progress bar inside the block, on a terminal and if tqdm is installed; ``way`` is 'read' or 'write'."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield
        return
    what = escaped(what, getattr(sys.stderr, 'encoding', None) or 'utf-8')
    with tqdm(desc=what, total=size, unit='B', unit_scale=True, leave=False, delay=DELAY,
              disable=None if sys.stderr is not None and sys.stderr.isatty() else True) as bar, watched(bar.update, way):
        yield
