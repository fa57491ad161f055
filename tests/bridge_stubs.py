"""`importable` lets Megatron-Bridge be imported without packages that it imports unconditionally.

These are Transformer Engine, ModelOpt, NVIDIA's resiliency extension and Energon. The replacements
compute nothing. Only modules of Megatron-Bridge that import them without `try` see them, so other
code still detects that a package is missing.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

# Importing modules, and the names that they use unconditionally. Read in Megatron-Bridge 0.5.1 and
# 0.6.
_ABSENT: dict[str, tuple[str, ...]] = {
    "transformer_engine.pytorch": (
        "megatron.bridge.models.gpt_full_te_layer_autocast_spec",
        "megatron.bridge.peft.lora",
    ),
    "modelopt.torch.distill": ("megatron.bridge",),
    "modelopt.torch.quantization.utils": ("megatron.bridge.models.conversion.auto_bridge",),
    "modelopt.torch.opt.plugins": ("megatron.bridge.training.checkpointing",),
    "nvidia_resiliency_ext.inprocess": ("megatron.bridge",),
    "megatron.energon": ("megatron.bridge",),
    # Its diffusion models need too many packages to replace here.
    "megatron.bridge.recipes.flux": ("megatron.bridge.recipes",),
    "megatron.bridge.recipes.wan": ("megatron.bridge.recipes",),
}


class _Absent(ModuleType):
    """Replacement of a module: capitalised attributes are classes, others functions or modules."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{self.__name__} replaces a module and has no {name}")
        full_name = f"{self.__name__}.{name}"
        value = type(name, (_Nothing,), {}) if name[0].isupper() else _Absent(full_name)
        setattr(self, name, value)
        return value

    def __call__(self, *_args: object, **_kwargs: object) -> None: ...


class _Nothing:
    """Replacement of a class that accepts all arguments and keeps none."""

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def __class_getitem__(cls, _item: object) -> type[_Nothing]:
        return cls


@contextlib.contextmanager
def importable(checkout: Path) -> Iterator[None]:
    """Make `megatron.bridge` importable from a checkout of Megatron-Bridge in this context.

    Megatron itself must come from elsewhere: a checkout has none.
    """
    import megatron

    stock_import = builtins.__import__

    def with_absent(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        importer = str((globals or {}).get("__name__", ""))
        if level or not _is_absent(name, importer):
            return stock_import(name, globals, locals, fromlist, level)
        # `import a.b as c` reads `b` from the module returned for `a`.
        return _Absent(name if fromlist else name.split(".")[0])

    source = str(checkout / "src")
    with (
        mock.patch.object(builtins, "__import__", with_absent),
        mock.patch.object(sys, "path", [*sys.path, source]),
    ):
        assert any(place.startswith(source) for place in megatron.__path__), checkout
        yield


@contextlib.contextmanager
def peft_importable(checkout: Path) -> Iterator[None]:
    """Make `megatron.bridge.peft` importable, without the packages that other parts import."""
    bare = {}
    for name in ("megatron.bridge", "megatron.bridge.peft", "megatron.bridge.utils"):
        bare[name] = ModuleType(name)
        bare[name].__path__ = [str(checkout / "src" / name.replace(".", "/"))]
    with mock.patch.dict(sys.modules, bare), importable(checkout):
        yield


def _is_absent(name: str, importer: str) -> bool:
    return any(
        f"{name}.".startswith(f"{package}.") and importer.startswith(importers)
        for package, importers in _ABSENT.items()
    )
