"""Calibration sets on the Hugging Face Hub, read as a stream; every failure with its true cause.

``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_HOME`` and ``HF_TOKEN`` mean what they mean everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwodel.exceptions import CalibrationError, DependencyError

__all__ = ["hub_records", "hub_revision"]

_LOCAL = "give a local .txt, .json, .jsonl or .parquet file instead"
_TIMEOUT = 20.0  # seconds for the hub's first answer


def hub_records(spec: str, split: str, token: str | None, revision: str | None = None) -> Iterator[Any]:
    """Yield the records of ``repo`` or ``repo:subset`` one by one; no more is downloaded than is read.

    Raises:
        CalibrationError: the set is missing, gated or has no such subset or split, or the hub
            cannot be reached.
        DependencyError: the datasets package is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise DependencyError(
            "calibration sets on the hub need the datasets package", hint="pip install datasets"
        ) from error
    repo, _, subset = spec.partition(":")
    try:
        yield from datasets.load_dataset(
            repo, subset or None, split=split, token=token, revision=revision, streaming=True
        )
    except Exception as error:
        # The datasets library raises whatever its many readers raise.
        raise _explained(spec, split, error) from error


def hub_revision(spec: str, token: str | None) -> str | None:
    """Return the commit the hub serves for a dataset, or ``None`` where it cannot be asked."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        info = HfApi(token=token).dataset_info(spec.partition(":")[0], timeout=_TIMEOUT)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, httpx.TransportError):
        return None
    return info.sha


def _explained(spec: str, split: str, error: Exception) -> CalibrationError:
    """Return our error for what the datasets library raised."""
    import httpx
    from huggingface_hub import errors

    repo = spec.partition(":")[0]
    causes = list(_chain(error))
    text = (str(error) or type(error).__name__).splitlines()[0]
    if any(isinstance(cause, errors.GatedRepoError) for cause in causes) or "gated dataset" in text:
        return CalibrationError(
            f"the calibration set {spec} is gated: its owner must grant you access",
            hint=f"accept its terms at https://huggingface.co/datasets/{repo}, then pass token=… or set "
            f"HF_TOKEN; or {_LOCAL}",
        )
    unreachable = (ConnectionError, errors.OfflineModeIsEnabled, httpx.TransportError)
    if any(isinstance(cause, unreachable) for cause in causes):
        return CalibrationError(
            f"the calibration set {spec} cannot be read from the hub: it cannot be reached ({text})",
            hint=f"check the network and HF_HUB_OFFLINE; or {_LOCAL}",
        )
    if any(isinstance(cause, errors.RepositoryNotFoundError) for cause in causes) or "doesn't exist" in text:
        return CalibrationError(
            f"the calibration set {spec} is neither a local file nor a dataset on the hub (or it is private)",
            hint=f"check the spelling; for a private set pass token=… or set HF_TOKEN; or {_LOCAL}",
        )
    if "split" in text.casefold():
        return CalibrationError(
            f"the calibration set {spec} has no split {split!r}: {text}", hint="pass calibration_split=…"
        )
    return CalibrationError(
        f"the calibration set {spec} cannot be read from the hub: {text}",
        hint=f"write a subset as repo:subset; for a gated set pass token=…; or {_LOCAL}",
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
