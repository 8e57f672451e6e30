"""The optimizers as mathematics, one file each. `get` finds one by its registered name.

>>> from gluon_optim import rules
>>> rules.get('novograd').paper
'arXiv:1905.11286'
"""
from .base import Rule
from .catalog import list_optimizers, optimizer_info
from .registry import add, get, names, register

__all__ = ['Rule', 'add', 'get', 'list_optimizers', 'names', 'optimizer_info', 'register']
