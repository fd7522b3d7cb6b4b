"""Which device a rank takes: a GPU that torch cannot use is an error, unless the CPU is asked for."""

from __future__ import annotations

import pytest
import torch

from trec_twotower.distributed import ranks as distributed
from trec_twotower.distributed.ranks import usable_device
from trec_twotower.errors import ConfigError


@pytest.fixture
def machine(monkeypatch):
    """Pretends that this machine has GPUs, a driver and a build of torch; and that nothing hides its GPUs."""

    def pretend(
        *, gpus: int = 0, cuda: str | None = None, usable: int = 0, driver: str | None = None, error: str | None = None
    ) -> None:
        monkeypatch.setattr(distributed, "gpu_files", lambda: [f"/dev/nvidia{number}" for number in range(gpus)])
        monkeypatch.setattr(distributed, "driver_version", lambda: driver)
        monkeypatch.setattr(distributed, "cuda_error", lambda: error)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: usable)

    for name in ("CUDA_VISIBLE_DEVICES", "TREC_TT_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    return pretend


def test_a_machine_without_a_gpu_computes_on_the_cpu(machine):
    machine()
    assert usable_device() == torch.device("cpu")
    assert usable_device("cpu") == torch.device("cpu")


def test_a_rank_takes_the_gpu_of_its_number(machine):
    machine(gpus=2, usable=2, cuda="13.0", driver="580.65.06")
    assert usable_device(local_rank=1, local_ranks=2) == torch.device("cuda", 1)
    assert usable_device("cuda") == torch.device("cuda", 0)
    assert usable_device("cpu", local_rank=1, local_ranks=2) == torch.device("cpu")
    with pytest.raises(ConfigError, match="3 ranks are on this machine, but torch sees 2 GPUs here"):
        usable_device(local_ranks=3)


def test_an_old_driver_is_named_with_the_one_that_is_needed(machine):
    """It is not the CPU that was asked for: training there would take days for hours, without a word."""
    old = "The NVIDIA driver on your system is too old (found version 12020)."
    machine(gpus=1, cuda="13.0", driver="535.104.05", error=old)
    with pytest.raises(ConfigError) as raised:
        usable_device()
    for said in (
        "an NVIDIA GPU is here (/dev/nvidia0)",
        "is built for CUDA 13.0, which needs an NVIDIA driver R580 or newer",
        "the driver here is 535.104.05",
        old,
        "train.device=cpu",
        "CUDA_VISIBLE_DEVICES=",
        "update the driver",
    ):
        assert said in str(raised.value)
    assert usable_device("cpu") == torch.device("cpu")


def test_a_gpu_beside_a_build_for_cpus_is_named(machine):
    machine(gpus=1, cuda=None, driver="580.65.06")
    with pytest.raises(ConfigError, match=r"torch .* is a build for CPUs.*install the GPU packages"):
        usable_device()


def test_a_build_for_gpus_without_one_is_named(machine):
    machine(cuda="13.0")
    with pytest.raises(ConfigError, match=r"no NVIDIA GPU is visible, .*the driver here is not loaded.*make a GPU vis"):
        usable_device()


def test_a_gpu_that_is_asked_for_and_not_there_is_named(machine, monkeypatch):
    """Also where the environment hides it."""
    machine()
    with pytest.raises(ConfigError, match=r"no NVIDIA GPU is visible, and torch .* is a build for CPUs"):
        usable_device("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="no NVIDIA GPU is visible"):
        usable_device("cuda")


@pytest.mark.parametrize(
    ("name", "value"), [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("TREC_TT_DEVICE", "cpu")]
)
def test_an_environment_that_hides_the_gpu_means_the_cpu(name, value, machine, monkeypatch):
    machine(gpus=1, cuda="13.0", driver="535.104.05")
    monkeypatch.setenv(name, value)
    assert usable_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65  Release Build", "580.65"),
        ("something else", None),
    ],
)
def test_the_drivers_version_is_read_from_the_kernel(text, version, tmp_path, monkeypatch):
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(distributed, "DRIVER", tmp_path / "version")
    assert distributed.driver_version() == version
    monkeypatch.setattr(distributed, "DRIVER", tmp_path / "none")
    assert distributed.driver_version() is None


def test_the_command_line_asks_for_the_device_of_the_config(machine, cli, shop_copy):
    """`train` takes it as it is; that a run was trained on GPUs does not keep it from being evaluated without."""
    machine(gpus=1, cuda="13.0", driver="535.104.05")
    said = cli("train", shop_copy.config, f"run_dir={shop_copy.run}")
    assert said.code == 2 and "needs an NVIDIA driver R580 or newer" in said.mistake
    said = cli("train", shop_copy.config, f"run_dir={shop_copy.run}", "train.device=cpu")
    assert said.code == 0, said.err
    assert cli("evaluate", shop_copy.run).code == 0  # as the run's config has it
    config = shop_copy.run / "config.yaml"
    config.write_text(config.read_text().replace("device: cpu", "device: cuda"))
    assert cli("evaluate", shop_copy.run).code == 2
    machine()
    assert cli("evaluate", shop_copy.run).code == 0
    said = cli("train", shop_copy.config, f"run_dir={shop_copy.run}", "train.device=cuda")
    assert said.code == 2 and "no NVIDIA GPU is visible" in said.mistake
