"""Learning rates as pure functions of the number of the update, one per schedule: `rate` works for any array namespace."""
from .base import Schedule
from .catalog import rate, schedule_of

__all__ = ['Schedule', 'rate', 'schedule_of']
