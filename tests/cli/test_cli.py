from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from qwodel.cli.arguments import parse_options
from qwodel.cli.main import app


def qwodel(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwodel", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_the_kept_help_is_typers_own() -> None:
    kept = Path(sys.modules["qwodel"].__file__ or "").parent / "cli" / "help.txt"
    result = CliRunner().invoke(app, ["--help"], prog_name="qwodel", terminal_width=78)
    assert kept.read_text() == result.output
    assert qwodel("--help").stdout == result.output


def test_every_verb_has_help_that_teaches() -> None:
    for verb in (
        "quantize",
        "list-backends",
        "list-formats",
        "list-options",
        "inspect",
        "check",
        "quickstart",
    ):
        done = qwodel(verb, "--help")
        assert done.returncode == 0
        assert "Usage:" in done.stdout
        assert all(line.strip() for line in done.stdout.split("Options:")[1].strip().splitlines())
    assert "Examples:" in qwodel("quantize", "--help").stdout


def test_quantize_in_a_pipe_prints_plain_lines_and_a_summary(stories15m: Path, tmp_path: Path) -> None:
    done = qwodel("quantize", stories15m, "-b", "gguf", "-f", "q4-k-m", "-o", tmp_path, "-O", "nthread=1")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert f"{tmp_path}/stories15M-Q4_K_M.gguf" in done.stdout
    assert "36 tensors could not take the asked type: Q4_K → Q5_0, Q6_K → Q8_0" in done.stdout
    assert "decoded and compared: 43 tensors" in done.stdout
    stages = [line.split("% ")[1].split(":")[0] for line in done.stderr.splitlines() if " % " in line]
    assert list(dict.fromkeys(stages)) == ["resolve", "convert", "quantize", "verify", "publish", "complete"]


def test_quantize_quiet_and_json(stories15m: Path, tmp_path: Path) -> None:
    quiet = qwodel("quantize", stories15m, "-b", "gguf", "-f", "Q8_0", "-o", tmp_path, "--quiet")
    assert quiet.stdout == f"{tmp_path}/stories15M-Q8_0.gguf\n"
    assert quiet.stderr == ""
    as_json = qwodel(
        "quantize", stories15m, "-b", "gguf", "-f", "Q8_0", "-o", tmp_path, "--json", "--overwrite", "-q"
    )
    assert json.loads(as_json.stdout)["file_size"] == (tmp_path / "stories15M-Q8_0.gguf").stat().st_size


def test_a_terminal_gets_a_live_bar(stories15m: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "qwodel",
        "quantize",
        str(stories15m),
        "-b",
        "gguf",
        "-f",
        "Q8_0",
        "-o",
        str(tmp_path),
    ]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    process = subprocess.Popen(command, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    seen = b""
    while True:
        try:
            seen += os.read(master, 4096)
        except OSError:
            break
    process.wait()
    os.close(master)
    assert process.returncode == 0
    text = seen.decode()
    assert "ETA" in text
    assert "quantize" in text
    assert "MB" in text
    assert "\x1b[" in text


@pytest.mark.parametrize(
    ("arguments", "code", "cause"),
    [
        (("quantize", "{model}", "-b", "gguf", "-f", "Q4_K_MM"), 2, "did you mean 'Q4_K_M'"),
        (("quantize", "{model}", "-b", "gguff", "-f", "Q8_0"), 2, "did you mean 'gguf'?"),
        (("quantize", "./nowhere", "-b", "gguf", "-f", "Q8_0"), 2, "nowhere does not exist"),
        (("quantize", "{model}", "-b", "gguf", "-f", "Q8_0", "-O", "pur=1"), 2, "did you mean 'pure'?"),
        (("quantize", "{model}", "-b", "gguf", "-f", "Q8_0", "-O", "pure"), 2, "is not KEY=VALUE"),
        (("quantize", "{model}", "-b", "segquant", "-f", "w8a8"), 2, "no model or pipeline of diffusers"),
        (
            ("quantize", "{model}", "-b", "coreml", "-f", "int4", "-O", "deployment_target=iOS16"),
            2,
            "needs iOS18",
        ),
        (("quantize", "{model}", "-b", "gguf", "-f", "IQ2_S"), 5, "needs an importance matrix"),
        (("inspect", "{model}/config.json"), 2, "no model file this library knows"),
        (("list-formats", "gguff"), 2, "did you mean 'gguf'?"),
    ],
)
def test_errors_are_a_cause_a_hint_and_a_code(
    stories15m: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, cause: str
) -> None:
    done = qwodel(*(part.format(model=stories15m) for part in arguments), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert cause in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_verbose_errors_have_the_traceback(tmp_path: Path) -> None:
    done = qwodel("quantize", "./nowhere", "-b", "gguf", "-f", "Q8_0", "--verbose", cwd=tmp_path)
    assert "Traceback" in done.stderr
    assert "hint:" in done.stderr


def test_listing_verbs_in_json() -> None:
    states = {state["backend"]: state for state in json.loads(qwodel("list-backends", "--json").stdout)}
    assert states["gguf"]["state"] == "ready"
    assert set(states) >= {"awq", "coreml", "fp8", "gguf", "int8", "segquant", "smoothquant"}
    formats = {row["format"]: row for row in json.loads(qwodel("list-formats", "gguf", "--json").stdout)}
    assert formats["IQ2_XS"]["needs"] == ["importance matrix"]
    assert formats["Q8_0"]["bits"] == 8.51
    options = {row["option"] for row in json.loads(qwodel("list-options", "gguf", "--json").stdout)}
    assert {"tensor_types", "imatrix", "calibration_dataset", "overwrite", "pure"} <= options
    facts = json.loads(qwodel("check", "--json").stdout)
    assert facts["cpus"] >= 1
    assert "LlamaForCausalLM" in facts["llama_cpp"]["architectures"]


def test_inspect(stories15m: Path) -> None:
    facts = json.loads(qwodel("inspect", stories15m, "--json", "--tensors").stdout)
    assert facts["parameters"] == 15_191_712
    assert len(facts["tensor_list"]) == 56
    text = qwodel("inspect", stories15m).stdout
    assert "15,191,712" in text
    assert "LlamaForCausalLM" in text


def test_a_plan_gives_the_exact_size_and_writes_nothing(stories15m: Path, tmp_path: Path) -> None:
    arguments = (stories15m, "-b", "int8", "-f", "int8_row")
    planned = json.loads(qwodel("plan", *arguments, "--json", cwd=tmp_path).stdout)
    assert not list(tmp_path.iterdir())
    done = qwodel("quantize", *arguments, "-q", cwd=tmp_path)
    written = [
        path for path in (tmp_path / done.stdout.strip()).iterdir() if path.name != "qwodel.manifest.json"
    ]
    assert planned["output_bytes"] == sum(path.stat().st_size for path in written)
    assert any("model.layers.0.mlp.up_proj.weight" in line for line in planned["table"])
    refused = qwodel("plan", stories15m, "-b", "gguf", "-f", "Q8_0")
    assert refused.returncode == 2
    assert "the gguf backend has no dry run" in refused.stderr


def test_statistics_are_kept_once_and_used(stories15m: Path, wikitext: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(wikitext.read_text("utf-8")[:40_000], "utf-8")
    stats = tmp_path / "stats.safetensors"
    command = [
        "calibrate",
        stories15m,
        "--data",
        text,
        "-o",
        stats,
        "--num-samples",
        "6",
        "--seq-length",
        "128",
    ]
    done = qwodel(*command)
    assert done.returncode == 0, done.stderr
    assert "watching model.layers.5" in done.stderr
    again = qwodel(*command)
    assert again.returncode != 0
    assert "exists" in again.stderr
    done = qwodel(
        "quantize", stories15m, "-b", "int8", "-f", "int8_row", "-o", tmp_path / "out", "--json",
        "-O", f"calibration_data_path={stats}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rounding = json.loads(done.stdout)["rounding"]
    assert {each["method"] for each in rounding.values()} == {"gptq"}
    assert {each["tokens"] for each in rounding.values()} == {6 * 128}


def test_calibrate_says_what_is_wrong(stories15m: Path, tmp_path: Path) -> None:
    done = qwodel("calibrate", stories15m, "--data", "missing.txt", "-o", tmp_path / "s.safetensors")
    assert done.returncode != 0
    assert "missing.txt does not exist" in done.stderr
    done = qwodel("calibrate", tmp_path, "--data", "missing.txt", "-o", tmp_path / "s.safetensors")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_completion_knows_backends_and_formats() -> None:
    from qwodel.cli.arguments import complete_backend, complete_format

    assert complete_backend("g") == ["gguf"]
    context = type("Context", (), {"params": {"backend": "gguf"}})()
    assert complete_format(context, "q4_k") == ["Q4_K_M", "Q4_K_S"]
    assert complete_format(type("Context", (), {"params": {}})(), "q") == []


def test_option_values_are_json_or_text() -> None:
    pairs = [
        "nthread=4",
        "pure=true",
        "imatrix=a/b=c.gguf",
        'tensor-types={"attn_v": "q8_0"}',
        "text=plain words",
    ]
    assert parse_options(pairs) == {
        "nthread": 4, "pure": True, "imatrix": "a/b=c.gguf", "tensor_types": {"attn_v": "q8_0"}, "text": "plain words",
    }  # fmt: skip
    for bad in (["nthread"], ["=3"], ["a=1", "a=2"]):
        with pytest.raises(typer.BadParameter):
            parse_options(bad)
