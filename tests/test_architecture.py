"""The rules of the house (docs/ARCHITECTURE.md): imports run downward only, and no two modules import each other."""
import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / 'gluon_optim'
# from the ground up; a room imports from rooms of lower floors, and from itself
FLOORS = [['schema', 'requirements', 'display'], ['rules', 'schedules'], ['lowering', 'states'], ['mapping', 'models'],
          ['torch', 'onnx', 'optax', 'mxnet'], ['transfer'], ['cli']]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules():
    return {'.'.join(('gluon_optim', *path.relative_to(PACKAGE).with_suffix('').parts)).replace('.__init__', ''): path
            for path in PACKAGE.rglob('*.py')}


MODULES = modules()


def imports_of(name):
    """The modules of the package that a module imports, at its top or inside a function."""
    path = MODULES[name]
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package.split('.')[:len(package.split('.')) - node.level + 1]) if node.level else ''
            source = '.'.join(filter(None, [base, node.module]))
            for alias in node.names:
                if f'{source}.{alias.name}' in MODULES:
                    yield f'{source}.{alias.name}'
                elif source in MODULES:
                    yield source


def room(name):
    return name.split('.')[1] if '.' in name else ''


def test_every_module_has_a_room():
    assert {room(name) for name in MODULES} - {''} - {'__main__'} == set(FLOOR)


def test_imports_run_downward_only():
    upward = [f'{name} imports {other}' for name in MODULES for other in imports_of(name)
              if room(name) in FLOOR and room(other) and room(other) != room(name) and FLOOR[room(other)] >= FLOOR[room(name)]]
    assert not upward, upward


def test_nothing_imports_the_package_but_its_version():
    """The package itself imports from everywhere, lazily."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.ImportFrom) and node.level and not node.module and room(name):
                source = name.split('.')[:len(name.split('.')) - node.level + (path.name == '__init__.py')]
                if source == ['gluon_optim']:
                    names = {alias.name for alias in node.names} - set(FLOOR)
                    assert names <= {'__version__'}, f'{name} imports {names}'


def test_no_two_modules_import_each_other():
    """Nor more than two in a circle. What a package's __init__ imports of itself is how it is put together."""
    arrows = {name: {other for other in imports_of(name) if other != name and not name.startswith(other + '.')}
              for name in MODULES}
    done, circle = set(), []

    def visit(name, path):
        if name in path:
            circle.append(path[path.index(name):] + [name])
        elif name not in done:
            for other in sorted(arrows[name]):
                visit(other, path + [name])
            done.add(name)

    for name in sorted(MODULES):
        visit(name, [])
    assert not circle, circle[0]
