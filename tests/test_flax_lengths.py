"""Lengths and segment ids of the layers in plain lists, under any number of batch axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import nnx
from test_flax_nnx import F, normal, sage_layer


@pytest.mark.parametrize("recipe", [None, "exact"])
@pytest.mark.parametrize("batch", [(2,), (2, 3)], ids=str)
def test_lengths_and_segment_ids_may_be_lists(batch, recipe):
    x, layer = normal(0, *batch, 5, F), sage_layer(recipe=recipe, rope_theta=1e4)
    lengths = np.arange(1, 1 + np.prod(batch)).reshape(batch) % 5 + 1
    ids = np.broadcast_to(np.arange(5) // 3, (*batch, 5))
    names = ("query_seq_lengths", "key_value_seq_lengths", "query_segment_ids", "key_value_segment_ids")
    extents = dict(zip(names, (lengths, lengths, ids, ids), strict=True))
    extents["input_positions"] = np.arange(5)[::-1]
    lists = {name: extent.tolist() for name, extent in extents.items()}
    out = layer(x, **jax.tree.map(jnp.asarray, extents))
    np.testing.assert_array_equal(layer(x, **lists), out)
    traced = nnx.jit(lambda layer, x, lists: layer(x, **lists))(layer, x, lists)
    np.testing.assert_allclose(traced, out, atol=1e-5)
    for index in np.ndindex(*batch):  # each row has its own
        row = {name: extent[index][None] for name, extent in extents.items() if name in names}
        alone = layer(x[index][None], **row, input_positions=extents["input_positions"])[0]
        np.testing.assert_allclose(out[index], alone, atol=1e-5)


def test_cached_lengths_may_be_lists():
    x, layer = normal(0, 2, 3, 4, F), sage_layer(rope_theta=1e4, decode=True)
    lengths, outs = [[1, 2, 3], [4, 3, 2]], []
    for extents in (lengths, jnp.array(lengths)):
        layer.init_cache((2, 3, 4, F), ragged=True)
        outs.append(layer(x, key_value_seq_lengths=extents, input_positions=[3, 2, 1, 0]))
        np.testing.assert_array_equal(layer.cache_index[...], np.ravel(lengths))
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize(
    "lengths,given",
    [([[1, 2]] * 3, r"shape \[3, 2\]"), ([1] * 6, r"shape \[6\]"), ([[1], [2, 3]], "list"), (3, r"shape \[\]")],
)
def test_lengths_of_other_batch_axes_are_refused(lengths, given):
    message = rf"query_seq_lengths should have the batch axes of query, \[2, 3\], but got {given}\."
    with pytest.raises(ValueError, match=message):
        sage_layer()(normal(0, 2, 3, 4, F), query_seq_lengths=lengths)
