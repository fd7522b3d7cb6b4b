"""The doctor names every misfit and the line that mends it, and never falls over itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trec_twotower import doctor
from trec_twotower.doctor import Finding, Imported

ROOT = Path(__file__).resolve().parent.parent
OTHERS = {
    doctor.normalized(re.split("[<>=]", line)[0]): "1.0.3" if "torchmetrics" in line else "2.5.0"
    for line in doctor.requirements()
}
CPU_SET = {
    "torch": "2.13.0+cpu",
    "fbgemm-gpu-cpu": "1.8.0",
    "torchrec": "1.8.0",
    "faiss-cpu": "1.15.1",
    **OTHERS,
}
GPU_SET = {
    "torch": "2.13.0+cu130",
    "fbgemm-gpu": "1.8.0",
    "torchrec": "1.8.0",
    "faiss-gpu": "1.15.1",
    **OTHERS,
}
H200 = ["NVIDIA H200", 9, 0]


@pytest.fixture
def machine(monkeypatch):
    """Sets the stage: what is installed, what the imports bring, which GPUs are there."""

    def set_up(
        versions: dict[str, str],
        cuda: str | None = None,
        devices: tuple = (),
        gpus: tuple = (),
        **errors: str,
    ) -> None:
        imports = {name: Imported(errors.get(name, "")) for name in doctor.MODULES}
        if "torch" not in errors:
            imports["torch"] = Imported(facts={"cuda": cuda, "devices": list(devices)})
        monkeypatch.setattr(doctor, "installed_versions", lambda: versions)
        monkeypatch.setattr(doctor, "try_imports", lambda: imports)
        monkeypatch.setattr(doctor, "gpu_names", lambda: list(gpus))
        monkeypatch.delenv("TREC_TT_DEVICE", raising=False)

    return set_up


def misfits() -> dict[str, Finding]:
    return {f.component: f for f in doctor.examine() if f.state == "misfit"}


def without(versions: dict[str, str], *names: str, **others: str) -> dict[str, str]:
    """`versions` without `names`, and with `others` (underscores stand for hyphens)."""
    kept = {name: version for name, version in versions.items() if name not in names}
    return kept | {name.replace("_", "-"): version for name, version in others.items()}


@pytest.mark.parametrize(("torch", "fbgemm", "torchrec"), doctor.SETS)
def test_known_sets_fit_on_cpu(machine, capsys, torch, fbgemm, torchrec):
    machine(CPU_SET | {"torch": f"{torch}+cpu", "fbgemm-gpu-cpu": fbgemm, "torchrec": torchrec})
    assert doctor.main() == 0
    assert "Everything fits." in capsys.readouterr().out


def test_gpu_set_fits_on_a_gpu(machine):
    machine(GPU_SET, cuda="13.0", devices=(H200,), gpus=("NVIDIA H200",))
    assert [f.state for f in doctor.examine()] == ["ok"] * (5 + len(OTHERS))


def test_both_fbgemm_variants_are_removed_before_the_right_one_comes(machine, capsys):
    machine(without(CPU_SET, fbgemm_gpu="1.8.0"))
    found = misfits()
    assert list(found) == ["fbgemm"]
    assert found["fbgemm"].fix == (
        "python -m pip uninstall -y fbgemm-gpu-cpu fbgemm-gpu && python -m pip install --no-deps fbgemm-gpu-cpu==1.8.0"
    )
    assert doctor.main() == 1
    assert found["fbgemm"].fix in capsys.readouterr().out


def test_cuda_fbgemm_beside_cpu_torch_is_a_misfit(machine):
    machine(without(CPU_SET, "fbgemm-gpu-cpu", fbgemm_gpu="1.8.0"))
    assert "clashes with torch 2.13.0+cpu" in misfits()["fbgemm"].problem
    assert misfits()["fbgemm"].fix.endswith("--no-deps fbgemm-gpu-cpu==1.8.0")


def test_cpu_fbgemm_beside_cuda_torch_is_accepted_where_there_is_no_gpu(machine):
    machine(CPU_SET | {"torch": "2.13.0"}, cuda="13.0")
    assert misfits() == {}


def test_fbgemm_of_another_torch_is_a_misfit(machine):
    machine(CPU_SET | {"fbgemm-gpu-cpu": "1.9.0"})
    assert "fbgemm-gpu-cpu 1.9.0 was not built for torch 2.13.0+cpu" in misfits()["fbgemm"].problem
    assert misfits()["fbgemm"].fix.endswith("fbgemm-gpu-cpu==1.8.0")


def test_torchrec_follows_the_torch_that_is_installed(machine):
    machine(CPU_SET | {"torch": "2.14.1+cpu", "fbgemm-gpu-cpu": "1.9.0", "torchrec": "1.8.0"})
    found = misfits()
    assert list(found) == ["torchrec"]
    assert found["torchrec"].problem == "torchrec 1.8.0 was not made for torch 2.14.1+cpu"
    assert found["torchrec"].fix == "python -m pip install --no-deps torchrec==1.9.2"


def test_unknown_torch_is_a_misfit(machine):
    machine(CPU_SET | {"torch": "2.12.0+cpu"})
    assert misfits()["torch"].fix == "python -m pip install torch==2.13.0"


def test_missing_faiss_is_a_misfit(machine):
    machine(without(CPU_SET, "faiss-cpu"), faiss="ModuleNotFoundError: No module named 'faiss'")
    assert misfits()["faiss"].found == "missing"
    assert misfits()["faiss"].fix == "python -m pip install faiss-cpu==1.15.1"


def test_faiss_without_hopper_code_is_a_misfit_on_a_gpu(machine):
    machine(without(GPU_SET, "faiss-gpu", faiss_gpu_cu12="1.14.3"), "13.0", devices=(H200,), gpus=("NVIDIA H200",))
    assert list(misfits()) == ["faiss"]
    assert misfits()["faiss"].fix == (
        "python -m pip uninstall -y faiss-gpu-cu12 && python -m pip install --no-deps faiss-gpu==1.15.1"
    )


def test_cpu_build_of_torch_beside_a_gpu_is_a_misfit_unless_the_gpu_is_not_wanted(machine, monkeypatch):
    machine(CPU_SET, gpus=("NVIDIA H200",))
    assert "NVIDIA H200 clashes with torch 2.13.0+cpu, a CPU build" in misfits()["torch"].problem
    monkeypatch.setenv("TREC_TT_DEVICE", "cpu")
    assert misfits() == {}


def test_gpu_too_old_for_fbgemm_is_a_misfit(machine):
    machine(GPU_SET, cuda="13.0", devices=(["Tesla T4", 7, 5],), gpus=("Tesla T4",))
    assert "none for Tesla T4 (compute capability 7.5)" in misfits()["torch"].problem


def test_driver_too_old_for_torch_is_a_misfit(machine):
    machine(GPU_SET, cuda="13.0", gpus=("NVIDIA A100",))
    assert "driver" in misfits()["torch"].fix


def test_broken_import_is_told_in_its_first_line(machine, capsys):
    machine(CPU_SET, fbgemm_gpu="OSError: libtbb.so.12: cannot open shared object file\nand more")
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "does not import: OSError: libtbb.so.12: cannot open shared object file\n  fix: " in out
    assert "and more" not in out


def test_module_that_torchrec_lacks_is_what_gets_installed(machine):
    machine(CPU_SET, torchrec="ModuleNotFoundError: No module named 'pyre_extensions'")
    assert misfits()["torchrec"].fix == "python -m pip install pyre-extensions"


@pytest.mark.parametrize(
    ("name", "version", "fix"),
    [("pydantic", "1.10.2", "'pydantic>=2'"), ("torchmetrics", "1.4.0", "'torchmetrics==1.0.3'")],
)
def test_version_out_of_bounds_is_a_misfit(machine, name, version, fix):
    machine(CPU_SET | {name: version})
    assert misfits()[name].fix == f"python -m pip install {fix}"


def test_nothing_installed_is_a_page_of_misfits_and_no_traceback(machine, capsys):
    error = "ModuleNotFoundError: No module named"
    machine({}, torch=error, fbgemm_gpu=error, torchrec=error, faiss=error)
    assert doctor.main() == 1
    assert {f.component for f in doctor.examine()} - {"python"} == set(misfits())
    assert "Traceback" not in capsys.readouterr().out


def test_a_check_that_fails_is_one_line(monkeypatch, capsys):
    def fall_over() -> None:
        raise RuntimeError("no idea")

    monkeypatch.setattr(doctor, "installed_versions", fall_over)
    monkeypatch.setattr(doctor, "try_imports", dict)
    assert doctor.main() == 1
    assert capsys.readouterr().out == "The check itself failed, RuntimeError: no idea\n"


def test_versions_are_read_under_normalised_names_and_broken_metadata_is_passed_over(tmp_path, monkeypatch):
    for folder, text in [
        ("fbgemm_gpu-1.8.0.dist-info", "Metadata-Version: 2.1\nName: FBGEMM_GPU\nVersion: 1.8.0\n"),
        ("half-1.dist-info", None),
    ]:
        (tmp_path / folder).mkdir()
        if text:
            (tmp_path / folder / "METADATA").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert doctor.installed_versions() == {"fbgemm-gpu": "1.8.0"}


def test_a_module_that_kills_or_stalls_its_process_does_not_hide_the_others(tmp_path, monkeypatch):
    modules = {
        "talks": "print('hello')\nprint('[1]')",
        "dies": "import os; os.kill(os.getpid(), 11)",
        "raises": "raise ImportError('libx.so.1: cannot open')",
        "stalls": "import time; time.sleep(60)",
        "leaves": "raise SystemExit(0)",
        "works": "",
    }
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results = doctor.try_imports(tuple(modules), limit_s=2)
    assert {name: imported.error for name, imported in results.items()} == {
        "talks": "",
        "dies": "the import ended the process (code -11)",
        "raises": "ImportError: libx.so.1: cannot open",
        "stalls": "the import did not end within 2 s",
        "leaves": "SystemExit: 0",
        "works": "",
    }


def test_the_doctor_runs_where_nothing_is_installed():
    """Without site-packages, so with the standard library alone."""
    run = subprocess.run(
        [sys.executable, "-S", "-m", "trec_twotower.doctor"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "TREC_TT_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1
    assert "torch: torch is not installed\n  fix: python -m pip install torch==2.13.0" in run.stdout
    assert run.stderr == ""


def test_this_environment_fits():
    """What `make setup` made here passes, native libraries and all."""
    run = subprocess.run(
        [sys.executable, "-m", "trec_twotower.doctor"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize(
    ("version", "fits"),
    [("2.0.9", False), ("2.1", True), ("2.1.0rc1", False), ("2.9.4+local", True), ("3.0", False), ("2.5.1", False)],
)
def test_version_ranges_are_those_of_pip(machine, monkeypatch, version, fits):
    monkeypatch.setattr(doctor, "requirements", lambda: ["Py_Arrow>=2.1,<3,!=2.5.1", "other>9; python_version < '3'"])
    machine(CPU_SET | {"py-arrow": version})
    assert ("py-arrow" not in misfits()) == fits and "other" not in misfits()


def test_an_installed_package_is_checked_by_its_metadata(tmp_path, monkeypatch):
    folder = tmp_path / "trec_twotower-1.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: trec-twotower", "Version: 1", "Requires-Dist: numpy>=2"]
    lines += ["Requires-Dist: transformers; extra == 'text'"]
    (folder / "METADATA").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(doctor, "PYPROJECT", tmp_path / "none.toml")
    assert doctor.requirements() == ["numpy>=2"]
