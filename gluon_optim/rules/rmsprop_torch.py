"""RMSprop (Tieleman and Hinton, 2012) in PyTorch's convention (torch.optim.RMSprop), and its bias-corrected form.

MXNet's own `rmsprop` adds epsilon inside the root and, centered, keeps the learning rate in the buffer.
"""
from ..schema import Hyper, Slot
from .base import Rule, bias_correction


class RMSpropTorch(Rule):
    """Gradients divided by their running root mean square.

        u  = g + wd w
        v  = rho v + (1 - rho) u^2
        a  = rho a + (1 - rho) u                                         centered
        d  = sqrt(v) + epsilon                                           centered: sqrt(max(v - a^2, 0)) + epsilon
        b  = momentum b + u / d
        w -= learning_rate b

    bias_correction: v / (1 - rho^t) replaces v in d. The mean a is not corrected: otherwise d would be 0 at the first update.
    Where rounding makes v - a^2 negative, PyTorch's root of it is NaN; here it is 0.
    """

    name = 'rmsprop_torch'
    summary = "gradients divided by their running root mean square, PyTorch's convention; optional bias correction"
    paper = 'Tieleman and Hinton, Lecture 6.5, COURSERA: Neural networks for machine learning, 2012; centered: arXiv:1308.0850'
    peers = ('torch.optim.RMSprop',)
    hypers = (
        Hyper('learning_rate', 0.01, '[0, inf)', 'step size'),
        Hyper('wd', 0.0, '[0, inf)', 'weight decay, added to the gradient'),
        Hyper('rho', 0.99, '[0, 1)', 'decay of the mean of squared gradients (alpha in PyTorch)'),
        Hyper('epsilon', 1e-8, '[0, inf)', 'added to the root'),
        Hyper('momentum', 0.0, '[0, inf)', 'decay of the momentum buffer; 0 keeps none'),
        Hyper('centered', False, (False, True), 'subtract the squared mean of gradients: divide by their standard deviation'),
        Hyper('bias_correction', False, (False, True), 'divide the mean of squares by the sum of its weights'),
    )

    @staticmethod
    def slots(h):
        mean_sq = Slot('mean_sq', torch='square_avg', doc='decayed mean of squared gradients')
        mean = Slot('mean', torch='grad_avg', doc='decayed mean of gradients')
        buffer = Slot('momentum_buffer', torch='momentum_buffer', doc='decayed sum of divided gradients')
        return (mean_sq,) + ((mean,) if h.centered else ()) + ((buffer,) if h.momentum > 0 else ())

    @staticmethod
    def coefficients(xp, h, t):
        return dict(lr=h.learning_rate, wd=h.wd, rho=h.rho, a=1 - h.rho, eps=h.epsilon, mu=h.momentum,
                    weights=bias_correction(xp, h.rho, t))

    @staticmethod
    def step(xp, h, c, w, g, s):
        u = g + c.wd * w
        slots = dict(mean_sq=c.rho * s.mean_sq + c.a * (u * u))
        variance = slots['mean_sq'] / c.weights if h.bias_correction else slots['mean_sq']
        if h.centered:
            mean = slots['mean'] = c.rho * s.mean + c.a * u
            variance = xp.maximum(variance - mean * mean, 0.0)
        update = u / (xp.sqrt(variance) + c.eps)
        if 'momentum_buffer' in s:
            update = slots['momentum_buffer'] = c.mu * s.momentum_buffer + update
        return w - c.lr * update, slots
