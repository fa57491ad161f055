import json
from pathlib import Path

import pytest

from megatron_laer.tools.model_flags import model_flags, model_values
from tests.processes import python

_ROOT = Path(__file__).resolve().parents[2]
MODELS = sorted(path.stem for path in (_ROOT / "configs" / "models").glob("*.yaml"))


def test_keys_become_flags_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("""
description: d
moe:
  num-experts: 8
architecture:
  swiglu: true
  norm-epsilon: 1.0e-5
  rotary_percent: 0.5
  position-embedding-type: "rope"
  cp-comm-type: [p2p, a2a]
""")
    flags = " ".join(model_flags(path))
    assert flags == (
        "--num-experts 8 --swiglu --norm-epsilon 1.0e-5 --rotary-percent 0.5 "
        "--position-embedding-type rope --cp-comm-type p2p a2a"
    )
    values = model_values(path)
    assert values["--rotary-percent"] == "0.5"  # found by either spelling
    assert (values["--swiglu"], values["--cp-comm-type"]) == ("", "p2p a2a")


# One process for all models, since importing Megatron takes seconds.
_PARSE = """
import json, sys
from megatron_laer.launch import prepare
prepare()
from megatron.training import arguments
from megatron_laer.tools.model_flags import model_flags, model_values
from megatron_laer.device import CPU_FLAGS

stdout, sys.stdout = sys.stdout, sys.stderr
names, run_flags = sys.argv[1].split(), sys.argv[2].split()
seen = {}
for name in names:
    sys.argv[1:] = [*model_flags(name), *CPU_FLAGS, *run_flags]
    args = arguments.parse_args()
    arguments.validate_args(args)
    arguments.core_transformer_config_from_args(args)
    seen[name] = args.expert_parallel_mode
print(json.dumps(seen), file=stdout)
"""
_RUN_FLAGS = (
    "--micro-batch-size 1 --train-iters 1 --lr 1e-4 --expert-tensor-parallel-size 1 "
    "--expert-model-parallel-size 8 --expert-parallel-mode fsep"
)


@pytest.fixture(scope="module")
def parsed():
    words = "-c", _PARSE, " ".join(MODELS), _RUN_FLAGS
    printed = python(*words, RANK="0", WORLD_SIZE="8")
    # Loggers that wrote to stdout before its redirection still do.
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("name", MODELS)
def test_megatron_parses_and_validates_every_model(name, parsed):
    assert parsed[name] == "fsep"
