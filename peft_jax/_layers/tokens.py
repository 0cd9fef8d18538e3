"""Rows of an embedding that are trained while the table is frozen."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.typing import Array, Dtype

from peft_jax._layers.lora_rules import AdapterRule
from peft_jax._numerics import Weight, weight_rows, weight_shape
from peft_jax._spec import EMBED, LoraSpec, parse_equation
from peft_jax._surgery import (
    Call,
    Proceed,
    Rule,
    Untouched,
    Wrapper,
    boxed,
    child_scope,
    embed_input,
    require_layer,
)
from peft_jax._trees import DEFAULT, TOKENS

__all__ = [
    "TokensWrapper",
]


class TokenRows(nn.Module, Untouched):
    """The parameter ``rows (tokens, features)``, which starts as the table's own rows.

    Attributes:
      tokens: indices of the rows.
      adapts: name of the table.
      table_metadata: the box of the table, along whose features the rows are spread.
    """

    tokens: tuple[int, ...]
    adapts: str
    table_metadata: Any = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, weight: Array | Weight) -> Array:
        """``rows`` minus the table's own."""
        own = weight_rows(weight, jnp.asarray(self.tokens)).astype(self.param_dtype)
        letters = parse_equation(EMBED).low_rank()
        spec = LoraSpec(
            self.adapts,
            letters.delta,
            len(self.tokens),
            variant="tokens",
            tokens=self.tokens,
            kind="embed",
            shape=weight.shape,
        )

        def first(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
            return own

        init = boxed(first, letters.b, letters.delta[-2:], self.table_metadata, spec)
        return self.param("rows", init, own.shape, self.param_dtype) - own


@dataclasses.dataclass(frozen=True)
class TokensRule(AdapterRule):
    """Rows of a table are those that are trained, in lookups and in ``attend``."""

    tokens: tuple[int, ...]
    adapter_name: str = DEFAULT

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"trainable tokens ({self.adapter_name})"

    def around(self, call: Call, proceed: Proceed) -> Any:
        y = proceed(call)
        layer = require_layer(call.module, "trainable_token_indices is about")
        if call.method not in layer.methods or not isinstance(y, jax.Array):
            return y
        surplus = self._surplus(call, layer.param).astype(y.dtype)
        x = call.argument(0, embed_input(call))
        if call.method == "attend":
            change = jnp.einsum("...f,nf->...n", x.astype(y.dtype), surplus)
            return y.at[..., jnp.asarray(self.tokens)].add(change)
        hits = self._hits(jnp.asarray(x), call.module.num_embeddings).astype(y.dtype)
        return y + jnp.einsum("...n,nf->...f", hits, surplus)

    def _hits(self, ids: Array, length: int) -> Array:
        """For each index and each token, whether the index is of that token, as nn.Embed reads."""
        ids = ids.astype(jnp.int64 if ids.dtype.itemsize == 8 else jnp.int32)
        ids = jnp.where(ids < 0, ids + length, ids) if length > 1 else jnp.zeros_like(ids)
        return ids[..., None] == jnp.asarray(self.tokens, ids.dtype).reshape(
            (1,) * ids.ndim + (-1,)
        )

    def _surplus(self, call: Call, param: str) -> Array:
        stored: Any = call.module.get_variable("params", param)
        length = weight_shape(meta.unbox(stored))[0]
        outside = [token for token in self.tokens if not 0 <= token < length]
        if outside:
            raise ValueError(
                f"LoraConfig.trainable_token_indices holds {outside[:5]}, but the table at "
                f"'{call.path}' has rows 0 to {length - 1}."
            )
        scope, own = call.module.scope, self.adapter_name
        name = TOKENS if own == DEFAULT else f"{TOKENS}.{own}"
        assert call.weight is not None
        if scope.get_variable("params", name) is None and not call.module.is_initializing():
            raise ValueError(
                f"The parameters hold no rows at '{call.path}/{name}', where a config trains "
                "tokens. Initialize the model under the same config, or add them by "
                "`peft.merge_params`."
            )
        rows = TokenRows(
            self.tokens,
            param,
            stored if isinstance(stored, meta.AxisMetadata) else None,
            parent=child_scope(scope, name),
            name=name,
        )
        return rows(call.weight())


class TokensWrapper(Wrapper):
    """An ``nn.Embed`` some of whose rows are trained."""

    tokens: tuple[int, ...]
    adapter_name: str = DEFAULT

    @nn.nowrap
    def rule(self) -> Rule:
        return TokensRule(self.tokens, self.adapter_name)
