"""The demo runs from its command line, checks itself, and leaves its files."""

import functools

import pytest
from safetensors.numpy import load_file

import peft_jax as peft
from peft_jax import demo


@pytest.fixture
def brief(monkeypatch):
    """A demo of few steps on a smaller model of the same kind."""
    small = functools.partial(demo.DigitTransformer, width=16, depth=1)
    monkeypatch.setattr(demo, "DigitTransformer", small)
    monkeypatch.setattr(demo, "PRETRAINING_STEPS", 3)


@pytest.mark.usefixtures("brief", "relaxed_promotion")
def test_demo_prints_a_table_and_writes_its_files(tmp_path, capsys):
    out = tmp_path / "not" / "there" / "yet"
    demo.main(["--steps", "2", "--rank", "2", "--seed", "3", "--out", str(out)])

    printed = capsys.readouterr()
    for words in ("trainable parameters", "matched modules", "accuracy", "time of a step", "fused"):
        assert words in printed.out
    assert "LoRA" in printed.err, "no progress bar"
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    adapter = load_file(out / "adapter.safetensors")
    assert adapter["head/lora/a"].shape == (16, 2)
    assert adapter["block_0/attention/query/lora/b"].shape == (2, 4, 4)


@pytest.mark.usefixtures("brief", "relaxed_promotion")
def test_demo_fails_when_the_fused_model_answers_differently(tmp_path, monkeypatch):
    monkeypatch.setattr(peft, "fuse_params", lambda params, specs: peft.split_params(params)[0])
    with pytest.raises(SystemExit, match="fused model answers differently"):
        demo.main(["--steps", "2", "--out", str(tmp_path)])


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
