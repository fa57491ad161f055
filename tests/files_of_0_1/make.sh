#!/usr/bin/env bash
# Made every other file of this folder but flags.txt, at commit 82f3739, by a Python with the
# requirements of the tests: tests/files_of_0_1/make.sh PYTHON
set -euo pipefail
python=$(realpath -s "$1")
cd "$(dirname "${BASH_SOURCE[0]}")"
root=$(realpath ../..)
export PYTHONPATH=$root MEGATRON_LAER_DEVICE=cpu OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
rm -rf names.json plan.json layouts routing timeline

cp "$root/configs/clusters/cpu-gloo.yaml" cluster.yaml
cp "$root/configs/models/tiny-moe.yaml" model.yaml
# A document for each of the first paragraphs.
"$python" - "$root/LICENSE" >text.jsonl <<'END'
import json, sys
for paragraph in open(sys.argv[1]).read().split("\n\n")[1:21]:
    print(json.dumps({"text": paragraph}))
END
"$python" -m megatron_laer prepare-data --input text.jsonl --output text

train() {
    # shellcheck disable=SC2046
    "$python" -m torch.distributed.run --standalone --nproc-per-node 2 "$root/pretrain_gpt.py" \
        $(cat flags.txt) --data-path text --data-cache-path cache --train-iters 6 "$@"
}
train --tensorboard-dir tensorboard --fsep-record-layouts layouts --fsep-record-trace routing \
    --fsep-timeline timeline | grep -E '^ \[.* iteration +[0-9]+/' >training.log
train --save checkpoint --save-interval 4 --exit-interval 4
tar --owner 0 --group 0 --numeric-owner -cJf checkpoint.tar.xz checkpoint
"$python" -m megatron_laer plan routing --cluster cluster.yaml --hidden 8 --ffn 8 --strategy static \
    greedy --json plan.json

# Names that command lines, dashboards and scripts depend on.
"$python" - >names.json <<'END'
import argparse, json
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from megatron_laer.config import FSEPConfig, add_arguments

events = EventAccumulator("tensorboard")
events.Reload()
flags = {
    action.option_strings[0]: {
        "default": getattr(FSEPConfig(), action.dest.removeprefix("fsep_"), action.default),
        "choices": action.choices and list(action.choices),
        "type": getattr(action.type, "__name__", None),
    }
    for action in add_arguments(argparse.ArgumentParser(add_help=False))._actions
}
metrics = sorted(tag for tag in events.Tags()["scalars"] if "fsep" in tag)
print(json.dumps({"flags": flags, "metrics": metrics}, indent=1))
END
rm -r cache checkpoint tensorboard timeline/rank-1.json
