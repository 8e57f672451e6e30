"""What a training run's optimizer holds, as NumPy arrays under names: no framework, no device."""
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import numpy

__all__ = ['OptimizerStates', 'ParameterInfo']


@dataclass
class ParameterInfo:
    """One parameter as its trainer knew it, in trainer order."""

    name: str                      # the key of everything below: structural where the net was given, else Parameter.name
    full_name: str                 # Parameter.name
    shape: Tuple[int, ...]
    dtype: str                     # of the weight: 'float16', 'float32', 'float64'
    lr_mult: float = 1.0
    wd_mult: float = 1.0


@dataclass
class OptimizerStates:
    """An optimizer's state, ready to be saved, inspected or converted.

    ``optimizer``   registered name, e.g. 'novograd'
    ``hypers``      every hyper-parameter by MXNet's name; learning_rate, wd, rescale_grad, clip_gradient included
    ``num_update``  MXNet's global update number, what a scheduler sees (begin_num_update included)
    ``names``       parameters in trainer order
    ``counts``      updates that each parameter has seen (t of its last update; begin_num_update not included)
    ``slots``       name -> slot -> array
    ``master``      name -> float32 weights, for parameters trained with multi_precision
    ``scheduler``   {'class': path, 'attributes': {...}} or None
    ``variables``   arrays that belong to the optimizer as a whole
    ``report``      what the reader or a conversion has to say, one string a line
    """

    optimizer: str
    hypers: Dict[str, Any]
    num_update: int
    parameters: List[ParameterInfo]
    counts: Dict[str, int]
    slots: Dict[str, Dict[str, numpy.ndarray]]
    master: Dict[str, numpy.ndarray] = field(default_factory=dict)
    scheduler: Optional[Dict[str, Any]] = None
    variables: Dict[str, numpy.ndarray] = field(default_factory=dict)
    loss_scaler: Optional[Dict[str, Any]] = None
    producer: Dict[str, str] = field(default_factory=dict)
    report: List[str] = field(default_factory=list)

    @property
    def names(self) -> List[str]:
        return [parameter.name for parameter in self.parameters]
