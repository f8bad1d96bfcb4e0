"""Which layers route: the three fields of `ModelConfig` and what the families' config.json says in their place.

`ModelConfig.routes` goes by first_k_dense_replace, expert_layer_period and expert_layer_offset; Ernie4_5_Moe by start,
end and interval; Qwen2Moe by a step and a list of dense layers.
"""

from typing import Any

from moe_lm.config import ConfigError, ModelConfig, require

PLACING = ("first_k_dense_replace", "expert_layer_period", "expert_layer_offset")


def interval_of(layers: tuple[int, ...], count: int) -> int | None:
    """The interval with which Ernie4_5_Moe places exactly `layers` of `count`; None where none does.

    It routes in layer i from its start to its end where i + 1 is a multiple of the interval.
    """
    if not layers:
        return None
    span = range(layers[0], layers[-1] + 1)
    return next((step for step in range(1, count + 1) if tuple(i for i in span if (i + 1) % step == 0) == layers), None)


def write_ernie_layers(config: ModelConfig) -> dict[str, Any]:
    """The keys of Ernie4_5_Moe that place the layers of `config`, which `interval_of` has an answer for."""
    layers = config.routing_layers
    return {
        "moe_layer_start_index": layers[0],
        "moe_layer_end_index": layers[-1],
        "moe_layer_interval": interval_of(layers, config.num_hidden_layers),
    }


def write_qwen2_layers(config: ModelConfig) -> dict[str, Any]:
    """The keys of Qwen2Moe that place the layers of `config`."""
    dense = [layer for layer in range(config.num_hidden_layers) if not config.routes(layer)]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def ernie_layers(settings: dict[str, Any]) -> tuple[int, ...]:
    """The routing layers of an Ernie4_5_Moe config.json. Raises ConfigError for keys that place none."""
    count = whole(settings, "num_hidden_layers", 1)
    start, end, step = (
        whole(settings, f"moe_layer_{name}", least)
        for name, least in (("start_index", 0), ("end_index", -1), ("interval", 1))
    )
    end = count - 1 if end == -1 else end
    return tuple(i for i in range(count) if start <= i <= end and (i + 1) % step == 0)


def qwen2_layers(settings: dict[str, Any]) -> tuple[int, ...]:
    """The routing layers of a Qwen2Moe config.json. Raises ConfigError for keys that place none."""
    count, step = whole(settings, "num_hidden_layers", 1), whole(settings, "decoder_sparse_step", 1)
    dense = settings["mlp_only_layers"] or []
    require(
        isinstance(dense, list) and all(type(layer) is int for layer in dense),
        f"mlp_only_layers = {dense!r} must be a list of layers.",
    )
    return tuple(i for i in range(count) if i not in dense and (i + 1) % step == 0)


def read_layers(settings: dict[str, Any], layers: tuple[int, ...]) -> dict[str, int]:
    """The three fields that place exactly `layers`: those of the file if it has them, else with the smallest period.

    Raises ConfigError where the file's own place other layers than `layers`, and where no three place these.
    """
    count = settings["num_hidden_layers"]
    require(bool(layers), f"no layer of {count} routes: moe-lm opens such a model under its dense architecture only.")
    if any(name in settings for name in PLACING):
        first, period, offset = values = tuple(
            whole(settings, name, least, default)
            for name, least, default in zip(PLACING, (0, 1, 0), (0, 1, 0), strict=True)
        )
        own = tuple(i for i in range(first, count) if i % period == offset)
        require(
            own == layers,
            f"{', '.join(PLACING)} = {values} let layers {own} route, and the family's own keys {layers}: correct one.",
        )
        return dict(zip(PLACING, values, strict=True))
    for period in range(1, count + 1):
        offset = layers[0] % period
        placed = tuple(range(offset, count, period))
        if placed[placed.index(layers[0]) :] == layers:
            return dict(zip(PLACING, (0 if placed == layers else layers[0], period, offset), strict=True))
    raise ConfigError(f"layers {layers} of {count} route, and moe-lm's do so every so many layers from a first one on.")


def whole(settings: dict[str, Any], name: str, least: int, default: int | None = None) -> int:
    value = settings.get(name, default)
    require(type(value) is int and value >= least, f"{name} = {value!r} must be a whole number of at least {least}.")
    return value
