"""Keys of a model's file become Megatron's flags; `test_configurations.py` builds every model."""

from megatron_laer.tools.model_flags import model_flags, model_values


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
