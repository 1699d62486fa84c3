"""Packages to install: every folder of rankllm_composer, and yamls/ as the package rankllm_composer.yamls."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["rankllm_composer*"]), "rankllm_composer.yamls"],
    package_dir={"rankllm_composer.yamls": "yamls"},
)
