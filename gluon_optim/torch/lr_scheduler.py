"""A schedule of Gluon as a scheduler of PyTorch."""
from typing import Any, Dict, List, Optional, Sequence, Union

import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from ..mapping.scheduling import Carried, carried, waits_for_a_metric
from ..schedules import rate, schedule_of
from ..schema import check_int

__all__ = ['ScheduleLR', 'scheduler']


class Rate:
    """What `ScheduleLR` calls for one param group: the rate after ``epoch`` updates, in units of the group's ``initial_lr``.

    Its attributes are plain values, so that ``state_dict()`` of the scheduler holds the whole schedule.
    """

    def __init__(self, schedule: Dict[str, Any], begin: int, lr_mult: float, initial_lr: float):
        self.schedule, self.begin, self.lr_mult, self.initial_lr = schedule, begin, lr_mult, initial_lr

    def lr(self, epoch: int) -> float:
        """The rate itself, rounded as in Gluon."""
        return float(rate(self.schedule, epoch + 1)) * self.lr_mult

    def __call__(self, epoch: int) -> float:
        return self.lr(epoch) / self.initial_lr if self.initial_lr else 0.0


class ScheduleLR(LambdaLR):
    """The scheduler that `scheduler` makes: after k calls of ``step()`` every group has the rate of update ``num_update + k + 1``.

    ``last_epoch`` is the number of updates done, as MXNet counts them for its schedulers. ``state_dict()`` holds the schedule
    too, as plain values: `torch.load(weights_only=True)` reads it, `scheduler` makes the same scheduler from it, and
    `gluon_optim.from_torch` takes it back to MXNet. Parameters are ``optimizer`` and, for each group, one of ``rates``;
    ``num_update`` updates are done.

    Raises what ``LambdaLR`` raises.

    >>> import torch, gluon_optim as go
    >>> half = {'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': dict(
    ...     step=2, factor=0.5, stop_factor_lr=1e-8, count=0, base_lr=0.4, warmup_steps=0, warmup_begin_lr=0,
    ...     warmup_final_lr=0.4, warmup_mode='linear')}
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.4)
    >>> go.torch.scheduler(optimizer, half).state_dict()['last_epoch']
    0
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rates: Sequence[Rate], num_update: int):
        super().__init__(optimizer, list(rates), last_epoch=num_update - 1)

    def get_lr(self) -> List[Any]:
        """The rates of the groups, without the rounding of a product with ``initial_lr``."""
        return [one.lr(self.last_epoch) for one in self.lr_lambdas]  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; also sets the rates of the groups, whatever they are now."""
        super().load_state_dict(state_dict)
        rates = self.get_lr()
        self._last_lr = list(rates)
        for group, lr in zip(self.optimizer.param_groups, rates):
            _set(group, lr)


def scheduler(optimizer: torch.optim.Optimizer, schedule: Any, num_update: Optional[int] = None
              ) -> Union[ScheduleLR, ReduceLROnPlateau]:
    """A scheduler of PyTorch that gives ``optimizer`` the rates that Gluon would have used.

    Group ``i`` gets, for its next update and after each ``step()``, which belongs after ``optimizer.step()``,

        lr = lr_mult[i] go.rate(schedule, num_update + 1 + k),   k = 0, 1, 2, ... calls of step()

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Made by `create`, or of any class. ``lr_mult[i]`` is ``lr_mult`` of a group, as `to_torch` writes it. Groups without it
        keep their ratios: 1 for those with the optimizer's own ``lr``, or for the first if there are none.
    schedule
        A scheduler of MXNet or of `gluon_optim.lr_scheduler`; its record, as in `OptimizerStates.scheduler`; what `to_torch`
        writes as ``state_dict['scheduler']``; ``state_dict()`` of a scheduler that this function made; or `OptimizerStates`.
    num_update : int, optional
        The number of updates done, as MXNet counts them. By default the largest number in the optimizer's state, which includes
        those after a conversion; without a state what ``schedule`` says, else 0.

    Returns
    -------
    ScheduleLR or torch.optim.lr_scheduler.ReduceLROnPlateau
        A ``LambdaLR``; for a schedule that depends on a metric, PyTorch's own, with its history: call ``step(metric)``.

    Raises
    ------
    ValueError
        If the attributes are not those of a scheduler, or the number of updates is negative or not known.
    TypeError
        For a scheduler of a class that is not known here.

    >>> half = {'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': dict(
    ...     step=2, factor=0.5, stop_factor_lr=1e-8, count=0, base_lr=0.4, warmup_steps=0, warmup_begin_lr=0,
    ...     warmup_final_lr=0.4, warmup_mode='linear')}
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.4)
    >>> continued, rates = scheduler(optimizer, half, num_update=1), []
    >>> for _ in range(4):
    ...     rates.append(optimizer.param_groups[0]['lr'])
    ...     optimizer.step()
    ...     continued.step()
    >>> rates
    [0.4, 0.2, 0.2, 0.1]
    """
    found = carried(schedule)
    rule, h = schedule_of(found.record)
    done = _updates_done(optimizer, found, num_update)
    mults = _multipliers(optimizer)
    for group, mult in zip(optimizer.param_groups, mults):
        group.setdefault('initial_lr', float(group['lr']))  # which PyTorch demands of an optimizer that is not new
        group.setdefault('lr_mult', mult)  # for the way back
    if waits_for_a_metric(rule, h):
        return _plateau(optimizer, found, done, mults)
    rates = [Rate(found.record, found.begin, mult, float(group['initial_lr']))
             for group, mult in zip(optimizer.param_groups, mults)]
    return ScheduleLR(optimizer, rates, done)


def _plateau(optimizer: torch.optim.Optimizer, found: Carried, done: int, mults: Sequence[float]) -> ReduceLROnPlateau:
    """PyTorch's own, where `Plateau` was: with the rates that it had, the best metric, and the counts."""
    rule, h = schedule_of(found.record)
    if not rule.history:
        raise ValueError(f'A schedule that depends on a metric must be a Plateau. Received: one within {found.record["class"]}, of '
                         'which PyTorch has no equal: its ReduceLROnPlateau cannot be part of another. Set the rate at each step: '
                         'go.rate(schedule, num_update).')
    now = float(rate(found.record, done + 1))
    for group, mult in zip(optimizer.param_groups, mults):
        _set(group, now * mult)
    made = ReduceLROnPlateau(
        optimizer, h.mode, h.factor, h.patience, h.threshold, h.threshold_mode, h.cooldown,
        min_lr=[h.final_lr * mult for mult in mults], eps=h.epsilon * min(mults))
    made.best = made.mode_worse if h.best is None else h.best
    made.num_bad_epochs, made.cooldown_counter = h.bad, h.cooling
    vars(made)['carried'] = dict(found.record, num_update=done, begin_num_update=found.begin, lr_mult=mults[0], rate=now)
    return made


def _updates_done(optimizer: torch.optim.Optimizer, found: Carried, given: Optional[int]) -> int:
    if given is not None:
        return check_int('num_update', given, 0)
    states = [state for state in optimizer.state.values() if state]
    counts = [int(state['step']) for state in states if 'step' in state]
    if states and not counts and found.num_update is None:
        raise ValueError(f'`num_update` must be given: {type(optimizer).__name__} has been updated, and does not count its '
                         'updates. Received: None. Pass the number of updates done, or states, which hold it.')
    return found.at(counts)


def _multipliers(optimizer: torch.optim.Optimizer) -> List[float]:
    """lr_mult of each group: its own, or what its rate is to that of the others."""
    groups = optimizer.param_groups
    rates = [float(group.get('initial_lr', group['lr'])) for group in groups]
    default = optimizer.defaults.get('lr')
    base = default if default in rates else rates[0]
    return [float(group.get('lr_mult', lr / base if base else 1.0)) for group, lr in zip(groups, rates)]


def _set(group: Dict[str, Any], lr: float) -> None:
    if isinstance(group['lr'], torch.Tensor):
        group['lr'].fill_(lr)
    else:
        group['lr'] = lr
