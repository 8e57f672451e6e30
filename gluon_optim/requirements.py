"""What is missing and how to install it, in the words of all messages. A release on a package index changes `install`."""

__all__ = ['MXNET', 'install', 'missing']

MXNET = 'MXNet 1.9.1 needs Python 3.8 to 3.11 and NumPy below 1.24: pip install mxnet==1.9.1 "numpy<1.24"'


def install(extra: str) -> str:
    """How to install the packages of an extra that setup.cfg declares."""
    return f"In a checkout of gluon_optim, pip install '.[{extra}]'"


def missing(what: str, packages: str, extra: str, error: Exception) -> ImportError:
    """The error for ``what``, which needs ``packages``. The cause, ``error``, is shown: it may be a package that these need."""
    return ImportError(f'{what} needs {packages}, and importing failed: {str(error).rstrip(".")}. {install(extra)}')
