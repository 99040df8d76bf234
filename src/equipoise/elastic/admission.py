"""What a service can be asked for: checked before anything is begun."""

from __future__ import annotations

from equipoise.elastic.service import ModelFacts, ServiceRequest
from equipoise.elastic.spec import ServiceSpec
from equipoise.errors import ConfigError
from equipoise.models.families import check_weights, read_config, read_model_shape
from equipoise.policy import find_policy
from equipoise.topology import choose_num_redundant


def find_facts(spec: ServiceSpec) -> ModelFacts:
    """What clients of a service must know of its model.

    Collective: none.
    Raises: ConfigError, ModelError or PlacementError if it cannot be served.
    """
    shape = read_model_shape(spec.model)
    check_weights(spec.model)
    config = read_config(spec.model)
    config = config.get("text_config", config)
    longest = config.get("max_position_embeddings")
    if longest is not None and spec.max_len > longest:
        raise ConfigError(f"max_len of {spec.max_len}: the model takes {longest} tokens at most")
    requested = spec.config.num_redundant_experts
    choose_num_redundant(
        shape.num_experts, spec.num_ranks, None if requested == "auto" else requested
    )
    find_policy(spec.config.policy)
    return ModelFacts(
        name=spec.model.name,
        directory=spec.model,
        max_len=spec.max_len,
        vocabulary_size=int(config["vocab_size"]),
        max_batch_size=spec.max_batch_size,
    )


def check_request(request: ServiceRequest, facts: ModelFacts) -> None:
    """Refuse a request that cannot be served.

    Collective: none.
    Raises: ConfigError.
    """
    if not request.tokens:
        raise ConfigError(f"request {request.id!r} is empty: it needs at least one token")
    if len(request.tokens) + request.sampling.max_new_tokens > facts.max_len:
        raise ConfigError(
            f"request {request.id!r} has {len(request.tokens)} tokens and asks for "
            f"{request.sampling.max_new_tokens} more: {facts.max_len} are served"
        )
    wrong = [t for t in request.tokens if not 0 <= t < facts.vocabulary_size]
    if wrong:
        raise ConfigError(
            f"request {request.id!r} has token {wrong[0]}: tokens are 0 to "
            f"{facts.vocabulary_size - 1}"
        )
