"""GGUF files of adapters: files made here byte by byte are read or refused; what is not written."""

import struct
import sys

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import assert_rounded, key_of, numbers

import peft_jax as peft
from peft_jax.io.gguf.load_adapter import load_gguf_adapter
from peft_jax.io.gguf.save_adapter import export_gguf_adapter

TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}
META = {
    "general.architecture": "llama",
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": 6.0,
}


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def field(key, value):
    if isinstance(value, tuple):  # a type, and bytes
        return text(key) + struct.pack("<I", value[0]) + value[1]
    if isinstance(value, float):
        return text(key) + struct.pack("<If", 6, value)
    if isinstance(value, int):
        return text(key) + struct.pack("<II", 4, value)
    return text(key) + struct.pack("<I", 8) + text(value)


def file_bytes(tensors, meta=META, *, version=3, counts=None, alignment=32, offsets=None):
    """A GGUF file, as its specification says."""
    infos, data = b"", b""
    for name, array in tensors.items():
        offset = len(data) if offsets is None else offsets[name]
        infos += text(name) + struct.pack("<I", array.ndim)
        infos += struct.pack(f"<{array.ndim}Q", *array.shape[::-1])
        infos += struct.pack("<IQ", TYPES[str(array.dtype)], offset)
        data += array.tobytes()
        data += bytes(-len(data) % alignment)
    head = struct.pack("<4sI2Q", b"GGUF", version, *(counts or (len(tensors), len(meta))))
    head += b"".join(field(*item) for item in meta.items()) + infos
    return head + bytes(-len(head) % alignment) + data


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng((*shape, seed)).normal(size=shape).astype(dtype)


def pair(name, inputs, rank, outputs, dtype=np.float32, seed=0):
    """As llama.cpp has it: ``lora_a`` of the shape (r, in), ``lora_b`` of (out, r)."""
    return {
        f"{name}.lora_a": draw(rank, inputs, seed=seed, dtype=dtype),
        f"{name}.lora_b": draw(outputs, rank, seed=seed + 1, dtype=dtype),
    }


def their_delta(tensors, name, alpha=6.0):
    """What llama.cpp adds to a weight ``(out, in)``, in float64."""
    a, b = (np.asarray(tensors[f"{name}.lora_{x}"], np.float64) for x in "ab")
    return np.einsum("...or,...ri->...oi", b, a) * (alpha / b.shape[-1] if alpha else 1.0)


def our_delta(spec, adapter):
    """The kernel's change of a layer that is not stacked, in float64."""
    a, b = (np.asarray(adapter[name], np.float64) for name in "ab")
    return spec.scaling * np.einsum(spec.equation, a, b)


SPEC = peft.LoraSpec("kernel", "ir,ro->io", 3, 2.0, 6.0, kind="dense", shape=(8, 5))
ONE = pair("blk.0.attn_q.weight", 8, 3, 5)
NAMES = {"q/kernel": "blk.0.attn_q.weight"}


def load(tmp_path, data, specs=None, names=NAMES, **arguments):
    (tmp_path / "x.gguf").write_bytes(data)
    specs = {"q/lora": SPEC} if specs is None else specs
    return load_gguf_adapter(tmp_path / "x.gguf", specs=specs, names=names, **arguments)


# --- What is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("version", [2, 3])
def test_a_pair(tmp_path, dtype, version):
    tensors = pair("blk.0.attn_q.weight", 8, 3, 5, np.dtype(dtype))
    lora, specs = load(tmp_path, file_bytes(tensors, version=version))
    assert specs == {"q/lora": SPEC}
    assert lora["q"]["lora"]["a"].dtype == lora["q"]["lora"]["b"].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(lora["q"]["lora"]["a"], tensors["blk.0.attn_q.weight.lora_a"].T)
    np.testing.assert_array_equal(lora["q"]["lora"]["b"], tensors["blk.0.attn_q.weight.lora_b"].T)
    wide, _ = load(tmp_path, file_bytes(tensors), dtype=jnp.float32)
    assert_rounded(
        our_delta(SPEC, wide["q"]["lora"]), their_delta(tensors, "blk.0.attn_q.weight").T, 3
    )


@pytest.mark.parametrize("alpha", [6.0, 0.5, -3.0, 0.0, None])
@pytest.mark.parametrize("scaling", [2.0, 0.3, -1.0])
def test_the_model_s_own_scaling_is_taken_off(tmp_path, alpha, scaling):
    spec = peft.LoraSpec("kernel", "ir,ro->io", 3, scaling)
    meta = {**META, "adapter.lora.alpha": alpha}
    if alpha is None:
        del meta["adapter.lora.alpha"]
    lora, _ = load(tmp_path, file_bytes(ONE, meta), {"q/lora": spec})
    assert_rounded(
        our_delta(spec, lora["q"]["lora"]), their_delta(ONE, "blk.0.attn_q.weight", alpha).T, 3
    )


def test_other_metadata_and_alignments(tmp_path):
    strings = struct.pack("<IQ", 8, 2) + text("a") + text("bc")
    meta = {
        **META,
        "general.alignment": 128,
        "general.name": "ä",
        "tokenizer.tokens": (9, strings),
        "numbers": (9, struct.pack("<IQ3H", 2, 3, 1, 2, 3)),
        "flag": (7, b"\1"),
        "long": "x" * (1 << 21),
    }
    lora, _ = load(tmp_path, file_bytes(ONE, meta, alignment=128))
    np.testing.assert_array_equal(lora["q"]["lora"]["a"].T, ONE["blk.0.attn_q.weight.lora_a"])


class Model(nn.Module):
    """Heads, a table, and two stacks of layers: along axis 0, and along the last axis."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 8, name="table")(ids)
        x = nn.MultiHeadDotProductAttention(2, qkv_features=8, name="attention")(x)
        for name, axis in (("first", 0), ("last", -1)):
            stacked = nn.scan(
                Block, variable_axes={"params": axis}, split_rngs={"params": True}, length=3
            )
            x, _ = stacked(name=name)(x, None)
        return x


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(8, use_bias=False, name="up")(x), None


CONFIG = peft.LoraConfig(
    r=3,
    lora_alpha=6,
    use_rslora=True,
    target_modules=["table", "query", "out", "up"],
    rank_pattern={"attention.out": 2},
)
IDS = jnp.arange(4)[None]


def test_heads_tables_and_stacks(tmp_path):
    model = peft.get_peft_model(Model(), CONFIG)
    specs = peft.lora_specs(model, IDS)
    names = {
        "table/embedding": "token_embd.weight",
        "attention/query/kernel": "blk.0.attn_q.weight",
        "attention/out/kernel": "blk.0.attn_output.weight",
        "first/up/kernel": "blk.{}.ffn_up.weight",
        "last/up/kernel": ["a.weight", "c.weight", "b.weight"],
    }
    files = pair("blk.0.attn_q.weight", 8, 3, 8) | pair("blk.0.attn_output.weight", 8, 2, 8)
    for i, name in enumerate(["a", "b", "c", *(f"blk.{n}.ffn_up" for n in range(3))]):
        files |= pair(f"{name}.weight", 8, 3, 8, seed=10 * i)
    files |= {
        "token_embd.weight.lora_a": draw(11, 3, seed=90),
        "token_embd.weight.lora_b": draw(8, 3, seed=91),
    }
    lora, _ = load(tmp_path, file_bytes(files), specs, names)
    shapes = jax.eval_shape(lambda: model.init(key_of(0), IDS))["params"]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), peft.split_params(shapes).original)
    changed = peft.fuse_params(peft.merge_params(zeros, lora), specs=specs)
    expected = {
        "table/embedding": (
            files["token_embd.weight.lora_a"] @ files["token_embd.weight.lora_b"].T * 2
        ),
        "attention/query/kernel": their_delta(files, "blk.0.attn_q.weight").T.reshape(8, 2, 4),
        "attention/out/kernel": their_delta(files, "blk.0.attn_output.weight").T.reshape(2, 4, 8),
        "first/up/kernel": np.stack(
            [their_delta(files, f"blk.{i}.ffn_up.weight").T for i in range(3)]
        ),
        "last/up/kernel": np.stack([their_delta(files, f"{i}.weight").T for i in "acb"], -1),
    }
    flat = flax.traverse_util.flatten_dict(changed, sep="/")
    for path, value in expected.items():
        np.testing.assert_allclose(flat[path], value, rtol=1e-4, atol=1e-5)
    by_module = {path.rpartition("/")[0]: name for path, name in names.items()}
    for same in (names.__getitem__, by_module):
        again, _ = load(tmp_path, file_bytes(files), specs, same)
        chex.assert_trees_all_equal(again, lora)


def test_experts(tmp_path):
    batched = peft.LoraSpec("w", "eir,ero->eio", 2, 3.0, kind="experts", shape=(4, 8, 5))
    stacked = peft.LoraSpec("kernel", "...ir,...ro->...io", 2, 3.0, shape=(3, 4, 8, 5))
    stacked_names = {"x/kernel": "blk.{}.ffn_up_exps.weight"}
    one = {
        "blk.0.ffn_up_exps.weight.lora_a": draw(4, 2, 8),
        "blk.0.ffn_up_exps.weight.lora_b": draw(4, 5, 2),
    }
    lora, _ = load(
        tmp_path, file_bytes(one), {"x/lora_w": batched}, {"x/w": "blk.0.ffn_up_exps.weight"}
    )
    delta = our_delta(batched, lora["x"]["lora_w"])
    expected = their_delta(one, "blk.0.ffn_up_exps.weight").swapaxes(-1, -2)
    assert_rounded(delta, expected, 2)
    many = {
        f"blk.{i}.ffn_up_exps.weight.lora_{x}": draw(*shape, seed=i)
        for i in range(3)
        for x, shape in (("a", (4, 2, 8)), ("b", (4, 5, 2)))
    }
    lora, _ = load(tmp_path, file_bytes(many), {"x/lora": stacked}, stacked_names)
    a, b = (np.asarray(lora["x"]["lora"][x], np.float64) for x in "ab")
    expected = [their_delta(many, f"blk.{i}.ffn_up_exps.weight") for i in range(3)]
    assert_rounded(3 * (a @ b), np.stack(expected).swapaxes(-1, -2), 2)


def test_experts_that_share_b(tmp_path):
    """As an einsum over a batch axis has it: the file must hold the same b for each."""
    shared = peft.LoraSpec("w", "eir,ro->eio", 2, 3.0, outputs="eo", shape=(4, 8, 5))
    names = {"x/w": "blk.0.ffn_up_exps.weight"}
    b = draw(5, 2)
    tensors = {
        "blk.0.ffn_up_exps.weight.lora_a": draw(4, 2, 8),
        "blk.0.ffn_up_exps.weight.lora_b": np.stack([b] * 4),
    }
    lora, _ = load(tmp_path, file_bytes(tensors), {"x/lora": shared}, names)
    np.testing.assert_array_equal(lora["x"]["lora"]["b"], b.T)
    tensors["blk.0.ffn_up_exps.weight.lora_b"][1] += 1
    with pytest.raises(ValueError, match="its matrices differ along the axis 'e'"):
        load(tmp_path, file_bytes(tensors), {"x/lora": shared}, names)


def test_rows_of_heads_are_put_back(tmp_path):
    spec = peft.LoraSpec("kernel", "ir,ro->io", 3, 2.0, shape=(8, 12))
    tensors = pair("blk.0.attn_q.weight", 8, 3, 12)
    b = tensors["blk.0.attn_q.weight.lora_b"]
    reordered = b.reshape(2, 2, 3, 3).swapaxes(1, 2).reshape(12, 3)  # as the converter does
    tensors["blk.0.attn_q.weight.lora_b"] = reordered
    lora, _ = load(
        tmp_path, file_bytes(tensors), {"q/lora": spec}, permute_heads={"blk.*.attn_q.weight": 2}
    )
    np.testing.assert_array_equal(lora["q"]["lora"]["b"], b.T)


# --- What is refused -----------------------------------------------------------------------------


def test_a_file_cut_anywhere(tmp_path):
    data = file_bytes(ONE)
    for length in range(len(data) - 4):
        with pytest.raises(ValueError, match=r"x.gguf' is no GGUF file that can be read"):
            load(tmp_path, data[:length])


def test_a_byte_changed_anywhere(tmp_path):
    """Whatever a damaged header says, it is refused or read: nothing else is raised."""
    data = file_bytes(ONE)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(600):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data) - sum(x.nbytes for x in ONE.values()), 2):
            damaged[place] = rng.integers(256)
        try:
            load(tmp_path, bytes(damaged))
        except ValueError:
            refused += 1
    assert refused > 300


HUGE = 1 << 62


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not begin with 'GGUF'"),
        (b"PK\3\4" + bytes(100), "does not begin with 'GGUF'"),
        (file_bytes(ONE, version=1), r"its version is 1, and read are \(2, 3\)"),
        (file_bytes(ONE, version=3 << 24), r"its version is 50331648 \(big-endian\)"),
        (file_bytes(ONE, counts=(HUGE, 4)), "tensors and 4 fields do not fit into"),
        (file_bytes(ONE, counts=(2, HUGE)), "fields do not fit into"),
        (file_bytes(ONE, {b"\xff": "x"}), "is not UTF-8"),
        (file_bytes(ONE, {**META, "x": (9, struct.pack("<IQ", 0, HUGE))}), "more are to come"),
        (file_bytes(ONE, {**META, "x": (9, struct.pack("<IQ", 8, HUGE))}), "longer than the file"),
        (file_bytes(ONE, {**META, "x": (9, struct.pack("<IQ", 9, 1))}), "elements of the type 9"),
        (file_bytes(ONE, {**META, "x": (8, struct.pack("<Q", HUGE))}), "more are to come"),
        (file_bytes(ONE, {**META, "x": (13, b"")}), "a field has the type 13"),
        (file_bytes(ONE, {**META, "general.alignment": 24}), "its alignment is 24"),
        (file_bytes(ONE, {**META, "general.alignment": 0}), "its alignment is 0"),
        (file_bytes({"x" * 64: draw(2)}), "is 64 bytes long"),
        (file_bytes({"x": draw(2), "y": draw(2)}, offsets={"x": 0, "y": 0}), "rather than at"),
        (file_bytes({"x": draw(2)}, offsets={"x": HUGE}), "beyond the file's end"),
        (file_bytes({"x": draw(1, 1, 1, 1, 2)}), "has 5 axes"),
        (file_bytes({"x": draw(0, 2)}), r"has the shape \(0, 2\)"),
    ],
)
def test_hostile_files(tmp_path, data, message):
    with pytest.raises(ValueError, match=rf"x.gguf' is no GGUF file.*{message}"):
        load(tmp_path, data)


def test_hostile_tensors(tmp_path):
    data = file_bytes({"x": draw(2, 3)})
    shape = struct.pack("<2Q", 3, 2)
    for axes in ((1 << 32, 1 << 32), (3, HUGE)):
        with pytest.raises(ValueError, match="goes beyond the file's end"):
            load(tmp_path, data.replace(shape, struct.pack("<2Q", *axes)))
    with pytest.raises(ValueError, match=r"is of GGML's type 2, and read are \['BF16'"):
        load(tmp_path, data.replace(shape + bytes(4), shape + struct.pack("<I", 2)))
    twice = file_bytes({"x": draw(2), "y": draw(2)}).replace(text("y"), text("x"))
    with pytest.raises(ValueError, match="the tensor 'x' is there twice"):
        load(tmp_path, twice)
    twice = file_bytes(ONE, {**META, "general.typo": "x"}).replace(b"general.typo", b"general.type")
    with pytest.raises(ValueError, match=r"the field 'general.type' is there twice"):
        load(tmp_path, twice)
    for path in (tmp_path / "nowhere", tmp_path, None):
        with pytest.raises(ValueError, match="No GGUF file could be read from"):
            load_gguf_adapter(path, specs={"q/lora": SPEC}, names=NAMES)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"general.type": "model"}, "has general.type = 'model', which should be 'adapter'"),
        ({"adapter.type": "ia3"}, "has adapter.type = 'ia3'"),
        (
            {"general.architecture": "gpt2"},
            "general.architecture = 'gpt2', which should be 'llama'",
        ),
        ({"adapter.lora.alpha": 3}, "adapter.lora.alpha = 3, which is no finite float"),
        ({"adapter.lora.alpha": float("nan")}, "alpha = nan, which is no finite float"),
        (
            {"adapter.alora.invocation_tokens": (9, struct.pack("<IQI", 4, 1, 7))},
            "is an activated LoRA",
        ),
    ],
)
def test_metadata_of_another_kind(tmp_path, meta, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, file_bytes(ONE, {**META, **meta}), architecture="llama")


OTHER = pair("blk.0.attn_k.weight", 8, 3, 5)
NAN = {name: np.full_like(array, np.nan) for name, array in ONE.items()}


@pytest.mark.parametrize(
    ("tensors", "arguments", "message"),
    [
        ({}, {}, r"the file lacks: \['blk.0.attn_q.weight.lora_a'"),
        (ONE | OTHER, {}, r"no spec speaks of: \['blk.0.attn_k.weight.lora_a'"),
        (dict([*ONE.items()][:1]), {}, r"the file lacks: \['blk.0.attn_q.weight.lora_b'\]"),
        (ONE | {"blk.0.attn_norm.weight": draw(8)}, {}, r"speaks of: \['blk.0.attn_norm.weight'\]"),
        (pair("blk.0.attn_q.weight", 8, 2, 5), {}, r"'q/lora' \(rank 3\) needs \(3, 8\)"),
        (pair("blk.0.attn_q.weight", 5, 3, 8), {}, r"'q/lora' \(rank 3\) needs \(3, 8\)"),
        (NAN, {}, "'q/lora/a' of .* has numbers that are not finite in float32"),
        (ONE, {"dtype": "int8"}, "dtype = int8"),
        (ONE, {"dtype": "nonsense"}, "is no dtype"),
        (ONE, {"names": {"k/kernel": "x"}}, r"names lack 'q/kernel', .* \['k/kernel'\]"),
        (ONE, {"names": None}, "names are a mapping from paths of parameters"),
        (ONE, {"specs": {}}, "specs map the slashed path"),
        (ONE, {"specs": {"q/lora": "x"}}, "specs map the slashed path"),
        (ONE, {"permute_heads": {"blk.*.attn_k.weight": 2}}, "matches no tensor of one matrix"),
        (ONE, {"permute_heads": {"blk.*.attn_q.weight": 2}}, "its 5 rows are not so many pairs"),
    ],
)
def test_files_that_do_not_fit(tmp_path, tensors, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, file_bytes(tensors), **arguments)


# --- What is not written -------------------------------------------------------------------------


def dense_spec(**fields):
    return peft.LoraSpec(
        **{"param": "kernel", "equation": "ir,ro->io", "rank": 3, "kind": "dense", **fields}
    )


def adapter(inputs=8, rank=3, outputs=5):
    return {"a": numbers(inputs, rank), "b": numbers(rank, outputs)}


TREE = {"q": {"lora": adapter()}}
STACK = {"q": {"lora": {"a": numbers(2, 8, 3), "b": numbers(2, 3, 5)}}}
STACKED = dense_spec(equation="...ir,...ro->...io")


@pytest.mark.parametrize(
    ("lora", "spec", "arguments", "message"),
    [
        (
            {"q": {"lora": {**adapter(), "magnitude": numbers(5)}}},
            dense_spec(variant="dora"),
            {},
            "'q/lora' is one of DoRA; llama.cpp knows no such. Fuse the adapters",
        ),
        (
            {"q": {"lora": {**adapter(), "bias": numbers(5)}}},
            dense_spec(bias="bias"),
            {},
            "'q/lora' has a bias; llama.cpp",
        ),
        (
            {"q": {"lora_tokens": {"rows": numbers(2, 5)}}},
            dense_spec(variant="tokens", tokens=(1, 2)),
            {},
            "is rows of tokens; llama.cpp",
        ),
        (TREE, dense_spec(kind="conv"), {}, "is that of a convolution; llama.cpp"),
        (TREE, dense_spec(scaling=0.0), {}, "has the scaling 0"),
        (TREE, dense_spec(scaling=1e-60), {}, "is no float32 other than 0"),
        (
            {**TREE, "head": {"kernel": numbers(2, 2)}},
            dense_spec(),
            {},
            r"place: \['head/kernel'\]",
        ),
        ({"q": {"lora": {**adapter(), "bias": numbers(5)}}}, dense_spec(), {}, r"holds \['a', 'b"),
        ({"q": {"lora": adapter(rank=2)}}, dense_spec(alpha=3), {}, "the spec's rank is 3"),
        (TREE, dense_spec(shape=(8, 6)), {}, r"the adapted parameter has the shape \(8, 6\)"),
        (TREE, dense_spec(equation="oir,ro->oi"), {}, "does not fit its equation"),
        ({"q": {}}, None, {}, "the tree holds no adapters"),
        ({"q": {}}, dense_spec(), {}, "specs and parameters are of different models"),
        (TREE, None, {}, "Adapters without a spec"),
        (TREE, dense_spec(), {"specs": None}, "specs=None"),
        (TREE, dense_spec(), {"architecture": ""}, "architecture = ''"),
        (TREE, dense_spec(), {"alpha": 0}, "alpha = 0 is not a number other than 0"),
        (TREE, dense_spec(), {"alpha": 1e60}, "alpha = 1e.60 is not a number"),
        (TREE, dense_spec(), {"alpha": "8"}, "alpha = '8' is not a number"),
        (TREE, dense_spec(), {"dtype": "float64"}, "dtype = float64; it is one of float32"),
        (TREE, dense_spec(), {"dtype": "int8"}, "dtype = int8; it is one of float32"),
        (TREE, dense_spec(scaling=1e9), {"dtype": "float16", "alpha": 1}, "not finite in float16"),
        (TREE, dense_spec(), {"names": {}}, "names lack 'q/kernel'"),
        (TREE, dense_spec(), {"names": lambda path: 3}, "neither a name nor a list of names"),
        (TREE, dense_spec(), {"names": lambda path: "x" * 57}, "a string of 1 to 56 bytes"),
        (TREE, dense_spec(), {"names": lambda path: "x.{}.weight"}, "one without where there is"),
        (TREE, dense_spec(), {"names": lambda path: "q.lora_a"}, "is that of an adapter"),
        (TREE, dense_spec(), {"names": lambda path: "token_embd.weight"}, "is that of a table"),
        (TREE, dense_spec(kind="embed"), {}, "is not token_embd.weight, the one table"),
        (TREE, dense_spec(), {"names": lambda path: "up_exps.weight"}, "of experts in one tensor"),
        (STACK, STACKED, {}, r"of 2 layers stacked by \(2,\), and its name is 'blk.0.attn_q"),
        (STACK, STACKED, {"names": lambda path: ["x"]}, "of 2 layers, and there are 1 names"),
        (STACK, STACKED, {"names": lambda path: ["x", "x"]}, "would both be named 'x'"),
        (STACK, dense_spec(equation="eir,ero->eio"), {}, "one for each index of 'e'"),
        (
            TREE,
            dense_spec(),
            {"permute_heads": {"*": 0}},
            r"permute_heads\['\*'\] = 0 is no number",
        ),
        (TREE, dense_spec(), {"permute_heads": {"*": 2, "blk*": 3}}, "both 2 and 3 heads"),
    ],
)
def test_nothing_is_written_of_bad_input(tmp_path, lora, spec, arguments, message):
    path = next(iter(["q/" + name for name in lora["q"]] or ["q/lora"]))
    specs = {} if spec is None else {path: spec}
    given = {"specs": specs, "names": NAMES, "architecture": "llama", **arguments}
    with pytest.raises(ValueError, match=message):
        export_gguf_adapter(lora, tmp_path / "x.gguf", **given)
    assert not list(tmp_path.iterdir())


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"export_gguf_adapter needs the package `gguf`"):
        export_gguf_adapter(
            TREE,
            tmp_path / "x.gguf",
            specs={"q/lora": dense_spec()},
            names=NAMES,
            architecture="llama",
        )
    assert not list(tmp_path.iterdir())
