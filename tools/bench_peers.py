"""All competitors of tools/bench.py by name, in this environment and in others.

tools/bench.py imports this file. With `--peer-python` it also runs it in another environment, where it steps on request:
one JSON object per line comes in on standard input, one answer goes out on standard output. That environment needs NumPy and
the frameworks that it is to measure.
"""
import json
import os
import platform
import subprocess
import sys
from importlib import metadata

import bench_jax
import bench_mxnet
import bench_onnx
import bench_torch
from bench_competitors import Data

FRAMEWORKS = {'mxnet': bench_mxnet.FRAMEWORK, 'torch': bench_torch.FRAMEWORK, 'jax': bench_jax.FRAMEWORK,
              'onnx': bench_onnx.FRAMEWORK}
OURS = {family: make for framework in FRAMEWORKS.values() for family, make in framework.ours.items()}
OTHERS = {name: make for framework in FRAMEWORKS.values() for name, make in framework.others.items()}
PACKAGES = ('mxnet', 'numba', 'numpy', 'torch', 'torch_optimizer', 'pytorch_optimizer', 'timm', 'jax', 'optax', 'onnx',
            'onnxruntime')


def build(name, data, dtype='float32'):
    """({route: Competitor}, '') with one step done, so that everything is compiled, or ({}, why this environment lacks it).

    ``name`` is one of `OTHERS`, or a family of `OURS`, a colon and a rule.
    """
    try:
        family, _, rule = name.partition(':')
        made = OURS[family](rule, data, dtype) if family in OURS else OTHERS[name](data, dtype)
        competitors = made if isinstance(made, dict) else {None: made}
        for competitor in competitors.values():
            competitor.prepare()
            competitor.step()
        return competitors, ''
    except Exception as error:  # whatever a package of another version raises explains why there is no figure
        return {}, f'{type(error).__name__}: {error}'.splitlines()[0]


def versions(packages=PACKAGES):
    found = {'python': platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# Peers of another environment

class Server:
    """This file, running under another Python. Its competitors step when asked, so that turns stay interleaved."""

    def __init__(self, python, data):
        self.python = python
        self._process = subprocess.Popen([python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self.ask(shapes=data.shapes)

    def build(self, name, dtype='float32'):
        """As `build`."""
        routes, why = self.ask(build=[name, dtype])
        return {route: Remote(self, [name, route], slots, storage) for route, slots, storage in routes}, why

    def ask(self, **request):
        try:
            self._process.stdin.write(json.dumps(request) + '\n')
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise SystemExit(f'The peers under {self.python} have stopped (exit code {self._process.poll()}). '
                             'Does that Python have NumPy? Its own message is above.') from error

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Remote:
    """A competitor in another process, which measures its own time."""

    def __init__(self, server, key, slots, dtype):
        self._server, self._key, self.slots, self.dtype = server, key, slots, dtype

    def turn(self):
        return self._server.ask(turn=self._key)

    def weight(self):
        return None  # the server remembers it

    def problem(self, before):
        return self._server.ask(problem=self._key)


def serve():
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # packages' output must not get between the answers
    data, competitors, before = None, {}, {}
    for line in sys.stdin:
        (what, value), = json.loads(line).items()
        if what == 'shapes':
            data, answer = Data(value), versions()
        elif what == 'build':
            name, dtype = value
            made, why = build(name, data, dtype)
            competitors.update({(name, route): competitor for route, competitor in made.items()})
            before.update({(name, route): competitor.weight() for route, competitor in made.items()})
            answer = [(route, competitor.slots, competitor.dtype) for route, competitor in made.items()], why
        elif what == 'turn':
            answer = competitors[tuple(value)].turn()
        else:
            answer = competitors[tuple(value)].problem(before[tuple(value)])
        answers.write(json.dumps(answer) + '\n')
        answers.flush()


if __name__ == '__main__':
    serve()
