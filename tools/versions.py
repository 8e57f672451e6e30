"""Print the versions that a test run depends on."""
import platform
from importlib.metadata import PackageNotFoundError, version


def installed(name):
    try:
        return f'{name} {version(name)}'
    except PackageNotFoundError:
        return f'no {name}'


if __name__ == '__main__':
    print(f'Python {platform.python_version()}', *map(installed, ('numpy', 'mxnet', 'numba', 'torch')), sep=', ')
