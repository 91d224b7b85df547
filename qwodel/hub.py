"""Models on the Hugging Face Hub: recognised, described, downloaded; every failure with its true cause.

The network is touched only here and only for an id the user gave. ``HF_ENDPOINT``,
``HF_HUB_OFFLINE``, ``HF_HOME`` and ``HF_TOKEN`` mean what they mean everywhere else.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qwodel.exceptions import Cancelled, QuantizationError, ResourceError, ValidationError
from qwodel.progress import Progress
from qwodel.source import ModelSource, inspect_source, read_config

__all__ = ["HubModel", "looks_like_hub_id"]

_TIMEOUT = 20.0  # seconds for the hub's first answer

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?")
_SIDE_FILES = [
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "README.md",
    "*.py",
]
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")


def looks_like_hub_id(text: str) -> bool:
    """Whether ``text`` has the form ``name`` or ``owner/name`` and is no path by its looks."""
    return bool(_ID.fullmatch(text)) and not text.endswith((".gguf", ".safetensors", ".pt", ".pth", ".bin"))


@dataclass(frozen=True)
class HubModel:
    """A model repository on the hub. ``token`` never appears in ``repr``, logs or errors."""

    repo: str
    revision: str | None = None
    token: str | None = field(default=None, repr=False)

    @cached_property
    def _info(self) -> Any:
        """What the hub says of the repository; ``None`` where the hub cannot be reached."""
        import httpx
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled

        with _explained(self.repo, self.revision):
            try:
                return HfApi(token=self.token).model_info(
                    self.repo, revision=self.revision, files_metadata=True, timeout=_TIMEOUT
                )
            except (OfflineModeIsEnabled, httpx.TransportError):
                return None

    def config(self) -> dict[str, Any]:
        """Download and return ``config.json`` alone (empty where the repository has none).

        Raises:
            ValidationError: there is no such repository, it is gated, or the hub
                cannot be reached and the cache has nothing.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        with _explained(self.repo, self.revision):
            try:
                file = hf_hub_download(
                    self.repo,
                    "config.json",
                    revision=self.revision,
                    token=self.token,
                    local_files_only=self._info is None,
                )
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return {}
        return read_config(Path(file).parent)

    def describe(self) -> dict[str, Any]:
        """Describe the model from its config and the headers of its remote files; no weights are downloaded.

        The keys are those of :meth:`ModelSource.describe`, and ``tensor_list``.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import NotASafetensorsRepoError

        config, info = self.config(), self._info
        if info is None:
            return {**self.fetch(Progress(None)).describe(), "tensor_list": []}
        with _explained(self.repo, self.revision):
            try:
                api = HfApi(token=self.token)
                remote = api.get_safetensors_metadata(self.repo, revision=self.revision).files_metadata
            except NotASafetensorsRepoError:
                remote = {}
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        weights = _weight_files(sizes)
        tensors = {name: tensor for file in remote.values() for name, tensor in file.tensors.items()}
        dtypes: Counter[str] = Counter()
        for tensor in tensors.values():
            dtypes[tensor.dtype] += tensor.parameter_count
        return {
            "model": self.repo,
            "name": self.repo.rsplit("/", 1)[-1],
            "input_format": "hub",
            "architecture": next(iter(config.get("architectures") or []), None),
            "parameters": sum(dtypes.values()) or None,
            "tensors": len(tensors),
            "dtypes": dict(dtypes.most_common()),
            "weight_bytes": sum(sizes[name] for name in weights),
            "weight_files": weights,
            "tied_embeddings": config.get("tie_word_embeddings"),
            "revision": info.sha,
            "tensor_list": [
                {"name": name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
                for name, tensor in tensors.items()
            ],
        }

    def fetch(self, progress: Progress) -> ModelSource:
        """Download what a conversion needs (resuming what is there) and describe it.

        Safetensors are preferred; other weights are fetched only where there are none.
        """
        with _explained(self.repo, self.revision):
            folder = (
                self._from_cache()
                if self._info is None
                else self._download(self._patterns(progress), progress)
            )
        return inspect_source(
            folder, given=self.repo, name=self.repo.rsplit("/", 1)[-1], revision=folder.name
        )

    def _download(self, patterns: list[str], progress: Progress | None) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                self.repo,
                revision=self.revision,
                token=self.token,
                allow_patterns=patterns,
                local_files_only=progress is None,
                tqdm_class=_bar_class(progress, self.repo) if progress else None,
            )
        )

    def _from_cache(self) -> Path:
        """Return the snapshot in the cache that is whole for the first kind of weights."""
        from huggingface_hub.errors import LocalEntryNotFoundError

        for pattern in _WEIGHTS:
            with suppress(LocalEntryNotFoundError):
                folder = self._download([*_SIDE_FILES, pattern], None)
                if any(folder.glob(pattern)):
                    return folder
        raise LocalEntryNotFoundError(f"{self.repo} is not in the cache")

    def _patterns(self, progress: Progress) -> list[str]:
        """Choose which files to fetch, and refuse at once what the disk cannot hold."""
        from huggingface_hub import constants

        sizes = {file.rfilename: file.size or 0 for file in self._info.siblings or []}
        chosen = _weight_files(sizes)
        if not chosen:
            raise ValidationError(
                f"{self.repo} holds no model weights", hint=f"looked for {', '.join(_WEIGHTS)}"
            )
        needed = sum(sizes[name] for name in chosen)
        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        if needed > free:
            raise ResourceError(
                f"downloading {self.repo} needs {needed / 1e9:.1f} GB, and {cache} has {free / 1e9:.1f} GB free",
                hint="free some space, or point HF_HOME at a larger disk",
            )
        return [*_SIDE_FILES, *chosen]


def _weight_files(names: Iterable[str]) -> list[str]:
    """Return the weight files to take: those of the first kind in :data:`_WEIGHTS` there are any of."""
    top = [name for name in names if "/" not in name]
    kinds = ([name for name in top if name.endswith(pattern[1:])] for pattern in _WEIGHTS)
    return sorted(next(filter(None, kinds), []))


def _bar_class(progress: Progress, repo: str) -> type[Any]:
    """Return a tqdm class that reports bytes to ``progress`` and draws nothing."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            kwargs["disable"] = False
            super().__init__(*args, **kwargs)

        def display(self, *_args: Any, **_kwargs: Any) -> bool:
            return True

        def update(self, n: float | None = 1) -> bool | None:
            # Not in display(): tqdm holds a lock there that an exception would never give back.
            shown: bool | None = super().update(n)
            if self.unit == "B" and self.total:
                done, total = self.n / 1e6, self.total / 1e6
                progress.update(done, total, f"downloading {repo}: {done:,.1f} of {total:,.1f} MB")
            return shown

    return Bar


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the hub library's errors into ours, each with what to do."""
    import httpx
    from huggingface_hub import errors

    asked = f"{repo}@{revision}" if revision else repo
    try:
        yield
    except (QuantizationError, Cancelled):
        raise
    except errors.GatedRepoError as error:
        raise ValidationError(
            f"{repo} is gated: its owner must grant you access",
            hint=f"accept its terms at https://huggingface.co/{repo}, then pass token=… or set HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValidationError(
            f"{repo} has no revision {revision!r}", hint="give a branch, a tag or a commit"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValidationError(
            f"{repo!r} is neither a local path nor a model on the hub (or it is private)",
            hint="check the spelling; for a private model pass token=… or set HF_TOKEN",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx.TransportError) as error:
        raise ValidationError(
            f"{asked!r} is not a local path, and the hub cannot be reached to look it up",
            hint="check the path or the network; with HF_HUB_OFFLINE=1 only what is in the cache can be used",
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        cause = (
            "the hub refused the token" if status in (401, 403) else f"the hub answered with HTTP {status}"
        )
        raise ValidationError(
            f"{asked} cannot be downloaded: {cause}", hint="check token=… or HF_TOKEN, and try again"
        ) from error
    except errors.HFValidationError as error:
        raise ValidationError(f"{repo!r} is neither a local path nor a valid hub id") from error
    except OSError as error:
        raise ResourceError(f"{asked} cannot be stored: {error.strerror or error}") from error
