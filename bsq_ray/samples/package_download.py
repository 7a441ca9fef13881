"""Fetch packages with the tools of their public registries, and keep them in a folder."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def fetch_package(folder: Path, pattern: str, command: list[str], fallback_hint: str) -> Path:
    """Return the package file in `folder` that matches `pattern`; fetch it if it is missing.

    Args:
        folder: working folder of the command.
        pattern: glob pattern of the file name.
        command: fetches the package into its working folder.
        fallback_hint: alternative for the user, the end of the error message.

    Raises:
        ValueError: the tool is missing or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(pattern)):
        if shutil.which(command[0]) is None:
            raise ValueError(
                f"the photos need `{' '.join(command)}`, and {command[0]} is not installed; {fallback_hint}"
            )
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if process.returncode or not list(folder.glob(pattern)):
            reason = (process.stderr.strip().splitlines() or ["it wrote no file"])[-1]
            raise ValueError(f"`{' '.join(command)}` failed: {reason}; {fallback_hint}")
    return sorted(folder.glob(pattern))[0]


def unpack_debian_package(folder: Path, name: str, fallback_hint: str) -> Path:
    """Return the folder of an unpacked Debian package; fetch and unpack it if it is missing.

    Raises:
        ValueError: the package cannot be fetched or unpacked.
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
