"""What belongs to the package; everything else about it is in pyproject.toml."""

import os
import re
import runpy
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

# Shared with people who read them at the top level of the repository, and found by the installed
# package beside its own modules.
CONFIGS = {
    "megatron_laer.configs.clusters": "configs/clusters",
    "megatron_laer.configs.models": "configs/models",
}

# Not imported: the package is not installed yet, and its own imports may be missing.
digest = runpy.run_path("megatron_laer/planner/native_sources.py")["digest"]


def readme() -> str:
    """Return README.md; with LAER_REPOSITORY_URL, its links lead to this version in that place."""
    text = Path("README.md").read_text(encoding="utf-8")
    version = runpy.run_path("megatron_laer/version.py")["__version__"]
    if url := os.environ.get("LAER_REPOSITORY_URL"):
        # Of links to files in the repository, not to headings or to other places.
        text = re.sub(r"\]\((?!#|\w+:)", f"]({url}/blob/v{version}/", text)
    return text


NATIVE = Pybind11Extension(
    "megatron_laer.planner._native",
    sorted(glob("megatron_laer/planner/native/*.cpp")),
    depends=sorted(glob("megatron_laer/planner/native/*.hpp")),
    define_macros=[("LAER_SOURCES", f'"{digest(Path("megatron_laer/planner/native"))}"')],
    cxx_std=17,
    # Without fused multiplications and additions, every machine has the same floats.
    extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],
)

setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["megatron_laer", "megatron_laer.*"]), *CONFIGS],
    package_dir=CONFIGS,
    package_data={
        "megatron_laer": ["py.typed", "rules.toml"],
        "megatron_laer.planner": ["*.pyi"],
        "megatron_laer.tools.recipes": ["*.csv"],
        "megatron_laer.tools.report": ["page/*"],
        **{name: ["*.yaml"] for name in CONFIGS},
    },
    # Else the C++ sources that the sdist holds would be in the wheel as well.
    include_package_data=False,
    ext_modules=[NATIVE],
    cmdclass={"build_ext": build_ext},
)
