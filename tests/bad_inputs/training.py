"""Flags and variables of training that cannot work, each with the expected message.

They are added to flags with which a run of 8 experts on 2 ranks would start.
"""

from __future__ import annotations

RANKS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}

ON = "--expert-parallel-mode fsep "
FLEX = "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend "

_FLAGS = (
    ("--expert-parallel-mode dense", "invalid choice: 'dense'"),
    ("--fsep-capacity 3", "--fsep-capacity 3: no effect with --expert-parallel-mode standard"),
    ("--fsep-record-trace x", "--fsep-record-trace x: no effect"),
    (ON + "--fsep-capacity 0", "--fsep-capacity 0: must be at least 1"),
    (ON + "--fsep-capacity -1", "--fsep-capacity -1"),
    (ON + "--fsep-capacity 3", "--fsep-capacity 3: the slots of 2 ranks must hold each of 8"),
    (ON + "--fsep-capacity 9", "--fsep-capacity 9: the slots of 2 ranks must hold each of 8"),
    (ON + "--fsep-capacity 1000000000000000000000", "--fsep-capacity 1000000000000000000000"),
    (ON + "--fsep-capacity x", "argument --fsep-capacity: invalid int value: 'x'"),
    (ON + "--fsep-sharding tokens", "invalid choice: 'tokens'"),
    (ON + "--fsep-sharding experts --fsep-capacity 4", "--fsep-capacity 4: each rank has 4 home"),
    (ON + "--fsep-sharding experts --num-experts 9", "9 experts cannot be at home on 2 ranks"),
    (ON + "--fsep-sharding experts --num-experts 1", "1 experts cannot be at home on 2 ranks"),
    (ON + "--fsep-sharding experts --fsep-planner laer", "--fsep-planner laer: moves every expert"),
    (
        ON + "--fsep-sharding experts --fsep-allow-unproven dense-fp8 --fp8-format hybrid",
        "--fsep-allow-unproven dense-fp8: Transformer Engine would compute home experts in fp8",
    ),
    (
        ON + "--fsep-sharding rows --fsep-allow-unproven fp8-experts --fp8-format hybrid",
        "--fsep-allow-unproven fp8-experts: rows of experts are kept and moved in the parameters'",
    ),
    (
        ON + "--fsep-allow-unproven fp8-experts --fp8-format hybrid",
        "--fp8-recipe 'delayed', Megatron's default, with --fsep-allow-unproven fp8-experts: ",
    ),
    (ON + "--fsep-homes absent.json", "--fsep-homes 'absent.json': [Errno 2] No such file"),
    (ON + "--fsep-homes=", "--fsep-homes ''"),
    (
        ON + "--fsep-homes yaml-pipe.yaml",
        "--fsep-homes 'yaml-pipe.yaml': 'yaml-pipe.yaml' is a pipe",
    ),
    (ON + "--fsep-homes yaml-sparse.yaml", "has 68,719,476,736 bytes"),
    (
        ON + "--fsep-homes cluster-zero.yaml",
        "'cluster-zero.yaml' must be a file of homes: not JSON",
    ),
    (ON + "--fsep-homes x --fsep-sharding rows", "--fsep-homes 'x': no expert has a home"),
    (ON + "--fsep-homes x --ckpt-format torch", "such a checkpoint has experts by rank"),
    (ON + "--fsep-homes x --use-megatron-fsdp", "--fsep-homes 'x' with --use-megatron-fsdp: no t"),
    (ON + "--fsep-pairs-interval 0", "--fsep-pairs-interval 0: must be at least 1"),
    (
        ON + "--fsep-pairs-interval 5",
        "--fsep-pairs-interval 5: no effect, since --fsep-record-trace is not given; leave it out",
    ),
    (
        ON + "--fsep-sampled-sets 5 --fsep-record-trace out/sets",
        "--fsep-sampled-sets 5: no effect, since --fsep-pairs-interval is not given",
    ),
    (ON + "--fsep-planner magic", "--fsep-planner magic"),
    (ON + "--fsep-planner=", "--fsep-planner"),
    (ON + "--fsep-split odd", "invalid choice: 'odd'"),
    (ON + "--fsep-imbalance-tolerance nan", "--fsep-imbalance-tolerance nan"),
    (ON + "--fsep-imbalance-tolerance -1", "--fsep-imbalance-tolerance -1"),
    (ON + "--fsep-imbalance-tolerance inf", "--fsep-imbalance-tolerance inf"),
    (ON + "--fsep-imbalance-tolerance 1", "--fsep-imbalance-tolerance 1.0: no fresh layout"),
    (ON + "--fsep-imbalance-tolerance x", "invalid float value: 'x'"),
    (ON + "--fsep-plan-lag 0", "--fsep-plan-lag 0: must be at least 1"),
    (ON + "--fsep-plan-lag -5", "--fsep-plan-lag -5"),
    (ON + "--fsep-plan-lag 1000000000", "--fsep-plan-lag 1000000000: must be at most"),
    (ON + "--fsep-plan-lag 1.5", "invalid int value: '1.5'"),
    (ON + "--fsep-late-plan keep --deterministic-mode", "--fsep-late-plan keep"),
    (ON + "--fsep-restore step --fsep-plan-mode exact", "--fsep-plan-mode exact"),
    (ON + "--fsep-restore step --fsep-plan-mode announced", "--fsep-plan-mode announced"),
    (ON + "--fsep-split even --fsep-plan-mode adaptive", "--fsep-plan-mode adaptive"),
    (
        ON + FLEX + "deepep --num-experts 48 --moe-router-topk 33",
        "--moe-router-topk 33: DeepEP sends a token to at most 32 experts; give --moe-token-disp",
    ),
    (
        ON + FLEX + "deepep --num-experts 255 --fsep-capacity 129",
        "129 slots per rank: DeepEP takes at most 128 on 2 ranks; give --fsep-capacity 128 to 128,",
    ),
    (
        ON + FLEX + "deepep --num-experts 512",
        "257 slots per rank: DeepEP takes at most 128 on 2 ranks; give --moe-token-dispatcher-type",
    ),
    (
        ON + FLEX + "hybridep --fsep-capacity 5",
        "5 slots on each of 2 ranks: HybridEP needs a multiple of 4 in all; give --fsep-capacity 6",
    ),
    (
        ON + FLEX + "hybridep --num-experts 3 --fsep-capacity 3",
        "3 slots on each of 2 ranks: HybridEP needs a multiple of 4 in all; give --fsep-capacity 2",
    ),
    (ON + "--fsep-gemm te", "--fsep-gemm te: Transformer Engine"),
    (ON + "--fsep-node-size 0", "--fsep-node-size 0: must be at least 1"),
    (ON + "--fsep-node-size 3", "--fsep-node-size 3 does not divide"),
    (ON + "--fsep-node-size 1000000000000", "--fsep-node-size 1000000000000 does not divide"),
    (
        ON + "--fsep-grad-wire-dtype bf16 --fsep-restore-algorithm flat",
        "--fsep-grad-wire-dtype bf16: no effect",
    ),
    (ON + "--fsep-cluster nope", "--fsep-cluster 'nope': unknown cluster 'nope'; known are"),
    (ON + "--fsep-cluster=", "--fsep-cluster ''"),
    (ON + "--fsep-cluster ./absent.yaml", "--fsep-cluster './absent.yaml'"),
    (ON + "--fsep-cluster pipe.yaml", "--fsep-cluster 'pipe.yaml'"),
    (ON + "--fsep-cluster yaml-bomb.yaml", "line 1: anchors and aliases"),
    (ON + "--fsep-cluster yaml-brackets.yaml", "line 1: nested too deeply"),
    (ON + "--fsep-cluster yaml-sparse.yaml", "has 68,719,476,736 bytes"),
    (ON + "--fsep-cluster yaml-pipe.yaml", "is a pipe"),
    (ON + "--fsep-cluster cluster-zero.yaml", "nodes must be an integer of at least 1"),
    (ON + "--fsep-cluster /dev/zero", "--fsep-cluster '/dev/zero'"),
    (ON + "--fsep-record-layouts good.txt", "--fsep-record-layouts 'good.txt'"),
    (ON + "--fsep-record-layouts=", "--fsep-record-layouts '': the path is empty"),
    (ON + "--fsep-record-layouts /proc/x", "--fsep-record-layouts '/proc/x'"),
    (ON + "--fsep-record-trace good.txt", "--fsep-record-trace 'good.txt'"),
    (ON + "--fsep-record-trace good.txt/x", "--fsep-record-trace 'good.txt/x'"),
    (ON + "--fsep-record-trace pipe", "--fsep-record-trace 'pipe'"),
    (ON + "--fsep-record-trace /proc/x", "--fsep-record-trace '/proc/x'"),
    (ON + "--fsep-record-trace=", "--fsep-record-trace '': the path is empty"),
    (ON + f"--fsep-record-trace {'x' * 300}", "--fsep-record-trace 'xxx"),
    (ON + f"--fsep-cluster {'x' * 300}.yaml", "--fsep-cluster 'xxx"),
    (ON + "--fsep-record-layouts loop", "--fsep-record-layouts 'loop'"),
    (ON + "--fsep-record-trace good.txt", "--fsep-record-trace 'good.txt'"),
    (ON + "--fsep-record-trace=", "--fsep-record-trace '': the path is empty"),
    (ON + "--fsep-planner static --fsep-plan-lag 2", "--fsep-plan-lag 2: no effect"),
    (ON + "--fsep-plan-mode exact --fsep-planner laer", "--fsep-planner laer: no effect"),
    (ON + "--num-experts 0", "--num-experts 0"),
    (ON + "--num-experts -4", "--num-experts -4"),
    (ON + "--num-experts 40000", "--num-experts 40000: must be at most 32767"),
    (ON + "--expert-model-parallel-size 1", "--expert-model-parallel-size 1"),
    (ON + "--expert-model-parallel-size 0", "--expert-model-parallel-size 0"),
    (ON + "--expert-model-parallel-size 16", "--expert-model-parallel-size 16: must be at most"),
    (ON + "--moe-token-dispatcher-type allgather", "--moe-token-dispatcher-type allgather"),
    (ON + "--expert-tensor-parallel-size 2", "--expert-tensor-parallel-size 2"),
    (ON + "--moe-expert-capacity-factor 1.5", "--moe-expert-capacity-factor 1.5"),
    (ON + "--fp8-format hybrid", "--fp8-format hybrid"),
    (ON + "--fsep-allow-unproven warp", "invalid choice: 'warp' (choose from te-graphs, dense-fp8"),
    (ON + "--fsep-allow-unproven", "expected at least one argument"),
    (ON + "--fsep-allow-unproven dense-fp8", "--fsep-allow-unproven dense-fp8: no effect"),
    ("--fsep-allow-unproven dense-fp8 te-graphs", "dense-fp8 te-graphs: no effect with"),
    (
        ON + "--fsep-allow-unproven te-graphs --cuda-graph-impl full_iteration",
        "--cuda-graph-impl full_iteration",
    ),
    (
        ON + "--fsep-allow-unproven te-graphs --cuda-graph-impl transformer_engine",
        "--cuda-graph-modules other than attn, mamba, mlp, moe_preprocess, moe_router",
    ),
    (ON + "--optimizer soap", "--optimizer soap"),
    (ON + "--cuda-graph-impl local", "--cuda-graph-impl local"),
    (ON + "--moe-paged-stash", "--moe-paged-stash"),
    (ON + "--use-megatron-fsdp", "--use-megatron-fsdp"),
    (ON + "--yaml-cfg x.yaml", "--expert-parallel-mode has no effect with --yaml-cfg"),
    (ON + "--fsep-tolerance 1", "unrecognized arguments: --fsep-tolerance 1"),
)

_VARIABLES = (
    ("RANK", "abc", "RANK='abc': must be an integer from 0"),
    ("RANK", "", "RANK='': must be an integer from 0"),
    ("RANK", "2", "RANK=2 with WORLD_SIZE=2: must be 0 to 1"),
    ("RANK", "-1", "RANK='-1'"),
    ("WORLD_SIZE", "abc", "WORLD_SIZE='abc': must be an integer from 1"),
    ("WORLD_SIZE", "0", "WORLD_SIZE='0'"),
    ("WORLD_SIZE", "1e3", "WORLD_SIZE='1e3'"),
    ("LOCAL_RANK", "x", "LOCAL_RANK='x'"),
    ("LOCAL_RANK", "9", "LOCAL_RANK=9 with WORLD_SIZE=2"),
    ("LOCAL_WORLD_SIZE", "abc", "LOCAL_WORLD_SIZE='abc': must be an integer from 1"),
    ("LOCAL_WORLD_SIZE", "0", "LOCAL_WORLD_SIZE='0'"),
    ("LOCAL_WORLD_SIZE", "9", "LOCAL_WORLD_SIZE=9: more ranks on a node than the 2"),
    ("LOCAL_WORLD_SIZE", "9" * 5000, "LOCAL_WORLD_SIZE='999"),
    ("MEGATRON_LAER_DEVICE", "tpu", "MEGATRON_LAER_DEVICE='tpu' names no device"),
)

UNMODIFIED = (
    ("--fsep-cluster nope", "train: --fsep-cluster 'nope': unknown cluster 'nope'"),
    ("--num-experts 0", "train: --expert-parallel-mode fsep cannot run with --num-experts 0"),
    ("--fsep-capacity 9 --fsep-node-size 3", "(2) --fsep-node-size 3 does not divide"),
    ("--fsep-split odd", "invalid choice: 'odd'"),
)

CASES: tuple[tuple[tuple[str, ...], str, dict[str, str]], ...] = (
    *((tuple(words.split()), says, {}) for words, says in _FLAGS),
    *((tuple(ON.split()), says, {name: value}) for name, value, says in _VARIABLES),
)
