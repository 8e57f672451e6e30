"""The list of optimizers, and what each one's declarations say about it."""
import fnmatch
import inspect
import re
import sys
from typing import Any, Dict, List, NamedTuple, Tuple, Type

from ..display import Rows, table, text, without_none
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
from .psgld import PSGLD
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
registry.SAMPLERS[PSGLD.name] = PSGLD


class OptimizerInfo(NamedTuple):
    """What is known about one optimizer, taken from its rule.

    ``runtimes`` lists where it runs; ``equals`` the implementations that compute the same; ``exceptions`` what a user might
    expect but does not hold, with the reason.
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

    def __repr__(self) -> str:
        return text(f'<OptimizerInfo: {self.name}, {self.summary}>', self._rows())

    def _repr_html_(self) -> str:
        return table(f'{self.name}: {self.summary}', self._rows())

    def _rows(self) -> Rows:
        formula = [('' if k else 'formula', line.strip()) for k, line in enumerate(self.formula.splitlines()[:8])]
        arguments = ', '.join(f'{h.name} {h.default!r}' for h in self.hypers)
        return without_none([('paper', self.paper), *formula, ('arguments', arguments),
                             ('slots', ', '.join(slot.name for slot in self.slots)), ('runs on', ', '.join(self.runtimes)),
                             ('equals', ', '.join(self.equals)), ('exceptions', ', '.join(self.exceptions))])

    def asdict(self) -> Dict[str, Any]:
        """Plain dictionaries and lists, for JSON."""
        hypers = [dict(name=h.name, default=h.default, allowed=h.allowed, doc=h.doc) for h in self.hypers]
        return dict(self._asdict(), hypers=hypers, slots=[slot._asdict() for slot in self.slots])

    @property
    def memory(self) -> str:
        """Bytes of state per weight with the default arguments and float32 slots, not counting masters of float16 weights."""
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
    """Everything declared about an optimizer; ValueError for an unknown name.

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
    if body.startswith('    '):  # otherwise only the formula follows the first line, and cleandoc removed its indentation
        body = '\n'.join(line[4:] for line in body.splitlines() if line.startswith('    ') or not line)
    return re.sub(r'\n{2,}', '\n\n', body).strip()
