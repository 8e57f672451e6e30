"""The bytes that an update must move, for the column `x floor` of tools/bench.py."""
import functools
from pathlib import Path

from gluon_optim import rules
from gluon_optim.lowering.plan import Storage, moved, plan
from gluon_optim.rules.base import scalars

WITHOUT_FACTS = 2 ** 25  # bytes of the last cache where the system does not say


def least_bytes(name, hypers, dtype, sizes):
    """What one update of tensors of these sizes by the rule ``name`` must read and write.

    Everything once; a tensor that a later pass needs again, after a norm is known, is in the cache by then as far as it fits.
    """
    rule = rules.get(name)
    h = rule.hyperparameters(**hypers)
    names = tuple(rule.all_coefficients(scalars, h, 1))
    once, again = moved(plan(rule, rule.static(h), names, Storage(dtype, dtype in ('float16', 'bfloat16'))))
    return sum(size * once + sum(max(0, size * more - last_cache()) for more in again) for size in sizes)


@functools.lru_cache(maxsize=None)
def last_cache():
    """Bytes of the largest cache of a core."""
    found = [path.read_text().strip() for path in Path('/sys/devices/system/cpu/cpu0/cache').glob('index*/size')]
    return max((int(size[:-1]) * {'K': 2 ** 10, 'M': 2 ** 20}[size[-1]] for size in found if size[-1] in 'KM'),
               default=WITHOUT_FACTS)
