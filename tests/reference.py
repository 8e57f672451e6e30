"""The optimizers' mathematics a second time: float64 NumPy, in the notation of the papers, one small function each.

A rule of the package is never its own test: five runtimes derived from one rule agree when the rule is wrong. These
functions import nothing from the package, were written from the papers and from what other projects' real code computes
(named in each docstring), and are held to trajectories recorded from that code (``golden/``).

Each function does one update of one tensor:

    step(h, t, lr, w, g, s) -> new w, new s

``h`` hyper-parameters under the project's public names, ``t`` = 1, 2, ... the number of this update, ``lr`` its learning
rate, ``w`` weight, ``g`` gradient (rescaled and clipped), ``s`` the quantities kept between updates, under the
papers' letters; what was never stored is 0. `trajectory` drives them.
"""
import numpy as np


class Hypers:
    """Hyper-parameters as attributes. Options that are off unless given need not be given; all numbers must be.

    It remembers what was read: a value that no formula asks for is a mistake of the caller.
    """

    off = {'wd': 0.0, 'momentum': 0.0, 'rescale_grad': 1.0, 'clip_gradient': None, 'amsgrad': False, 'decoupled_wd': False,
           'epsilon_root': 0.0, 'grad_averaging': None, 'nesterov': False, 'dampening': 0.0, 'bias_correction': False,
           'centered': False, 'scale_by_weight_norm': False, 'lower_bound': None, 'upper_bound': None}

    def __init__(self, given):
        self._given = dict(given)
        self._read = set()

    def __getattr__(self, name):
        self._read.add(name)
        return self._given[name] if name in self._given else self.off[name]

    def given(self, name, default):
        """An option that has another value than in `off` unless it is given."""
        self._read.add(name)
        return self._given.get(name, default)

    def never_read(self):
        return sorted(set(self._given) - self._read)


class Kept(dict):
    """The quantities between two updates, as attributes; 0 before the first."""

    def __getattr__(self, name):
        return self.get(name, 0.0)


def trajectory(name, hypers, w0, gradients, learning_rates, optimizers=None):
    """[(weight, {letter: value}) after update 1, 2, ...] of the optimizer ``name`` on one tensor; ``optimizers`` are OPTIMIZERS or
    MXNET_2.

    Order: rescale, clip, then everything else (norms, decay); MXNet 2.0's own two clip later, by themselves.
    """
    h, w, s = Hypers(hypers), np.array(w0, np.float64), Kept()
    updates = []
    for t, (g, lr) in enumerate(zip(gradients, learning_rates), 1):
        g = h.rescale_grad * np.asarray(g, np.float64)
        if name not in CLIP_BY_THEMSELVES:
            g = clip(h, g)
        w, s = (optimizers or OPTIMIZERS)[name](h, t, float(lr), w, g, s)
        s = Kept(s)
        updates.append((w, dict(s)))
    if h.never_read():
        raise ValueError(f'{name} with {hypers} has no use for {h.never_read()}')
    return updates


def clip(h, x):
    """Every element within [-clip_gradient, clip_gradient], where that is given."""
    return x if h.clip_gradient is None else np.clip(x, -h.clip_gradient, h.clip_gradient)


def norm(x):
    """L2 norm of the whole tensor."""
    return np.sqrt(np.sum(x * x))


# NovoGrad ----------------------------------------------------------------------------------------------------------------


def novograd(h, t, lr, w, g, s):
    """Ginsburg et al., arXiv:1905.11286, Algorithm 1, in the forms that five projects gave it."""
    return {'paper': novograd_paper, 'jasper': novograd_jasper, 'openseq2seq': novograd_openseq2seq, 'tfa': novograd_tfa,
            'apex': novograd_apex}[h.variant](h, t, lr, w, g, s)


def novograd_paper(h, t, lr, w, g, s):
    """v_1 = |g_1|^2, by count;  m_1 = g_1/(sqrt(v_1) + eps) + d w;  m_t = b1 m + (g/(sqrt(v_t) + eps) + d w);  w -= lr m.

    optax (which adds epsilon_root under the root) and pytorch_optimizer 4 compute it.
    """
    v = norm(g)**2 if t == 1 else h.beta2 * s.v + (1 - h.beta2) * norm(g)**2
    return novograd_outside(h, lr, w, g, s, v)


def novograd_jasper(h, t, lr, w, g, s):
    """As the paper, but v is |g|^2 for as long as it is 0 (Jasper and QuartzNet; timm, MONAI, torch_optimizer)."""
    v = norm(g)**2 if s.v == 0 else h.beta2 * s.v + (1 - h.beta2) * norm(g)**2
    return novograd_outside(h, lr, w, g, s, v)


def novograd_outside(h, lr, w, g, s, v):
    """What paper and jasper share: the learning rate stays outside the moment."""
    kept = {'v': v}
    if h.amsgrad:
        kept['v_max'] = v = np.maximum(s.v_max, v)
    denominator = np.sqrt(v + h.epsilon_root) + h.epsilon
    if h.decoupled_wd:
        w = w - lr * h.wd * w
        u = g / denominator
    else:
        u = g / denominator + h.wd * w
    if h.grad_averaging:
        u = (1 - h.beta1) * u
    kept['m'] = h.beta1 * s.m + u
    return w - lr * kept['m'], kept


def novograd_openseq2seq(h, t, lr, w, g, s):
    """As jasper, epsilon inside the root. The original never assigns v, so what it runs is this with beta2 = 0."""
    v = norm(g)**2 if s.v == 0 else h.beta2 * s.v + (1 - h.beta2) * norm(g)**2
    u = g / np.sqrt(v + h.epsilon) + h.wd * w
    if h.grad_averaging:
        u = (1 - h.beta1) * u
    m = h.beta1 * s.m + u
    return w - lr * m, {'v': v, 'm': m}


def novograd_tfa(h, t, lr, w, g, s):
    """tensorflow_addons: v as in the paper, -lr u inside the moment (Keras), gradient averaging from the second update on."""
    v = norm(g)**2 if t == 1 else h.beta2 * s.v + (1 - h.beta2) * norm(g)**2
    u = g / (np.sqrt(v) + h.epsilon) + h.wd * w
    if h.grad_averaging and t > 1:
        u = (1 - h.beta1) * u
    m = h.beta1 * s.m - lr * u
    return w + m, {'v': v, 'm': m}


def novograd_apex(h, t, lr, w, g, s):
    """Apex's FusedNovoGrad (reg_inside_moment=False): a norm r is averaged, Adam's corrections, decay beside the moment.

    r_0 = |g_1|;  r = sqrt(b2 r^2 + (1-b2)|g|^2);  m = b1 m + b3 g, b3 = 1-b1 or 1;
    w -= lr ( (m/c1) / (r/c2 + eps) + d w ),  c1 = 1 - b1^t, c2 = sqrt(1 - b2^t).
    """
    r = norm(g) if t == 1 else s.r
    r = np.sqrt(h.beta2 * r**2 + (1 - h.beta2) * norm(g)**2)
    beta3 = 1.0 if h.grad_averaging is False else 1 - h.beta1
    m = h.beta1 * s.m + beta3 * g
    c1, c2 = 1 - h.beta1**t, np.sqrt(1 - h.beta2**t)
    return w - lr * (m / c1 / (r / c2 + h.epsilon) + h.wd * w), {'r': r, 'm': m}


# Layer-wise rates ----------------------------------------------------------------------------------------------------------


def larc(h, t, lr, w, g, s):
    """Layer-wise adaptive rate control: the gradient is scaled, then given to an ordinary optimizer ``base``.

    apex:         a = c |w| / (|g| + d |w| + eps);  g <- min(a/lr, 1) (g + d w)  or  a (g + d w);  the base does not decay;
                  where |w| or |g| is 0, g passes as it is.
    openseq2seq:  a = max(c |w| / (lr (|g| + eps)), min_update), g <- min(a, 1) g  or without lr, g <- a g;  decay is the base's.
    """
    d = h.wd
    if h.variant == 'apex':
        if norm(w) != 0 and norm(g) != 0:
            a = h.trust_coefficient * norm(w) / (norm(g) + d * norm(w) + h.epsilon)
            g = (min(a / lr, 1.0) if h.clip else a) * (g + d * w)
        d = 0.0
    else:
        a = h.trust_coefficient * norm(w) / (norm(g) + h.epsilon)
        g = (min(max(a / lr, h.min_update), 1.0) if h.clip else max(a, h.min_update)) * g
    return OPTIMIZERS[h.base](Hypers(dict(h.base_hypers, wd=d)), t, lr, w, g, s)


def sngd(h, t, lr, w, g, s):
    """Stochastic normalized gradient descent of the course: Dw = -lr g/|g|, or -lr |w| g/|g|; decay lr d w in both."""
    u = g / (norm(g) + h.epsilon)
    if h.scale_by_weight_norm:
        u = norm(w) * u
    return w - lr * (u + h.wd * w), {}


def lans(h, t, lr, w, g, s):
    """Zheng et al., arXiv:2006.13484, Algorithm 2, as MXNet 2.0's fused kernel has it; a zero gradient stays zero.

    h = clip(g/|g|);  m, v: Adam's;  s = sqrt(v/(1-b2^t)) + eps;  u_m = m/(1-b1^t)/s + d w;  u_g = h/s + d w;
    w -= lr ( b1 r(u_m) u_m + (1-b1) r(u_g) u_g ),  r(u) = |w|/|u|, |w| within the bounds, 1 where a norm is 0.
    """
    direction = clip(h, g / norm(g) if norm(g) > 0 else g)
    m = h.beta1 * s.m + (1 - h.beta1) * direction
    v = h.beta2 * s.v + (1 - h.beta2) * direction**2
    denominator = np.sqrt(v / (1 - h.beta2**t)) + h.epsilon
    phi = norm(w)
    phi = phi if h.lower_bound is None else max(phi, h.lower_bound)
    phi = phi if h.upper_bound is None else min(phi, h.upper_bound)
    step = 0.0
    for share, x in ((h.beta1, m / (1 - h.beta1**t)), (1 - h.beta1, direction)):
        u = x / denominator + h.wd * w
        ratio = phi / norm(u) if phi > 0 and norm(u) > 0 else 1.0
        step = step + share * ratio * u
    return w - lr * step, {'m': m, 'v': v}


# Momentum and the lectures -------------------------------------------------------------------------------------------------


def sgd_torch(h, t, lr, w, g, s):
    """torch.optim.SGD: b_1 = g_1;  b = mu b + (1 - tau) g;  Nesterov: g + mu b;  w -= lr b."""
    mu, tau, nesterov = h.momentum, h.dampening, h.nesterov
    g = g + h.wd * w
    if mu == 0:
        return w - lr * g, {}
    b = g if t == 1 else mu * s.b + (1 - tau) * g
    return w - lr * (g + mu * b if nesterov else b), {'b': b}


def sgd_ema(h, t, lr, w, g, s):
    """The lecture's parameterization: g~ = mu g~ + (1-mu) g;  w -= lr g~. Corrected: g~/(1-mu^t) wherever g~ stands.

    Nesterov: w -= lr ((1-mu) g + mu g~).
    """
    mu, g = h.momentum, g + h.wd * w
    average = mu * s.g_tilde + (1 - mu) * g
    used = average / (1 - mu**t) if h.bias_correction else average
    return w - lr * ((1 - mu) * g + mu * used if h.nesterov else used), {'g_tilde': average}


def noise_adaptive_sgd(h, t, lr, w, g, s):
    """The lecture's derived algorithm, per element, repaired: B* = 16 sigma^2/g~^2, eta = B/(2 B* L) but at most 1/(2L).

    g~ = (1-r) g~ + r g;  s~ = (1-r) s~ + r g^2;  r = B/B* of the last update within [averaging_min, 1/2], 1 at first;
    sigma^2 = B max(s~ - g~^2, 0). (With r = 1 in a later update s~ = g~^2, B* = 0 and so r = 1 from there on: hence 1/2.)
    """
    B, L = h.batch_size, h.curvature
    with np.errstate(divide='ignore'):
        r = 1.0 if t == 1 else np.clip(B / s.B_star, h.averaging_min, max(h.averaging_min, 0.5))
        g_tilde = (1 - r) * s.g_tilde + r * g
        s_tilde = (1 - r) * s.s_tilde + r * g**2
        sigma2 = B * np.maximum(s_tilde - g_tilde**2, 0)
        B_star = 16 * sigma2 / (g_tilde**2 + h.epsilon)
        eta = np.minimum(B / (2 * B_star * L), 1 / (2 * L))
    return w - lr * eta * (g + h.wd * w), {'g_tilde': g_tilde, 's_tilde': s_tilde, 'B_star': B_star, 'eta': eta}


# The Adam family ------------------------------------------------------------------------------------------------------------


def adam_moments(h, t, g, s):
    """m, v and their bias corrections: Kingma and Ba, arXiv:1412.6980, Algorithm 1."""
    m = h.beta1 * s.m + (1 - h.beta1) * g
    v = h.beta2 * s.v + (1 - h.beta2) * g**2
    return m, v, 1 - h.beta1**t, 1 - h.beta2**t


def adam_torch(h, t, lr, w, g, s):
    """Kingma and Ba; the decay is part of the gradient; epsilon is added to the corrected root (torch.optim.Adam)."""
    return adam_step(h, t, lr, w, g + h.wd * w, s)


def adamw(h, t, lr, w, g, s):
    """Loshchilov and Hutter, arXiv:1711.05101, Algorithm 2, with torch's convention: w <- (1 - lr d) w first.

    Without bias correction it is BERT's (Devlin et al., arXiv:1810.04805): w -= lr (m/(sqrt(v) + eps) + d w).
    """
    return adam_step(h, t, lr, w - lr * h.wd * w, g, s, h.given('bias_correction', True))


def adam_step(h, t, lr, w, g, s, corrected=True):
    """w -= lr m^/(sqrt(v^) + eps); amsgrad (Reddi et al.): the largest v so far in place of v."""
    m, v, c1, c2 = adam_moments(h, t, g, s)
    if not corrected:
        c1 = c2 = 1
    kept = {'m': m, 'v': v}
    if h.amsgrad:
        kept['v_max'] = v = np.maximum(s.v_max, v)
    return w - lr * (m / c1) / (np.sqrt(v / c2) + h.epsilon), kept


def adamax_torch(h, t, lr, w, g, s):
    """Kingma and Ba, Algorithm 2: u = max(b2 u, |g|), torch adds epsilon to |g|;  w -= lr/(1 - b1^t) m/u."""
    g = g + h.wd * w
    m = h.beta1 * s.m + (1 - h.beta1) * g
    u = np.maximum(h.beta2 * s.u, np.abs(g) + h.epsilon)
    return w - lr / (1 - h.beta1**t) * m / u, {'m': m, 'u': u}


def nadam_torch(h, t, lr, w, g, s):
    """Dozat 2016: mu_t = b1 (1 - 0.96^(t psi)/2);  m^ = mu_{t+1} m/(1 - prod mu, to t+1) + (1 - mu_t) g/(1 - prod mu, to t)."""
    if h.decoupled_wd:
        w = w - lr * h.wd * w
    else:
        g = g + h.wd * w
    m, v, _, c2 = adam_moments(h, t, g, s)
    mu, mu_next = (h.beta1 * (1 - 0.96**(k * h.momentum_decay) / 2) for k in (t, t + 1))
    product = mu if t == 1 else s.mu_product * mu
    m_hat = mu_next * m / (1 - product * mu_next) + (1 - mu) * g / (1 - product)
    return w - lr * m_hat / (np.sqrt(v / c2) + h.epsilon), {'m': m, 'v': v, 'mu_product': product}


def radam(h, t, lr, w, g, s):
    """Liu et al., arXiv:1908.03265, Algorithm 2, as torch.optim.RAdam: threshold 5, epsilon added to sqrt(v) uncorrected."""
    if h.decoupled_wd:
        w = w - lr * h.wd * w
    else:
        g = g + h.wd * w
    m, v, c1, c2 = adam_moments(h, t, g, s)
    rho_inf = 2 / (1 - h.beta2) - 1
    rho = rho_inf - 2 * t * h.beta2**t / c2
    update = m / c1
    if rho > 5:
        r = np.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        update = update * r * np.sqrt(c2) / (np.sqrt(v) + h.epsilon)
    return w - lr * update, {'m': m, 'v': v}


def adabelief(h, t, lr, w, g, s):
    """Zhuang et al., arXiv:2010.07468, as MXNet 2.0: epsilon is added to s at every update, and to its root uncorrected.

    s = b2 s + (1-b2)(g - m)^2 + eps;  w -= lr sqrt(1-b2^t)/(1-b1^t) m/(sqrt(s) + eps);  g <- clip(g + d w).
    """
    g = clip(h, g + h.wd * w)
    m = h.beta1 * s.m + (1 - h.beta1) * g
    second = h.beta2 * s.s + (1 - h.beta2) * (g - m)**2 + h.epsilon
    rate = lr * np.sqrt(1 - h.beta2**t) / (1 - h.beta1**t)
    return w - rate * m / (np.sqrt(second) + h.epsilon), {'m': m, 's': second}


# torch's other classics ------------------------------------------------------------------------------------------------------


def rmsprop_torch(h, t, lr, w, g, s):
    """Tieleman and Hinton; Graves, arXiv:1308.0850, eq. 38-45 (centered); epsilon outside the root, lr outside the momentum.

    The blog's form divides the average of squares by 1 - rho^t. It knows no centered form; there the average of gradients
    stays as it is (corrected too, the first variance would be g^2 - g^2, that is rounding noise).
    """
    g = g + h.wd * w
    kept = {'n': h.rho * s.n + (1 - h.rho) * g**2}
    variance = kept['n'] / (1 - h.rho**t) if h.bias_correction else kept['n']
    if h.centered:
        kept['g_bar'] = h.rho * s.g_bar + (1 - h.rho) * g
        variance = variance - kept['g_bar']**2
    u = g / (np.sqrt(variance) + h.epsilon)
    if h.momentum > 0:
        kept['b'] = u = h.momentum * s.b + u
    return w - lr * u, kept


def adagrad_torch(h, t, lr, w, g, s):
    """Duchi et al. 2011: G += g^2;  w -= lr/(1 + (t-1) eta) g/(sqrt(G) + eps)."""
    g = g + h.wd * w
    G = (h.initial_accumulator if t == 1 else s.G) + g**2
    return w - lr / (1 + (t - 1) * h.lr_decay) * g / (np.sqrt(G) + h.epsilon), {'G': G}


def adadelta_torch(h, t, lr, w, g, s):
    """Zeiler, arXiv:1212.5701, Algorithm 1, times a learning rate: RMS(x) = sqrt(E[x^2] + eps)."""
    g = g + h.wd * w
    E_g2 = h.rho * s.E_g2 + (1 - h.rho) * g**2
    dx = np.sqrt(s.E_dx2 + h.epsilon) / np.sqrt(E_g2 + h.epsilon) * g
    E_dx2 = h.rho * s.E_dx2 + (1 - h.rho) * dx**2
    return w - lr * dx, {'E_g2': E_g2, 'E_dx2': E_dx2}


def asgd(h, t, lr, w, g, s):
    """Polyak and Juditsky 1992 as torch.optim.ASGD: the rate of an update was fixed at the end of the one before.

    w <- (1 - lambd eta) w - eta g;  average a += mu (w - a);  then for the next update
    eta = lr/(1 + lambd lr t)^alpha, mu = 1/max(1, t - t0). At first eta = lr and mu = 1.
    """
    eta, mu = (lr, 1.0) if t == 1 else (s.eta, s.mu)
    g = g + h.wd * w
    w = (1 - h.lambd * eta) * w - eta * g
    average = s.a + mu * (w - s.a)
    return w, {'a': average, 'eta': lr / (1 + h.lambd * lr * t)**h.alpha, 'mu': 1 / max(1.0, t - h.t0)}


def rprop(h, t, lr, w, g, s):
    """Riedmiller and Braun 1993 as torch.optim.Rprop: a step size per element, the first learning rate at first.

    It grows by eta_plus where the sign stays, shrinks by eta_minus where it changes (there w rests and g counts as 0).
    """
    change = np.sign(g * s.g)
    size = (lr if t == 1 else s.size) * np.where(change > 0, h.eta_plus, np.where(change < 0, h.eta_minus, 1.0))
    size = np.clip(size, h.step_min, h.step_max)
    g = np.where(change < 0, 0.0, g)
    return w - size * np.sign(g), {'g': g, 'size': size}


def psgld_path(hypers, w0, gradients, learning_rates, noise):
    """Li et al. 2016, Algorithm 1 without Gamma: the weights after each update, and the last V.

    V <- alpha V + (1 - alpha) g g;  G <- 1/(lambda + sqrt(V));  theta <- theta + eps/2 G (-g - d theta) + N(0, eps G T)
    """
    h = Hypers(hypers)
    theta, v, path = w0, 0 * w0, []
    for g, eps, zeta in zip(gradients, learning_rates, noise):
        g = clip(h, h.rescale_grad * g)
        v = h.rho * v + (1 - h.rho) * g ** 2
        preconditioner = 1 / (h.epsilon + np.sqrt(v))
        theta = theta - eps / 2 * preconditioner * (g + h.wd * theta) + np.sqrt(eps * preconditioner * h.temperature) * zeta
        path.append(theta)
    return np.array(path), v


OPTIMIZERS = {f.__name__: f for f in (
    novograd, larc, sngd, lans, sgd_torch, sgd_ema, noise_adaptive_sgd, adam_torch, adamw, adamax_torch, nadam_torch, radam,
    adabelief, rmsprop_torch, adagrad_torch, adadelta_torch, asgd, rprop)}

CLIP_BY_THEMSELVES = ('lans', 'adabelief')


# MXNet 2.0's own where they are not what 1.9.1 computes, after `step` in mxnet/optimizer/*.py of 2.0.0b1, with its names. All
# of them add the decay to the clipped gradient.

def mxnet2_adam(h, t, lr, w, g, s):
    """mean, var of grad + wd weight;  weight -= lr sqrt(coef2)/coef1 mean/(sqrt(var) + epsilon)."""
    g = g + h.wd * w
    mean = h.beta1 * s.mean + (1 - h.beta1) * g
    var = h.beta2 * s.var + (1 - h.beta2) * g**2
    lr *= np.sqrt(1 - h.beta2**t) / (1 - h.beta1**t)
    return w - lr * mean / (np.sqrt(var) + h.epsilon), {'mean': mean, 'var': var}


def mxnet2_adamax(h, t, lr, w, g, s):
    """var = max(beta2 var, |grad|);  weight -= lr/(1 - beta1^t) mean/(var + epsilon)."""
    g = g + h.wd * w
    mean = h.beta1 * s.mean + (1 - h.beta1) * g
    var = np.maximum(h.beta2 * s.var, np.abs(g))
    return w - lr / (1 - h.beta1**t) * mean / (var + h.epsilon), {'mean': mean, 'var': var}


def mxnet2_nadam(h, t, lr, w, g, s):
    """With m_schedule, the product of all momentum_t so far, of one parameter."""
    g = g + h.wd * w
    momentum_t, momentum_t_1 = (h.beta1 * (1 - 0.5 * 0.96**(k * h.schedule_decay)) for k in (t, t + 1))
    m_schedule = np.prod([h.beta1 * (1 - 0.5 * 0.96**(k * h.schedule_decay)) for k in range(1, t + 1)])
    mean = h.beta1 * s.mean + (1 - h.beta1) * g
    var = h.beta2 * s.var + (1 - h.beta2) * g**2
    mean_bar = momentum_t_1 * mean / (1 - m_schedule * momentum_t_1) + (1 - momentum_t) * g / (1 - m_schedule)
    return w - lr * mean_bar / (np.sqrt(var / (1 - h.beta2**t)) + h.epsilon), {'mean': mean, 'var': var}


def mxnet2_adagrad(h, t, lr, w, g, s):
    """history += grad^2;  weight -= lr grad/(sqrt(history) + epsilon)."""
    g = g + h.wd * w
    history = s.history + g**2
    return w - lr * g / (np.sqrt(history) + h.epsilon), {'history': history}


def mxnet2_adadelta(h, t, lr, w, g, s):
    """current_delta = sqrt(acc_delta + epsilon)/sqrt(acc_g + epsilon) grad;  weight -= lr current_delta."""
    g = g + h.wd * w
    acc_g = h.rho * s.acc_g + (1 - h.rho) * g**2
    current_delta = np.sqrt((s.acc_delta + h.epsilon) / (acc_g + h.epsilon)) * g
    return w - lr * current_delta, {'acc_g': acc_g, 'acc_delta': h.rho * s.acc_delta + (1 - h.rho) * current_delta**2}


def mxnet2_rmsprop(h, t, lr, w, g, s):
    """epsilon outside the root, but inside the root of a centered one; its mean is the slot g, var n, mom delta."""
    g = g + h.wd * w
    var = h.rho * s.n + (1 - h.rho) * g**2
    kept = {'n': var}
    if h.centered:
        mean = kept['g'] = h.rho * s.g + (1 - h.rho) * g
        mom = kept['delta'] = h.momentum * s.delta - lr * g / np.sqrt(var - mean**2 + h.epsilon)
        w = w + mom
    else:
        w = w - lr * g / (np.sqrt(var) + h.epsilon)
    return np.clip(w, -h.clip_weights, h.clip_weights), kept


def mxnet2_ftml(h, t, lr, w, g, s):
    """d = (1 - beta1^t)/lr (sqrt(v/(1 - beta2^t)) + epsilon);  z = beta1 z + (1 - beta1) grad - (d - beta1 d_old) weight."""
    g = g + h.wd * w
    v = h.beta2 * s.v + (1 - h.beta2) * g**2
    d = (1 - h.beta1**t) / lr * (np.sqrt(v / (1 - h.beta2**t)) + h.epsilon)
    z = h.beta1 * s.z + (1 - h.beta1) * g - (d - h.beta1 * s.d) * w
    return -z / d, {'d': d, 'v': v, 'z': z}


def mxnet2_dcasgd(h, t, lr, w, g, s):
    """d = grad + lamda grad^2 (weight - previous_weight), grad with its decay;  mom = momentum mom - lr d;  weight += mom."""
    g = g + h.wd * w
    previous_weight = s.previous_weight if t > 1 else w
    mom = h.momentum * s.momentum - lr * (g + h.lamda * g**2 * (w - previous_weight))
    return w + mom, {'previous_weight': w, **({'momentum': mom} if h.momentum else {})}


def mxnet2_nag(h, t, lr, w, g, s):
    """mom = momentum mom - lr grad;  weight += momentum mom - lr grad."""
    g = g + h.wd * w
    mom = h.momentum * s.momentum - lr * g
    return w + h.momentum * mom - lr * g, {'momentum': mom} if h.momentum else {}


def mxnet2_signum(h, t, lr, w, g, s):
    """With momentum; without it the decay is wd + wd_lh, and the sign that of the raw gradient."""
    if not h.momentum:
        return (1 - lr * (h.wd + h.wd_lh)) * w - lr * np.sign(g), {}
    mom = h.momentum * s.momentum - (1 - h.momentum) * (g + h.wd * w)
    return (1 - lr * h.wd_lh) * w + lr * np.sign(mom), {'momentum': mom}


MXNET_2 = {f.__name__.replace('mxnet2_', ''): f for f in (
    mxnet2_adam, mxnet2_adamax, mxnet2_nadam, mxnet2_adagrad, mxnet2_adadelta, mxnet2_rmsprop, mxnet2_ftml, mxnet2_dcasgd,
    mxnet2_nag, mxnet2_signum)}


# Learning-rate schedules: the rate of update t = 1, 2, ..., as papers and documents write it, in another form than the package:
# recursions and loops over the updates done for its closed forms, logarithms for its powers, half angles for its cosines.

def inverse_time(t, base_lr, decay, steps_per_epoch):
    """The blog: alpha / (1 + decay_rate epoch_num), epochs counted from 0."""
    epoch = 0
    for update in range(2, t + 1):
        epoch += (update - 1) % steps_per_epoch == 0
    return base_lr / (1 + decay * epoch)


def interval_inverse_time(t, base_lr, decay, interval):
    """The blog: alpha / (1 + decay_rate int(epoch_num / time_interval)), by update."""
    return base_lr / (1 + decay * int(t / interval))


def step_lr(t, step, factor, base_lr):
    """StepLR's recursion: lr <- gamma lr wherever the number of updates done is a multiple of step_size."""
    lr = base_lr
    for done in range(1, t):
        lr = lr * factor if done % step == 0 else lr
    return lr


def multi_step_lr(t, step, factor, base_lr):
    """MultiStepLR's recursion: lr <- gamma lr at each milestone."""
    lr = base_lr
    for done in range(1, t):
        lr = lr * factor if done in step else lr
    return lr


def exponential_lr(t, factor, base_lr, step=1):
    """gamma^(done / step), by the logarithm."""
    return base_lr * np.exp(np.log(factor) * (t - 1) / step)


def polynomial_lr(t, max_update, base_lr, pwr, final_lr):
    """PolynomialLR between base_lr and final_lr."""
    left = max(max_update - (t - 1), 0) / max_update
    return final_lr + (base_lr - final_lr) * left ** pwr


def linear_lr(t, max_update, base_lr, final_lr):
    """LinearLR: the weighted mean of its ends."""
    share = min(t - 1, max_update) / max_update
    return (1 - share) * base_lr + share * final_lr


def cosine_lr(t, max_update, base_lr, final_lr):
    """Loshchilov & Hutter, arXiv:1608.03983, (5), with T_cur = t - 1, T_i = max_update; the half angle's square."""
    angle = np.pi * min(t - 1, max_update) / max_update
    return final_lr + (base_lr - final_lr) * np.cos(angle / 2) ** 2


def cosine_restarts_lr(t, step, base_lr, final_lr, step_mult):
    """The same with restarts: T_cur goes back to 0 when it has reached T_i, and T_i grows."""
    current, length = 0, step
    for _ in range(1, t):
        current += 1
        if current == length:
            current, length = 0, length * step_mult
    return final_lr + (base_lr - final_lr) * np.cos(np.pi * current / length / 2) ** 2


def one_cycle_lr(t, max_update, base_lr, pct_start, anneal_strategy, div_factor, final_div_factor, three_phase):
    """OneCycleLR's phases: ends, and the rates from and to which they lead."""
    low = base_lr / div_factor
    lowest = low / final_div_factor
    rise, last = pct_start * max_update - 1, max_update - 1
    phases = [(0, low), (rise, base_lr), *([(2 * rise, low)] if three_phase else []), (last, lowest)]
    done = min(t - 1, last)
    for (start, a), (end, b) in zip(phases, phases[1:]):
        if done <= end:
            share = (done - start) / (end - start)
            share = np.sin(np.pi / 2 * share) ** 2 if anneal_strategy == 'cos' else share
            return (1 - share) * a + share * b
    return lowest


def inverse_sqrt_lr(t, base_lr, step):
    """Vaswani et al., arXiv:1706.03762, 5.3: the inverse square root of the number of the update, base_lr at the first."""
    return base_lr * np.sqrt(step / (step + t - 1))


def transformer_lr(t, base_lr, warmup):
    """The same formula whole: min(t^-0.5, t warmup^-1.5), in units of its largest value, base_lr."""
    return base_lr * warmup ** 0.5 * min(t ** -0.5, t * warmup ** -1.5)


def sum_to_infinity_lr(t, base_lr, b, gamma):
    """Welling & Teh 2011, section 4: a (b + t)^-gamma, by the logarithm."""
    return base_lr * np.exp(-gamma * np.log(b + t))


def piecewise_lr(t, step, factor, base_lr, kind):
    """Values between boundaries, or NumPy's interpolation through the points."""
    if kind == 'linear':
        return base_lr * np.interp(t - 1, [0, *step], factor)
    return base_lr * factor[np.searchsorted(step, t, side='left')]


def plateau_lr(observations, t, base_lr, mode, factor, patience, threshold, threshold_mode, cooldown, final_lr, epsilon):
    """ReduceLROnPlateau.step at each (update, metric) before ``t``; a maximum is the minimum of the negative."""
    lr, best, bad, cooling = base_lr, None, 0, 0
    for update, metric in observations:
        if update >= t:
            break
        sign = 1 if mode == 'min' else -1
        if best is None:
            good = not np.isnan(metric)
        else:
            slack = threshold if threshold_mode == 'abs' else threshold * best * sign
            good = sign * metric < sign * best - slack
        best, bad = (metric, 0) if good else (best, bad + 1)
        if cooling > 0:
            cooling, bad = cooling - 1, 0
        if bad > patience:
            lower = max(lr * factor, final_lr)
            lr = lower if lr - lower > epsilon else lr
            cooling, bad = cooldown, 0
    return lr


def warmed_up_lr(t, schedule, steps, begin, kind):
    """MXNet's LRScheduler.get_warmup_lr and LBSGD._get_lbmult, which count up to ``steps``; ``schedule(t)`` are the rates after."""
    if t >= steps:
        return schedule(t - steps + 1 if steps else t)
    strategies = {'linear': t / steps, 'power2': (t * t) / (steps * steps), 'sqrt': np.sqrt(float(t) / steps), 'constant': 0.0}
    return begin + (schedule(1) - begin) * strategies[kind]


def chained_lr(t, segments):
    """Each schedule for so many updates, counted anew; the last one's last rate stays."""
    for steps, schedule in segments[:-1]:
        if t <= steps:
            return schedule(t)
        t -= steps
    steps, schedule = segments[-1]
    return schedule(t if steps is None else min(t, steps))
