"""Adapters learn: on the demo's task, each variant and each initialiser brings the loss down.

A small model of the demo's kind knows the digits 0 to 4 and learns 5 to 9. Each case says the loss
over a fixed slice of the new digits before the first step, and a bound that it must fall below in
`STEPS` steps; the bounds are some 1.4 times the losses that were measured.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import peft_jax as peft
from peft_jax import demo

STEPS = 40
SLICE = 160  # images
LINEAR = ("query", "key", "value", "out", "up", "down", "head")


class Shades(nn.Module):
    """Classifies images whose pixels are tokens: one of 17 shades each."""

    @nn.compact
    def __call__(self, images):
        shades = jnp.round(16 * images).astype(jnp.int32)
        x = nn.Embed(17, 8, name="shade")(shades).reshape(len(images), -1)
        return nn.Dense(10, name="head")(nn.gelu(nn.Dense(32, name="up")(x)))


MODEL = demo.DigitTransformer(width=32, depth=1, heads=1)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, and how far the loss must fall.

    Attributes:
      bound: of the loss after `STEPS` steps.
      fields: of the `LoraConfig`.
      before: the loss before the first.
      stored: the method by which the base is stored in few bits.
      model: what is adapted.
    """

    bound: float
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    before: float = 7.01
    stored: str | None = None
    model: nn.Module = MODEL

    def config(self, method=True):
        """The config, with the name of an initialiser."""
        fields = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **self.fields}
        return peft.LoraConfig(**fields, init_lora_weights=method)

    @property
    def rules(self):
        if self.stored is None:
            return ()
        return (demo.StorageRule(self.stored, frozenset(linear_specs())),)


FEW = {"target_modules": ["query", "value"]}
VARIANTS = {
    "lora": Case(1.6),
    "rslora": Case(1.3, {"use_rslora": True}),
    "dora": Case(1.6, {"use_dora": True}),
    "dora on int4": Case(1.7, {"use_dora": True}, before=7.22, stored="int4"),
    "lora bias": Case(1.5, {"lora_bias": True}),
    "dropout": Case(1.8, {"lora_dropout": 0.2}),
    "saved head": Case(1.7, {**FEW, "modules_to_save": ["head"]}),
    "all biases": Case(2.0, {**FEW, "bias": "all"}),
    "token rows": Case(
        2.5,
        {"target_modules": ["up"], "trainable_token_indices": [0, 15, 16]},
        before=14.83,
        model=Shades(),
    ),
}
LOFTQ = peft.LoftQConfig(method="int4", loftq_iter=2, store=True)
INITIALISERS = {
    "gaussian": Case(1.4),
    "orthogonal": Case(1.7),
    "pissa": Case(1.3),
    "pissa_niter_4": Case(1.3),
    "olora": Case(1.0),
    "eva": Case(1.1),
    "corda": Case(2.0),
    "loftq": Case(2.0, {"loftq_config": LOFTQ}, stored="int4"),
}
QUICK = ("lora", "dora", "pissa")


def key_of(seed):
    """The bounds are those of these draws."""
    return jax.random.key(seed, impl="rbg")


def each(cases):
    """The cases, of which `make test` runs the quick ones."""
    return [
        pytest.param(name, case, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, case in cases.items()
    ]


@functools.cache
def digits_of(digits):
    return demo.load_digits(0)[0].only(digits).take(np.arange(SLICE))


@functools.partial(jax.jit, static_argnames=("model", "config", "rules", "steps"))
def train(params, digits, model, config=None, rules=(), steps=STEPS):
    """The parameters, and the losses before and after steps on all the images at once."""
    images, labels = digits

    def loss_of(params, **options):
        with contextlib.ExitStack() as stack:
            for rule in rules:
                stack.enter_context(peft.ModuleInterceptor(rule))
            logits = model.apply({"params": params}, images, **options)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def kinds(tree):
        mask = peft.trainable_mask(tree, config)
        return jax.tree.map(lambda trained: "train" if trained else "freeze", mask)

    # `optax.set_to_zero` fails where stored values are frozen: integers have no gradient.
    freeze = optax.stateless(lambda _, params: jax.tree.map(jnp.zeros_like, params))
    optimizer = optax.adam(5e-3)
    if config is not None:
        optimizer = optax.multi_transform({"train": optimizer, "freeze": freeze}, kinds)

    def step(carry, key):
        params, state = carry
        gradients = jax.grad(loss_of, allow_int=True)(params, rngs={"dropout": key})
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    # Not of `key_of`: as programs are compiled here, its numbers take most of a step with dropout.
    keys = jax.random.split(jax.random.key(1), steps)
    carry = params, optimizer.init(params)
    (trained, _), _ = jax.lax.scan(step, carry, keys)
    return trained, loss_of(params), loss_of(trained)


def arrays_of(digits):
    return digits_of(digits).images, digits_of(digits).labels


@functools.cache
def linear_specs():
    """The specs of the kernels that are adapted, and stored where a case says so."""
    specs = peft.layer_specs(MODEL, digits_of(demo.NEW_DIGITS).images)
    return {path: spec for path, spec in specs.items() if path.split("/")[-2] in LINEAR}


@functools.cache
def pretrained(model):
    images, labels = arrays_of(demo.OLD_DIGITS)
    params = jax.jit(model.init)(key_of(0), images)["params"]
    params, _, after = train(params, (images, labels), model, steps=2 * STEPS)
    assert after < 0.2, "the model has not learned its first task"
    return params


def start(base, specs, **given):
    """Adapters and the base that goes with them, in one program, which compiles fast."""
    run = jax.jit(lambda base, key: peft.init_lora_weights(base, specs, key, **given))
    return peft.merge_params(*run(base, key_of(1)))


def check_learns(case, model, params):
    """The loss has fallen as stated; all that is to be trained has moved, and nothing else has."""
    config, digits = model.peft_config, arrays_of(demo.NEW_DIGITS)
    trained, before, after = train(params, digits, model, config, case.rules)
    np.testing.assert_allclose(before, case.before, rtol=0.1)
    assert after < case.bound
    moved = [
        bool(jnp.any(old != new))
        for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(trained), strict=True)
    ]
    assert moved == jax.tree.leaves(peft.trainable_mask(params, config))


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize(("name", "case"), each(VARIANTS))
def test_variant_learns(name, case):
    base, images = pretrained(case.model), digits_of(demo.NEW_DIGITS).images
    model = peft.get_peft_model(case.model, case.config())
    if case.stored is not None:
        specs = linear_specs()
        base = peft.quantize_checkpoint(
            base, method=case.stored, specs=specs, select=specs.__contains__
        )
    check_learns(case, model, start(base, peft.lora_specs(model, images)))


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize(("method", "case"), each(INITIALISERS))
def test_initialiser_learns(method, case):
    base, images = pretrained(case.model), digits_of(demo.NEW_DIGITS).images
    config, given = case.config(method), {}
    model = peft.get_peft_model(case.model, config)
    if method == "eva":  # which gives the layers their ranks, too
        model, params = peft.initialize_lora_eva_weights(model, base, [images], key=key_of(1))
    else:
        if method == "corda":
            given["statistics"] = peft.collect_covariances(model, base, [images])
        specs = peft.lora_specs(model, images)
        params = start(base, specs, method=method, config=config.loftq_config, **given)
    check_learns(case, model, params)
