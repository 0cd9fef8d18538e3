"""What works with what: layer kind x variant x quantization x initialiser; a check of each cell.

``python tests/support_matrix.py --write`` writes the table that `render` makes into README.md,
between its two markers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import (
    SIMULATING,
    STORING,
    adapter_leaves,
    assert_close,
    key_of,
    loss_of,
    numbers,
    scattered,
)

import peft_jax as peft

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- support matrix: begin -->", "<!-- support matrix: end -->"
RANK, ALPHA, DROPOUT = 4, 6.0, 0.25
IN, OUT = 64, 32  # divisible by the blocks of every quantization method
START_TOLERANCE = 1e-4  # of the plain model's largest output
TOLERANCE = 5e-5  # of the largest output on fused weights; products are added in another order

# --- Layer kinds ---------------------------------------------------------------------------------


class Around(nn.Module):
    """A model of one layer."""

    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


class LookupAndAttend(nn.Module):
    layer: nn.Module

    def __call__(self, ids, query):
        return self.layer(ids), self.layer.attend(query)


class Gated(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(OUT, name="gate")(x)) * nn.Dense(OUT, name="up")(x)


class Experts(nn.Module):
    """A parameter that no layer holds."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (2, IN, OUT))
        return nn.tanh(jnp.einsum("bi,eio->beo", x, w))


class RegisteredExperts(nn.Module):
    """The same, of a type that `peft.register_layer` makes a layer."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (2, IN, OUT))
        return jnp.einsum("bei,eio->beo", x, w)


peft.register_layer(RegisteredExperts, param="w", equation="bei,eio->beo")


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.tanh(nn.Dense(OUT, name="layer")(x))
        return x + jnp.concatenate([y, -y], axis=-1), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        rngs = {"params": True, "dropout": True}
        lifted = nn.scan(Body, variable_axes={"params": 0}, split_rngs=rngs, length=2)
        return lifted(name="layers")(x, None)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    """A model with one kind of layer.

    Attributes:
      model: the plain model.
      inputs: its inputs, by batch size and seed.
      targets: fields of the `LoraConfig` that name what is adapted; None: `Gated` is, as a
        whole, by `LoRAWeight`.
      shifted: what a change of the adapter's bias does to outputs of a layer that has no bias.
    """

    model: nn.Module
    inputs: Callable[[int, int], tuple[Any, ...]]
    targets: dict[str, Any] | None = dataclasses.field(
        default_factory=lambda: {"target_modules": ["layer"]}
    )
    shifted: Callable[..., Any] | None = None


PARAMETERS = {"target_modules": [], "target_parameters": ["w"]}


def of_shape(*shape):
    return lambda batch, seed: (numbers(batch, *shape, seed=seed),)


def of_ids(batch, seed):
    draw = np.random.default_rng((batch, seed)).integers(0, IN, (batch, 3))
    return jnp.asarray(draw), numbers(batch, OUT, seed=seed)


def shifted_embed(outputs, bias, ids, query):
    looked_up, attended = outputs
    return looked_up + bias[None, None], attended + (query @ bias)[:, None]


KINDS = {
    "`Dense`": Kind(Around(nn.Dense(OUT)), of_shape(3, IN)),
    "`Einsum`": Kind(Around(nn.Einsum((2, IN, OUT), "btnh,nhd->btd")), of_shape(3, 2, IN)),
    "`Einsum` with a batch axis": Kind(
        Around(nn.Einsum((2, IN, OUT), "bti,tio->bto")), of_shape(2, IN)
    ),
    "`DenseGeneral`": Kind(Around(nn.DenseGeneral(OUT, axis=(-2, -1))), of_shape(3, 2, IN)),
    "`Conv`": Kind(Around(nn.Conv(OUT, (2,))), of_shape(4, IN)),
    "`Conv` with groups": Kind(
        Around(nn.Conv(OUT, (2,), feature_group_count=2)), of_shape(4, 2 * IN)
    ),
    "`ConvTranspose`": Kind(Around(nn.ConvTranspose(OUT, (2,), strides=(2,))), of_shape(4, IN)),
    "`Embed`": Kind(LookupAndAttend(nn.Embed(IN, OUT)), of_ids, shifted=shifted_embed),
    "layers stacked by `nn.scan`": Kind(Stack(), of_shape(3, IN)),
    "weights of any module (`LoRAWeight`)": Kind(Around(Gated()), of_shape(3, IN), None),
    "`target_parameters` of a module given to `register_layer`": Kind(
        Around(RegisteredExperts()), of_shape(2, IN), PARAMETERS
    ),
    "`target_parameters` of any module": Kind(Around(Experts()), of_shape(IN), PARAMETERS),
}
AT_WEIGHTS = tuple(KINDS)[-3:]
NO_LAYER = AT_WEIGHTS[-1]

# --- Variants, quantization, initialisers --------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "DoRA + rsLoRA": {"use_dora": True, "use_rslora": True},
    "dropout": {"lora_dropout": DROPOUT},
    "LoRA bias": {"lora_bias": True},
}
METHODS = ("int4", "int8", "q4_0", "q4_0_transpose", "sfp8", "nf4")
QUANTIZATIONS = ("none", *METHODS, "simulated")
SIMULATED = "int4"
INITIALISERS: tuple[bool | str, ...] = (
    True,
    False,
    "gaussian",
    "orthogonal",
    "pissa",
    "pissa_niter_4",
    "olora",
    "loftq",
    "eva",
    "corda",
)
KEEPS_FUNCTION = set(INITIALISERS) - {False, "loftq"}
STATISTICS = {"eva": peft.get_eva_state_dict, "corda": peft.collect_covariances}
_STORED = {
    **STORING,
    Experts: peft.Int4Einsum,
    RegisteredExperts: peft.Int4Einsum,
}
_SIMULATED = {
    **SIMULATING,
    Experts: peft.SimulateQuantizedEinsum,
    RegisteredExperts: peft.SimulateQuantizedEinsum,
}


class Cell(NamedTuple):
    """A key of `KINDS`, one of `VARIANTS`, and an entry of each of the other two axes."""

    kind: str
    variant: str
    quantization: str
    initialiser: bool | str


AXES = (tuple(KINDS), tuple(VARIANTS), QUANTIZATIONS, INITIALISERS)
CELLS = tuple(itertools.starmap(Cell, itertools.product(*AXES)))

# --- What is not supported -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why some cells are not supported.

    Attributes:
      why: for README.
      concerns: whether a cell is one of them.
      error: what the error says that they raise; a regular expression.
    """

    why: str
    concerns: Callable[[Cell], bool]
    error: str


REASONS = (
    Reason(
        "dropout acts on a layer's input; adapters at weights have none",
        lambda c: c.variant == "dropout" and c.kind in AT_WEIGHTS,
        "Dropout acts on a layer's input|target_parameters .* goes without lora_dropout",
    ),
    Reason(
        "`lora_bias` adds to a layer's output; adapters at weights have none",
        lambda c: c.variant == "LoRA bias" and c.kind in AT_WEIGHTS,
        "lora_bias adds to a layer's output|target_parameters .* goes without lora_bias|"
        "lora_bias .* goes with init_lora_weights=True or False",
    ),
    Reason(
        "`lora_bias` goes with `True` and `False` alone, as in Hugging Face's `peft`: the others "
        "start from the weight or its inputs, and say nothing of a bias",
        lambda c: c.variant == "LoRA bias" and not isinstance(c.initialiser, bool),
        "lora_bias .* goes with init_lora_weights=True or False alone",
    ),
    Reason(
        "what a parameter is multiplied by is known of layers alone; `register_layer` makes its "
        "module one",
        lambda c: c.kind == NO_LAYER and c.initialiser in STATISTICS,
        "Experts is not registered",
    ),
    Reason(
        "a module that is no layer reads its parameters itself, as floats; `register_layer` makes "
        "it one, of which weights are stored and simulated",
        lambda c: c.kind == NO_LAYER and c.quantization != "none",
        "leave nothing to quantize|Experts is not registered",
    ),
)


def first_reason(cell: Cell) -> Reason | None:
    return next((reason for reason in REASONS if reason.concerns(cell)), None)


def reason(kind: str, variant: str, quantization: str, initialiser: bool | str) -> str | None:
    """Why a cell is not supported; None where it is."""
    found = first_reason(Cell(kind, variant, quantization, initialiser))
    return None if found is None else found.why


# --- A cell, run ---------------------------------------------------------------------------------


def check(cell: Cell) -> None:
    """Runs a cell: all that `run` asserts holds, or it raises what its reason says."""
    found = first_reason(cell)
    if found is None:
        run(cell)
        return
    with pytest.raises(ValueError, match=f"(?s){found.error}"):
        run(cell)


def run(cell: Cell) -> None:
    """Starts adapters on a float base, stores the base, and runs the model on it.

    - Where the initialiser keeps the model's function, the fused weights give the plain outputs;
      LoftQ comes nearer to them than quantization alone.
    - The adapted model gives the outputs of the fused dequantized weights, with adapters as they
      start, and with scattered numbers added.
    - Every array of an adapter has a finite gradient, and zeros only where the other factor is.
    """
    kind, method = KINDS[cell.kind], method_of(cell.quantization)
    plain, inputs = base_of(cell.kind), kind.inputs(2, 0)
    base, lora = started(cell.kind, cell.variant, cell.initialiser, method)
    if cell.initialiser in KEEPS_FUNCTION:
        start = on_fused(cell, base, lora)
        assert_close(start, run_plain(cell.kind)(plain, *inputs), START_TOLERANCE)
    held, floats = quantized(cell, base)
    if cell.initialiser == "loftq":  # after one iteration its base is the quantized weight
        fused = peft.fuse_params(peft.merge_params(floats, lora), specs=specs_of(*cell[:2]))
        assert distance(fused, plain) < distance(base, plain)
        assert_close(floats, base)
    step = run_adapted(*cell[:3])
    for adapters, starts in ((lora, True), (moved(lora), False)):
        output, trained, gradient = step(held, adapters, *inputs)
        assert_close(output, on_fused(cell, floats, adapters), TOLERANCE)
        assert starts or (cell.variant == "dropout") == (distance(trained, output) > 0)
        check_gradient(cell, adapters, gradient, starts=starts)


def check_gradient(cell: Cell, lora: Any, gradient: Any, *, starts: bool) -> None:
    specs, other = specs_of(*cell[:2]), {"a": "b", "b": "a"}
    adapters, gradients = adapter_leaves(specs, lora), adapter_leaves(specs, gradient)
    for path, adapter in adapters.items():
        assert np.any(adapter["a"]) or np.any(adapter["b"]), f"{path} of {cell} could not learn"
        names = {"a", "b"} | ({"magnitude"} if "DoRA" in cell.variant else set())
        assert set(adapter) == names | ({"bias"} if cell.variant == "LoRA bias" else set())
        for name, values in gradients[path].items():
            where = f"{path}/{name} of {cell}"
            assert np.all(np.isfinite(values)), f"The gradient is not finite at {where}"
            may_be_zero = starts and name in other and not np.any(adapter[other[name]])
            assert may_be_zero or np.any(np.asarray(values)), f"No gradient at {where}"


def method_of(quantization: str) -> str | None:
    return {"none": None, "simulated": SIMULATED}.get(quantization, quantization)


def distance(params: Any, others: Any) -> float:
    apart = jax.tree.map(lambda x, y: float(np.sum(np.square(x - y))), params, others)
    return sum(jax.tree.leaves(apart))


def moved(lora: Any) -> Any:
    """Adapters as training might leave them."""
    leaves, tree = jax.tree.flatten(lora)
    steps = [0.1 * scattered(leaf.size, i).reshape(leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, [x + step for x, step in zip(leaves, steps, strict=True)])


# --- What cells share ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AtWeights:
    """Adapters at the weights of every `Gated`."""

    variant: str

    def __call__(self, module):
        if type(module) is not Gated:
            return module
        fields = dict(VARIANTS[self.variant])
        fields["dropout"] = fields.pop("lora_dropout", 0.0)
        return peft.LoRAWeight(rank=RANK, alpha=ALPHA, wrapped=module, **fields)


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Storage, or simulation, around every layer."""

    quantization: str

    def __call__(self, module):
        table = _SIMULATED if self.quantization == "simulated" else _STORED
        wrapper = table.get(type(module))
        if wrapper is None:
            return module
        return wrapper(wrapped=module, method=method_of(self.quantization))


def config_of(kind: str, variant: str, initialiser: bool | str, method: str | None) -> Any:
    targets = KINDS[kind].targets
    settings: dict[str, Any] = {}
    if initialiser == "loftq":
        settings["loftq_config"] = peft.LoftQConfig(method=method or "nf4")
    if initialiser == "eva":
        settings["eva_config"] = peft.EvaConfig(rho=1.0)
    if targets is None:  # nothing of a variant: that is for `AtWeights`
        targets, variant = {"target_modules": ["gate", "up"]}, "LoRA"
    return peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        init_lora_weights=initialiser,
        **targets,
        **VARIANTS[variant],
        **settings,
    )


@functools.cache
def adapted(kind: str, variant: str) -> tuple[nn.Module, AtWeights | None]:
    """The adapted model, and the rule under which it runs if it is adapted by one."""
    model = KINDS[kind].model
    if KINDS[kind].targets is None:
        return model, AtWeights(variant)
    return peft.get_peft_model(model, config_of(kind, variant, True, None)), None


@contextlib.contextmanager
def intercepted(*rules: Any):
    with contextlib.ExitStack() as stack:
        for rule in filter(None, rules):
            stack.enter_context(peft.ModuleInterceptor(rule))
        yield


@functools.cache
def specs_of(kind: str, variant: str) -> dict[str, peft.LoraSpec]:
    model, rule = adapted(kind, variant)
    with intercepted(rule):
        return peft.lora_specs(model, *KINDS[kind].inputs(2, 0))


@functools.cache
def layer_specs_of(kind: str) -> dict[str, peft.LayerSpec]:
    return peft.layer_specs(KINDS[kind].model, *KINDS[kind].inputs(2, 0))


@functools.cache
def base_of(kind: str) -> Any:
    """A base in float32."""
    model, inputs = KINDS[kind].model, KINDS[kind].inputs(2, 0)
    params = jax.eval_shape(lambda: model.init(key_of(0), *inputs))["params"]
    return jax.tree.map(lambda leaf: 0.2 * numbers(*leaf.shape), params)


@functools.cache
def statistics_of(kind: str, initialiser: bool | str) -> Any:
    """What the layers see in two batches."""
    collect = STATISTICS[initialiser]
    config = config_of(kind, "LoRA", initialiser, None)
    batches = [KINDS[kind].inputs(48, seed) for seed in (1, 2)]
    return collect(KINDS[kind].model, base_of(kind), batches, config, specs=specs_of(kind, "LoRA"))


def started(kind: str, variant: str, initialiser: bool | str, method: str | None) -> Any:
    """The base and the adapters as they start; ``method`` is LoftQ's."""
    return _started(kind, variant, initialiser, method if initialiser == "loftq" else None)


@functools.cache
def _started(kind: str, variant: str, initialiser: bool | str, method: str | None) -> Any:
    config = config_of(kind, variant, initialiser, method)
    given = {"loftq": config.loftq_config, "eva": config.eva_config, "corda": config.corda_config}
    specs = specs_of(kind, variant)
    return peft.init_lora_weights(
        base_of(kind),
        specs,
        key_of(0),
        method=config.init_lora_weights,
        config=given.get(initialiser),
        statistics=statistics_of(kind, initialiser) if initialiser in STATISTICS else None,
    )


def quantized(cell: Cell, base: Any) -> tuple[Any, Any]:
    """The base as the model holds it, and as floats that the model computes with."""
    method = method_of(cell.quantization)
    if method is None:
        return base, base
    if cell.kind == NO_LAYER and cell.quantization == "simulated":
        return base, base
    stored = peft.quantize_checkpoint(base, method=method, specs=layer_specs_of(cell.kind))
    held = base if cell.quantization == "simulated" else stored
    return held, peft.dequantize_checkpoint(stored)


@functools.cache
def run_plain(kind: str) -> Callable[..., Any]:
    model = KINDS[kind].model
    return jax.jit(lambda base, *inputs: model.apply({"params": base}, *inputs))


def on_fused(cell: Cell, base: Any, lora: Any) -> Any:
    """Outputs of the plain model on fused weights."""
    kind, inputs, bias = KINDS[cell.kind], KINDS[cell.kind].inputs(2, 0), None
    if cell.variant == "LoRA bias" and kind.shifted is not None:
        adapter = lora["layer"]["lora"]
        bias, zero = adapter["bias"], jnp.zeros_like(adapter["bias"])
        lora = {"layer": {"lora": adapter | {"bias": zero}}}
    fused = peft.fuse_params(peft.merge_params(base, lora), specs=specs_of(*cell[:2]))
    outputs = run_plain(cell.kind)(fused, *inputs)
    scaling = next(iter(specs_of(*cell[:2]).values())).scaling
    return outputs if bias is None else kind.shifted(outputs, scaling * bias, *inputs)


@functools.cache
def run_adapted(kind: str, variant: str, quantization: str) -> Callable[..., Any]:
    """From base, adapters and inputs to the output, that of training, and the latter's gradient.

    They differ by dropout; the gradient is by the adapters.
    """
    model, rule = adapted(kind, variant)
    quantize = None if quantization == "none" else Quantize(quantization)
    rngs = {"dropout": key_of(3)} if variant == "dropout" else None

    def apply(lora, base, inputs, rngs):
        with intercepted(rule, quantize):
            params = peft.merge_params(base, lora)
            output = model.apply({"params": params}, *inputs, rngs=rngs)
        return loss_of(output), output

    @jax.jit
    def step(base, lora, *inputs):
        run = jax.value_and_grad(apply, has_aux=True)
        (_, trained), gradient = run(lora, base, inputs, rngs)
        output = trained if rngs is None else apply(lora, base, inputs, None)[1]
        return output, trained, gradient

    return step


# --- Which cells a short run takes ---------------------------------------------------------------


def pairs(cell: Iterable[Any]) -> set[Any]:
    """The pairs of values, each with its axis, that a cell has."""
    return set(itertools.combinations(enumerate(cell), 2))


def covering(cells: Iterable[Any], wanted: set[Any]) -> list[Any]:
    """Few of the cells with as many of the wanted pairs; these are removed from ``wanted``."""
    left, found = list(cells), []
    while left:
        best = max(left, key=lambda cell: len(pairs(cell) & wanted))
        if not pairs(best) & wanted:
            break
        found.append(best)
        wanted -= pairs(best)
        left = [cell for cell in left if pairs(cell) & wanted]
    return found


@functools.cache
def pairwise() -> tuple[Cell, ...]:
    """Cells with every pair of values; supported cells wherever a pair is supported.

    Programs are compiled for each kind, variant and quantization, so those are few.
    """
    supported = [cell for cell in CELLS if first_reason(cell) is None]
    wanted = set().union(*map(pairs, CELLS))
    programs = list(dict.fromkeys(cell[:3] for cell in supported))
    few = set(covering(programs, set().union(*map(pairs, programs))))
    chosen = [cell for cell in supported if cell[:3] in few]
    return tuple(
        itertools.chain.from_iterable(
            covering(cells, wanted) for cells in (chosen, supported, CELLS)
        )
    )


# --- The table -----------------------------------------------------------------------------------


def entry(kind: str, variant: str, quantization: str) -> str:
    """Which initialisers are supported, and the numbers of the reasons why others are not."""
    cells = [Cell(kind, variant, quantization, initialiser) for initialiser in INITIALISERS]
    found = {cell.initialiser: first_reason(cell) for cell in cells}
    refused = [name for name in found if found[name] is not None]
    kept = [name for name in found if found[name] is None]
    if not refused:
        return "all"
    numbers_of = sorted({REASONS.index(found[name]) + 1 for name in refused})
    why = " ".join(f"({number})" for number in numbers_of)
    if not kept:
        return f"none {why}"
    if len(kept) < len(refused):
        return f"{_listed(kept)} {why}"
    return f"all but {_listed(refused)} {why}"


def _listed(names: Iterable[Any], mark: str = "`") -> str:
    return ", ".join(f"{mark}{name}{mark}" for name in names)


def _grouped(names: Iterable[str], row_of: Callable[[str], Any]) -> list[tuple[str, Any]]:
    """Names in a row together where what is said of them is the same."""
    groups: dict[Any, list[str]] = {}
    for name in names:
        groups.setdefault(row_of(name), []).append(name)
    return [(_listed(group, ""), said) for said, group in groups.items()]


def render() -> str:
    """The matrix in markdown; kinds and variants of which the same holds share a row."""

    def of_variant(kind: str, variant: str) -> tuple[str, ...]:
        return tuple(entry(kind, variant, quantization) for quantization in QUANTIZATIONS)

    def of_kind(kind: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return tuple(_grouped(VARIANTS, functools.partial(of_variant, kind)))

    head = ["layer", "variant", "floats", *map("`{}`".format, METHODS), "simulated"]
    rows = [
        [layers, variants, *entries]
        for layers, said in _grouped(KINDS, of_kind)
        for variants, entries in said
    ]
    table = [head, ["---"] * len(head), *rows]
    count = sum(first_reason(cell) is None for cell in CELLS)
    reasons = [f"{reason.why[0].upper()}{reason.why[1:]}." for reason in REASONS]
    return "\n".join(
        [
            'Which initialisers work with which layer, variant and storage of the base. "All" are',
            f"{_listed(INITIALISERS)}.",
            "",
            *(f"| {' | '.join(row)} |" for row in table),
            "",
            *(f"{number}. {text}" for number, text in enumerate(reasons, start=1)),
            "",
            f"Of {len(CELLS):,} combinations {count:,} work and the others raise an error that "
            "says why; the tests run every one.",
        ]
    )


_BETWEEN = re.compile(f"(?<={BEGIN}\n)(?:(.*)\n)?(?={END})", re.DOTALL)


def in_readme() -> str | None:
    """What stands between the markers.

    Raises:
      ValueError: where they are not there.
    """
    found = _BETWEEN.search(README.read_text())
    if found is None:
        raise ValueError(f"{README.name} lacks the lines {BEGIN} and {END}. Put them there.")
    return found[1]


def write() -> None:
    """Puts `render` between the markers."""
    if in_readme() != render():
        README.write_text(_BETWEEN.sub(lambda _: f"{render()}\n", README.read_text()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The support matrix; printed where not written.")
    parser.add_argument("--write", action="store_true", help="write it into README.md")
    if parser.parse_args().write:
        write()
    else:
        print(render())
