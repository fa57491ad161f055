"""The CPU platform changes the whole process, so tests install it in a process of their own."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from megatron_laer import device
from tests.processes import python_path


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


@pytest.mark.parametrize("usable", [True, False])
def test_the_user_decides_before_the_machine_does(monkeypatch, usable):
    monkeypatch.delenv("MEGATRON_LAER_DEVICE", raising=False)
    assert device.cpu_needed(force=True)
    monkeypatch.setenv("MEGATRON_LAER_DEVICE", "cpu")
    assert device.cpu_needed()
    monkeypatch.setenv("MEGATRON_LAER_DEVICE", "cuda")
    assert not device.cpu_needed()
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


@pytest.mark.releases
def test_installing_after_megatron_is_refused():
    code = """
        import megatron.core
        from megatron_laer import device
        device.install_cpu()
    """
    assert "after megatron.core had been imported" in run(code)


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


# Code by the sentence that it shows.
ON_CPU = {
    "spawned processes choose the CPU too": """
        import os
        names = "MEGATRON_LAER_DEVICE", "TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS"
        assert [os.environ[name] for name in names] == ["cpu", "1", "1"]
    """,
    "seeding the GPU leaves the weights of the CPU alone": """
        torch.manual_seed(1)
        want = torch.rand(3)
        torch.manual_seed(1)
        torch.cuda.manual_seed(2)
        torch.cuda.set_rng_state(torch.cuda.get_rng_state())
        assert torch.equal(torch.rand(3), want)
    """,
    "a norm carries the mark of sequence parallelism": """
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.torch_norm import WrappedTorchNorm
        shape = dict(num_layers=1, hidden_size=8, num_attention_heads=2, normalization="RMSNorm")
        split = dict(tensor_model_parallel_size=2, sequence_parallel=True)
        for more in (split, {}):
            config = TransformerConfig(**shape, **more)
            assert WrappedTorchNorm(config, 8).weight.sequence_parallel == bool(more)
            assert config.sequence_parallel == bool(more)
    """,
    "the dataset helper is not built where the wheel brings it": """
        import tempfile
        from pathlib import Path
        from megatron.core.datasets import utils
        from megatron_laer.plugin.wheel import mend_dataset_helper

        stock = utils.compile_helpers
        built = "helpers_cpp.cpython-313.so"
        for names, is_mended in (((built,), True), ((built, "Makefile"), False), ((), False)):
            utils.compile_helpers = stock
            with tempfile.TemporaryDirectory() as folder:
                for name in names:
                    Path(folder, name).touch()
                utils.__file__ = str(Path(folder, "utils.py"))
                mend_dataset_helper()
            assert (utils.compile_helpers is not stock) == is_mended
    """,
}


@pytest.mark.releases
@pytest.mark.parametrize("code", ON_CPU.values(), ids=ON_CPU)
def test_with_cuda_replaced(code, on_cpu):
    assert on_cpu(code) == ""
