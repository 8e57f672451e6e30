"""`RuleOptimizer`: a rule as ``torch.optim.Optimizer``."""
import operator
from typing import Any, Callable, Container, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Type, TypeVar

import torch
from torch.optim.optimizer import Optimizer

from .. import rules
from ..mapping.classes import own_class
from ..mapping.state_dict import check_entry
from ..rules import Rule
from ..rules.base import KernelKey
from ..rules.compensated import COMPENSATION, KAHAN, MULTI_PRECISION
from ..schema import Slot, Values, check_known, compute_type
from .executors import HALVES, MOST_UPDATES, Group, Launches, capturing, key_of, not_a_count

__all__ = ['RuleOptimizer', 'create', 'param_groups']

ALIASES = {'learning_rate': 'lr', 'weight_decay': 'wd'}  # other name -> the key in a param group
GROUP_KEYS = ('params', 'param_names', 'initial_lr', 'lr_mult', 'optimizer')  # what a param group holds besides hyper-parameters
PLAIN = (bool, int, float, str, type(None))
KEEP = 16   # as many different lists of parameters with gradients stay prepared
TYPES = HALVES + (torch.float32, torch.float64)


_grad, _layout = operator.attrgetter('grad'), operator.attrgetter('layout')
F = TypeVar('F', bound=Callable[..., Any])


# Tracing would compile once for each step, at which the coefficients, Python numbers, change. `torch.compiler.disable` does the
# same, and loads all of the compiler at once.
untraced: Callable[[F], F] = vars(torch)['_disable_dynamo']


class RuleOptimizer(Optimizer):
    """A registered rule as a PyTorch optimizer; make one with `create`.

    A param group holds the hyper-parameters under MXNet's names, except ``lr`` for the learning rate, and ``multi_precision``.
    The state of a parameter is its number of updates ``'step'``, the slots under PyTorch's names (``exp_avg`` and so on), of
    shape () where the rule keeps one number, and for half-precision parameters ``'master'`` with ``multi_precision=True``, or
    ``'compensation'``, of their type, with 'kahan'. Slots and masters are float32, or float64 for float64 parameters. Parameters
    without a gradient are skipped.

    Parameters are the ``rule``, and ``params`` and ``hypers`` as for `create`, which raises the same errors.

    >>> import torch
    >>> from gluon_optim.torch import create
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = create('novograd', [weight], lr=0.1)
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> optimizer.step()
    >>> optimizer.state[weight]['exp_avg_sq'], optimizer.state[weight]['step']
    (tensor(25.), tensor(1.))
    """

    rule: Type[Rule]
    fused: Optional[bool] = None
    capturable: bool = False
    _captured: List[Launches]              # what CUDA graphs replay
    _settings: Dict[int, Tuple[Any, Tuple[Values, KernelKey, Any]]]   # place of a param group -> what it held, and what that means
    _launches: Optional[Launches] = None   # what the last step used
    _kept: Sequence[Launches] = ()         # for the lists of parameters with gradients of the last steps, the latest first

    def __init__(self, rule: Type[Rule], params: Any, fused: Optional[bool] = None, capturable: bool = False, **hypers: Any):
        self.rule, self.fused, self.capturable, self._captured, self._settings = rule, fused, capturable, [], {}
        super().__init__(params, dict(self._checked(self._named(hypers, {}), partly=True), optimizer=rule.name))

    def __getstate__(self) -> Dict[str, Any]:
        return dict(super().__getstate__(), rule=self.rule.name, fused=self.fused, capturable=self.capturable)

    def __setstate__(self, state: Dict[str, Any]) -> None:  # PyTorch also calls it with part of the state
        state = dict(state)
        if 'rule' in state:
            self.rule, self._captured, self._settings = rules.get(state.pop('rule')), [], {}
        super().__setstate__(state)

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, f'{type(self).__name__} {self.rule.name!r}', 1)

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        """Add parameters with their own hyper-parameters. Everything is checked before the group is added."""
        if not isinstance(param_group, dict):
            raise TypeError(f'A param group must be a dictionary. Received: {type(param_group).__name__}.')
        group = {key: value for key, value in param_group.items() if key in GROUP_KEYS}
        group.update(self._named({key: value for key, value in param_group.items() if key not in GROUP_KEYS}, self.defaults))
        group.update(self._checked({**self.defaults, **group}, partly=True))
        if not isinstance(group['params'], set):  # which PyTorch refuses
            group['params'] = [group['params']] if isinstance(group['params'], torch.Tensor) else list(group['params'])
            for param in group['params']:
                _check_param(param[1] if isinstance(param, tuple) else param)
            _check_once(group['params'])
        super().add_param_group(group)

    def _named(self, given: Mapping[str, Any], others: Mapping[str, Any]) -> Dict[str, Any]:
        """Hyper-parameters under the keys of a param group that also has ``others``. Unknown names are refused."""
        named: Dict[str, Any] = {}
        for name, value in given.items():
            key = ALIASES.get(name, name)
            if key in named:
                raise TypeError(f'`{key}` is given twice: {name} means the same. Leave one out.')
            named[key] = value
        known = [*own_class(self.rule, {**others, **named}).keys, MULTI_PRECISION.name, *ALIASES]
        for name in given:
            check_known('argument', name, known, owner=self.rule.name)
        return named

    def _checked(self, group: Mapping[str, Any], partly: bool = False) -> Dict[str, Any]:
        """All hyper-parameters of a group as plain numbers and switches; ``partly`` fills in defaults."""
        foreign = own_class(self.rule, group)
        h = self.rule.hyperparameters(**foreign.hypers(self._read(group), partly))
        multi_precision = MULTI_PRECISION.check(group.get(MULTI_PRECISION.name, MULTI_PRECISION.default))
        checked = dict(foreign.group(h), multi_precision=multi_precision)
        return dict(checked, lr=group['lr']) if self._on_device(group) else checked

    def _on_device(self, group: Mapping[str, Any]) -> bool:
        """Whether the learning rate is a tensor, which may not be read here."""
        return self.capturable and isinstance(group.get('lr'), torch.Tensor)

    def _read(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        return dict(group, lr=1.0) if self._on_device(group) else group

    def _hypers(self, group: Mapping[str, Any]) -> Values:
        h = self.rule.hyperparameters(**own_class(self.rule, group).hypers(self._read(group)))
        return h.replace(learning_rate=group['lr'].double()) if self._on_device(group) else h

    @untraced
    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """Update all parameters that have a gradient; ``closure`` reevaluates the model and returns the loss.

        Before anything is updated, raises ValueError or TypeError for a hyper-parameter out of range (a scheduler may have set
        it), for ``group['weight_decay']`` that differs from the ``group['wd']`` which counts, for a sparse gradient, or for a
        state that somebody has changed to what the rule cannot use.
        """
        loss = None
        if closure is not None:
            with torch.set_grad_enabled(True):
                loss = closure()
        groups = [self._group(place, group) for place, group in enumerate(self.param_groups)]
        self._launches = self._prepared(groups)
        self._launches.run(groups)
        if capturing():
            self._captured.append(self._launches)   # replays read its tables
        return loss

    def _prepared(self, groups: Sequence[Group]) -> Launches:
        """What updates these parameters: prepared for an earlier step, or now."""
        entries = list(self.state.values())
        for launches in self._kept:
            if launches.takes(groups, entries):
                if launches is not self._kept[0]:
                    self._kept = [launches, *(other for other in self._kept if other is not launches)]
                return launches
        states = [self._state(param, group.static.slots, group.multi_precision) for group in groups for param in group.params]
        entries = list(self.state.values())
        others = [other for other in self._kept if other.stays(groups, entries)][:KEEP - 1]
        made = Launches(self.rule, groups, states, entries, self.fused, others)
        self._kept = [made, *others]
        return made

    def _group(self, place: int, group: Dict[str, Any]) -> Group:
        """What of a param group takes part in a step, checked."""
        params, gradients = group['params'], list(map(_grad, group['params']))
        if any(gradient is None for gradient in gradients):
            params = [param for param, gradient in zip(params, gradients) if gradient is not None]
            gradients = [gradient for gradient in gradients if gradient is not None]
        if set(map(_layout, gradients)) - {torch.strided}:
            _check_dense(gradients)
        return Group(*self._settings_of(place, group), params, gradients)

    def _settings_of(self, place: int, group: Dict[str, Any]) -> Tuple[Values, KernelKey, Any]:
        """Hyper-parameters of a group, which of them change the computation, and multi_precision; checked if anything changed."""
        held = {key: (type(value), value) for key, value in group.items() if key not in ('params', 'param_names')}
        before, settings = self._settings.get(place, (None, None))
        if settings is None or held != before:
            _check_aliases(group)
            h = self._hypers(group)
            settings = h, self.rule.static(h), MULTI_PRECISION.check(group['multi_precision'])
            if all(kind in PLAIN for kind, _ in held.values()):   # to compare a tensor may wait for a device
                self._settings[place] = held, settings
        return settings

    def _state(self, param: torch.Tensor, slots: Iterable[Slot], multi_precision: Any) -> Dict[str, Any]:
        """The state of a parameter, with anything missing filled in."""
        state: Dict[str, Any] = self.state[param]
        if 'step' not in state:
            # on the CPU, where reading it waits for no device
            state['step'] = torch.zeros((), dtype=torch.float32, device=param.device if self.capturable else 'cpu')
        step = state['step']   # users put numbers there, or move it with everything else
        there = param.device if self.capturable else torch.device('cpu')
        if not (isinstance(step, torch.Tensor) and step.layout is torch.strided and not step.shape
                and step.dtype in (torch.float32, torch.float64) and (step.device.type == 'cpu' or step.device == there)):
            state['step'] = torch.tensor(_count(param, step), dtype=torch.float32, device=there)
        kept = {'master', COMPENSATION.torch}.intersection(state)   # the state says what an optimizer that has begun keeps
        if multi_precision and param.dtype in HALVES and not kept:
            if multi_precision == KAHAN:
                state[COMPENSATION.torch] = torch.zeros_like(param, requires_grad=False)
            else:
                state['master'] = param.detach().float()
        shapes = {key_of(slot): slot.shape(param.shape) for slot in slots}
        _check_tensors(param, state, {**shapes, **dict.fromkeys(kept, param.shape)})
        if COMPENSATION.torch in kept and state[COMPENSATION.torch].dtype != param.dtype:
            raise ValueError(_cannot_compensate('A parameter', param, state))
        _check_kept(f'A parameter of shape {tuple(param.shape)}', kept, multi_precision)
        for slot in slots:
            if key_of(slot) not in state:
                state[key_of(slot)] = _initial(slot, state.get('master', param))
        return state

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Load hyper-parameters and state. PyTorch's own method would cast slots and masters to the type of the parameters.

        Raises ValueError, before anything is changed, for the state of another optimizer or other parameters.
        """
        exact: Dict[torch.Tensor, Dict[str, Any]] = {}

        def check(_: Any, given: Dict[str, Any]) -> Dict[str, Any]:
            groups = [dict(saved, **self._checked(saved)) for saved in given['param_groups']]
            for mine, saved in self._pairs(groups):
                _check_names(mine.get('param_names', ()), saved.get('param_names', ()))
                saved.update((key, mine[key]) for key in ['param_names'] if key in mine)  # PyTorch's own stay
                for param, key in zip(mine['params'], saved['params']):
                    if given['state'].get(key):
                        exact[param] = self._loaded(param, key, given['state'][key], saved)
            return dict(given, param_groups=groups)

        def restore(_: Any) -> None:
            self.state.update(exact)

        # last of the pre-hooks and first of the post-hooks: users' hooks can change what is checked and see what is restored
        hooks = [self.register_load_state_dict_pre_hook(check), self.register_load_state_dict_post_hook(restore, prepend=True)]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _loaded(self, param: torch.Tensor, key: Any, entry: Mapping[str, Any], group: Mapping[str, Any]) -> Dict[str, Any]:
        """One parameter's state from a state_dict, checked and copied to the parameter's device without rounding."""
        dtype, slots = _slot_type(param), self.rule.slots(self._hypers(group))
        types = check_entry(own_class(self.rule, group), slots, f'parameter {key}', param.shape,
                                        str(dtype).split('.')[-1], entry)
        step = torch.tensor(float(entry['step']), dtype=torch.float32, device=param.device if self.capturable else 'cpu')
        loaded = dict(entry, step=step)
        for word, name in types.items():
            loaded[word] = entry[word].detach().to(param.device, getattr(torch, name), copy=True)
        _check_kept(f'Parameter {key}', entry, group['multi_precision'])
        if COMPENSATION.torch in entry and loaded[COMPENSATION.torch].dtype != param.dtype:
            raise ValueError(_cannot_compensate(f'Parameter {key}', param, entry))
        if group['multi_precision'] and param.dtype in HALVES:
            return loaded
        master = loaded.pop('master', param.detach())
        if not torch.equal(param.detach().to(dtype), master.to(dtype)):
            raise ValueError(f'Parameter {key} is {param.dtype} and keeps no master, but the state has one with different values. '
                             f"Copy it into the parameter first: param.data.copy_(state_dict['state'][{key!r}]['master']).")
        return loaded

    def _pairs(self, saved: List[Dict[str, Any]]) -> List[Tuple[Dict[str, Any], Dict[str, Any]]]:
        mine, theirs = ([len(group['params']) for group in groups] for groups in (self.param_groups, saved))
        if mine != theirs:
            raise ValueError(f'The param groups must have {mine} parameters, like those of this optimizer. Received: {theirs}. '
                             'Build the optimizer from `gluon_optim.torch.param_groups(state_dict, params)`.')
        return list(zip(self.param_groups, saved))


def create(name: str, params: Any, fused: Optional[bool] = None, capturable: bool = False, **hypers: Any) -> RuleOptimizer:
    """The registered optimizer ``name`` for PyTorch.

    Parameters
    ----------
    name : str
        As in `gluon_optim.list_optimizers`.
    params : iterable
        Tensors, named tensors or param groups, as for any PyTorch optimizer. A group may set any of ``hypers``.
    fused : bool, optional
        Whether compiled kernels update all parameters at once: on CPUs numba's, on CUDA devices Triton's. By default where
        these are installed; True raises where a parameter has no kernel, False uses PyTorch's operations.
    capturable : bool
        Whether a CUDA graph may capture `step`: numbers of updates are counted on the device, and so are coefficients, in
        float64. ``group['lr']`` may then be a tensor there, which later replays read. Needs kernels, and one device.
    **hypers
        The optimizer's hyper-parameters under MXNet's names, including ``rescale_grad`` and ``clip_gradient``; also ``lr`` for
        learning_rate, ``weight_decay`` for wd, and ``multi_precision``: how float16 and bfloat16 parameters keep the digits that
        their type does not have. True (default): in float32 masters. 'kahan': in a compensation of their own type, half of that
        memory, with 17 significant bits in bfloat16 and 23 in float16. False: not at all.

    Raises
    ------
    ValueError, TypeError
        For an unknown name or argument, a value out of range, or parameters that are not floating-point tensors.

    >>> create('novograd', [torch.nn.Parameter(torch.ones(2))], beta=0.9)
    Traceback (most recent call last):
      ...
    TypeError: Unknown argument of novograd 'beta'. Did you mean 'beta2' or 'beta1'? Known: 'amsgrad', 'beta1', 'beta2', \
'clip_gradient', 'decoupled_wd', 'epsilon', 'epsilon_root', 'grad_averaging', 'learning_rate', 'lr', 'multi_precision', \
'rescale_grad', 'variant', 'wd', 'weight_decay'.
    """
    if fused not in (None, False, True):
        raise ValueError(f'`fused` must be None, False or True. Received: {fused!r}.')
    return RuleOptimizer(rules.get(name), params, fused, capturable, **hypers)


def param_groups(state_dict: Mapping[str, Any], params: Iterable[torch.Tensor]) -> List[Dict[str, Any]]:
    """``params``, in the order in which `to_torch` wrote them, arranged in the param groups of ``state_dict``.

    An optimizer must be built from these before it can load a state with several groups (different lr_mult or wd_mult):

        optimizer = create('novograd', param_groups(state_dict, model.parameters()))
        optimizer.load_state_dict(state_dict)

    Raises ValueError where the numbers of parameters differ.

    >>> import torch
    >>> from gluon_optim.torch import param_groups
    >>> params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    >>> state_dict = torch.optim.SGD([{'params': params[:1], 'lr': 0.1}, {'params': params[1:], 'lr': 0.2}]).state_dict()
    >>> [len(group['params']) for group in param_groups(state_dict, params)]
    [1, 1]
    """
    params = list(params)
    positions = [position for group in state_dict['param_groups'] for position in group['params']]
    if sorted(positions) != list(range(len(params))):
        raise ValueError(f'`params` must be {len(positions)} parameters, as many as the state has. Received: {len(params)}.')
    return [{'params': [params[position] for position in group['params']]} for group in state_dict['param_groups']]


def _slot_type(param: torch.Tensor) -> torch.dtype:
    """The type of a parameter's slots and of its update."""
    found: torch.dtype = getattr(torch, compute_type(param.dtype))
    return found


def _initial(slot: Slot, weight: torch.Tensor) -> torch.Tensor:
    """What ``slot`` holds before the first update of ``weight``."""
    if slot.init == 'weight':
        return weight.detach().to(_slot_type(weight), copy=True)
    shape = slot.shape(weight.shape)
    like = weight.detach() if shape == weight.shape else weight.detach().new_empty(shape)
    return torch.full_like(like, float(slot.init), dtype=_slot_type(weight))


def _check_aliases(group: Mapping[str, Any]) -> None:
    """Refuse what a schedule for PyTorch's own optimizers sets. A copy of our value, and keys of other libraries, may be there."""
    for alias, key in ALIASES.items():
        if alias in group and key in group and group[alias] is not group[key] and (
                isinstance(group[key], torch.Tensor) or group[alias] != group[key]):   # to read a tensor may wait for a device
            raise ValueError(f"A param group must have its {alias} as group['{key}'], which the update reads. Received: "
                             f"group['{alias}'] = {group[alias]!r} beside group['{key}'] = {group[key]!r}. Nothing was updated. "
                             f"Set group['{key}'] instead, and remove group['{alias}'].")


def _check_tensors(param: torch.Tensor, state: Mapping[str, Any], shapes: Mapping[str, Tuple[int, ...]]) -> None:
    """Refuse what somebody has put into the state of ``param``, where it cannot be the rule's."""
    for key, shape in shapes.items():
        found = state.get(key)
        if key in state and not (isinstance(found, torch.Tensor) and found.shape == shape and found.layout is torch.strided
                                 and found.device == param.device and found.dtype in TYPES):
            raise ValueError(f'{key!r} in the state of a parameter of shape {tuple(param.shape)} must be a tensor of shape '
                             f"{tuple(shape)}, dense, on {param.device} and one of {', '.join(map(str, TYPES))}. Received: "
                             f'{_described(found)}. Nothing was updated. Put back what the optimizer had there, or load a '
                             'state with `load_state_dict`.')


def _described(found: Any) -> str:
    if not isinstance(found, torch.Tensor):
        return type(found).__name__
    return f'{tuple(found.shape)}, {found.layout}, {found.device}, {found.dtype}'


def _count(param: torch.Tensor, step: Any) -> float:
    """The number of updates that a user has put into the state of ``param``."""
    try:
        number = float('nan' if isinstance(step, str) else step)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = float('nan')
    if not (0 <= number <= MOST_UPDATES and number.is_integer()):
        raise ValueError(not_a_count(param, step))
    return number


def _check_kept(which: str, kept: Container[str], multi_precision: Any) -> None:
    """Refuse a state, with the names ``kept``, that another setting has begun."""
    kahan = multi_precision == KAHAN
    if ('master' in kept) > (not kahan) or (COMPENSATION.torch in kept) > kahan:
        has = 'a master' if kahan else 'a compensation'
        raise ValueError(f'{which} must have a master for multi_precision=True, or a compensation for {KAHAN!r}. Received: {has} '
                         f'in a group with multi_precision={multi_precision!r}. Leave the group as it began.')


def _cannot_compensate(which: str, param: torch.Tensor, state: Mapping[str, Any]) -> str:
    dtype = state[COMPENSATION.torch].dtype
    return (f'{which} of shape {tuple(param.shape)} must be {dtype}, as its compensation in the state is. Received: {param.dtype}. '
            f'Make it {dtype} again; or add the compensation to it, param.data += compensation.to(param.dtype), and remove that '
            'from the state.')


def _check_param(param: Any) -> None:
    if isinstance(param, torch.Tensor) and (param.dtype not in TYPES or param.layout is not torch.strided):
        raise ValueError(f"A parameter must be dense and one of {', '.join(map(str, TYPES))}. Received: {param.dtype}, "
                         f'{param.layout}, shape {tuple(param.shape)}. Leave it out, or convert it first.')


def _check_once(params: Sequence[Any]) -> None:
    seen = [id(param[1] if isinstance(param, tuple) else param) for param in params]
    if len(set(seen)) < len(seen):
        first = next(place for place, one in enumerate(seen) if one in seen[:place])
        raise ValueError(f'A parameter may be in a group once. Received: number {first} of {len(seen)}, a second time. Tied '
                         'weights are one parameter: pass it once, as model.parameters() does.')


def _check_names(mine: Sequence[str], saved: Sequence[str]) -> None:
    """PyTorch matches by position. If names that both sides have contradict that, the order is wrong."""
    known = {name: position for position, name in enumerate(mine)}
    moved = [name for position, name in enumerate(saved) if known.get(name, position) != position]
    if moved:
        raise ValueError(f'The parameters must be in the same order on both sides. Received: {moved[0]!r} at position '
                         f'{list(saved).index(moved[0])} of the state and {known[moved[0]]} of this optimizer. Convert again with '
                         "the names in this optimizer's order, to_torch(states, params=[...]); or, if they mean other things here, "
                         'make the optimizer from parameters without names.')


def _check_dense(gradients: Iterable[torch.Tensor]) -> None:
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            raise ValueError(f'A gradient must be dense. Received: {gradient.layout} for a parameter of shape '
                             f'{tuple(gradient.shape)}. Create its layer with sparse=False, or give that parameter to another '
                             'optimizer.')
