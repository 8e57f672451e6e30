"""Optimizer states as named arrays, and the files that hold them. Nothing here needs MXNet."""
