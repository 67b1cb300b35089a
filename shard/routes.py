"""The experts that the tokens of a sequence take in one pass, for another pass to take the same.

Between experts that are nearly as good rounding decides. A token that takes another one than in the pass it is compared
with is far from what it was there, and says nothing of how right the rest of its way was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

Arguments = tuple[Tensor, ...]
"""Of all mixtures in transformers: hidden states [T, width], and of each token its experts and their weights [T, k]."""


class Routes:
    """Through the mixtures of experts of a backbone, if it has any."""

    def __init__(self, backbone: nn.Module) -> None:
        self._mixtures = [module for path, module in backbone.named_modules() if path.endswith(".experts")]
        self._taken: dict[nn.Module, Arguments] = {}

    def noted(self) -> AbstractContextManager[None]:
        """While this lasts, the sequence is passed through as a whole."""

        def note(mixture: nn.Module, args: Arguments) -> None:
            self._taken[mixture] = args[1:]

        return self._heard(note)

    def taken_again(self, positions: Tensor) -> AbstractContextManager[None]:
        """While this lasts, its tokens at some positions [T] are passed through, in whatever company."""

        def take(mixture: nn.Module, args: Arguments) -> Arguments:
            return args[0], *(of_token[positions] for of_token in self._taken[mixture])

        return self._heard(take)

    @contextmanager
    def _heard(self, hook: Callable[[nn.Module, Arguments], Arguments | None]) -> Iterator[None]:
        handles = [mixture.register_forward_pre_hook(hook) for mixture in self._mixtures]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
