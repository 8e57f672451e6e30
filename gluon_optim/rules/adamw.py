"""AdamW (Loshchilov and Hutter, arXiv:1711.05101) in PyTorch's convention: the learning rate multiplies the decay."""
from ..schema import Hyper, Slot
from .base import Rule, bias_correction


class AdamW(Rule):
    """Adam with decoupled weight decay.

        w  *= 1 - learning_rate wd
        m   = beta1 m + (1 - beta1) g
        v   = beta2 v + (1 - beta2) g^2             amsgrad: the largest v so far divides
        w  -= learning_rate (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)
    """

    name = 'adamw'
    summary = 'Adam with decoupled weight decay'
    paper = 'arXiv:1711.05101'
    peers = ('torch.optim.AdamW', 'optax.adamw')
    hypers = (
        Hyper('learning_rate', 1e-3, '[0, inf)', 'step size'),
        Hyper('wd', 0.01, '[0, inf)', 'weight decay, decoupled; multiplied by the learning rate'),
        Hyper('beta1', 0.9, '[0, 1)', 'decay of the mean of gradients'),
        Hyper('beta2', 0.999, '[0, 1)', 'decay of the mean of squared gradients'),
        Hyper('epsilon', 1e-8, '[0, inf)', 'added to the root of the corrected second moment'),
        Hyper('amsgrad', False, (False, True), 'divide by the largest second moment so far (arXiv:1904.09237)'),
    )

    @staticmethod
    def slots(h):
        mean = Slot('mean', torch='exp_avg', optax='mu', doc='decayed mean of gradients')
        var = Slot('var', torch='exp_avg_sq', optax='nu', doc='decayed mean of squared gradients')
        max_var = Slot('max_var', torch='max_exp_avg_sq', optax='nu_max', doc='largest `var` so far')
        return (mean, var, max_var) if h.amsgrad else (mean, var)

    @staticmethod
    def coefficients(xp, h, t):
        correction1, correction2 = bias_correction(xp, h.beta1, t), bias_correction(xp, h.beta2, t)
        return dict(keep=1 - h.learning_rate * h.wd, b1=h.beta1, a1=1 - h.beta1, b2=h.beta2, a2=1 - h.beta2,
                    step_size=h.learning_rate / correction1, root_correction2=xp.sqrt(correction2), eps=h.epsilon)

    @staticmethod
    def step(xp, h, c, w, g, s):
        mean = c.b1 * s.mean + c.a1 * g
        var = c.b2 * s.var + c.a2 * (g * g)
        slots = dict(mean=mean, var=var)
        if h.amsgrad:
            var = slots['max_var'] = xp.maximum(s.max_var, var)
        return c.keep * w - c.step_size * mean / (xp.sqrt(var) / c.root_correction2 + c.eps), slots
