"""One pretrained model, adapted in three ways, and the table that compares them."""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util
from jax import Array
from rich.table import Table

import peft_jax as peft
from peft_jax.demo._digits import NEW_DIGITS, OLD_DIGITS, Digits
from peft_jax.demo._methods import fitting, nbytes
from peft_jax.demo._rules import LoRARule, StorageRule
from peft_jax.demo._training import Logits, Params, Training, start_training, time_steps, train

Specs = dict[str, peft.LoraSpec]

PRETRAINING_STEPS = 150
QLORA_METHOD = "q4_0"


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """A pretrained model, adapted in three ways.

    Attributes:
      base: the pretrained model.
      lora: the model whose adapters were trained.
      qlora: the same over the base in four bits.
      full: the model of which everything was trained.
      specs: what each adapter does to its kernel.
    """

    base: Training
    lora: Training
    qlora: Training
    full: Training
    specs: Specs


def logits_of(model: nn.Module, *rules: Callable[[nn.Module], nn.Module]) -> Logits:
    """The answers of the model under some rules."""

    def logits(trainable: Params, frozen: Params, images: Array) -> Any:
        params = peft.merge_params(frozen, trainable) if frozen else trainable
        with ExitStack() as stack:
            for rule in rules:
                stack.enter_context(peft.ModuleInterceptor(rule))
            return model.apply({"params": params}, images)

    return logits


def pretrain(model: nn.Module, digits: Digits, seed: int) -> Training:
    """Trains all of a new model on the old digits."""
    params = jax.jit(model.init)(jax.random.key(seed), digits.images[:1])["params"]
    base = start_training("pretraining", logits_of(model), params, {}, learning_rate=1e-3)
    return train(base, digits.only(OLD_DIGITS), PRETRAINING_STEPS, seed)


def new_adapters(
    model: nn.Module, rule: LoRARule, digits: Digits, seed: int
) -> tuple[Params, Specs]:
    """Adapters that change nothing yet, and their specs."""
    example = digits.images[:1]
    with peft.ModuleInterceptor(rule):
        params = jax.jit(model.init)(jax.random.key(seed), example)["params"]
        specs = peft.lora_specs(model, example)
    return peft.split_params(params)[1], specs


def adapt(model: nn.Module, digits: Digits, rank: int, steps: int, seed: int) -> Adaptation:
    """Trains `model` on the old digits, then adapts it to the new ones in three ways."""
    rule, new_digits = LoRARule(rank), digits.only(NEW_DIGITS)
    base = pretrain(model, digits, seed)
    adapters, specs = new_adapters(model, rule, digits, seed)

    lora = start_training("LoRA", logits_of(model, rule), adapters, base.trainable, 2e-3)
    lora = train(lora, new_digits, steps, seed)

    kernels = peft.layer_specs(model, digits.images[:1])
    weights = fitting(base.trainable, kernels, QLORA_METHOD)
    stored = peft.quantize_checkpoint(
        base.trainable, method=QLORA_METHOD, specs=kernels, select=weights.__contains__
    )
    storage = StorageRule(QLORA_METHOD, weights)
    qlora = start_training("QLoRA", logits_of(model, rule, storage), adapters, stored, 2e-3)
    qlora = train(qlora, new_digits, steps, seed)

    full = start_training("full fine-tuning", logits_of(model), base.trainable, {}, 1e-3)
    full = train(full, new_digits, steps, seed)
    return Adaptation(base, lora, qlora, full, specs)


def table_of(adaptation: Adaptation, train_digits: Digits, test_digits: Digits) -> Table:
    """Compares the ways: sizes, accuracies on digits that no training saw, time of a step."""
    base, lora = adaptation.base, adaptation.lora
    qlora, full = adaptation.qlora, adaptation.full
    whole, adapters = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (base.trainable, lora.trainable)
    )
    modules = {path[:-1] for path in traverse_util.flatten_dict(base.trainable)}
    table = Table("", title="A model of the digits 0 to 4 learns the digits 5 to 9")
    for name in ("LoRA", f"QLoRA ({QLORA_METHOD.upper()})", "full"):
        table.add_column(name, justify="right")
    matched = f"{len(adaptation.specs)} of {len(modules)}"
    table.add_row("parameters of the model", *[f"{whole:,}"] * 3)
    table.add_row("of its adapters", f"{adapters:,}", f"{adapters:,}", "-")
    share = f"{adapters / (whole + adapters):.1%}"
    table.add_row("trainable parameters of all", share, share, "100.0%")
    table.add_row("matched modules of all", matched, matched, "-")
    frozen = (f"{nbytes(training.frozen) / 1024:.0f} KiB" for training in (lora, qlora))
    table.add_row("frozen weights", *frozen, "-")

    bare = dataclasses.replace(base, trainable=lora.frozen)
    restored = dataclasses.replace(base, trainable=peft.dequantize_checkpoint(qlora.frozen))
    for name, digits in (("5 to 9", NEW_DIGITS), ("0 to 4", OLD_DIGITS)):
        before, by_lora, by_qlora, by_full, without, without_q = (
            f"{training.accuracy(test_digits, among=digits):.1%}"
            for training in (base, lora, qlora, full, bare, restored)
        )
        table.add_section()
        table.add_row(f"accuracy on {name} before", before, without_q, before)
        table.add_row("after", by_lora, by_qlora, by_full)
        table.add_row("after, adapters taken off", without, without_q, "-")
    table.add_section()
    times = time_steps((lora, qlora, full), train_digits)
    table.add_row("time of a step", *(f"{time:.1f} ms" for time in times))
    return table
