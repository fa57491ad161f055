"""Parallel sizes of a run, and the parts of its iterations.

Legend: N ranks of the FSEP group, T tokens of a rank in a microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from megatron_laer.choices import Recompute


@dataclass(frozen=True)
class RunShape:
    """Parallel sizes of a run.

    Attributes:
        ranks: N, of one FSEP group; every pipeline stage has `replicas` such groups.
        node_size: G.
        tokens: T, of a rank in a microbatch.
        microbatches: of an iteration.
        stages: p, of the pipeline.
        chunks: model chunks of a stage; more than one is the interleaved schedule.
        replicas: groups that hold the same experts, between which slices are data parallel.
        tensor: ranks that share a sequence in attention, with sequence parallelism.
        recompute: what backward computes again.
        shards_optimizer: Megatron's distributed optimizer.
        flash_attention: whether attention's scores stay on the chip.
        overlaps_data_parallel: `--overlap-grad-reduce` and `--overlap-param-gather`.
    """

    ranks: int
    node_size: int
    tokens: int
    microbatches: int
    stages: int = 1
    chunks: int = 1
    replicas: int = 1
    tensor: int = 1
    recompute: Recompute = Recompute.NONE
    shards_optimizer: bool = True
    overlaps_data_parallel: bool = True
    flash_attention: bool = True

    def __post_init__(self) -> None:
        for name in ("tokens", "microbatches", "stages", "chunks", "replicas", "tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.chunks > 1 and self.stages == 1:
            raise ValueError(
                f"{self.chunks} chunks on one stage: the interleaved schedule needs a pipeline; "
                "give more stages, or one chunk"
            )
        if self.chunks > 1 and self.microbatches % self.stages != 0:
            raise ValueError(
                f"{self.microbatches} microbatches on {self.stages} stages of {self.chunks} "
                "chunks: the interleaved schedule takes a multiple of the stages"
            )
        if self.ranks % self.tensor != 0:
            raise ValueError(f"{self.tensor} tensor-parallel ranks do not divide the {self.ranks}")

    @property
    def world(self) -> int:
        """Return the number of all ranks."""
        return self.ranks * self.replicas * self.stages

    @property
    def data_parallel(self) -> int:
        """Return how many ranks hold the same dense weights."""
        return self.ranks * self.replicas // self.tensor

    def layers_by_chunk(self, layers: int) -> list[list[int]]:
        """Deal layers out to the pipeline's chunks, in the order in which a microbatch meets them.

        Chunk c of stage s is at place c * stages + s. As even as can be, the first get more.
        """
        parts = self.stages * self.chunks
        if layers < parts:
            raise ValueError(
                f"{layers} layers are too few for {self.stages} stages of {self.chunks} chunks; "
                f"give at most {layers} chunks in all"
            )
        bounds = [-(-layers * part // parts) for part in range(parts + 1)]
        return [list(range(*pair)) for pair in pairwise(bounds)]
