"""Generated source, as a module: kept in a file named by its content, so that what a compiler makes of it can be kept too."""
import contextlib
import functools
import gc
import hashlib
import importlib.util
import linecache
import logging
import os
import pathlib
import sys
import tempfile
import threading
from types import ModuleType
from typing import Iterator

__all__ = ['cache_folder', 'load']

log = logging.getLogger('gluon_optim')

PATIENCE = 2.0  # seconds of silence before a line says what is being done


def cache_folder() -> pathlib.Path:
    """Where generated kernels are kept: GLUON_OPTIM_CACHE, else gluon_optim in the user's cache folder."""
    own = os.environ.get('GLUON_OPTIM_CACHE')
    if own:
        return pathlib.Path(own)
    return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'gluon_optim'


def load(rule: str, text: str, runtime: pathlib.Path) -> ModuleType:
    """Import the generated source of a kernel for ``rule``, which calls functions of the file ``runtime``.

    ``{cache}`` in the text becomes True where the source could be written to a file, so that a compiler finds a place beside
    it, else False.
    """
    name = f'kernel_{rule}_{hashlib.sha256(runtime.read_bytes() + text.encode()).hexdigest()[:16]}'
    path = cache_folder() / f'{name}.py'
    try:
        if not path.exists():
            _write(path, text.replace('{cache}', 'True'))
        with _compiling(f'Compiling the kernel of {rule}, once: it is kept in {path.parent} ...'):
            return _execute(name, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: numba found no place to write
        _say_once(f'Compiled kernels are not kept for the next process: {error}. Set GLUON_OPTIM_CACHE to a writable folder.')
    module, text = ModuleType(name), text.replace('{cache}', 'False')
    linecache.cache[f'<{name}>'] = len(text), None, text.splitlines(True), f'<{name}>'  # Triton reads its source again
    with _compiling(f'Compiling the kernel of {rule} ...'):
        exec(compile(text, f'<{name}>', 'exec'), module.__dict__)
    return module


@contextlib.contextmanager
def _compiling(message: str) -> Iterator[None]:
    """Log ``message`` as soon as the block has taken `PATIENCE` seconds, so that a long compilation is not taken for a hang: as a
    warning, because Python shows nothing less where logging is not set up. Garbage is not collected meanwhile: a compiler makes
    so many objects that Python would look through all those of the process, which takes a tenth of the time or more."""
    timer = threading.Timer(PATIENCE, log.warning, (message,))
    timer.daemon = True  # never what keeps a process alive
    collects = gc.isenabled()
    timer.start()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        timer.cancel()


def _execute(name: str, path: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[name] = module  # first: numba writes the module's name into its cache, and looks it up by name again
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix='.tmp')
    with os.fdopen(handle, 'w') as file:
        file.write(text)
    os.replace(temporary, path)  # several processes may write at once, but all write the same content


@functools.lru_cache(maxsize=None)
def _say_once(message: str) -> None:
    log.warning(message)
