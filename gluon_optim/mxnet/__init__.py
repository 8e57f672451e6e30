"""Everything that needs MXNet."""
import os
import sys

from ..requirements import MXNET
from .distributed.lookout import watch_as_scheduler

if os.environ.get('DMLC_ROLE') == 'scheduler':  # this process then stays in `import mxnet` until the run has ended
    watch_as_scheduler()

try:
    import mxnet  # noqa: F401
except (ImportError, AttributeError, OSError, TypeError) as error:  # AttributeError: np.bool of a NumPy that is too new
    advice = 'It needs docstrings, which python -OO removes: use -O' if sys.flags.optimize > 1 else MXNET
    raise ImportError(f'gluon_optim.mxnet needs MXNet, and importing it failed: {str(error).rstrip(".")}. {advice}.') from error
