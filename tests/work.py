"""What something costs, without asserting seconds: calls and bytes are counted, and growth is compared.

What would never end (a sum over 2^60 entries, say) is ended by the kill in conftest.py, not by an assertion.
"""
import contextlib
import sys
import time
import tracemalloc
import types

from gluon_optim.states.progress import watched

DOUBLINGS = 3


@contextlib.contextmanager
def counted():
    """Counts ``calls`` of functions and ``bytes`` read from files of states in the block."""
    spent = types.SimpleNamespace(calls=0, bytes=0)

    def profile(frame, event, argument):
        spent.calls += event in ('call', 'c_call')

    def add(size):
        spent.bytes += size

    before = sys.getprofile()
    with watched(add):
        sys.setprofile(profile)
        try:
            yield spent
        finally:
            sys.setprofile(before)


def memory_of(function):
    """The most bytes that Python held at once while ``function`` ran."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def assert_linear(prepare, size):
    """Twice the input takes at most 2.5 times the work: ``prepare(n)`` returns a function that works on an input of n.

    Three doublings at once, up to ``size``, the quickest of three runs each: quadratic work takes 64 times as long, and 15.6 times
    are allowed.
    """
    runs, least = {n: prepare(n) for n in (size >> DOUBLINGS, size)}, {}
    for _ in range(3):
        for n, run in runs.items():
            begin = time.process_time()
            run()
            least[n] = min(least.get(n, float('inf')), time.process_time() - begin)
    assert least[size] <= 2.5 ** DOUBLINGS * least[size >> DOUBLINGS], least
