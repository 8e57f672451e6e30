"""Optimizer classes of other projects that compute what a rule computes: one `Foreign` each, in `FOREIGN`.

Each one declares the names of the hyper-parameters, the state it keeps, and the conditions under which it computes the
same. The converters, their reports, the lists of what is refused and the table in docs/CONVERSIONS.md are all derived from
these declarations.
"""
import math
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple, Type, Union

import numpy

from ..rules import Rule
from ..rules.base import BASE_HYPERS
from ..rules.mx.base import VARIANT
from ..rules.runtimes import mirrored
from ..schema import Slot, Values, one_of

__all__ = ['APPROXIMATE', 'CONSTANT_RATE', 'EXACT', 'FOREIGN', 'VANISHED', 'Computed', 'Foreign', 'Label', 'Need', 'find',
           'mirrored', 'reason']

VANISHED = 1e-16                                   # below this, 1 - x rounds to 1
EXACT = 'exact'                                    # up to rounding
CONSTANT_RATE = 'equal at constant learning rate'
APPROXIMATE = 'approximate'                        # the report says by how much at this step


class Computed(NamedTuple):
    """A hyper-parameter of another class that is not simply one of ours.

    ``ours`` names those of ours that it holds; ``there`` computes its value; ``back`` computes ours from a whole param group,
    or returns nothing if other keys already determine them. A group with a value other than that of ``there`` is refused.
    """

    ours: Tuple[str, ...]
    there: Callable[[Values], Any]
    back: Callable[[Mapping[str, Any]], Dict[str, Any]]


class Need(NamedTuple):
    """A condition on one of our hyper-parameters that the other class does not have.

    ``allowed`` is the condition in words, ``back`` the value used when converting back (None: the default),
    ``remedy`` what to do if it does not hold.
    """

    hyper: str
    allowed: str
    holds: Callable[[Values], bool]
    back: Any = None
    remedy: str = ''


class Label(NamedTuple):
    """How good a conversion is if ``holds(h, t)``; ``when`` is that condition in words."""

    name: str
    when: str = ''
    holds: Callable[[Values, int], bool] = lambda h, t: True


class Foreign(NamedTuple):
    """An optimizer class of another project that computes what a rule computes.

    Parameters
    ----------
    rule, target, path : str
        The registered name, the ``target`` under which the converters offer the class, and where to import it from.
    keys : dict
        Its hyper-parameter -> ours, a tuple of ours if it combines several (``betas``), or a `Computed`.
    labels : tuple of Label
        The first that holds describes the conversion.
    condition : str
        In words, what else must hold that no hyper-parameter shows.
    fixed : dict
        Switches that must have these values if it has them, because our rule supports no others.
    build : dict
        Arguments it must be constructed with, because they are not part of the state.
    needs : tuple of Need
        Our hyper-parameters that it lacks must have their defaults, unless a `Need` says otherwise.
    slots : dict
        Our slot -> its key, where it differs from what `Slot` declares.
    divisors : dict
        Our slot -> the factor between our slot and theirs: ours is divided by it.
    denominators : callable
        ``(h, t, slots)`` -> the two denominators, if the two differ in nothing else.
    doubt : callable
        ``(h, slots)`` of a parameter that has been updated -> what will behave differently, or ''.
    vanished : dict
        Variable of our optimizer as a whole -> the key under which it keeps one per parameter. They are equivalent once both
        have practically reached 0, where they stay.
    counts : 'tensor', 'number' or ''
        How it stores each parameter's number of updates; '' if it does not.
    eager : bool
        Whether a parameter without updates must already have its state, because the class would start differently on its own,
        or not at all.
    pack, unpack : callable
        From a state_dict in which every parameter has its own count and slots to one in the class's own form, and back.
        The parameters of a group then share one count.
    cls : str
        The class that the state belongs to, if not ``path``; '' if it cannot be constructed on every machine.
    masters : bool
        Whether it keeps single-precision masters of half-precision parameters.
    compensations : bool
        Whether it can keep their rounding errors instead.
    """

    rule: str
    target: str
    path: str
    keys: Mapping[str, Union[str, Tuple[str, ...], Computed]]
    labels: Tuple[Label, ...] = (Label(EXACT),)
    condition: str = ''
    fixed: Mapping[str, Any] = {}
    build: Mapping[str, Any] = {}
    needs: Tuple[Need, ...] = ()
    slots: Mapping[str, str] = {}
    divisors: Mapping[str, Callable[[Values], float]] = {}
    denominators: Optional[Callable[[Values, int, Mapping[str, Any]], Tuple[Any, Any]]] = None
    doubt: Optional[Callable[[Values, Mapping[str, Any]], str]] = None
    vanished: Mapping[str, str] = {}
    counts: str = 'tensor'
    eager: bool = False
    pack: Optional[Callable[[Dict[str, Any]], Dict[str, Any]]] = None
    unpack: Optional[Callable[[Dict[str, Any]], Dict[str, Any]]] = None
    cls: Optional[str] = None
    masters: bool = False
    compensations: bool = False

    def group(self, h: Values) -> Dict[str, Any]:
        """Its hyper-parameters, from ours, and its switches.

        >>> from gluon_optim import rules
        >>> find(rules.get('adamw'), 'torch', {}).group(rules.get('adamw').hyperparameters())['betas']
        (0.9, 0.999)
        """
        return dict({key: _there(ours, h) for key, ours in self.keys.items()}, **self.fixed)

    def hypers(self, group: Mapping[str, Any], partly: bool = False) -> Dict[str, Any]:
        """Our hyper-parameters from its own; ``partly`` allows some to be missing. ValueError for a switch our rule lacks."""
        for key, value in self.fixed.items():
            if group.get(key, value) != value:
                raise self._refuse(key, value, group)
        keys = {key: ours for key, ours in self.keys.items() if key in group or not partly}
        missing = [key for key in keys if key not in group]
        if missing:
            raise ValueError(f'A group of {self.path} has {one_of(self.keys)}. Received: one without {one_of(missing)}. '
                             'Does it belong to another optimizer? Pass the right `optimizer` and `target`.')
        hypers = {need.hyper: need.back for need in self.needs if need.back is not None}
        for key, ours in keys.items():
            if isinstance(ours, Computed):
                hypers.update(ours.back(group))
            else:
                hypers.update({ours: group[key]} if isinstance(ours, str) else zip(ours, group[key]))
        return hypers

    def check(self, h: Values, group: Mapping[str, Any]) -> None:
        """ValueError unless the values it computes from ``h``, our hyper-parameters, are those in ``group``."""
        for key, ours in self.keys.items():
            if isinstance(ours, Computed) and not math.isclose(ours.there(h), group[key], rel_tol=1e-12):
                raise self._refuse(key, ours.there(h), group)

    def _refuse(self, key: str, value: Any, group: Mapping[str, Any]) -> ValueError:
        return ValueError(f'`{key}` in a group of {self.path} must be {value!r}, or it is not {self.rule!r}. '
                          f'Received: {key}={group[key]!r}. Does it belong to another optimizer? '
                          'Pass the right `optimizer` and `target`.')

    def slot_key(self, slot: Slot) -> str:
        return self.slots.get(slot.name) or slot.torch or slot.name

    @property
    def held(self) -> List[str]:
        """Our hyper-parameters that it has."""
        return [name for ours in [*self.keys.values(), *self.build.values()] for name in _names(ours)]

    def made_with(self, h: Values) -> Dict[str, Any]:
        """The arguments it must be constructed with, because they are not part of the state."""
        return {key: ours.there(h) if isinstance(ours, Computed) else ours for key, ours in self.build.items()}

    def label(self, h: Values, t: int) -> str:
        """How good the conversion is after ``t`` updates."""
        return next(label.name for label in self.labels if label.holds(h, t))

    def conditions(self, rule: Type[Rule]) -> Iterator[str]:
        """What must hold, in words, one condition each."""
        special = {need.hyper for need in self.needs}
        for need in self.needs:
            if need.allowed != ANY:
                yield f'`{need.hyper}` {need.allowed}'
        for hyper in rule.hypers:
            if hyper.name not in special and hyper.name not in self.held and hyper != VARIANT:  # which nobody chooses
                yield f'`{hyper.name}` {hyper.default!r}'
        if self.build:
            made_with = ', '.join(f'{key}={"".join(ours.ours) if isinstance(ours, Computed) else ours}'
                                  for key, ours in self.build.items())
            yield f'made with `{made_with}`'
        if self.condition:
            yield self.condition


def _there(ours: Any, h: Values) -> Any:
    if isinstance(ours, Computed):
        return ours.there(h)
    return getattr(h, ours) if isinstance(ours, str) else tuple(getattr(h, name) for name in ours)


def _names(ours: Any) -> Tuple[str, ...]:
    """The names of our hyper-parameters in an entry of ``keys`` or ``build``."""
    if isinstance(ours, Computed):
        return ours.ours
    return (ours,) if isinstance(ours, str) else ours if isinstance(ours, tuple) else ()


# Conditions and computed hyper-parameters

ANY = 'any'


def no_inverse(group: Mapping[str, Any]) -> Dict[str, Any]:
    """The ``back`` of a key that adds nothing to what other keys determine."""
    return {}


def same(name: str) -> Computed:
    """Our hyper-parameter ``name`` as a constructor argument of a class."""
    return Computed((name,), lambda h: getattr(h, name), no_inverse)


def no_effect(name: str) -> Need:
    return Need(name, ANY, lambda h: True)


def no_decay(remedy: str) -> Need:
    return Need('wd', '0', lambda h: h.wd == 0, remedy=remedy)


def no_momentum(h: Values, t: int) -> bool:
    return bool(h.momentum == 0)


def root(name: str) -> Computed:
    """An epsilon inside a root converted to one outside it: steps are never longer than ours, and at most 29% shorter."""
    return Computed((name,), lambda h: math.sqrt(getattr(h, name)), lambda group: {name: float(f'{group["eps"] ** 2:.15g}')})


def minus_rate(h: Values) -> float:
    """MXNet's momentum is the next step, including sign and learning rate."""
    return -float(h.learning_rate)


SCHEDULE = Label(CONSTANT_RATE)
WITHOUT_MOMENTUM = Label(EXACT, 'momentum 0', no_momentum)
AVERAGING = Computed(('grad_averaging',), lambda h: bool(h.grad_averaging),
                     lambda group: {'grad_averaging': bool(group['grad_averaging'])})


def adam_denominators(h: Values, t: int, slots: Mapping[str, Any]) -> Tuple[Any, Any]:
    """MXNet adds epsilon before bias correction, so it acts like epsilon / sqrt(1 - beta2^t)."""
    root_correction = math.sqrt(1 - h.beta2 ** t)
    deviation = numpy.sqrt(slots['var'])
    return (deviation + h.epsilon) / root_correction, deviation / root_correction + h.epsilon


def rmsprop_denominators(h: Values, t: int, slots: Mapping[str, Any]) -> Tuple[Any, Any]:
    variance = numpy.maximum(slots['n'] - slots['g'] ** 2, 0) if h.centered else slots['n']
    return numpy.sqrt(variance + h.epsilon), numpy.sqrt(variance) + math.sqrt(h.epsilon)


def adagrad_denominators(h: Values, t: int, slots: Mapping[str, Any]) -> Tuple[Any, Any]:
    return numpy.sqrt(slots['history'] + h.eps), numpy.sqrt(slots['history']) + math.sqrt(h.eps)


def unset_norm(h: Values, slots: Mapping[str, Any]) -> str:
    """While their norm is 0, these classes treat the next one as the first; the paper's variant does not."""
    return 'a norm of 0 after a zero first gradient, which it sets again' if h.variant == 'paper' and not slots['norm_sq'] else ''


# Classes that count in their param groups

def count_in_groups(state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """One count per group, shared by all its parameters."""
    state, param_groups = dict(state_dict['state']), []
    for group in state_dict['param_groups']:
        for key in group['params']:
            if key in state:
                entry = dict(state[key])
                group = dict(group, step=entry.pop('step'))
                state[key] = entry
        param_groups.append(group)
    return {'state': state, 'param_groups': param_groups}


def count_in_parameters(state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """The inverse of `count_in_groups`."""
    state = dict(state_dict['state'])
    for group in state_dict['param_groups']:
        state.update({key: dict(state[key], step=group['step']) for key in group['params'] if state.get(key) and 'step' in group})
    return dict(state_dict, state=state)


def norms_in_groups(state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """One list of norms per group: first those of half-precision parameters (none here), then the others."""
    packed = count_in_groups(state_dict)
    for group in packed['param_groups']:
        norms = [packed['state'][key].pop('exp_avg_sq') for key in group['params'] if key in packed['state']]
        if norms:
            group['exp_avg_sq'] = [numpy.zeros(0, 'float32'), numpy.array(norms, 'float32')]
    return packed


def norms_in_parameters(state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """The inverse of `norms_in_groups`."""
    unpacked = count_in_parameters(state_dict)
    for group in unpacked['param_groups']:
        norms = numpy.concatenate(group.get('exp_avg_sq') or [numpy.zeros(0)])
        if len(norms) not in (0, len(group['params'])):
            raise ValueError(f'A group of {len(group["params"])} parameters must have as many norms in `exp_avg_sq`. '
                             f'Received: {len(norms)}. Parameters that never had a gradient cannot be identified: leave them out.')
        for key, norm in zip(group['params'], norms):
            unpacked['state'][key] = dict(unpacked['state'][key], exp_avg_sq=numpy.array(norm))
    return unpacked


# The table

RATE: Dict[str, Any] = {'lr': 'learning_rate', 'weight_decay': 'wd'}
ADAM: Dict[str, Any] = {**RATE, 'betas': ('beta1', 'beta2'), 'eps': 'epsilon'}
MOMENTUM: Dict[str, Any] = {**RATE, 'momentum': 'momentum'}
SGD: Dict[str, Any] = {**MOMENTUM, 'dampening': 'dampening', 'nesterov': 'nesterov'}
MINIMIZE = {'maximize': False}
COUPLED, DECOUPLED = {**MINIMIZE, 'decoupled_weight_decay': False}, {**MINIMIZE, 'decoupled_weight_decay': True}
UNCORRECTED = {'decoupled_decay': False, 'corrected_weight_decay': False}
ZERO_NORMS = 'no weight or gradient is all zeros'
NOT_RUN = 'float32 parameters; checked against its source, not run: needs CUDA'

FOREIGN: Tuple[Foreign, ...] = (
    # PyTorch's conventions, which our rules of the same names follow
    Foreign('adadelta_torch', 'torch', 'torch.optim.Adadelta', {**RATE, 'rho': 'rho', 'eps': 'epsilon'}, fixed=MINIMIZE),
    Foreign('adagrad_torch', 'torch', 'torch.optim.Adagrad',
            {**RATE, 'lr_decay': 'lr_decay', 'initial_accumulator_value': 'initial_accumulator', 'eps': 'epsilon'},
            fixed=MINIMIZE, eager=True),
    Foreign('adam_torch', 'torch', 'torch.optim.Adam', {**ADAM, 'amsgrad': 'amsgrad'}, fixed=COUPLED),
    Foreign('adamax_torch', 'torch', 'torch.optim.Adamax', ADAM, fixed=MINIMIZE),
    Foreign('adamw', 'torch', 'torch.optim.AdamW', {**ADAM, 'amsgrad': 'amsgrad'}, fixed=DECOUPLED),
    Foreign('asgd', 'torch', 'torch.optim.ASGD', {**RATE, 'lambd': 'lambd', 'alpha': 'alpha', 't0': 't0'}, fixed=MINIMIZE,
            condition='PyTorch rounds `eta` and `mu` to torch.get_default_dtype(), even for float64 parameters'),
    Foreign('nadam_torch', 'torch', 'torch.optim.NAdam',
            {**ADAM, 'momentum_decay': 'momentum_decay', 'decoupled_weight_decay': 'decoupled_wd'}, fixed=MINIMIZE),
    Foreign('radam', 'torch', 'torch.optim.RAdam', {**ADAM, 'decoupled_weight_decay': 'decoupled_wd'}, fixed=MINIMIZE),
    Foreign('rmsprop_torch', 'torch', 'torch.optim.RMSprop',
            {**MOMENTUM, 'alpha': 'rho', 'eps': 'epsilon', 'centered': 'centered'}, fixed=MINIMIZE),
    Foreign('rprop', 'torch', 'torch.optim.Rprop',
            {'lr': 'learning_rate', 'etas': ('eta_minus', 'eta_plus'), 'step_sizes': ('step_min', 'step_max')}, fixed=MINIMIZE),
    Foreign('sgd_torch', 'torch', 'torch.optim.SGD', SGD, fixed=MINIMIZE, counts=''),
    # an average of gradients is a sum dampened from the first update on, which starts from a buffer of zeros;
    # PyTorch allows no dampening with nesterov: there the buffer is the sum, and the rate correspondingly smaller
    Foreign('sgd_ema', 'torch', 'torch.optim.SGD',
            {**MOMENTUM, 'nesterov': 'nesterov',
             'lr': Computed(('learning_rate',), lambda h: h.learning_rate * (1 - h.momentum if h.nesterov else 1),
                            lambda group: {'learning_rate': group['lr'] / (1 - group['momentum'] if group['nesterov'] else 1)}),
             'dampening': Computed((), lambda h: 0.0 if h.nesterov else h.momentum, no_inverse)},
            divisors={'mean': lambda h: 1 - h.momentum if h.nesterov else 1.0},
            condition='nesterov: multiply learning rates by 1 - momentum',
            fixed=MINIMIZE, slots={'mean': 'momentum_buffer'}, counts='', eager=True),

    # MXNet's own
    Foreign('sgd', 'torch', 'torch.optim.SGD', MOMENTUM, (WITHOUT_MOMENTUM, SCHEDULE), needs=(no_effect('lazy_update'),),
            fixed={**MINIMIZE, 'dampening': 0.0, 'nesterov': False}, slots={'momentum': 'momentum_buffer'},
            divisors={'momentum': minus_rate}, counts=''),
    Foreign('nag', 'torch', 'torch.optim.SGD', {**MOMENTUM, 'nesterov': Computed((), lambda h: h.momentum > 0, no_inverse)},
            (WITHOUT_MOMENTUM, SCHEDULE), fixed={**MINIMIZE, 'dampening': 0.0},
            needs=(Need('wd', '0, or `momentum` 0', lambda h: h.wd == 0 or h.momentum == 0,
                        remedy="MXNet's momentum includes the decay of the new weight"),),
            slots={'momentum': 'momentum_buffer'}, divisors={'momentum': minus_rate}, counts=''),
    Foreign('adam', 'torch', 'torch.optim.Adam', ADAM,
            (Label(EXACT, 'epsilon 0, or beta2^t below 1e-16', lambda h, t: h.epsilon == 0 or (t > 0 and h.beta2 ** t < VANISHED)),
             Label(APPROXIMATE)),
            fixed={**COUPLED, 'amsgrad': False}, needs=(no_effect('lazy_update'),), denominators=adam_denominators,
            condition='in MXNet, epsilon acts like epsilon / sqrt(1 - beta2^t)'),
    Foreign('nadam', 'torch', 'torch.optim.NAdam', {**ADAM, 'momentum_decay': 'schedule_decay'}, fixed=COUPLED, eager=True,
            vanished={'m_schedule': 'mu_product'},
            condition='the products of momenta have vanished (`m_schedule` below 1e-16), as after about 50 parameter updates'),
    # 1e-30 vanishes in the sum with any gradient, and avoids 0/0
    Foreign('adamax', 'torch', 'torch.optim.Adamax', {**RATE, 'betas': ('beta1', 'beta2')}, fixed={**MINIMIZE, 'eps': 1e-30},
            slots={'var': 'exp_inf'}),
    Foreign('rmsprop', 'torch', 'torch.optim.RMSprop',
            {**RATE, 'alpha': 'gamma1', 'eps': root('epsilon'), 'centered': 'centered',
             'momentum': Computed(('gamma2',), lambda h: h.gamma2 if h.centered else 0.0,
                                  lambda group: {'gamma2': group['momentum']} if group['centered'] else {})},
            (Label(EXACT, 'epsilon 0 and not centered', lambda h, t: h.epsilon == 0 and not h.centered),
             Label(CONSTANT_RATE, 'epsilon 0', lambda h, t: h.epsilon == 0), Label(APPROXIMATE)),
            condition='centered: at constant learning rate only', fixed=MINIMIZE, denominators=rmsprop_denominators,
            slots={'n': 'square_avg', 'g': 'grad_avg', 'delta': 'momentum_buffer'}, divisors={'delta': minus_rate}),
    Foreign('rmsprop', 'timm', 'timm.optim.RMSpropTF',
            {**RATE, 'alpha': 'gamma1', 'eps': 'epsilon', 'centered': 'centered',
             'momentum': Computed(('gamma2',), lambda h: h.gamma2 if h.centered else 0.0,
                                  lambda group: {'gamma2': group['momentum']} if group['centered'] else {})},
            fixed={**UNCORRECTED, 'lr_in_momentum': True, 'caution': False}, eager=True,
            slots={'n': 'square_avg', 'g': 'grad_avg', 'delta': 'momentum_buffer'}, divisors={'delta': lambda h: -1.0}),
    Foreign('adagrad', 'torch', 'torch.optim.Adagrad', {'lr': 'learning_rate', 'eps': root('eps')},
            (Label(EXACT, 'eps 0', lambda h, t: h.eps == 0), Label(APPROXIMATE)), denominators=adagrad_denominators,
            fixed={**MINIMIZE, 'weight_decay': 0.0, 'lr_decay': 0.0, 'initial_accumulator_value': 0.0}, eager=True,
            needs=(no_decay('multiply the weights by 1 - lr wd yourself before each step'),), slots={'history': 'sum'}),
    Foreign('adadelta', 'torch', 'torch.optim.Adadelta', {'rho': 'rho', 'eps': 'epsilon'},
            fixed={**MINIMIZE, 'lr': 1.0, 'weight_decay': 0.0},
            needs=(no_effect('learning_rate'), no_decay('multiply the weights by 1 - wd yourself before each step')),
            slots={'acc_g': 'square_avg', 'acc_delta': 'acc_delta'}),

    # layer by layer
    Foreign('novograd', 'timm', 'timm.optim.NvNovoGrad',
            {**ADAM, 'amsgrad': 'amsgrad', 'grad_averaging': AVERAGING, 'decoupled_decay': 'decoupled_wd'},
            fixed={'corrected_weight_decay': False}, counts='number', doubt=unset_norm,
            needs=(Need('variant', "'jasper', or 'paper' where no first gradient is all zeros",
                        lambda h: h.variant in ('paper', 'jasper'), back='jasper'),)),
    Foreign('novograd', 'torch_optimizer', 'torch_optimizer.NovoGrad', {**ADAM, 'amsgrad': 'amsgrad', 'grad_averaging': AVERAGING},
            counts='number', doubt=unset_norm, condition='it overwrites the gradients',
            needs=(Need('variant', "'jasper', or 'paper' where no first gradient is all zeros",
                        lambda h: h.variant in ('paper', 'jasper'), back='jasper'),)),
    Foreign('novograd', 'apex', 'apex.optimizers.FusedNovoGrad',
            {**ADAM, 'grad_averaging': AVERAGING._replace(there=lambda h: h.grad_averaging is not False)},
            fixed={'bias_correction': True, 'norm_type': 2, 'init_zero': False}, build={'reg_inside_moment': False},
            needs=(Need('variant', "'apex'", lambda h: h.variant == 'apex', back='apex'),), slots={'norm': 'exp_avg_sq'},
            counts='number', pack=norms_in_groups, unpack=norms_in_parameters, cls='',
            condition=f'every parameter has a gradient at every step; {NOT_RUN}'),
    Foreign('lamb', 'timm', 'timm.optim.Lamb', {**ADAM, 'bias_correction': 'bias_correction'},
            fixed={**UNCORRECTED, 'grad_averaging': True, 'max_grad_norm': None, 'trust_clip': False, 'always_adapt': True,
                   'caution': False},
            build={'max_grad_norm': None}, counts='number', pack=count_in_groups, unpack=count_in_parameters),
    Foreign('lamb', 'torch_optimizer', 'torch_optimizer.Lamb', ADAM, counts='number',
            build={'debias': False, 'clamp_value': Computed(('upper_bound',), lambda h: h.upper_bound or math.inf, no_inverse)},
            needs=(Need('bias_correction', 'False', lambda h: not h.bias_correction, back=False),)),
    Foreign('lamb', 'apex', 'apex.optimizers.FusedLAMB', {**ADAM, 'bias_correction': 'bias_correction'},
            fixed={'grad_averaging': True, 'max_grad_norm': math.inf}, build={'max_grad_norm': math.inf, 'use_nvlamb': True},
            counts='number', pack=count_in_groups, unpack=count_in_parameters, cls='', condition=NOT_RUN),
    Foreign('larc', 'timm', 'timm.optim.Lars', {**SGD, 'trust_coeff': 'trust_coefficient', 'eps': 'epsilon', 'trust_clip': 'clip'},
            fixed={'always_adapt': True}, counts='', condition=ZERO_NORMS),
    Foreign('larc', 'torch_optimizer', 'torch_optimizer.LARS', {**SGD, 'trust_coefficient': 'trust_coefficient', 'eps': 'epsilon'},
            counts='', needs=(Need('clip', 'False', lambda h: not h.clip, back=False),
                              Need('wd', 'above 0, including wd_mult', lambda h: h.wd > 0,
                                   remedy='without decay it takes plain SGD steps'))),
    Foreign('larc', 'apex', 'apex.parallel.LARC', SGD, fixed=MINIMIZE, counts='', cls='torch.optim.SGD',
            build={'trust_coefficient': same('trust_coefficient'), 'clip': same('clip'), 'eps': same('epsilon')},
            condition='wraps torch.optim.SGD, which holds the state; removed from newer Apex'),
)

# Why a rule has no class elsewhere, or why one that looks similar is not offered
REASONS: Dict[str, str] = {
    'adabelief': "timm's and torch_optimizer's AdaBelief add epsilon to the root after bias correction, and accumulate it too",
    'dcasgd': 'it uses the weight before the last step, which no class elsewhere keeps',
    'ftml': 'no class elsewhere computes it',
    'ftrl': 'no class elsewhere computes it',
    'lans': 'no class elsewhere computes it',
    'lars': 'parameter names decide what is adapted, and MXNet corrects only some momenta; continue with larc, clip=False',
    'lbsgd': 'it accumulates gradients on its own, and its rate depends on what it has seen',
    'noise_adaptive_sgd': 'no class elsewhere computes it',
    'psgld': 'it draws random numbers, which no class elsewhere draws alike',
    'sgld': 'it draws random numbers, which no class elsewhere draws alike',
    'signum': 'no class elsewhere computes it',
    'sngd': 'no class elsewhere computes it',
}


def reason(rule: Type[Rule]) -> str:
    """The reason why `FOREIGN` has no class for ``rule``."""
    return REASONS.get(rule.name, 'no class elsewhere is known to compute it')


def own_class(rule: Type[Rule], given: Mapping[str, Any]) -> Foreign:
    """How our own PyTorch optimizer stores ``rule``: everything, under MXNet's names except ``lr``."""
    if not mirrored(rule):
        raise ValueError(f'{rule.name!r} has no mirror: its update needs more than the state of one parameter and sums over it. '
                         'Continue with another optimizer; its states can still be read.')
    names = [hyper.name for hyper in rule.declared(given) + BASE_HYPERS]
    keys = {'lr' if name == 'learning_rate' else name: name for name in names}
    path = f'gluon_optim.torch.create({rule.name!r})'
    return Foreign(rule.name, 'mirror', path, keys, fixed={'optimizer': rule.name}, masters=True, compensations=True)


def find(rule: Type[Rule], target: str, given: Mapping[str, Any]) -> Foreign:
    """The class that computes ``rule`` in ``target``; ``given`` is hyper-parameters or a param group.

    >>> from gluon_optim import rules
    >>> find(rules.get('ftrl'), 'torch', {})
    Traceback (most recent call last):
      ...
    ValueError: 'ftrl' has no equivalent in target='torch': no class elsewhere computes it. Available: target='mirror'.
    """
    if target == 'mirror':
        return own_class(rule, given)
    declared = {hyper.name for hyper in rule.declared(given)}
    fits = {foreign.target: foreign for foreign in FOREIGN if foreign.rule == rule.name and set(foreign.held) <= declared}
    if target not in fits:
        there_is = ', '.join(f'target={name!r}' for name in ['mirror'] * mirrored(rule) + sorted(fits)) or 'no target at all'
        why = '' if fits else f': {reason(rule)}'
        raise ValueError(f'{rule.name!r} has no equivalent in target={target!r}{why}. Available: {there_is}.')
    return fits[target]
