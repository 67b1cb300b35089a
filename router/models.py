"""Where a model's tokenizer and configuration files lie, for a router that starts no shards itself.

Weights are the shards' business: only the small files are fetched here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from router.errors import StartupError

WANTED_FILES: Final = ["*.json", "*.jinja", "tokenizer.model"]
UNWANTED_FILES: Final = ["*.safetensors.index.json", "*/*"]


def find_text_files(model_id: str, revision: str | None) -> Path:
    """A folder with the model's `tokenizer.json`: a local one, or a hub snapshot without weights.

    Raises `StartupError` when there is none.
    """
    path = Path(model_id).expanduser()
    if path.is_dir():
        return path.resolve()
    from huggingface_hub import snapshot_download  # half a second that a local folder need not pay
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model_id,
                revision=revision,
                allow_patterns=WANTED_FILES,
                ignore_patterns=UNWANTED_FILES,
                etag_timeout=5.0,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise StartupError(f"model {model_id!r}: no such folder, and the hub gave none: {cause}") from None
