"""Download packages into a folder with the clients of their registries (npm, apt-get); skip existing ones."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def download_package(folder: Path, pattern: str, command: list[str], fallback_hint: str) -> Path:
    """Download a package unless `folder` contains it; return the path of its file.

    Args:
        folder: folder of the file, and working folder of the command.
        pattern: glob pattern of the file name.
        command: command line that downloads the package into its working folder.
        fallback_hint: end of the error message, an alternative for the user.

    Raises:
        ValueError: the program is not installed or fails.
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
    """Download and unpack a Debian package unless `folder` contains it; return the folder of its files.

    Raises:
        ValueError: the package cannot be downloaded or unpacked.
    """
    archive = download_package(folder, f"{name}_*.deb", ["apt-get", "download", name], fallback_hint)
    unpacked = folder / archive.stem
    if not unpacked.exists():
        partial = folder / f"{archive.stem}.partial"
        process = subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], capture_output=True, text=True)
        if process.returncode:
            raise ValueError(f"{archive} cannot be unpacked: {process.stderr.strip()}; {fallback_hint}")
        partial.rename(unpacked)
    return unpacked
