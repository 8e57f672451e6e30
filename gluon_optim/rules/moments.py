"""What Adam's relatives share: the two moments, and the two kinds of weight decay."""
from typing import Any, Dict, Tuple

from ..schema import Hyper, Slot, Values

__all__ = ['AMSGRAD', 'BETA1', 'BETA2', 'DECOUPLED_WD', 'MEAN', 'VAR', 'averaging', 'decay', 'decayed', 'moments']

BETA1 = Hyper('beta1', 0.9, '[0, 1)', 'decay of the mean of gradients')
BETA2 = Hyper('beta2', 0.999, '[0, 1)', 'decay of the mean of squared gradients')
AMSGRAD = Hyper('amsgrad', False, (False, True), 'divide by the largest second moment so far (arXiv:1904.09237)')
DECOUPLED_WD = Hyper('decoupled_wd', False, (False, True), 'shrink the weight by 1 - learning_rate wd instead')

MEAN = Slot('mean', torch='exp_avg', doc='decayed mean of gradients')
VAR = Slot('var', torch='exp_avg_sq', doc='decayed mean of squared gradients')


def averaging(h: Values) -> Dict[str, float]:
    """The coefficients of `moments`, and epsilon."""
    return dict(b1=h.beta1, a1=1 - h.beta1, b2=h.beta2, a2=1 - h.beta2, eps=h.epsilon)


def moments(c: Values, s: Values, g: Any) -> Tuple[Any, Any]:
    """The new mean and mean square: beta1 m + (1 - beta1) g and beta2 v + (1 - beta2) g^2."""
    return c.b1 * s.mean + c.a1 * g, c.b2 * s.var + c.a2 * g * g


def decay(h: Values) -> Dict[str, Any]:
    """The coefficients of `decayed`."""
    return dict(keep=1 - h.learning_rate * h.wd) if h.decoupled_wd else dict(wd=h.wd)


def decayed(h: Values, c: Values, w: Any, g: Any) -> Tuple[Any, Any]:
    """Weight and gradient after decay: w (1 - learning_rate wd) where ``decoupled_wd``, else g + wd w."""
    return (c.keep * w, g) if h.decoupled_wd else (w, g + c.wd * w)
