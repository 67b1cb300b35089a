"""Everything that can go wrong for a client, as one tree; `api` maps it to a status in one place.

RouterError
├── ValidationError        422  the request can never be served as it stands
├── TemplateError          422  the conversation cannot be written as this model's prompt
├── ToolError              422  the tools cannot be called as the request says
├── UnknownModel           404  no such model is served
├── BadBody           400, 422  the body is not JSON, or not the JSON its route takes
├── UnsupportedMedia       415  the body is declared to be something else than plain JSON
├── BodyTooLarge           413  the body is above the payload limit
├── BodyTooSlow            408  the body does not come
├── Unauthorized           401  the API key is missing or wrong
├── Overloaded             429  not now
├── NotReady               503  the group is loading or restarting, or we are shutting down
│   └── Loading            503  the same in the hosted API's words, to clients that do not want to wait
├── GenerationFailed       424  this request failed on the shards
├── BadBatch               422  a call of several prompts that cannot be taken apart
└── IncompleteBatch        500  a call of several prompts failed in one of them
GroupLost                       the engine's own: a group's epoch is over and its sequences are replayed
StartupError                    the process cannot start; one line says why
"""

from __future__ import annotations


class RouterError(Exception):
    """A failure a client is told about: `status` is HTTP's, `error_type` the contract's name for it, if it has one."""

    status = 500
    error_type: str | None = "internal"


class ValidationError(RouterError):
    """`Input validation error: ` + the rule that was broken, with the limit and the value given."""

    status = 422
    error_type = "validation"

    def __init__(self, rule: str) -> None:
        super().__init__(f"Input validation error: {rule}")


class TemplateError(RouterError):
    """The chat template is missing, refuses the conversation, or runs too long."""

    status = 422
    error_type = "template_error"

    def __init__(self, cause: str) -> None:
        super().__init__(f"Template error: {cause}")


class ToolError(RouterError):
    """A function that is not there, or whose parameters cannot be enforced."""

    status = 422
    error_type = "tool_error"

    def __init__(self, cause: str) -> None:
        super().__init__(f"Tool error: {cause}")


class UnknownModel(RouterError):
    status = 404
    error_type = None

    def __init__(self, name: str) -> None:
        super().__init__(f"Model {name} does not exist")


class BadBody(RouterError):
    """400 when the bytes are not JSON, 422 when the JSON is not what the route takes; both in serde's words."""

    error_type = None

    def __init__(self, status: int, problem: str) -> None:
        failed = "parse the request body as JSON" if status == 400 else "deserialize the JSON body into the target type"
        super().__init__(f"Failed to {failed}: {problem}")
        self.status = status


class UnsupportedMedia(RouterError):
    status = 415
    error_type = None


class BodyTooLarge(RouterError):
    status = 413
    error_type = None

    def __init__(self) -> None:
        super().__init__("Failed to buffer the request body: length limit exceeded")


class BodyTooSlow(RouterError):
    status = 408
    error_type = None

    def __init__(self) -> None:
        super().__init__("The request body did not come in time")


class Unauthorized(RouterError):
    status = 401
    error_type = None

    def __init__(self) -> None:
        super().__init__("Unauthorized: the API key is missing or wrong")


class Overloaded(RouterError):
    """No room. `retry_after_s` comes from the measured drain rate."""

    status = 429
    error_type = "overloaded"

    def __init__(self, retry_after_s: int = 1) -> None:
        super().__init__("Model is overloaded")
        self.retry_after_s = retry_after_s


class NotReady(RouterError):
    status = 503
    error_type: str | None = "healthcheck"


class Loading(NotReady):
    error_type = None

    def __init__(self, name: str, estimated_time_s: float) -> None:
        super().__init__(f"Model {name} is currently loading")
        self.estimated_time_s = estimated_time_s


class GenerationFailed(RouterError):
    status = 424
    error_type = "generation"

    def __init__(self, cause: str) -> None:
        super().__init__(f"Request failed during generation: {cause}")


class BadBatch(RouterError):
    """What /vertex and KServe's protocol say of a malformed call; each mistake has its own `error_type`."""

    status = 422

    def __init__(self, problem: str, error_type: str) -> None:
        super().__init__(problem)
        self.error_type = error_type


class IncompleteBatch(RouterError):
    """/vertex and KServe's protocol do not say which prompt failed or why."""

    status = 500
    error_type = "Incomplete generation"

    def __init__(self) -> None:
        super().__init__("Incomplete generation")


class GroupLost(Exception):
    """A group's epoch ended: a lost stream, a missed deadline, a fault, or an answer that makes no sense."""


class StartupError(Exception):
    """Why the process cannot start, in one line."""
