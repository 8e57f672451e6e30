"""A file, opened once: the kind that its first bytes indicate is passed along to everything that reads it."""
import contextlib
import enum
import os
import re
import stat
import zipfile
from dataclasses import dataclass, field
from typing import BinaryIO, Iterator, Union

from .errors import UnreadableFile
from .progress import opened

__all__ = ['Kind', 'OpenFile', 'Path', 'kind_of', 'open_once']

Path = Union[str, 'os.PathLike[str]']

PARAMS_MAGIC = (0x112).to_bytes(8, 'little')
ZIP_MAGIC = b'PK\3\4', b'PK\5\6'
PICKLE = re.compile(rb'\x80[\2-\5]|\(*(dp\d|\}q)')
# the signature of our header is at a fixed place, and so is what follows it
CONTAINER_START = b'{"__metadata__":{"gluon_optim":"{\\"header_sha256\\":\\"'
CHECKPOINT_FORMAT = b'\\",\\"format\\":\\"gluon_optim.checkpoint\\"'
OPTAX_MEMBER = 'gluon_optim.json.npy'


class Kind(enum.Enum):
    """The kind of a file; the value is its name in reports."""

    CHECKPOINT = 'checkpoint'          # ours: a net and states
    STATES = 'states'                  # ours
    SAFETENSORS = 'safetensors'        # another project's
    MXNET_STATES = 'MXNet states'      # a pickle from Trainer.save_states or the like
    PARAMS = 'parameters'              # from mx.nd.save
    NPZ = 'npz'                        # from npx.savez or NumPy
    PYTORCH = 'PyTorch states'
    ONNX = 'ONNX model'
    OPTAX = 'optax states'
    UNKNOWN = 'unknown'

    @property
    def is_ours(self) -> bool:
        return self in (Kind.CHECKPOINT, Kind.STATES)

    @property
    def holds_parameters(self) -> bool:
        """Whether it is a file of named arrays and nothing else."""
        return self in (Kind.PARAMS, Kind.NPZ)


@dataclass(frozen=True)
class OpenFile:
    """A regular file, open for reading and positioned at its start."""

    path: str
    file: BinaryIO = field(repr=False)
    size: int
    kind: Kind
    head: bytes = field(repr=False)    # its first bytes


@contextlib.contextmanager
def open_once(source: Union[Path, OpenFile]) -> Iterator[OpenFile]:
    """``source`` itself if it is already open, else the file at that path until the block ends.

    Raises UnreadableFile for a folder, a pipe or a device, without waiting for it; OSError if it cannot be opened.
    """
    if isinstance(source, OpenFile):
        source.file.seek(0)
        yield source
        return
    path = os.fsdecode(source)
    _check_regular(path, os.stat(path))  # some devices do something when they are opened
    with opened(path) as file:
        status = os.fstat(file.fileno())
        _check_regular(path, status)
        head = file.read(256)
        kind = _kind(file, path, head, status.st_size)
        file.seek(0)
        yield OpenFile(path, file, status.st_size, kind, head)


def _check_regular(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = 'a folder' if stat.S_ISDIR(status.st_mode) else 'a pipe' if stat.S_ISFIFO(status.st_mode) else 'a device or a socket'
        raise UnreadableFile(f'Cannot read {path!r}: it must be a file. Received: {what}.')


def _kind(file: BinaryIO, path: str, head: bytes, size: int) -> Kind:
    if head.startswith(PARAMS_MAGIC):
        return Kind.PARAMS
    if head.startswith(ZIP_MAGIC):
        return _kind_of_zip(file)
    if head.startswith(CONTAINER_START, 8):
        format_at = 8 + len(CONTAINER_START) + 64
        return Kind.CHECKPOINT if head.startswith(CHECKPOINT_FORMAT, format_at) else Kind.STATES
    if head[8:9] == b'{' and int.from_bytes(head[:8], 'little') <= size - 8:
        return Kind.SAFETENSORS
    if PICKLE.match(head):
        return Kind.MXNET_STATES
    return Kind.ONNX if head and os.path.splitext(path)[1] == '.onnx' else Kind.UNKNOWN


def _kind_of_zip(file: BinaryIO) -> Kind:
    try:
        names = zipfile.ZipFile(file).namelist()
    except Exception:  # zipfile may raise anything for a damaged directory; the .npz reader reports what is wrong
        return Kind.NPZ
    if OPTAX_MEMBER in names:
        return Kind.OPTAX
    return Kind.PYTORCH if any(name.endswith('/data.pkl') for name in names) else Kind.NPZ


def kind_of(path: Path) -> Kind:
    """The kind of the file at ``path``. Raises what `open_once` raises."""
    with open_once(path) as file:
        return file.kind
