"""Stock Megatron without any of our code: ranks that load one checkpoint and save another.

    python tests/stock_alone.py CASES.json

runs each case on two gloo ranks. CUDA is replaced only as far as building a model, loading and
saving need it: tensors are made on the CPU, streams do nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, TypedDict

RANKS = 2


class Case(TypedDict):
    """Flags of Megatron, a folder with the checkpoint to read, and one for results.

    Results are `read-RANK.pt` and `saved-RANK.pt`, with parameters by name, and the checkpoint
    `saved`.
    """

    flags: list[str]
    grouped: bool
    load: str
    results: str


def run(rank: int, case: Case) -> None:
    import torch

    results = Path(case["results"])
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    store = f"file://{results / 'store'}"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=RANKS)
    flags = f"--load {case['load']} --save {results / 'saved'} --save-interval 1"
    sys.argv = ["stock_alone", *case["flags"], *flags.split()]
    with on_cpu():
        load_and_save(case, results, rank)
    ours = [name for name in sys.modules if name.split(".")[0] == "megatron_laer"]
    assert not ours, ours


def on_cpu() -> Any:
    from torch.overrides import TorchFunctionMode

    class OnCpu(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            given = kwargs or {}
            is_cuda = str(given.get("device")).startswith("cuda")
            return function(*args, **(given | {"device": "cpu"} if is_cuda else given))

    return OnCpu()


def load_and_save(case: Case, results: Path, rank: int) -> None:
    import torch
    from megatron.training.checkpointing import load_checkpoint, save_checkpoint

    model = build(grouped=case["grouped"])
    load_checkpoint([model], None, None)
    torch.save(dict(model.named_parameters()), results / f"read-{rank}.pt")
    fill(model, rank)
    torch.save(dict(model.named_parameters()), results / f"saved-{rank}.pt")
    save_checkpoint(1, [model], None, None, 0)


def build(*, grouped: bool) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.training import arguments, global_vars

    grouped_experts = import_module("grouped_experts").grouped

    args = arguments.parse_args()
    arguments.validate_args(args)
    args.padded_vocab_size = args.padded_vocab_size or 128 * -(-args.vocab_size // 128)
    global_vars.set_args(args)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=args.expert_model_parallel_size
    )
    config = arguments.core_transformer_config_from_args(args)
    with grouped_experts() if grouped else contextlib.nullcontext():
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=args.normalization
        )
        return GPTModel(
            config,
            spec,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            position_embedding_type=args.position_embedding_type,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        )


def fill(model: Any, rank: int) -> None:
    """Give each parameter other values, which differ between ranks for experts alone."""
    import torch

    for number, parameter in enumerate(model.parameters()):
        seed = 1000 * (rank + 1) * (not getattr(parameter, "allreduce", True)) + number
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))


def main(path: str) -> None:
    os.environ |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}
    import torch
    from torch import multiprocessing

    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.Stream = cuda.synchronize = lambda *_, **__: None
    cuda.get_rng_state = torch.get_rng_state
    import megatron.training.checkpointing  # noqa: F401  once, for all ranks

    for case in json.loads(Path(path).read_text()):
        multiprocessing.start_processes(run, (case,), nprocs=RANKS, start_method="fork")


if __name__ == "__main__":
    main(sys.argv[1])
