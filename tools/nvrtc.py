"""NVIDIA's run-time compiler by ctypes; it needs no GPU. PyTorch's CUDA builds bring it, and so does
`pip install nvidia-cuda-nvrtc-cu12`."""
import ctypes
import functools
import importlib.util
from pathlib import Path

__all__ = ['compile_ptx', 'library']


@functools.lru_cache(maxsize=None)
def library():
    """The compiler, or None where it is not installed."""
    for package in ('nvidia.cuda_nvrtc', 'nvidia.cu13'):   # the wheels of CUDA 12 and 13
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:   # there is no `nvidia` at all
            return None
        for folder in found.submodule_search_locations if found else ():
            for path in sorted(Path(folder).rglob('libnvrtc.so.*')):
                return ctypes.CDLL(str(path))
    return None


def compile_ptx(source, options):
    """PTX for a GPU that ``options`` names, or a cubin for ``--gpu-architecture=sm_XX``. ValueError with the compiler's log."""
    nvrtc, program = library(), ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b'source.cu', 0, None, None))
    try:
        encoded = [option.encode() for option in options]
        failed = nvrtc.nvrtcCompileProgram(program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded))
        if failed:
            raise ValueError(_text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode())
        if any('=sm_' in option for option in options):
            return _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
        return _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size_of, get, program):
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(get(program, text))
    return text.raw


def _check(result):
    if result:
        raise OSError(f'NVRTC failed: error {result}.')
