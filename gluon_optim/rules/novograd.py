"""NovoGrad (Ginsburg et al., arXiv:1905.11286, Algorithm 1): gradients normalized layer by layer, then averaged.

There are five variants, because published implementations differ; each matches its original on recorded trajectories.
The second moment is one number per parameter, so the state is half of Adam's.
"""
from ..schema import Hyper, Slot
from .base import Rule, bias_correction

VARIANTS = ('paper', 'jasper', 'openseq2seq', 'tfa', 'apex')


class NovoGrad(Rule):
    """NovoGrad. |g| is the L2 norm over the whole parameter, of the rescaled and clipped gradient.

        v_1 = |g_1|^2,   v_t = beta2 v_{t-1} + (1 - beta2) |g_t|^2      amsgrad: the largest v so far divides
        u   = g / (sqrt(v_t + epsilon_root) + epsilon) + wd w           grad_averaging: times (1 - beta1)
        m_t = beta1 m_{t-1} + u
        w  -= learning_rate m_t                                         decoupled_wd: w *= 1 - learning_rate wd instead

    This is `variant='paper'` (also optax and pytorch_optimizer). The others differ in:

        jasper       v = |g|^2 while v is 0 (NVIDIA's Jasper, timm, MONAI, torch_optimizer)
        openseq2seq  as jasper, but sqrt(v + epsilon). The original never stores v: its recorded runs equal beta2=0
        tfa          a_t = beta1 a_{t-1} - learning_rate u, w += a_t; grad_averaging from the second update on
        apex         r_1 = |g_1|, r_t = sqrt(beta2 r^2 + (1 - beta2) |g|^2); m = beta1 m + (1 - beta1) g;
                     w -= learning_rate ((m / (1 - beta1^t)) / (r / sqrt(1 - beta2^t) + epsilon) + wd w)
    """

    name = 'novograd'
    summary = 'gradients divided by a running norm per layer, then averaged; half the state of Adam'
    paper = 'arXiv:1905.11286'
    peers = ('timm.optim.NvNovoGrad', 'optax.novograd', 'NVIDIA Jasper', 'NVIDIA OpenSeq2Seq (beta2=0)',
             'tensorflow_addons NovoGrad', 'pytorch_optimizer 4 NovoGrad', 'torch_optimizer.NovoGrad', 'MONAI Novograd')
    hypers = (
        Hyper('learning_rate', 1e-3, '[0, inf)', 'step size'),
        Hyper('wd', 0.0, '[0, inf)', 'weight decay, added to the normalized gradient'),
        Hyper('beta1', 0.95, '[0, 1)', 'decay of the moment'),
        Hyper('beta2', 0.98, '[0, 1)', 'decay of the squared norm; 0 uses only the current norm'),
        Hyper('epsilon', 1e-8, '[0, inf)', 'added to the norm'),
        Hyper('epsilon_root', 0.0, '[0, inf)', 'added to the squared norm'),
        Hyper('grad_averaging', None, (None, False, True), 'multiply what enters the moment by 1 - beta1; None: only in apex'),
        Hyper('amsgrad', False, (False, True), 'divide by the largest norm so far'),
        Hyper('decoupled_wd', False, (False, True), 'shrink the weight by 1 - learning_rate wd instead'),
        Hyper('variant', 'paper', VARIANTS, 'which implementation to follow'),
    )

    @staticmethod
    def check(h):
        refused = {'openseq2seq': ('amsgrad', 'decoupled_wd', 'epsilon_root'),
                   'tfa': ('amsgrad', 'decoupled_wd', 'epsilon_root'),
                   'apex': ('amsgrad', 'decoupled_wd', 'epsilon_root')}
        for name in refused.get(h.variant, ()):
            if getattr(h, name):
                raise ValueError(f"`{name}` is not defined for variant='{h.variant}'. Received: {name}={getattr(h, name)!r}. "
                                 f"Leave it out, or use variant='paper' or 'jasper', which define it.")

    @staticmethod
    def slots(h):
        mean = Slot('mean', torch='exp_avg', doc='moment of the normalized gradients')
        norm_sq = Slot('norm_sq', 'scalar', torch='exp_avg_sq', doc='running squared norm of the gradient')
        if h.variant == 'apex':
            norm = Slot('norm', 'scalar', torch='exp_avg_norm', doc='running norm of the gradient')
            return mean._replace(doc='moment of the raw gradients'), norm
        max_norm_sq = Slot('max_norm_sq', 'scalar', torch='max_exp_avg_sq', doc='largest `norm_sq` so far')
        return (mean, norm_sq, max_norm_sq) if h.amsgrad else (mean, norm_sq)

    @staticmethod
    def coefficients(xp, h, t):
        first = xp.where(t == 1, 1.0, 0.0)
        b2, a2 = h.beta2 * (1 - first), first + (1 - first) * (1 - h.beta2)  # the first update sets v, later ones average
        averaging = h.variant == 'apex' if h.grad_averaging is None else h.grad_averaging
        a1 = 1 - h.beta1 if averaging else 1.0
        if h.variant == 'tfa':
            a1 = first + (1 - first) * a1
        c = dict(lr=h.learning_rate, wd=h.wd, b1=h.beta1, a1=a1, b2=b2, a2=a2, eps=h.epsilon, eps_root=h.epsilon_root)
        if h.variant == 'jasper' or h.variant == 'openseq2seq':
            c.update(b2=h.beta2, a2=1 - h.beta2)
        if h.variant == 'apex':
            c.update(c1=bias_correction(xp, h.beta1, t), c2=xp.sqrt(bias_correction(xp, h.beta2, t)))
        if h.decoupled_wd:
            c.update(keep=1 - h.learning_rate * h.wd, wd=0.0)
        return c

    @staticmethod
    def step(xp, h, c, w, g, s):
        n2 = xp.sum(g * g)
        if h.variant == 'apex':
            norm = xp.sqrt(c.b2 * (s.norm * s.norm) + c.a2 * n2)
            mean = c.b1 * s.mean + c.a1 * g
            return w - c.lr * ((mean / c.c1) / (norm / c.c2 + c.eps) + c.wd * w), dict(mean=mean, norm=norm)

        norm_sq = c.b2 * s.norm_sq + c.a2 * n2
        if h.variant in ('jasper', 'openseq2seq'):
            norm_sq = xp.where(s.norm_sq == 0, n2, norm_sq)
        slots = dict(norm_sq=norm_sq)
        if h.amsgrad:
            norm_sq = slots['max_norm_sq'] = xp.maximum(s.max_norm_sq, norm_sq)
        if h.variant == 'openseq2seq':
            denominator = xp.sqrt(norm_sq + c.eps)
        else:
            denominator = xp.sqrt(norm_sq + c.eps_root) + c.eps

        u = c.a1 * (g / denominator + c.wd * w)
        if h.variant == 'tfa':
            mean = c.b1 * s.mean - c.lr * u
            return w + mean, dict(slots, mean=mean)
        mean = c.b1 * s.mean + u
        if h.decoupled_wd:
            w = c.keep * w
        return w - c.lr * mean, dict(slots, mean=mean)
