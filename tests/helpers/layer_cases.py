"""Small models, one for each kind of layer, as losses of one number an example."""

import jax
import jax.numpy as jnp
import numpy as np

BATCH, TOKENS, VOCABULARY, WIDTH, HIDDEN = 16, 6, 11, 8, 24
LAYERS = (
    "linear",
    "transformer",
    "tied",
    "lora",
    "convolution",
    "scan",
    "checkpoint",
    "scan of checkpoint",
    "recurrent",
    "unused",
    "positions",
    "part of a table",
)


def params_for(name: str) -> dict:
    rng = np.random.default_rng(7)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    bias = {"bias": normal(WIDTH)}
    if name in ("linear", "recurrent"):
        return bias | {"kernel": normal(WIDTH, WIDTH)}
    if name == "unused":
        return bias | {"kernel": normal(WIDTH, WIDTH), "nobody": normal(3)}
    if name == "positions":  # of a table of 17, those of the tokens are used
        return {"kernel": normal(WIDTH, WIDTH), "places": normal(17, WIDTH)}
    if name == "part of a table":
        return {"kernel": normal(WIDTH, WIDTH), "table": normal(VOCABULARY + 4, WIDTH)}
    if name == "lora":
        return {"down": normal(WIDTH, 2), "up": normal(2, WIDTH)}
    if name == "convolution":
        return {"bias": normal(5), "kernel": normal(5, 1, 3, 3)}
    if name in ("scan", "checkpoint", "scan of checkpoint"):
        return {"bias": normal(3, WIDTH), "kernel": normal(3, WIDTH, WIDTH), "out": normal(WIDTH)}
    params = bias | {
        "embedding": normal(VOCABULARY, WIDTH) * 3,
        "query": normal(WIDTH, 2, WIDTH // 2),
        "output": normal(2, WIDTH // 2, WIDTH),
        "scale": 1.0 + normal(WIDTH),
        "up": normal(WIDTH, HIDDEN * 2),
        "down": normal(HIDDEN * 2, WIDTH),
    }
    return params if name == "tied" else params | {"head": normal(WIDTH, VOCABULARY)}


def batch_for(name: str) -> dict:
    rng = np.random.default_rng(3)
    if name in ("transformer", "tied", "part of a table"):
        return {"tokens": rng.integers(0, VOCABULARY, (BATCH, TOKENS))}
    if name == "convolution":
        return {"x": rng.standard_normal((BATCH, 1, 9, 9)).astype(np.float32)}
    return {"x": rng.standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32)}


def loss_for(name: str, dtype):
    """(params, batch) -> losses (B,), computed in `dtype`."""

    def loss(params, batch):
        params = jax.tree.map(lambda p: p.astype(dtype), params)
        if name in ("transformer", "tied"):
            return _language_model(params, batch["tokens"], dtype)
        given = batch["tokens"] if "tokens" in batch else batch["x"].astype(dtype)
        out = _FORWARD[name](params, given)
        wide = out.astype(jnp.promote_types(dtype, jnp.float32))
        return jnp.sum(wide**2, axis=tuple(range(1, wide.ndim)))

    return loss


def _language_model(params, tokens, dtype):
    wide = jnp.promote_types(dtype, jnp.float32)

    def norm(x):
        x = x.astype(wide)
        return (x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)).astype(dtype)

    x = params["embedding"][tokens]
    q = jnp.einsum("btd,dhk->bthk", norm(x) * params["scale"], params["query"])
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, q).astype(wide)).astype(dtype)
    mixed = jnp.einsum("bhts,bshk->bthk", weights, q)
    x = x + jnp.einsum("bthk,hkd->btd", mixed, params["output"]) + params["bias"]
    x = x + jax.nn.gelu(norm(x) @ params["up"]) @ params["down"]
    logits = norm(x) @ (params["head"] if "head" in params else params["embedding"].T)
    logs = jax.nn.log_softmax(logits.astype(wide)[:, :-1])
    return -jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1).mean(axis=(1, 2))


def _linear(params, x):
    return jnp.tanh(x @ params["kernel"] + params["bias"])


def _lora(params, x):
    return jnp.sin(x + 0.5 * (x @ params["down"]) @ params["up"])


def _convolution(params, x):
    y = jax.lax.conv_general_dilated(x, params["kernel"], (3, 3), "VALID")
    return jnp.tanh(y + params["bias"][:, None, None])


def _layer(x, kernel, bias):
    return jnp.tanh(x @ kernel + bias)


def _scan(params, x, *, layer=_layer):
    def body(x, weights):
        return layer(x, *weights), None

    x, _ = jax.lax.scan(body, x, (params["kernel"], params["bias"]))
    return x * params["out"]


def _checkpoint(params, x):
    for kernel, bias in zip(params["kernel"], params["bias"], strict=True):
        x = jax.checkpoint(_layer)(x, kernel, bias)
    return x * params["out"]


def _recurrent(params, x):
    def body(state, token):
        return _layer(state + token, params["kernel"], params["bias"]), None

    return jax.lax.scan(body, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1))[0]


_FORWARD = {
    "linear": _linear,
    "unused": _linear,
    "lora": _lora,
    "convolution": _convolution,
    "scan": _scan,
    "checkpoint": _checkpoint,
    "scan of checkpoint": lambda params, x: _scan(params, x, layer=jax.checkpoint(_layer)),
    "recurrent": _recurrent,
    "part of a table": lambda params, tokens: (
        jnp.tanh(params["table"][2 : 2 + VOCABULARY][tokens]) @ params["kernel"]
    ),
    "positions": lambda params, x: (x + params["places"][3 : 3 + TOKENS]) @ params["kernel"],
}
