"""Learning rates as pure functions of the number of the update, one per schedule: `rate` works for any array namespace.

>>> import numpy, gluon_optim as go
>>> drops = {'class': 'mxnet.lr_scheduler.MultiFactorScheduler', 'attributes': dict(
...     step=[10, 20], factor=0.1, count=0, cur_step_ind=0, base_lr=1.0, warmup_steps=0, warmup_begin_lr=0,
...     warmup_final_lr=1.0, warmup_mode='linear')}
>>> go.rate(drops, numpy.array([1, 11, 21])).round(6).tolist()
[1.0, 0.1, 0.01]
"""
from .base import Schedule
from .catalog import after, rate, record, schedule_of

__all__ = ['Schedule', 'after', 'rate', 'record', 'schedule_of']
