"""The rules of MXNet 1.9.1's own optimizers, with MXNet's conventions, one file each."""
from typing import Dict, Type

from .adadelta import AdaDelta
from .adagrad import AdaGrad
from .adam import Adam
from .adamax import Adamax
from .base import MXRule
from .dcasgd import DCASGD
from .ftml import FTML
from .ftrl import Ftrl
from .lamb import LAMB
from .lars import LARS
from .lbsgd import LBSGD
from .nadam import Nadam
from .nag import NAG
from .rmsprop import RMSProp
from .sgd import SGD
from .sgld import SGLD
from .signum import Signum

__all__ = ['DROP_INS']

DROP_INS: Dict[str, Type[MXRule]] = {rule.name: rule for rule in (
    AdaDelta, AdaGrad, Adam, Adamax, DCASGD, FTML, Ftrl, LAMB, LARS, LBSGD, NAG, Nadam, RMSProp, SGD, SGLD, Signum)}
