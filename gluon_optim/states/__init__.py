"""Optimizer states as arrays under names, and the files that hold them. Nothing here needs MXNet."""
