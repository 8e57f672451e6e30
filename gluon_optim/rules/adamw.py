"""AdamW (Loshchilov and Hutter, arXiv:1711.05101) in PyTorch's convention: the learning rate multiplies the decay."""
from typing import ClassVar, Tuple

from ..schema import Hyper, Slot
from .base import Rule, bias_correction
from .moments import AMSGRAD, BETA1, BETA2, MEAN, VAR, averaging, moments


class AdamW(Rule):
    """Adam with decoupled weight decay.

        w  *= 1 - learning_rate wd
        m   = beta1 m + (1 - beta1) g
        v   = beta2 v + (1 - beta2) g^2             amsgrad: the largest v so far divides
        w  -= learning_rate (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)

    bias_correction=False, as BERT was trained (arXiv:1810.04805; BERTAdam of GluonNLP): m and v stand there undivided.
    """

    name = 'adamw'
    summary = 'Adam with decoupled weight decay'
    paper = 'arXiv:1711.05101'
    peers = ('torch.optim.AdamW', 'optax.adamw')
    hypers: ClassVar[Tuple[Hyper, ...]] = (
        Hyper('learning_rate', 1e-3, '[0, inf)', 'step size'),
        Hyper('wd', 0.01, '[0, inf)', 'weight decay, decoupled; multiplied by the learning rate'),
        BETA1,
        BETA2,
        Hyper('epsilon', 1e-8, '[0, inf)', 'added to the root of the corrected second moment'),
        AMSGRAD,
        Hyper('bias_correction', True, (False, True), 'divide the moments by the sums of their weights'),
    )

    @staticmethod
    def slots(h):
        max_var = Slot('max_var', torch='max_exp_avg_sq', doc='largest `var` so far')
        return (MEAN, VAR, max_var) if h.amsgrad else (MEAN, VAR)

    @staticmethod
    def coefficients(xp, h, t):
        correction1, correction2 = 1.0, 1.0
        if h.bias_correction:
            correction1, correction2 = bias_correction(xp, h.beta1, t), bias_correction(xp, h.beta2, t)
        return dict(averaging(h), keep=1 - h.learning_rate * h.wd,
                    step_size=h.learning_rate / correction1, root_correction2=xp.sqrt(correction2))

    @staticmethod
    def step(xp, h, c, w, g, s):
        mean, var = moments(c, s, g)
        slots = dict(mean=mean, var=var)
        if h.amsgrad:
            var = slots['max_var'] = xp.maximum(s.max_var, var)
        return c.keep * w - c.step_size * mean / (xp.sqrt(var) / c.root_correction2 + c.eps), slots
