"""Tables as published for the paper, and arrays of tokens, made up and small."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np

from benchmarks.published_files import METHODS, MODELS, RANKS

_FAMILIES = {"e8k2": (32, 10), "e16k4": (24, 30)}


def _tokens(family: str) -> list[str]:
    layers, microbatches = _FAMILIES[family]
    places = itertools.product(METHODS[1:], range(layers), range(microbatches), range(RANKS))
    return [
        "rank,method,model_name,layer,iter,token_num",
        *(f"{r},{method},{family},{layer},{m},{900 + r}" for method, layer, m, r in places),
    ]


def tables() -> dict[str, list[str]]:
    """Return the lines of every table by its file's name."""
    cells = itertools.product(MODELS, ("0.0", "0.0001"), METHODS)
    curves = itertools.product((("megatron", "0.01"), ("LAER", "0.0001")), range(12))
    return {
        "laer_ae_e2e_wikitext.csv": [
            "dataset,method,model_name,aux_loss,avg_time_ms",
            *(f"wikitext,{method},{model},{aux},2e4" for model, aux, method in cells),
        ],
        "laer_ae_convergence.csv": [
            "method,aux_loss,iter,loss,time",
            *(f"{method},{aux},{step},{5 - step / 10},900" for (method, aux), step in curves),
        ],
        "laer_ae_planner_seconds.csv": ["n_device,C_e,time", "64,1,0.0005", "64,4,0.001"],
        "laer_ae_ablation_ms.csv": ["method,avg_time_ms", "FSDP,3e4", "LAER,2e4"],
        "laer_ae_breakdown_seconds.csv": [
            "rank,model_name,method,alltoall_time,expert_time,total_time",
            *(f"{rank},mixtral-8x7b-e8k2,LAER,5,9,20" for rank in range(2)),
        ],
        **{f"laer_ae_tokens_{family}.csv": _tokens(family) for family in _FAMILIES},
    }


def make(folder: Path) -> None:
    """Write whole tables into `published`, and copies of the folder with one wrong table."""
    whole, ablations = folder / "published", "laer_ae_ablation_ms.csv"
    good = tables()
    places = {name: folder / f"published-{name}" for name in ("text", "cell", "pipe", "endless")}
    for place in (whole, *places.values()):
        place.mkdir()
        for file, lines in good.items():
            (place / file).write_text("\n".join(lines) + "\n")
    cells = good["laer_ae_e2e_wikitext.csv"]
    for name, lines in (("text", [*cells, "wikitext,LAER,m,0.0,soon"]), ("cell", cells[:-1])):
        (places[name] / "laer_ae_e2e_wikitext.csv").write_text("\n".join(lines) + "\n")
    (places["pipe"] / ablations).unlink()
    os.mkfifo(places["pipe"] / ablations)
    os.truncate(places["endless"] / ablations, 2**36)
    os.symlink(whole / "laer_ae_e2e_wikitext.csv", folder / "published-link.csv")

    few = np.ones((3, 1, 2, 1, 4), dtype=np.int32)
    np.savez(folder / "few.npz", tokens=few)
    os.link(folder / "few.npz", folder / "few-hard.npz")
    few[1] = 0
    np.savez(folder / "idle.npz", tokens=few)
    np.savez(folder / "minus.npz", tokens=few - 1)
    np.savez(folder / "flat.npz", tokens=np.ones(4, dtype=np.int64))
    np.savez(folder / "object.npz", tokens=np.array([[{}]], dtype=object))
