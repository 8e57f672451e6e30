"""Rprop (Riedmiller and Braun, ICNN 1993) as torch.optim.Rprop computes it; for full batches, because only signs count."""
from ..schema import Hyper, Slot
from .base import Rule


class Rprop(Rule):
    """A step size for each element that grows while the sign of the gradient stays the same and shrinks when it changes.

        z  = learning_rate at the first update
        z  = min(max(f z, step_min), step_max)      f is eta_plus where g g_prev > 0, eta_minus where < 0, else 1
        g  = 0                                      where g g_prev < 0
        w -= sign(g) z
        g_prev = g
    """

    name = 'rprop'
    summary = 'a step size per element, from nothing but the signs of successive gradients; for full batches'
    paper = 'Riedmiller and Braun, A direct adaptive method for faster backpropagation learning, 1993'
    peers = ('torch.optim.Rprop',)
    exceptions = {'lr_mult=0': 'the learning rate sets only the first step, and a step is never smaller than step_min'}
    hypers = (
        Hyper('learning_rate', 0.01, '[0, inf)', 'first step of each element; later ones do not depend on it'),
        Hyper('wd', 0.0, '[0, 0]', 'not supported: added to the gradient, it would change the signs'),
        Hyper('eta_minus', 0.5, '(0, 1)', 'factor on the step where the sign of the gradient has changed'),
        Hyper('eta_plus', 1.2, '(1, inf)', 'factor on the step where it has not'),
        Hyper('step_min', 1e-6, '[0, inf)', 'smallest step'),
        Hyper('step_max', 50.0, '[0, inf)', 'largest step'),
    )

    @staticmethod
    def check(h):
        if h.step_min > h.step_max:
            raise ValueError(f'`step_min` must not be above `step_max`. Received: step_min={h.step_min}, step_max={h.step_max}. '
                             'Swap them, or leave one out.')

    @staticmethod
    def slots(h):
        return (Slot('previous', torch='prev', doc='last gradient, or 0 where its sign had changed'),
                Slot('step_size', torch='step_size', doc='current step of each element'))

    @staticmethod
    def coefficients(xp, h, t):
        first = xp.where(t == 1, 1.0, 0.0)
        return dict(first_step=first * h.learning_rate, later=1 - first, minus=h.eta_minus, plus=h.eta_plus,
                    step_min=h.step_min, step_max=h.step_max)

    @staticmethod
    def step(xp, h, c, w, g, s):
        z = c.first_step + c.later * s.step_size
        agreement = g * s.previous
        z = xp.where(agreement > 0, c.plus * z, xp.where(agreement < 0, c.minus * z, z))
        z = xp.minimum(xp.maximum(z, c.step_min), c.step_max)
        g = xp.where(agreement < 0, 0.0, g)
        return w - xp.sign(g) * z, dict(previous=g, step_size=z)
