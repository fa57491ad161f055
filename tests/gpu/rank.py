"""A rank of the tests' training: `pretrain_gpt.py` on a card of its own, or on the only one."""

import os
import runpy

import torch

from megatron_laer.cpu import cuda

if __name__ == "__main__":
    if torch.cuda.device_count() < 2:
        os.environ["LOCAL_RANK"] = "0"
        # Where gloo carries CUDA tensors it accepts no device ids, as on the CPU.
        cuda._replace_collectives()
    runpy.run_path("pretrain_gpt.py", run_name="__main__")
