"""A file in, a file out: what `gluon-optim convert` does, above all frameworks."""
