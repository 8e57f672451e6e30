"""Standard normal samples from a counter: each depends on what it is for, not on who computes it, when, or beside what.

    b      = Philox4x32-10(key, counter (i, update, stream, draw))              four numbers of 32 bits
    r_k    = sqrt(-2 ln((b_2k + 1/2) / 2^32)),  angle_k = 2 pi b_2k+1 / 2^32     for k = 0, 1
    x_2k   = r_k cos(angle_k),  x_2k+1 = r_k sin(angle_k)

``key`` is the run's seed, ``stream`` the parameter's number, ``update`` the number of its update, ``draw`` that of the request
within the update, 0 for the first. Of the elements 64 n, ..., 64 n + 63 of a parameter, number 16 k + l is x_k of i = 16 n + l,
so that a processor computes many counters side by side. In single precision every operation is rounded on its own, in one order, so
compiled kernels, Triton and NumPy give the same bits; logarithm, cosine and sine are the polynomials below. In double
precision they are the library's.

Philox: Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011. Box and Muller, 1958.
"""
from typing import Any, Callable, Optional, Sequence, Tuple

import numpy

__all__ = ['BLOCK', 'COSINE', 'LANES', 'LN2', 'LOGARITHM', 'MULTIPLIERS', 'ROUNDS', 'SEEDS', 'SINE', 'STREAMS', 'TWO_THIRDS',
           'WEYL', 'Noise', 'normals', 'pair', 'philox']

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85   # the steps of the key from round to round
LANES = 16                      # counters side by side
BLOCK = 4 * LANES               # elements that they give
SEEDS = 2 ** 53                 # seeds are below: a float64 holds them exactly
STREAMS = 2 ** 32

# ln(1 + f) = f + f^2 (f P(f) - 1/2) for f in [-1/3, 1/3]; cos(a) = P(a^2) and sin(a) = a P(a^2) for a in [-pi/2, pi/2].
# Minimax for relative error, the cosine's for absolute error, below 1e-8; lowest power first, in single precision
LOGARITHM = (0.33333215, -0.24999797, 0.20010406, -0.16680488, 0.14005868, -0.1218426, 0.13984443, -0.12891689)
COSINE = (1.0, -0.5, 0.041666638, -0.0013888362, 2.4760162e-05, -2.6051495e-07)
SINE = (1.0, -0.16666648, 0.0083329, -0.00019800897, 2.5904883e-06)
LN2 = 0.6931472
TWO_THIRDS = 0x3f2aaaab   # in single precision: where the logarithm's exponent changes

_PIECE = 2 ** 15   # blocks that NumPy computes at a time


def philox(counter: Sequence[Any], key: Sequence[Any], xp: Any = numpy) -> Tuple[Any, ...]:
    """Philox4x32-10 of four counters and two keys, numbers of 32 bits, in arrays of uint64 of the namespace ``xp``.

    >>> [hex(word) for word in philox(numpy.zeros(4, 'uint64'), numpy.zeros(2, 'uint64'))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    (x0, x1, x2, x3), (k0, k1) = counter, key
    low, half = xp.uint64(0xffffffff), xp.uint64(32)
    for number in range(ROUNDS):
        if number:
            k0, k1 = (k0 + xp.uint64(WEYL[0])) & low, (k1 + xp.uint64(WEYL[1])) & low
        product0, product1 = xp.uint64(MULTIPLIERS[0]) * x0, xp.uint64(MULTIPLIERS[1]) * x2
        x0, x1, x2, x3 = (product1 >> half) ^ x1 ^ k0, product1 & low, (product0 >> half) ^ x3 ^ k1, product0 & low
    return x0.astype('uint32'), x1.astype('uint32'), x2.astype('uint32'), x3.astype('uint32')


def pair(precision: str, b: Any, turn: Any, xp: Any = numpy) -> Tuple[Any, Any]:
    """Two samples, r cos(angle) and r sin(angle), of two arrays of uint32 in the namespace ``xp``; ``turn`` gives the angle.

    The angle is taken from half a turn, about 0; for the other half r is negative. ``precision`` is float32 or float64.
    """
    twice = turn << xp.uint32(1)
    other_half = turn ^ twice   # in its first bit
    if precision == 'float64':
        radius = xp.sqrt(xp.float64(-2) * xp.log((b.astype('float64') + xp.float64(0.5)) * xp.float64(2.0 ** -32)))
        radius = xp.where(other_half >= xp.uint32(2 ** 31), -radius, radius)
        angle = twice.view('int32').astype('float64') * xp.float64(numpy.pi * 2.0 ** -32)
        return radius * xp.cos(angle), radius * xp.sin(angle)
    half, unit = xp.float32(0.5), xp.float32(2.0 ** -32)
    u = (b.astype('float32') + half) * unit
    rest = ((~b).astype('float32') + half) * unit            # 1 - u, which loses no digits near u = 1
    bits = u.view('int32')
    exponent = (bits - xp.int32(TWO_THIRDS)) & xp.int32(-2 ** 23)
    f = xp.where(bits >= xp.int32(TWO_THIRDS), -rest, (bits - exponent).view('float32') - xp.float32(1))
    logarithm = (f * _polynomial(xp, LOGARITHM, f) - half) * (f * f) + f
    logarithm = exponent.astype('float32') * xp.float32(LN2 * 2.0 ** -23) + logarithm
    radius = xp.sqrt(xp.float32(-2) * logarithm)
    radius = (radius.view('uint32') ^ (other_half & xp.uint32(2 ** 31))).view('float32')
    angle = twice.view('int32').astype('float32') * xp.float32(numpy.pi * 2.0 ** -32)
    square = angle * angle
    return radius * _polynomial(xp, COSINE, square), radius * (angle * _polynomial(xp, SINE, square))


def _polynomial(xp: Any, coefficients: Sequence[float], x: Any) -> Any:
    *others, value = map(xp.float32, coefficients)
    for coefficient in reversed(others):
        value = value * x + coefficient
    return value


def normals(key: int, stream: int, update: int, draw: int, size: int, dtype: Any = 'float64') -> numpy.ndarray:
    """The samples of the ``size`` elements of a parameter, float32 or float64.

    >>> normals(key=1, stream=0, update=1, draw=0, size=2).round(3), round(float(normals(1, 0, 1, 0, 10 ** 5).std()), 2)
    (array([ 0.769, -0.065]), 1.0)
    """
    made = numpy.empty(-(-size // BLOCK) * BLOCK, dtype)
    blocks = made.reshape(-1, 4, LANES)
    fixed = [numpy.uint64(word) for word in (update, stream, draw, key & 0xffffffff, key >> 32)]
    for start in range(0, len(blocks), _PIECE):
        piece = blocks[start:start + _PIECE]
        i = numpy.arange(start * LANES, (start + len(piece)) * LANES, dtype='uint64').reshape(-1, LANES)
        words = philox((i, *fixed[:3]), fixed[3:])
        for k in (0, 2):
            piece[:, k], piece[:, k + 1] = pair(made.dtype.name, words[k], words[k + 1])
    return made[:size]


class Noise:
    """The array namespace ``xp`` with the samples of one update of one parameter: each request gets others.

    ``array`` makes what ``xp`` works with of a NumPy array and the array that it is to be like.

    >>> from gluon_optim import rules
    >>> rule = rules.get('sgld')
    >>> h = rule.hyperparameters(learning_rate=1.0)
    >>> w, _ = rule.run(Noise(numpy, key=1, stream=0, update=1), h, 1, numpy.zeros(2), numpy.zeros(2))
    >>> w.round(3)
    array([ 0.769, -0.065])
    """

    def __init__(self, xp: Any, key: int, stream: int, update: int, array: Optional[Callable[[numpy.ndarray, Any], Any]] = None):
        self._xp, self._counter, self._draws, self._array = xp, (key, stream, update), 0, array

    def __getattr__(self, name: str) -> Any:
        return getattr(self._xp, name)

    def standard_normal(self, like: Any) -> Any:
        made = normals(*self._counter, self._draws, int(like.size), numpy.dtype(like.dtype)).reshape(like.shape)
        self._draws += 1
        return made if self._array is None else self._array(made, like)
