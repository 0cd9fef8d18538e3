"""Exports of simulated models: whole, the same to the byte, read back to the bit, or refused."""

import copy
import dataclasses
import functools
import json
import os
import pathlib
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax.core import freeze as frozen_dict
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import STORING, assert_close, key_of, numbers, partly_slow, randomised

import peft_jax as peft
from peft_jax import quantsim
from peft_jax.quantsim import AdapterMetadata, Quantizer, QuantizerRule, SimulationConfig, _files

METHODS = ("int4", "int8", "q4_0", "q4_0_transpose")
NOTHING = SimulationConfig(None, None, None, None, None, None)
X = numbers(8, 4)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="two")(nn.relu(nn.Dense(6, name="one")(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(32, name="fc")(x), None


class Stack(nn.Module):
    """A matrix, a weight of three axes, and three layers in a stack."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64, name="dense")(x)
        x = nn.Einsum((2, 64, 32), "bd,ndh->bnh", name="einsum")(x).sum(1)
        lift = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Block, length=3, **lift)(name="layers")(x, None)
        return nn.Dense(32, name="head")(x)


@dataclasses.dataclass(frozen=True)
class Wrap:
    """A rule by which layers compute on stored values."""

    method: str

    def __call__(self, module):
        wrapper = STORING.get(type(module))
        return module if wrapper is None else wrapper(wrapped=module, method=self.method)


class Flow(NamedTuple):
    """A model, simulated and calibrated."""

    model: nn.Module
    params: Any
    sim: quantsim.SimulatedModel
    encodings: Any
    inputs: Any

    @property
    def sites(self):
        return quantsim.find_sites(self.sim, self.inputs)

    @property
    def metadata(self):
        return quantsim.adapter_metadata(peft.lora_specs(self.model, self.inputs))


@functools.cache
def small(config=None, rank=2, targets=("one",)):
    lora = peft.LoraConfig(
        r=rank, lora_alpha=4, target_modules=list(targets), init_lora_weights=False
    )
    return flow(peft.get_peft_model(Net(), lora), X, config)


@functools.cache
def stacked(config, axis=0):
    return flow(Stack(axis), numbers(4, 32), config)


def flow(model, inputs, config):
    params = jax.jit(lambda: model.init(key_of(0), inputs))()["params"]
    sim = quantsim.simulate(model, config)
    return Flow(model, params, sim, quantsim.compute_encodings(sim, params, [inputs]), inputs)


def flat(encodings):
    is_one = lambda node: isinstance(node, quantsim.Encoding)  # noqa: E731
    return flatten_dict(encodings, sep="/", is_leaf=lambda _, node: is_one(node))


def nested(found):
    return unflatten_dict(found, sep="/")


def content(*paths):
    return [path.read_bytes() for path in paths]


def entries_of(path):
    data = json.loads(path.read_bytes())
    return {entry["name"]: entry for key in LISTS for entry in data[key]}


LISTS = ("activation_encodings", "param_encodings")
CONFIGS = {
    "default": None,
    "bits": SimulationConfig(Quantizer(2), Quantizer(16, symmetric=True), Quantizer(3)),
    "channels": SimulationConfig(
        weights=Quantizer(4, granularity="channel"),
        inputs=Quantizer(8, granularity="channel"),
        outputs=Quantizer(5, symmetric=True, granularity="channel"),
        adapter_weights=Quantizer(12, symmetric=True, granularity="channel"),
        adapter_hidden=Quantizer(6, granularity="channel"),
        adapter_scaling=Quantizer(8, range=(0.0, 3.0)),
    ),
    "blocks": SimulationConfig(
        weights=Quantizer(4, symmetric=True, granularity="block", block_size=2),
        inputs=Quantizer(8, granularity="block", block_size=2),
        outputs=Quantizer(8, symmetric=True, granularity="block", block_size=2),
        adapter_weights=Quantizer(8, granularity="block", block_size=2, axis=-1),
        adapter_hidden=None,
        adapter_scaling=None,
    ),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


# --- Documents -----------------------------------------------------------------------------------

FIELDS = {
    "name": str,
    "dtype": str,
    "bw": int,
    "enc_type": str,
    "is_sym": bool,
    "scale": list,
    "offset": list,
}
ENC_TYPES = {"tensor": "PER_TENSOR", "channel": "PER_CHANNEL", "block": "PER_BLOCK"}


def check_document(path, encodings):
    """The schema 1.0.0, entry by entry, and that it says what the encodings do."""
    data = json.loads(path.read_bytes(), parse_constant=lambda text: pytest.fail(text))
    assert set(data) == {"version", *LISTS}
    assert data["version"] == "1.0.0"
    for key in LISTS:
        names = [entry["name"] for entry in data[key]]
        of_kind = {
            name for name, e in encodings.items() if e.of_parameter == (key == "param_encodings")
        }
        assert len(names) == len(set(names))
        assert set(names) == of_kind
        for entry in data[key]:
            check_entry(entry, encodings[entry["name"]])


def check_entry(entry, encoding):
    quantizer, scale = encoding.quantizer, np.asarray(encoding.scale)
    in_blocks = quantizer.granularity == "block"
    assert {field: type(value) for field, value in entry.items()} == (
        FIELDS | {"block_size": int} if in_blocks else FIELDS
    )
    assert entry["dtype"] == "INT"
    assert entry["bw"] == quantizer.bitwidth
    assert entry["is_sym"] == quantizer.symmetric
    assert entry["enc_type"] == ENC_TYPES[quantizer.granularity]
    assert not in_blocks or entry["block_size"] == quantizer.block_size
    assert {type(value) for value in entry["scale"]} == {float}
    assert {type(value) for value in entry["offset"]} == {int}
    assert len(entry["scale"]) == len(entry["offset"]) == scale.size
    assert min(entry["scale"]) > 0
    if quantizer.symmetric:
        assert set(entry["offset"]) == {-(2 ** (quantizer.bitwidth - 1))}
    assert all(1 - 2**quantizer.bitwidth <= offset <= 0 for offset in entry["offset"])
    np.testing.assert_array_equal(np.float32(entry["scale"]), scale.ravel())
    np.testing.assert_array_equal(entry["offset"], np.asarray(encoding.offset).ravel())


@pytest.mark.parametrize("config", partly_slow(CONFIGS, list(CONFIGS)[::2]))
def test_documents_follow_the_schema(config, tmp_path):
    given = small(config)
    found = flat(given.encodings)
    _, base = quantsim.export_base(tmp_path, given.params, given.encodings)
    check_document(base, {path: e for path, e in found.items() if not e.of_adapter})
    _, one = quantsim.export_adapter(tmp_path, given.params, given.encodings, prefix="one")
    check_document(one, {path: e for path, e in found.items() if e.of_adapter})


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_scales_of_a_stack_are_listed_row_after_row(axis, granularity, tmp_path):
    weights = Quantizer(8, symmetric=True, granularity=granularity)
    given = stacked(dataclasses.replace(NOTHING, weights=weights, inputs=Quantizer(8)), axis)
    entries = entries_of(quantsim.export_base(tmp_path, given.params, given.encodings)[1])
    kernel = np.asarray(given.params["layers"]["fc"]["kernel"])
    rows = np.moveaxis(kernel, axis, 0)
    peaks = np.abs(rows).max((1, 2) if granularity == "tensor" else 1, keepdims=True)
    entry = entries["layers/fc/kernel"]
    assert entry["enc_type"] == "PER_CHANNEL"
    shown = np.moveaxis(peaks, 0, axis).ravel() / 127.5
    np.testing.assert_allclose(entry["scale"], shown, rtol=1e-2)
    inputs = entries["layers/fc/input"]
    assert len(inputs["scale"]) == len(inputs["offset"]) == 3
    assert inputs["enc_type"] == "PER_CHANNEL"
    assert entries["dense/input"]["enc_type"] == "PER_TENSOR"


@every_config
def test_documents_are_read_back_to_the_bit(config, tmp_path):
    given = small(config)
    _, base = quantsim.export_base(tmp_path, given.params, quantsim.freeze(given.encodings))
    _, one = quantsim.export_adapter(tmp_path, given.params, given.encodings, prefix="one")
    read = {
        **flat(quantsim.load_encodings(base, given.sites)),
        **flat(quantsim.load_encodings(str(one), given.sites)),
    }
    expected = flat(given.encodings)
    assert set(read) == set(expected)
    chex.assert_trees_all_equal(nested(read), nested(expected))  # and nothing is frozen


@pytest.mark.parametrize("axis", partly_slow([0, 1], [1]))
def test_documents_of_stacks_are_read_back_to_the_bit(axis, tmp_path):
    given = stacked(dataclasses.replace(NOTHING, weights=Quantizer(4), inputs=Quantizer(8)), axis)
    _, path = quantsim.export_base(tmp_path, given.params, given.encodings)
    chex.assert_trees_all_equal(quantsim.load_encodings(path, given.sites), given.encodings)


def test_encodings_that_are_read_back_run(tmp_path):
    given = small()
    variables = {"params": given.params}
    files = [
        quantsim.export_base(tmp_path, given.params, given.encodings)[1],
        quantsim.export_adapter(tmp_path, given.params, given.encodings, prefix="one")[1],
    ]
    read = [flat(quantsim.load_encodings(path, given.sites)) for path in files]
    again = given.sim.apply(variables, X, encodings=nested({**read[0], **read[1]}))
    np.testing.assert_array_equal(again, given.sim.apply(variables, X, encodings=given.encodings))


def test_further_keys_of_a_document_are_passed_over(tmp_path):
    """AIMET writes its name, the layers it left out and its settings there."""
    given = small()
    _, path = quantsim.export_base(tmp_path, given.params, given.encodings)
    data = json.loads(path.read_bytes()) | {"producer": {"package": "x"}, "excluded_layers": []}
    path.write_text(json.dumps(data))
    assert set(flat(quantsim.load_encodings(path, given.sites))) == {
        p for p, e in flat(given.encodings).items() if not e.of_adapter
    }


def test_bitwidths_of_numpy_are_written_and_read(tmp_path):
    weights = Quantizer(np.int64(4), granularity="block", block_size=np.int32(2))
    given = small(dataclasses.replace(NOTHING, weights=weights))
    _, path = quantsim.export_base(tmp_path, given.params, given.encodings)
    check_document(path, flat(given.encodings))
    chex.assert_trees_all_equal(quantsim.load_encodings(path, given.sites), given.encodings)


# --- Weights -------------------------------------------------------------------------------------


def test_weights_are_read_by_the_safetensors_library(tmp_path):
    given = small()
    weights, _ = quantsim.export_base(tmp_path, given.params, given.encodings)
    base, lora = peft.split_params(given.params)
    chex.assert_trees_all_equal(safetensors.numpy.load_file(weights), flatten_dict(base, sep="/"))
    one, _ = quantsim.export_adapter(
        tmp_path, given.params, given.encodings, prefix="one", metadata=given.metadata
    )
    chex.assert_trees_all_equal(safetensors.numpy.load_file(one), flatten_dict(lora, sep="/"))
    with safetensors.safe_open(one, "numpy") as file:
        assert json.loads(file.metadata()["adapter"]) == {"one/lora/a": 2.0}


FIRST = {("q4_0_transpose", 1)}


@pytest.mark.parametrize(
    ("method", "axis"),
    [
        pytest.param(method, axis, marks=[] if (method, axis) in FIRST else pytest.mark.slow)
        for method in METHODS
        for axis in (0, 1)
    ],
)
def test_integers_are_those_of_quantize_checkpoint(method, axis, tmp_path):
    """Bit for bit, in memory and in files; and run as the simulation does."""
    given = stacked(dataclasses.replace(NOTHING, weights=Quantizer(method=method)), axis)
    specs = peft.layer_specs(given.model, given.inputs)
    expected = peft.quantize_checkpoint(given.params, method=method, specs=specs)
    integers = quantsim.integer_params(given.params, given.encodings, specs=specs)
    chex.assert_trees_all_equal(integers, expected)
    for path, encoding in flat(given.encodings).items():
        layer = expected
        for part in path.split("/")[:-1]:
            layer = layer[part]
        np.testing.assert_array_equal(
            np.ravel(encoding.scale), np.ravel(np.asarray(layer["scale"], np.float32)), path
        )

    weights, _ = quantsim.export_base(
        tmp_path, given.params, given.encodings, integers=True, specs=specs
    )
    read = nested(safetensors.numpy.load_file(weights))
    chex.assert_trees_all_equal(
        peft.dequantize_checkpoint(read), peft.dequantize_checkpoint(expected)
    )

    with peft.ModuleInterceptor(Wrap(method)):
        run = jax.jit(given.model.apply)({"params": integers}, given.inputs)
    simulated = given.sim.apply({"params": given.params}, given.inputs, encodings=given.encodings)
    assert_close(run, simulated)
    plain = given.model.apply({"params": given.params}, given.inputs)
    assert np.max(np.abs(plain - simulated)) > 1e-3 * np.max(np.abs(plain))


@pytest.mark.parametrize(
    "bitwidth", [2, 9, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (4, 8, 16))]
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("blocks", [{}, {"block_size": 2}])
def test_integers_of_other_quantizers_are_codes(bitwidth, symmetric, blocks, tmp_path):
    """The nearest point of the grid to each weight: signed for a symmetric grid."""
    granularity = "block" if blocks else "channel"
    weights = Quantizer(bitwidth, symmetric=symmetric, granularity=granularity, **blocks)
    given = small(dataclasses.replace(NOTHING, weights=weights))
    integers = quantsim.integer_params(given.params, given.encodings)
    below = 2 ** (bitwidth - 1)
    for layer in ("one", "two"):
        found, kernel = np.asarray(integers[layer]["kernel"]), given.params[layer]["kernel"]
        encoding = given.encodings[layer]["kernel"]
        wide = 16 if bitwidth > 8 else 8
        assert found.dtype == np.dtype(f"{'' if symmetric else 'u'}int{wide}")
        low, high = (-below, below - 1) if symmetric else (0, 2 * below - 1)
        assert low <= found.min() <= found.max() <= high
        times = [n // m for n, m in zip(kernel.shape, encoding.scale.shape, strict=True)]
        scale, offset = (
            np.kron(np.asarray(leaf, np.float64), np.ones(times))
            for leaf in (encoding.scale, encoding.offset)
        )
        value = (found.astype(np.float64) + (0 if symmetric else offset)) * scale
        ends = (
            (low + (0 if symmetric else offset)) * scale,
            (high + (0 if symmetric else offset)) * scale,
        )
        inside = np.clip(np.asarray(kernel, np.float64), *ends)
        np.testing.assert_array_less(np.abs(value - inside), scale * (0.5 + 1e-2))
        np.testing.assert_array_equal(
            value.astype(np.float32),
            np.asarray(quantsim.fake_quantize(kernel, encoding.scale, encoding.offset, bitwidth)),
        )
        np.testing.assert_array_equal(integers[layer]["bias"], given.params[layer]["bias"])
    weights_file, _ = quantsim.export_base(tmp_path, given.params, given.encodings, integers=True)
    base = peft.split_params(integers)[0]
    chex.assert_trees_all_equal(
        safetensors.numpy.load_file(weights_file), flatten_dict(base, sep="/")
    )


def test_integers_of_several_methods():
    rules = (
        QuantizerRule("dense/kernel", Quantizer(method="int8")),
        QuantizerRule("einsum/kernel", Quantizer(method="q4_0")),
        QuantizerRule("head/kernel", None),
    )
    given = stacked(dataclasses.replace(NOTHING, weights=Quantizer(4), rules=rules))
    specs = peft.layer_specs(given.model, given.inputs)
    integers = quantsim.integer_params(given.params, given.encodings, specs=specs)
    for method, name in (("int8", "dense"), ("q4_0", "einsum")):
        one = peft.quantize_checkpoint(
            given.params, method=method, specs=specs, select=lambda path, name=name: name in path
        )
        chex.assert_trees_all_equal(integers[name], one[name])
    assert integers["layers"]["fc"]["kernel"].dtype == jnp.uint8
    assert integers["head"]["kernel"] is given.params["head"]["kernel"]


# --- The same bytes ------------------------------------------------------------------------------


@pytest.mark.parametrize("integers", [False, True])
def test_the_base_is_the_same_whatever_adapters_are_there(integers, tmp_path):
    given = small()
    base, lora = peft.split_params(given.params)
    named = peft.add_adapter(given.params, randomised(lora, 3), "second")
    renamed = nested(
        {path.replace("/lora/", "/lora.second/"): e for path, e in flat(given.encodings).items()}
    )
    of_base = nested({p: e for p, e in flat(given.encodings).items() if not e.of_adapter})
    backwards = dict(reversed(flat(given.encodings).items()))
    cases = {
        "none": (base, of_base),
        "one": (given.params, given.encodings),
        "other": (peft.merge_params(base, randomised(lora, 1)), given.encodings),
        "two": (named, given.encodings),
        "renamed": (named, renamed),
        "frozen": (frozen_dict(named), quantsim.freeze(renamed)),
        "order": (dict(reversed(named.items())), nested(backwards)),
        "numpy": (jax.tree.map(np.asarray, named), jax.tree.map(np.asarray, renamed)),
    }
    found = {}
    for name, (params, encodings) in cases.items():
        (tmp_path / name).mkdir()
        files = quantsim.export_base(tmp_path / name, params, encodings, integers=integers)
        assert sorted(tmp_path.joinpath(name).iterdir()) == sorted(files)
        found[name] = content(*files)
    again = content(*quantsim.export_base(tmp_path / "none", named, renamed, integers=integers))
    assert all(one == again for one in found.values()), found.keys()


def test_an_adapter_is_the_same_whatever_its_name(tmp_path):
    """Tensors and entries lie under paths without the adapter's name."""
    given = small()
    lora = peft.get_adapter(given.params)
    params = peft.add_adapter(peft.split_params(given.params)[0], lora, "second")
    params = peft.add_adapter(params, randomised(lora, 7), "third")
    renamed = {
        path.replace("/lora/", "/lora.second/"): e for path, e in flat(given.encodings).items()
    }
    renamed |= {
        path.replace(".second/", ".third/"): e for path, e in renamed.items() if ".second/" in path
    }
    export = functools.partial(quantsim.export_adapter, tmp_path)
    expected = content(*export(given.params, given.encodings, prefix="a"))
    found = export(params, nested(renamed), prefix="b", adapter_name="second")
    assert content(*found) == expected
    alone = export(lora, given.encodings, prefix="c")
    assert content(*alone) == expected
    assert set(safetensors.numpy.load_file(found[0])) == {"one/lora/a", "one/lora/b"}


def test_an_adapter_comes_back_to_the_bit(tmp_path):
    given = small()
    file, _ = quantsim.export_adapter(
        tmp_path, given.params, given.encodings, prefix="one", metadata=given.metadata
    )
    other = peft.merge_params(
        peft.split_params(given.params)[0], randomised(peft.get_adapter(given.params), 5)
    )
    for source in (file, str(file), peft.get_adapter(given.params)):
        back = quantsim.use_adapter(other, source, given.metadata)
        chex.assert_trees_all_equal(back, given.params)


# --- Whole or not at all -------------------------------------------------------------------------


def pairs(given):
    """Two exports of which both files differ."""
    scaled = jax.tree.map(lambda leaf: leaf * 2, given.params)
    encodings = jax.tree.map(lambda leaf: leaf, given.encodings)
    wide = {
        path: e.replace(scale=e.scale * 2) if not e.quantizer.method else e
        for path, e in flat(encodings).items()
    }
    return (given.params, given.encodings), (scaled, nested(wide))


def exporter(kind, directory):
    if kind == "base":
        return functools.partial(quantsim.export_base, directory)
    return functools.partial(quantsim.export_adapter, directory, prefix="base")


@pytest.mark.parametrize("kind", ["base", "adapter"])
@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize(
    ("target", "name"), [(os, "replace"), (os, "fsync"), (_files, "write_safetensors")]
)
@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_failure_leaves_one_pair_or_the_other(
    kind, is_new, target, name, failing, tmp_path, monkeypatch
):
    """Never new weights beside old encodings, and nothing else."""
    given = small()
    old, new = pairs(given)
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    export = exporter(kind, tmp_path / "old")
    before = [] if is_new else content(*export(*old))
    after = content(*exporter(kind, tmp_path / "new")(*new))
    assert not set(before) & set(after)
    calls, function = [], getattr(target, name)

    def burn(*args, **kwargs):
        calls.append(args)
        if len(calls) == failing:
            raise OSError("the disk burns")
        return function(*args, **kwargs)

    monkeypatch.setattr(target, name, burn)
    try:
        export(*new)
    except OSError:
        assert len(calls) >= failing
    else:
        assert len(calls) < failing
    monkeypatch.undo()
    found = content(
        *sorted((tmp_path / "old").iterdir(), key=lambda path: path.suffix != ".safetensors")
    )
    assert found in (before, after), f"{len(found)} files, which belong to different exports"


def test_a_failure_while_tensors_are_written(tmp_path, monkeypatch):
    """The disk is full in the middle of a file."""
    given = small()
    old, new = pairs(given)
    files = quantsim.export_base(tmp_path, *old)
    before = content(*files)

    class Full:
        def __init__(self, file):
            self.file, self.room = file, 40

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

    opened = pathlib.Path.open
    monkeypatch.setattr(
        pathlib.Path,
        "open",
        lambda path, mode="r", **k: (
            Full(opened(path, mode)) if "x" in mode else opened(path, mode, **k)
        ),
    )
    with pytest.raises(OSError, match="No space left"):
        quantsim.export_base(tmp_path, *new)
    monkeypatch.undo()
    assert content(*files) == before
    assert sorted(tmp_path.iterdir()) == sorted(files)


# --- Metadata ------------------------------------------------------------------------------------


def test_metadata_are_json_and_come_back(tmp_path):
    metadata = small(targets=("one", "two")).metadata
    path = tmp_path / "metadata.json"
    metadata.save(path)
    text = path.read_bytes()
    assert AdapterMetadata.load(path) == metadata == AdapterMetadata.load(str(path))
    assert AdapterMetadata.from_dict(metadata.to_dict()) == metadata
    metadata.save(path)
    assert path.read_bytes() == text
    layer = json.loads(text)["adapters"]["default"]["one/lora"]
    shapes = {"a": [4, 2], "b": [2, 6]}
    paths = {"a": "one/lora/a", "b": "one/lora/b"}
    assert layer == {**paths, "rank": 2, "alpha": 4, "scaling": 2.0, "shapes": shapes}
    assert [*tmp_path.iterdir()] == [path]


def test_metadata_of_several_adapters(tmp_path):
    """Named adapters each have their layers, and files say nothing of their order."""
    specs = peft.lora_specs(small().model, X)
    named = {path.replace("/lora", "/lora.second"): spec for path, spec in specs.items()}
    both = quantsim.adapter_metadata({**specs, **named})
    other = quantsim.adapter_metadata({**named, **specs})
    assert set(both.names) == {"default", "second"}
    assert both.layers("second")["one/lora.second"].a == "one/lora.second/a"
    both.save(tmp_path / "a")
    other.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert AdapterMetadata.load(tmp_path / "a") == both


def test_an_unfinished_metadata_file_does_not_replace_a_finished_one(tmp_path, monkeypatch):
    path = tmp_path / "metadata.json"
    small().metadata.save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("the disk burns")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="the disk burns"):
        small(rank=3).metadata.save(path)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


# --- Hostile files -------------------------------------------------------------------------------

RAW = {
    "empty": b"",
    "binary": b"\xff\xfe\x00\x80",
    "pickle": b"\x80\x04\x95\x10",
    "null": b"null",
    "list": b"[]",
    "number": b"3",
    "string": b'"1.0.0"',
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "long integer": b'{"version": ' + b"9" * 5000 + b"}",
    "no object": b"NaN",
}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
@pytest.mark.parametrize("kind", ["encodings", "metadata", "adapter"])
def test_files_of_anything_else(kind, raw, tmp_path):
    path, given = tmp_path / "hostile", small()
    path.write_bytes(raw)
    read = {
        "encodings": lambda: quantsim.load_encodings(path, given.sites),
        "metadata": lambda: AdapterMetadata.load(path),
        "adapter": lambda: quantsim.use_adapter(given.params, path, given.metadata),
    }
    with pytest.raises(ValueError, match="hostile"):
        read[kind]()


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_files_that_are_truncated(part, tmp_path):
    given = small()
    files = quantsim.export_adapter(
        tmp_path, given.params, given.encodings, prefix="cut", metadata=given.metadata
    )
    metadata = tmp_path / "cut.json"
    given.metadata.save(metadata)
    for path in (*files, metadata):
        whole = path.read_bytes().rstrip()
        path.write_bytes(whole[: int(part * len(whole))])
    reads = (
        lambda: quantsim.use_adapter(given.params, files[0], given.metadata),
        lambda: quantsim.load_encodings(files[1], given.sites),
        lambda: AdapterMetadata.load(metadata),
    )
    for read in reads:
        with pytest.raises(ValueError, match="cut"):
            read()


def test_files_that_are_not_there(tmp_path):
    given, path = small(), tmp_path / "nothing"
    for wrong in (path, tmp_path):
        reads = (
            lambda wrong=wrong: quantsim.use_adapter(given.params, wrong, given.metadata),
            lambda wrong=wrong: quantsim.load_encodings(wrong, given.sites),
            lambda wrong=wrong: AdapterMetadata.load(wrong),
        )
        for read in reads:
            with pytest.raises((ValueError, OSError), match=wrong.name):
                read()


KERNEL = "one/kernel"
ENTRY = {
    "name": [
        None,
        3,
        ["one/kernel"],
        "",
        "one",
        "one/kernel/kernel",
        "three/kernel",
        "/one/kernel",
    ],
    "bw": [None, 4, "8", True, [8], 1e400],
    "dtype": [None, "FLOAT", "int", 3],
    "is_sym": [None, "True", False, []],
    "enc_type": [None, "PER_TENSOR", "PER_BLOCK", 3, {}],
    "scale": [
        *(None, 0.1, {}, [], "0.1" * 6),
        *([value] * 6 for value in ("0.1", "a", True, None, [0.1], {}, 10**400)),
        *([value] * 6 for value in (float("nan"), float("inf"), 0, -0.1, 1e300, 1e-60)),
        [0.1] * 7,
        [0.1] * 1_000_000,
    ],
    "offset": [
        *(None, -128, {}, []),
        *([value] * 6 for value in ("-128", True, None, [-128], {}, 10**400)),
        *([value] * 6 for value in (float("nan"), float("-inf"), -127, -128.5, 5, -300)),
    ],
}


def hostile_entry(tmp_path, path, change):
    """A document that is whole but for one entry, in a file of its own."""
    given = small()
    _, file = quantsim.export_base(tmp_path, given.params, given.encodings, prefix="hostile")
    data = json.loads(file.read_bytes())
    change({entry["name"]: entry for key in LISTS for entry in data[key]}[path], data)
    file.write_text(json.dumps(data))
    return lambda: quantsim.load_encodings(file, given.sites)


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in ENTRY.items() for value in values],
    ids=lambda value: repr(value)[:24],
)
def test_entries_of_anything_else(field, value, tmp_path):
    read = hostile_entry(tmp_path, KERNEL, lambda entry, _: entry.update({field: value}))
    with pytest.raises(ValueError, match="hostile") as error:
        read()
    assert len(str(error.value)) < 1000
    if field != "name":
        assert KERNEL in str(error.value)


@pytest.mark.parametrize("field", FIELDS)
def test_entries_that_lack_something(field, tmp_path):
    with pytest.raises(ValueError, match="hostile"):
        hostile_entry(tmp_path, KERNEL, lambda entry, _: entry.pop(field))()


@pytest.mark.parametrize("offset", [1, 0.5, -1.5, -256, -(2**40)])
def test_offsets_beyond_the_grid(offset, tmp_path):
    read = hostile_entry(tmp_path, "one/input", lambda entry, _: entry.update(offset=[offset]))
    with pytest.raises(ValueError, match=r"hostile.*one/input"):
        read()


DOCUMENTS = {
    "version": lambda data: data.update(version="2.0.0"),
    "no version": lambda data: data.pop("version"),
    "version of a number": lambda data: data.update(version=1.0),
    "no parameters": lambda data: data.pop("param_encodings"),
    "no activations": lambda data: data.pop("activation_encodings"),
    "an object of entries": lambda data: data.update(param_encodings={"a": 1}),
    "an entry of a number": lambda data: data.update(param_encodings=[3]),
    "an entry of nothing": lambda data: data.update(param_encodings=[None]),
    "an entry twice": lambda data: data["param_encodings"].append(data["param_encodings"][0]),
    "the wrong list": lambda data: data["activation_encodings"].append(
        data["param_encodings"].pop()
    ),
}


@pytest.mark.parametrize("change", DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents_of_anything_else(change, tmp_path):
    with pytest.raises(ValueError, match="hostile"):
        hostile_entry(tmp_path, KERNEL, lambda _, data: change(data))()


LORA = {"one/lora/a": np.ones((4, 2), np.float32), "one/lora/b": np.ones((2, 6), np.float32)}
TENSORS = {
    "nothing": ({}, "adapter"),
    "only a": ({"one/lora/a": LORA["one/lora/a"]}, "one/lora/b"),
    "another layer": ({k.replace("one", "two"): v for k, v in LORA.items()}, "two/lora/a"),
    "a tensor above": (LORA | {"one/lora": np.ones(2)}, "one/lora"),
    "a tensor below": (LORA | {"one/lora/a/x": np.ones(2)}, "one/lora/a"),
    "a tensor beside": (LORA | {"one/lora/c": np.ones(2)}, "one/lora/c"),
    "one of the base": (LORA | {"one/kernel": np.ones((4, 6))}, "one/kernel"),
    "no name": (LORA | {"": np.ones(2)}, "''"),
    "rank": (LORA | {"one/lora/a": np.ones((4, 3), np.float32)}, "one/lora"),
    "inputs": (LORA | {"one/lora/a": np.ones((9, 2), np.float32)}, "one/lora"),
    "outputs": (LORA | {"one/lora/b": np.ones((2, 7), np.float32)}, "one/lora"),
    "transposed": (LORA | {"one/lora/b": np.ones((6, 2), np.float32)}, "one/lora"),
    "a vector": (LORA | {"one/lora/b": np.ones(2, np.float32)}, "one/lora"),
    "integers": ({k: v.astype(np.int32) for k, v in LORA.items()}, "one/lora"),
    "two names": (LORA | {k.replace("lora", "lora.x"): v for k, v in LORA.items()}, "x"),
}
TEXTS = ("[1]", "null", "3", '"a"', "{", "{}", '{"one/lora/a": NaN}', '{"one/lora/a": null}')


@pytest.mark.parametrize(("tensors", "named"), TENSORS.values(), ids=TENSORS)
def test_adapters_of_anything_else(tensors, named, tmp_path):
    """The file, and what of it is wrong, are named; nothing is dropped."""
    given, path = small(), tmp_path / "hostile.safetensors"
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"hostile\.safetensors") as error:
        quantsim.use_adapter(given.params, path, given.metadata)
    assert named in str(error.value).partition("hostile.safetensors")[2]


@pytest.mark.parametrize("text", [*TEXTS, "[" * 100_000], ids=lambda text: text[:20])
def test_scalings_of_anything_else(text, tmp_path):
    given, path = small(), tmp_path / "hostile.safetensors"
    safetensors.numpy.save_file(LORA, path, metadata={"adapter": text})
    with pytest.raises(ValueError, match=r"hostile\.safetensors"):
        quantsim.use_adapter(given.params, path, given.metadata)


LAYER = {
    "a": [None, 3, ["x"], "", "a"],
    "b": [None, {}, "one/lora/a"],
    "rank": [None, "2", -1, 0, 2.5, True],
    "alpha": ["4", True, [], float("nan")],
    "scaling": [None, "2", True, float("nan"), float("inf")],
    "further": [1],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in LAYER.items() for value in values],
    ids=repr,
)
def test_metadata_of_anything_else(field, value, tmp_path):
    path, data = tmp_path / "hostile.json", copy.deepcopy(small().metadata.to_dict())
    data["adapters"]["default"]["one/lora"][field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"hostile\.json"):
        AdapterMetadata.load(path)


ADAPTERS = {
    "no format": {"format": None},
    "version": {"version": 2},
    "version of text": {"version": "1"},
    "adapters of nothing": {"adapters": None},
    "a list of adapters": {"adapters": []},
    "a list of layers": {"adapters": {"default": []}},
    "a list as a layer": {"adapters": {"default": {"one/lora": []}}},
    "an empty layer": {"adapters": {"default": {"one/lora": {}}}},
}


@pytest.mark.parametrize("change", ADAPTERS.values(), ids=ADAPTERS)
def test_metadata_of_another_form(change, tmp_path):
    path = tmp_path / "hostile.json"
    path.write_text(json.dumps(small().metadata.to_dict() | change))
    with pytest.raises(ValueError, match=r"hostile\.json"):
        AdapterMetadata.load(path)
