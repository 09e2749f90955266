# SPDX-License-Identifier: Apache-2.0
"""The one thing that pyproject.toml cannot say: every package found, plus ``kernels/`` under another name."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vllm_spec_plugins", "vllm_spec_plugins.*"]), "vllm_spec_plugins.kernels"],
    package_dir={"vllm_spec_plugins.kernels": "kernels"},
)
