"""``cd MODEL && qwodel quantize .`` in a folder of somebody else's files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwodel.exceptions import ValidationError
from qwodel.quantizer import quantize

HOSTILE = ("json", "uuid", "torch", "numpy", "selectors", "sentencepiece", "typer", "qwodel_not")


@pytest.fixture
def model(stories15m: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(stories15m, folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder


@pytest.mark.parametrize("command", [["-m", "qwodel"], ["-c", "from qwodel.__main__ import main; main()"]])
def test_modules_beside_a_model_are_not_imported(model: Path, tmp_path: Path, command: list[str]) -> None:
    for name in HOSTILE:
        (model / f"{name}.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'a').write({name!r})\n")
    arguments = ["quantize", ".", "-b", "gguf", "-f", "Q8_0", "-o", str(tmp_path / "out"), "-q"]
    # -P stands for the console script, which Python starts without the present folder.
    safe = ["-P"] if command[0] == "-c" else []
    done = subprocess.run(
        [sys.executable, *safe, *command, *arguments], cwd=model, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model-Q8_0.gguf").is_file()
    assert not (tmp_path / "RAN").exists()


def test_a_template_that_leads_out_of_the_folder_gets_into_no_file(model: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("PRIVATE KEY")
    (model / "chat_template.jinja").symlink_to(os.path.relpath(secret, model))
    with pytest.raises(ValidationError, match=r"chat_template\.jinja is a link that leads out"):
        quantize(model, tmp_path / "out", "gguf", "Q8_0")
    assert not (tmp_path / "out").exists()
