"""What belongs to the package; everything else about it is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

# Shared with people who read them at the top level of the repository, and found by the installed
# package beside its own modules.
CONFIGS = {
    "megatron_laer.configs.clusters": "configs/clusters",
    "megatron_laer.configs.models": "configs/models",
}

NATIVE = Pybind11Extension(
    "megatron_laer.planner._native",
    sorted(glob("megatron_laer/planner/native/*.cpp")),
    depends=sorted(glob("megatron_laer/planner/native/*.hpp")),
    cxx_std=17,
    extra_compile_args=["-O3"],
)

setup(
    packages=[*find_packages(include=["megatron_laer", "megatron_laer.*"]), *CONFIGS],
    package_dir=CONFIGS,
    package_data={name: ["*.yaml"] for name in CONFIGS} | {"megatron_laer.planner": ["*.pyi"]},
    ext_modules=[NATIVE],
    cmdclass={"build_ext": build_ext},
)
