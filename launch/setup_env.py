#!/usr/bin/env python3
"""Makes `.venv` in the checkout with all that belongs to this machine; does nothing where that is done.

    python3 launch/setup_env.py [--test] [--docs]

`--test` adds what `make test` needs, `--docs` what `make docs` needs. TREC_TT_DEVICE=cpu|gpu overrides the detection
of a GPU. The standard library alone is used, and syntax plain enough for an older Python to reach the message about its
age.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Packages that share their files: where the wrong one was, all of a family go before the right one comes.
FAMILIES = (
    ("fbgemm-gpu", "fbgemm-gpu-cpu", "fbgemm-gpu-genai", "fbgemm-gpu-nightly", "fbgemm-gpu-nightly-cpu"),
    ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs"),
)
# What pip's complaints come down to, the first that fits.
COMPLAINTS = (
    (
        r"No space left|Errno 28|Disk quota",
        "the disk is full; free some 3 GB (with a GPU 12 GB) and run this again",
    ),
    (
        r"NewConnectionError|name resolution|is unreachable|Connection refused|ProxyError|timed out|SSLError",
        "the package index was not reached: mend the network or pip's index-url or proxy and run this again",
    ),
    (
        r"from versions: none",
        "the index that pip asks has nothing of that name, or was not reached: mend the network, or pip's "
        "index-url and proxy",
    ),
    (
        r"No matching distribution|Could not find a version",
        "the index that pip asks has no such version for this Python and platform: PYTHON=python3.12 picks "
        "another Python, PIP_EXTRA_INDEX_URL adds an index",
    ),
    (r"Permission denied|Errno 13", "this user may not write there"),
)


class SetupError(Exception):
    """What was found and what to do about it, in words for the person at the terminal."""


def detect_device() -> str:
    """ "gpu" where an NVIDIA GPU is to be seen, else "cpu"; TREC_TT_DEVICE overrides both."""
    asked = os.environ.get("TREC_TT_DEVICE", "")
    if asked:
        if asked not in ("cpu", "gpu"):
            raise SetupError(f"TREC_TT_DEVICE is {asked!r}: set it to cpu or gpu, or leave it out.")
        return asked
    return "gpu" if sees_gpu() else "cpu"


def sees_gpu() -> bool:
    if glob.glob("/dev/nvidia[0-9]*"):  # first, because nvidia-smi may take a second
        return True
    smi = shutil.which("nvidia-smi")
    if not smi:
        return False
    try:
        return "GPU " in subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return False


def requirement_files(root: Path, device: str, with_tests: bool, with_docs: bool = False) -> list[Path]:
    names = ["base", device, "torchrec", *(["test"] if with_tests else []), *(["docs"] if with_docs else [])]
    return [root / "launch" / f"requirements-{name}.txt" for name in names]


def stamp_path(root: Path, device: str, with_tests: bool, with_docs: bool = False) -> Path:
    """The file that says the environment is whole; its name changes with all that decides what is in it."""
    digest = hashlib.sha256(f"{root}|{device}|{sys.version_info[:2]}".encode())
    for path in [*requirement_files(root, device, with_tests, with_docs), root / "pyproject.toml"]:
        digest.update(path.read_bytes())
    return root / ".venv" / f".ready-{digest.hexdigest()[:16]}"


def is_ready(root: Path, device: str, with_tests: bool, with_docs: bool = False) -> bool:
    return stamp_path(root, device, with_tests, with_docs).exists() and (root / ".venv/bin/python").exists()


def installed_versions(venv: Path) -> dict[str, str]:
    """Version by normalised name of what is in the environment, as the folder names say."""
    versions = {}
    for info in venv.glob("lib/python*/site-packages/*.dist-info"):
        name, _, version = info.name[: -len(".dist-info")].partition("-")
        versions[re.sub(r"[-_.]+", "-", name).lower()] = version
    return versions


def pins(paths: list[Path]) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for path in paths for line in path.read_text().splitlines()]
    return {re.sub(r"[-_.]+", "-", n).lower(): v for n, eq, v in (line.partition("==") for line in lines) if eq}


def to_uninstall(installed: dict[str, str], wanted: dict[str, str], device: str) -> list[str]:
    """What must go first: families in which a wrong member is, whole, and a torch that cannot see the GPU."""
    leaving = []
    for family in FAMILIES:
        here = [name for name in family if name in installed]
        if any(name not in wanted for name in here):
            leaving += here
    if device == "gpu" and installed.get("torch", "").endswith("+cpu"):
        leaving.append("torch")
    return leaving


def run(what: str, command: list[str], cwd: Path) -> None:
    """Run a step of ours without a word from it; on failure raise with its last lines and what they mean."""
    start_s = time.monotonic()
    print(f"  {what} ...", end="", flush=True)
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    print(f" {time.monotonic() - start_s:.0f} s" if done.returncode == 0 else " failed", flush=True)
    if done.returncode == 0:
        return
    meaning = next((text for pattern, text in COMPLAINTS if re.search(pattern, done.stdout)), "see the lines above")
    tail = "\n".join(done.stdout.strip().splitlines()[-15:])
    free_gb = shutil.disk_usage(cwd).free / 1e9
    raise SetupError(f"{tail}\n\n{what} failed: {meaning}. ({free_gb:.1f} GB are free.)")


def has_venv(root: Path) -> bool:
    """Whether `.venv` is there, works, and is of this Python's version."""
    check = f"import pip, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    try:
        command = [str(root / ".venv/bin/python"), "-c", check]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def make_venv(root: Path) -> None:
    """A new `.venv`, empty but for pip, in place of whatever was there."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    try:
        import ensurepip  # noqa: F401  what some systems leave out of Python's venv
        import venv  # noqa: F401
    except ImportError as error:
        raise SetupError(
            f"This Python lacks {error.name!r}, needed for virtual environments: install it (on Debian "
            f"and Ubuntu the package python{version}-venv), or pick another Python with PYTHON=..."
        ) from None
    # The base interpreter, in case this one lives in the very environment that is about to be cleared.
    base = getattr(sys, "_base_executable", None) or sys.executable
    run(f"virtual environment, Python {version}", [base, "-m", "venv", "--clear", str(root / ".venv")], root)


def install(root: Path, device: str, with_tests: bool, with_docs: bool = False) -> None:
    """Bring the packages in `.venv` from whatever state they are in to the pinned one."""
    for info in root.glob(".venv/lib/python*/site-packages/*.dist-info"):
        if not (info / "RECORD").exists():  # pip was stopped here; without this folder it starts over
            shutil.rmtree(info)
    pip = [str(root / ".venv/bin/python"), "-m", "pip"]
    quiet = [*pip, "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    files = requirement_files(root, device, with_tests, with_docs)
    leaving = to_uninstall(installed_versions(root / ".venv"), pins(files), device)
    if leaving:
        run(f"removing {', '.join(leaving)}", [*pip, "uninstall", "--yes", *leaving], root)
    torchrec = root / "launch/requirements-torchrec.txt"
    with_deps = [f"-r{path}" for path in files if path != torchrec]
    run(f"pinned packages for {device} (the long step)", [*quiet, *with_deps], root)
    run("torchrec", [*quiet, "--no-deps", f"-r{torchrec}"], root)
    run("this project", [*quiet, "--no-deps", "--no-build-isolation", "-e", str(root)], root)


def verify(root: Path, device: str) -> str:
    """The doctor's report if anything does not fit, else nothing."""
    done = subprocess.run(
        [str(root / ".venv/bin/python"), "-m", "trec_twotower.doctor"],
        cwd=root,
        env={**os.environ, "TREC_TT_DEVICE": device},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode == 0:
        return ""
    if device == "gpu" and not sees_gpu():  # asked for, as in the making of an image: it cannot be tried here
        print(f"{done.stdout}\nNo GPU is here to try this on: where one is, `trec-twotower doctor` tells more.")
        return ""
    return done.stdout


def prepare(root: Path, with_tests: bool, with_docs: bool = False) -> None:
    """Make the environment ready, one process at a time; the stamps go first and come back last."""
    device = detect_device()
    if is_ready(root, device, with_tests, with_docs):
        return
    lock = os.open(root, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if is_ready(root, device, with_tests, with_docs):
            return  # another set-up was at it, and is done
        # What earlier calls added stays part of the environment.
        with_tests = with_tests or is_ready(root, device, with_tests=True)
        with_docs = with_docs or is_ready(root, device, with_tests=False, with_docs=True)
        print(f"Setting up {root / '.venv'} for {device} with Python {sys.version.split()[0]}:", flush=True)
        start_s = time.monotonic()
        for stamp in root.glob(".venv/.ready-*"):
            stamp.unlink()
        is_new = not has_venv(root)
        while True:
            if is_new:
                make_venv(root)
            install(root, device, with_tests, with_docs)
            complaint = verify(root, device)
            if not complaint:
                break
            if is_new or "does not import" not in complaint:
                raise SetupError(f"{complaint}\nAll is installed, but the doctor finds that it does not fit.")
            print("  broken files were there before; once more from nothing:", flush=True)
            is_new = True
        for tests in {False, with_tests}:
            for docs in {False, with_docs}:
                stamp_path(root, device, tests, docs).touch()
        print(f"Ready after {time.monotonic() - start_s:.0f} s.", flush=True)
    finally:
        os.close(lock)


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036  an older Python may well be what runs this file
        print(
            f"Python {sys.version.split()[0]} is too old, 3.11 is the oldest that will do: "
            "make setup PYTHON=python3.11 (or 3.12, or any later one that is here).",
            file=sys.stderr,
        )
        return 1
    parser = argparse.ArgumentParser(description="Make .venv for this machine.")
    parser.add_argument("--test", action="store_true", help="add what `make test` needs")
    parser.add_argument("--docs", action="store_true", help="add what `make docs` needs")
    options = parser.parse_args()
    if not (ROOT / "pyproject.toml").exists():
        print(f"{ROOT} is not a checkout of the project: run the one in its launch folder.", file=sys.stderr)
        return 1
    try:
        prepare(ROOT, options.test, options.docs)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or ROOT}: {error.strerror}. Mend that and run this again.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped halfway: the next call goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
