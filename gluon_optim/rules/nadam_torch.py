"""NAdam (Dozat, Incorporating Nesterov momentum into Adam, ICLR workshop 2016) as torch.optim.NAdam computes it.

MXNet's own `nadam` has one momentum schedule per optimizer and multiplies it once for each parameter; here every
parameter has its own.
"""
import math

from ..schema import Hyper, Slot
from .base import Rule, bias_correction
from .moments import BETA1, BETA2, DECOUPLED_WD, MEAN, VAR, averaging, decay, decayed, moments


class NAdamTorch(Rule):
    """Adam with Nesterov's momentum and a momentum that warms up.

        u    = g + wd w                             decoupled_wd: w *= 1 - learning_rate wd instead, u = g
        mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2)
        M    = M mu_t                               (M is 1 before the first update)
        m    = beta1 m + (1 - beta1) u
        v    = beta2 v + (1 - beta2) u^2
        w   -= learning_rate ((1 - mu_t) u / (1 - M) + mu_{t+1} m / (1 - M mu_{t+1}))
               / (sqrt(v / (1 - beta2^t)) + epsilon)
    """

    name = 'nadam_torch'
    summary = "Adam with Nesterov's momentum, PyTorch's convention"
    paper = 'Dozat, Incorporating Nesterov Momentum into Adam, ICLR 2016 workshop'
    peers = ('torch.optim.NAdam',)
    hypers = (
        Hyper('learning_rate', 2e-3, '[0, inf)', 'step size'),
        Hyper('wd', 0.0, '[0, inf)', 'weight decay, added to the gradient'),
        BETA1,
        BETA2,
        Hyper('epsilon', 1e-8, '[0, inf)', 'added to the root of the corrected second moment'),
        Hyper('momentum_decay', 4e-3, '[0, inf)', 'how fast the momentum grows from beta1/2 to beta1, per update'),
        DECOUPLED_WD,
    )

    @staticmethod
    def slots(h):
        return MEAN, VAR, Slot('mu_product', 'scalar', 1.0, torch='mu_product', doc='product of the momenta so far')

    @staticmethod
    def coefficients(xp, h, t):
        def momentum(step):
            return h.beta1 * (1 - 0.5 * xp.exp(step * (h.momentum_decay * math.log(0.96))))

        mu = momentum(t)
        return dict(averaging(h), **decay(h), mu=mu, mu_next=momentum(t + 1), lr_gradient=h.learning_rate * (1 - mu),
                    lr=h.learning_rate, root_correction2=xp.sqrt(bias_correction(xp, h.beta2, t)))

    @staticmethod
    def step(xp, h, c, w, g, s):
        w, u = decayed(h, c, w, g)
        mean, var = moments(c, s, u)
        mu_product = c.mu * s.mu_product
        next_product = c.mu_next * mu_product
        update = c.lr_gradient / (1 - mu_product) * u + c.lr * (c.mu_next / (1 - next_product)) * mean
        return w - update / (xp.sqrt(var) / c.root_correction2 + c.eps), dict(mean=mean, var=var, mu_product=mu_product)
