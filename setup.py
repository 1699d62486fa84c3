"""The packages: every folder of rankllm_composer, and the recipes of yamls/ as a package of their own."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["rankllm_composer*"]), "rankllm_composer.yamls"],
    package_dir={"rankllm_composer.yamls": "yamls"},
)
