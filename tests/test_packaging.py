"""What `pip install` brings, on every platform that we name, and what an installed copy contains."""
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LINUX = {'sys_platform': 'linux', 'platform_system': 'Linux', 'platform_machine': 'x86_64'}
LINUX_ARM = {**LINUX, 'platform_machine': 'aarch64'}
MAC_INTEL = {'sys_platform': 'darwin', 'platform_system': 'Darwin', 'platform_machine': 'x86_64'}
MAC_ARM = {**MAC_INTEL, 'platform_machine': 'arm64'}
WINDOWS = {'sys_platform': 'win32', 'platform_system': 'Windows', 'platform_machine': 'AMD64'}


def run(*command, **arguments):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **arguments)
    assert done.returncode == 0, done.stdout.decode()
    return done.stdout.decode()


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A wheel built from a copy, so that nothing is left behind in the working tree."""
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'
    source.mkdir()
    for name in ('setup.cfg', 'pyproject.toml', 'LICENSE', 'docs/DESCRIPTION.md'):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    for name in ('gluon_optim', 'tools/packaging'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    run(sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '--wheel-dir', folder, source)
    return next(folder.glob('*.whl'))


@pytest.fixture(scope='module')
def metadata(wheel):
    return metadata_of(wheel)


def metadata_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        return message_from_bytes(archive.read(name))


def required(metadata, platform, python, extra=''):
    """{name: version specifier} of what pip would install for this platform."""
    environment = {**platform, 'python_version': python, 'extra': extra}
    requirements = [Requirement(text) for text in metadata.get_all('Requires-Dist')]
    return {r.name: str(r.specifier) for r in requirements if r.marker is None or r.marker.evaluate(environment)}


@pytest.mark.parametrize('python', ['3.8', '3.9', '3.10', '3.11'])
@pytest.mark.parametrize('platform', [LINUX, LINUX_ARM, MAC_INTEL], ids=['linux', 'linux-arm', 'mac-intel'])
def test_mxnet_comes_along_where_it_has_wheels(metadata, platform, python):
    names = required(metadata, platform, python)
    assert set(names) == {'mxnet', 'numba', 'numpy'}
    assert names['mxnet'] == '<2,>=1.9.1'
    assert '<1.24' in names['numpy']


@pytest.mark.parametrize('platform, python', [(LINUX, '3.12'), (LINUX, '3.13'), (MAC_INTEL, '3.12'), (MAC_ARM, '3.11'),
                                              (WINDOWS, '3.8'), (WINDOWS, '3.13')])
def test_elsewhere_it_installs_without_mxnet(metadata, platform, python):
    names = required(metadata, platform, python)
    assert set(names) == {'numpy'}
    assert '<' not in names['numpy']


def test_metadata(metadata):
    assert metadata['Name'].replace('_', '-') == 'gluon-optim'
    assert metadata['Requires-Python'] == '>=3.8'
    assert 'Apache-2.0' in (metadata['License'] or metadata['License-Expression'])
    assert {'torch', 'onnx', 'optax', 'plot', 'bench', 'docs', 'test'} <= set(metadata.get_all('Provides-Extra'))
    assert metadata.get_all('Project-URL')
    links = re.findall(r'\]\(([^)]*)\)', metadata.get_payload())
    assert links and all(link.startswith('https://') for link in links)  # an index has no files beside the description


def test_the_changelog_has_a_dated_section_of_this_version(metadata):
    changelog = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert re.search(rf'^## \[{re.escape(metadata["Version"])}\] - 20\d\d-\d\d-\d\d$', changelog, re.MULTILINE)


def test_the_reader_is_the_same_package_without_mxnet(wheel, metadata, tmp_path):
    run(sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '--wheel-dir', tmp_path,
        ROOT / 'tools/reader')
    reader = next(tmp_path.glob('gluon_optim_reader-*.whl'))
    contents = [{name: archive.read(name) for name in archive.namelist() if '.dist-info/' not in name}
                for archive in map(zipfile.ZipFile, (reader, wheel))]
    assert contents[0] == contents[1]
    own = metadata_of(reader)
    assert (own['Name'].replace('_', '-'), own['Version']) == ('gluon-optim-reader', metadata['Version'])
    assert required(own, LINUX, '3.11') == {'numpy': '>=1.17'}
    assert {'jax', 'optax'} <= set(required(own, LINUX, '3.11', 'optax')) and 'torch' in required(own, LINUX, '3.11', 'torch')


def test_an_sdist_contains_every_file(tmp_path):
    tracked = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if tracked.returncode:
        pytest.skip('not a checkout of git')
    names = {name for name in tracked.stdout.decode().split('\0') if name and (ROOT / name).exists()}
    source = tmp_path / 'source'
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    code = 'import sys, gluon_optim_build; gluon_optim_build.build_sdist(sys.argv[1])'
    run(sys.executable, '-c', code, tmp_path, cwd=source, env={**os.environ, 'PYTHONPATH': 'tools/packaging'})
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as archive:
        packed = {name.partition('/')[2] for name in archive.getnames()}
    assert names - packed == {'.gitignore'}


def test_the_wheel_contains_the_whole_package_and_nothing_else(wheel):
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / 'gluon_optim').rglob('*') if path.suffix in ('.py', '.typed')}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if '.dist-info/' not in name}
    assert found == expected
    assert 'gluon_optim/py.typed' in found


def test_installed_without_dependencies_it_imports_and_works_without_mxnet(wheel, tmp_path):
    """As in an existing environment with a NumPy that MXNet does not take: `pip install --no-deps`."""
    site = tmp_path / 'site'
    run(sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--target', site, wheel)
    script = """
import sys
sys.modules['mxnet'] = sys.modules['numba'] = None  # importing either raises ImportError, as where they are missing
import gluon_optim as go
assert go.__file__.startswith(sys.argv[1]), go.__file__
assert 'novograd' in go.list_optimizers()
"""
    run(sys.executable, '-W', 'error', '-c', script, site, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(site)})


def test_the_tables_of_the_readme_are_up_to_date():
    run(sys.executable, ROOT / 'tools/make_tables.py', '--check', env={**os.environ, 'PYTHONPATH': str(ROOT)})
