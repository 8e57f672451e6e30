"""SGD with momentum in PyTorch's convention (torch.optim.SGD): the learning rate stays outside the buffer.

MXNet's own `sgd` stores -learning_rate times the gradients in its momentum; the two differ whenever the rate changes.
"""
from ..schema import Hyper, Slot
from .base import Rule


class SGDTorch(Rule):
    """Stochastic gradient descent, PyTorch's convention.

        u   = g + wd w
        b_1 = u,   b_t = momentum b_{t-1} + (1 - dampening) u
        w  -= learning_rate (nesterov: u + momentum b_t; else b_t)
    """

    name = 'sgd_torch'
    summary = "SGD with momentum in PyTorch's convention: the learning rate is outside the buffer"
    paper = 'Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013'
    peers = ('torch.optim.SGD',)
    hypers = (
        Hyper('learning_rate', 1e-3, '[0, inf)', 'step size'),
        Hyper('wd', 0.0, '[0, inf)', 'weight decay, added to the gradient'),
        Hyper('momentum', 0.0, '[0, inf)', 'decay of the momentum buffer; 0 keeps none'),
        Hyper('dampening', 0.0, '(-inf, inf)', 'share of the gradient left out of the buffer from the second update on'),
        Hyper('nesterov', False, (False, True), "Nesterov's momentum"),
    )

    @staticmethod
    def check(h):
        if h.nesterov and (h.momentum == 0 or h.dampening != 0):
            raise ValueError('`nesterov=True` needs momentum > 0 and dampening = 0. '
                             f'Received: momentum={h.momentum}, dampening={h.dampening}. Set both, or nesterov=False.')

    @staticmethod
    def slots(h):
        if h.momentum == 0:
            return ()
        return (Slot('momentum_buffer', torch='momentum_buffer', doc='decayed sum of gradients'),)

    @staticmethod
    def coefficients(xp, h, t):
        later = xp.where(t > 1, 1.0, 0.0)  # the first update fills the buffer, undampened
        return dict(lr=h.learning_rate, wd=h.wd, mu=h.momentum, mu_buffer=h.momentum * later, a=1 - h.dampening * later)

    @staticmethod
    def step(xp, h, c, w, g, s):
        u = g + c.wd * w
        if 'momentum_buffer' not in s:
            return w - c.lr * u, {}
        buffer = c.mu_buffer * s.momentum_buffer + c.a * u
        return w - c.lr * (u + c.mu * buffer if h.nesterov else buffer), dict(momentum_buffer=buffer)
