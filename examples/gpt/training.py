"""Trains one set of initial parameters on one sequence of batches under a given attention."""

import dataclasses
import sys
import time

import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from gpt import checkpoint, text
from gpt.model import GPT, Attend

_BAR = "{desc:>8} |{bar:24}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}"
_EVALUATIONS = 5  # held-out losses along a run, besides the one before the first step
_HELD_OUT_BATCHES = 8
_WARM_UP = 2  # steps left out of tokens/s: the first ones still fill caches and thread pools


@dataclasses.dataclass
class Run:
    """What one training run leaves behind."""

    name: str
    train_loss: list[float]  # one a step, nats per byte
    held_out_loss: list[tuple[int, float]]  # (steps done, nats per byte)
    tokens_per_second: float
    memory: int | None  # bytes the compiled gradient step needs, parameters included
    first_gradients: dict[str, np.ndarray]  # of the first batch, by parameter name
    parameters: nnx.State

    @property
    def final_train_loss(self) -> float:
        """Mean over the last tenth of the steps: a single batch is too noisy to compare."""
        return float(np.mean(self.train_loss[-max(1, len(self.train_loss) // 10) :]))

    @property
    def final_held_out_loss(self) -> float:
        return self.held_out_loss[-1][1]

    def gradient_errors(self, exact: "Run") -> dict[str, float]:
        """Relative L2 distance to the gradients of `exact`, tensor by tensor."""
        return {
            name: float(
                np.linalg.norm(self.first_gradients[name] - reference) / np.linalg.norm(reference)
            )
            for name, reference in exact.first_gradients.items()
        }


def train(
    name: str,
    attend: Attend,
    model: GPT,
    corpus: text.Corpus,
    *,
    steps: int,
    batch: int,
    context: int,
    learning_rate: float,
    seed: int,
    rounding: int | None = None,
) -> Run:
    """Runs `steps` steps of AdamW from the parameters of `model`, which stays unchanged.

    With `rounding`, the seed of a draw, every parameter starts off by up to 2^-9 of itself, as much
    as a rounding to bfloat16 takes away.
    """
    graph, start = nnx.split(model)
    if rounding is not None:
        start = _rounded_otherwise(start, rounding)
    # Between the steps there is a plain list of arrays: to take an nnx.State apart for every call
    # costs milliseconds of Python.
    parameters, tree = jax.tree.flatten(start)
    optimizer = _optimizer(steps, learning_rate)
    loss_of_state = loss_function(graph, attend)

    def loss_of(leaves, tokens):
        return loss_of_state(tree.unflatten(leaves), tokens)

    def update(parameters, state, gradients):
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    batches = text.batches(corpus.train, batch=batch, context=context, seed=seed)
    held_out = text.batches(corpus.held_out, batch=batch, context=context, seed=seed)
    held_out = [next(held_out) for _ in range(_HELD_OUT_BATCHES)]
    update = jax.jit(update, donate_argnums=(1, 2))  # parameters of step 0 belong to the caller
    loss_of_jit = jax.jit(loss_of)
    tokens = next(batches)
    print(f"{name:>8}: compiling", end="\r", file=sys.stderr, flush=True)
    step = jax.jit(jax.value_and_grad(loss_of)).lower(parameters, tokens).compile()
    state = jax.jit(optimizer.init)(parameters)

    def evaluate() -> float:
        return float(np.mean([loss_of_jit(parameters, tokens) for tokens in held_out]))

    losses, curve, first = [], [(0, evaluate())], None
    marks = {round(steps * i / _EVALUATIONS) for i in range(1, _EVALUATIONS + 1)}
    clock = _Clock(batch * context)
    with _progress(name, steps) as bar:
        for done in range(1, steps + 1):
            clock.start()
            loss, gradients = step(parameters, tokens)
            if first is None:
                first = checkpoint.by_name(tree.unflatten(gradients))
            parameters, state = update(parameters, state, gradients)
            tokens = next(batches)
            losses.append(float(loss))
            jax.block_until_ready(parameters)
            clock.stop(counts=done > min(_WARM_UP, steps - 1))
            rate = f", {clock.rate:,.0f} tokens/s" if clock.rate else ""
            bar.set_postfix_str(f"loss {losses[-1]:.3f}{rate}", refresh=False)
            bar.update()
            if done in marks:
                curve.append((done, evaluate()))
    return Run(name, losses, curve, clock.rate, _memory(step), first, tree.unflatten(parameters))


@jax.jit
def _rounded_otherwise(parameters: nnx.State, seed: int) -> nnx.State:
    leaves, tree = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten(
        x * (1 + 2**-9 * jax.random.uniform(key, x.shape, x.dtype, -1, 1))
        for key, x in zip(keys, leaves, strict=True)
    )


def loss_function(graph: nnx.GraphDef, attend: Attend):
    """A function (parameters, tokens int32 [B,T+1]) -> mean cross entropy, nats per byte."""

    def loss_of(parameters, tokens):
        module = nnx.merge(graph, parameters)
        logits = module(tokens[:, :-1], [attend] * len(module.blocks))
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss_of


class _Clock:
    """Tokens per second over the steps that count."""

    def __init__(self, tokens: int):
        self._tokens, self._seconds, self._steps, self._started = tokens, 0.0, 0, 0.0

    def start(self):
        self._started = time.perf_counter()

    def stop(self, *, counts: bool):
        if counts:
            self._seconds += time.perf_counter() - self._started
            self._steps += 1

    @property
    def rate(self) -> float:
        return self._tokens * self._steps / self._seconds if self._steps else 0.0


def _optimizer(steps: int, learning_rate: float) -> optax.GradientTransformation:
    low, warm_up = 0.1 * learning_rate, max(1, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        low, learning_rate, warm_up, max(steps, warm_up + 1), low
    )
    matrices_only = lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
    decay = optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=matrices_only)
    return optax.chain(optax.clip_by_global_norm(1.0), decay)


def _progress(name: str, steps: int) -> tqdm:
    # A log file has no carriage return: one line every few seconds is enough there.
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=steps, desc=name, bar_format=_BAR, mininterval=interval, maxinterval=interval)


def _memory(step) -> int | None:
    """Bytes of arguments, results and temporaries of a compiled step, as XLA planned them."""
    plan = step.memory_analysis()
    if plan is None:
        return None
    sizes = (plan.argument_size_in_bytes, plan.output_size_in_bytes, plan.temp_size_in_bytes)
    return sum(sizes) - plan.alias_size_in_bytes
