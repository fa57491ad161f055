"""NCCL's options of FSEP's communicators: defaults of the cluster file, and the user's.

The user's are in the file of Megatron's `--nccl-communicator-config-path`, by communicator:
`fsep_parameters`, `fsep_gradients`, `fsep_tokens`. With `_intra_node` or `_inter_node` behind it, a
name means only the communicators inside nodes or between them, and precedes the name without.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_laer.config import FSEPConfig
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import ExchangeCtas
from megatron_laer.runtime.build import current_device, default_cluster
from megatron_laer.runtime.comm.process_groups import ranks_per_node

_EXCHANGES = ("fsep_parameters", "fsep_gradients", "fsep_tokens")
_NAMES = tuple(name + link for name in _EXCHANGES for link in ("", "_intra_node", "_inter_node"))
_CTAS = ("min_ctas", "max_ctas")
_COUNTS = ("cga_cluster_size", *_CTAS)
# NCCL's most channels, each of which is a thread block; a cluster on Hopper has up to 8.
_MOST = {"cga_cluster_size": 8, "min_ctas": 64, "max_ctas": 64}
_MEGATRONS = (*_COUNTS, "is_high_priority_stream", "net_name")


class NcclOptions:
    """NCCL's options of each of FSEP's communicators.

    Args:
        given: content of Megatron's file.
        ctas: default of communicators of weights and gradients, None without one.
        node_size: as `--fsep-node-size`.
        source: of what is given, for messages.
    """

    def __init__(
        self,
        given: Mapping[str, Any],
        ctas: ExchangeCtas | None,
        node_size: int | None,
        source: str = "",
    ) -> None:
        self._given = {
            name: _checked(source, name, settings)
            for name, settings in given.items()
            if name.startswith("fsep")
        }
        self._unused = set(self._given)
        self._ctas = ctas
        self._node_size = node_size

    @classmethod
    def read(cls, path: str | None, config: FSEPConfig) -> NcclOptions:
        given = {} if path is None else yaml.safe_load(Path(path).read_text()) or {}
        cluster = load_cluster(config.cluster or default_cluster(current_device()))
        ctas = None if cluster.card is None else cluster.card.exchange_ctas
        return cls(given, ctas, config.node_size, f"--nccl-communicator-config-path {path}: ")

    def of(self, group_desc: str, ranks: Sequence[int]) -> Any:
        """Return the options of a communicator, `dist.ProcessGroupNCCL.Options`; None without any.

        `group_desc` is its description, such as FSEP_GRADIENTS_INTER_NODE.
        """
        from megatron.core import parallel_state

        name = group_desc.lower()
        exchange = "_".join(name.split("_")[:2])
        names = [exchange, *([name] if name != exchange else [])]
        self._unused -= {*names}
        settings: dict[str, Any] = {}
        for key in names:
            settings |= self._given.get(key, {})
        if exchange == "fsep_tokens":
            settings["is_high_priority_stream"] = True  # like the whole group's
        elif self._ctas is not None and not settings.keys() & {*_CTAS}:
            crosses = self._crosses_nodes(name, ranks)
            settings["max_ctas"] = self._ctas.of(crosses_nodes=crosses)
        return parallel_state.get_nccl_options(name, {name: settings}) if settings else None

    def refuse_unused(self) -> None:
        """Raise a ValueError if the file has settings of a communicator that does not exist."""
        if self._unused:
            raise ValueError(
                f"--nccl-communicator-config-path has settings of {sorted(self._unused)}, and this "
                "run has no such communicators: nodes with one rank or all of a group's have no "
                "_intra_node and _inter_node, and fsep_tokens are those of --fsep-token-exchange "
                "node; leave them out"
            )

    def _crosses_nodes(self, name: str, ranks: Sequence[int]) -> bool:
        if name.endswith("_node"):
            return name.endswith("_inter_node")
        if self._node_size is not None:
            return len(ranks) > self._node_size
        per_node = ranks_per_node()
        return len({rank // per_node for rank in ranks}) > 1


def _checked(source: str, name: str, settings: object) -> dict[str, Any]:
    where = source + name
    if name not in _NAMES:
        raise ValueError(f"{where} is no communicator of FSEP's; those are {list(_NAMES)}")
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where} must be a mapping of options, got {reprlib.repr(settings)}")
    for option, value in settings.items():
        _check(f"{where}: {option}", option, value)
    if name.startswith("fsep_tokens") and settings.get("is_high_priority_stream") is False:
        raise ValueError(
            f"{where}: is_high_priority_stream False: tokens precede weights and gradients in both "
            "stages, as in the whole group; leave it out"
        )
    least, most = (settings.get(bound) for bound in _CTAS)
    if least is not None and most is not None and least > most:
        raise ValueError(f"{where}: min_ctas {least} must be at most max_ctas, got {most}")
    return dict(settings)


def _check(where: str, option: str, value: object) -> None:
    allowed: object
    if option == "is_high_priority_stream":
        right, allowed = isinstance(value, bool), [True, False]
    elif option == "net_name":
        right, allowed = isinstance(value, str), "a text such as IB or socket"
    elif option in _COUNTS:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        right, allowed = is_number and 1 <= value <= _MOST[option], f"1 to {_MOST[option]}"  # type: ignore[operator]
    else:
        raise ValueError(f"{where}: no such option; those are {[*_MEGATRONS]}")
    if not right:
        raise ValueError(f"{where} must be {allowed}, got {value!r}")
