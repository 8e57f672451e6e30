"""The rules of MXNet 1.9.1's own optimizers, with MXNet's conventions, one file each."""
from typing import Dict, Type

from .adam import Adam
from .base import MXRule
from .sgd import SGD

__all__ = ['DROP_INS']

DROP_INS: Dict[str, Type[MXRule]] = {rule.name: rule for rule in (Adam, SGD)}
