"""Everything that needs MXNet."""
import sys

from ..requirements import MXNET

try:
    import mxnet  # noqa: F401
except (ImportError, AttributeError, OSError, TypeError) as error:  # AttributeError: np.bool of a NumPy that is too new
    advice = 'It needs docstrings, which python -OO removes: use -O' if sys.flags.optimize > 1 else MXNET
    raise ImportError(f'gluon_optim.mxnet needs MXNet, and importing it failed: {str(error).rstrip(".")}. {advice}.') from error
