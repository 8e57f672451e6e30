"""A file, opened once: what its first bytes say it is goes with it to everyone who reads it."""
import contextlib
import enum
import os
import re
import stat
from dataclasses import dataclass, field
from typing import BinaryIO, Iterator, Optional, Union

from .errors import UnreadableFile
from .file_part import SMALL, Allowance, FilePart
from .progress import opened
from .zip_files import directory

__all__ = ['MAX_MEMBERS', 'TORCH_MAGIC', 'Kind', 'OpenFile', 'Path', 'kind_of', 'open_once']

Path = Union[str, 'os.PathLike[str]']

PARAMS_MAGIC = (0x112).to_bytes(8, 'little')
ZIP_MAGIC = b'PK\3\4', b'PK\5\6'
LFS_START = b'version https://git-lfs.github.com/spec/'
HTML = re.compile(rb'\s*<(!doctype html|html|head)', re.IGNORECASE)
PICKLE = re.compile(rb'\x80[\2-\5]|\(*(dp\d|\}q)')
# the signature of our header stands at a fixed place, and what follows it
CONTAINER_START = b'{"__metadata__":{"gluon_optim":"{\\"header_sha256\\":\\"'
CHECKPOINT_FORMAT = b'\\",\\"format\\":\\"gluon_optim.checkpoint'  # of one part or several
OPTAX_MEMBER = b'gluon_optim.json.npy'
TORCH_MAGIC = b'\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # of torch.save before it made zip files
MAX_MEMBERS = 100_000  # of a zip file


class Kind(enum.Enum):
    """What a file is; the value is what people and reports call it."""

    CHECKPOINT = 'checkpoint'          # ours: a net, and states
    STATES = 'states'                  # ours
    SAFETENSORS = 'safetensors'        # not ours: weights of a model, say
    MXNET_STATES = 'MXNet states'      # a pickle of Trainer.save_states and its like
    PARAMS = 'parameters'              # of mx.nd.save
    NPZ = 'npz'                        # of npx.savez, or of NumPy
    PYTORCH = 'PyTorch states'         # of torch.save; what is in it shows when it is read
    MODEL = 'weights'                  # a model's state_dict, in a file of PyTorch or safetensors
    LFS = 'Git LFS pointer'
    HTML = 'HTML page'
    ONNX = 'ONNX model'
    OPTAX = 'optax states'
    UNKNOWN = 'unknown'

    @property
    def is_ours(self) -> bool:
        return self in (Kind.CHECKPOINT, Kind.STATES)

    @property
    def holds_parameters(self) -> bool:
        """Whether it is a file of arrays under their names, and nothing else."""
        return self in (Kind.PARAMS, Kind.NPZ)


@dataclass(frozen=True)
class OpenFile:
    """A regular file that is open for reading, at its beginning."""

    path: str
    file: BinaryIO = field(repr=False)
    size: int
    kind: Kind
    head: bytes = field(repr=False)    # its first bytes

    def part(self, limit: Optional[int] = None) -> FilePart:
        """All of it, of which up to ``limit`` bytes of memory may be made: left out, twice its size, or 32 MiB if that is more."""
        return FilePart(self.file, repr(self.path), 0, self.size, Allowance(max(2 * self.size, SMALL) if limit is None else limit))


@contextlib.contextmanager
def open_once(source: Union[Path, OpenFile]) -> Iterator[OpenFile]:
    """``source`` itself if it is open already, else the file at that path until the block ends.

    Raises UnreadableFile for a folder, a pipe or a device, which nothing here waits for; OSError where it cannot be opened.
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
    if head.startswith(TORCH_MAGIC):
        return Kind.PYTORCH
    if head.startswith(ZIP_MAGIC):
        return _kind_of_zip(FilePart(file, repr(path), 0, size, Allowance(SMALL)))
    if head.startswith(CONTAINER_START, 8):
        format_at = 8 + len(CONTAINER_START) + 64
        return Kind.CHECKPOINT if head.startswith(CHECKPOINT_FORMAT, format_at) else Kind.STATES
    if head[8:9] == b'{' and int.from_bytes(head[:8], 'little') <= size - 8:
        return Kind.SAFETENSORS
    if PICKLE.match(head):
        return Kind.MXNET_STATES
    if head.startswith(LFS_START):
        return Kind.LFS
    if HTML.match(head):
        return Kind.HTML
    return Kind.ONNX if head and os.path.splitext(path)[1] == '.onnx' else Kind.UNKNOWN


def _kind_of_zip(source: FilePart) -> Kind:
    try:
        names = {member.name for member in directory(source, MAX_MEMBERS)[0]}
    except UnreadableFile:  # the reader of .npz says what is wrong with it
        return Kind.NPZ
    if OPTAX_MEMBER in names:
        return Kind.OPTAX
    return Kind.PYTORCH if any(name.endswith(b'/data.pkl') for name in names) else Kind.NPZ


def kind_of(path: Path) -> Kind:
    """What the file at ``path`` is. Raises as `open_once` does."""
    with open_once(path) as file:
        return file.kind
