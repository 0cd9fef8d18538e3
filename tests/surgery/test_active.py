"""What is active where: jit's caches, exceptions, threads, and what is kept alive."""

import asyncio
import dataclasses
import functools
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import key_of

import peft_jax as peft

KEY = key_of(0)
X = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Adapt:
    """LoRA on every Dense, by a rule that compares by value."""

    rank: int = 2
    name: str | None = None

    def __call__(self, module):
        if isinstance(module, nn.Dense) and self.name in (None, module.name):
            return peft.LoRADense(rank=self.rank, wrapped=module)
        return module


LORA = peft.ModuleInterceptor(Adapt())


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(4)(x)))


def randomized(tree):
    """The same tree with random values: adapters that do something."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, leaf.dtype), tree)


def adapted(model, interceptor=LORA):
    """Variables whose adapters do something, and the model's outputs: plain and adapted."""
    with interceptor:
        variables = randomized(jax.eval_shape(lambda: model.init(KEY, X)))
        specs = peft.lora_specs(model, X)
    fused = {"params": peft.fuse_params(variables["params"], specs=specs)}
    base = {"params": peft.split_params(variables["params"]).original}
    return variables, model.apply(base, X), model.apply(fused, X)


def assert_same(actual, expected):
    chex.assert_trees_all_equal(actual, expected)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Scale(peft.Interceptor):
    """Multiplies what every Dense returns."""

    by: float

    def interceptor(self, next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        is_layer = isinstance(context.module, nn.Dense) and context.method_name == "__call__"
        return y * self.by if is_layer else y


# --- jit's caches --------------------------------------------------------------------------------


@nn.jit
class JittedBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x)


class WithJittedBlocks(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = JittedBlock()(x)
        return x


@pytest.mark.parametrize("model", [MLP(), WithJittedBlocks()], ids=["jax.jit", "nn.jit inside"])
@pytest.mark.parametrize("first", ["outside", "inside"])
def test_a_jitted_function_means_the_same_wherever_it_was_first_traced(model, first):
    variables, plain, expected = adapted(model)
    assert not np.allclose(plain, expected)
    traces = []

    @jax.jit
    def run(variables, x):
        traces.append(1)
        return model.apply(variables, x)

    def inside():
        with peft.ModuleInterceptor(Adapt()):
            assert_close(run(variables, X), expected)

    def outside():
        assert_close(run(variables, X), plain)

    steps = [outside, inside] if first == "outside" else [inside, outside]
    for step in 3 * steps:
        step()
    assert len(traces) == 2


def test_nn_jit_alone_means_the_same_wherever_it_was_first_traced():
    model = WithJittedBlocks()
    variables, plain, expected = adapted(model)
    for _ in range(2):
        with LORA:
            assert_close(model.apply(variables, X), expected)
        assert_same(model.apply(variables, X), plain)


def jitted(function):
    return jax.jit(function)


def scanned(function):
    def body(variables, _):
        return variables, function(variables)

    return lambda variables: jax.lax.scan(body, variables, None, length=1)[1][0]


@pytest.mark.parametrize("traced", [jitted, scanned])
@pytest.mark.parametrize("first", ["within the model", "at the top"])
def test_a_traced_function_means_the_same_at_the_top_and_within_a_model(traced, first):
    """Within a model, a layer on parameters of the model's own making is left alone."""
    layer = nn.Dense(3)
    variables, plain, expected = adapted(layer)
    run = traced(lambda variables: layer.apply(variables, jnp.asarray(X)))

    class Model(nn.Module):
        @nn.compact
        def __call__(self):
            return run(variables)

    def within():
        with LORA:
            assert_close(Model().apply({}), plain)

    def at_the_top():
        with LORA:
            assert_close(run(variables), expected)

    steps = [within, at_the_top] if first == "within the model" else [at_the_top, within]
    for step in 2 * steps:
        step()


def function_rule(module):
    return Adapt()(module)


class Owner:
    def rule(self, module):
        return Adapt()(module)


OWNER = Owner()
EQUAL_RULES = {
    "frozen dataclass": lambda: Adapt(),
    "function": lambda: function_rule,
    "bound method": lambda: OWNER.rule,
}


@pytest.mark.parametrize("build", EQUAL_RULES.values(), ids=EQUAL_RULES)
def test_equal_rules_share_one_program(build):
    model = MLP()
    variables, _, _ = adapted(model, peft.ModuleInterceptor(build()))

    @jax.jit
    @chex.assert_max_traces(1)
    def step(variables, x):
        return jax.grad(lambda v: jnp.sum(model.apply(v, x)))(variables)

    chex.clear_trace_counter()
    for _ in range(5):
        with peft.ModuleInterceptor(build()):
            step(variables, X)


@pytest.mark.parametrize("build", EQUAL_RULES.values(), ids=EQUAL_RULES)
def test_many_functions_under_one_rule_do_not_warn(build):
    model = MLP()
    for _ in range(6):
        with peft.ModuleInterceptor(build()):
            jax.eval_shape(lambda key: model.init(key, jnp.asarray(X)), KEY)
            jax.make_jaxpr(lambda x: model.init(KEY, x))(X)


def test_different_rules_are_different_programs():
    model, ranks = nn.Dense(3), []

    @jax.jit
    def init(key):
        params = model.init(key, X)["params"]
        ranks.append(params["lora"]["b"].shape[0])
        return params

    for rank in (1, 2, 1, 2):
        with peft.ModuleInterceptor(Adapt(rank)):
            assert init(KEY)["lora"]["b"].shape == (rank, 3)
    assert ranks == [1, 2]


def fresh_lambda():
    return lambda module: Adapt()(module)


def fresh_partial():
    return functools.partial(lambda rank, module: Adapt(rank)(module), 2)


@pytest.mark.parametrize("build", [fresh_lambda, fresh_partial])
def test_a_rule_built_anew_in_each_step_warns_after_the_third(build):
    model = MLP()
    variables, _, _ = adapted(model)
    step = jax.jit(lambda variables, x: model.apply(variables, x))
    rules = [build() for _ in range(5)]
    for rule in rules[:3]:
        with peft.ModuleInterceptor(rule):
            step.trace(variables, X)
    with (
        peft.ModuleInterceptor(rules[3]),
        pytest.warns(UserWarning, match=r"4 different rules.*frozen dataclass"),
    ):
        step.trace(variables, X)
    with peft.ModuleInterceptor(rules[4]):  # said once
        step.trace(variables, X)


# --- Nothing leaks -------------------------------------------------------------------------------


def assert_plain():
    """A model that runs now is plain, eagerly and under jit."""
    plain = {"kernel", "bias"}
    assert set(nn.Dense(3).init(KEY, X)["params"]) == plain
    assert set(traced_init(KEY)["params"]) == plain


@jax.jit
def traced_init(key):
    return nn.Dense(3).init(key, X)


class Failing(nn.Module):
    """Fails while the parameters of its layer are read through a rule."""

    @nn.compact
    def __call__(self, x):
        def fail(key, shape, dtype=jnp.float32):
            raise RuntimeError("the user's own error")

        return nn.Dense(3, bias_init=fail)(x)


def fails_in_the_rule(module):
    raise RuntimeError("the user's own error")


def fails_at_the_weight(module):
    return peft.LoRAWeight(rank=1, wrapped=module) if type(module) is Failing else module


@pytest.mark.parametrize("rule", [Adapt(), fails_in_the_rule, fails_at_the_weight])
@pytest.mark.parametrize("jitted", [False, True])
def test_exceptions_leave_no_state(rule, jitted):
    init = jax.jit(Failing().init) if jitted else Failing().init
    with pytest.raises(RuntimeError, match="own error"), peft.ModuleInterceptor(rule):
        init(KEY, X)
    assert_plain()
    with LORA, pytest.raises(RuntimeError, match="own error"):
        init(KEY, X)
    with LORA:
        assert "lora" in nn.Dense(3).init(KEY, X)["params"]
    assert_plain()


def test_an_exception_leaves_the_bound_modules_own_param():
    class Reader(nn.Module):
        def setup(self):
            self.kernel = self.param("kernel", nn.initializers.ones, (4, 4))

        def __call__(self, x):
            if x is None:
                raise RuntimeError("the user's own error")
            return x @ self.kernel

    class Lazy(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.ones, (4, 4))
            if x is None:
                raise RuntimeError("the user's own error")
            return x @ kernel

    def rule(module):
        return peft.LoRAWeight(rank=1, wrapped=module)

    for model in (Reader(), Lazy()):
        with peft.ModuleInterceptor(rule):
            variables = {"params": randomized(model.init(KEY, X)["params"])}
            expected = model.apply(variables, X)
            bound = model.bind(variables)
            with pytest.raises(RuntimeError, match="own error"):
                bound(None)
            assert "param" not in vars(bound)
            assert_same(bound(X), expected)


def test_closing_a_suspended_generator_closes_its_interceptor():
    variables, _, expected = adapted(nn.Dense(3))

    def adapting():
        with LORA:
            yield nn.Dense(3).apply(variables, X)
            raise AssertionError("closed before")

    generator = adapting()
    assert_close(next(generator), expected)
    generator.close()
    assert_plain()


@pytest.mark.parametrize("first_to_close", [0, 1])
def test_interceptors_closed_in_any_order_close_their_own(first_to_close):
    def held(name):
        with peft.ModuleInterceptor(Adapt(name=name)):
            yield

    generators = [held(f"Dense_{i}") for i in (0, 1)]
    for generator in generators:
        next(generator)
    generators[first_to_close].close()
    try:
        for init in (MLP().init, jax.jit(MLP().init)):
            params = init(KEY, X)["params"]
            found = {i for i in (0, 1) if "lora" in params[f"Dense_{i}"]}
            assert found == {1 - first_to_close}
    finally:
        generators[1 - first_to_close].close()
    assert_plain()


def test_threads_do_not_see_each_others_interceptors():
    model = MLP()
    variables, plain, expected = adapted(model)
    run = jax.jit(lambda variables, x: model.apply(variables, x))
    together = threading.Barrier(3, timeout=60)

    def inside():
        with LORA:
            results = []
            for _ in range(3):
                together.wait()
                results += [model.apply(variables, X), run(variables, X)]
            return results

    def outside():
        results = []
        for _ in range(3):
            together.wait()
            results += [model.apply(variables, X), run(variables, X)]
        return results

    with ThreadPoolExecutor(3) as pool:
        adapted_1, unadapted, adapted_2 = (pool.submit(f) for f in (inside, outside, inside))
        for y in (*adapted_1.result(), *adapted_2.result()):
            assert_close(y, expected)
        for y in unadapted.result():
            assert_close(y, plain)


def test_a_thread_that_inherits_the_context_is_plain():
    """`asyncio.to_thread` copies context variables, but Flax's hooks and jit's keys stay behind."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return peft.LoRADense(rank=2, wrapped=nn.Dense(3))(nn.Dense(4)(x))

    model = Model()
    variables = randomized(jax.eval_shape(lambda: model.init(KEY, X)))
    expected = model.apply(variables, X)

    async def main():
        with LORA:
            return await asyncio.to_thread(model.apply, variables, X)

    assert_same(asyncio.run(main()), expected)


@pytest.mark.parametrize("rule", [Adapt(), Adapt(rank=1)], ids=["the same", "another"])
def test_asyncio_tasks_that_pause_inside_the_statement_are_told(rule):
    """jit's keys belong to the thread, so that one task would be served the other's program."""
    model = MLP()
    variables, _, expected = adapted(model)
    refused = []

    async def inside():
        with LORA:
            assert_close(model.apply(variables, X), expected)
            await asyncio.sleep(0)
            assert_close(model.apply(variables, X), expected)

    async def other():
        with (
            pytest.raises(ValueError, match="Do not await inside"),
            peft.ModuleInterceptor(rule),
        ):
            raise AssertionError("the statement was entered")
        refused.append(rule)

    async def main():
        await asyncio.gather(inside(), other())

    asyncio.run(main())
    assert refused == [rule]
    assert_plain()


def test_asyncio_tasks_that_share_a_jitted_function():
    """jit's keys belong to the thread: the tasks pause outside of the `with` statement."""
    model = MLP()
    variables, plain, expected = adapted(model)
    run = jax.jit(model.apply)

    async def inside():
        for _ in range(3):
            with LORA:
                assert_close(run(variables, X), expected)
            await asyncio.sleep(0)

    async def outside():
        for _ in range(3):
            assert_close(run(variables, X), plain)
            await asyncio.sleep(0)

    async def main():
        await asyncio.gather(outside(), inside(), outside(), inside())

    asyncio.run(main())


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_no_module_is_kept_alive(jitted):
    seen = []

    def rule(module):
        seen.append(weakref.ref(module))
        replacement = Adapt()(module)
        seen.append(weakref.ref(replacement))
        return replacement

    interceptor = peft.ModuleInterceptor(rule)
    fields = dict(vars(interceptor))

    def run():
        model = MLP()
        with interceptor:
            init = jax.jit(lambda key, x: model.init(key, x)) if jitted else model.init
            return init(KEY, X)

    params = run()["params"]
    gc.collect()
    assert len(seen) >= 6
    assert [ref() for ref in seen if ref() is not None] == []
    assert vars(interceptor) == fields
    assert "lora" in params["Dense_0"]


def test_an_interceptor_can_be_used_again():
    interceptor = peft.ModuleInterceptor(Adapt())
    trees = []
    for _ in range(2):
        with interceptor:
            trees.append(MLP().init(KEY, X))
        assert_plain()
    assert_same(*trees)


def test_jit_knows_of_an_interceptor_of_the_users_own():
    model, traces = nn.Dense(3), []
    variables, plain, _ = adapted(model)

    @jax.jit
    def run(variables, x):
        traces.append(1)
        return model.apply(variables, x)

    assert_close(run(variables, X), plain)
    for by in (2.0, 3.0, 2.0):
        with Scale(by):
            assert_close(run(variables, X), by * plain)
    assert_close(run(variables, X), plain)
    assert len(traces) == 3
