"""What an abstract run finds: roles of axes, what needs the dense weight, inputs and outputs."""

import jax
import jax.numpy as jnp
import pytest

from peft_jax._numerics import lazy_weight, uses_of

B, C, P = "batch", "contracted", "produced"


def uses(function, weights, *inputs):
    """Uses of the weights of ``function(weights, *inputs)``, given as shapes."""
    given = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in weights.items()}

    def run(frame, given, inputs):
        lazy = {name: frame.lazy(lazy_weight(value, name)) for name, value in given.items()}
        return function(lazy, *inputs)

    return uses_of(run, given, [jnp.zeros(x) if isinstance(x, tuple) else x for x in inputs])


IDS = jnp.zeros((2, 3), jnp.int32)
ROLES = {
    "dense": (lambda w, x: x @ w, (4, 5), (3, 4), (C, P)),
    "transposed": (lambda w, x: x @ w.T, (4, 5), (3, 5), (P, C)),
    "heads": (lambda w, x: jnp.einsum("btd,dnh->btnh", x, w), (4, 2, 3), (1, 2, 4), (C, P, P)),
    "experts": (lambda w, x: jnp.einsum("ebd,edh->ebh", x, w), (3, 4, 5), (3, 2, 4), (B, C, P)),
    "flat": (
        lambda w, x: jnp.einsum("bd,dnh->bnh", x, w.reshape(4, 2, 3)),
        (4, 6),
        (2, 4),
        (C, P),
    ),
    "flat, a part batch": (
        lambda w, x: jnp.einsum("bnd,dnh->bnh", x, w.reshape(4, 2, 3)),
        (4, 6),
        (2, 2, 4),
        (C, P),
    ),
    "split": (lambda w, x: (x @ w[0]) * (x @ w[1]), (2, 4, 5), (3, 4), (B, C, P)),
    "scanned": (
        lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0],
        (3, 4, 4),
        (2, 4),
        (B, C, P),
    ),
    "lookup": (lambda w, x: w[x], (7, 5), IDS, (C, P)),
    "tied": (lambda w, x: w[x] @ w.T, (7, 5), IDS, (C, P)),
    "convolution": (
        lambda w, x: jax.lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (3, 4, 6),
        (2, 8, 4),
        (C, C, P),
    ),
    "ragged": (
        lambda w, x: jax.lax.ragged_dot(x, w, jnp.asarray([1, 2])),
        (2, 4, 5),
        (3, 4),
        (B, C, P),
    ),
    "attention vector": (lambda w, x: jnp.sum(x * w[None], -1), (2, 5), (3, 2, 5), (B, C)),
    "contracted and produced": (lambda w, x: x @ w.reshape(4, 5), (20,), (3, 4), None),
    "norm": (lambda w, x: x @ (w / jnp.max(w)), (4, 5), (3, 4), (C, P)),
    "added": (lambda w, x: x + w[:3], (4, 5), (3, 5), None),
}


@pytest.mark.parametrize(("function", "weight", "x", "roles"), ROLES.values(), ids=ROLES)
def test_roles_of_axes(function, weight, x, roles):
    found = uses(lambda w, x: function(w["w"], x), {"w": weight}, x)
    assert found["w"].shape == weight
    assert found["w"].roles == roles


def test_operations_that_need_the_dense_weight():
    def function(w, x):
        return x @ w["product"] @ jnp.tanh(w["inside"]) + w["added"][:2], w["returned"].T

    found = uses(
        function, dict.fromkeys(("product", "inside", "added", "returned"), (4, 4)), (2, 4)
    )
    assert {name: use.dense for name, use in found.items()} == {
        "product": (),
        "inside": ("tanh",),
        "added": ("add",),
        "returned": ("output",),
    }


def test_what_flows_from_the_inputs():
    def function(w, x, ids):
        table = w["table"][ids]
        positions = w["positions"][jnp.arange(3)][
            None
        ]  # constant indices: no product with an input
        state = jnp.ones(4) @ w["state"]
        return (x[None] + table + positions + state[None, None]) @ w["head"]

    shapes = {"table": (7, 4), "positions": (3, 4), "state": (4, 4), "head": (4, 7)}
    found = uses(function, shapes, (3, 4), IDS)
    assert {name: use.is_multiplied for name, use in found.items()} == {
        "table": False,
        "positions": False,
        "state": False,
        "head": True,
    }
    assert {name: use.is_lookup for name, use in found.items()} == {
        "table": True,
        "positions": True,
        "state": False,
        "head": False,
    }


INSIDE = {
    "sine": lambda w, x: x @ jnp.sin(w),
    "masked": lambda w, x: x @ jnp.where(jnp.eye(4) > 0, w, 0),
    "loop": lambda w, x: jax.lax.fori_loop(0, x.astype(int)[0, 0], lambda _, x: x @ w, x),
    "switch": lambda w, x: jax.lax.switch(1, [lambda x: x @ w, lambda x: -x @ w], x),
    "cond": lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: -x @ w, x),
    "product of weights": lambda w, x: x @ (w @ w),
}


@pytest.mark.parametrize("name", INSIDE)
def test_products_with_what_is_made_of_a_weight(name):
    """The weight is needed dense, and still a matrix product contracts it with an input."""
    found = uses(lambda w, x: INSIDE[name](w["w"], x), {"w": (4, 4)}, (3, 4))["w"]
    assert found.roles is None
    assert found.dense
    assert found.is_multiplied
    assert found.is_last


def test_what_is_added_is_not_multiplied():
    def function(w, x):
        return jnp.tanh(x + w["positions"]) @ w["w"] * w["gate"]

    shapes = {"positions": (3, 4), "w": (4, 5), "gate": (3, 5)}
    found = uses(function, shapes, (3, 4))
    assert {name: use.is_multiplied for name, use in found.items()} == {
        "positions": False,
        "w": True,
        "gate": False,
    }


def power_iteration(w, x):
    """The outputs are contracted first, by a vector of a state."""
    u = jnp.ones(5)
    v = jax.lax.stop_gradient(w["w"] @ u)
    return x @ w["w"] / jnp.linalg.norm(v)


def test_the_product_that_decides_is_one_with_the_inputs():
    found = uses(power_iteration, {"w": (4, 5)}, (3, 4))
    assert found["w"].roles == (C, P)


def blocks(w, x):
    def body(x, w):
        up = jnp.tanh(x @ w["up"])
        return x + up @ w["down"], None

    x, _ = jax.lax.scan(body, x, {"up": w["up"], "down": w["down"]})
    return jnp.where(x[0, 0] > 0, x, -x) @ w["head"]


def test_the_last_product_is_followed_by_none():
    shapes = {"up": (3, 4, 7), "down": (3, 7, 4), "head": (4, 7)}
    found = uses(blocks, shapes, (2, 4))
    assert {name: use.is_last for name, use in found.items()} == {
        "up": False,
        "down": False,
        "head": True,
    }


@pytest.mark.parametrize(
    "around",
    [
        jax.jit,
        jax.checkpoint,
        lambda f: jax.vmap(f, in_axes=(None, 0)),
        lambda f: lambda w, x: jax.lax.cond(x.sum() > 0, f, lambda w, x: 2 * f(w, x), w, x),
        lambda f: lambda w, x: jax.grad(lambda x: f(w, x).sum())(x),
    ],
    ids=["jit", "checkpoint", "vmap", "cond", "grad"],
)
def test_transformations_around_the_products(around):
    def function(w, x):
        return around(lambda w, x: jnp.tanh(x @ w["one"]) @ w["two"])(w, x)

    found = uses(function, {"one": (4, 5), "two": (5, 3)}, (2, 4))
    if found["one"].roles is not None:  # the branches of a cond take dense weights
        assert found["one"].roles == found["two"].roles == (C, P)
        assert found["one"].is_multiplied
        assert found["two"].is_multiplied
    else:
        assert found["one"].dense == ("cond",)
