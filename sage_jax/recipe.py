"""Recipes: one small frozen value decides all numerics of an attention call.

A recipe names, for the forward and the backward pass, the number format and the scale granularity of every matrix
product. The specification, the CPU handler and the CUDA kernels read the same recipe and mean the same numbers;
`docs/abi.md` states them exactly, `docs/numerics.md` what they cost in accuracy.
"""

from __future__ import annotations

import dataclasses

PV_CODES = {"e4m3": 0, "f16": 1, "bf16": 2, "int8": 3}
DP_CODES = {None: 0, "int8": 1, "bf16": 2}
BACKWARD_CODES = {"train8": 0, "sagebwd": 1}
FP4_FORMATS = ("nvfp4", "mxfp4", "amxfp4")  # docs/nvfp4.md; the last two for accuracy reports
PUBLISHED = dict(smooth_q=True, smooth_k=True, smooth_v=False, four_or_six=False)  # by SageAttention3's paper
MAX_HEAD_DIM = 256
EXACT = "exact"  # in place of a recipe, in Flax layers and in files of recipes: float32 attention


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The numerics of one attention call. Frozen and hashable: usable as a static argument of `jit`.

    Attributes:
      name: for printing and for error messages.
      q_block: query tokens that share one INT8 scale: 1 (per token), 64 or 128. Keys always share one per 64 tokens.
      pv: format of the product P·V: "e4m3" (FP8, V scaled per channel), "f16", "bf16", "int8" (P per token and tile of
        64 keys, V per 64 tokens: SageBwd, arXiv 2505.11594, section 4), or that of `qk` where it is an FP4 format.
      pv_accumulator: "f32", or "f16": e4m3 products collected in half precision over 64 keys (SageAttention2++,
        arXiv 2505.21136), with the range of V's codes, `v_range`, that every e4m3 recipe has: nothing overflows.
      smooth_k: subtract the mean of K over tokens before quantization (SageAttention, arXiv 2410.02367, section 4.2); except
        in FP4, from 1024 tokens on the mean of an eighth of them, spread out: any vector cancels in the softmax.
      smooth_v: subtract the mean of V over tokens, channel by channel, wherever V becomes 8 bits or fewer. In P·V with e4m3 the
        output gets it back (SageAttention2, arXiv 2411.10958, on the FP22 accumulator): the matrix unit's truncated sums and
        e4m3's rounding then err relative to V's deviations, not to V's mean. In train8's dO·Vᵀ, D loses it as well: dS is
        left with what tokens differ in, instead of a small difference of large products. On for pv="e4m3", for
        backward="train8" and for FP4 (as with e4m3) unless set to False or `published`.
      backward: gradient algorithm: None (inference only: differentiating raises), "train8" (all products in 8 bits with
        scales known before the loop) or "sagebwd" (arXiv 2505.11594, section 4: INT8 per 64×64 tile).
      dp: format of dO·Vᵀ in the backward pass: "int8" or "bf16" (the papers' 16-bit product).
      delta: row correction D of the softmax gradient: "output" (dO·O) or "exact" (recomputed from the backward pass's own
        probabilities: one more walk over the scores, 26 to 44% more time in the backward pass on Hopper, for gradients that
        err far less behind attention sinks and in models without QK-norm; docs/numerics.md).
      qk: format of the product Q·Kᵀ: "int8", or FP4 for both products: "nvfp4" (SageAttention3, arXiv 2505.11594, section 3),
        "mxfp4" or "amxfp4". A backward pass is then that of `eight_bit`.
      smooth_q: FP4 only: subtract each 128 queries' mean, and add its product with K to the scores (section 3.2 there).
      four_or_six: "nvfp4" only: scale blocks of Q, K and V to a maximum of 4 or 6, whichever errs less.
      published: FP4 only: the algorithm of the paper, without our additions (smooth_v, four_or_six).
    """

    name: str
    q_block: int = 1
    pv: str = "e4m3"
    pv_accumulator: str = "f32"
    smooth_k: bool = True
    smooth_v: bool | None = None
    backward: str | None = None
    dp: str = "int8"
    delta: str = "output"
    qk: str = "int8"
    smooth_q: bool = False
    four_or_six: bool = False
    published: bool = False

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"Recipe: name={self.name!r} should be a string that is not empty.")

        def check(field, allowed):
            value = getattr(self, field)
            if not any(type(value) is type(a) and value == a for a in allowed):
                names = ", ".join(repr(a) for a in allowed)
                raise ValueError(
                    f"Recipe {self.name!r}: {field}={value!r} is not supported; choose one of {names}."
                )

        check("q_block", (1, 64, 128))
        check("qk", ("int8", *FP4_FORMATS))
        check("pv", (*PV_CODES, *FP4_FORMATS))
        check("pv_accumulator", ("f32", "f16"))
        check("backward", (None, *BACKWARD_CODES))
        check("dp", ("int8", "bf16"))
        check("delta", ("output", "exact"))
        if self.smooth_v is None:
            object.__setattr__(self, "smooth_v", self._smooths_values)
        for switch in ("smooth_k", "smooth_v", "smooth_q", "four_or_six", "published"):
            check(switch, (True, False))
        self._check_fp4()
        if self.pv_accumulator == "f16" and self.pv != "e4m3":
            raise ValueError(
                f"Recipe {self.name!r}: pv_accumulator='f16' goes with pv='e4m3' only, but pv={self.pv!r}; "
                "use pv_accumulator='f32'."
            )
        if self.smooth_v and not self.fp4 and not self._smooths_values:
            raise ValueError(
                f"Recipe {self.name!r}: smooth_v=True goes with pv='e4m3' or backward='train8', but pv={self.pv!r} and "
                f"backward={self.backward!r}; use smooth_v=False."
            )
        if self.backward == "sagebwd" and (self.q_block == 1 or self.dp != "bf16"):
            raise ValueError(
                f"Recipe {self.name!r}: backward='sagebwd' needs q_block 64 or 128 (one INT8 scale a tile) and "
                f"dp='bf16', but q_block={self.q_block} and dp={self.dp!r}; change them or use backward='train8'."
            )

    def _check_fp4(self):
        """Raises ValueError for FP4 fields that do not go together."""
        if self.pv != self.qk and (self.fp4 or self.pv in FP4_FORMATS):
            raise ValueError(
                f"Recipe {self.name!r}: both products have one FP4 format or neither, but qk={self.qk!r} and "
                f"pv={self.pv!r}; change one of them."
            )
        for field in ("published", "smooth_q"):
            if getattr(self, field) and not self.fp4:
                raise ValueError(
                    f"Recipe {self.name!r}: {field}=True is for FP4 recipes, but qk={self.qk!r}; start from the preset "
                    "'sage3' or leave it out."
                )
        if self.four_or_six and self.qk != "nvfp4":
            raise ValueError(
                f"Recipe {self.name!r}: four_or_six=True goes with qk='nvfp4' only, but qk={self.qk!r}; leave it out."
            )
        for field, value in (dict(qk="nvfp4") | PUBLISHED).items() if self.published else ():
            if getattr(self, field) != value:
                raise ValueError(
                    f"Recipe {self.name!r}: published=True goes with {field}={value!r}, as in the paper, but {field}="
                    f"{getattr(self, field)!r}; drop one of the two."
                )

    def replace(self, **changes) -> Recipe:
        """A copy with some fields changed; the name gains the changes unless a new one is given. Where `smooth_v` is what
        it would be by default, it becomes the default of the changed recipe. published=True also sets the fields that
        the paper fixes.
        """
        unknown = set(changes) - {f.name for f in dataclasses.fields(self)}
        if unknown:
            fields = ", ".join(f.name for f in dataclasses.fields(self))
            raise ValueError(
                f"Recipe has no field {sorted(unknown)[0]!r}; the fields are {fields}."
            )
        if "name" not in changes and changes:
            suffix = ",".join(f"{k}={v}" for k, v in changes.items())
            changes["name"] = f"{self.name}[{suffix}]"
        if changes.get("published"):
            changes = PUBLISHED | changes
        elif self.smooth_v == self._smooths_values:
            changes.setdefault("smooth_v", None)
        return dataclasses.replace(self, **changes)

    @property
    def _smooths_values(self) -> bool:
        """The default of `smooth_v`: wherever V becomes 8 or 4 bits, but for what others have published."""
        if self.fp4:
            return not self.published
        return self.pv == "e4m3" or self.backward == "train8"

    @property
    def fp4(self) -> bool:
        """Whether the forward pass multiplies FP4 operands."""
        return self.qk in FP4_FORMATS

    @property
    def eight_bit(self) -> Recipe:
        """The recipe whose operations differentiate this one: itself, or for FP4 the 8-bit one with the same backward pass."""
        if not self.fp4:
            return self
        fields = ("name", "q_block", "smooth_k", "backward", "dp", "delta")
        given = {field: getattr(self, field) for field in fields}
        # "published" has no smoothing of V because the paper's FP4 has none: it says nothing about 8 bits.
        return Recipe(**given, smooth_v=None if self.published or self.smooth_v else False)

    @property
    def f16_accumulate(self) -> bool:
        return self.pv_accumulator == "f16"

    @property
    def v_range(self) -> float:
        """Largest |code| of an e4m3 V: so small that 16-bit sums of P·V stay finite.

        64 keys · 256 (P) · 3.5 is below 65504, and the kernel of sm_90 bounds the sums of a row by its probabilities
        (`docs/kernels/sm90_forward.md`). Codes below 2^-6 are multiples of 2^-9, 1/1792 of the largest value of a channel.
        """
        return 3.5

    @property
    def dp_format(self) -> str | None:
        """Format in which V is kept for the backward pass, None where there is none."""
        return self.dp if self.backward else None

    @property
    def pv_code(self) -> int:
        return PV_CODES[self.pv]

    @property
    def dp_code(self) -> int:
        return DP_CODES[self.dp_format]

    @property
    def backward_code(self) -> int:
        return BACKWARD_CODES[self.backward]


PRESETS: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("sage1", q_block=128, pv="f16"),
        Recipe("sage2"),
        Recipe("sage2pp", pv_accumulator="f16"),
        Recipe("sage3", qk="nvfp4", pv="nvfp4", smooth_q=True, four_or_six=True),
        Recipe("sagebwd", q_block=64, pv="int8", backward="sagebwd", dp="bf16"),
        Recipe("train8", backward="train8"),
    )
}
DEFAULT_INFERENCE = PRESETS["sage2"]
DEFAULT_TRAINING = PRESETS["train8"]


# The types of each field, from its annotation: (bool, NoneType) of "bool | None".
_TYPES = {"str": str, "int": int, "bool": bool, "None": type(None)}
FIELD_TYPES: dict[str, tuple[type, ...]] = {
    field.name: tuple(_TYPES[word] for word in field.type.split(" | ")) for field in dataclasses.fields(Recipe)
}


def resolve(recipe: str | Recipe | None) -> Recipe | None:
    """The recipe of that name, with changes of fields behind it if there are any: "train8:pv=bf16:delta=exact".
    Recipes and None pass through.

    Raises:
      ValueError: unknown name or field, or a value that is not supported. TypeError: neither a name nor a Recipe.
    """
    if recipe is None or isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(
            f"recipe should be a name, a sage_jax.Recipe or None, but got {type(recipe).__name__}."
        )
    name, *changes = recipe.split(":")
    if name not in PRESETS:
        raise ValueError(
            f"recipe={recipe!r} is unknown; choose one of {', '.join(PRESETS)} or build a sage_jax.Recipe."
        )
    if not changes:
        return PRESETS[name]
    fields = {}
    try:
        for field, value in map(_change, changes):
            if field in fields:
                raise ValueError(f"{field} is changed twice; write each change once.")
            fields[field] = value
    except ValueError as reason:
        raise ValueError(f"recipe={recipe!r}: {reason}") from reason
    return PRESETS[name].replace(**{"name": recipe} | fields)


def _change(text: str) -> tuple[str, object]:
    """The field and the value of a change as `resolve` takes it, "smooth_k=false"."""
    field, equals, value = text.partition("=")
    if not equals or not value:
        raise ValueError(f"{text!r} should be field=value, as in 'train8:delta=exact'.")
    if field not in FIELD_TYPES:
        raise ValueError(f"a recipe has no field {field!r}; the fields are {', '.join(FIELD_TYPES)}.")
    if "," in value and field != "name":
        raise ValueError(f"{text!r} holds a comma; changes are separated by ':', as in 'train8:pv=bf16:delta=exact'.")
    types, word = FIELD_TYPES[field], value.lower()
    if bool in types and word in ("true", "false"):
        return field, word == "true"
    if type(None) in types and word == "none":
        return field, None
    if int in types and value.isascii() and value.isdecimal():
        return field, int(value)
    if str in types:
        return field, value
    choices = ["true", "false"] * (bool in types) + ["none"] * (type(None) in types) + ["a number"] * (int in types)
    raise ValueError(f"{field} should be {' or '.join(choices)}, but is {value!r}.")


def padded_head_dim(head_dim: int) -> int:
    """The head dimension that quantized tensors are stored with: 64, 128 or 256."""
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head dimension {head_dim} is not supported; it must lie between 1 and {MAX_HEAD_DIM}: split the heads."
        )
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
