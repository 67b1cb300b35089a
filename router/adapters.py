"""`--lora-adapters` in TGI's words: which adapters there are, and where each comes from.

    id, id@revision                        on the hub, or a folder; clients ask for it by its id
    name=place, name=place@revision        the same under a name of its own

Where a place is found is the shards' resolver's business, and what is in it the shards'.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

_FORM: Final = re.compile(r"([^=@]+)(?:=([^=@]+))?(?:@([^=@]+))?")


class AdapterSource(NamedTuple):
    """An adapter under its name, and the folder or hub id that it is loaded from."""

    name: str
    place: str
    revision: str | None


def parse_adapters(texts: Sequence[str]) -> list[AdapterSource]:
    """Raises `ValueError` with TGI's sentence for one that has another form, or for a name that is given twice."""
    sources = [_parse(text) for text in texts]
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two LoRA adapters are called {twice}")
    return sources


def _parse(text: str) -> AdapterSource:
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"Invalid LoRA adapter format: {text}")
    name, place, revision = match.groups()
    return AdapterSource(name, place or name, revision)
