"""The paper's experiments: models, methods, settings, and parts without a counterpart.

Source: "LAER-MoE: Load-Adaptive Expert Re-layout for Efficient MoE Training", arXiv 2602.11686, and
the settings of its published artifact. This module lists the settings of each run and starts
nothing. Runs go through `scripts/slurm/pretrain.sbatch`, on a cluster and at toy scale alike.

Legend: N ranks, E experts, C slots per rank, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.published_files import MODELS as MODELS
from megatron_laer.device import CPU_FLAGS

# The paper's cluster.
NODES, GPUS_PER_NODE = 4, 8
TOY_RANKS = 2


@dataclass(frozen=True)
class Method:
    """Training method.

    `name` is part of command lines, log names and tables. `paper` is the name in the artifact's
    files, or None where the paper has no such method.
    """

    name: str
    paper: str | None
    about: str
    flags: str = ""
    uses_fsep: bool = True


STOCK = Method("stock", "megatron", "stock Megatron", uses_fsep=False)
STATIC = Method(
    "static",
    "FSDP",
    "FSEP whose layout never changes, even splits: the paper's FSDP+EP",
    "--fsep-planner static --fsep-split even",
)
LAER = Method(
    "laer",
    "LAER",
    "FSEP with the paper's planner and its even splits",
    "--fsep-planner laer --fsep-split even",
)
FSEP = Method("fsep", None, "FSEP as it is by default")


@dataclass(frozen=True)
class Length:
    """Length of runs in steps; `skipped` first steps are not counted.

    `time_limit` is a job's limit in the format of `sbatch --time`.
    """

    steps: int
    skipped: int
    time_limit: str = ""


@dataclass(frozen=True)
class Case:
    """A method with an auxiliary loss; `aux` is the flag's coefficient, 0 is off."""

    method: Method
    aux: str = "0"


@dataclass(frozen=True)
class Experiment:
    """The runs of one figure.

    `toy_models` are shrunk models that replace `models` at toy scale, as `toy_cases` replaces
    `cases`. A rank's microbatch has `sequences` sequences of `sequence` tokens. `stock_tensor` is
    stock Megatron's tensor-parallel size, by experts and top-k. `published` lists the artifact's
    files for the tables, and `notes` the parts without a true counterpart.
    """

    figure: int
    title: str
    models: Sequence[str]
    toy_models: Sequence[str]
    cases: Sequence[Case]
    length: Length
    toy_length: Length
    toy_cases: Sequence[Case] | None = None
    sequence: int = 8192
    sequences: int = 2
    stock_tensor: Mapping[str, int] = field(default_factory=lambda: {"e8k2": 8, "e16k4": 4})
    records_metrics: bool = False
    toy_flags: str = ""
    published: Sequence[str] = ()
    notes: Sequence[str] = ()

    def cases_at(self, *, toy: bool) -> Sequence[Case]:
        return self.cases if not toy or self.toy_cases is None else self.toy_cases

    def methods(self) -> list[Method]:
        return list({case.method.name: case.method for case in self.cases}.values())


@dataclass(frozen=True)
class Run:
    """One training: a model in a case."""

    model: str
    case: Case

    @property
    def name(self) -> str:
        return f"{self.model}_aux{self.case.aux}_{self.case.method.name}"


@dataclass(frozen=True)
class Request:
    """Request of the command line.

    `folder` is an absolute path. `data_prefix` and `tokenizer` are in the format of
    pretrain.sbatch. `flags` are Megatron flags after all others, and `sbatch` options of sbatch.
    """

    toy: bool
    folder: Path
    data_prefix: str
    tokenizer: str
    length: Length
    nodes: int = NODES
    sbatch: Sequence[str] = ()
    flags: Sequence[str] = ()


# The paper's flags, except those of pretrain.sbatch: Adam's betas, cosine decay, 10 % warm-up.
# Its weight decay differs between the systems that it compares; here all have pretrain.sbatch's.
_PAPER_FLAGS = (
    "--global-batch-size 128 --lr 1.25e-6 --min-lr 1.25e-7 --adam-eps 1e-5 --clip-grad 0 "
    "--eval-iters 0 --log-interval 1 --seed 1234"
)
# The paper recomputes layers for all systems but Megatron, where tensor parallelism saves memory.
_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

# A shrunk model of the paper, with the same kind of attention, router and precision.
_TOY_FLAGS = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --kv-channels 16 --num-query-groups 2 "
    "--global-batch-size 8 --num-workers 0"
)
_TOY_SEQUENCE = 64
_TOY_FFN = {"e8k2": 128, "e16k4": 64}


def family(model: str) -> str:
    """Return experts and top-k, the last part of a model's name."""
    return model.rsplit("-", 1)[1]


def settings(experiment: Experiment, run: Run, request: Request) -> dict[str, str]:
    """Return the environment variables for pretrain.sbatch."""
    method = run.case.method
    found = {
        "MODEL": run.model,
        "DATA_PREFIX": request.data_prefix,
        # A cache per run, since simultaneous jobs would write a common one together.
        "DATA_CACHE": str(request.folder / "cache" / run.name),
        "TOKENIZER": request.tokenizer,
        "MODE": "fsep" if method.uses_fsep else "standard",
    }
    if request.toy:
        # FSEP's own C: with the paper's, two ranks would not have a slot for each expert.
        return found | {
            "GPUS_PER_NODE": str(TOY_RANKS),
            "MEGATRON_LAER_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
        }
    if method.uses_fsep:
        # In all six models C is K.
        return found | {"CAPACITY": family(run.model).partition("k")[2]}
    return found | {"EP_SIZE": str(GPUS_PER_NODE)}


def flags(experiment: Experiment, run: Run, request: Request) -> list[str]:
    """Return Megatron's flags, which follow the `--` of pretrain.sbatch."""
    method, aux = run.case.method, run.case.aux
    sequence = _TOY_SEQUENCE if request.toy else experiment.sequence
    # A tensor-parallel group has one sequence at a time, as in the paper.
    is_tensor_parallel = not method.uses_fsep and not request.toy
    words = [*_PAPER_FLAGS.split(), *f"--train-iters {request.length.steps}".split()]
    words += ["--seq-length", str(sequence)]
    words += ["--micro-batch-size", str(1 if is_tensor_parallel else experiment.sequences)]
    if float(aux):
        words += f"--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff {aux}".split()
    if method.uses_fsep:
        words += [*_RECOMPUTE.split(), *method.flags.split()]
        if experiment.records_metrics:
            words += ["--fsep-record-metrics", str(metrics_folder(run, request))]
    if request.toy:
        ffn = _TOY_FFN[family(run.model)]
        words += [*CPU_FLAGS, *_TOY_FLAGS.split(), *experiment.toy_flags.split()]
        words += f"--ffn-hidden-size {ffn} --moe-ffn-hidden-size {ffn}".split()
        words += f"--max-position-embeddings {sequence}".split()
    elif is_tensor_parallel:
        tensor = experiment.stock_tensor[family(run.model)]
        words += f"--tensor-model-parallel-size {tensor} --sequence-parallel".split()
    return [*words, *request.flags]


def log_path(run: Run, request: Request) -> Path:
    return request.folder / f"{run.name}.log"


def metrics_folder(run: Run, request: Request) -> Path:
    return request.folder / f"{run.name}-metrics"
