"""Files as bad disks and strangers make them, from a random generator."""


def mutated(data, rng, words):
    """One to three changes: flipped bits, other bytes, numbers and words that mean something, cuts, repetitions."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, what = rng.randrange(len(data) + 1), rng.randrange(8)
        if what <= 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what == 2 and at < len(data):
            data[at] = rng.randrange(256)
        elif what == 3:
            word = rng.choice(words)
            data[at:at + rng.choice([0, len(word)])] = word
        elif what == 4:
            del data[at:at + rng.choice([1, 2, 4, 8, 100])]
        elif what == 5:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 4, 8])))
        elif what == 6:
            del data[at:]
        else:
            begin = rng.randrange(len(data) + 1)
            data[at:at] = data[begin:begin + rng.randrange(200)] * rng.choice([1, 1, 1, 50])
    return bytes(data)
