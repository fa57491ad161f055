"""Selection of the token dispatcher by a layer's settings."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_laer.layer.dispatch.dispatcher import SlotTokenDispatcher
from megatron_laer.layer.dispatch.flex import SlotFlexDispatcher
from megatron_laer.layer.dispatch.node_dispatcher import NodeTokenDispatcher
from megatron_laer.runtime.comm.collectives import TokenSizesExchange
from megatron_laer.runtime.comm.process_groups import FSEPGroups


def make_dispatcher(
    slot_config: Any,
    local_slots: list[int],
    pg_collection: Any,
    groups: FSEPGroups,
    sizes: TokenSizesExchange | None,
) -> Any:
    make: Any = SlotTokenDispatcher
    if slot_config.moe_token_dispatcher_type == "flex":
        make = SlotFlexDispatcher
    elif sizes is not None:
        make = partial(NodeTokenDispatcher, groups=groups, sizes=sizes)
    return make(len(local_slots), local_slots, config=slot_config, pg_collection=pg_collection)
