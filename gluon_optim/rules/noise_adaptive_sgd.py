"""SGD with a learning rate derived from the noise of the gradient, element by element (McAllester's lectures)."""
from ..schema import Hyper, Slot
from .base import Rule

SHARE_MAX = 0.5  # largest share of a new gradient in the averages, from the second update on


class NoiseAdaptiveSGD(Rule):
    """The algorithm derived in the lecture on SGD. B is batch_size, L is curvature, a bound on the second derivative.

        r      = B / B*, not above 1/2, not below averaging_min      (B* of the last update; r is 1 at the first)
        a      = (1 - r) a + r g                                     running mean of the gradient
        s      = (1 - r) s + r g^2                                   running mean of its square
        sigma2 = B max(s - a^2, 0)                                   variance of one example's gradient
        B*     = 16 sigma2 / (a^2 + epsilon)                         batch size with the most progress per example
        eta    = min(B / (2 B* L), 1 / (2 L))
        w     -= learning_rate eta (g + wd w)

    From the lecture: the two averages, B* = 16 sigma^2/a^2, eta = B/(2 B* L) and the step. Repaired here: the slide's second
    recurrence has a where it needs s; 0/0 is avoided (epsilon); eta is at most the lecture's optimum 1/(2 L); sigma2 is that
    of one example, because B* counts examples; r does not vanish (averaging_min); and r is at most 1/2. With r = 1 this would
    be plain SGD: averages of one gradient, hence sigma2 = 0, B* = 0, and r = 1 forever.
    B* and eta are slots so that they can be inspected; learning_rate multiplies eta, for schedules.
    """

    name = 'noise_adaptive_sgd'
    summary = 'SGD with a step size computed from batch size and measured gradient noise, element by element'
    paper = 'D. McAllester, Fundamentals of Deep Learning (TTIC 31230, 2018): SGD, a derived algorithm'
    hypers = (
        Hyper('learning_rate', 1.0, '[0, inf)', 'factor on the derived step size'),
        Hyper('wd', 0.0, '[0, inf)', 'weight decay, added to the gradient of the step'),
        Hyper('batch_size', 1.0, '(0, inf)', 'number of examples a gradient averages over; scales B*, cancels in r and eta'),
        Hyper('curvature', 1.0, '(0, inf)', 'bound on the second derivative of the loss'),
        Hyper('averaging_min', 1e-3, '[0, 1]', 'smallest weight of a new gradient in the running means'),
        Hyper('epsilon', 1e-12, '(0, inf)', 'added to the squared mean of gradients'),
    )

    @staticmethod
    def slots(h):
        return (Slot('mean', torch='exp_avg', doc='running mean of gradients'),
                Slot('mean_sq', torch='exp_avg_sq', doc='running mean of squared gradients'),
                Slot('batch_star', torch='batch_star',
                     doc='B*, the batch size with the most progress per example'),
                Slot('eta', torch='eta', doc='the derived step size'))

    @staticmethod
    def coefficients(xp, h, t):
        first = xp.where(t == 1, 1.0, 0.0)
        return dict(lr=h.learning_rate, wd=h.wd, batch=h.batch_size, batch16=16 * h.batch_size,
                    share_min=first + (1 - first) * h.averaging_min,
                    share_max=first + (1 - first) * max(h.averaging_min, SHARE_MAX), eta_max=0.5 / h.curvature, eps=h.epsilon)

    @staticmethod
    def step(xp, h, c, w, g, s):
        r = xp.minimum(xp.maximum(c.batch / xp.maximum(s.batch_star, c.batch), c.share_min), c.share_max)
        mean = (1 - r) * s.mean + r * g
        mean_sq = (1 - r) * s.mean_sq + r * (g * g)
        batch_star = c.batch16 * xp.maximum(mean_sq - mean * mean, 0.0) / (mean * mean + c.eps)
        eta = c.eta_max * (c.batch / xp.maximum(batch_star, c.batch))
        return w - c.lr * eta * (g + c.wd * w), dict(mean=mean, mean_sq=mean_sq, batch_star=batch_star, eta=eta)
