"""The requests of the page: JSON objects with checked types and ranges."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saetrain.errors import SaetrainError

MAX_SCALE = 1e6
Position = Annotated[int, Field(ge=0, lt=1 << 31)]


class PromptRequest(BaseModel):
    """A text for the model and the SAE ``sae``; ``masked``: position of a token that is replaced by the mask token."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
    text: str
    sae: str
    masked: Position | None = None


class ChangeRequest(PromptRequest):
    """A change of a latent: its activations are multiplied by ``scale``, which is 0 to ablate it.

    ``only``: the only position where the latent is changed, or None for all tokens that the token policy keeps.
    ``position``: where the model's prediction is compared.
    """

    latent: Position
    scale: Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE)]
    only: Position | None = None
    position: Position | None = None


def parse_request(content: bytes, schema: type[PromptRequest]) -> PromptRequest:
    """Return the request in ``content``; SaetrainError that names the first wrong key."""
    try:
        return schema.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise SaetrainError(": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))) from error
