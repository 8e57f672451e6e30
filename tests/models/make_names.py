"""Write the names and shapes of the parameters of well-known nets, which tests/test_model_zoos.py matches with one another.

    python make_names.py torchvision     # writes torchvision.json beside this file; needs torch and torchvision
    python make_names.py gluoncv         # gluoncv.json; needs MXNet 1.9.1 and gluoncv

Each file holds ``provenance``, and ``nets``: for each its names with shapes, in order. ``shared`` names what is one parameter.
"""
import json
import sys
from pathlib import Path

TORCHVISION = ('alexnet', 'densenet121', 'googlenet', 'mobilenet_v2', 'mobilenet_v3_small', 'resnet50', 'squeezenet1_1', 'vgg16_bn')


def of_torchvision():
    import torch
    import torchvision
    nets = {}
    for name in TORCHVISION:
        with torch.device('meta'):
            net = getattr(torchvision.models, name)(**({'init_weights': False} if name == 'googlenet' else {}))
        nets[name] = {key: list(tensor.shape) for key, tensor in net.state_dict().items()}
    return {'torchvision': torchvision.__version__, 'torch': torch.__version__, 'license': 'BSD-3-Clause'}, nets, {}


def of_gluoncv():
    import mxnet as mx
    from gluoncv.model_zoo import googlenet, mobilenet, mobilenetv3
    nets, shared = {}, {}
    for name, net in (('googlenet', googlenet.googlenet()), ('mobilenet_v2_1.0', mobilenet.get_mobilenet_v2(1.0)),
                      ('mobilenet_v3_small', mobilenetv3.get_mobilenet_v3('small'))):
        symbol = net(mx.sym.var('data'))
        arguments, _, states = symbol.infer_shape(data=(1, 3, 224, 224))
        shapes = {**dict(zip(symbol.list_arguments(), arguments)), **dict(zip(symbol.list_auxiliary_states(), states))}
        parameters, first = net._collect_params_with_prefix(), {}
        nets[name] = {key: list(shapes[parameter.name]) for key, parameter in parameters.items()}
        shared[name] = {key: first[parameter.name] for key, parameter in parameters.items()
                        if first.setdefault(parameter.name, key) != key}
    return {'gluoncv': '0.10.5.post0', 'mxnet': mx.__version__, 'license': 'Apache-2.0'}, nets, shared


if __name__ == '__main__':
    provenance, nets, shared = {'torchvision': of_torchvision, 'gluoncv': of_gluoncv}[sys.argv[1]]()
    provenance['command'] = f'python tests/models/make_names.py {sys.argv[1]}'
    lines = ',\n'.join(f'  {json.dumps(name)}: {json.dumps(net, separators=(",", ":"))}' for name, net in nets.items())
    text = f'{{"provenance": {json.dumps(provenance)},\n "shared": {json.dumps(shared)},\n "nets": {{\n{lines}\n }}}}\n'
    Path(__file__).with_name(f'{sys.argv[1]}.json').write_text(text)
