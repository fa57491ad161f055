"""A table of deliberate faults: one line of the core, with its correct and its wrong text.

Each was chosen because it trains on without a crash, or hides behind the usual path. Its tests must
fail with it; `__main__` plants and runs them.

Over 400 lines: one table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One deliberate fault: the right text, which its file has once, and the wrong one.

    `file` is a path below `megatron_laer`; of `tests`, pytest's arguments, one fails with the
    fault.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


def _in(file: str, *tests: str) -> _Room:
    return _Room(file, tests)


@dataclass(frozen=True)
class _Room:
    file: str
    tests: tuple[str, ...]

    def fault(self, name: str, right: str, wrong: str, *tests: str) -> Fault:
        return Fault(name, self.file, right, wrong, tests or self.tests)


_UNIT, _RANKS = "tests/unit/test_{}.py", "tests/distributed/test_{}.py"


def _unit(*names: str) -> tuple[str, ...]:
    return tuple(_UNIT.format(name) for name in names)


def _ranks(*names: str) -> tuple[str, ...]:
    return tuple(_RANKS.format(name) for name in names)


_SHARDED = _in("plugin/sharded_models.py", *_ranks("parity"), "-k", "fsdp-")
_IN_OWN_LOOP = _in("plugin/sharded_models.py", *_ranks("own_sharded_loop"))
_WHOLE = _in("integrations/sharded_optimizer.py", *_ranks("sharded_checkpoints"), "-k", "optimizer")
_STATE_BYTES = _in("planner/state_bytes.py", "tests/tools/test_memory_parts.py")
_MEMORY = _in("tools/simulator/iteration/memory_parts.py", "tests/tools/test_memory_parts.py")
_FROZEN = "tests/tools/test_frozen_and_sharded.py"
_UNSHARD = _in("tools/simulator/iteration/chunk.py", _FROZEN)
_CLOCKS = _in("tools/simulator/iteration/clocks.py", _FROZEN)
_WORK = _in("tools/simulator/iteration/work.py", _FROZEN)
_BY_PAIRS = _in("tools/simulator/homes.py", "tests/tools/test_plan_homes.py")
_LAYOUT = _in("planner/layout.py", *_unit("layout"))
_SHARDING = _in("planner/sharding.py", *_unit("slices", "traffic"))
_LAER = _in("planner/laer.py", *_unit("strategies"))
_COSTS = _in("planner/costs.py", *_unit("home"))
_WIRE = _in("planner/wire_form.py", *_unit("wire_form"))
_FP8_BYTES = ("tests/tools/distributed/test_simulated_fp8_bytes.py",)
_CHUNK = _in("tools/simulator/iteration/chunk.py", "tests/tools/test_iteration.py")
_EXCHANGES = ("tests/tools/test_iteration_exchanges.py",)
_SIMULATED = _in("tools/simulator/iteration/layer_times.py", "tests/tools/test_iteration_work.py")
_FORECAST = _in("planner/forecast.py", *_unit("forecast"))
_QUOTAS = _in("planner/quotas.py", *_unit("quotas"))
_BALANCE = _in("planner/balance.py", *_unit("quotas"))
_GUARD = _in("planner/guard.py", *_unit("guard"))
_SERVICE = _in("planner/service.py", *_unit("planner_service"))
_STATE = _in("planner/state.py", *_unit("planner_state"))
_IN_FORCE = _in(
    "runtime/planning/layouts_in_force.py", *_unit("planner_resume"), *_ranks("checkpoints")
)
_COLLECTIVES = _in("runtime/comm/collectives.py", *_unit("agreement"), *_ranks("agreement"))
_BLOCKS = _in("runtime/comm/blocks.py", *_unit("kernels"), *_ranks("exchange"))
_REDUCE = _in("runtime/comm/reduce.py", *_unit("layout_index"), *_ranks("exchange"))
_HOME_EXCHANGE = _in("runtime/comm/home_exchange.py", *_ranks("home_exchange"))
_RELAY = _in("runtime/comm/relay.py", *_ranks("home_exchange"))
_DIRECT = _in("runtime/comm/direct.py", *_ranks("home_exchange"))
_INDEX = _in("runtime/comm/layout_index.py", *_ranks("home_exchange", "determinism"))
_RESTORE = _in("runtime/comm/restore.py", *_ranks("exchange"))
_EXCHANGE = _in("runtime/comm/exchange.py", *_ranks("exchange"))
_STREAMS = _in("runtime/comm/streams.py", *_unit("streams"))
_ONE_QUEUE = "tests/races/test_one_queue.py"
_EXCHANGE_STEPS = _in("runtime/comm/steps.py", _ONE_QUEUE)
_NCCL = _in("plugin/nccl_options.py", *_unit("nccl_options"))
_CLUSTERS = _in("planner/clusters.py", *_unit("nccl_options"))
_RESTORED = _in("runtime/weights/restored.py", *_unit("restored_experts"))
_SHARE = _in("runtime/weights/layer.py", *_ranks("own_loop"))
_WEIGHTS = _in("runtime/weights/restored_weights.py", *_unit("restored_experts"))
_LAYER_EXPERTS = _in("runtime/weights/layer_experts.py", *_ranks("stock_loading"))
_GRADS = _in("runtime/weights/slot_grads.py", *_unit("restored_experts"))
_SCHEDULER = _in("runtime/scheduler.py", *_ranks("scheduler"))
_OPERATIONS = _in("runtime/operations.py", *_unit("operations"), *_ranks("operations"))
_PERMUTATION = _in("layer/dispatch/permutation.py", *_unit("permutation"))
_ROW_MAP = _in("layer/dispatch/row_map.py", *_unit("permutation"))
_DISPATCH = _in("layer/dispatch/slot_dispatch.py", *_ranks("dispatcher"))
_DISPATCHER = _in("layer/dispatch/dispatcher.py", *_ranks("dispatcher"))
_NODES = _in("layer/dispatch/node_dispatcher.py", *_ranks("dispatcher"))
_STEPS = _in("plugin/steps.py", *_ranks("scheduler"))
_SLICES = _in("layer/experts/slices.py", *_unit("slices"), *_ranks("initialisation"))
_HOMES = _in("layer/experts/homes.py", *_ranks("homes", "own_loop"))
_COMPUTE = _in("layer/experts/restored_compute.py", *_ranks("parity"), "-k", "lora-all")
_ADAPTERS = _in("layer/experts/adapters.py", *_ranks("lora_on_experts"), "-k", "grouped")
_HOME_ORDER = _ranks("home_order")
_MAIN_GRADS = _in("layer/experts/main_grads.py", *_ranks("gpu_check"))
_MOVES = _in("layer/experts/home_moves.py", *_HOME_ORDER)
_PAIR_COUNTS = _in("runtime/pair_counts.py", *_unit("pair_counts"))
_SLOT_CONFIGS = _in("layer/slot_configs.py", *_unit("slot_configs"))
_FP8_TE = _in("layer/experts/fp8/te.py", *_unit("fp8_back_end"))
_FP8_MX = _in("layer/experts/fp8/te_mx.py", *_unit("fp8_back_end"))
_FP8_SUPPORT = _in("support/fp8_experts.py", *_unit("fp8_support"))
_SLOT_LINEAR = _in("layer/experts/slot_linear.py", *_unit("fp8_back_end"))
_DIRECTIONS = _in("runtime/weights/restored.py", *_unit("directions"))
_FETCHED = _in("runtime/weights/restored_weights.py", *_unit("directions"))
_STEP_DIRECTIONS = _in("runtime/weights/step_experts.py", *_unit("directions"))
_FP8_PADDING = _in("layer/experts/fp8/padding.py", *_unit("fp8_back_end"))
_FP8_PAYLOAD = _in("layer/experts/fp8/payload.py", *_unit("fp8_back_end", "fp8_definitions"))
_MAIN_GRADS = _in("layer/experts/main_grads.py", *_unit("restored_experts"))
_LOADING = _in("integrations/stock_loading.py", *_ranks("stock_loading"))
_LAYER = _in("layer/moe_layer.py", *_ranks("own_loop"))

FAULTS: tuple[Fault, ...] = (
    _MAIN_GRADS.fault(
        "hooks of home experts do not wait for the sums over replicas",
        "            stream.wait_stream(torch.cuda.current_stream(stream.device))",
        "            pass",
    ),
    # Planner: packing, forecasts and state.
    _LAER.fault("laer packs a full rank further", "open_N = free_N > 0", "open_N = free_N >= 0"),
    _LAER.fault(
        "laer counts no replicas per node",
        "node_replicas_Q[rank // geometry.node_size] += 1",
        "node_replicas_Q[rank // geometry.node_size] += 0",
    ),
    _WIRE.fault(
        "scales of blocks travel for free",
        "        * -(-rows // _BLOCK)\n",
        "        * 0\n",
    ),
    _COSTS.fault(
        "gradients are priced in fp8",
        "        carried(costs.grads_form),\n",
        "        carried(costs.weights_form(geometry.home_slots)),\n",
    ),
    _WIRE.fault(
        "a payload is laid out for free",
        "    return read + written + packing_bytes(recipe, rows, columns)\n",
        "    return read + written\n",
    ),
    _WIRE.fault(
        "a re-run of forward restores nothing",
        "    return 1 if recompute == Recompute.NONE else directions\n",
        "    return 1\n",
        *_unit("home"),
    ),
    _CHUNK.fault(
        "a form of weights is handed on to the other direction",
        "(moe.directions == 1 or in_its_form)",
        "True",
    ),
    _CHUNK.fault(
        "backward multiplies by its re-run's form",
        "                restores.turn(number)\n",
        "",
    ),
    _SIMULATED.fault(
        "a held step has backward's form for nothing",
        "recompute == Recompute.FULL or own_s is None else own_s",
        "True else own_s",
        *_EXCHANGES,
        "-k",
        "form",
    ),
    _in("tools/simulator/iteration/methods.py", *_EXCHANGES, "-k", "held").fault(
        "sums of a step are simulated in bf16",
        "        if self.holds_step:\n",
        "        if not self.holds_step:\n",
    ),
    _in("tools/simulator/iteration/model_shape.py", *_EXCHANGES, "-k", "bf16").fault(
        "the first layers are simulated in fp8",
        "layer < first or decoder",
        "decoder",
    ),
    _in("tools/simulator/iteration/buffers.py", *_FP8_BYTES, "-k", "plain").fault(
        "payloads at home take no memory",
        "(num_ranks - 1) * geometry.replica_slots)",
        "0)",
    ),
    _in("runtime/planning/layouts_in_force.py", *_FP8_BYTES, "-k", "bf16").fault(
        "layers in bf16 are decided at fp8's prices",
        "guard.in_bf16 if layer in self.out_of_fp8 else guard",
        "guard",
    ),
    _in("runtime/planning/planner_rank.py", *_unit("layout_recording"), "-k", "fp8").fault(
        "layers in bf16 are planned at fp8's prices",
        "others if layer in out_of_fp8 else usual",
        "usual",
    ),
    _LAER.fault(
        "laer packs the lightest first",
        "np.argsort(-load_per_replica_E",
        "np.argsort(load_per_replica_E",
    ),
    _LAER.fault(
        "laer adds no load to a rank",
        "rank_load_N[rank] += load_per_replica_E[expert]",
        "rank_load_N[rank] += 0",
    ),
    _LAER.fault(
        "more replicas than ranks",
        "if count < geometry.num_ranks:",
        "if count <= geometry.num_ranks:",
    ),
    _LAER.fault(
        "spare replicas go to the coldest",
        'np.argsort(-loads_E, kind="stable")[:spare]',
        'np.argsort(loads_E, kind="stable")[:spare]',
    ),
    _FORECAST.fault(
        "the worse of two means is the forecast",
        "self.errors[1] < self.errors[0]",
        "self.errors[1] > self.errors[0]",
    ),
    _FORECAST.fault("errors are never forgotten", "error - error // _FORGOTTEN +", "error +"),
    _FORECAST.fault("a mean keeps what was before", "before_NE + np.rint(", "before_NE - np.rint("),
    _FORECAST.fault(
        "the quick mean is slow",
        "QUICK_WEIGHT, STEADY_WEIGHT = 0.75, 0.25",
        "QUICK_WEIGHT, STEADY_WEIGHT = 0.25, 0.75",
    ),
    _SERVICE.fault(
        "layouts that a run cannot use are planned", "self._check_layout(layout)", "pass"
    ),
    _SERVICE.fault("plans go on without limit", "_OPEN_STEPS = 4", "_OPEN_STEPS = 40"),
    _BALANCE.fault(
        "imbalance of the least loaded rank",
        "int(tokens_N.max()) * tokens_N.size",
        "int(tokens_N.min()) * tokens_N.size",
    ),
    # Layouts and owners of rows.
    _LAYOUT.fault(
        "static layouts begin one expert on",
        "start_N[:, None] + np.arange(capacity)",
        "start_N[:, None] + 1 + np.arange(capacity)",
    ),
    _LAYOUT.fault(
        "a digest without the shape",
        "hashlib.blake2b(shape + self.slot_bytes",
        "hashlib.blake2b(self.slot_bytes",
    ),
    _LAYOUT.fault(
        "an expert without a slot is legal",
        "missing = np.flatnonzero(replicas_E == 0)",
        "missing = np.flatnonzero(replicas_E < 0)",
    ),
    _LAYOUT.fault(
        "one slot fewer by default",
        "min(num_experts, -(-num_experts // num_ranks) + 1)",
        "min(num_experts, -(-num_experts // num_ranks))",
    ),
    _SHARDING.fault(
        "rows are cut by rounding up",
        "rank * rows // num_ranks for rank",
        "-(-rank * rows // num_ranks) for rank",
    ),
    _SHARDING.fault(
        "the first slot of a node shares all",
        "first[held] + wanted[held] % num_experts % count[held]",
        "first[held]",
    ),
    _SHARDING.fault("empty slots are fetched", "filled_slots(after) & differs_S", "differs_S"),
    # Quotas.
    _QUOTAS.fault(
        "left-over tokens go to the first replica",
        "(place - source) % shared < left",
        "place % shared < left",
    ),
    _QUOTAS.fault(
        "tokens leave a node that has a replica",
        "row_S[foreign_S] = 0",
        "row_S[foreign_S] = row_S[foreign_S]",
    ),
    _QUOTAS.fault(
        "an empty slot gets the last expert's tokens",
        "row_S[expert_S == EMPTY] = 0",
        "row_S[expert_S == EMPTY] += 0",
    ),
    _QUOTAS.fault(
        "columns count the source's node as far",
        "sends_QC[node] = True",
        "sends_QC[node] = in_node_QC[node] == 0",
    ),
    # After the gate.
    _GUARD.fault(
        "an unchanged layout is fetched again",
        "return self.layout is not self.planned_layout",
        "return True",
    ),
    _GUARD.fault(
        "imbalance before is that after",
        "None if self.planned_quotas is None else _imbalance(self.planned_quotas)",
        "None if self.planned_quotas is None else _imbalance(self.quotas)",
    ),
    # Agreement of ranks.
    _COLLECTIVES.fault(
        "other layouts go unnoticed",
        "if (tags_N3 != tags_N3[0]).any():",
        "if (tags_N3[:, :1] != tags_N3[0, :1]).any():",
    ),
    _COLLECTIVES.fault(
        "the digest forgets a solve", "layout.digest & ~1 | solved", "layout.digest & ~1"
    ),
    _COLLECTIVES.fault(
        "the majority is named", "(tags_N3 != right).any(axis=1)", "(tags_N3 == right).any(axis=1)"
    ),
    # Exchanges of weights and gradients.
    _BLOCKS.fault(
        "rows of local ranks are shifted",
        "rows_N[local_rank :: self.node_size]",
        "rows_N[:: self.node_size]",
    ),
    _BLOCKS.fault("uneven blocks begin at zero", "offset += end - start", "offset += 0"),
    _REDUCE.fault("sums end one part early", "first = len(ends) + 1", "first = len(ends)"),
    _REDUCE.fault(
        "parts of a sum in any order",
        'parts = part_n[np.argsort(target_n, kind="stable")]',
        'parts = part_n[np.argsort(target_n, kind="stable")[::-1]]',
    ),
    _REDUCE.fault(
        "the first node's slots for all",
        "node, local_rank = divmod(rank, node_size)",
        "node, local_rank = 0, rank % node_size",
    ),
    _RESTORE.fault(
        "sizes of one local rank for all",
        "sizes = [num_restored * rows * columns for rows in rows_G]",
        "sizes = [num_restored * own_rows * columns for rows in rows_G]",
    ),
    _RESTORE.fault(
        "shared experts at the first place",
        "pack_rows(whole_1RK, send, path.blocks, position, len(slots))",
        "pack_rows(whole_1RK, send, path.blocks, 0, len(slots))",
    ),
    _RESTORE.fault(
        "all slots are gathered from the first",
        "index.position_n[first : first + len(target_nPK)]",
        "index.position_n[: len(target_nPK)]",
    ),
    _EXCHANGE.fault(
        "gradients overwrite what was there",
        "adds=add_to is not None",
        "adds=False",
        *_ranks("exchange", "parity"),
    ),
    _EXCHANGE.fault(
        "gradients cross nodes as they are",
        "return self._grad_wire_dtype or wanted or grad_CRK.dtype",
        "return grad_CRK.dtype",
        *_ranks("exchange"),
    ),
    _HOME_EXCHANGE.fault(
        "a home gets the last replica's gradient alone",
        "sums[expert] + part_RK if expert in sums else part_RK.float()",
        "part_RK.float()",
    ),
    _RELAY.fault(
        "homes spread rows to one place",
        "pack_rows(homes_hRK[home][None], sent, blocks, at, len(hop.mine))",
        "pack_rows(homes_hRK[home][None], sent, blocks, 0, len(hop.mine))",
    ),
    _INDEX.fault(
        "an exchange is left out where the first rank has no replica",
        "(slots_NC[:, self.home_slots :] != EMPTY)",
        "(slots_NC[:1, self.home_slots :] != EMPTY)",
    ),
    _DIRECT.fault(
        "a rank leaves an exchange out that gives it nothing",
        "has_work=bool(changed_NC.any())",
        "has_work=bool(changed_NC[rank].any())",
    ),
    _DIRECT.fault(
        "replicas arrive in the first slots, whatever the layout",
        "out_CRK[slot].copy_(part_RK)",
        "out_CRK[0].copy_(part_RK)",
    ),
    # Streams and the life of a weight.
    _STREAMS.fault(
        "a thread's result is not waited for",
        "            self._is_there.wait()\n",
        "            pass\n",
    ),
    _STREAMS.fault(
        "errors of a thread are lost",
        "        except BaseException as error:\n            self._error = error",
        "        except BaseException:\n            self._error = None",
    ),
    _STREAMS.fault(
        "all of an exchange is launched at once in one queue",
        "return OneQueueStream(times, device) if is_alone else CudaStream(times, device)",
        "return CudaStream(times, device)",
        _ONE_QUEUE,
    ),
    _EXCHANGE_STEPS.fault(
        "matrices are launched one after the other in one queue",
        "with one_launch(group, self._device):",
        "with contextlib.nullcontext():",
    ),
    _NCCL.fault(
        "a default precedes the user's bound",
        "elif self._ctas is not None and not settings.keys() & {*_CTAS}:",
        "elif self._ctas is not None:",
    ),
    _NCCL.fault(
        "settings of no communicator are ignored", "        if self._unused:", "        if False:"
    ),
    _CLUSTERS.fault(
        "exchanges between nodes have the SMs of those inside",
        "return self.inter if crosses_nodes else self.intra",
        "return self.intra",
    ),
    _WEIGHTS.fault(
        "memory is lent before its restore is over",
        "self._streams.weights.put_back(pending.wait())",
        "self._streams.weights.put_back(pending.result())",
    ),
    _LAYER_EXPERTS.fault(
        "held replicas outlive a load of their homes",
        "weights_changed = weights_changed or self._home_slots > 0",
        "weights_changed = weights_changed or self._home_slots < 0",
    ),
    _GRADS.fault(
        "gradients of slots stay lent",
        "        self.free()\n        return self.share.reduced(sums)",
        "        return self.share.reduced(sums)",
    ),
    _SHARE.fault(
        "sums over replicas are left out of autograd",
        "            sum_RK.view(parameter.shape)\n            for at, sums_hRK",
        "            torch.zeros_like(parameter)\n            for at, sums_hRK",
    ),
    _SHARE.fault(
        "a home's gradient does not wait for its replicas",
        'hook runs when it ends."""\n        return True',
        'hook runs when it ends."""\n        return False',
        *_ranks("parity"),
        "-k",
        "frozen-home or deepseek-v3-home",
    ),
    _RESTORED.fault(
        "a reduce before tokens' gradients",
        "        self._defers_reduce = True\n",
        "        self._defers_reduce = False\n",
    ),
    _WEIGHTS.fault(
        "a pass keeps its layout",
        "        before, self.index = self.index, index\n",
        "        before = self.index\n",
    ),
    _RESTORED.fault(
        "weights stay after forward",
        "                self.weights.keep()\n            self.weights.used()",
        "                self.weights.keep()",
    ),
    _WEIGHTS.fault(
        "kept weights count as kept for ever",
        "WeightState.SHARDED)\n            self._streams.kept.give_back(self)",
        "WeightState.SHARDED)",
        *_ranks("memory"),
    ),
    _SCHEDULER.fault(
        "nothing starts early",
        "        elif starts:\n            chunk.await",
        "        elif starts and position < 0:\n            chunk.await",
    ),
    _SCHEDULER.fault(
        "backward fetches nothing ahead",
        "restored.prefetch_in_backward(forward.entered[-1])",
        "pass",
    ),
    _SCHEDULER.fault(
        "the layer after the next",
        "self._prepare(forward.position + 1, training, self.schedule.restores_next)",
        "self._prepare(forward.position + 2, training, self.schedule.restores_next)",
    ),
    _SCHEDULER.fault(
        "experts of an operation that does not follow stay",
        "        restored.release()\n        return None",
        "        return None",
        *_ranks("operations"),
    ),
    _OPERATIONS.fault(
        "an order that is not kept is expected further",
        "        if self.following != operation:\n            self._expected = ()",
        "        if self.following != operation:\n            pass",
    ),
    # Megatron's combined schedule.
    _RESTORED.fault(
        "a reduce before backward_dw",
        "self._split.computes_weights.append(partial(self._compute_weights, defers, grads_CRK))",
        "self._send(defers, grads_CRK)",
        *_ranks("combined_1f1b"),
        "-k",
        "delayed",
    ),
    _RESTORED.fault(
        "weights are released before the experts' backward",
        "count.backwards += 1\n        self.backward_weights.start_restore()\n",
        "count.backwards += 1\n        self.backward_weights.used()\n",
        *_ranks("combined_1f1b"),
        "-k",
        "two_layers",
    ),
    _RESTORED.fault(
        "backward fetches the layer before while another microbatch's is there",
        "not (self._split.by_parts and self.index.has_replicas):",
        "self.has_backward:",
        *_ranks("combined_1f1b"),
        "-k",
        "two_layers",
    ),
    _RESTORED.fault(
        "no one waits for gradients of a layer in parts",
        "        marked: torch.Tensor = WaitWithTokens.apply(tokens, *made)\n        return marked",
        "        return tokens",
        *_ranks("combined_1f1b"),
        "-k",
        "two_layers",
    ),
    _RESTORED.fault(
        "homes are reported before they have the sums over replicas",
        "            self._split.grads_ready(share.trained)\n",
        "            pass\n",
        *_ranks("combined_1f1b"),
        "-k",
        "overlaps",
    ),
    _STEPS.fault(
        "two microbatches swapped",
        "            f_schedule_plan.fsep_forward = begun\n",
        "            type(f_schedule_plan).fsep_forward = begun\n",
        *_ranks("combined_1f1b"),
        "-k",
        "two_layers",
    ),
    _LAYER.fault(
        "forward fetches the next layer while the present one is needed",
        "        if not self._by_parts:\n            self._coordinator",
        "        if self.training:\n            self._coordinator",
        *_ranks("combined_1f1b"),
        "-k",
        "two_layers",
    ),
    _LAYER.fault(
        "delayed weight gradients are not computed",
        "            self.state.split.computes_weights.popleft()()",
        "            self.state.split.computes_weights.popleft()",
        *_ranks("combined_1f1b"),
        "-k",
        "delayed",
    ),
    _NODES.fault(
        "rows are kept that the schedule frees",
        "        if self.config.overlap_moe_expert_parallel_comm:",
        "        if self.config.overlap_moe_expert_parallel_comm is None:",
        *_ranks("combined_1f1b"),
        "-k",
        "tokens",
    ),
    _GRADS.fault(
        "delayed gradients stay zero",
        "                computed[at], compute = self._delayed[position]\n",
        "                _, compute = self._delayed[position]\n                continue\n",
        *_ranks("combined_1f1b"),
        "-k",
        "delayed",
    ),
    # Dispatch.
    _PERMUTATION.fault(
        "probabilities of other pairs",
        "return token_P * num_experts + pair_P // max(num_tokens, 1), token_P",
        "return token_P * num_experts, token_P",
    ),
    _PERMUTATION.fault(
        "rows go back as they came",
        "return reorder(rows, self.sorted_R, self.arrived_R)",
        "return reorder(rows, self.arrived_R, self.sorted_R)",
    ),
    _PERMUTATION.fault(
        "the gradient is not sorted back",
        "ctx.save_for_backward(inverse)",
        "ctx.save_for_backward(order)",
    ),
    _PERMUTATION.fault(
        "places in int32 beyond its range",
        "flags.numel() < 2**31 else torch.int64",
        "flags.numel() < 2**63 else torch.int64",
        *_unit("permutation", "kernels"),
    ),
    _ROW_MAP.fault(
        "copies are summed as they are",
        "dtype = torch.promote_types(copies_XH.dtype, torch.float32)",
        "dtype = copies_XH.dtype",
    ),
    _ROW_MAP.fault(
        "a transpose is taken for kept rows",
        "tensor.dtype != self.dtype or tensor.stride() != (self.width, 1)",
        "tensor.dtype != self.dtype",
    ),
    _DISPATCH.fault(
        "a re-run takes new routing",
        "return routing_map_TE if planned_TE is None else planned_TE",
        "return routing_map_TE",
        *_ranks("dispatcher", "parity"),
    ),
    _DISPATCHER.fault(
        "one slot is never sorted",
        "if self.num_local_experts > 1:",
        "if self.num_local_experts > 2:",
    ),
    _DISPATCHER.fault(
        "shared experts are left out",
        "            output += self.shared_experts.get_output()",
        "            self.shared_experts.get_output()",
        *_ranks("parity"),
        "-k",
        "losses",
    ),
    # Parameters, checkpoints and resuming.
    _SLICES.fault(
        "every rank keeps the first rows",
        "slice_ErK[expert].copy_(whole_RK[spec.start : spec.end])",
        "slice_ErK[expert].copy_(whole_RK[: spec.end - spec.start])",
    ),
    _SLICES.fault(
        "experts begin alike",
        "expert_seed(seed, layer, spec.name, expert))",
        "expert_seed(seed, layer, spec.name, 0))",
    ),
    _SLICES.fault(
        "a slice is saved at the first row",
        "(*first_of_layers, 0, spec.start, *(0 for _ in columns))",
        "(*first_of_layers, 0, 0, *(0 for _ in columns))",
        *_unit("slices"),
        *_ranks("checkpoints"),
    ),
    _SLICES.fault(
        "slices count once in the norm",
        "slice_ErK.tensor_model_parallel = True",
        "slice_ErK.tensor_model_parallel = False",
        *_unit("slices"),
        *_ranks("parity"),
        "-k",
        "slice or tensor",
    ),
    _HOMES.fault(
        "replicas' outputs come first",
        "parts_TH = [at_home(), replicas()]",
        "parts_TH = [at_home(), replicas()][::-1]",
    ),
    # LoRA on experts.
    _COMPUTE.fault(
        "a replica computes without its home's adapter",
        "output_TR if added_TR is None else output_TR + added_TR",
        "output_TR",
    ),
    _COMPUTE.fault(
        "a replica's adapter is another layer's",
        "return layer * (1 + int(self.has_bias)) + sum(",
        "return layer * (1 + int(self.has_bias)) + 0 * sum(",
        *_ranks("parity"),
        "-k",
        "lora-announced",
    ),
    _HOMES.fault(
        "gradients of replicas' adapters stay there",
        "matrices += adapter.homes",
        "matrices += [tuple(part.detach() for part in home) for home in adapter.homes]",
        *_ranks("lora_on_experts"),
        "-k",
        "travel",
    ),
    _ADAPTERS.fault("adapters are not scaled", "hidden * part.scale", "hidden"),
    _SHARE.fault(
        "a rank's adapters in one parameter are all its first",
        "return [*parts[0].unbind()]",
        "return [parts[0][0]] * len(parts[0])",
        *_ranks("lora_on_experts"),
        "-k",
        "grouped",
    ),
    # Homes by a permutation, and pairs.
    _MOVES.fault(
        "initial values are sent in the order of experts",
        "sent_h = np.argsort(position_h)",
        "sent_h = np.arange(len(position_h))",
        *_HOME_ORDER,
        "-k",
        "initial",
    ),
    _MOVES.fault(
        "checkpoints number experts by position",
        "home.expert_E[offset[expert_axis]]",
        "home.position_E[offset[expert_axis]]",
        *_HOME_ORDER,
        "-k",
        "goes_on_where",
    ),
    _MOVES.fault(
        "cut gates keep the number of stock's expert",
        "entry.build_fn = partial(_built, expert_axis, home, entry.build_fn)",
        "pass",
        *_HOME_ORDER,
        "-k",
        "goes_on_where",
    ),
    _LAYER.fault(
        "probabilities stay in the order of experts",
        "probs, routing_map = probs.index_select(1, home_E), ",
        "probs, routing_map = probs, ",
        *_ranks("parity"),
        "-k",
        "homes-",
    ),
    _in("runtime/planning/announced_layouts.py", *_HOME_ORDER, "-k", "announced").fault(
        "announced counts stay in the order of experts",
        "self.in_force.homes[layer].by_position(counts_NE)",
        "counts_NE",
    ),
    _in("runtime/planning/mailbox.py", *_ranks("pairs")).fault(
        "traces have counts of home positions",
        "by_expert_NE = self._homes[layer].by_expert(counts_NE)",
        "by_expert_NE = counts_NE",
    ),
    _in("runtime/planning/mailbox.py", *_ranks("pairs")).fault(
        "traces have pairs of home positions",
        "by_expert_EE = self._homes[layer].pairs_by_expert(pairs_EE)",
        "by_expert_EE = pairs_EE",
    ),
    _in("runtime/planning/mailbox.py", *_ranks("pairs")).fault(
        "traces have sets of home positions",
        "its_TE = self._homes[layer].by_expert(chosen_TE[is_token_T])",
        "its_TE = chosen_TE[is_token_T]",
    ),
    _PAIR_COUNTS.fault(
        "every rank's sets are the first's",
        "first = self._groups.rank * self._sampled",
        "first = 0",
    ),
    _in("plugin/checkpoints.py", *_HOME_ORDER, "-k", "buffers").fault(
        "buffers of all permuted homes are alike", 'f"homes-{homes}"', '"homes"'
    ),
    _in("runtime/planning/planner_checkpoint.py", *_unit("home_order")).fault(
        "plans on their way keep home positions",
        "{at: of_layout[at](made) for",
        "{at: made for",
    ),
    _in("planner/coactivation.py", *_unit("coactivation")).fault(
        "homes by pairs are a rank's last slots",
        "[:, :home_slots]",
        "[:, -home_slots:]",
    ),
    _in("planner/coactivation.py", *_unit("coactivation")).fault(
        "a layout by counts with fewer rows is not taken",
        "if crossings.rows(hosts_of(by_counts, geometry)) < rows:",
        "if crossings.rows(hosts_of(by_counts, geometry)) > rows:",
    ),
    _BY_PAIRS.fault(
        "homes by pairs are counted on the steps that planned them",
        "pairs.of_layer(layer, planned)",
        "pairs.of_layer(layer, counted)",
    ),
    _BY_PAIRS.fault(
        "homes by pairs are kept where they save no rows",
        "if rows(order_E) >= rows(stock_E) and",
        "if rows(order_E) > rows(stock_E) and",
    ),
    _BY_PAIRS.fault(
        "homes by pairs may make a rank heavier",
        "if max_over_mean(one_E) <= most",
        "if True",
    ),
    _in("planner/exact.py", *_unit("visit_quotas")).fault(
        "a rank expects tokens by other quotas than are sent",
        "native.rank_columns(*self._arguments(), rank, self.top_k)",
        "native.rank_columns(*self._arguments(), rank)",
    ),
    _in("planner/guard.py", *_unit("visit_quotas")).fault(
        "a decision's quotas forget the tokens that visit a node",
        "ExactQuotas(layout, size, counts_NE, loads_S, top_k)",
        "ExactQuotas(layout, size, counts_NE, loads_S)",
    ),
    _in("planner/home_order.py", *_unit("home_order")).fault(
        "values by expert are ordered as by position",
        "np.ascontiguousarray(values_E[..., self.position_E])",
        "np.ascontiguousarray(values_E[..., self.expert_E])",
    ),
    _PAIR_COUNTS.fault(
        "pairs are counted in half precision",
        "chosen_TE = routing_map_TE.to(torch.float32)",
        "chosen_TE = routing_map_TE.to(torch.float16)",
    ),
    _PAIR_COUNTS.fault("a repeated step counts twice", "if not begins:", "if True:"),
    # Experts in fp8.
    _SHARE.fault(
        "a rank's replicated experts in fp8 are all its first",
        "self._packer.pack(self._homes_hRK[home])",
        "self._packer.pack(self._homes_hRK[0])",
        *_ranks("fp8_experts"),
        "-k",
        "bit_for_bit_as",
    ),
    _FP8_TE.fault(
        "gradients are quantised as tokens are",
        "self._tokens_quantiser(self._backward_kind",
        "self._tokens_quantiser(self._forward_kind",
    ),
    _FP8_TE.fault(
        "scales of tokens are for square blocks",
        "return self._quantiser(kind, parameters, dimensions=1)",
        "return self._quantiser(kind, parameters, dimensions=2)",
    ),
    _MOVES.fault(
        "master weights of moved parameters in fp8 stay",
        "kept_RK.copy_(value_RK)",
        "pass",
        *_HOME_ORDER,
        "-k",
        "fp8_parameters",
    ),
    _SLOT_CONFIGS.fault(
        "home experts take tokens as padded where HybridEP dispatches them",
        'padding.moe_token_dispatcher_type = "alltoall"',
        "padding.moe_token_dispatcher_type = config.moe_token_dispatcher_type",
    ),
    _SLOT_CONFIGS.fault(
        "dispatchers pad tokens for fp8",
        "slots.fp8 = slots.fp4 = None",
        "slots.fp4 = None",
    ),
    _LAYER.fault(
        "layers in bf16 are those after",
        "is_first_last_bf16_layer(self.config, layer_number - 1)",
        "is_first_last_bf16_layer(self.config, layer_number)",
        *_ranks("fp8_experts"),
        "-k",
        "restored_in_bf16",
    ),
    _FP8_TE.fault(
        "parameters in fp8 are quantised again",
        "if not isinstance(weight_RK, self._tensors.Float8BlockwiseQTensor):",
        "if True:",
    ),
    _FP8_MX.fault(
        "parameters in mxfp8 are quantised again",
        "if isinstance(weight_RK, self._tensors.MXFP8Tensor):",
        "if False:",
    ),
    _FP8_SUPPORT.fault(
        "older cards compute every recipe",
        "return self.first <= capability < self.end and",
        "return capability < self.end and",
    ),
    _FP8_MX.fault(
        "scales along columns are padded as those along rows",
        "tile = _TILE[::-1] if by_columns else _TILE",
        "tile = _TILE",
    ),
    _SHARE.fault(
        "backward has the payloads of forward",
        "return self if packers == self.packers else replace(self, packers=packers)",
        "return self",
        *_ranks("fp8_experts"),
        "-k",
        "bit_for_bit_as and mxfp8",
    ),
    _SLOT_LINEAR.fault(
        "gradients of inputs are of forward's weights",
        "experts.backward_weights.matrix(position), tokens_C",
        "experts.weights.matrix(position), tokens_C",
    ),
    _DIRECTIONS.fault(
        "backward prefetches its own weights where a checkpoint runs forward first",
        "return self.weights if self._reruns else self.backward_weights",
        "return self.backward_weights",
    ),
    _DIRECTIONS.fault(
        "another pass takes over weights of the other direction",
        "following.first_in_backward.share is self.backward_weights.share",
        "self.is_same_layer(following)",
    ),
    _FETCHED.fault(
        "an operation hands its weights on to one of the other direction",
        "if following.share is self.share and self.index.has_replicas:",
        "if self.index.has_replicas:",
    ),
    _STEP_DIRECTIONS.fault(
        "weights of backward outlive a step",
        "self.experts.backward_weights.free()",
        "pass",
    ),
    _FP8_PADDING.fault(
        "rows of zeros come before a slot's tokens",
        "padded_nK[: len(part_nK)].copy_(part_nK)",
        "padded_nK[len(padded_nK) - len(part_nK) :].copy_(part_nK)",
    ),
    _FP8_PAYLOAD.fault(
        "scales of square blocks are not in fours",
        "scales_columns = -(-columns // (BLOCK * _SCALES)) * _SCALES",
        "scales_columns = -(-columns // BLOCK)",
    ),
    _MAIN_GRADS.fault(
        "a main gradient is not marked",
        "parameter.grad_added_to_main_grad = True",
        "parameter.grad_added_to_main_grad = False",
    ),
    _STATE.fault(
        "layouts of another sharding are resumed",
        "geometry.check_layout(layout)",
        "layout.shape",
    ),
    _STATE.fault(
        "the oldest layouts are resumed",
        "layouts=layouts[:num_layers],",
        "layouts=layouts[-num_layers:],",
    ),
    _IN_FORCE.fault(
        "a state of another step is taken",
        "if state.next_step != first_step:",
        "if state.next_step > first_step:",
    ),
    _IN_FORCE.fault(
        "a state is saved one step late", "next_step=self._step + 1,", "next_step=self._step + 2,"
    ),
    _IN_FORCE.fault(
        "a version begins anew",
        "        self.version = state.version\n",
        "        self.version = 0\n",
    ),
    _IN_OWN_LOOP.fault(
        "a loop of one's own may do all that flags may not",
        "current is None or not config.num_moe_experts",
        "current is None or config.num_moe_experts",
    ),
    _WHOLE.fault(
        "each rank's optimizer state is that of the first rows",
        "flat[self.elements] = local",
        "flat[: len(local)] = local",
    ),
    _WHOLE.fault("loaded steps begin anew", "].fill_(step)", "].fill_(0)"),
    _STATE_BYTES.fault(
        "frozen weights are free", "of.experts + frozen)", "of.experts + 0 * frozen)"
    ),
    _MEMORY.fault(
        "frozen experts have gradients",
        "* method.experts_held * model.expert_adapters",
        "* method.experts_held * model.expert_weights",
    ),
    _UNSHARD.fault(
        "weights stay whole from forward to backward",
        "moe = layer.moe\n        began_s = _unshard(clocks, layer, began_s)",
        "moe = layer.moe",
    ),
    _CLOCKS.fault(
        "gathers and reduces have links of their own",
        "self.gathered_s = end_s + max(both_s, 0.0)",
        "self.gathered_s = end_s",
    ),
    _WORK.fault(
        "gradients of frozen experts go home",
        "reduce=reduce.times(share) if",
        "reduce=reduce.times(1 + share) if",
    ),
    _SHARDED.fault(
        "home experts' gradients are scaled at each microbatch",
        "[part for part in params if not _are_of_experts([part])], *args",
        "params, *args",
    ),
    _LOADING.fault(
        "what is missing is not said",
        "        if self._missing:\n",
        "        if not self._missing:\n",
    ),
    _LAYER.fault(
        "layers need no number for good", "        _is_numbered_later.reset(token)", "        pass"
    ),
)
