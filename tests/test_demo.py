"""The demo runs from its command line, checks itself, and leaves its files."""

import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import peft_jax as peft
from peft_jax import demo

SMALL = functools.partial(demo.DigitTransformer, width=48, depth=1)


@pytest.fixture
def brief(monkeypatch):
    """A demo of few steps on a smaller model of the same kind."""
    monkeypatch.setattr("peft_jax.demo._command.DigitTransformer", SMALL)
    monkeypatch.setattr("peft_jax.demo._adaptation.PRETRAINING_STEPS", 3)


@pytest.mark.minutes
@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.usefixtures("brief", "relaxed_promotion")
def test_demo_prints_tables_and_writes_its_files(tmp_path, capsys):
    out = tmp_path / "not" / "there" / "yet"
    demo.main(["--steps", "2", "--rank", "2", "--seed", "3", "--out", str(out)])

    printed = capsys.readouterr()
    for words in ("trainable parameters", "matched modules", "accuracy", "time of a step", "fused"):
        assert words in printed.out
    for method in peft.QuantizationMethod:
        assert f" {'float32' if method == 'none' else method.name} " in printed.out
    for name in ("LoRA", "QLoRA", "full fine-tuning"):
        assert f"\r{name:<16}: 100%" in printed.err, "no progress bar"
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    adapter = load_file(out / "adapter.safetensors")
    assert adapter["head/lora/a"].shape == (48, 2)
    assert adapter["block_0/attention/query/lora/b"].shape == (2, 3, 16)


@pytest.mark.slow
@pytest.mark.usefixtures("relaxed_promotion")
def test_check_of_fusing_fails_when_the_fused_model_answers_differently(monkeypatch):
    model, (digits, _) = SMALL(heads=3), demo.load_digits(0)
    rule = demo.LoRARule(rank=2)
    params = jax.jit(model.init)(jax.random.key(0), digits.images[:1])["params"]
    adapters, specs = demo.new_adapters(model, rule, digits, seed=0)
    adapters = jax.tree.map(lambda x: x + 0.01, adapters)
    base = demo.start_training("base", demo.logits_of(model), params, {}, 1e-3)
    lora = demo.start_training("LoRA", demo.logits_of(model, rule), adapters, params, 1e-3)
    adaptation = demo.Adaptation(base, lora, lora, base, specs)

    some = digits.take(np.arange(8))
    assert "same classes" in demo.check_fusing(adaptation, some)
    monkeypatch.setattr(peft, "fuse_params", lambda params, specs: peft.split_params(params)[0])
    with pytest.raises(SystemExit, match="fused model answers differently"):
        demo.check_fusing(adaptation, some)


@pytest.mark.parametrize("method", list(peft.QuantizationMethod)[1:])
def test_fitting_names_the_weights_that_a_method_can_store(method):
    model, image = SMALL(heads=3), np.zeros((1, 8, 8), np.float32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), image)["params"])
    specs = peft.layer_specs(model, image)
    weights = demo.fitting(params, specs, method)

    def stored(path):
        quantize = functools.partial(
            peft.quantize_checkpoint, method=method, specs=specs, select=lambda other: other == path
        )
        try:
            jax.eval_shape(quantize, params)
        except ValueError as error:
            if "do not divide" not in str(error):
                raise
            return False
        return True

    assert weights == {path for path in specs if stored(path)}
    assert weights


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        demo.main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--help", "--rank", "--steps", "--seed", "--out"):
        assert option in printed


@pytest.mark.parametrize("option", ["--rank", "--steps"])
def test_options_below_one_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        demo.main([option, "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_same_seed_same_data():
    (train, test), (again, _) = demo.load_digits(0), demo.load_digits(0)
    other, _ = demo.load_digits(1)
    assert (train.images == again.images).all()
    assert (train.images != other.images).any()
    assert len(train.labels) + len(test.labels) == 1797
    assert set(train.only(demo.NEW_DIGITS).labels) == set(demo.NEW_DIGITS)
