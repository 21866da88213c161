"""One adapter with which the attention layers of Flax, NNX and Linen alike, run 8-bit attention.

NNX passes all of its keywords to `attention_fn`, Linen those that it finds among the parameters'
*names* (a function with `**kwargs` alone would silently lose the mask). So every keyword of both is
a named parameter here, and one that cannot be honoured raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sage_jax import support
from sage_jax.flax._batch import attend_folded, layer_recipe
from sage_jax.recipe import Recipe
from sage_jax.sparge import Selection, check_selection


def attention_fn(
    recipe: str | Recipe | None = None,
    implementation: str | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    causal_alignment: str = "top_left",
    deterministic_gradients: bool = False,
    sparge: Selection | None = None,
) -> Callable[..., jax.Array]:
    """An `attention_fn` for `nnx.MultiHeadAttention` and `nn.MultiHeadDotProductAttention`.

    Equal arguments of the same types give the same function object, so that layers made alike share
    compiled code.

    Args:
      recipe, implementation, scale, local_window_size, causal_alignment: as in
        `sage_jax.dot_product_attention`. recipe="exact" is float32 attention in plain JAX, O(T·S)
        memory, for the layers of `sage_jax.load_recipes` that bear no other.
      is_causal: causal attention in every call, without a mask; Linen cannot ask for it by call.
        Not for a layer in decode mode, whose one query is not the first.
      deterministic_gradients: `deterministic` of `sage_jax.dot_product_attention`; renamed because
        Flax means dropout by that word.
      sparge: block-sparse attention: which tiles are computed, as `sage_jax.sparge.Selection` says
        of the queries and keys of each call. Not in a call with a `mask`, nor in decode mode.

    Returns:
      A function of query [..., T, N, H], key and value [..., S, K, H] and the keywords of Flax,
      which gives [..., T, N, H].

    Raises:
      ValueError: the recipe, the implementation or the alignment is unknown.
      TypeError: an argument is an array, which could not be compared with those of other layers.
    """
    if isinstance(local_window_size, list):
        local_window_size = tuple(local_window_size)
    settings = {
        "implementation": implementation,
        "scale": scale,
        "is_causal": is_causal,
        "local_window_size": local_window_size,
        "causal_alignment": causal_alignment,
        "deterministic_gradients": deterministic_gradients,
        "sparge": sparge,
    }
    check_selection(sparge)
    for name, value in settings.items():
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"{name} should be a plain Python value, but attention_fn got {value!r}; arrays can "
                "be given to sage_jax.dot_product_attention."
            ) from None
    support.check_names(implementation, causal_alignment=causal_alignment)
    return _adapter(layer_recipe(recipe), **settings)


@functools.lru_cache(maxsize=None, typed=True)  # 1 and True are equal, but not both right
def _adapter(
    recipe,
    *,
    implementation,
    scale,
    is_causal,
    local_window_size,
    causal_alignment,
    deterministic_gradients,
    sparge,
):
    always_causal = is_causal

    def attention(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype=None,
        precision=None,
        module=None,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Callable | None = None,
        attn_weights_value_einsum: Callable | None = None,
        is_causal: bool = False,
        input_positions: jax.Array | None = None,
    ) -> jax.Array:
        """8-bit attention with the keywords of Flax.

        Args:
          query: [..., T, N, H]. key, value: [..., S, K, H]; N a multiple of K.
          bias: broadcastable to [..., N, T, S], added to the scaled logits.
          mask: broadcastable to [..., N, T, S], bool or a number: attend where it is not zero.
          dropout_rate, deterministic: dropout of probabilities has to be inactive.
          dtype: type of the computation's inputs and output; None: the common type of q, k, v.
          is_causal: query i sees the keys up to i.
          broadcast_dropout, dropout_rng, precision, force_fp32_for_softmax: nothing depends on
            them: there is no dropout, the softmax is always float32, and the products are 8-bit
            ones (the layer's own projections do follow its `precision`).
          module, qk_attn_weights_einsum, attn_weights_value_einsum, input_positions: must be None.

        Returns:
          [..., T, N, H].

        Raises:
          ValueError: a keyword asks for what 8-bit attention does not have.
        """
        if dropout_rate > 0 and not deterministic:
            raise ValueError(
                f"dropout_rate={dropout_rate} drops attention probabilities, which 8-bit attention "
                "never holds; use dropout_rate=0 and drop the layer's output instead, as "
                "sage_jax.flax.nnx.SageAttention(dropout_rate=...) and its linen twin do."
            )
        if module is not None:
            raise ValueError(
                "sow_weights=True asks for the attention probabilities, which 8-bit attention "
                "never holds; use sow_weights=False, or look at them with Flax's own attention_fn."
            )
        if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
            raise ValueError(
                "qk_attn_weights_einsum and attn_weights_value_einsum replace products that are "
                "inside the 8-bit kernel; leave both unset and choose their formats with recipe=."
            )
        if input_positions is not None:
            raise ValueError(
                "input_positions is not used by attention_fn, which does not rotate q and k; use "
                "sage_jax.flax.nnx.SageAttention(rope_theta=...), or leave it unset."
            )
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        return attend_folded(
            query.astype(dtype),
            key.astype(dtype),
            value.astype(dtype),
            bias=bias,
            mask=None if mask is None else mask.astype(jnp.bool_),
            scale=scale,
            is_causal=is_causal or always_causal,
            local_window_size=local_window_size,
            causal_alignment=causal_alignment,
            implementation=implementation,
            recipe=recipe,
            deterministic=deterministic_gradients,
            sparge=sparge,
        )

    return attention
