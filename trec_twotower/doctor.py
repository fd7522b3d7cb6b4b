"""Checks the installation: reports what does not fit together, and the command that fixes it.

Only the standard library is imported at the top, because the doctor also runs where nothing is installed. Native
libraries are imported in another process, so that one that crashes becomes a line of the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROJECT = "trec-twotower"
PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
# Versions built for each other: torch, fbgemm, torchrec. The first set is the one that `make setup` installs.
SETS = [("2.13.0", "1.8.0", "1.8.0"), ("2.14.1", "1.9.0", "1.9.2"), ("2.11.0", "1.6.0", "1.6.1")]
# Distributions that share one import name, of which only one may be installed: for CPU, for GPU, unsupported.
FBGEMM = ("fbgemm-gpu-cpu", "fbgemm-gpu")
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12")
FAISS_VERSION = "1.15.1"
MODULES = ("torch", "fbgemm_gpu", "torchrec", "faiss")  # in this order: faiss after torch
GPU_GENERATIONS = (8, 9, 10)  # major compute capabilities that fbgemm has code for
PIP = "python -m pip"

# Prints each module's name before importing it: the last name printed is the one that ended the process.
_PROBE = """
import importlib, json, sys
for name in sys.argv[1:]:
    print(json.dumps({"begin": name}), flush=True)
    facts = {"module": name}
    try:
        module = importlib.import_module(name)
        if name == "torch":
            cuda = module.cuda
            devices = range(cuda.device_count()) if cuda.is_available() else ()
            facts["cuda"] = module.version.cuda
            facts["devices"] = [[cuda.get_device_name(d), *cuda.get_device_capability(d)] for d in devices]
        elif name == "fbgemm_gpu":
            import torch
            torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([2, 3]))
        elif name == "faiss":
            module.IndexFlatIP(4)
    except BaseException as error:
        facts["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(facts), flush=True)
"""


@dataclass(frozen=True)
class Finding:
    """A line of the report; `problem` and `fix` are set where something does not fit."""

    component: str
    found: str
    wanted: str
    state: str = "ok"  # ok, note (works, but is not the recomfixed choice), misfit
    problem: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Imported:
    """The result of importing a module; `error` is empty where it worked."""

    error: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def requirements() -> list[str]:
    """Return the dependencies that this version declares without extras, such as "numpy>=2".

    They come from pyproject.toml in a checkout, whose installed metadata may be older, else from the metadata.
    """
    if PYPROJECT.is_file():
        dependencies: list[str] = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
        return dependencies
    declared = importlib.metadata.requires(PROJECT) or []
    return [line for line in declared if "extra ==" not in line]


def normalized(name: str) -> str:
    """Return a distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_versions() -> dict[str, str]:
    """Return the version of every installed distribution by its normalized name."""
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        try:
            metadata: Any = distribution.metadata  # None or empty where pip was interrupted
        except FileNotFoundError:  # the same from the backport importlib_metadata, once a package has imported it
            continue
        if metadata and metadata["Name"] and metadata["Version"]:
            versions.setdefault(normalized(metadata["Name"]), metadata["Version"])
    return versions


def try_imports(modules: tuple[str, ...] = MODULES, limit_s: float = 180) -> dict[str, Imported]:
    """Import the modules in another process; where one ends the process, the others are tried in a new one."""
    results: dict[str, Imported] = {}
    while remaining := [name for name in modules if name not in results]:
        try:
            command = [sys.executable, "-c", _PROBE, *remaining]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit_s)
            output, end = done.stdout, f"the import ended the process (code {done.returncode})"
        except subprocess.TimeoutExpired as late:
            output = (late.stdout or b"").decode(errors="replace")
            end = f"the import did not end within {limit_s:g} s"
        last = remaining[0]
        for line in output.splitlines():
            try:
                facts = json.loads(line)
                last = facts.get("begin", last)
                results[facts["module"]] = Imported(facts.get("error", ""), facts)
            except (ValueError, KeyError, AttributeError):
                continue  # a module's name, or output of a library
        results.setdefault(last, Imported(end))
    return results


def gpu_names() -> list[str]:
    """Return the NVIDIA GPUs of this machine as its driver lists them, also those that torch cannot use."""
    names = []
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
        names = re.findall(r"^GPU \d+: (.*?) \(UUID", listing, flags=re.MULTILINE)
    return names or sorted(glob.glob("/dev/nvidia[0-9]*"))


@dataclass(frozen=True)
class Installation:
    """Installed versions, results of importing the native modules, and the GPUs to use."""

    versions: dict[str, str]
    imports: dict[str, Imported]
    gpus: list[str]

    @property
    def is_cuda(self) -> bool:
        """Return whether torch is a CUDA build, judged by its version where it does not import."""
        facts = self.imports["torch"].facts
        return facts["cuda"] is not None if "cuda" in facts else "+cpu" not in self.version("torch")

    @property
    def fit(self) -> tuple[str, str, str]:
        """Return the set of the installed torch, or the recomfixed set where no set has it."""
        return next((s for s in SETS if _minor(s[0]) == _minor(self.version("torch"))), SETS[0])

    def version(self, package: str) -> str:
        return self.versions.get(normalized(package), "")

    def torch(self) -> Finding:
        version, facts = self.version("torch"), self.imports["torch"].facts
        build = f"CUDA {facts.get('cuda') or ''}".strip() if self.is_cuda else "CPU"
        gpu = self.gpus[0] if self.gpus else ""
        without = "TREC_TT_DEVICE=cpu make setup, to run without the GPU"
        install = f"{PIP} install torch=={SETS[0][0]}"
        again = f"{PIP} install --force-reinstall --no-deps torch=={SETS[0][0]}"
        unknown = all(_minor(s[0]) != _minor(version) for s in SETS)
        devices = facts.get("devices", [])
        unsupported = [f"{name} (compute capability {m}.{n})" for name, m, n in devices if m not in GPU_GENERATIONS]
        cpu_build = f"{gpu} clashes with torch {version}, a CPU build"
        idle = f"this machine has {gpu}, but torch {version} cannot use it"
        complaints = [
            (not version, "torch is not installed", install),
            (self._failure("torch"), f"torch {version} {self._failure('torch')}", again),
            (
                unknown,
                f"torch {version} is in no known set of compatible versions of torch, fbgemm and torchrec",
                install,
            ),
            (gpu and not self.is_cuda, cpu_build, f"{again}; or {without}"),
            (gpu and not devices, idle, f"a newer NVIDIA driver; or {without}"),
            (
                gpu and unsupported,
                f"fbgemm, which has code for 8, 9 and 10, has none for {', '.join(unsupported)}",
                without,
            ),
        ]
        found = version and f"{version} ({build} build)"
        return _judge("torch", found, " or ".join(s[0] for s in SETS), complaints)

    def fbgemm(self) -> Finding:
        here = [name for name in FBGEMM if name in self.versions]
        clashes = here != [self._right(FBGEMM)] and (bool(self.gpus) or not self.is_cuda)
        place = f"torch {self.version('torch')} on a machine {'with' if self.gpus else 'without'} a GPU"
        is_old = here and _minor(self.versions[here[0]]) != _minor(self.fit[1])
        problems = [(clashes, f"clashes with {place}"), (is_old, f"was not built for {place}")]
        return self._one_of("fbgemm", FBGEMM, self.fit[1], "fbgemm_gpu", problems)

    def faiss(self) -> Finding:
        no_hopper = self.gpus and "faiss-gpu-cu12" in self.versions
        problems = [(no_hopper, "has no code for Hopper GPUs (H100, H200)")]
        return self._one_of("faiss", FAISS, FAISS_VERSION, "faiss", problems)

    def torchrec(self) -> Finding:
        version, failure = self.version("torchrec"), self._failure("torchrec")
        package = f"--no-deps torchrec=={self.fit[2]}"
        lacks = re.search(r"No module named '(\w+)", failure)
        again = f"{PIP} install --force-reinstall {package}, after fixing torch and fbgemm"
        if lacks and lacks[1] not in MODULES:
            again = f"{PIP} install {lacks[1].replace('_', '-')}"
        clash = f"torchrec {version} was not made for torch {self.version('torch')}"
        complaints = [
            (not version, "torchrec is not installed", f"{PIP} install {package}"),
            (_minor(version) != _minor(self.fit[2]), clash, f"{PIP} install {package}"),
            (failure, f"torchrec {version} {failure}", again),
        ]
        return _judge("torchrec", version, f"torchrec {self.fit[2]}", complaints)

    def requirements(self) -> list[Finding]:
        """Return a finding for each declared dependency."""
        try:
            from packaging.requirements import Requirement
        except ImportError:
            problem = "packaging is not installed, so the other dependencies were not checked"
            return [Finding("packaging", "missing", "any", "misfit", problem, f"{PIP} install packaging")]
        findings = []
        for line in requirements():
            requirement = Requirement(line)
            if requirement.marker is not None and not requirement.marker.evaluate():
                continue
            name, wanted = normalized(requirement.name), str(requirement.specifier)
            version, fix = self.version(name), f"{PIP} install '{requirement.name}{wanted}'"
            fits = requirement.specifier.contains(version, prereleases=True) if version else False
            missing, misfit = f"{name} is not installed", f"{name} {version} is not {wanted}"
            findings.append(
                _judge(name, version, wanted or "any", [(not version, missing, fix), (not fits, misfit, fix)])
            )
        return findings

    def _right(self, family: tuple[str, ...]) -> str:
        return family[1] if self.gpus else family[0]

    def _failure(self, module: str) -> str:
        error = self.imports[module].error
        return f"does not import: {error.strip().splitlines()[0][:300]}" if error else ""

    def _one_of(
        self, name: str, family: tuple[str, ...], version: str, module: str, problems: list[tuple[Any, str]]
    ) -> Finding:
        """Return the finding on distributions that share one import name, of which exactly one may be installed."""
        right, here = self._right(family), [package for package in family if package in self.versions]
        found = " and ".join(f"{package} {self.versions[package]}" for package in here)
        replace = f"{PIP} uninstall -y {' '.join(here)} && {PIP} install --no-deps {right}=={version}"
        complaints = [
            (not here, f"{right} is not installed", f"{PIP} install {right}=={version}"),
            (len(here) > 1, f"{found} overwrite each other's files: only one may be installed", replace),
            *((holds, f"{found} {problem}", replace) for holds, problem in problems),
            (self._failure(module), f"{found} {self._failure(module)}", replace),
        ]
        finding = _judge(name, found, f"{right} {version}", complaints)
        is_second_choice = finding.state == "ok" and here != [right]
        return dataclasses.replace(finding, state="note") if is_second_choice else finding


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def _judge(name: str, found: str, wanted: str, complaints: list[tuple[Any, str, str]]) -> Finding:
    """Return the finding with the first complaint (condition, problem, fix) that holds, or an "ok" finding."""
    for holds, problem, fix in complaints:
        if holds:
            return Finding(name, found or "missing", wanted, "misfit", problem, fix)
    return Finding(name, found, wanted)


def examine() -> list[Finding]:
    """Return a finding for every component."""
    gpus = [] if os.environ.get("TREC_TT_DEVICE") == "cpu" else gpu_names()
    here = Installation(installed_versions(), try_imports(), gpus)
    python = platform.python_version()
    is_old = tuple(map(int, python.split(".")[:2])) < (3, 11)
    complaints = [(is_old, f"Python {python} is older than 3.11", "make setup PYTHON=python3.12")]
    return [
        _judge("python", python, ">=3.11", complaints),
        *(here.torch(), here.fbgemm(), here.torchrec(), here.faiss()),
        *here.requirements(),
    ]


def machine_facts() -> dict[str, str]:
    """Return what decides the speed of a run on this machine."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # the limit of a container, which may be "max"
        memory_bytes = min(memory_bytes, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return {
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "memory": f"{memory_bytes / 2**30:.1f} GiB",
        "GPUs": ", ".join(gpu_names()) or "none",
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "not set (launch/torchrun.sh sets it)"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
    }


def main() -> int:
    """Print the report and return the exit code: 0 if everything fits, 1 otherwise."""
    try:
        findings, facts = examine(), machine_facts()
    except Exception as error:  # no traceback: the doctor is what runs where nothing else does
        print(f"The check itself failed, {type(error).__name__}: {error}")
        return 1
    rows = [("component", "found", "wanted"), *((f.component, f.found, f.wanted) for f in findings)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, state in zip(rows, ["state", *(f.state for f in findings)], strict=True):
        print(*map(str.ljust, row, widths), state, sep="  ")
    print("", *(f"{name}: {fact}" for name, fact in facts.items()), sep="\n")
    misfits = [f for f in findings if f.state == "misfit"]
    for f in misfits:
        print(f"\n{f.component}: {f.problem}\n  fix: {f.fix}")
    print(f"\n{len(misfits)} to fix; `make setup` fixes most." if misfits else "\nEverything fits.")
    return 1 if misfits else 0


if __name__ == "__main__":
    sys.exit(main())
