"""Training on several machines, by MXNet's own parameter servers.

`start` lets no gradient overtake the initial weights. `worker` sends a server the optimizer, later every change of it, and
learns of its errors; `server` is the other end, inside a server's `import mxnet`; both rely on `protocol`.
`gluon_optim.rules.servers` says what cannot be computed on servers. `lookout` notices in workers, servers and the scheduler that
another process has died, and ends them.

For checkpoints `pages` carries questions and answers between a worker and the servers, `held` is what a server does for them,
`ranks` lets workers meet, with a deadline, `remote` shows states on servers as arrays and sends new ones, and `received` gives
all workers what the first has read.
"""
from .protocol import ServerError

__all__ = ['ServerError']
