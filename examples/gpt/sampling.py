"""Text from a trained model, one byte at a time over a KV cache that holds 8-bit codes."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt.model import GPT
from sage_jax import decode

_TEMPERATURE = 0.7


def generate(model: GPT, parameters: nnx.State, prompt: bytes, length: int, seed: int) -> bytes:
    """The prompt and `length` bytes sampled after it; together they should fit the context."""
    graph = nnx.graphdef(model)
    shape = model.shape
    room = len(prompt) + length
    caches = [decode.init_cache(1, room, shape.heads, shape.head_dim) for _ in model.blocks]

    def next_logits(parameters, caches, tokens, start):
        module, caches = nnx.merge(graph, parameters), list(caches)

        def over_cache(layer):
            def attend(query, key, value):
                caches[layer] = decode.append(caches[layer], key, value)
                return decode.attend(caches[layer], query)

            return attend

        logits = module(tokens, [over_cache(i) for i in range(shape.layers)], start)
        return caches, logits[:, -1]

    @jax.jit
    def continuation(parameters, caches, prompt, key):
        caches, logits = next_logits(parameters, caches, prompt, 0)

        def one_byte(carry, step):
            caches, logits = carry
            token = jax.random.categorical(jax.random.fold_in(key, step), logits / _TEMPERATURE)
            start = prompt.shape[1] + step
            return next_logits(parameters, caches, token[:, None], start), token[0]

        return jax.lax.scan(one_byte, (caches, logits), jnp.arange(length))[1]

    tokens = jnp.frombuffer(prompt, dtype=jnp.uint8).astype(jnp.int32)[None]
    drawn = continuation(parameters, caches, tokens, jax.random.key(seed))
    return prompt + np.asarray(drawn, np.uint8).tobytes()
