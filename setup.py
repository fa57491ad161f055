"""What belongs to the package; everything else about it is in pyproject.toml."""

from setuptools import find_packages, setup

# Shared with people who read them at the top level of the repository, and found by the installed
# package beside its own modules.
CONFIGS = {
    "megatron_laer.configs.clusters": "configs/clusters",
    "megatron_laer.configs.models": "configs/models",
}

setup(
    packages=[*find_packages(include=["megatron_laer", "megatron_laer.*"]), *CONFIGS],
    package_dir=CONFIGS,
    package_data={name: ["*.yaml"] for name in CONFIGS},
)
