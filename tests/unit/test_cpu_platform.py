"""The CPU platform changes the whole process, so tests install it in a process of their own."""

import json
import os
import subprocess
import sys
import textwrap
from importlib.machinery import EXTENSION_SUFFIXES

import pytest

from megatron_laer import device
from megatron_laer.plugin import wheel
from tests.processes import python_path

pytestmark = pytest.mark.releases


def run(code, **environment):
    """Return the last line that `code` prints in a fresh interpreter, or its error output."""
    kept = {k: v for k, v in os.environ.items() if k != "MEGATRON_LAER_DEVICE"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env=kept | {"PYTHONPATH": python_path()} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return (result.stdout.strip() or result.stderr.strip()).splitlines()[-1]


# Importing Megatron takes seconds: CUDA is replaced once, and every test runs in a fork.
_SERVER = """
import json, os, sys, traceback
from megatron_laer import device
device.install_cpu()
import torch
for line in sys.stdin:
    if os.fork() == 0:
        try:
            exec(json.loads(line), {"device": device, "torch": torch})
        except BaseException:
            print(traceback.format_exc().splitlines()[-1])
        sys.stdout.flush()
        os._exit(0)
    os.wait()
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def on_cpu():
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SERVER],
        env=os.environ | {"PYTHONPATH": python_path()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def run_code(code):
            server.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
            server.stdin.flush()
            printed = []
            while (line := server.stdout.readline().rstrip()) != "done":
                assert server.poll() is None, "the process with CUDA replaced has ended"
                printed.append(line)
            return printed[-1] if printed else ""

        yield run_code
        server.stdin.close()


def test_the_user_decides_before_the_machine_does(monkeypatch):
    monkeypatch.delenv("MEGATRON_LAER_DEVICE", raising=False)
    assert device.cpu_needed(force=True)
    monkeypatch.setenv("MEGATRON_LAER_DEVICE", "cpu")
    assert device.cpu_needed()
    monkeypatch.setenv("MEGATRON_LAER_DEVICE", "cuda")
    assert not device.cpu_needed()


def test_an_unknown_device_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("MEGATRON_LAER_DEVICE", "tpu")
    with pytest.raises(ValueError, match=r"MEGATRON_LAER_DEVICE='tpu'.*auto, cpu, cuda"):
        device.cpu_needed()


@pytest.mark.parametrize("usable", [True, False])
def test_without_a_wish_the_machine_decides(usable, monkeypatch):
    import torch

    monkeypatch.delenv("MEGATRON_LAER_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    assert device.cpu_needed() is not usable


def test_asking_for_the_cpu_does_not_import_torch():
    code = """
        import sys
        from megatron_laer import device
        print(device.cpu_needed(), device.cpu_installed(), 'torch' in sys.modules)
    """
    assert run(code, MEGATRON_LAER_DEVICE="cpu") == "True False False"


def test_installing_after_megatron_is_refused():
    code = """
        import megatron.core
        from megatron_laer import device
        device.install_cpu()
    """
    assert "after megatron.core had been imported" in run(code)


def test_installing_twice_does_nothing(on_cpu):
    code = """
        first = torch.Tensor.to, torch.cuda.is_available
        device.install_cpu()
        same = first == (torch.Tensor.to, torch.cuda.is_available)
        print(device.cpu_installed(), device.cpu_needed(), same)
    """
    assert on_cpu(code) == "True True True"


def test_spawned_processes_choose_the_cpu_too(on_cpu):
    code = """
        import os
        print(*(os.environ[n] for n in (
            "MEGATRON_LAER_DEVICE", "TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS"
        )))
    """
    assert on_cpu(code) == "cpu 1 1"


def test_nothing_is_compiled_although_torch_was_imported_first():
    code = """
        import torch
        from megatron_laer import device
        device.install_cpu()
        def plain(x):
            return torch.compiler.is_compiling()
        print(torch.compile(plain)(torch.ones(1)))
    """
    assert run(code) == "False"


def test_seeding_the_gpu_leaves_the_weights_of_the_cpu_alone(on_cpu):
    code = """
        torch.manual_seed(1)
        want = torch.rand(3)
        torch.manual_seed(1)
        torch.cuda.manual_seed(2)
        torch.cuda.set_rng_state(torch.cuda.get_rng_state())
        print(torch.equal(torch.rand(3), want))
    """
    assert on_cpu(code) == "True"


def test_the_gpu_generator_keeps_its_own_state(on_cpu):
    code = """
        torch.cuda.manual_seed(2)
        state = torch.cuda.get_rng_state()
        torch.cuda.manual_seed(3)
        changed = not torch.equal(torch.cuda.get_rng_state(), state)
        torch.cuda.set_rng_state(state)
        print(changed, torch.equal(torch.cuda.default_generators[0].get_state(), state))
    """
    assert on_cpu(code) == "True True"


@pytest.mark.parametrize(
    "expression",
    [
        "torch.ones(2, device='cuda')",
        "torch.empty(2, device=torch.cuda.current_device())",
        "torch.ones(2).to('cuda:0')",
        "torch.ones(2).to(torch.device('cuda'), non_blocking=True)",
        "torch.ones(2).to(device=0)",
        "torch.ones(2).new_zeros(3, device='cuda')",
        "torch.ones(2).cuda().pin_memory()",
        "torch.nn.Linear(2, 2, device='cuda').cuda().to('cuda').weight",
    ],
)
def test_what_is_sent_to_a_gpu_stays_on_the_cpu(expression, on_cpu):
    assert on_cpu(f"print({expression}.device)") == "cpu"


def test_a_cast_is_no_move(on_cpu):
    code = "print(torch.ones(2).to(torch.bfloat16).dtype, torch.ones(2).to('cpu').dtype)"
    assert on_cpu(code) == "torch.bfloat16 torch.float32"


def test_types_have_the_names_that_the_optimizer_expects(on_cpu):
    code = """
        t = torch.ones(2)
        print(t.type(), t.bfloat16().type(), t.type('torch.cuda.HalfTensor').dtype)
    """
    assert on_cpu(code) == "torch.cuda.FloatTensor torch.cuda.BFloat16Tensor torch.float16"


def test_an_event_measures_wall_time(on_cpu):
    code = """
        import time
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun_s = time.perf_counter()
        start.record(); time.sleep(0.05); end.record()
        whole_ms = (time.perf_counter() - begun_s) * 1e3
        print(50 <= start.elapsed_time(end) <= whole_ms)
    """
    assert on_cpu(code) == "True"


def test_collectives_take_what_megatron_passes_on_a_gpu(on_cpu):
    code = """
        import tempfile
        import torch.distributed as dist
        dist.init_process_group(
            "gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1,
            device_id=torch.device("cuda:0"),
        )
        dist.barrier(device_ids=[torch.cuda.current_device()])
        given, got = torch.arange(3.0), torch.empty(3)
        dist.all_to_all_single(got, given, torch.tensor([3]), torch.tensor([3]))
        dist.destroy_process_group()
        print(torch.equal(given, got))
    """
    assert on_cpu(code) == "True"


def test_workers_load_data_without_a_driver(on_cpu):
    code = """
        loader = torch.utils.data.DataLoader(list(range(4)), num_workers=2, pin_memory=True)
        print(sorted(batch.item() for batch in loader))
    """
    assert on_cpu(code) == "[0, 1, 2, 3]"


def test_a_norm_carries_the_mark_of_sequence_parallelism(on_cpu):
    code = """
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.torch_norm import WrappedTorchNorm
        shape = dict(num_layers=1, hidden_size=8, num_attention_heads=2, normalization="RMSNorm")
        split = TransformerConfig(
            **shape, tensor_model_parallel_size=2, sequence_parallel=True
        )
        configs = split, TransformerConfig(**shape)
        norms = [WrappedTorchNorm(c, 8) for c in configs]
        print([n.weight.sequence_parallel for n in norms], split.sequence_parallel)
    """
    assert on_cpu(code) == "[True, False] True"


def test_the_hybrid_optimizer_sees_a_gpu_beside_the_host(on_cpu):
    code = """
        from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
        torch.manual_seed(1)
        plain = [torch.nn.Parameter(torch.randn(8)) for _ in range(4)]
        moved = [torch.nn.Parameter(p.detach().clone()) for p in plain]
        adam = torch.optim.AdamW(plain, lr=0.1)
        hybrid = HybridDeviceOptimizer(
            [{"params": moved}], offload_fraction=0.5, param_update_in_fp32=True, lr=0.1,
            cpu_optimizer_cls=torch.optim.AdamW, gpu_optimizer_cls=torch.optim.AdamW,
        )
        for optimizer, parameters in (adam, plain), (hybrid, moved):
            for number, parameter in enumerate(parameters):
                parameter.grad = torch.full_like(parameter, number - 1.5)
            optimizer.step()
        copies = list(hybrid.cpu_copys_map_gpu_param)
        print(
            len(copies), len(hybrid.gpu_optimizer.param_groups[0]["params"]),
            {type(copy) is torch.Tensor and not copy.is_cuda for copy in copies},
            all(map(torch.equal, moved, plain)),
        )
    """
    assert on_cpu(code) == "2 2 {True} True"


def test_a_dataset_helper_for_another_python_is_named(tmp_path):
    def build():
        (tmp_path / "helpers_cpp.cpython-27.so").touch()

    with pytest.raises(ImportError, match=r"helpers_cpp\.cpython-27\.so was built, and this Pyth"):
        wheel._compile(build, tmp_path)
    (tmp_path / f"helpers_cpp{EXTENSION_SUFFIXES[0]}").touch()
    wheel._compile(build, tmp_path)


def test_the_dataset_helper_is_not_built_where_the_wheel_brings_it(on_cpu):
    code = """
        import tempfile
        from pathlib import Path
        from megatron.core.datasets import utils
        from megatron_laer.plugin.wheel import mend_dataset_helper

        def is_mended(*names):
            utils.compile_helpers = stock
            with tempfile.TemporaryDirectory() as folder:
                for name in names:
                    Path(folder, name).touch()
                utils.__file__ = str(Path(folder, "utils.py"))
                mend_dataset_helper()
            return getattr(utils.compile_helpers, "__name__", "_compile")

        stock = utils.compile_helpers
        built = "helpers_cpp.cpython-313.so"
        print(is_mended(built), is_mended(built, "Makefile"), is_mended())
    """
    assert on_cpu(code) == "_already_compiled _compile compile_helpers"
