"""`LoraConfig`: what it accepts, what it refuses, and the files of Hugging Face's peft 0.18.1."""

import copy
import dataclasses
import enum
import json
import pickle
import types
import warnings

import numpy as np
import pytest

from peft_jax._config import (
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraRuntimeConfig,
    PeftType,
    TaskType,
    lora_config,
)

# Written by Hugging Face's `save_pretrained`, field by field, for `LoraConfig()`.
DEFAULTS = json.loads(
    """{"alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null,
    "auto_mapping": null, "base_model_name_or_path": null, "bias": "none", "corda_config": null,
    "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null,
    "fan_in_fan_out": false, "inference_mode": false, "init_lora_weights": true,
    "layer_replication": null, "layers_pattern": null, "layers_to_transform": null,
    "loftq_config": {}, "lora_alpha": 8, "lora_bias": false, "lora_dropout": 0.0,
    "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
    "peft_type": "LORA", "peft_version": "0.18.1", "qalora_group_size": 16, "r": 8,
    "rank_pattern": {}, "revision": null, "target_modules": null, "target_parameters": null,
    "task_type": null, "trainable_token_indices": null, "use_dora": false, "use_qalora": false,
    "use_rslora": false}"""
)
# What further files of its hold beside these, and the configs that they stand for.
WRITTEN = {
    "defaults": ({}, {}),
    "many fields": (
        {
            "alpha_pattern": {"v_proj": 2.0},
            "base_model_name_or_path": "gpt2",
            "layer_replication": [[0, 4], [2, 5]],
            "layers_pattern": "h",
            "layers_to_transform": [0, 1],
            "lora_alpha": 32,
            "lora_dropout": 0.1,
            "modules_to_save": ["score"],
            "r": 16,
            "rank_pattern": {"h.0.q_proj": 4},
            "target_modules": ["v_proj", "q_proj"],
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": {"wte": [1, 2]},
            "use_rslora": True,
        },
        {
            "alpha_pattern": {"v_proj": 2},
            "base_model_name_or_path": "gpt2",
            "layer_replication": [(0, 4), (2, 5)],
            "layers_pattern": "h",
            "layers_to_transform": (0, 1),
            "lora_alpha": 32,
            "lora_dropout": 0.1,
            "modules_to_save": {"score"},
            "r": 16,
            "rank_pattern": {"h.0.q_proj": 4},
            "target_modules": ("v_proj", "q_proj"),
            "task_type": TaskType.CAUSAL_LM,
            "trainable_token_indices": {"wte": (1, 2)},
            "use_rslora": True,
        },
    ),
    "loftq": (
        {
            "init_lora_weights": "loftq",
            "loftq_config": {"loftq_bits": 4, "loftq_iter": 1},
            "target_modules": "all-linear",
        },
        {
            "init_lora_weights": "loftq",
            "loftq_config": LoftQConfig(),
            "target_modules": "All-Linear",
        },
    ),
    "eva": (
        {
            "eva_config": {
                "adjust_scaling_factors": True,
                "label_mask_value": -100,
                "rho": 1.5,
                "tau": 0.99,
                "use_label_mask": True,
                "whiten": False,
            },
            "init_lora_weights": "eva",
            "target_modules": ".*\\.q",
        },
        {
            "eva_config": EvaConfig(rho=1.5),
            "init_lora_weights": "eva",
            "target_modules": r".*\.q",
        },
    ),
    "corda": (
        {
            "corda_config": {
                "cache_file": None,
                "corda_method": "kpm",
                "covariance_file": None,
                "prune_temporary_fields": True,
                "use_float16_for_covariance": False,
                "verbose": False,
            },
            "init_lora_weights": "corda",
            "target_modules": ["q"],
            "use_dora": True,
        },
        {
            "corda_config": CordaConfig(corda_method="kpm"),
            "init_lora_weights": "corda",
            "target_modules": ["q"],
            "use_dora": True,
        },
    ),
    "parameters": (
        {
            "exclude_modules": ["a"],
            "target_modules": [],
            "target_parameters": ["experts.down_proj"],
        },
        {
            "exclude_modules": ["a"],
            "target_modules": [],
            "target_parameters": ["experts.down_proj"],
        },
    ),
}


@pytest.mark.parametrize(("written", "fields"), WRITTEN.values(), ids=WRITTEN)
def test_files_of_hugging_face(tmp_path, written, fields):
    data = DEFAULTS | written
    (tmp_path / "adapter_config.json").write_text(json.dumps(data))
    config = LoraConfig.from_pretrained(tmp_path)
    assert config == LoraConfig(peft_version="0.18.1", **fields)
    assert config == LoraConfig.from_pretrained(str(tmp_path / "adapter_config.json"))
    assert config.to_dict() == data

    config.save_pretrained(tmp_path / "new" / "folder")
    assert LoraConfig.from_pretrained(tmp_path / "new" / "folder") == config
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == [
        "adapter_config.json"
    ]


def test_defaults():
    assert LoraConfig().to_dict() == DEFAULTS | {"peft_version": None}
    assert LoraConfig() == LoraConfig.from_dict({})
    assert LoraConfig().peft_type is PeftType.LORA
    assert LoraConfig(peft_type=None) == LoraConfig(peft_type="LORA") == LoraConfig()


def test_equal_by_value():
    listed = LoraConfig(target_modules=["q", "v"], rank_pattern={"a": 2, "b": 3})
    given = {"b": 3, "a": 2}
    for names in (("q", "v"), {"v", "q"}, frozenset({"v", "q"})):
        same = LoraConfig(target_modules=names, rank_pattern=given)
        assert same == listed
        assert hash(same) == hash(listed)
    assert LoraConfig(r=4) != LoraConfig()
    assert LoraConfig(lora_alpha=8.0) == LoraConfig()
    tokens = LoraConfig(trainable_token_indices={"wte": [1]}, auto_mapping={"a": ["b"]})
    assert hash(tokens) == hash(dataclasses.replace(tokens))
    given["a"] = 7
    assert same.rank_pattern == {"a": 2, "b": 3}, "the config holds a copy"


def test_copies():
    config = LoraConfig(r=4, target_modules=["q"], init_lora_weights="eva")
    assert dataclasses.replace(config, r=4) == config
    assert dataclasses.replace(config, r=5).r == 5
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 5


def test_numbers_of_numpy():
    config = LoraConfig(
        r=np.int64(4),
        lora_alpha=np.float32(0.5),
        lora_dropout=np.float64(0.25),
        rank_pattern={"q": np.int8(2)},
        alpha_pattern={"q": np.int64(3)},
        layers_to_transform=np.int32(0),
    )
    json.dumps(config.to_dict())
    assert config == LoraConfig(
        r=4,
        lora_alpha=0.5,
        lora_dropout=0.25,
        rank_pattern={"q": 2},
        alpha_pattern={"q": 3},
        layers_to_transform=0,
    )


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_16", "gaussian", "orthogonal", "olora"])
def test_initialisers(name):
    assert LoraConfig(init_lora_weights=name).init_lora_weights == name


def test_initialisers_with_a_config_of_their_own():
    assert LoraConfig(init_lora_weights="eva").eva_config == EvaConfig()
    assert LoraConfig(init_lora_weights="corda").corda_config == CordaConfig()
    config = LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 8})
    assert config.loftq_config == LoftQConfig(8)
    assert LoraConfig(loftq_config={}).loftq_config is None


class Method(enum.Enum):
    Q4_0 = "q4_0"
    NUMBER = 4


def test_method_of_loftq():
    assert LoftQConfig().quantization == "nf4"
    assert LoftQConfig(8).quantization == "int8"
    assert LoftQConfig(2, method=Method.Q4_0).method == "q4_0"
    config = LoraConfig(
        init_lora_weights="loftq", loftq_config=LoftQConfig(method="q4_0", store=True)
    )
    written = {"loftq_bits": 4, "loftq_iter": 1, "method": "q4_0", "store": True}
    assert config.to_dict()["loftq_config"] == written
    assert LoraConfig.from_dict(config.to_dict()) == config


REFUSED = {
    "r": [0, -1, 1.5, "8", None, True, np.float32(2), np.ones(2)],
    "lora_alpha": ["8", None, True, float("nan"), float("inf"), 10**400],
    "lora_dropout": [-0.1, 1.0, "0", None, False],
    "target_modules": [3, "(", "", ["q", 3], [""], b"q", {"q": 1}, [], ()],
    "exclude_modules": [3, "[", [None]],
    "modules_to_save": ["score", [3], ["("]],
    "layers_to_transform": [-1, True, 1.5, "1", [0, -1], ["0"]],
    "layers_pattern": ["h", ["h"], 3, "(", ["("]],
    "rank_pattern": [{"q": 0}, {"q": 1.5}, {"q": True}, {3: 1}, {"(": 2}, {"": 2}, ["q"], "q"],
    "alpha_pattern": [{"q": "1"}, {"q": float("nan")}, {"(": 2}, 3],
    "use_rslora": [1, None, "true"],
    "use_dora": [1, None],
    "lora_bias": [1, "none"],
    "fan_in_fan_out": [0],
    "inference_mode": [0],
    "bias": ["lora", None, True],
    "init_lora_weights": [None, 1, "pisa", "pissa_niter_", "pissa_niter_x", np.ones(2), "Loftq"],
    "task_type": ["CAUSAL", "causal_lm", 3],
    "peft_type": ["ADALORA", 3],
    "trainable_token_indices": ["wte", 3, [-1], [1.5], [1, 1], {"wte": 3}, {"": [1]}, {3: [1]}],
    "loftq_config": [3, {"loftq_bit": 4}, LoftQConfig(), EvaConfig()],
    "eva_config": [3, {"rho": 0.5}, {"roh": 2.0}, EvaConfig()],
    "corda_config": ["ipm", {"corda_method": "ip"}, CordaConfig()],
    "layer_replication": ["0-4", [3], [(0,)], [(3, 2)], [(2, 2)], [(-1, 2)], [(0, 1.5)]],
    "target_parameters": ["experts.down_proj", [3], 3],
    "auto_mapping": ["a", {3: 1}],
    "megatron_config": [[1]],
    "megatron_core": [3],
    "runtime_config": [3, {"ephemeral": True}, {"ephemeral_gpu_offload": 1}],
    "base_model_name_or_path": [3],
    "revision": [3],
    "peft_version": [0.18],
    "alora_invocation_tokens": [[1]],
    "use_qalora": [True, 0],
    "qalora_group_size": [32],
    "arrow_config": [{}],
    "ensure_weight_tying": [True],
}


def test_every_field_is_checked():
    assert set(REFUSED) == {field.name for field in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize("field", REFUSED)
def test_refused_values(field):
    for value in REFUSED[field]:
        with pytest.raises(ValueError, match=rf"^LoraConfig\.{field} = "):
            LoraConfig(**{field: value})


CONTRADICTIONS = {
    "layers_to_transform": {"target_modules": ".*q", "layers_to_transform": [0]},
    "layers_pattern": {"target_modules": ".*q", "layers_pattern": "h"},
    "lora_bias": {"use_dora": True, "lora_bias": True},
    "lora_bias ": {"init_lora_weights": "pissa", "lora_bias": True},
    "loftq_config": {"init_lora_weights": "loftq"},
    "loftq_config ": {"init_lora_weights": "eva", "loftq_config": LoftQConfig()},
    "eva_config": {"init_lora_weights": "corda", "eva_config": EvaConfig()},
    "corda_config": {"init_lora_weights": "pissa", "corda_config": CordaConfig()},
    "r": {"init_lora_weights": "orthogonal", "r": 3},
    "rank_pattern": {"init_lora_weights": "orthogonal", "rank_pattern": {"q": 4, "v": 3}},
    "use_dora": {"use_dora": True, "megatron_config": {"a": 1}},
    "target_parameters": {"target_parameters": ["w"], "lora_dropout": 0.1},
    "target_parameters ": {"target_parameters": ["w"], "lora_bias": True},
    "modules_to_save": {"target_modules": ["a/q", "v"], "modules_to_save": ["a.q"]},
    "trainable_token_indices": {
        "modules_to_save": ["wte"],
        "trainable_token_indices": {"wte": [1]},
    },
}


@pytest.mark.parametrize("field", CONTRADICTIONS)
def test_contradictions(field):
    with pytest.raises(ValueError, match=rf"^LoraConfig\.{field.strip()} = "):
        LoraConfig(**CONTRADICTIONS[field])


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "ALL-LINEAR", "layers_to_transform": [0], "layers_pattern": "h"},
        {"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": "h"},
        {"target_modules": [], "target_parameters": ["w"], "use_dora": True},
        {"init_lora_weights": False, "lora_bias": True},
        {"init_lora_weights": "orthogonal", "rank_pattern": {"q": 2}},
    ],
)
def test_what_looks_like_a_contradiction_and_is_none(fields):
    config = LoraConfig(**fields)
    assert LoraConfig.from_dict(config.to_dict()) == config


ERRORS = {
    "the closest is 'pissa'": {"init_lora_weights": "pisa"},
    "the closest is 'CAUSAL_LM'": {"task_type": "causal_lm"},
    "the closest is 'rho'": {"eva_config": {"roh": 1.5}},
    "EvaConfig.rho = 0.5": {"eva_config": {"rho": 0.5}},
    r"write \['score'\]": {"modules_to_save": "score"},
    "eva_config=None": {"eva_config": EvaConfig()},
    "unterminated subpattern": {"target_modules": "(q"},
    "at 'q', it is an integer of at least 1": {"rank_pattern": {"q": 0}},
}


@pytest.mark.parametrize("words", ERRORS)
def test_errors_say_what_to_do(words):
    with pytest.raises(ValueError, match=words):
        LoraConfig(**ERRORS[words])


SMALL = {
    "LoftQConfig.loftq_bits = 0": lambda: LoftQConfig(0),
    "LoftQConfig.loftq_bits = 2 .* `method=`": lambda: LoftQConfig(2),
    "LoftQConfig.loftq_iter = 0": lambda: LoftQConfig(loftq_iter=0),
    "LoftQConfig.method = 4": lambda: LoftQConfig(method=4),
    "LoftQConfig.method = <Method.NUMBER": lambda: LoftQConfig(method=Method.NUMBER),
    "LoftQConfig.store = 1": lambda: LoftQConfig(store=1),
    "EvaConfig.rho = 0.9": lambda: EvaConfig(rho=0.9),
    "EvaConfig.rho = inf": lambda: EvaConfig(rho=float("inf")),
    "EvaConfig.tau = 1.1": lambda: EvaConfig(tau=1.1),
    "EvaConfig.use_label_mask = 1": lambda: EvaConfig(use_label_mask=1),
    "EvaConfig.label_mask_value = 0.5": lambda: EvaConfig(label_mask_value=0.5),
    "CordaConfig.cache_file = 'x' .*`statistics=`": lambda: CordaConfig(cache_file="x"),
    "CordaConfig.covariance_file = 'x'": lambda: CordaConfig(covariance_file="x"),
    "CordaConfig.corda_method = 'ikm'": lambda: CordaConfig(corda_method="ikm"),
}


@pytest.mark.parametrize("words", SMALL)
def test_small_configs(words):
    with pytest.raises(ValueError, match=f"^{words}"):
        SMALL[words]()


def test_unknown_keys():
    assert (
        LoraConfig.from_dict({"new": None, "a": False, "b": {}, "c": [], "d": ""}) == LoraConfig()
    )
    with pytest.raises(ValueError, match=r"^LoraConfig\.target_module = .*'target_modules'"):
        LoraConfig.from_dict({"target_module": ["q"]})
    with pytest.raises(ValueError, match=r"^LoraConfig\.new = 0: there is no such field"):
        LoraConfig.from_dict({"new": 0})
    with pytest.raises(ValueError, match="takes a dict"):
        LoraConfig.from_dict([("r", 8)])


def test_what_is_left_of_an_initialiser_in_a_file():
    data = {"init_lora_weights": True, "corda_config": {"cache_file": "x"}}
    assert LoraConfig.from_dict(data) == LoraConfig()
    with pytest.raises(ValueError, match=r"^LoraConfig\.eva_config"):
        LoraConfig.from_dict({"eva_config": {"rho": 1.5}})


FILES = {
    "no JSON": "{",
    "a list": "[1]",
    "a bad value": '{"r": 0}',
    "not a number": '{"lora_alpha": NaN}',
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_files_that_are_refused(tmp_path, text):
    file = tmp_path / "adapter_config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        LoraConfig.from_pretrained(file)


def test_paths_that_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none", 3.5, "\0"):
        with pytest.raises(ValueError, match="No config could be read"):
            LoraConfig.from_pretrained(path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="binary"):
        LoraConfig.from_pretrained(tmp_path / "binary")
    for path in (tmp_path / "binary", tmp_path / "binary" / "below"):
        with pytest.raises(ValueError, match="not a directory"):
            LoraConfig().save_pretrained(path)
    with pytest.raises(ValueError, match=r"LoraConfig\.auto_mapping"):
        LoraConfig(auto_mapping={"a": object()}).save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["binary"]


def test_patterns_keep_their_order_in_files(tmp_path):
    config = LoraConfig(rank_pattern={"v": 2, "a": 3})
    config.save_pretrained(tmp_path)
    assert list(LoraConfig.from_pretrained(tmp_path).rank_pattern) == ["v", "a"]


def test_an_unfinished_file_does_not_replace_a_finished_one(tmp_path, monkeypatch):
    LoraConfig(r=4).save_pretrained(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(lora_config.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        LoraConfig(r=5).save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter_config.json"]
    assert LoraConfig.from_pretrained(tmp_path).r == 4


FOREIGN = {
    "megatron_config": {"a": (1, 2)},
    "megatron_core": "other.core",
    "runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True),
}


@pytest.mark.parametrize("field", FOREIGN)
def test_options_that_mean_nothing_on_jax_are_told_once(field, monkeypatch):
    monkeypatch.setattr(lora_config, "_TOLD", set())
    with pytest.warns(UserWarning, match=rf"LoraConfig\.{field}.* means nothing on JAX") as told:
        config = LoraConfig(**{field: FOREIGN[field]})
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LoraConfig(**{field: FOREIGN[field]}) == config
        assert LoraConfig.from_dict(config.to_dict()) == config
        hash(config)


def test_runtime_config_is_no_part_of_files(monkeypatch):
    monkeypatch.setattr(lora_config, "_TOLD", {"runtime_config.ephemeral_gpu_offload"})
    offload = types.SimpleNamespace(ephemeral_gpu_offload=True)
    for given in (offload, {"ephemeral_gpu_offload": True}):
        config = LoraConfig(runtime_config=given)
        assert config.runtime_config == LoraRuntimeConfig(True)
        assert "runtime_config" not in config.to_dict()
        assert config == LoraConfig()
    assert LoraConfig(runtime_config={}).runtime_config == LoraRuntimeConfig()
