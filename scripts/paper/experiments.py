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
from megatron_laer.tools.model_flags import model_flags

# The paper's cluster.
NODES, GPUS_PER_NODE = 4, 8
TOY_RANKS = 4


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


def papers(planner: str) -> str:
    """Return the flags of the paper's system, as of `--fsep-preset laer`, with this planner."""
    return (
        f"--fsep-sharding rows --fsep-planner {planner} --fsep-set split=even "
        "--fsep-set restore_algorithm=flat"
    )


STOCK = Method("stock", "megatron", "stock Megatron", uses_fsep=False)
STATIC = Method(
    "static",
    "FSDP",
    "FSEP whose layout never changes: the paper's FSDP+EP",
    papers("static"),
)
LAER = Method(
    "laer",
    "LAER",
    "the paper's system, by its preset",
    "--fsep-preset laer",
)
FSEP = Method("fsep", None, "FSEP as it is by default")
# Saves the weights from which all runs of a figure start, by a step that does not change them.
FIRST = Method("first-weights", None, "stock Megatron at a learning rate of 0", uses_fsep=False)
_FIRST_FLAGS = (
    "--train-iters 1 --lr 0 --min-lr 0 --weight-decay 0 --no-save-optim --save-interval 1 --save"
)


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
    stock Megatron's tensor-parallel size, by experts and top-k. With `starts_alike` all runs of a
    model start with the weights that one of `FIRST` saves. `published` lists the artifact's
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
    starts_alike: bool = False
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

    `folder` is an absolute path. `tokenizer` is a folder with a Hugging Face tokenizer, or `bytes`.
    `flags` are Megatron flags after all others, and `sbatch` options of sbatch.
    """

    toy: bool
    folder: Path
    data_prefix: str
    tokenizer: str
    length: Length
    nodes: int = NODES
    sbatch: Sequence[str] = ()
    flags: Sequence[str] = ()


# The paper's weight decay differs between the systems that it compares; here all have the same.
_PAPER_FLAGS = (
    "--global-batch-size 128 --lr 1.25e-6 --min-lr 1.25e-7 --lr-decay-style cosine "
    "--lr-warmup-fraction 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-5 "
    "--weight-decay 0.1 --clip-grad 0 --use-distributed-optimizer --overlap-grad-reduce "
    "--overlap-param-gather --split 99,1,0 --eval-interval 500 --eval-iters 0 --log-interval 1 "
    "--seed 1234 --expert-tensor-parallel-size 1"
)
# The paper recomputes layers for all systems but Megatron, where tensor parallelism saves memory.
_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

# A shrunk model of the paper, with the same kind of attention, router and precision.
_TOY_FLAGS = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --kv-channels 16 --num-query-groups 2 "
    "--global-batch-size 16 --num-workers 0"
)
_TOY_SEQUENCE = 64
_TOY_FFN = {"e8k2": 128, "e16k4": 64}


def family(model: str) -> str:
    """Return experts and top-k, the last part of a model's name."""
    return model.rsplit("-", 1)[1]


def settings(run: Run, request: Request) -> dict[str, str]:
    """Return the environment variables for pretrain.sbatch."""
    if request.toy:
        return {
            "GPUS_PER_NODE": str(TOY_RANKS),
            "MEGATRON_LAER_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
        }
    # Megatron requires it with tensor parallelism.
    return {} if run.case.method.uses_fsep else {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def flags(experiment: Experiment, run: Run, request: Request) -> list[str]:
    """Return the flags of the training script."""
    method, aux = run.case.method, run.case.aux
    sequence = _TOY_SEQUENCE if request.toy else experiment.sequence
    # A tensor-parallel group has one sequence at a time, as in the paper.
    is_tensor_parallel = not method.uses_fsep and not request.toy
    words = [*model_flags(run.model), *_tokenizer_flags(request.tokenizer), *_PAPER_FLAGS.split()]
    # A cache per run, since simultaneous jobs would write a common one together.
    words += ["--data-path", request.data_prefix]
    words += ["--data-cache-path", str(request.folder / "cache" / run.name)]
    words += ["--expert-parallel-mode", "fsep" if method.uses_fsep else "standard"]
    words += ["--expert-model-parallel-size", str(_group_size(method, request))]
    words += ["--train-iters", str(request.length.steps)]
    words += ["--seq-length", str(sequence)]
    words += ["--micro-batch-size", str(1 if is_tensor_parallel else experiment.sequences)]
    if float(aux):
        words += f"--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff {aux}".split()
    if method.uses_fsep:
        words += [*_RECOMPUTE.split(), *method.flags.split()]
        # In all six models C is K. A toy's ranks need twice as many for two replicas of an expert.
        topk = int(family(run.model).partition("k")[2])
        words += ["--fsep-capacity", str(2 * topk if request.toy else topk)]
        if experiment.records_metrics:
            words += ["--fsep-record", str(metrics_folder(run, request)), "metrics"]
    if request.toy:
        ffn = _TOY_FFN[family(run.model)]
        if method.uses_fsep:  # `auto` would keep a toy's experts at home, without replicas
            words += ["--fsep-sharding", "rows"]
        words += [*CPU_FLAGS, *_TOY_FLAGS.split(), *experiment.toy_flags.split()]
        words += f"--ffn-hidden-size {ffn} --moe-ffn-hidden-size {ffn}".split()
        words += f"--max-position-embeddings {sequence}".split()
    elif is_tensor_parallel:
        tensor = experiment.stock_tensor[family(run.model)]
        words += f"--tensor-model-parallel-size {tensor} --sequence-parallel".split()
    if method is FIRST:
        words += [*_FIRST_FLAGS.split(), str(weights_folder(run, request))]
    elif experiment.starts_alike:
        words += ["--load", str(weights_folder(run, request)), "--finetune"]
    return [*words, *request.flags]


def _tokenizer_flags(tokenizer: str) -> list[str]:
    if tokenizer == "bytes":
        return ["--tokenizer-type", "NullTokenizer", "--vocab-size", "257"]
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]


def _group_size(method: Method, request: Request) -> int:
    if request.toy:
        return TOY_RANKS
    return request.nodes * GPUS_PER_NODE if method.uses_fsep else GPUS_PER_NODE


def log_path(run: Run, request: Request) -> Path:
    return request.folder / f"{run.name}.log"


def weights_folder(run: Run, request: Request) -> Path:
    return request.folder / f"{run.model}-weights"


def metrics_folder(run: Run, request: Request) -> Path:
    return request.folder / f"{run.name}-metrics"
