"""Builds the distribution; everything that is not code to compile stands in pyproject.toml."""

from setuptools import setup

setup()
