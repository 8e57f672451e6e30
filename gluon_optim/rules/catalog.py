"""What there is: the optimizers, one file each, and what each one's declarations say about it."""
import fnmatch
import inspect
import re
import sys
from typing import Any, Dict, List, NamedTuple, Tuple, Type

from ..schema import Hyper, Slot
from . import mx, registry
from .adabelief import AdaBelief
from .adadelta_torch import AdadeltaTorch
from .adagrad_torch import AdagradTorch
from .adam_torch import AdamTorch
from .adamax_torch import AdamaxTorch
from .adamw import AdamW
from .asgd import ASGD
from .base import BASE_HYPERS, Rule
from .lans import LANS
from .larc import LARC
from .nadam_torch import NAdamTorch
from .noise_adaptive_sgd import NoiseAdaptiveSGD
from .novograd import NovoGrad
from .radam import RAdam
from .rmsprop_torch import RMSpropTorch
from .rprop import Rprop
from .runtimes import where_it_runs
from .sgd_ema import SGDEMA
from .sgd_torch import SGDTorch
from .sngd import SNGD

__all__ = ['OptimizerInfo', 'formula', 'list_optimizers', 'optimizer_info']

registry.RULES.update((rule.name, rule) for rule in (
    AdaBelief, AdadeltaTorch, AdagradTorch, AdamTorch, AdamaxTorch, AdamW, ASGD, LANS, LARC, NAdamTorch, NoiseAdaptiveSGD,
    NovoGrad, RAdam, RMSpropTorch, Rprop, SGDEMA, SGDTorch, SNGD))
registry.DROP_INS.update(mx.DROP_INS)


class OptimizerInfo(NamedTuple):
    """What is known of one optimizer, read off its rule.

    ``runtimes`` are where it runs; ``equals`` the implementations that compute the same; ``exceptions`` what a user might
    expect and does not hold, with the reason.
    """

    name: str
    summary: str
    paper: str
    formula: str
    hypers: Tuple[Hyper, ...]
    slots: Tuple[Slot, ...]
    runtimes: Tuple[str, ...]
    equals: Tuple[str, ...]
    exceptions: Dict[str, str]

    def asdict(self) -> Dict[str, Any]:
        """Plain dictionaries and lists, for JSON."""
        hypers = [dict(name=h.name, default=h.default, allowed=h.allowed, doc=h.doc) for h in self.hypers]
        return dict(self._asdict(), hypers=hypers, slots=[slot._asdict() for slot in self.slots])

    @property
    def memory(self) -> str:
        """Bytes of state per weight, with the defaults: float32 slots; masters of float16 weights not counted."""
        per_weight = 4 * sum(slot.like == 'weight' for slot in self.slots)
        per_tensor = 4 * sum(slot.like == 'scalar' for slot in self.slots)
        return f'{per_weight} bytes per weight' + (f' and {per_tensor} per parameter' if per_tensor else '')


def list_optimizers(pattern: str = '*') -> List[str]:
    """Names of optimizers that match a shell pattern.

    Raises nothing: the list is empty where no name matches.

    >>> list_optimizers('*novo*')
    ['novograd']
    """
    return fnmatch.filter(registry.names(drop_ins=True), pattern.lower())


def optimizer_info(name: str) -> OptimizerInfo:
    """All that is declared about an optimizer; ValueError for an unknown name.

    Raises TypeError for a name that is not a string.

    >>> optimizer_info('novograd').paper
    'arXiv:1905.11286'
    """
    rule = registry.get(name)
    return OptimizerInfo(rule.name, rule.summary, rule.paper, formula(rule), rule.hypers + BASE_HYPERS,
                         rule.slots(rule.hyperparameters()), where_it_runs(rule), rule.peers, dict(rule.exceptions))


def formula(rule: Type[Rule]) -> str:
    """The indented blocks of a rule's docstring."""
    if rule.__doc__ is None and sys.flags.optimize > 1:
        return '(not known here: python -OO removes docstrings)'
    body = inspect.cleandoc(rule.__doc__ or '').partition('\n')[2].strip('\n')
    if body.startswith('    '):  # else nothing but the formula follows the first line: its indentation went with the docstring's
        body = '\n'.join(line[4:] for line in body.splitlines() if line.startswith('    ') or not line)
    return re.sub(r'\n{2,}', '\n\n', body).strip()
