"""``make`` mends an environment that was left half made."""

import shutil
import subprocess
from pathlib import Path

MAKEFILE = Path(__file__).resolve().parents[1] / "Makefile"
WITHOUT_PIP = "#!/bin/sh\nexit 1\n"
# ``python -m venv .venv`` puts one there that can do everything.
MAKES_PIP = "#!/bin/sh\nprintf '#!/bin/sh\\n' > .venv/bin/python\n"


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_an_environment_without_pip_is_made_again(tmp_path):
    shutil.copy(MAKEFILE, tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    write_program(tmp_path / ".venv/bin/python", WITHOUT_PIP)
    python = write_program(tmp_path / "python", MAKES_PIP)
    for said in ("making .venv", ""):  # and then it is left alone
        (tmp_path / ".venv/.installed").unlink(missing_ok=True)
        done = subprocess.run(
            ["make", ".venv/.installed", f"PYTHON={python}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("making .venv" in done.stdout) == bool(said)
