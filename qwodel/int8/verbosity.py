"""How much the converters say, in convert_to_quant's words."""

from __future__ import annotations

import logging

from qwodel.exceptions import ConfigurationError, did_you_mean

__all__ = ["setup_logging"]

_LEVELS = {
    "DEBUG": logging.DEBUG,
    "VERBOSE": logging.INFO,
    "NORMAL": logging.WARNING,
    "MINIMAL": logging.ERROR,
}


def setup_logging(level: str = "NORMAL") -> None:
    """Set how much qwodel's loggers say; where logging is not set up yet, they say it on standard error.

    Args:
        level: ``DEBUG`` (everything), ``VERBOSE`` (what is done), ``NORMAL`` (warnings) or ``MINIMAL``
            (errors), in any case.

    Raises:
        ConfigurationError: no such level.
    """
    number = _LEVELS.get(level.upper()) if isinstance(level, str) else None
    if number is None:
        raise ConfigurationError(
            f"there is no logging level {level!r}",
            hint=did_you_mean(str(level), _LEVELS) or f"levels: {', '.join(_LEVELS)}",
        )
    logger = logging.getLogger("qwodel")
    logger.setLevel(number)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
