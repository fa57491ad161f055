"""The CPU platform changes the whole process, so tests install it in a process of their own."""

import textwrap

import pytest

from megatron_laer import device
from tests.processes import finished, python


def run(code, **environment):
    return python("-c", textwrap.dedent(code), **environment).strip()


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
    assert run(code) == "True False False"


@pytest.mark.releases
def test_installing_after_megatron_is_refused():
    code = """
        import megatron.core
        from megatron_laer import device
        try:
            device.install_cpu()
        except RuntimeError as error:
            print(error)
    """
    assert "after megatron.core had been imported" in run(code)


@pytest.mark.releases
def test_a_process_with_cuda_replaced_seeds_marks_and_builds_as_on_a_cpu():
    code = """
        import os, tempfile
        from pathlib import Path
        import torch
        from megatron_laer import device
        device.install_cpu()
        from megatron.core.datasets import utils
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.torch_norm import WrappedTorchNorm
        from megatron_laer.plugin.wheel import mend_dataset_helper

        # Nothing is compiled, although torch was imported first.
        assert not torch.compile(lambda _: torch.compiler.is_compiling())(torch.ones(1))

        # Spawned processes choose the CPU too.
        names = "MEGATRON_LAER_DEVICE", "TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS"
        assert [os.environ[name] for name in names] == ["cpu", "1", "1"]

        # Seeding the GPU leaves the weights of the CPU alone.
        torch.manual_seed(1)
        want = torch.rand(3)
        torch.manual_seed(1)
        torch.cuda.manual_seed(2)
        torch.cuda.set_rng_state(torch.cuda.get_rng_state())
        assert torch.equal(torch.rand(3), want)

        # A norm carries the mark of sequence parallelism.
        shape = dict(num_layers=1, hidden_size=8, num_attention_heads=2, normalization="RMSNorm")
        split = dict(tensor_model_parallel_size=2, sequence_parallel=True)
        for more in (split, {}):
            config = TransformerConfig(**shape, **more)
            assert WrappedTorchNorm(config, 8).weight.sequence_parallel == bool(more)
            assert config.sequence_parallel == bool(more)

        # A group's threads would free the name of their last operation twice; so it has one.
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        for group in (torch.distributed.group.WORLD, torch.distributed.new_group()):
            assert group._get_backend(torch.device("cpu")).options._threads == 1

        # The dataset helper is not built where the wheel brings it.
        stock, built = utils.compile_helpers, "helpers_cpp.cpython-313.so"
        for names, is_mended in (((built,), True), ((built, "Makefile"), False), ((), False)):
            utils.compile_helpers = stock
            with tempfile.TemporaryDirectory() as folder:
                for name in names:
                    Path(folder, name).touch()
                utils.__file__ = str(Path(folder, "utils.py"))
                mend_dataset_helper()
            assert (utils.compile_helpers is not stock) == is_mended
        print("done")
    """
    assert run(code, MEGATRON_LAER_DEVICE="auto").endswith("done")


def test_nothing_follows_the_last_word_of_a_process_that_prepared_ranks():
    """Triton reports what is alive at the end as leaked, after pytest's summary for example."""
    code = "import megatron_laer.cpu.rank_imports, sys; print('triton' in sys.modules)"
    result = finished("-c", code)
    assert result.stdout.splitlines()[-1] == "True"
    assert "leaked" not in result.stdout + result.stderr
