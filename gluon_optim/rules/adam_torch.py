"""Adam (Kingma and Ba, arXiv:1412.6980) in PyTorch's convention (torch.optim.Adam).

MXNet's own `adam` adds epsilon before the bias correction; here it comes after, as in the paper's Algorithm 1.
"""
from ..schema import Hyper
from .adamw import AdamW
from .moments import AMSGRAD, BETA1, BETA2


class AdamTorch(AdamW):
    """AdamW, except that the decay goes through the moments.

        u   = g + wd w
        m   = beta1 m + (1 - beta1) u
        v   = beta2 v + (1 - beta2) u^2             amsgrad: the largest v so far divides
        w  -= learning_rate (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)
    """

    name = 'adam_torch'
    summary = "Adam in PyTorch's convention: epsilon after the bias correction, decay in the gradient"
    paper = 'arXiv:1412.6980'
    peers = ('torch.optim.Adam', 'optax.adam (wd=0)')
    hypers = (
        Hyper('learning_rate', 1e-3, '[0, inf)', 'step size'),
        Hyper('wd', 0.0, '[0, inf)', 'weight decay, added to the gradient'),
        BETA1,
        BETA2,
        Hyper('epsilon', 1e-8, '[0, inf)', 'added to the root of the corrected second moment'),
        AMSGRAD,
    )

    @staticmethod
    def coefficients(xp, h, t):
        return dict(AdamW.coefficients(xp, h.replace(wd=0.0, bias_correction=True), t), wd=h.wd)

    @staticmethod
    def step(xp, h, c, w, g, s):
        return AdamW.step(xp, h, c, w, g + c.wd * w, s)
