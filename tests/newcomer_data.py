"""The data of newcomer_runs.py, in which no framework has a part. What a step sees depends on its number only."""
import functools
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'examples'))

import digits  # noqa: E402

IMAGES, COLUMNS, TIMES = 32, 8, 12  # images in a batch; texts in a batch, and tokens of each


@functools.lru_cache(maxsize=None)
def samples(first, last):
    (images, labels), _ = digits.load()
    chosen = (labels >= first) & (labels <= last)
    return images[chosen], labels[chosen] - first


def image_batch(step, first=0, last=9):
    """Images of the digits ``first`` to ``last``, and their classes from 0 on."""
    images, labels = samples(first, last)
    batch = digits.batch_indices(0, step, len(images), IMAGES)
    return images[batch], labels[batch]


@functools.lru_cache(maxsize=None)
def text():
    """The licence of this package as whole numbers, (time, column), and how many different ones there are."""
    numbers = np.unique(list((ROOT / 'LICENSE').read_text()), return_inverse=True)[1]
    return numbers[:len(numbers) // COLUMNS * COLUMNS].reshape(COLUMNS, -1).T, int(numbers.max()) + 1


def text_batch(step):
    """Tokens, (time, column), and those that follow them. The next step goes on where this one ends."""
    columns, _ = text()
    begin = step % (len(columns) // TIMES) * TIMES
    return columns[begin:begin + TIMES], columns[begin + 1:begin + 1 + TIMES]
