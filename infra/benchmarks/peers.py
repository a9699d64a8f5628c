"""Virtual environment with the public packages that speed and results are compared with."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from fm_core.storage.file_lock import file_lock

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
PACKAGES = (
    "torchcfm==1.0.7",
    "flow-matching==1.0.10",
    "pot==0.9.7.post1",
    "torchdyn==1.0.6",
    "diffusers==0.42.1",
)


def peers_python(folder: Path) -> Path:
    """The Python of the virtual environment in `folder`, which is created if it does not exist.

    It shares the running interpreter's packages and contains the public packages without their dependencies,
    so that all contenders use the same torch.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(folder.with_suffix(".lock")):  # several processes may call this at the same time
        complete = folder / "complete"
        if not complete.exists() or complete.read_text() != "\n".join(PACKAGES):
            _make(folder)
    return folder / "bin" / "python"


def _make(folder: Path) -> None:
    venv.create(folder, symlinks=True, clear=True)
    variables = {"base": str(folder), "platbase": str(folder)}
    inner = Path(sysconfig.get_path("purelib", "venv", variables))
    (inner / "outer.pth").write_text(
        "\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    )
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    options = ["--quiet", "--no-deps", "--constraint", str(CONSTRAINTS)]
    subprocess.run([*pip, *options, *PACKAGES], check=True, timeout=300)
    (folder / "complete").write_text("\n".join(PACKAGES))
