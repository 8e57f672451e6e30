"""Optimizer states as arrays under names, and the files that hold them. Nothing here needs MXNet.

>>> from gluon_optim.states import errors
>>> issubclass(errors.StateFileError, ValueError)
True
"""
