"""Training on several machines, by MXNet's own parameter servers.

`start` lets no gradient overtake the initial weights. `worker` sends a server the optimizer, later every change of it, and
learns of its errors; `server` is the other end, inside a server's `import mxnet`; both rely on `protocol`. `refusals` says
what cannot be computed on servers.
"""
from .protocol import ServerError

__all__ = ['ServerError']
