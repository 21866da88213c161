"""How tests compare tensors: relative L2, cosine, and the first coordinate at which two arrays differ."""

import numpy as np

from sage_jax.quantization import QuantizedKV


def _f64(x):
    return np.asarray(x).astype(np.float64).ravel()


def relative_l2(x, reference) -> float:
    """‖x − reference‖ / ‖reference‖ in float64; NaN if either holds one, so that a comparison with a bound fails."""
    x, reference = _f64(x), _f64(reference)
    return float(np.linalg.norm(x - reference) / max(np.linalg.norm(reference), 1e-300))


def cosine(x, reference) -> float:
    """Cosine of the angle between the flattened arrays, in float64."""
    x, reference = _f64(x), _f64(reference)
    return float(x @ reference / max(np.linalg.norm(x) * np.linalg.norm(reference), 1e-300))


def assert_same_bits(actual, expected, name=""):
    """Fails with the first differing coordinate and both values unless the arrays agree in every bit."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype}, not {expected.dtype}"
    raw = np.uint8 if actual.dtype.itemsize == 1 else np.dtype(f"u{actual.dtype.itemsize}")
    both_nan = np.isnan(actual.astype(np.float32)) & np.isnan(expected.astype(np.float32))
    different = (actual.view(raw) != expected.view(raw)) & ~both_nan
    if different.any():
        where = tuple(int(i) for i in np.argwhere(different)[0])
        raise AssertionError(
            f"{name}: {different.sum()} of {actual.size} entries differ, first at {where}: "
            f"{actual[where]!r}, not {expected[where]!r}"
        )


def assert_same_keys_and_values(actual, expected):
    """Fails unless two QuantizedKV agree in every bit, but for `v_norm` of a V in bf16, whose squares are added up in any order."""
    for name, a, e in zip(QuantizedKV._fields, actual, expected, strict=True):
        assert (a is None) == (e is None), name
        if a is not None and name == "v_norm" and expected.v_dp.dtype.itemsize == 2:
            np.testing.assert_allclose(a, e, rtol=1e-6, err_msg=name)
        elif a is not None:
            assert_same_bits(a, e, name)
