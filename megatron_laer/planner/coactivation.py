"""Layouts that keep experts which tokens choose together in one node, from counts of pairs.

With `--fsep-token-exchange node` a token is sent once to every node that it needs. `Crossings`
expects these rows from pairs of experts, and `place_together` searches for the layout with fewest
at balanced loads:

1. Every expert has a main place in one node. Places are swapped while more pairs are inside nodes.
2. Replicas fill the other slots, and both move at random while expected rows fall (annealing).
3. Inside nodes, experts are dealt to ranks by load. Slots change places until ranks can be balanced
   under drifting loads too. Drift is of single experts and, from pairs, of whole topics.

With experts at home, the main places of a rank are its home slots: `Placement.home_slot_order_E`
is the permutation of experts for `--fsep-homes`. Rank 0 plans alone, so floats are allowed.

Legend: N ranks, E experts, C slots per rank, S = N*C slots, M nodes, K experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Bool, Int64
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.native_core import native

Floats = npt.NDArray[np.float64]

# Any fixed number: the same pairs give the same layout.
_SEED = 2602
# Steps of the annealing, and its first temperature in rows per token.
_STEPS, _TEMPERATURE = 6000, 0.01
# Loads under which ranks must be balanced; log-deviations of an expert's load and of a topic's.
_DRIFTS, _EXPERT_DRIFT, _TOPIC_DRIFT = 6, 0.25, 0.5
# Tries to balance drifted loads, and rows per token that an excess equal to the mean is worth.
_REPAIRS, _EXCESS_ROWS = 600, 20.0
# Uneven loads of nodes, of the mean, that replicas even out.
_UNEVEN = 0.03
# An excess that no one notices: of a rank's mean load.
_FREE_EXCESS = 0.003
# A drifted load has some tokens per rank more or fewer than another, of this number.
_TOKENS_PER_RANK = 2000


@dataclass(frozen=True, eq=False)
class Placement:
    """Layout by pairs, and its experts in the order of their homes.

    The layout has experts' own numbers; `HomeOrder.layout_of_positions` numbers it by home.
    """

    layout: ExpertLayout
    home_slot_order_E: Int64
    rows_per_token: float


@dataclass(frozen=True, eq=False)
class Crossings:
    """Rows between nodes that pairs of experts lead us to expect.

    `pairs_EE` are the tokens that chose both of two experts, on the diagonal those of one.
    """

    pairs_EE: Int64
    num_nodes: int

    def __post_init__(self) -> None:
        check_pairs(self.pairs_EE)

    @cached_property
    def top_k(self) -> int:
        """Return K: each token of an expert is in K of its pairs."""
        return max(round(float(self.pairs_EE.sum() / max(np.trace(self.pairs_EE), 1))), 1)

    def rows(self, hosts_ME: Bool) -> float:
        """Expect the rows of a token to other nodes than its own, for the experts of each node.

        An expert of a single node leads tokens there. Their number of experts in the node has a
        known mean and variance: a Polya urn with both gives the share of tokens with none. A token
        of an expert in several nodes goes to one that it needs anyway, if there is one. Tokens come
        from all nodes alike.
        """
        top_k, num_nodes, tokens = self.top_k, self.num_nodes, self._tokens
        nodes_E = hosts_ME.sum(axis=0)
        single_ME = (hosts_ME & (nodes_E == 1)).astype(np.float64)
        together_EM = self._pairs_EE @ single_ME.T
        mean_M = single_ME @ self.load_E / tokens
        square_M = np.einsum("me,em->m", single_ME, together_EM) / tokens
        rows = (1 - 1 / num_nodes) * float((1 - _none(mean_M, square_M, top_k)).sum())
        several_X = np.flatnonzero((nodes_E > 1) & (nodes_E < num_nodes))
        if not len(several_X):
            return rows
        share_XM = together_EM[several_X] / self.load_E[several_X, None]
        missed_XM = (1 - np.minimum(share_XM / max(top_k - 1, 1), 1)) ** (top_k - 1)
        missed_X = np.where(hosts_ME[:, several_X].T, missed_XM, 1.0).prod(axis=1)
        away_X = self.load_E[several_X] / tokens * (1 - nodes_E[several_X] / num_nodes)
        return rows + float(away_X @ missed_X)

    @cached_property
    def _pairs_EE(self) -> Floats:
        return self.pairs_EE.astype(np.float64)

    @cached_property
    def load_E(self) -> Floats:
        return np.maximum(self._pairs_EE.diagonal(), 1.0)

    @property
    def _tokens(self) -> float:
        return float(self.load_E.sum()) / self.top_k


def place_together(pairs_EE: Int64, geometry: Geometry) -> Placement:
    """Return the layout with few rows between nodes at balanced loads; deterministic."""
    if pairs_EE.shape != (geometry.num_experts, geometry.num_experts):
        raise ValueError(
            f"pairs_EE has shape {pairs_EE.shape}, but the planner is for {geometry.num_experts} "
            "experts; give pairs of the same model"
        )
    rng = np.random.default_rng(_SEED)
    crossings = Crossings(pairs_EE, geometry.num_nodes)
    nodes = _Nodes.start(crossings, geometry, rng)
    nodes.anneal(rng)
    ranks = _Ranks.deal(nodes, geometry)
    ranks.balance(drifted_loads(pairs_EE, geometry.num_ranks, rng), rng)
    order_E = np.array([expert for slots in ranks.slots for expert in slots[: geometry.home_slots]])
    return Placement(ranks.layout, order_E, ranks.rows)


def hosts_of(layout: ExpertLayout, geometry: Geometry) -> Bool:
    """Return the experts of each node, bool [M, E]."""
    hosts_ME = np.zeros((geometry.num_nodes, geometry.num_experts), dtype=np.bool_)
    for hosts_E, slots_X in zip(
        hosts_ME, layout.slot_expert_S.reshape(geometry.num_nodes, -1), strict=True
    ):
        hosts_E[slots_X[slots_X != EMPTY]] = True
    return hosts_ME


def drifted_loads(pairs_EE: Int64, num_ranks: int, rng: np.random.Generator) -> list[Int64]:
    """Return the experts' loads as counted, and under drift of topics and of single experts.

    Tokens of some experts become more frequent, and their other experts with them.
    """
    loads_EE: Floats = pairs_EE.astype(np.float64)
    loads = [loads_EE.diagonal()]
    for _ in range(_DRIFTS):
        weight_E = np.exp(_TOPIC_DRIFT * rng.normal(size=len(pairs_EE)))
        loads.append((weight_E @ loads_EE) * np.exp(_EXPERT_DRIFT * rng.normal(size=len(pairs_EE))))
    total = _TOKENS_PER_RANK * num_ranks
    return [
        np.maximum(np.rint(load_E * (total / max(load_E.sum(), 1.0))), 1).astype(np.int64)
        for load_E in loads
    ]


def check_pairs(pairs_EE: Int64) -> None:
    """Refuse a table that counts no pairs of experts."""
    is_square = pairs_EE.ndim == 2 and pairs_EE.shape[0] == pairs_EE.shape[1]
    if not is_square or (pairs_EE != pairs_EE.T).any() or (pairs_EE < 0).any():
        raise ValueError(
            f"pairs_EE of shape {pairs_EE.shape} is no table of pairs; give a symmetric one "
            "[experts, experts] of numbers of tokens"
        )
    if (pairs_EE > pairs_EE.diagonal()).any():
        expert = int(np.argmax((pairs_EE > pairs_EE.diagonal()).any(axis=0)))
        raise ValueError(
            f"expert {expert} is in {pairs_EE[:, expert].max()} tokens of a pair, but has "
            f"{pairs_EE[expert, expert]} tokens; the diagonal must count the tokens of each expert"
        )


@dataclass(eq=False)
class _Nodes:
    """Search for the experts of each node: main places, one of each expert, and replicas.

    `main_E` is the node of each expert's main place; `replicas_ME` the other experts of nodes.
    """

    crossings: Crossings
    main_E: Int64
    replicas_ME: Bool

    @classmethod
    def start(cls, crossings: Crossings, geometry: Geometry, rng: np.random.Generator) -> _Nodes:
        """Swap main places from several starts, and replicate the most chosen experts."""
        num_nodes, num_experts = geometry.num_nodes, geometry.num_experts
        load_E = crossings.pairs_EE.diagonal()
        by_load_E = np.argsort(-load_E, kind="stable")
        main_E = np.empty(num_experts, dtype=np.int64)
        turn_E = np.arange(num_experts) % (2 * num_nodes)
        main_E[by_load_E] = np.minimum(turn_E, 2 * num_nodes - 1 - turn_E)
        starts = [main_E, *(rng.permutation(main_E) for _ in range(3))]
        swapped = [_swap_together(crossings.pairs_EE, start_E) for start_E in starts]
        best_E = max(swapped, key=lambda found_E: _inside(crossings.pairs_EE, found_E))
        replicas_ME = np.zeros((num_nodes, num_experts), dtype=np.bool_)
        for node in range(num_nodes):
            away_X = by_load_E[best_E[by_load_E] != node]
            free = geometry.node_size * geometry.capacity - int((best_E == node).sum())
            # Each node starts elsewhere among them, so that they have two nodes before four.
            chosen_X = np.roll(away_X[: 2 * free], -node * free // num_nodes)[:free]
            replicas_ME[node, chosen_X] = True
        return cls(crossings, best_E, replicas_ME)

    @property
    def hosts_ME(self) -> Bool:
        hosts_ME: Bool = self.replicas_ME.copy()
        hosts_ME[self.main_E, np.arange(len(self.main_E))] = True
        return hosts_ME

    def anneal(self, rng: np.random.Generator) -> None:
        """Move main places and replicas at random; more rows become less and less acceptable."""
        num_experts = len(self.main_E)
        rows = self.score()
        best = rows, self.main_E.copy(), self.replicas_ME.copy()
        for step in range(_STEPS):
            main_E, replicas_ME = self.main_E.copy(), self.replicas_ME.copy()
            one, other = rng.integers(num_experts, size=2)
            node = int(rng.integers(len(replicas_ME)))
            if rng.random() < 0.5:
                main_E[[one, other]] = main_E[[other, one]]
                if replicas_ME[main_E[one], one] or replicas_ME[main_E[other], other]:
                    continue  # the node would have the expert twice
            elif replicas_ME[node, one] and not self._has(node, other):
                replicas_ME[node, one], replicas_ME[node, other] = False, True
            else:
                continue
            moved = _Nodes(self.crossings, main_E, replicas_ME)
            after = moved.score()
            heat = _TEMPERATURE * (1 - step / _STEPS)
            if after < rows - heat * np.log(1 - rng.random()):
                self.main_E, self.replicas_ME, rows = main_E, replicas_ME, after
                if rows < best[0]:
                    best = rows, main_E.copy(), replicas_ME.copy()
        _, self.main_E, self.replicas_ME = best

    def score(self) -> float:
        """Return expected rows, and more of them for nodes that differ in load."""
        hosts_ME = self.hosts_ME
        load_M = hosts_ME @ (self.crossings.load_E / hosts_ME.sum(axis=0))
        uneven = np.maximum(np.abs(load_M / load_M.mean() - 1) - _UNEVEN, 0).sum()
        return self.crossings.rows(hosts_ME) + float(uneven)

    def _has(self, node: int, expert: int) -> bool:
        return bool(self.replicas_ME[node, expert]) or int(self.main_E[expert]) == node


@dataclass(eq=False)
class _Ranks:
    """Search for the experts of each rank: its main ones first, and then replicas."""

    crossings: Crossings
    geometry: Geometry
    slots: list[list[int]]
    num_main: list[int]

    @classmethod
    def deal(cls, nodes: _Nodes, geometry: Geometry) -> _Ranks:
        """Deal each node's experts to its ranks, heaviest first, to the least loaded with room."""
        share_E = nodes.crossings.pairs_EE.diagonal() / nodes.hosts_ME.sum(axis=0)
        size, slots, num_main = geometry.node_size, [], []
        for node, replicas_E in enumerate(nodes.replicas_ME):
            held: list[list[int]] = [[] for _ in range(size)]
            load_G = np.zeros(size)
            main_X = np.flatnonzero(nodes.main_E == node)
            kinds = [(main_X, -(-len(main_X) // size))]
            kinds.append((np.flatnonzero(replicas_E), geometry.capacity))
            for experts_X, most in kinds:
                for expert in experts_X[np.argsort(-share_E[experts_X], kind="stable")].tolist():
                    rank = min(
                        (rank for rank in range(size) if len(held[rank]) < most),
                        key=lambda rank: (load_G[rank], rank),
                    )
                    held[rank].append(expert)
                    load_G[rank] += share_E[expert]
                if experts_X is main_X:
                    num_main += [len(experts) for experts in held]
            # A node may have every expert and slots left.
            others = np.argsort(-share_E, kind="stable").tolist()
            for experts in held:
                left = [expert for expert in others if expert not in experts]
                experts += left[: geometry.capacity - len(experts)]
            slots += held
        return cls(nodes.crossings, geometry, slots, num_main)

    @property
    def layout(self) -> ExpertLayout:
        slots_S = np.array(self.slots, dtype=np.int16).reshape(-1)
        return ExpertLayout.from_slots(*self.geometry.shape, slots_S)

    @property
    def rows(self) -> float:
        return self.crossings.rows(hosts_of(self.layout, self.geometry))

    def balance(self, loads: list[Int64], rng: np.random.Generator) -> None:
        """Exchange slots while ranks cannot be balanced, for few more rows."""
        excess = self._excess(loads)
        score = self.rows + _EXCESS_ROWS * excess
        for _ in range(_REPAIRS):
            if excess == 0:
                return
            before = [list(experts) for experts in self.slots]
            if not self._move(rng):
                continue
            rows = self.rows
            if rows < score:
                excess_after = self._excess(loads)
                if rows + _EXCESS_ROWS * excess_after < score:
                    excess, score = excess_after, rows + _EXCESS_ROWS * excess_after
                    continue
            self.slots = before

    def _move(self, rng: np.random.Generator) -> bool:
        """Swap two slots of one kind, or give a replica slot to another expert, at random."""
        ranks, capacity = len(self.slots), self.geometry.capacity
        one, other = rng.integers(ranks, size=2).tolist()
        if rng.random() < 0.5:  # inside a node, where no row depends on it
            size = self.geometry.node_size
            other = one // size * size + other % size
        at, to = rng.integers(capacity, size=2).tolist()
        expert = self.slots[one][at]
        if rng.random() < 0.5:
            swapped = self.slots[other][to]
            same_kind = (at < self.num_main[one]) == (to < self.num_main[other])
            if not same_kind or swapped in self.slots[one] or expert in self.slots[other]:
                return False
            self.slots[one][at], self.slots[other][to] = swapped, expert
            return True
        new = int(rng.integers(self.geometry.num_experts))
        if at < self.num_main[one] or new in self.slots[one]:
            return False
        self.slots[one][at] = new
        return True

    def _excess(self, loads: list[Int64]) -> float:
        """Return the mean of the largest rank load above the mean load, as its share."""
        slots_S = self.layout.slot_expert_S
        ranks = self.geometry.num_ranks
        sum_s = 0.0
        for load_E in loads:
            counts_NE = np.zeros((ranks, len(load_E)), dtype=np.int64)
            counts_NE[:] = load_E // ranks
            counts_NE[0] += load_E % ranks
            loads_S = native.slot_loads(counts_NE, slots_S, ranks)
            largest = int(loads_S.reshape(ranks, -1).sum(axis=1).max())
            sum_s += max(largest * ranks / int(load_E.sum()) - 1 - _FREE_EXCESS, 0.0)
        return sum_s / len(loads)


def _none(mean_M: Floats, square_M: Floats, draws: int) -> Floats:
    """Return the share of tokens with no expert of a node, of known mean and mean square."""
    miss_M = 1 - mean_M / draws
    even_M = np.maximum(draws * miss_M * (1 - miss_M), 1e-9)
    likeness_M = ((square_M - mean_M**2) / even_M - 1) / max(draws - 1, 1)
    likeness_M = np.clip(likeness_M, -0.9 / draws, 0.9)
    pull_M = likeness_M / (1 - likeness_M)
    drawn_K1 = np.arange(draws)[:, None]
    steps_KM = (miss_M + drawn_K1 * pull_M) / (1 + drawn_K1 * pull_M)
    none_M: Floats = np.clip(steps_KM, 0, 1).prod(axis=0)
    return none_M


def _inside(pairs_EE: Int64, node_E: Int64) -> int:
    """Return the number of pairs inside nodes."""
    return int(pairs_EE[node_E[:, None] == node_E].sum())


def _swap_together(pairs_EE: Int64, node_E: Int64) -> Int64:
    """Swap the two experts that bring most pairs into nodes, until none do (Kernighan and Lin).

    No swap makes a node heavier than all are by more than a little.
    """
    node_E = node_E.copy()
    load_E = pairs_EE.diagonal()
    most = (1 + _UNEVEN) * load_E.sum() / (node_E.max() + 1)
    between_EE = pairs_EE * ~np.eye(len(pairs_EE), dtype=np.bool_)
    in_node_EM = between_EE @ (node_E[:, None] == np.arange(node_E.max() + 1))
    experts_E = np.arange(len(node_E))
    for _ in range(20 * len(node_E)):
        at_EE = in_node_EM[:, node_E]
        own_E = in_node_EM[experts_E, node_E]
        gain_EE = at_EE + at_EE.T - 2 * between_EE - own_E - own_E[:, None]
        load_M = np.bincount(node_E, weights=load_E)
        more_EE = load_E - load_E[:, None]
        after_EE = np.maximum(load_M[node_E][:, None] + more_EE, load_M[node_E] - more_EE)
        before_EE = np.maximum(load_M[node_E][:, None], load_M[node_E])
        is_heavy_EE = (after_EE > most) & (after_EE > before_EE)
        gain_EE[is_heavy_EE | (node_E[:, None] == node_E)] = 0
        one, other = divmod(int(np.argmax(gain_EE)), len(node_E))
        if gain_EE[one, other] <= 0:
            break
        here, there = node_E[one], node_E[other]
        node_E[[one, other]] = there, here
        moved_E = between_EE[:, other] - between_EE[:, one]
        in_node_EM[:, here] += moved_E
        in_node_EM[:, there] -= moved_E
    return node_E
