"""PyTorch: every registered optimizer as a ``torch.optim.Optimizer``, and the states of a Gluon run to and from PyTorch.

>>> import gluon_optim.torch, torch
>>> weight = torch.nn.Parameter(torch.ones(2))
>>> optimizer = gluon_optim.torch.create('sgd_torch', [weight], lr=0.5, momentum=0.9)
>>> weight.grad = torch.tensor([1.0, 2.0])
>>> optimizer.step()
>>> weight.data, optimizer.state[weight]['momentum_buffer']
(tensor([0.5000, 0.0000]), tensor([1., 2.]))

Works with PyTorch 2.2 and later.
"""
from ..requirements import missing

try:
    import torch as torch  # `from gluon_optim.torch import torch` says what to install
except ImportError as error:
    raise missing('gluon_optim.torch', 'PyTorch', 'torch', error) from error

from .lr_scheduler import ScheduleLR, scheduler
from .optimizer import RuleOptimizer, create, param_groups
from .states import from_torch, to_torch

__all__ = ['RuleOptimizer', 'ScheduleLR', 'create', 'from_torch', 'param_groups', 'scheduler', 'to_torch']
