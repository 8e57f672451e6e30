"""The command `gluon-optim`."""
from .main import main

__all__ = ['main']
