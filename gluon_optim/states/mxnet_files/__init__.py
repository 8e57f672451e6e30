"""MXNet's own files, `.states` and `.params` of all versions, read and written without MXNet. Nothing in them is executed."""
from .reader import read_params, read_states

__all__ = ['read_params', 'read_states']
