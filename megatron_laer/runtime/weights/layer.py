"""Static description of a MoE layer: names, sizes and this rank's share of its experts.

A share has rows of every expert (`Slices`, which `layer/experts/slices.py` initialises and saves),
or whole experts (`Homes`, stock's parameters).

Legend: E experts, R rows of a matrix, r rows of this rank's slice, K columns, h home experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from megatron_laer.runtime.weights import main_grads


class Carried(NamedTuple):
    """One expert's matrix as a restore carries it: its own form, or a payload of bytes."""

    rows: int
    columns: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.rows * self.columns * self.dtype.itemsize


class Packer(Protocol):
    """Quantiser of home experts' matrices into payloads."""

    @property
    def carried(self) -> Carried: ...

    def pack(self, weight_RK: torch.Tensor) -> torch.Tensor:
        """Return the payload of one expert's matrix."""
        ...


# Packers of the payloads that forward multiplies by, and of backward's; perhaps the same one.
Packers = tuple[Packer, Packer]


class Share(ABC):
    """A rank's share of a layer's experts for exchanges: a bias is a matrix with K = 1.

    Attributes:
        waits_inside: whether gradients must arrive before a checkpoint's backward pass ends.
    """

    waits_inside: ClassVar[bool]

    @property
    @abstractmethod
    def matrices(self) -> tuple[tuple[torch.nn.Parameter, ...], ...]:
        """Return the parameters of each matrix."""

    @property
    @abstractmethod
    def rows(self) -> tuple[int, ...]:
        """Return R of each matrix."""

    @abstractmethod
    def sources(self, num_experts: int) -> tuple[Any, ...]:
        """Return the weights of each matrix from which an exchange restores."""

    @abstractmethod
    def added(self) -> tuple[torch.Tensor | None, ...]:
        """Return autograd's gradients of `trained` where sums go to main gradients."""

    @abstractmethod
    def _by_expert(self, position: int, parts: Sequence[torch.Tensor], num_experts: int) -> Any:
        """Return the matrices of all experts of this share, of a matrix's parts."""

    def grad_target(self, position: int, num_experts: int) -> Any:
        """Return the main gradients of a matrix for a reduce to add to; None if there are none."""
        if not self.have_main_grads:
            return None
        grads = [main_grads.main_grad_of(part) for part in self.matrices[position]]
        return self._by_expert(position, grads, num_experts)

    def reduced(self, sums: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        """Return autograd's gradients of `trained` from the results of its matrices' reduces."""
        if self.have_main_grads:
            if self.waits_inside:
                main_grads.order_hooks(self.trained)
            return self.added()
        matrices = [self.matrices[at] for at in self.trained_at]
        return tuple(
            summed.view(part.shape)
            for of_matrix, parts in zip(sums, matrices, strict=True)
            for part, summed in zip(parts, of_matrix.chunk(len(parts)), strict=True)
        )

    @property
    def for_backward(self) -> Share:
        """Return the share that backward restores from: this one, unless payloads differ."""
        return self

    @cached_property
    def columns(self) -> tuple[int, ...]:
        return tuple(like.shape[-1] if like.dim() > 1 else 1 for like in self.likes)

    @cached_property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        return tuple(parameter for matrix in self.matrices for parameter in matrix)

    @cached_property
    def likes(self) -> tuple[torch.nn.Parameter, ...]:
        """Return a parameter of each matrix, for its dtype and device."""
        return tuple(matrix[0] for matrix in self.matrices)

    @cached_property
    def carried(self) -> tuple[Carried, ...]:
        """Return the form of each matrix in restores; gradients have the parameter's own."""
        matrices = zip(self.rows, self.columns, self.likes, strict=True)
        return tuple(Carried(rows, columns, like.dtype) for rows, columns, like in matrices)

    @cached_property
    def trained_at(self) -> tuple[int, ...]:
        """Return the positions of the matrices that are trained."""
        return tuple(
            at
            for at, matrix in enumerate(self.matrices)
            if any(part.requires_grad for part in matrix)
        )

    @cached_property
    def trained(self) -> tuple[torch.nn.Parameter, ...]:
        return tuple(parameter for at in self.trained_at for parameter in self.matrices[at])

    @property
    def have_main_grads(self) -> bool:
        """Return True if gradients are added to main gradients, and not returned to autograd."""
        return main_grads.kept_for(self.trained)


@dataclass(frozen=True)
class Slices(Share):
    """Rows of every expert of a layer.

    Attributes:
        slices: `[E, r, K]` for each matrix, `[E·r]` for each bias.
        whole_rows: R of each matrix.
    """

    waits_inside = False  # stock computes nothing with slices, so their hooks can run later

    slices: tuple[torch.nn.Parameter, ...]
    whole_rows: tuple[int, ...]

    @property
    def matrices(self) -> tuple[tuple[torch.nn.Parameter, ...], ...]:
        return tuple((part,) for part in self.slices)

    @property
    def rows(self) -> tuple[int, ...]:
        return self.whole_rows

    def sources(self, num_experts: int) -> tuple[torch.Tensor, ...]:
        return tuple(
            self._by_expert(at, [part.detach()], num_experts) for at, part in enumerate(self.slices)
        )

    def added(self) -> tuple[torch.Tensor, ...]:
        """Return dummy gradients, as from Megatron's fused kernels."""
        return tuple(map(main_grads.mark_added, self.trained))

    def _by_expert(
        self, position: int, parts: Sequence[torch.Tensor], num_experts: int
    ) -> torch.Tensor:
        (part,), columns = parts, self.columns[position]
        return part.view(num_experts, part.numel() // num_experts // columns, columns)


@dataclass(frozen=True)
class Homes(Share):
    """Whole experts of a layer that live on this rank: the parameters of stock's modules.

    Stock computes home slots and their gradients. Only sums over replicas are added here, to the
    main gradients or in autograd. Each parameter's hook waits for both, since autograd runs it
    after all the parameter's gradients have arrived.

    Attributes:
        homes: for each matrix, the parameters of the h home experts: `[R, K]`, or `[R]` of a bias.
            An adapter's may be one parameter of all, `[h, R, K]`.
        packers: for each matrix whose experts travel as payloads, else None; () for no payloads.
    """

    waits_inside = True  # stock's gradients arrive inside, and the hook runs when it ends

    homes: tuple[tuple[torch.nn.Parameter, ...], ...]
    packers: tuple[Packers | None, ...] = ()

    @property
    def matrices(self) -> tuple[tuple[torch.nn.Parameter, ...], ...]:
        return self.homes

    @cached_property
    def rows(self) -> tuple[int, ...]:
        return tuple(_matrices([parameter])[0].shape[0] for parameter in self.likes)

    @cached_property
    def carried(self) -> tuple[Carried, ...]:
        pairs = zip(super().carried, self._packers, strict=True)
        return tuple(form if packer is None else packer.carried for form, packer in pairs)

    @cached_property  # passes through one layer hand on weights of one share
    def for_backward(self) -> Homes:
        packers = tuple(of and (of[1], of[1]) for of in self.packers)
        return self if packers == self.packers else replace(self, packers=packers)

    def sources(self, num_experts: int) -> tuple[Sequence[torch.Tensor], ...]:
        return tuple(
            _Weights(matrix) if packer is None else _Payloads(packer, _Weights(matrix))
            for matrix, packer in zip(self.homes, self._packers, strict=True)
        )

    def added(self) -> tuple[None, ...]:
        """Return no gradient and mark nothing: stock's node brings the home's own gradient."""
        return (None,) * len(self.trained)

    def _by_expert(
        self, position: int, parts: Sequence[torch.Tensor], num_experts: int
    ) -> list[torch.Tensor]:
        return _matrices(parts)

    @property
    def _packers(self) -> tuple[Packer | None, ...]:
        packers = self.packers or (None,) * len(self.homes)
        return tuple(of and of[0] for of in packers)


def restored_bytes(share: Share, replica_slots: int) -> int:
    """Return the bytes of a layer's restored weights on this rank, for one direction."""
    return replica_slots * sum(carried.num_bytes for carried in share.carried)


class _Weights(Sequence[torch.Tensor]):
    """Matrices [R, K] of home experts, without autograd; most exchanges send few of them."""

    def __init__(self, homes: tuple[torch.nn.Parameter, ...]) -> None:
        self._homes = homes
        self._is_one = homes[0].dim() == 3

    def __len__(self) -> int:
        return len(self._homes[0]) if self._is_one else len(self._homes)

    def __getitem__(self, home: Any) -> Any:
        matrix = self._homes[0][home] if self._is_one else self._homes[home]
        return _as_matrix(matrix.detach())


class _Payloads(Sequence[torch.Tensor]):
    """Payloads of home experts in one exchange, each quantised when it is first sent.

    They are made anew for each exchange, so that none can outlive an update of the weights.
    """

    def __init__(self, packer: Packer, homes_hRK: Sequence[torch.Tensor]) -> None:
        self._packer, self._homes_hRK = packer, homes_hRK
        self._made: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._homes_hRK)

    def __getitem__(self, home: Any) -> Any:
        if home not in self._made:
            self._made[home] = self._packer.pack(self._homes_hRK[home])
        return self._made[home]


def _matrices(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return `[R, K]` of each home expert: a bias has one column, and one part may be of all."""
    if parts[0].dim() == 3:
        return [*parts[0].unbind()]
    return [*map(_as_matrix, parts)]


def _as_matrix(part: torch.Tensor) -> torch.Tensor:
    return part if part.dim() == 2 else part.unsqueeze(1)


GradsReady = Callable[[Sequence[torch.nn.Parameter]], None]


@dataclass(eq=False)
class LateGrads:
    """Gradients of a layer that are complete after autograd has asked for them, for all passes.

    Attributes:
        computes: for each pass whose input gradients are computed, oldest first, the function
            that `backward_dw` calls for those of the weights.
        report: reports parameters of stock's modules whose main gradients have the sums over
            replicas, after stock's own report without these; None outside of steps.
    """

    computes: deque[Callable[[], None]] = field(default_factory=deque)
    report: GradsReady | None = None


@dataclass(eq=False)
class FsepLayer:
    """Static description of one MoE layer on this rank.

    Attributes:
        index: among the layers of this rank, from 0.
        name: "layer 3" or "mtp 1", counted over the whole model from 1.
        number: the 3 of "layer 3".
        find_share: called at the first use, when the model is complete.
        adapters: describes adapters of home experts, as they must be on all ranks.
        passes: of each microbatch through the layer; several where Megatron repeats it.
        what_changed: describes changes to the experts since construction; None if there are none.
        on_step_end: called at the end of a training step.
        launch_kernels: called before the first step, to launch what the layer's own code launches.
        late: gradients that are complete after autograd has asked for them.
        quantised: whether home experts travel as payloads.
    """

    index: int
    name: str
    number: int
    is_mtp: bool
    find_share: Callable[[], Share]
    adapters: Callable[[], str]
    passes: int
    what_changed: Callable[[], str | None]
    on_step_end: Callable[[], None]
    launch_kernels: Callable[[], None]
    late: LateGrads = field(default_factory=LateGrads, kw_only=True)
    quantised: bool = field(default=True, kw_only=True)

    @cached_property
    def share(self) -> Share:
        return self.find_share()
