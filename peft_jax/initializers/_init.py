"""`init_lora_weights`: adapters at their start, and the base that goes with them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax._config import LoraConfig
from peft_jax._numerics import is_traced, spec_norms, stack_back, stack_first
from peft_jax._spec import LoraSpec
from peft_jax._trees import (
    Path,
    Specs,
    adapter_paths,
    is_adapter,
    is_branch,
    progress_bar,
    slashed,
    split_params,
    with_stored,
)
from peft_jax.initializers._methods import Initializer, find_initializer, method_of, settings_of
from peft_jax.initializers._parameters import (
    Parameter,
    adapted_parameter,
    refuse_shared,
    with_leaves,
)
from peft_jax.initializers._start import Start, Target

Array = jax.Array
_CALLER = "init_lora_weights"


class InitializedParams(NamedTuple):
    """The two halves of a parameter tree, as `merge_params` takes them.

    Attributes:
      base: the base's parameters, without the parts that adapters have taken.
      lora: the adapters.
    """

    base: Any
    lora: Any


def init_lora_weights(
    base: Any,
    specs: Specs,
    key: Array,
    *,
    method: bool | str = True,
    config: Any = None,
    statistics: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> InitializedParams:
    """Makes the adapters of a model from the weights that they adapt.

    For a weight seen as matrices ``W (in, out)`` (one for each layer of a stack and each index of
    the batch axes), scaling ``s`` and rank ``r``:

    =================  ==============================  ====================  ======================
    method             a                               b                     the base becomes
    =================  ==============================  ====================  ======================
    ``True``           U(-1, 1) / sqrt(in)             0                     W
    ``"gaussian"``     N(0, 1) / r                     0                     W
    ``"orthogonal"``   X Q_1 / 10, see below           Q_2^T Y / 10          W
    ``False``          U(-1, 1) / sqrt(in)             U(-1, 1) / sqrt(r)    W
    ``"eva"``          components of the inputs        0                     W
    ``"pissa"``        U sqrt(S / s)                   sqrt(S / s) V^T       W - s·a·b
    ``"olora"``        R^T, of W^T = Q R               Q^T                   W - s·a·b
    ``"corda"``        C^-1 V sqrt(S / s)              sqrt(S / s) U^T       W - s·a·b
    ``"loftq"``        L, of L R ~ W - Q               R / s                 Q = quantized(W - L R)
    =================  ==============================  ====================  ======================

    ``pissa`` (https://arxiv.org/abs/2404.02948) takes the ``r`` largest singular values of ``W``;
    ``pissa_niter_16`` finds them by 16 subspace iterations (https://arxiv.org/abs/0909.4061).
    ``olora`` (https://arxiv.org/abs/2406.01775) takes the first ``r`` rows of ``R``. ``corda``
    (https://arxiv.org/abs/2406.05223) decomposes ``W^T C = U S V^T`` for the covariance ``C`` of
    the inputs. ``loftq`` (https://arxiv.org/abs/2310.08659) repeats its row ``loftq_iter`` times.
    ``eva``: https://arxiv.org/abs/2410.07170. Of ``orthogonal``, ``X`` and ``Y`` are normal and
    ``Q_1``, ``Q_2`` the even and the odd rows of an orthogonal matrix, so that ``a·b = 0``.
    Embeddings (``spec.kind == "embed"``) start with ``a = 0`` and a normal ``b`` where the method
    is ``True`` or ``gaussian``, and with both normal for ``False``.

    The arrays are float32, laid out by the spec. ``bias`` is zero; the ``magnitude`` of DoRA is
    the norm of the weight as given, which is that of the new base and its adapter together; rows
    of trained tokens are those of the new base, whatever the method. Draws depend on the key and
    the adapter's path alone. Ranks beyond ``min(in, out)`` are filled up with zeros where a method
    decomposes.

    Args:
      base: parameters of the plain model, of any floating dtype; computed in float32, and rounded
        once. Values stored in few bits serve methods that leave the base as it is.
      specs: from `lora_specs`: which adapters to make.
      key: from ``jax.random.key``.
      method: see the table; ``init_lora_weights`` of a `LoraConfig`.
      config: a `LoftQConfig`, `EvaConfig` or `CordaConfig` for the method of that name; None: its
        defaults. Or the whole `LoraConfig`, which says the method too: leave that out then.
      statistics: by the adapter's path (the keys of ``specs``), for ``eva`` components ``(r or
        more, in)`` from `get_eva_state_dict`, for ``corda`` covariances ``(in, in)`` from
        `collect_covariances`; axes of the stack (outermost first) and of the batch stand in front.
      progress: whether to show a bar.

    Returns:
      ``(base, lora)`` for `merge_params`, of the container types of ``base``. Leaves of the base
      that do not change are the same objects; the others keep their box, dtype and sharding. The
      adapters' arrays are boxed and spread over devices as the weight is along shared axes. With
      ``LoftQConfig.store`` the base holds `StoredValues` and scales, as `quantize_checkpoint` makes
      them. It works under ``jax.jit`` and ``jax.eval_shape`` too.

    Raises:
      ValueError: with the adapter's path: where specs and base do not fit; the base holds adapters;
        a method is unknown, or is not given what it needs, or something that it does not take; it
        takes part of a weight that is stored in few bits; ranks are odd (``orthogonal``), scalings
        zero (``pissa``, ``corda``, ``loftq``); and, outside of ``jax.jit``, results not finite.
    """
    if isinstance(config, LoraConfig):
        method, config = method_of(config, method)
    row, iterations = find_initializer(method)
    settings = settings_of(row, method, config)
    _check(base, specs, key)
    factored = {path: spec for path, spec in specs.items() if spec.variant != "tokens"}
    known = _known(row, method, statistics, factored)
    weights = {
        path: adapted_parameter(base, path, spec, _CALLER, "the base")
        for path, spec in factored.items()
    }
    if row.takes_weight:
        _check_weights(weights, method)
    leaves: dict[Path, Any] = {}
    stored: dict[Path, tuple[Any, Any]] = {}
    adapters: dict[Path, dict[str, Any]] = {}
    shown = progress_bar(weights, f"start adapters ({method})", shown=progress, leave=False)
    with jax.default_matmul_precision("highest"):
        for path in shown:
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            target = Target(
                path, specs[path], weights[path], own, settings, known.get(path), iterations
            )
            start = row.start(target)
            if row.takes_weight or row.statistics:
                _check_finite(target, start, method)
            if start.kernel is not None:
                leaves[target.parameter.path] = target.parameter.replaced(start.kernel)
            if start.stored is not None:
                stored[target.parameter.path] = start.stored
            adapters[tuple(path.split("/"))] = _arrays(target, start)
    new = with_stored(with_leaves(base, leaves, {}), stored)
    for path in specs.keys() - factored.keys():
        adapters[tuple(path.split("/"))] = {"rows": _rows(new, path, specs[path])}
    lora = split_params(with_leaves(base, {}, adapters)).lora
    return InitializedParams(new, lora)


def _arrays(target: Target, start: Start) -> dict[str, Any]:
    """The adapter's arrays by name, in their boxes and places."""
    spec, view = target.spec, target.view
    outputs = spec.output_letters
    arrays = {"a": (start.a, spec.letters[0]), "b": (start.b, spec.letters[1])}
    if spec.variant == "dora":
        arrays["magnitude"] = spec_norms(target.weight, spec).astype(jnp.float32), outputs
    if spec.bias is not None:
        shape = (view.matrix_shape[0], *(view.sizes[c] for c in outputs))
        arrays["bias"] = view.restacked(jnp.zeros(shape)), outputs
    return {
        name: target.parameter.beside(array, view.places(letters))
        for name, (array, letters) in arrays.items()
    }


def _rows(base: Any, path: str, spec: LoraSpec) -> Any:
    """The rows of a table that are trained in place of its own: those that the base now holds."""
    target = Target(path, spec, adapted_parameter(base, path, spec, _CALLER, "the base"))
    view = target.view
    table, axis = stack_first(target.weight, view.stack_axes), len(view.stack)
    outside = [token for token in spec.tokens if not 0 <= token < table.shape[axis]]
    if outside:
        raise ValueError(
            f"{_CALLER}: the spec of '{path}' trains the rows {outside[:5]}, and the table has "
            f"rows 0 to {table.shape[axis] - 1}. Give the specs of this model."
        )
    rows = jnp.take(table, jnp.asarray(spec.tokens), axis).astype(jnp.float32)
    return target.parameter.beside(stack_back(rows, view.stack_axes), view.places(spec.letters[1]))


# --- What is refused -----------------------------------------------------------------------------


def _check(base: Any, specs: Any, key: Any) -> None:
    if not is_branch(base):
        raise ValueError(
            f"{_CALLER}: the base is a tree of parameters, got {type(base).__name__}. Pass "
            "variables['params'] of the plain model."
        )
    there = adapter_paths(base)
    if there:
        raise ValueError(
            f"{_CALLER}: the base holds adapters already ({there[:3]}). Take them off by "
            "`split_params`."
        )
    if not isinstance(specs, Mapping) or not all(isinstance(s, LoraSpec) for s in specs.values()):
        raise ValueError(
            f"{_CALLER}: specs map the slashed path of each adapter to its LoraSpec, as "
            f"`peft.lora_specs(model, *inputs)` makes them; got {specs!r:.200}."
        )
    if not specs:
        raise ValueError(
            f"{_CALLER}: the specs are empty, so there is no adapter to start. Call "
            "`peft.lora_specs` of the adapted model, inside the interceptor if there is one."
        )
    for path, spec in specs.items():
        held = ("rows",) if spec.variant == "tokens" else ("a", "b")
        if not is_adapter(path.split("/")[-1], dict.fromkeys(held, 0)):
            raise ValueError(
                f"{_CALLER}: '{path}' is no path of an adapter ('x/lora' is one), so that nothing "
                "would read the arrays there. Take the specs from `peft.lora_specs`."
            )
    dtype, shape = getattr(key, "dtype", None), jnp.shape(key)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and not shape
    if not typed and (dtype != jnp.uint32 or len(shape) != 1):
        raise ValueError(
            f"{_CALLER}: key is one key from `jax.random.key(seed)`, got {key!r:.100}."
        )


def _known(row: Initializer, method: Any, statistics: Any, specs: Specs) -> Mapping[str, Any]:
    """Statistics of every layer, where the method needs them, and nothing else."""
    if row.statistics is None:
        if statistics is not None:
            raise ValueError(
                f"{_CALLER}: method={method!r} asks nothing of the inputs. Leave `statistics` out."
            )
        return {}
    if not isinstance(statistics, Mapping):
        raise ValueError(
            f"{_CALLER}: method={method!r} needs `statistics`, a dict from the path of each "
            f"adapter to its {row.statistics}; got {statistics!r:.100}."
        )
    missing, surplus = sorted(set(specs) - set(statistics)), sorted(set(statistics) - set(specs))
    if missing or surplus:
        raise ValueError(
            f"{_CALLER}: `statistics` and specs speak of different adapters. Without statistics: "
            f"{missing[:5]}; without a spec: {surplus[:5]}. Keys are the paths of adapters; values "
            f"are {row.statistics}."
        )
    return statistics


def _check_weights(weights: Mapping[str, Parameter], method: Any) -> None:
    """Each weight is one of floats, and gives to one adapter alone."""
    for weight in weights.values():
        if weight.stored is not None:
            raise ValueError(
                f"{_CALLER}: method={method!r} changes the weight '{slashed(weight.path)}', which "
                "is stored in few bits. Start the adapters from the floating-point weights, then "
                "store the base by `peft.quantize_checkpoint`."
            )
    refuse_shared(weights, f"{_CALLER}: method={method!r} changes the weight")


def _check_finite(target: Target, start: Start, method: Any) -> None:
    """Numbers are not known inside ``jax.jit``."""
    if is_traced(start.a):
        return
    finite = jnp.all(jnp.isfinite(start.a)) & jnp.all(jnp.isfinite(start.b))
    if not bool(finite):
        raise ValueError(
            f"{_CALLER}: method={method!r} makes NaN or infinity of the weight "
            f"'{slashed(target.parameter.path)}' for '{target.path}'. Mend the weight or, if there "
            "are any, its statistics: they hold such a number, or have no inverse."
        )
