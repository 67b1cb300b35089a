"""What keeps a shard from starting."""

from __future__ import annotations


class LoadError(Exception):
    """Why a model cannot be served, in one line."""
