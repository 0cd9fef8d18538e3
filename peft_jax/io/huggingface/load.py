"""Adapters in the files of Hugging Face's peft: `load_adapter`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from peft_jax._config import CONFIG_FILE, LoraConfig
from peft_jax._numerics import as_stored
from peft_jax._spec import LayerSpec, LoraSpec
from peft_jax._trees import DEFAULT, check_adapter_name, children, is_branch
from peft_jax.io.files.safetensors import SafetensorsFile
from peft_jax.io.huggingface.agreement import TENSORS_FILE, both_names, check_config, without_names
from peft_jax.io.huggingface.config import digest, renamed_config
from peft_jax.io.huggingface.infer_config import inferred_specs, inferred_whole
from peft_jax.io.huggingface.keys import Key, Placement, Tensor, collected, read_keys
from peft_jax.io.huggingface.metadata import Metadata
from peft_jax.io.huggingface.module_names import Renames

_PICKLED_FILE = "adapter_model.bin"

StrPath = str | os.PathLike[str]


def load_adapter(
    path: StrPath,
    *,
    specs: Mapping[str, LoraSpec | LayerSpec] | None = None,
    renames: Mapping[str, str] | None = None,
    dtype: Any = None,
    base: Any = None,
    adapter_name: str = DEFAULT,
) -> tuple[Any, LoraConfig]:
    """Reads an adapter that Hugging Face's peft or `save_adapter` wrote. Inverse of `save_adapter`.

    Without specs, those in the file's metadata serve; without those, names and shapes of tensors:
    dots become slashes, two axes are a Dense, more a Conv. Layers that heads split
    (``nn.DenseGeneral``, ``nn.Einsum``) need specs then. Nothing is unpickled.

    With ``bias="lora_only"`` peft 0.18 writes no biases, so that none are read. It sorts the keys
    of patterns when it writes a config, so that another may be the first to match than in training;
    that is an error where specs say so.

    Example::

      specs = peft.lora_specs(peft.get_peft_model(model, config), x)
      lora, config = peft.load_adapter("adapter", specs=specs)

    Args:
      path: of the directory.
      specs: of the adapters, from `lora_specs` of the adapted model, maybe with those of
        `layer_specs`; every tensor is checked against them, and their scaling against the config.
      renames: as in `save_adapter`; None: those that the file was saved with. Without specs the
        table is read backwards, and raises where it does not lead back.
      dtype: of the arrays; None: that of each tensor.
      base: parameters of the plain model, or their shapes (``jax.ShapeDtypeStruct``): they tell
        names and shapes of what was trained whole, of which a file of peft's says ``weight`` alone.
        None: it is a ``kernel``, or with one axis a ``scale``, unless specs or renames say
        otherwise.
      adapter_name: under which the adapters go into the tree.

    Returns:
      ``(lora, config)``: a tree of adapters and of whole parameters, of nested dicts (lists too
      become dicts, with numbers as keys), and the config in our names. With it `get_peft_model`
      makes the adapted model, and `lora_specs` its specs.

    Raises:
      ValueError: where a file is missing, broken, or of another kind; where tensors are missing,
        surplus, of another shape or rank than config and specs say, or no floats; where the
        config's scaling is not that of the specs.
    """
    check_adapter_name("load_adapter", adapter_name)
    dtype = None if dtype is None else jnp.dtype(dtype)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"load_adapter: dtype = {dtype} is no dtype of floats.")
    directory = Path(path)
    config = LoraConfig.from_pretrained(directory)
    with _opened(directory) as file:
        try:
            placement, tensors = _placed(file, config, specs, renames, base, adapter_name)
            _check_tensors(file, tensors, dtype)
            check_config(config, placement.items, theirs=True)
            lora: Any = {}
            for keys, tensor in _by_array(tensors):
                array = _read(file, keys, tensor, dtype)
                _insert(lora, _place(tensor, adapter_name), array)
        except ValueError as error:
            raise ValueError(f"{str(file.path)!r}: {str(error).removesuffix('.')}.") from error
    return lora, renamed_config(config, *both_names(placement.items, to_theirs=False))


def _opened(directory: Path) -> SafetensorsFile:
    file = directory / TENSORS_FILE
    if not file.exists() and (directory / _PICKLED_FILE).exists():
        return SafetensorsFile(directory / _PICKLED_FILE)  # which says why it is not read
    return SafetensorsFile(file)


def _placed(
    file: SafetensorsFile,
    config: LoraConfig,
    specs: Mapping[str, Any] | None,
    renames: Mapping[str, str] | None,
    base: Any,
    adapter_name: str,
) -> tuple[Placement, dict[str, Tensor]]:
    """What lies in the file, and which tensor is which."""
    own = Metadata.from_texts(file.metadata)
    if own is not None and own.config != digest(config):
        raise ValueError(
            f"its tensors were saved with another {CONFIG_FILE} than lies beside them. Save the "
            "adapter again, or give both files of one save"
        )
    table = Renames(own.renames if own is not None and renames is None else renames)
    keys = read_keys(file.names)
    shapes = {name: file.shape(name) for name in file.names}
    known: dict[str, Any] = {}
    if own is not None:
        known |= {path: spec for path, (_, spec) in own.whole.items() if spec is not None}
    if specs is not None:
        known |= without_names(specs, adapter_name)
    elif own is not None:
        known |= own.specs
    else:
        known |= inferred_specs(keys, shapes, config, table)
    placement = Placement(config, True, table, known, most=len(keys))
    for path, spec in known.items():
        if isinstance(spec, LoraSpec):
            placement.adapter(path, _arrays_of(path, spec, keys, shapes, table))
    whole = (
        {path: shape for path, (shape, _) in own.whole.items()}
        if own is not None
        else inferred_whole(keys, shapes, known, table, _shapes_of(base))
    )
    for path, shape in whole.items():
        placement.whole(path, shape)
    tensors = placement.tensors(shapes if own is None else None)
    table.check_used()
    missing, surplus = sorted(set(tensors) - set(keys)), sorted(set(keys) - set(tensors))
    collected(
        [*(f"{key!r} is missing" for key in missing), *(f"{key!r} is surplus" for key in surplus)],
        "the file does not hold the tensors of these adapters",
    )
    return placement, tensors


def _shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a tree that are not stored in few bits, by slashed path."""
    found: dict[str, tuple[int, ...]] = {}

    def walk(tree: Any, path: tuple[str, ...]) -> None:
        if as_stored(meta.unbox(tree)) is None and is_branch(tree):
            for key, value in children(tree):
                walk(value, (*path, str(key)))
        elif as_stored(meta.unbox(tree)) is None:
            found["/".join(path)] = tuple(meta.unbox(tree).shape)

    walk({} if tree is None else tree, ())
    return found


def _arrays_of(
    path: str,
    spec: LoraSpec,
    keys: Mapping[str, Key],
    shapes: Mapping[str, tuple[int, ...]],
    renames: Renames,
) -> dict[str, tuple[int, ...]] | None:
    """Shapes of ``a`` and ``b`` for a spec without a shape, of a plain matrix."""
    if spec.shape is not None or spec.param is None or len(spec.letters[2]) != 2:
        return None
    name = renames.forward((*path.split("/")[:-1], spec.param))
    if name.places:
        return None
    module = name.parts if name.takes_last else name.parts[:-1]
    own = {key.end: shapes[full] for full, key in keys.items() if key.module == module}
    ends = (
        ("lora_embedding_A", "lora_embedding_B")
        if spec.kind == "embed"
        else ("lora_A.weight", "lora_B.weight")
    )
    if not set(ends) <= set(own):
        return None
    return {leaf: own[end][::-1] for leaf, end in zip("ab", ends, strict=True)}


def _check_tensors(file: SafetensorsFile, tensors: Mapping[str, Tensor], dtype: Any) -> None:
    errors = []
    for key, tensor in tensors.items():
        wanted, found = tensor.layout.their_shape, file.shape(key)
        if wanted != found:
            errors.append(f"{key!r} has shape {found} for {wanted}")
        if not jnp.issubdtype(file.dtype(key), jnp.floating):
            errors.append(f"{key!r} is of {file.dtype(key)}, and no float")
    collected(errors, "tensors are not as specs and config say")
    wide = [key for key in tensors if file.dtype(key) == np.float64]
    if wide and dtype is None and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"{wide[0]!r} is of float64, which JAX has under `jax_enable_x64` alone. Give a dtype, "
            "such as 'float32'"
        )


def _by_array(tensors: Mapping[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    """The keys of each array, in the order of its layers, and the first one's tensor."""
    found: dict[tuple[int, str], list[str]] = {}
    for key, tensor in tensors.items():
        found.setdefault((id(tensor.item), tensor.layout.leaf), []).append(key)
    return [(keys, tensors[keys[0]]) for keys in found.values()]


def _read(file: SafetensorsFile, keys: list[str], tensor: Tensor, dtype: Any) -> jax.Array:
    """One array, its layers stacked."""
    item, layout = tensor.item, tensor.layout
    dtypes = {file.dtype(key) for key in keys}
    if len(dtypes) > 1 and dtype is None:
        raise ValueError(
            f"layers of '{'/'.join(item.path)}' are of {sorted(map(str, dtypes))}. Give a dtype"
        )
    kind = dtypes.pop() if dtype is None else dtype
    layers = [layout.to_ours(file.read(key)).astype(kind) for key in keys]
    if not item.stack.lengths:
        return jnp.asarray(layers[0])
    array = np.stack(layers).reshape(item.stack.lengths + layout.our_shape)
    return jnp.asarray(item.stack.back(array))


def _place(tensor: Tensor, adapter_name: str) -> tuple[str, ...]:
    """Where an array goes in the tree."""
    path = tensor.item.path
    if tensor.item.spec is None:
        return path
    own = "" if adapter_name == DEFAULT else f".{adapter_name}"
    return (*path[:-1], f"{path[-1]}{own}", tensor.layout.leaf)


def _insert(tree: dict[str, Any], path: tuple[str, ...], array: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ValueError(f"'{'/'.join(path)}' lies under an array")
    if path[-1] in tree:
        raise ValueError(f"'{'/'.join(path)}' is there twice")
    tree[path[-1]] = array
