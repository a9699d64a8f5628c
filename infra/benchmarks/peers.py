"""Virtual environment with the public packages with which speed and results are compared."""

import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import PackageNotFoundError, version
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
    """Return the Python of the virtual environment in `folder`, which is created if it does not exist.

    The environment shares the running interpreter's packages and contains the public packages without their
    dependencies, so that all contenders use the same torch. If the running interpreter already has the public
    packages, as after gpu.sh has installed them from a folder of wheels, it is returned instead.
    """
    if _installed():
        return Path(sys.executable)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(folder.with_suffix(".lock")):  # several processes may call this at the same time
        complete = folder / "complete"
        if not complete.exists() or complete.read_text() != "\n".join(PACKAGES):
            _make(folder)
    return folder / "bin" / "python"


def _installed() -> bool:
    """Whether the running interpreter has the public packages in the required versions."""
    try:
        return all(version(name) == wanted for name, wanted in (item.split("==") for item in PACKAGES))
    except PackageNotFoundError:
        return False


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
