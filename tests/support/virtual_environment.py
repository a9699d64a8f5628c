"""Virtual environments for packages that only tests use."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


def environment_with(folder: Path, *packages: str) -> Path:
    """Interpreter of a new virtual environment with these packages, without their dependencies.

    It sees the packages of the running interpreter as well.
    """
    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    variables = {"base": str(folder / "env"), "platbase": str(folder / "env")}
    inner = Path(sysconfig.get_path("purelib", "venv", variables))
    (inner / "outer.pth").write_text(
        "\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    )
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, *packages], check=True, timeout=300)
    return python
