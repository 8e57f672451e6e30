"""setuptools as a build backend; only the list of what an sdist contains lies here, beside this file."""
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403
from setuptools.command.egg_info import manifest_maker

__all__ = build_meta.__all__
manifest_maker.template = 'tools/packaging/sdist.in'
