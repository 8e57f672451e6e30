"""Builds gluon-optim-reader: the package two folders above without MXNet, for environments that read, inspect and convert.

    pip install ./tools/reader          or './tools/reader[torch]'

An extra cannot take requirements away, and after `pip install --no-deps` an environment fails `pip check`; so this is a second
distribution from the same files. Install one of the two.
"""
import configparser
import os
import shutil
import tempfile
from pathlib import Path

from setuptools import build_meta

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    before, wheel_directory = os.getcwd(), os.path.abspath(wheel_directory)
    settings = configparser.ConfigParser(interpolation=None)
    settings.read([ROOT / 'setup.cfg', HERE / 'setup.cfg'], encoding='utf-8')  # the second goes before the first
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / 'gluon_optim', Path(folder, 'gluon_optim'), ignore=shutil.ignore_patterns('__pycache__'))
        for path in ('LICENSE', settings['metadata']['long_description'].partition(':')[2].strip()):
            Path(folder, path).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / path, Path(folder, path))
        with open(Path(folder, 'setup.cfg'), 'w', encoding='utf-8') as file:
            settings.write(file)
        os.chdir(folder)
        try:
            return build_meta.build_wheel(wheel_directory)
        finally:
            os.chdir(before)
