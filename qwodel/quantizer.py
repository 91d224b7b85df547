"""The facade: pick a backend, hand over, return the path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qwodel.backends import backend_names, is_available, load_backend
from qwodel.backends.base import DryRun, Result
from qwodel.hub import HubModel, looks_like_hub_id
from qwodel.progress import Progress, ProgressCallback
from qwodel.source import ModelSource, inspect_source
from qwodel.untrusted import checked_path, kind_of

__all__ = ["Quantizer", "quantize"]


class Quantizer:
    """Quantize one model with one backend.

    Args:
        backend: a name from :meth:`list_backends`, in any case.
        model_path: a model directory, a model file, or a hub id (``owner/name``).
        output_dir: where results go; made when first needed.
        progress_callback: called with ``(percent, stage, message)``; raising in it cancels the run.
        **backend_kwargs: the backend's options; every backend takes ``overwrite``, ``token`` and ``revision``.

    Raises:
        BackendNotFoundError: no backend has that name.
        DependencyError: the backend's pip extra is not installed.
        ConfigurationError: an option is unknown or has a bad value.
        ValidationError: nothing usable is at ``model_path``, or a path cannot be.
        IntegrityError: a weight file is truncated or damaged.

    Example:
        >>> Quantizer("gguf", "./SmolLM2-135M-Instruct").quantize("Q4_K_M")  # doctest: +SKIP
        PosixPath('quantized_models/SmolLM2-135M-Instruct-Q4_K_M.gguf')
    """

    def __init__(
        self,
        backend: str,
        model_path: str | os.PathLike[str],
        output_dir: str | os.PathLike[str] = "./quantized_models",
        progress_callback: ProgressCallback | None = None,
        **backend_kwargs: Any,
    ) -> None:
        adapter = load_backend(backend)
        self._backend = adapter()
        self._options = adapter.parse_options(backend_kwargs)
        self.model_path = os.fspath(model_path)
        self.output_dir = checked_path(output_dir, "output directory")
        self._callback = progress_callback
        self._result: Result | None = None
        self._source = self._inspect_local()

    @property
    def backend(self) -> str:
        """The backend's name."""
        return self._backend.name

    def quantize(self, format: str, **kwargs: Any) -> Path:  # noqa: A002 - the public name
        """Quantize the model and return the path of the published file or directory.

        Args:
            format: a name from :meth:`list_formats`; case, ``-`` and ``_`` do not matter.
            **kwargs: options that override the constructor's for this run.

        Raises:
            FormatNotSupportedError: the backend has no such format.
            QuantizationError: one of its kinds, with cause and hint; nothing was published then.
        """
        spec = self._backend.find_format(format)
        options = self._backend.parse_options(kwargs, self._options)
        progress = Progress(self._callback, {"resolve": 1, "quantize": 9})
        progress.stage("resolve", f"reading {self.model_path}")
        source = self._source or self._download(progress, options)
        self._result = self._backend.quantize(source, self.output_dir, spec, options, progress)
        progress.complete(str(self._result.path))
        return self._result.path

    def plan(self, format: str, **kwargs: Any) -> DryRun:  # noqa: A002 - the public name
        """Return what :meth:`quantize` would write, tensor by tensor, without writing anything.

        The result has ``output_bytes`` (exact) and ``table()`` (text). A hub model is downloaded.

        Raises:
            ConfigurationError: the backend has no dry run (``gguf``), or an option is bad.
            FormatNotSupportedError: the backend has no such format.
        """
        spec = self._backend.find_format(format)
        options = self._backend.parse_options(kwargs, self._options)
        source = self._source or self._download(Progress(self._callback, {"resolve": 1}), options)
        self._backend.check_source(source)
        self._backend.check(source, spec, options)
        return self._backend.plan(source, spec, options)

    def get_model_info(self) -> dict[str, Any]:
        """Return facts about the source and, after :meth:`quantize`, about the result.

        Keys: ``source_model``, ``quantized_model`` (empty before), ``backend``,
        ``file_size`` in bytes (0 before), ``input_format``; with a local source
        ``architecture`` and ``parameters``; after a run also ``bits_per_weight``,
        ``seconds``, ``manifest`` and whatever the backend reports.
        """
        info: dict[str, Any] = {
            "source_model": self.model_path,
            "quantized_model": "",
            "backend": self._backend.name,
            "file_size": 0,
            "input_format": self._source.input_format if self._source else "hub",
        }
        if self._source:
            info |= {"architecture": self._source.architecture, "parameters": self._source.parameters}
        if self._result:
            info |= {
                "quantized_model": str(self._result.path),
                "file_size": self._result.size,
                "seconds": round(self._result.seconds, 3),
                "manifest": str(self._result.manifest),
                **self._result.report,
            }
        return info

    @staticmethod
    def list_backends() -> list[str]:
        """Return the names of all backends, installed or not."""
        return backend_names()

    @staticmethod
    def list_formats(backend: str | None = None) -> dict[str, Any]:
        """Return ``{format: description}`` of one backend, or ``{backend: {format: description}}`` of all.

        Without ``backend``, backends this release has no adapter for are left out.
        """
        if backend is not None:
            return _descriptions(backend)
        return {name: _descriptions(name) for name in backend_names() if is_available(name)}

    def _inspect_local(self) -> ModelSource | None:
        if looks_like_hub_id(self.model_path) and kind_of(checked_path(self.model_path)) is None:
            return None
        source = inspect_source(self.model_path)
        self._backend.check_source(source)
        return source

    def _download(self, progress: Progress, options: Any) -> ModelSource:
        model = HubModel(self.model_path, options.revision, options.token)
        config = model.config()
        if config:
            self._backend.check_config(config)
        self._source = model.fetch(progress)
        return self._source


def _descriptions(backend: str) -> dict[str, str]:
    formats = load_backend(backend, check_dependencies=False).formats()
    return {name: spec.description for name, spec in formats.items()}


def quantize(
    model_path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    backend: str,
    format: str,  # noqa: A002 - the public name
    progress_callback: ProgressCallback | None = None,
    **kwargs: Any,
) -> Path:
    """Quantize ``model_path`` in one call; see :class:`Quantizer`. Returns the published path.

    Raises:
        ValidationError: neither a model nor a hub id is at ``model_path``.
        QuantizationError: any of its kinds.
    """
    return Quantizer(backend, model_path, output_dir, progress_callback, **kwargs).quantize(format)
