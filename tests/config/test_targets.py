"""Which paths a config names. Cases marked as recorded were run with Hugging Face's peft 0.18.1."""

import time

import pytest

from peft_jax._config import (
    TARGETS_BY_MODEL_TYPE,
    LoraConfig,
    alpha_of,
    check_entries,
    is_all_linear,
    is_saved,
    layer_index,
    rank_of,
    scaling_of,
    selects,
    selects_parameter,
    tokens_of,
    with_targets,
)


def path(text):
    return tuple(text.split("."))


MODULES = tuple(
    path(name)
    for name in (
        "model",
        "model.wte",
        "model.h.0.attn.q",
        "model.h.0.attn.q_proj",
        "model.h.0.mlp.fc",
        "model.h.1.attn.q",
        "model.h.1.mlp.fc",
        "model.h.10.attn.q",
        "model.enc.layers.1.q",
        "model.enc.layers.1.experts.0.q",
        "model.enc.layers.1.experts.2",
        "head",
    )
)
# Recorded: what each config selects of these.
RECORDED = {
    "suffix": ({"target_modules": ["q"]}, "2 5 7 8 9"),
    "suffix of two": ({"target_modules": ["attn.q"]}, "2 5 7"),
    "whole path": ({"target_modules": ["head", "model.wte"]}, "1 11"),
    "no part of a name": ({"target_modules": ["roj", "ead"]}, ""),
    "regex": ({"target_modules": r".*h\.\d\.(attn|mlp)\.(q|fc)"}, "2 4 5 6"),
    "regex of all": ({"target_modules": "q"}, ""),
    "excluded": ({"target_modules": ["q", "fc"], "exclude_modules": ["attn.q"]}, "4 6 8 9"),
    "excluded by regex": ({"target_modules": ["q"], "exclude_modules": r".*\.1\..*"}, "2 7"),
    "excluded container": ({"target_modules": ["q"], "exclude_modules": ["attn"]}, "2 5 7 8 9"),
    "saved": ({"target_modules": ["q", "fc"], "modules_to_save": ["mlp", "experts"]}, "2 5 7 8"),
    "layer": ({"target_modules": ["q", "fc"], "layers_to_transform": 0}, "2 4 9"),
    "layers": ({"target_modules": ["q", "fc"], "layers_to_transform": [1, 10]}, "5 6 7 8"),
    "no layers": ({"target_modules": ["fc"], "layers_to_transform": []}, "4 6"),
    "pattern": (
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"},
        "8 9",
    ),
    "patterns": (
        {
            "target_modules": ["q"],
            "layers_to_transform": [0, 1],
            "layers_pattern": ["h", "experts"],
        },
        "2 5 9",
    ),
    "pattern of two": (
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "enc.layers"},
        "8 9",
    ),
    "whole path and layers": (
        {"target_modules": ["model.h.0.attn.q", "fc"], "layers_to_transform": [1]},
        "2 6",
    ),
    "number as name": ({"target_modules": ["2"], "layers_to_transform": [1]}, "10"),
    "parameters alone": ({"target_modules": [], "target_parameters": ["w"]}, ""),
}


@pytest.mark.parametrize(("fields", "chosen"), RECORDED.values(), ids=RECORDED)
def test_selects_what_hugging_face_selects(fields, chosen):
    config = LoraConfig(**fields)
    selected = [i for i, module in enumerate(MODULES) if selects(config, module)]
    assert selected == [int(i) for i in chosen.split()]


def test_slashes():
    fc = path("model.h.0.mlp.fc")
    assert selects(LoraConfig(target_modules=["mlp/fc"]), fc)
    assert not selects(LoraConfig(target_modules=["fc"], exclude_modules=["mlp/fc"]), fc)
    assert not selects(LoraConfig(target_modules=["fc"], modules_to_save=["h/0"]), fc)
    assert not selects(LoraConfig(target_modules=".*/fc"), fc)
    assert rank_of(LoraConfig(rank_pattern={"mlp/fc": 3}), fc) == 3
    assert selects_parameter(LoraConfig(target_parameters=["fc/w"]), (*fc, "w"))


def test_all_linear_counts_as_every_path():
    config = LoraConfig(
        target_modules="All-linear",
        exclude_modules=["head"],
        modules_to_save=["wte"],
    )
    assert is_all_linear(config)
    assert not is_all_linear(LoraConfig(target_modules=["q"]))
    left_out = [module for module in MODULES if not selects(config, module)]
    assert left_out == [("model", "wte"), ("head",)]
    assert selects(LoraConfig(target_modules="all-linear"), ())
    config = LoraConfig(target_modules="all-linear", layers_to_transform=1, layers_pattern="h")
    assert [module[2] for module in MODULES if selects(config, module)] == ["1", "1"]


INDICES = [
    ("model.layers.3.q", None, 3),
    ("layers.3.q", None, 3),
    ("layers.3.experts.7.q", None, 7),
    ("layers.3.experts.7.q", "layers", 3),
    ("layers.3.experts.7.q", ["h", "experts"], 7),
    ("layers.3.experts.7.q", "h", None),
    ("layers.3.experts.7.q", "lay", None),
    ("layers.3", None, None),
    ("3.q", None, None),
    ("layers_3.q", None, 3),
    ("layers_3.q", "layers", 3),
    ("layers_3.q", ["h", "lay.*"], 3),
    ("layers_3.q", "h", None),
    ("layers_3.q", "ayers", None),
    ("Encoder_1.Block_3.Dense_0", None, 1),
    ("Encoder_1.Block_3.Dense_0", "Block", 3),
    ("Encoder_1.layers.5.Dense_0", None, 5),
    ("my_block_12.q", None, 12),
    ("my_block_12.q", "my_block", 12),
    ("Dense_0", None, None),
    ("attn.Dense_0", "Dense", None),
    ("layers_x.q", None, None),
    ("", None, None),
    ("layers_3.q", "", 3),
    ("layers_3.q", [], 3),
    ("a.3.h_4.q", "(h)|(a)", 3),
]


@pytest.mark.parametrize(("module", "patterns", "index"), INDICES)
def test_layer_index(module, patterns, index):
    assert layer_index(path(module), patterns) == index


def test_layers_named_with_an_underscore():
    config = LoraConfig(target_modules=["q"], layers_to_transform=[0, 2])
    assert [i for i in range(4) if selects(config, (f"layers_{i}", "attn", "q"))] == [0, 2]


def test_modules_to_save():
    config = LoraConfig(modules_to_save=["score", "h.1"])
    assert is_saved(config, ("score",))
    assert is_saved(config, path("model.score"))
    assert is_saved(config, path("model.score.dense"))
    assert is_saved(config, path("model.h.1.q"))
    assert not is_saved(config, path("model.h.10.q"))
    assert not is_saved(config, path("my_score"))
    assert not is_saved(LoraConfig(), ("score",))


def test_parameters():
    config = LoraConfig(
        target_modules=[], target_parameters=["experts.up", "w"], exclude_modules=["1.experts"]
    )
    assert selects_parameter(config, path("h.0.experts.up"))
    assert selects_parameter(config, ("w",))
    assert selects_parameter(config, path("h.w"))
    assert not selects_parameter(config, path("h.0.experts.down"))
    assert not selects_parameter(config, path("h.1.experts.up"))
    assert not selects_parameter(LoraConfig(), ("w",))
    saved = LoraConfig(target_parameters=["up"], modules_to_save=["experts"])
    assert not selects_parameter(saved, path("h.0.experts.up"))
    assert not selects(LoraConfig(target_parameters=["w"]), ("w",)), "a parameter is no module"


def test_ranks_and_scalings():
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        rank_pattern={"attn.q": 4, r"h\.\d+\.attn.*": 2, "q": 32},
        alpha_pattern={"^model.h.0.attn.q": 1, "q": 64},
    )
    ranks = {name: rank_of(config, path(name)) for name in ("a.attn.q", "h.3.attn.k", "q", "xq")}
    assert ranks == {"a.attn.q": 4, "h.3.attn.k": 2, "q": 32, "xq": 8}
    assert alpha_of(config, path("model.h.0.attn.q")) == 1
    assert alpha_of(config, path("model.h.1.attn.q")) == 64
    assert alpha_of(config, path("model.h.1.mlp")) == 16
    assert scaling_of(config, path("model.h.1.mlp")) == 2
    assert scaling_of(config, path("model.h.1.attn.q")) == 16
    rs = LoraConfig(r=16, lora_alpha=2, use_rslora=True, rank_pattern={"q": 4})
    assert scaling_of(rs, ("v",)) == 0.5
    assert scaling_of(rs, ("q",)) == 1


def test_tokens():
    config = LoraConfig(trainable_token_indices=[3, 1])
    assert tokens_of(config, ("wte",), is_table=True) == (3, 1)
    assert tokens_of(config, ("wpe",), is_table=False) == ()
    config = LoraConfig(trainable_token_indices={"enc/wte": [3, 1], "wpe": [0]})
    assert tokens_of(config, path("model.enc.wte"), is_table=False) == (3, 1)
    assert tokens_of(config, path("model.dec.wte"), is_table=True) == ()
    assert tokens_of(LoraConfig(), ("wte",), is_table=True) == ()


def test_targets_by_the_model_s_type():
    assert with_targets(LoraConfig(), "gpt2").target_modules == ("c_attn",)
    assert with_targets(LoraConfig(r=4), "llama") == LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"]
    )
    assert len(TARGETS_BY_MODEL_TYPE) == 38
    for config in (
        LoraConfig(target_modules=["q"]),
        LoraConfig(target_parameters=["w"]),
        LoraConfig(target_modules="all-linear"),
    ):
        assert with_targets(config, None) is config
        assert with_targets(config, "gpt2") is config
    with pytest.raises(ValueError, match=r"'lama' \(close to it: \['llama'.*all-linear"):
        with_targets(LoraConfig(), "lama")
    with pytest.raises(ValueError, match="which this model lacks: name modules"):
        with_targets(LoraConfig(), None)
    with pytest.raises(ValueError, match="with_targets"):
        selects(LoraConfig(), ("q",))


# --- What matches nothing ------------------------------------------------------------------------

TREE = tuple(
    path(name)
    for name in (
        "wte",
        "ln",
        *(
            f"h.{i}{part}"
            for i in range(3)
            for part in ("", ".attn", ".attn.q_proj", ".attn.v_proj", ".mlp", ".mlp.fc", ".moe")
        ),
        "head",
    )
)
LAYERS = {"q_proj", "v_proj", "fc", "head"}
PARAMETERS = tuple((*module, "kernel") for module in TREE if module[-1] in LAYERS) + tuple(
    (*module, "up") for module in TREE if module[-1] == "moe"
)


def check(modules=TREE, parameters=PARAMETERS, **fields):
    config = LoraConfig(**fields)
    targeted = [m for m in modules if m[-1:] and m[-1] in LAYERS and selects(config, m)]
    check_entries(config, iter(modules), iter(targeted), iter(parameters))


FINE = {
    "names": {"target_modules": ["q_proj", "attn/v_proj", "h.0.mlp.fc"]},
    "regex": {"target_modules": r".*_proj"},
    "all": {
        "target_modules": "all-linear",
        "exclude_modules": ["mlp"],
        "modules_to_save": ["ln", "moe"],
        "layers_to_transform": [0, 2],
        "layers_pattern": ["h"],
        "rank_pattern": {"attn.q_proj": 4, r"h\.[02]\..*": 2, "attn/v_proj": 3},
        "alpha_pattern": {"^h.2.attn.v_proj": 4},
        "trainable_token_indices": {"wte": [1]},
    },
    "parameters": {
        "target_modules": [],
        "target_parameters": ["moe.up"],
        "rank_pattern": {"1.moe.up": 2},
        "exclude_modules": r"h\.0\..*",
        "trainable_token_indices": [1],
    },
}


@pytest.mark.parametrize("fields", FINE.values(), ids=FINE)
def test_entries_that_match(fields):
    check(**fields)


Q = ["q_proj"]
UNMATCHED = {
    "target_modules: .*'q_porj' .closest: 'q_proj', 'v_proj'": {
        "target_modules": ["q_porj", "v_proj"]
    },
    "target_modules: .*'atn/q_proj' .closest: 'attn.q_proj'": {"target_modules": ["atn/q_proj"]},
    r"target_modules: .*'\.\*q_porj' .closest: 'q_proj'": {"target_modules": ".*q_porj"},
    "target_modules: .*'zzzz' .there are 'attn', 'fc'.* more": {"target_modules": ["zzzz"]},
    "target_modules: .*'1z' .*'2z' .*'3z' .* and 2 more\\.": {
        "target_modules": [f"{i}z" for i in range(1, 6)]
    },
    "target_modules: .*'ln' .there is 'ln', which got no adapter": {"target_modules": [*Q, "ln"]},
    "target_modules: .*'fc' .there is 'h.0.mlp.fc', which exclude_modules leaves out": {
        "target_modules": [*Q, "fc"],
        "exclude_modules": r".*\.fc",
    },
    "target_modules: .*'fc' .there is .* which modules_to_save leaves out": {
        "target_modules": [*Q, "fc"],
        "modules_to_save": ["mlp"],
    },
    "target_modules: .*'1.mlp.fc' .there is 'h.1.mlp.fc', which layers_to_transform leaves out": {
        "target_modules": [*Q, "1.mlp.fc"],
        "layers_to_transform": 0,
    },
    "target_modules = 'all-linear' adapts no module.* there are 'h.0'": {
        "target_modules": "all-linear",
        "exclude_modules": ".*",
    },
    "target_parameters: .*'moe.pu' .closest: 'moe.up'": {"target_parameters": ["moe.pu"]},
    "target_parameters: .*'up' .there is 'h.0.moe.up', which exclude_modules leaves out": {
        "target_parameters": ["up"],
        "exclude_modules": ["moe"],
    },
    "exclude_modules: .*'fcc' .closest: 'fc'": {
        "target_modules": Q,
        "exclude_modules": ["v_proj", "fcc"],
    },
    r"exclude_modules: .*'\.\*fcc'": {"target_modules": Q, "exclude_modules": ".*fcc"},
    "modules_to_save: .*'haed' .closest: 'head'": {
        "target_modules": Q,
        "modules_to_save": ["ln", "haed"],
    },
    r"layers_to_transform: .* index \[7\] .* at the indices \[0, 1, 2\]": {
        "target_modules": Q,
        "layers_to_transform": [0, 7],
    },
    r"layers_to_transform: .* index \[7\] .* at the indices \[0, 1, 2\]:": {
        "target_modules": Q,
        "layers_to_transform": 7,
    },
    "layers_pattern has 'layers', after which no index": {
        "target_modules": Q,
        "layers_to_transform": [0],
        "layers_pattern": ["h", "layers"],
    },
    r"layers_to_transform = \[1\]: no index": {
        "target_modules": [],
        "target_parameters": ["up"],
        "layers_to_transform": [1],
    },
    "rank_pattern: .*'q_porj' .closest: 'q_proj'": {
        "target_modules": Q,
        "rank_pattern": {"q_proj": 2, "q_porj": 4},
    },
    "rank_pattern: .*'fc' .there is 'h.0.mlp.fc', which got no adapter": {
        "target_modules": Q,
        "rank_pattern": {"fc": 4},
    },
    "alpha_pattern: .*'_proj' .closest: 'v_proj', 'q_proj'": {
        "target_modules": Q,
        "alpha_pattern": {"_proj": 4},
    },
    "trainable_token_indices: .*'wt' .closest: 'wte'": {
        "target_modules": Q,
        "trainable_token_indices": {"wt": [1]},
    },
}


@pytest.mark.parametrize("words", UNMATCHED)
def test_entries_that_match_nothing(words):
    with pytest.raises(ValueError, match=rf"^LoraConfig\.{words}"):
        check(**UNMATCHED[words])


def test_layers_that_a_scan_stacks():
    stacked = (("layers", "attn"), ("layers", "attn", "q_proj"))
    with pytest.raises(ValueError, match=r"layers_to_transform = \[0\]: no index .* nn\.scan"):
        check(modules=stacked, target_modules=["q_proj"], layers_to_transform=[0])


def test_names_by_the_model_s_type_are_not_checked_one_by_one():
    check_entries(LoraConfig(), TREE, [path("h.0.attn.q_proj")], PARAMETERS)
    with pytest.raises(ValueError, match="target_modules = None adapts no module"):
        check_entries(LoraConfig(), TREE, [], PARAMETERS)


def test_a_model_that_is_a_layer():
    config = LoraConfig(target_modules="all-linear")
    check_entries(config, [()], [()], [("kernel",)])
    with pytest.raises(ValueError, match=r"'q' \(there are none"):
        check_entries(LoraConfig(target_modules=["q"]), [()], [], [("kernel",)])


def test_ten_thousand_modules():
    modules = [(f"layers_{i}", "attn", name) for i in range(2500) for name in ("q", "k", "v", "o")]
    parameters = [(*module, "kernel") for module in modules]
    ranks = {".".join(module): 2 for module in modules[::10]}
    config = LoraConfig(
        target_modules=["q", "k", "v", "o"], rank_pattern=ranks, layers_to_transform=[*range(2500)]
    )
    start = time.perf_counter()
    targeted = [module for module in modules if selects(config, module)]
    assert targeted == modules
    check_entries(config, modules, targeted, parameters)
    with pytest.raises(ValueError, match="closest"):
        check_entries(LoraConfig(target_modules=["attn.qq"]), modules, [], parameters)
    assert time.perf_counter() - start < 5
