"""`transformers chat`, its session piped in as lines."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import ANSWER, QUESTION, Servers, run

COMMAND = Path(sys.executable).with_name("transformers")
TIMEOUT_S = 120


def chat(url: str, lines: list[str], *flags: str) -> str:
    """What it prints. It keeps a history where it is run."""
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [COMMAND, "chat", "org/m", url, *flags],
            input="".join(f"{line}\n" for line in lines),
            cwd=directory,
            env=os.environ | {"COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def row_60_two_turns_of_seven_tokens(servers: Servers) -> None:
    """It asks whether to go on behind each of them."""
    lines = ["Tell me a story.", "n", "Another one.", "n", "!exit"]
    output = chat(f"{servers.plain}/v1", lines, "max_new_tokens=7", "do_sample=False")

    _, first, second = (turn.split("Generation stopped")[0] for turn in output.split("<org/m>:"))
    assert output.count("Generation stopped after reaching the token limit.") == 2
    assert first.strip() == "The story of a young woman named"
    assert 1 <= len(second.split()) <= 7


def row_60_an_answer_that_ends(servers: Servers) -> None:
    output = chat(f"{servers.plain}/v1", [QUESTION[0]["content"], "!exit"], "max_new_tokens=30", "do_sample=False")

    assert ANSWER in output
    assert "token limit" not in output


if __name__ == "__main__":
    run(sys.modules[__name__])
