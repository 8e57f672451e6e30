"""Everything that needs MXNet."""
from ..requirements import MXNET

try:
    import mxnet  # noqa: F401
except (ImportError, AttributeError, OSError) as error:  # AttributeError: np.bool of a NumPy that is too new
    raise ImportError(f'gluon_optim.mxnet needs MXNet, and importing it failed: {error}. {MXNET}.') from error
