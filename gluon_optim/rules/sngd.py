"""Stochastic normalized gradient descent: the two forms from which a course on large batches derives LARS and NovoGrad."""
from ..schema import Hyper
from .base import Rule, divided, norm


class SNGD(Rule):
    """Steps along the gradient with a length that does not depend on it. |x| is the L2 norm over the whole parameter.

        w -= learning_rate (g / (|g| + epsilon) + wd w)             the length is learning_rate
        w -= learning_rate (|w| g / (|g| + epsilon) + wd w)         scale_by_weight_norm: it is learning_rate |w|

    The course leaves decay out; here it is added as in the first form, unscaled. With scale_by_weight_norm a parameter of
    zeros stays zero.
    """

    name = 'sngd'
    summary = 'steps along the gradient, of fixed length or proportional to the norm of the weight'
    paper = 'stochastic normalized gradient descent, as taught before LARS; no single paper'
    hypers = (
        Hyper('learning_rate', 0.01, '[0, inf)', 'length of a step'),
        Hyper('wd', 0.0, '[0, inf)', 'weight decay, added to the normalized gradient'),
        Hyper('scale_by_weight_norm', False, (False, True), 'multiply the normalized gradient by the norm of the weight'),
        Hyper('epsilon', 1e-12, '[0, inf)', 'added to the norm of the gradient'),
    )

    @staticmethod
    def slots(h):
        return ()

    @staticmethod
    def coefficients(xp, h, t):
        return dict(lr=h.learning_rate, wd=h.wd, eps=h.epsilon)

    @staticmethod
    def step(xp, h, c, w, g, s):
        u = divided(xp, g, norm(xp, g) + c.eps)
        if h.scale_by_weight_norm:
            u = norm(xp, w) * u
        return w - c.lr * (u + c.wd * w), {}
