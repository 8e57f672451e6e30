"""An optimizer that a server can import, and that fails there."""
import os

from gluon_optim.mxnet.registry import SGDTorch


class FailsOnServers(SGDTorch):
    def update_multi_precision(self, index, weight, grad, state):
        if os.environ.get('DMLC_ROLE') == 'server' and self.num_update == 2:
            raise ArithmeticError('the third update is too much')
        super().update_multi_precision(index, weight, grad, state)
