"""Disks of an episode: small file systems that can be unmounted, mounted again, and filled."""

import os
import subprocess
from pathlib import Path

from infra.chaos_faults.namespaces import run

PAGE = 4096


class ChaosDisk:
    """A file system in memory at `backing`, which is bind-mounted at `place` while it is available."""

    def __init__(self, backing: Path, place: Path, megabytes: int, mounted: bool) -> None:
        """If this user cannot mount (`mounted` is false), `place` is a plain folder."""
        self.place, self.megabytes = place, megabytes
        self.backing = backing if mounted else place
        self.mounted, self.hidden = mounted, False
        place.mkdir(parents=True)
        if mounted:
            backing.mkdir(parents=True)
            run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "chaos", backing)
            run("mount", "--bind", backing, place)

    def hide(self) -> None:
        """Unmount it; open files remain open."""
        run("umount", "--lazy", self.place)
        self.hidden = True

    def show(self) -> None:
        """Mount it again."""
        run("mount", "--bind", self.backing, self.place)
        self.hidden = False

    def fill(self) -> None:
        """Fill it completely."""
        for _ in range(100):
            facts = os.statvfs(self.backing)
            used = (facts.f_blocks - facts.f_bfree) * facts.f_bsize
            try:
                run("mount", "-o", f"remount,size={max(used, PAGE)}", self.backing)
                return
            except RuntimeError:  # the file has grown in the meantime
                continue
        raise RuntimeError(f"{self.backing} cannot be filled")

    def free(self) -> None:
        """Undo `fill`."""
        run("mount", "-o", f"remount,size={self.megabytes}m", self.backing)

    def close(self) -> None:
        """Unmount it permanently."""
        if self.mounted:
            for path in (self.place, self.backing):
                subprocess.run(["umount", "--lazy", str(path)], capture_output=True)

    def shadow(self) -> list[str]:
        """Files that were written to the empty mount point; call after `close`."""
        if not self.mounted:
            return []
        return sorted(str(path.relative_to(self.place)) for path in self.place.rglob("*") if path.is_file())
