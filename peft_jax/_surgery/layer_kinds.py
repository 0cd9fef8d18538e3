"""What the library knows of each layer type: its parameter, its equation, its input."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Array, Dtype, Initializer

from peft_jax._spec import (
    DENSE,
    EMBED,
    as_tuple,
    conv_equation,
    dense_general_equation,
    parse_equation,
)
from peft_jax._surgery.flax_internals import is_lifted
from peft_jax._surgery.rules import Call

__all__ = [
    "PRODUCTS",
    "Layer",
    "embed_input",
    "find_layer",
    "first_values",
    "layer_type",
    "register_layer",
    "require_layer",
]


PRODUCTS = frozenset({"dense", "einsum", "dense_general"})


@dataclasses.dataclass(frozen=True)
class Layer:
    """How to read a layer ``y = einsum(equation, x, parameter)``.

    Attributes:
      param: name of its parameter.
      kind: which adapter computes ``x·a·b`` beside it: its row in the tables of adapters.
      equation: the layer's equation, as this call uses it.
      input: the layer's ``x``, as this call receives it.
      methods: the methods that are this product; others pass unchanged.
      beside: whether ``y + x·a·b`` is what the layer gives with ``W + a·b``. Otherwise the adapter
        joins the weight.
      check: refuses a module that can be told to be unfit before it is called.
      bias: name of the one parameter that is added to the product, if the layer has it; None:
        other terms may be added.
    """

    param: str
    kind: str
    equation: Callable[[Call], str]
    input: Callable[[Call], Any] = lambda call: call.argument(0, "inputs")
    methods: tuple[str, ...] = ("__call__",)
    beside: Callable[[Call], bool] = lambda call: _is_plain(call.module)
    check: Callable[[Any], None] = lambda module: None
    bias: str | None = None


def layer_type(module: nn.Module | type[nn.Module]) -> type[nn.Module]:
    """The class that a user wrote: the base of a class made by a lifted transform.

    ``nn.remat(nn.Dense)`` is a subclass of ``nn.Dense`` whose call runs a plain ``nn.Dense``
    inside the transform.
    """
    cls = module if isinstance(module, type) else type(module)
    return next(base for base in cls.__mro__ if not is_lifted(base))


_LAYERS: dict[type[nn.Module], Layer] = {}


def find_layer(module: nn.Module | type[nn.Module]) -> Layer | None:
    """What is registered for the module's exact type; None where nothing is."""
    return _LAYERS.get(layer_type(module))


def require_layer(module: nn.Module, purpose: str, otherwise: str = "") -> Layer:
    """`find_layer`, or an error that says for what (``LoRADense adapts``) and the remedies."""
    layer = find_layer(module)
    if layer is None:
        cls = layer_type(module).__name__
        parents = [base.__name__ for base in layer_type(module).__mro__[1:] if base in _LAYERS]
        like = (
            f" If its forward is still that of {parents[0]}, opt in by "
            f"`peft.register_layer({cls}, like=nn.{parents[0]})`."
            if parents
            else ""
        )
        raise ValueError(
            f"{purpose} layers whose product it knows, and {cls} is not registered (types "
            f"match exactly: a subclass may compute something else).{like} Say how it reads its "
            f"parameter by `peft.register_layer({cls}, param=..., equation=...)`{otherwise}."
        )
    return layer


def register_layer(
    module_type: type[nn.Module],
    *,
    param: str = "kernel",
    equation: str | Callable[..., str] | None = None,
    input: str | Callable[..., Any] | None = None,
    like: type[nn.Module] | None = None,
    bias: str | None = None,
) -> type[nn.Module]:
    """Tells the library how a module type uses its parameter.

    The layer must be ``y = einsum(equation, x, parameter)``, plus terms that do not depend on the
    parameter (a bias): the library then adds ``scaling * x·a·b`` to its output. For a module with
    anything else around the product, use `LoRAWeight` instead.

    Types match exactly; a subclass opts in by a registration of its own (``like=`` repeats that of
    its parent). Registering a type again replaces what was said before.

    Example::

      peft.register_layer(MyDense, param="w", equation="...i,io->...o")
      peft.register_layer(  # the equation is an argument of the call
          MyEinsum, param="w", equation=lambda module, eqn, x: eqn, input="x")

    Args:
      module_type: a subclass of ``nn.Module``.
      param: name of the parameter, as in ``self.param(name, ...)``.
      equation: ``inputs,parameter->outputs``, or a function of ``(module, *args, **kwargs)``, the
        arguments of ``__call__``, that returns it.
      input: name of the argument of ``__call__`` that holds ``x`` (default: the first), or a
        function of ``(module, *args, **kwargs)`` that returns it.
      like: a registered type; the new type is read in the same way.
      bias: name of the parameter that is added to the product along its output axes, where that
        is all that is added (``""``: nothing ever is). With it, an adapter of DoRA acts beside
        the layer; without it, on its weight, where dropout has no place.

    Returns:
      ``module_type``, so that a ``functools.partial`` of this serves as a decorator.

    Raises:
      ValueError: on an equation that has no low-rank form, an unknown argument name, or a type
        that is no Linen module.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise ValueError(f"register_layer takes a subclass of nn.Module, got {module_type!r}.")
    if like is not None:
        if equation is not None or input is not None or param != "kernel" or bias is not None:
            raise ValueError("register_layer takes either `like` or a description, not both.")
        if like not in _LAYERS:
            raise ValueError(
                f"register_layer(like={like!r}): that type is not registered. Registered are "
                f"{sorted(cls.__name__ for cls in _LAYERS)}."
            )
        _LAYERS[module_type] = _LAYERS[like]
        return module_type
    if equation is None:
        raise ValueError(
            f"register_layer({module_type.__name__}) needs the layer's equation, such as "
            "'...i,io->...o', or a function that returns it."
        )
    if not isinstance(param, str):
        raise ValueError(f"register_layer: param is the name of a parameter, got {param!r}.")
    if bias is not None and not isinstance(bias, str):
        raise ValueError(f"register_layer: bias is the name of a parameter, got {bias!r}.")
    if not callable(equation):
        parse_equation(equation)
    read_equation = equation if callable(equation) else lambda module, *args, **kwargs: equation
    read_input = input if callable(input) else _argument_reader(module_type, input)
    _LAYERS[module_type] = Layer(
        param=param,
        kind="einsum",
        equation=lambda call: read_equation(call.module, *call.args, **call.kwargs),
        input=lambda call: read_input(call.module, *call.args, **call.kwargs),
        bias=bias,
    )
    return module_type


def _argument_reader(module_type: type[nn.Module], name: str | None) -> Callable[..., Any]:
    """Reads one argument of ``__call__`` by its name; the first one where no name is given."""
    signature = inspect.signature(module_type.__call__)
    names = list(signature.parameters)[1:]
    if name is None and names:
        name = names[0]
    if name not in names:
        raise ValueError(
            f"{module_type.__name__}.__call__ has no argument {name!r}; it has {names}. Name the "
            "one that holds the layer's input."
        )

    def read(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return signature.bind(module, *args, **kwargs).arguments[name]

    return read


def _is_plain(module: Any) -> bool:
    """Whether the module computes its product by Flax's own functions, not by injected ones."""
    injected = (
        "dot_general",
        "dot_general_cls",
        "conv_general_dilated",
        "conv_general_dilated_cls",
    )
    return (
        all(getattr(module, field, None) is None for field in injected)
        and getattr(module, "promote_dtype", promote_dtype) is promote_dtype
    )


def _einsum_equation(call: Call) -> str:
    given = call.argument(1, "einsum_str")
    declared = call.module.einsum_str
    if (given is None) == (declared is None):
        raise ValueError(
            f"The equation of nn.Einsum at '{call.path}' is given once, to the constructor or to "
            f"the call, got {declared!r} and {given!r}."
        )
    return given if declared is None else declared


def _check_einsum(module: nn.Einsum) -> None:
    if module.einsum_str is not None:
        parse_equation(module.einsum_str).sizes(module.shape)


_LAYERS.update(
    {
        nn.Dense: Layer("kernel", "dense", lambda call: DENSE, bias="bias"),
        nn.Einsum: Layer("kernel", "einsum", _einsum_equation, check=_check_einsum, bias="bias"),
        nn.DenseGeneral: Layer(
            "kernel",
            "dense_general",
            lambda call: dense_general_equation(
                call.argument(0, "inputs").ndim,
                call.module.axis,
                call.module.batch_dims,
                len(as_tuple(call.module.features)),
            ),
            bias="bias",
        ),
        nn.Conv: Layer(
            "kernel",
            "conv",
            lambda call: conv_equation(_window(call.module)),
            # A mask multiplies the kernel, and so the change of the kernel too.
            beside=lambda call: call.module.mask is None and _is_plain(call.module),
            bias="bias",
        ),
        nn.ConvTranspose: Layer(
            "kernel",
            "conv",
            lambda call: (
                conv_equation(_window(call.module))
                if not call.module.transpose_kernel
                else _transposed_conv_equation(_window(call.module))
            ),
            beside=lambda call: (
                call.module.mask is None
                and not call.module.transpose_kernel
                and _is_plain(call.module)
            ),
            bias="bias",
        ),
        nn.Embed: Layer(
            "embedding",
            "embed",
            lambda call: EMBED,
            input=lambda call: call.argument(0, embed_input(call)),
            methods=("__call__", "attend"),
            bias="bias",
        ),
    }
)


def embed_input(call: Call) -> str:
    """Name of the argument of a method of ``nn.Embed`` that is multiplied by the table."""
    return "query" if call.method == "attend" else "inputs"


def _window(module: nn.Conv | nn.ConvTranspose) -> int:
    return len(as_tuple(module.kernel_size))


def _transposed_conv_equation(window: int) -> str:
    equation = parse_equation(conv_equation(window))
    kernel = equation.kernel[:-2] + equation.kernel[-1] + equation.kernel[-2]
    return f"{equation.inputs},{kernel}->{equation.outputs}"


# Uniform within ±1/sqrt(fan-in): Kaiming's for a negative slope of sqrt(5).
_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

_ZEROS = nn.initializers.zeros_init()

_NORMAL = nn.initializers.normal(1.0)


def first_values(
    method: bool | str, rank: int, kind: str | None = None
) -> tuple[Initializer, Initializer]:
    """The initializers of ``a``, as a matrix ``(in, rank)``, and of ``b``, ``(rank, out)``.

    They are the same objects for equal arguments, so that rules that hold them compare equal.

    Args:
      method: ``init_lora_weights`` of a config. Those that look at weights or data start as
        ``True`` does, until `init_lora_weights` is called.
      rank: of the adapter.
      kind: kind of the layer; tables (``embed``) draw ``b`` and leave ``a`` zero.
    """
    if method == "orthogonal":
        return _orthogonal(rank, 0), _orthogonal(rank, 1)
    if kind == "embed":
        return (_NORMAL if method is False else _ZEROS), _NORMAL
    if method is False:
        return _UNIFORM, _UNIFORM
    return (_gaussian(rank) if method == "gaussian" else _UNIFORM), _ZEROS


@functools.cache
def _gaussian(rank: int) -> Initializer:
    return nn.initializers.normal(1 / rank)


@functools.cache
def _orthogonal(rank: int, half: int) -> Initializer:
    """Rows or columns in one half of an orthogonal basis of the rank: ``a·b`` is zero."""

    def draw(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Any:
        basis = nn.initializers.orthogonal()(jax.random.key(0), (rank, rank), jnp.float32)[half::2]
        length = shape[half]  # of the axis that is not the rank
        drawn = jax.random.normal(key, (length, len(basis))) @ basis / 10
        return (drawn if half == 0 else drawn.T).astype(dtype)

    return draw
