"""What kind of file system a path is on, and whether SQLite may trust its locks and syncs."""

import re
import subprocess
import sys
from pathlib import Path

NETWORK = frozenset(
    {
        "9p", "afpfs", "afs", "ceph", "cifs", "davfs", "fuse.davfs2", "fuse.glusterfs", "fuse.rclone", "fuse.sshfs",
        "glusterfs", "lustre", "nfs", "nfs4", "smb2", "smb3", "smbfs", "virtiofs", "webdav",
    }
)  # fmt: skip
_SYNCHRONISED = re.compile(
    r"/(Mobile Documents|com~apple~CloudDocs|CloudStorage|Dropbox|OneDrive|Google Drive|Nextcloud)( [^/]*|- [^/]*)?/"
)
"""Folders whose files a program copies to other machines, one by one and at any moment."""


def kind(path: Path) -> str:
    """The type of the file system that holds a path; empty where that cannot be told."""
    lines: list[tuple[str, str]] = []
    try:
        if sys.platform == "darwin":
            done = subprocess.run(["/sbin/mount"], capture_output=True, text=True, timeout=2)
            lines = re.findall(r" on (/.*) \((\w+)", done.stdout)
        else:
            text = Path("/proc/self/mounts").read_text(errors="replace")
            lines = [(place.replace("\\040", " "), name) for _, place, name, *_ in map(str.split, text.splitlines())]
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    real = path.resolve()
    above = [(len(place), number, name) for number, (place, name) in enumerate(lines) if real.is_relative_to(place)]
    return max(above, default=(0, 0, ""))[2]


def distrust(path: Path) -> str:
    """Why a database had better not be kept below a path; empty where nothing speaks against it."""
    name = kind(path)
    if name in NETWORK:
        return f"is on a network file system ({name}), whose locks and syncs cannot be trusted"
    if found := _SYNCHRONISED.search(f"{path.resolve()}/"):
        return f"is in a folder that is synchronised with other machines ({found[1]}), file by file"
    return ""
