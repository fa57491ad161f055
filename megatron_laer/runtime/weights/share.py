"""A rank's share of a layer's experts, and the forms in which exchanges carry it.

Legend: E experts, R rows of a matrix, r rows of this rank's slice, K columns, h home experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, Protocol, Self

import torch

from megatron_laer.planner.placed import Placed, row_bounds
from megatron_laer.runtime.comm.memory import Memory, empty
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

    def parts_of(self, slots_CRK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the matrices of slots, each `[C, P]` in the slots' dtype, in their memory."""
        sizes = [rows * each * self.columns for rows, each in self.matrices]
        parts: tuple[torch.Tensor, ...] = slots_CRK.flatten(1).split(sizes, dim=1)
        return parts

    def split(self, slots_CRK: torch.Tensor) -> list[torch.Tensor]:
        """Return the matrices of slots, each `[C, R, K]`, in the memory of their rows."""
        return [
            part.view(form.dtype).view(-1, form.rows, form.columns)
            for part, form in zip(self.parts_of(slots_CRK), self.parts, strict=True)
        ]


class Packer(Protocol):
    """Quantiser of home experts' matrices into payloads."""

    @property
    def carried(self) -> Carried: ...

    def pack(self, weight_RK: torch.Tensor, memory: Memory = empty) -> torch.Tensor:
        """Return the payload of one expert's matrix, in this memory."""
        ...


# Packers of the payloads that forward multiplies by, and of backward's; perhaps the same one.
Packers = tuple[Packer, Packer]


class Owned(NamedTuple):
    """A tensor that exchanges carry: a parameter, or one expert in that of all home experts."""

    parameter: torch.nn.Parameter
    expert: int | None
    packer: Packer | None

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this tensor's part of one that belongs to the parameter."""
        return whole if self.expert is None else whole[self.expert]

    def weight(self, memory: Memory = empty) -> torch.Tensor:
        weight = self.part(self.parameter)
        return weight if self.packer is None else self.packer.pack(weight.detach(), memory)


@dataclass(frozen=True)
class Share:
    """A rank's share of a layer's experts for exchanges.

    Slices are rows of every expert (`layer/experts/slices.py` initialises and saves them). Homes
    are whole experts, the parameters of stock's modules: stock computes with them and adds their
    gradients. Only sums over replicas are added here, to the main gradients or in autograd.

    A bias is a matrix with K = 1, and at home with R = 1: else all rows on the wire would be as
    short as the bias's, which kernels copy one by one.

    Attributes:
        matrices: for each matrix, its slice `[E, r, K]`, of a bias `[E·r]`; or the parameters of
            the h home experts, `[R, K]` or `[R]`. An adapter's may be one of all, `[h, R, K]`.
        sizes: R and K of each matrix.
        num_home: h; 0 for slices.
        packers: for each matrix whose experts travel as payloads, else None.
    """

    matrices: tuple[tuple[torch.nn.Parameter, ...], ...]
    sizes: tuple[tuple[int, int], ...]
    num_home: int
    packers: tuple[Packers | None, ...]

    @classmethod
    def of_slices(cls, slices: Sequence[torch.nn.Parameter], rows: Sequence[int]) -> Self:
        columns = [part.shape[-1] if part.dim() > 1 else 1 for part in slices]
        sizes = tuple(zip(rows, columns, strict=True))
        return cls(tuple((part,) for part in slices), sizes, 0, (None,) * len(slices))

    @classmethod
    def of_homes(
        cls,
        homes: Sequence[tuple[torch.nn.Parameter, ...]],
        packers: Sequence[Packers | None] = (),
    ) -> Self:
        shapes = ((1, *matrix[0].shape)[-2:] for matrix in homes)
        sizes = tuple((rows, columns) for rows, columns in shapes)
        return cls(tuple(homes), sizes, len(homes[0]), tuple(packers) or (None,) * len(homes))

    @property
    def at_home(self) -> bool:
        """Whether parameters are stock's, whose gradients and hooks come from its own backward."""
        return self.num_home > 0

    @property
    def device(self) -> torch.device:
        return self.matrices[0][0].device

    @cached_property
    def owned(self) -> tuple[tuple[Owned, ...], ...]:
        """Return the tensors that exchanges carry of each matrix."""

        def of(parts: Sequence[torch.nn.Parameter], packers: Packers | None) -> tuple[Owned, ...]:
            packer = packers and packers[0]
            if len(parts) < self.num_home:
                return tuple(Owned(parts[0], at, packer) for at in range(self.num_home))
            return tuple(Owned(part, None, packer) for part in parts)

        return tuple(map(of, self.matrices, self.packers))

    @cached_property  # passes through one layer hand on weights of one share
    def for_backward(self) -> Share:
        """Return the share that backward restores from: this one, unless payloads differ."""
        packers = tuple(pair and (pair[1], pair[1]) for pair in self.packers)
        return self if packers == self.packers else replace(self, packers=packers)

    @cached_property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        return tuple(chain(*self.matrices))

    @cached_property
    def own(self) -> tuple[Carried, ...]:
        """Return the form of each matrix's parameters and gradients."""
        pairs = zip(self.sizes, self.matrices, strict=True)
        return tuple(Carried(*size, matrix[0].dtype) for size, matrix in pairs)

    @cached_property
    def form(self) -> ExpertRows:
        """Return the form of all matrices in restores."""
        pairs = zip(self.own, self.packers, strict=True)
        return ExpertRows.of([packers[0].carried if packers else own for own, packers in pairs])

    @cached_property
    def grads_form(self) -> ExpertRows:
        """Return the form of the gradients of the matrices that are trained."""
        form = ExpertRows.of([self.own[at] for at in self.trained_at])
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
        trained = [any(part.requires_grad for part in matrix) for matrix in self.matrices]
        return tuple(at for at, is_trained in enumerate(trained) if is_trained)

    @cached_property
    def trained(self) -> tuple[torch.nn.Parameter, ...]:
        return tuple(chain(*(self.matrices[at] for at in self.trained_at)))

    @property
    def have_main_grads(self) -> bool:
        """Return True if gradients are added to main gradients, and not returned to autograd."""
        return main_grads.kept_for(self.trained)

    def restored_bytes(self, replica_slots: int) -> int:
        """Return the bytes of restored weights on this rank, for one direction."""
        return replica_slots * sum(part.num_bytes for part in self.form.parts)

    def weights(self, memory: Memory = empty) -> Sequence[torch.Tensor]:
        """Return the weights from which an exchange restores, in rows; read without gradients.

        Args:
            memory: of payloads, which are made there.
        """
        dtype = self.form.dtype
        return _InRows(self.owned, self.form.columns, lambda one: one.weight(memory).view(dtype))

    def summed(
        self,
        positions: Sequence[int],
        tensor: Callable[[Owned], torch.Tensor],
        sums: Callable[[torch.Tensor, int], torch.Tensor],
        placed: Placed,
        rank: int,
        experts: Collection[int],
    ) -> torch.Tensor:
        """Return sums of this rank's part of experts, `[E, M, …]`; zeros if it has none.

        Args:
            positions: of the M matrices.
            tensor: returns a tensor of the size of what it is given.
            sums: of N tensors, `[N, …]`, as `verify.sums` has them.
            experts: those that are wanted; others at home are zeros too.
        """
        num_experts, first, sums_M = placed.geometry.num_experts, rank * self.num_home, []
        for at in positions:
            rows, columns = self.sizes[at]
            if self.at_home:
                # Without memory of a tensor that is not wanted, which may be a payload to pack.
                none = sums(self.matrices[at][0].detach().new_empty(0, rows * columns), 0)
                of_homes = [
                    sums(tensor(one).unsqueeze(0), 0)
                    if expert in experts
                    else none.new_zeros(1, *none.shape[1:])
                    for expert, one in enumerate(self.owned[at], start=first)
                ]
                sums_E = none.new_zeros(num_experts, *none.shape[1:])
                sums_E[first : first + self.num_home] = torch.cat(of_homes)
            else:
                begin = row_bounds(rows, placed.geometry.num_ranks)[rank] * columns
                sums_E = sums(tensor(self.owned[at][0]).view(num_experts, -1), begin)
            sums_M.append(sums_E)
        return torch.stack(sums_M, dim=1)

    def new_sums(self) -> tuple[torch.Tensor, ...]:
        """Return zeros for the sums of `trained`, or nothing where main gradients take them."""
        return () if self.have_main_grads else tuple(map(torch.zeros_like, self.trained))

    def sums_of(self, sums: Sequence[torch.Tensor]) -> Callable[[Owned], torch.Tensor]:
        """Return the access to what a reduce adds to: new sums, or else main gradients."""
        of: Callable[[torch.nn.Parameter], torch.Tensor] = main_grads.main_grad_of
        if sums:
            of = dict(zip(self.trained, sums, strict=True)).__getitem__
        return lambda one: one.part(of(one.parameter))

    def sums_in_rows(self, sums: tuple[torch.Tensor, ...]) -> Sequence[torch.Tensor]:
        """Return the tensors that a reduce adds to, in rows."""
        trained = [self.owned[at] for at in self.trained_at]
        return _InRows(trained, self.grads_form.columns, self.sums_of(sums))

    def reduced(self, sums: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | None, ...]:
        """Return autograd's gradients of `trained`, with these new sums, if there are any."""
        if sums:
            return sums
        main_grads.order_hooks(self.trained)
        return self.added()

    def added(self) -> tuple[torch.Tensor | None, ...]:
        """Return autograd's gradients of `trained` where sums go to main gradients.

        They are dummies, as from Megatron's fused kernels. Stock's node brings a home's own one.
        """
        if self.at_home:
            return (None,) * len(self.trained)
        return tuple(map(main_grads.mark_added, self.trained))


class _InRows(Sequence[torch.Tensor]):
    """Tensors of this rank's experts in one exchange, each made when it is read.

    An exchange reads few, and each once. So no payload can outlive an update of the weights.
    """

    def __init__(
        self,
        owned: Sequence[Sequence[Owned]],
        columns: int,
        make: Callable[[Owned], torch.Tensor],
    ) -> None:
        self._owned, self._columns, self._make = [*chain(*owned)], columns, make

    def __len__(self) -> int:
        return len(self._owned)

    def __getitem__(self, at: Any) -> Any:
        return self._make(self._owned[at]).view(-1, self._columns)
