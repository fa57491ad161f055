"""Parallel sizes of a run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from megatron_laer.choices import Recompute


@dataclass(frozen=True)
class RunShape:
    """Parallel sizes of a run.

    `ranks` are of one FSEP group; every pipeline stage has `replicas` such groups, between which
    slices are data parallel. `tokens` are a rank's in a microbatch. More than one of `chunks` per
    stage means the interleaved schedule. The embedding, or head and loss, may count as a layer of
    the pipeline. `tensor` ranks share attention, with sequence parallelism. With
    `attention_again`, `full` recompute includes attention.
    """

    ranks: int
    node_size: int
    tokens: int
    microbatches: int
    stages: int = 1
    chunks: int = 1
    replicas: int = 1
    tensor: int = 1
    embedding_counts: bool = False
    loss_counts: bool = False
    recompute: Recompute = Recompute.NONE
    shards_optimizer: bool = True
    overlaps_data_parallel: bool = True
    attention_again: bool = True

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
        return self.ranks * self.replicas * self.stages

    @property
    def synchronises(self) -> bool:
        """Return True if Megatron waits for the whole device between a pipeline's operations."""
        return self.stages > 1 and self.chunks == 1

    @property
    def can_overlap(self) -> bool:
        """Return True if Megatron takes combined 1F1B with this recompute and pipeline."""
        return self.recompute != Recompute.FULL and not self.synchronises

    @property
    def data_parallel(self) -> int:
        """Return the number of ranks that hold the same dense weights."""
        return self.ranks * self.replicas // self.tensor

    def layers_by_chunk(self, layers: int) -> list[list[int]]:
        """Return the layers of the pipeline's chunks, in the order of forward.

        Chunk c of stage s is at place c * stages + s. Numbers of layers differ by at most one.
        """
        parts = self.stages * self.chunks
        first = int(self.embedding_counts)
        counted = first + layers + int(self.loss_counts)
        if counted < parts:
            raise ValueError(
                f"{counted} layers are too few for {self.stages} stages of {self.chunks} chunks; "
                f"give at most {counted} chunks in all"
            )
        bounds = [
            min(max(-(-counted * part // parts) - first, 0), layers) for part in range(parts + 1)
        ]
        return [list(range(*pair)) for pair in pairwise(bounds)]

    def stage_layers(self, layers: int, stage: int) -> list[int]:
        """Return the layers of a stage, chunk after chunk."""
        return [layer for of in self.layers_by_chunk(layers)[stage :: self.stages] for layer in of]
