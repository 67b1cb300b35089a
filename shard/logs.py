"""Where a rank's log goes and what its records look like: stderr, as lines for people or as JSON for machines."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Final

LEVELS: Final = {
    "debug": logging.DEBUG,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def configure_logging(rank: int, *, as_json: bool) -> None:
    """The variable LOG_LEVEL names the least severe records to log."""
    level = LEVELS.get(os.environ.get("LOG_LEVEL", "").lower(), logging.INFO)
    plain = logging.Formatter(f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(rank) if as_json else plain)
    logging.basicConfig(level=level, handlers=[handler])
    # It would say at every layer of every step which kernels it uses.
    logging.getLogger("torch.nn.attention.varlen").setLevel(max(level, logging.WARNING))


class JsonFormatter(logging.Formatter):
    """One JSON object per record, as the router's but for its rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "timestamp": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname,
            "target": record.name,
            "rank": self._rank,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)
