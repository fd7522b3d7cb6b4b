"""The files that are shipped with the package: launch/ and configs/."""

from __future__ import annotations

from pathlib import Path

from trec_twotower.errors import ConfigError

PACKAGE_DIR = Path(__file__).resolve().parent.parent


def package_file(name: str) -> Path:
    """Return the path of a shipped file, such as `configs/demo.yaml`; raises ConfigError if it is missing.

    An installed package contains the folders; in a checkout they are next to the package.
    """
    for root in (PACKAGE_DIR, PACKAGE_DIR.parent):
        if (root / name).is_file():
            return root / name
    raise ConfigError(f"{name} is neither in {PACKAGE_DIR} nor in {PACKAGE_DIR.parent}: install the package again.")


def shipped_configs() -> dict[str, Path]:
    """Return the path of each shipped config by its name without `.yaml`."""
    folder = package_file("configs/demo.yaml").parent
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
