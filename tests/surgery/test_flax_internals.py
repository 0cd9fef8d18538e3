"""Facts about Flax that its documentation does not promise, each on a small module.

A test that fails here names what a new release changed, and the one function to change.
"""

import threading

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from peft_jax._surgery import (
    Scope,
    bind_in_place,
    child_scope,
    has_returned,
    inside_lift,
    is_lifted,
    is_lifted_function,
    is_placed_by_context,
    is_setup_check,
    lifts_around,
    method_hook,
    params_of,
    patched,
    rngs_of,
    root_of,
    scope_for_init,
    set_attribute,
)

X = jnp.ones((2, 3))


def scopes(model, names=("__call__",)):
    """What the scope of each layer tells while the model is initialized, by its path."""
    seen = {}

    def hook(next_fun, args, kwargs, context):
        scope = context.module.scope
        if context.method_name in names and not is_setup_check(scope):
            seen.setdefault("/".join(scope.path), (scope, lifts_around(scope), inside_lift(scope)))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(hook):
        jax.eval_shape(model.init, jax.random.key(0), X)
    return seen


class Calling(nn.Module):
    """Calls what a function makes, from inside a model."""

    make: object

    @nn.compact
    def __call__(self, x):
        return self.make(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(3, name="dense")(x), None


STACK = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
LIFTED = {
    "nothing": (lambda x: Layer(name="a")(x), ()),
    "nn.scan": (lambda x: nn.scan(Layer, length=2, **STACK)(name="a")(x, None), ("scan",)),
    "nn.vmap": (
        lambda x: nn.vmap(Layer, axis_size=2, in_axes=None, **STACK)(name="a")(x),
        ("vmap",),
    ),
    "nn.remat": (lambda x: nn.remat(Layer)(name="a")(x), ("remat",)),
    "nn.checkpoint": (lambda x: nn.checkpoint(Layer)(name="a")(x), ("remat",)),
    "nn.jit": (lambda x: nn.jit(Layer)(name="a")(x), ("jit",)),
    "nn.map_variables": (
        lambda x: nn.map_variables(Layer, "params", lambda v: v, init=True)(name="a")(x),
        ("map_variables",),
    ),
    "nn.scan of nn.remat": (
        lambda x: nn.scan(nn.remat(Layer), length=2, **STACK)(name="a")(x, None),
        ("remat", "scan"),
    ),
    "nn.remat of nn.scan": (
        lambda x: nn.remat(nn.scan(Layer, length=2, **STACK))(name="a")(x, None),
        ("scan", "remat"),
    ),
}


@pytest.mark.parametrize(("make", "lifts"), LIFTED.values(), ids=LIFTED)
def test_the_lifts_around_a_module_are_told(make, lifts):
    seen = scopes(Calling(make))
    for path in ("a", "a/dense"):
        scope, found, inside = seen[path]
        assert found == lifts
        assert inside == bool(lifts)
        assert "/".join(scope.path) == path
    scope, found, inside = seen[""]
    assert not found
    assert not inside


def test_lifts_of_modules_above_are_told_too():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(nn.remat(Layer), length=2, **STACK)(name="b")(x, None)

    seen = scopes(Calling(lambda x: nn.remat(Outer)(name="a")(x)))
    assert seen["a/b/dense"][1] == ("remat", "scan", "remat")


def test_lifts_of_a_model_itself_are_told():
    assert scopes(nn.remat(nn.Dense)(3))[""][1:] == (("remat",), True)


@pytest.mark.parametrize("lift", [nn.remat, nn.jit, nn.vmap, nn.scan])
def test_lifted_classes_are_subclasses_that_are_told(lift):
    cls = (
        lift(nn.Dense, variable_axes={"params": 0})
        if lift in (nn.vmap, nn.scan)
        else lift(nn.Dense)
    )
    written = [base for base in cls.__mro__ if not is_lifted(base)]
    assert is_lifted(cls)
    assert written[0] is nn.Dense
    assert is_lifted(nn.remat(cls))


def test_functions_that_a_lift_runs_are_told_from_methods():
    called = set()

    def hook(next_fun, args, kwargs, context):
        module = type(context.module)
        if module is nn.Dense:
            called.add((context.method_name, is_lifted_function(module, context.method_name)))
        return next_fun(*args, **kwargs)

    def function(module, x):
        return module(x)

    with nn.intercept_methods(hook):
        model = Calling(lambda x: nn.remat(function)(nn.Dense(3), x))
        jax.eval_shape(model.init, jax.random.key(0), X)
    assert {("function", True), ("__call__", False)} <= called


class WithSetup(nn.Module):
    def setup(self):
        self.dense = nn.Dense(3)

    def __call__(self, x):
        return self.dense(x)


def test_setup_is_checked_on_a_root_of_its_own_kind():
    checks = []

    def hook(next_fun, args, kwargs, context):
        if context.method_name == "setup":
            scope = context.module.scope
            checks.append((is_setup_check(scope), bool(rngs_of(scope)), bool(scope.variables())))
        return next_fun(*args, **kwargs)

    model = Calling(lambda x: nn.remat(WithSetup)(name="a")(x))
    variables = model.init(jax.random.key(0), X)
    with nn.intercept_methods(hook):
        model.apply(variables, X)
    assert set(checks) == {(True, False, False), (False, False, True)}


def test_roots_are_equal_by_their_variables_and_die_with_their_call():
    roots = []

    def hook(next_fun, args, kwargs, context):
        roots.append(root_of(context.module.scope))
        assert not has_returned(roots[-1])
        return next_fun(*args, **kwargs)

    model = Calling(lambda x: nn.Dense(3)(x))
    with nn.intercept_methods(hook):
        variables = model.init(jax.random.key(0), X)
        model.apply(variables, X)
    assert {type(root) for root in roots} == {Scope}
    first, second = roots[: len(roots) // 2], roots[len(roots) // 2 :]
    assert all(root == first[0] for root in first)
    assert all(root == second[0] for root in second)
    assert first[0] != second[0]
    assert all(map(has_returned, roots))


def test_roots_of_failed_calls_are_dead_too():
    roots = []

    def make(x):
        raise RuntimeError("no")

    def hook(next_fun, args, kwargs, context):
        roots.append(root_of(context.module.scope))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(hook), pytest.raises(RuntimeError, match="no"):
        Calling(make).init(jax.random.key(0), X)
    assert all(map(has_returned, roots))


def test_modules_are_put_into_child_scopes_of_names_in_use():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.Dense(3, parent=child_scope(self.scope, "beside"), name="beside")(x)
            return x

    params = jax.eval_shape(Twice().init, jax.random.key(0), X)["params"]
    assert set(params) == {"beside"}
    assert set(params["beside"]) == {"kernel", "bias"}


def test_a_copy_is_initialized_on_a_scope_of_its_path():
    made = {}

    class Copying(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(3, name="dense")
            with scope_for_init(layer.scope, rngs_of(layer.scope)) as scope:
                assert scope.path == ("dense",)
                assert inside_lift(scope)
                assert root_of(scope) is scope
                copy = layer.copy(parent=scope, name=layer.name)
                assert copy.is_initializing()
                copy(x)
                made.update(params_of(scope))
            assert has_returned(scope)
            return layer(x)

    params = Copying().init(jax.random.key(0), X)["params"]["dense"]
    assert set(made) == {"kernel", "bias"}
    assert jnp.array_equal(made["kernel"], params["kernel"])  # the keys follow from the path


# --- Bound modules -------------------------------------------------------------------------------


def test_hooks_of_one_function_are_left_in_any_order():
    calls = []

    def hook(next_fun, args, kwargs, context):
        calls.append(context)
        return next_fun(*args, **kwargs)

    def run():
        calls.clear()
        nn.Dense(3).apply({"params": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}}, X)
        return len([c for c in calls if c.method_name == "__call__"])

    first, second, third = (method_hook(hook) for _ in range(3))
    for i, entered in enumerate((first, second, third)):
        entered.__enter__()
        assert run() == i + 1
        assert len({id(c) for c in calls if c.method_name == "__call__"}) == 1  # one for a call
    others = []
    thread = threading.Thread(target=lambda: others.append(run()))
    thread.start()
    thread.join()
    assert others == [0]
    for i, left in enumerate((second, first, third)):
        left.__exit__(None, None, None)
        assert run() == 2 - i


def test_the_hook_that_was_entered_first_is_called_first():
    order = []

    def hook(name):
        def run(next_fun, args, kwargs, context):
            order.append(name)
            return next_fun(*args, **kwargs)

        return run

    with method_hook(hook("outer")), method_hook(hook("inner")):
        Calling(lambda x: x).apply({}, X)
    assert order == ["outer", "inner"]


def test_modules_tell_who_finds_their_parent():
    told = []

    class Telling(nn.Module):
        def __post_init__(self):
            told.append(is_placed_by_context(self))
            super().__post_init__()

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            Telling()
            Telling(parent=None)
            Telling(parent=child_scope(self.scope, "c"), name="c")
            return x

    Telling()
    Model().apply({}, X)
    assert told == [True, True, False, False]


def test_attributes_of_modules_are_set_and_read_by_their_own_methods():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            def param(name, *args, **kwargs):
                return f"read {name}"

            before = self.param
            with patched(self, "param", param):
                assert self.read() == "read w"
                assert "param" in self.__dict__
            assert "param" not in self.__dict__
            assert self.param == before
            set_attribute(self, "noted", 3)
            with patched(self, "noted", 4):
                assert self.noted == 4
            assert self.noted == 3
            assert not hasattr(self.clone(parent=None), "noted")
            return x

        def read(self):
            return self.param("w", nn.initializers.zeros, (1,))

    Model().apply({}, X)


class Hidden:
    """Not a module, so that Flax does not take what is in it for a child."""

    def __init__(self, module):
        self.module = module


def test_modules_that_wait_are_bound_in_place():
    class Model(nn.Module):
        def setup(self):
            waiting, scope = nn.Dense(3), child_scope(self.scope, "held")
            assert waiting.scope is None
            bind_in_place(waiting, scope, "held")
            assert waiting.scope is scope
            self.hidden = Hidden(waiting)

        def __call__(self, x):
            return self.hidden.module(x)

    params = jax.eval_shape(Model().init, jax.random.key(0), X)["params"]
    assert {name: set(layer) for name, layer in params.items()} == {"held": {"kernel", "bias"}}


def test_modules_made_in_setup_wait_for_a_scope():
    """So a rule makes them in the `setup` of a host, and they are bound where they shall lie."""
    made = []

    class Host(nn.Module):
        def setup(self):
            self.hidden = Hidden(nn.Dense(3))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            waiting = Host(parent=self.scope, name="host").hidden.module
            assert waiting.scope is None
            made.append(waiting)
            return waiting.clone(parent=child_scope(self.scope, "dense"), name="dense")(x)

    params = jax.eval_shape(Model().init, jax.random.key(0), X)["params"]
    assert set(params) == {"dense"}
    assert made
