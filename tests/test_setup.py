"""The set-up ends in a whole environment or in none, and costs nothing where all is done."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from trec_twotower import doctor

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHON_DIR = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}"


def _load() -> object:
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "launch/setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup_env = _load()


class Machine:
    """Plays the programs that the set-up starts: records each call, does to `.venv` what they would do."""

    def __init__(self, root: Path):
        self.root = root
        self.calls: list[str] = []
        self.fails: dict[str, str] = {}  # by a part of the command: what it says as it fails
        self.interrupts_at = ""
        self.doctor_says: list[str] = []  # in turn; then that all fits

    def __call__(self, command: list[str], **_: object) -> SimpleNamespace:
        line = " ".join(map(str, command)).replace(f"{self.root}/", "")
        self.calls.append(line)
        assert not list(self.root.glob(".venv/.ready-*")), "looks ready while it is being changed"
        if self.interrupts_at and self.interrupts_at in line:
            raise KeyboardInterrupt
        for part, says in self.fails.items():
            if part in line:
                return SimpleNamespace(returncode=1, stdout=says)
        if "-m venv" in line:
            shutil.rmtree(self.root / ".venv", ignore_errors=True)
            (self.root / ".venv/bin").mkdir(parents=True)
            (self.root / ".venv/bin/python").touch()
        if "import pip" in line and not (self.root / ".venv/bin/python").exists():
            raise FileNotFoundError(line)
        if "doctor" in line and self.doctor_says:
            return SimpleNamespace(returncode=1, stdout=self.doctor_says.pop(0))
        return SimpleNamespace(returncode=0, stdout="")

    def has_installed(self, name: str, version: str) -> Path:
        info = self.root / f".venv/{PYTHON_DIR}/site-packages/{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "RECORD").touch()
        return info


@pytest.fixture
def machine(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    (root / "launch").mkdir(parents=True)
    for path in [ROOT / "pyproject.toml", *ROOT.glob("launch/requirements-*.txt")]:
        shutil.copy(path, root / path.relative_to(ROOT))
    machine = Machine(root)
    monkeypatch.setattr(setup_env.subprocess, "run", machine)
    monkeypatch.setattr(setup_env, "sees_gpu", lambda: False)
    monkeypatch.delenv("TREC_TT_DEVICE", raising=False)
    return machine


def steps(machine: Machine) -> list[str]:
    """What was called, in words."""
    words = {
        "import pip": "look",
        "-m venv": "venv",
        "uninstall": "uninstall",
        "requirements-base": "pins",
        "--no-deps -rlaunch/requirements-torchrec.txt": "torchrec",
        "-e ": "project",
        "doctor": "doctor",
    }
    return [next(word for part, word in words.items() if part in call) for call in machine.calls]


def test_new_environment_gets_everything_in_order_and_then_the_stamp(machine):
    setup_env.prepare(machine.root, with_tests=False)
    assert steps(machine) == ["look", "venv", "pins", "torchrec", "project", "doctor"]
    assert "requirements-cpu.txt" in machine.calls[2] and "requirements-torchrec.txt" not in machine.calls[2]
    assert "--no-deps --no-build-isolation" in machine.calls[4]
    assert setup_env.is_ready(machine.root, "cpu", with_tests=False)


def test_second_call_does_nothing(machine):
    setup_env.prepare(machine.root, with_tests=False)
    machine.calls.clear()
    setup_env.prepare(machine.root, with_tests=False)
    assert machine.calls == []


def test_tests_come_on_top_and_count_for_both(machine):
    setup_env.prepare(machine.root, with_tests=False)
    assert not setup_env.is_ready(machine.root, "cpu", with_tests=True)
    machine.calls.clear()
    setup_env.prepare(machine.root, with_tests=True)
    assert steps(machine) == ["look", "pins", "torchrec", "project", "doctor"]
    assert "requirements-test.txt" in machine.calls[1]
    assert setup_env.is_ready(machine.root, "cpu", with_tests=True)
    assert setup_env.is_ready(machine.root, "cpu", with_tests=False)


def test_documentation_comes_on_top_and_tests_stay(machine):
    setup_env.prepare(machine.root, with_tests=True)
    machine.calls.clear()
    setup_env.prepare(machine.root, with_tests=False, with_docs=True)
    assert steps(machine) == ["look", "pins", "torchrec", "project", "doctor"]
    assert "requirements-docs.txt" in machine.calls[1] and "requirements-test.txt" in machine.calls[1]
    machine.calls.clear()
    setup_env.prepare(machine.root, with_tests=True)
    setup_env.prepare(machine.root, with_tests=False, with_docs=True)
    assert machine.calls == []


def test_stamp_is_worth_nothing_without_its_interpreter(machine):
    setup_env.prepare(machine.root, with_tests=False)
    (machine.root / ".venv/bin/python").unlink()
    assert not setup_env.is_ready(machine.root, "cpu", with_tests=False)


@pytest.mark.parametrize("changed", ["requirements-base.txt", "requirements-cpu.txt", "requirements-torchrec.txt"])
def test_changed_pins_undo_the_stamp(machine, changed):
    setup_env.prepare(machine.root, with_tests=False)
    with (machine.root / "launch" / changed).open("a") as file:
        file.write("# changed\n")
    assert not setup_env.is_ready(machine.root, "cpu", with_tests=False)


def test_stamp_differs_by_device_project_place_and_python(machine, monkeypatch, tmp_path):
    names = [setup_env.stamp_path(machine.root, device, with_tests=False).name for device in ("cpu", "gpu")]
    shutil.copytree(machine.root, tmp_path / "elsewhere")
    names.append(setup_env.stamp_path(tmp_path / "elsewhere", "cpu", with_tests=False).name)
    (machine.root / "pyproject.toml").write_text("changed")
    names.append(setup_env.stamp_path(machine.root, "cpu", with_tests=False).name)
    monkeypatch.setattr(setup_env.sys, "version_info", (3, 99, 0))
    names.append(setup_env.stamp_path(machine.root, "cpu", with_tests=False).name)
    assert len(set(names)) == 5


@pytest.mark.parametrize("step", ["-m venv", "requirements-base", "requirements-torchrec", "-e ", "doctor"])
def test_interrupted_set_up_is_not_ready_and_the_next_call_mends_it(machine, step):
    setup_env.prepare(machine.root, with_tests=False)
    with (machine.root / "launch/requirements-base.txt").open("a") as file:
        file.write("# so that there is something to do\n")
    if step == "-m venv":
        (machine.root / ".venv/bin/python").unlink()
    machine.interrupts_at = step
    with pytest.raises(KeyboardInterrupt):
        setup_env.prepare(machine.root, with_tests=False)
    assert not setup_env.is_ready(machine.root, "cpu", with_tests=False)
    machine.interrupts_at = ""
    setup_env.prepare(machine.root, with_tests=False)
    assert setup_env.is_ready(machine.root, "cpu", with_tests=False)


def test_package_that_pip_was_stopped_in_is_installed_anew(machine):
    setup_env.make_venv(machine.root)
    half, whole = machine.has_installed("torch", "2.13.0"), machine.has_installed("numpy", "2.4.6")
    (half / "RECORD").unlink()
    setup_env.install(machine.root, "cpu", with_tests=False)
    assert not half.exists() and whole.exists()


def test_broken_files_from_before_lead_to_one_new_environment(machine):
    (machine.root / ".venv/bin").mkdir(parents=True)
    (machine.root / ".venv/bin/python").touch()
    machine.doctor_says = ["fbgemm-gpu-cpu 1.8.0 does not import: ImportError"]
    setup_env.prepare(machine.root, with_tests=False)
    round_ = ["pins", "torchrec", "project", "doctor"]
    assert steps(machine) == ["look", *round_, "venv", *round_]


def test_misfit_that_a_new_environment_would_not_mend_is_shown(machine):
    machine.doctor_says = ["torch: its driver is too old"]
    with pytest.raises(setup_env.SetupError, match="its driver is too old"):
        setup_env.prepare(machine.root, with_tests=False)
    assert not setup_env.is_ready(machine.root, "cpu", with_tests=False)


def test_gpu_set_for_an_image_is_ready_though_the_doctor_cannot_try_it(machine, monkeypatch, capsys):
    monkeypatch.setenv("TREC_TT_DEVICE", "gpu")
    machine.doctor_says = ["fbgemm-gpu 1.8.0 does not import: libnvidia-ml.so.1"]
    setup_env.prepare(machine.root, with_tests=False)
    assert "requirements-gpu.txt" in machine.calls[2]
    assert "No GPU is here to try this on" in capsys.readouterr().out
    assert setup_env.is_ready(machine.root, "gpu", with_tests=False)


@pytest.mark.parametrize(
    ("says", "meaning"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("NewConnectionError: ... Temporary failure in name resolution", "the package index was not reached"),
        (
            "ERROR: No matching distribution found for torch==2.13.0 (from versions: 2.0)",
            "no such version for",
        ),
        ("ERROR: Could not find a version of torch==2.13.0 (from versions: none)", "or was not reached"),
        ("something new", "see the lines above"),
    ],
)
def test_failure_of_pip_is_shown_with_what_it_means(machine, says, meaning):
    machine.fails = {"requirements-base": f"Collecting torch\n{says}\n"}
    with pytest.raises(setup_env.SetupError) as raised:
        setup_env.prepare(machine.root, with_tests=False)
    assert says in str(raised.value) and meaning in str(raised.value)
    assert not setup_env.is_ready(machine.root, "cpu", with_tests=False)


def test_python_without_its_venv_module_is_told_where_to_get_it(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(setup_env.SetupError, match=r"lacks 'ensurepip'.*python3\.\d+-venv"):
        setup_env.prepare(machine.root, with_tests=False)


def test_wrong_variants_go_first_and_the_right_ones_come_back(machine):
    setup_env.make_venv(machine.root)
    machine.has_installed("fbgemm_gpu_cpu", "1.8.0")
    machine.has_installed("fbgemm_gpu", "1.9.0")
    machine.has_installed("numpy", "2.4.6")
    setup_env.prepare(machine.root, with_tests=False)
    assert steps(machine)[2:4] == ["uninstall", "pins"]
    assert machine.calls[2].endswith("-m pip uninstall --yes fbgemm-gpu fbgemm-gpu-cpu")


@pytest.mark.parametrize(
    ("installed", "device", "leaving"),
    [
        ("", "cpu", ""),
        ("torch==2.13.0+cpu fbgemm-gpu-cpu==1.8.0 faiss-cpu==1.15.1", "cpu", ""),
        ("fbgemm-gpu-cpu==1.7.0 faiss-cpu==1.10.0", "cpu", ""),  # pip itself changes versions
        ("fbgemm-gpu==1.8.0", "cpu", "fbgemm-gpu"),
        ("faiss-cpu==1.15.1 faiss-gpu-cu12==1.14.0", "cpu", "faiss-cpu faiss-gpu-cu12"),
        ("torch==2.13.0 faiss-gpu==1.15.1 fbgemm-gpu==1.8.0", "gpu", ""),
        ("torch==2.13.0+cpu fbgemm-gpu-cpu==1.8.0", "gpu", "fbgemm-gpu-cpu torch"),
    ],
)
def test_what_must_be_uninstalled(installed, device, leaving):
    versions = dict(one.split("==") for one in installed.split())
    wanted = setup_env.pins(setup_env.requirement_files(ROOT, device, with_tests=False))
    assert setup_env.to_uninstall(versions, wanted, device) == leaving.split()


@pytest.mark.parametrize(("asked", "sees_gpu", "device"), [("", True, "gpu"), ("", False, "cpu"), ("cpu", True, "cpu")])
def test_device_is_what_is_seen_unless_told(monkeypatch, asked, sees_gpu, device):
    monkeypatch.setenv("TREC_TT_DEVICE", asked)
    monkeypatch.setattr(setup_env, "sees_gpu", lambda: sees_gpu)
    assert setup_env.detect_device() == device


def test_unknown_device_is_refused(monkeypatch):
    monkeypatch.setenv("TREC_TT_DEVICE", "tpu")
    with pytest.raises(setup_env.SetupError, match="TREC_TT_DEVICE is 'tpu': set it to cpu or gpu"):
        setup_env.detect_device()


@pytest.mark.parametrize(("lists", "expected"), [("GPU 0: NVIDIA H200 (UUID: GPU-a)", True), ("No devices", False)])
def test_gpu_is_seen_by_the_word_of_its_driver(monkeypatch, tmp_path, lists, expected):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{lists}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(setup_env.glob, "glob", lambda _: [])
    assert setup_env.sees_gpu() is expected


def test_a_ready_environment_costs_a_fraction_of_a_second(machine, monkeypatch):
    shutil.copy(ROOT / "launch/setup_env.py", machine.root / "launch")
    monkeypatch.setenv("TREC_TT_DEVICE", "cpu")
    setup_env.prepare(machine.root, with_tests=True)
    monkeypatch.undo()
    runs_s = []
    for _ in range(3):
        start_s = time.monotonic()
        done = subprocess.run(
            [sys.executable, machine.root / "launch/setup_env.py", "--test"],
            env={**os.environ, "TREC_TT_DEVICE": "cpu"},
            capture_output=True,
            text=True,
        )
        runs_s.append(time.monotonic() - start_s)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert min(runs_s) < 0.2


def test_pins_serve_what_the_project_declares():
    """Each dependency has its exact pin, each extra says what its pins say."""
    files = {
        name: ROOT / f"launch/requirements-{name}.txt" for name in ("base", "cpu", "gpu", "torchrec", "test", "docs")
    }
    pins = {name: setup_env.pins([path]) for name, path in files.items()}

    def names(requirements: list[str]) -> set[str]:
        return {doctor.normalized(re.split(r"[<>=]", line)[0]) for line in requirements}

    extras = PROJECT["project"]["optional-dependencies"]
    assert (
        names(PROJECT["project"]["dependencies"]) == set(pins["base"]) - {"setuptools"} == names(doctor.requirements())
    )
    assert {f"{n}=={v}" for n, v in pins["cpu"].items()} == set(extras["cpu"])
    assert {f"{n}=={v}" for n, v in {**pins["gpu"], **pins["torchrec"]}.items()} == set(extras["gpu"])
    assert set(pins["test"]) == names(extras["test"])
    assert set(pins["docs"]) == names(extras["docs"])
    for device, fbgemm in (("cpu", "fbgemm-gpu-cpu"), ("gpu", "fbgemm-gpu")):
        assert (pins[device]["torch"], pins[device][fbgemm], pins["torchrec"]["torchrec"]) == doctor.SETS[0]
        assert pins[device][f"faiss-{device}"] == doctor.FAISS_VERSION


def test_every_package_folder_is_in_the_wheel():
    """pyproject.toml names packages one by one: none may be forgotten."""
    folders = {path.parent for path in (ROOT / "trec_twotower").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    declared = set(PROJECT["tool"]["setuptools"]["packages"])
    assert packages <= declared
    assert {"trec_twotower.launch", "trec_twotower.configs"} <= declared
