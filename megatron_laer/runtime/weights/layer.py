"""Static description of a MoE layer: names, sizes and this rank's share of its experts.

A share has rows of every expert (`Slices`, which `layer/experts/slices.py` initialises and saves),
or whole experts (`Homes`, stock's parameters).

Legend: E experts, R rows of a matrix, r rows of this rank's slice, K columns, h home experts.
"""

from __future__ import annotations

import math
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


class ExpertRows(NamedTuple):
    """All matrices of an expert in rows of one length, in which exchanges carry them.

    Attributes:
        parts: the matrices, one behind the other.
        matrices: of each its rows, and the rows of `columns` elements that each of them is.
        dtype: bytes where matrices have several.
    """

    parts: tuple[Carried, ...]
    matrices: tuple[tuple[int, int], ...]
    columns: int
    dtype: torch.dtype

    @classmethod
    def of(cls, parts: Sequence[Carried]) -> ExpertRows:
        dtypes = {part.dtype for part in parts}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.uint8
        widths = [part.columns * part.dtype.itemsize // dtype.itemsize for part in parts]
        columns = math.gcd(*widths)
        rows = [part.rows for part in parts]
        matrices = zip(rows, [width // columns for width in widths], strict=True)
        return cls(tuple(parts), tuple(matrices), columns, dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """Return the rows of an expert, and their length."""
        return sum(rows * each for rows, each in self.matrices), self.columns

    def split(self, slots_CRK: torch.Tensor) -> list[torch.Tensor]:
        """Return the matrices of slots, each `[C, R, K]`, in the memory of their rows."""
        sizes = [rows * each * self.columns for rows, each in self.matrices]
        parts = slots_CRK.flatten(1).split(sizes, dim=1)
        return [
            part.view(form.dtype).view(-1, form.rows, form.columns)
            for part, form in zip(parts, self.parts, strict=True)
        ]


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
    def tensors(self) -> int:
        """Return the number of tensors that exchanges carry of each matrix."""

    @property
    @abstractmethod
    def matrices(self) -> tuple[tuple[torch.nn.Parameter, ...], ...]:
        """Return the parameters of each matrix."""

    @property
    @abstractmethod
    def rows(self) -> tuple[int, ...]:
        """Return R of each matrix."""

    @abstractmethod
    def added(self) -> tuple[torch.Tensor | None, ...]:
        """Return autograd's gradients of `trained` where sums go to main gradients."""

    @abstractmethod
    def _tensor(self, position: int, number: int, of: Callable[[Any], Any]) -> torch.Tensor:
        """Return one of a matrix's tensors, of what `of` returns for its parameter."""

    def weights(self) -> Sequence[torch.Tensor]:
        """Return the weights from which an exchange restores, in rows."""
        form = self.form

        def made(at: int) -> torch.Tensor:
            part = self._carried(*divmod(at, self.tensors))
            own = part if part.dtype == form.dtype else part.view(form.dtype)
            return own.view(-1, form.columns)

        return _Owned(made, len(self.matrices) * self.tensors)

    def _carried(self, position: int, number: int) -> torch.Tensor:
        return self._tensor(position, number, torch.Tensor.detach)

    def new_sums(self) -> tuple[torch.Tensor, ...]:
        """Return zeros for the sums of `trained`, or nothing where main gradients take them."""
        return () if self.have_main_grads else tuple(map(torch.zeros_like, self.trained))

    def sums_in_rows(self, sums: tuple[torch.Tensor, ...]) -> Sequence[torch.Tensor]:
        """Return what a reduce adds to, in rows: the new sums, or else the main gradients."""
        columns, positions = self.grads_form.columns, self.trained_at
        of: Any = main_grads.main_grad_of
        if sums:
            of = dict(zip(self.trained, sums, strict=True)).get

        def made(at: int) -> torch.Tensor:
            matrix, number = divmod(at, self.tensors)
            return self._tensor(positions[matrix], number, of).view(-1, columns)

        return _Owned(made, len(positions) * self.tensors)

    def reduced(self, sums: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | None, ...]:
        """Return autograd's gradients of `trained`, with these new sums, if there are any."""
        if sums:
            return sums
        if self.waits_inside:
            main_grads.order_hooks(self.trained)
        return self.added()

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
    def form(self) -> ExpertRows:
        return ExpertRows.of(self.carried)

    @cached_property
    def grads_form(self) -> ExpertRows:
        """Return the form of the gradients of the matrices that are trained."""
        matrices = zip(self.rows, self.columns, self.likes, strict=True)
        own = [Carried(rows, columns, like.dtype) for rows, columns, like in matrices]
        form = ExpertRows.of([own[at] for at in self.trained_at])
        if not form.dtype.is_floating_point:
            dtypes = ", ".join(sorted({str(part.dtype) for part in form.parts}))
            raise ValueError(
                f"trained matrices of experts are in {dtypes}, and their gradients travel in one "
                "dtype: give adapters the experts' dtype"
            )
        return form

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

    @property
    def tensors(self) -> int:
        return 1

    def added(self) -> tuple[torch.Tensor, ...]:
        """Return dummy gradients, as from Megatron's fused kernels."""
        return tuple(map(main_grads.mark_added, self.trained))

    def _tensor(self, position: int, number: int, of: Callable[[Any], Any]) -> torch.Tensor:
        tensor: torch.Tensor = of(self.slices[position])
        return tensor


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
        return tuple(like.shape[max(like.dim() - 2, 0)] for like in self.likes)

    @property
    def tensors(self) -> int:
        return len(self.homes[0])

    @cached_property
    def carried(self) -> tuple[Carried, ...]:
        pairs = zip(super().carried, self._packers, strict=True)
        return tuple(form if packer is None else packer.carried for form, packer in pairs)

    @cached_property  # passes through one layer hand on weights of one share
    def for_backward(self) -> Homes:
        packers = tuple(of and (of[1], of[1]) for of in self.packers)
        return self if packers == self.packers else replace(self, packers=packers)

    def added(self) -> tuple[None, ...]:
        """Return no gradient and mark nothing: stock's node brings the home's own gradient."""
        return (None,) * len(self.trained)

    def _tensor(self, position: int, number: int, of: Callable[[Any], Any]) -> torch.Tensor:
        parts = self.homes[position]
        tensor: torch.Tensor = of(parts[0])[number] if parts[0].dim() == 3 else of(parts[number])
        return tensor

    def _carried(self, position: int, number: int) -> torch.Tensor:
        weight, packer = super()._carried(position, number), self._packers[position]
        return weight if packer is None else packer.pack(weight)

    @property
    def _packers(self) -> tuple[Packer | None, ...]:
        packers = self.packers or (None,) * len(self.homes)
        return tuple(of and of[0] for of in packers)


def restored_bytes(share: Share, replica_slots: int) -> int:
    """Return the bytes of a layer's restored weights on this rank, for one direction."""
    return replica_slots * sum(carried.num_bytes for carried in share.carried)


class _Owned(Sequence[torch.Tensor]):
    """Tensors of this rank's experts in one exchange, each made when it is first read.

    Most exchanges read few. Payloads are made anew for each exchange, so that none can outlive an
    update of the weights.
    """

    def __init__(self, make: Callable[[int], torch.Tensor], number: int) -> None:
        self._make, self._number = make, number
        self._made: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, at: Any) -> Any:
        if at not in self._made:
            self._made[at] = self._make(at)
        return self._made[at]


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
