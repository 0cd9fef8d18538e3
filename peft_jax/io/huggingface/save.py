"""Adapters in the files of Hugging Face's peft: `save_adapter`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from peft_jax._config import CONFIG_FILE, LoraConfig
from peft_jax._numerics import as_stored
from peft_jax._spec import LayerSpec, LoraSpec
from peft_jax._trees import children, is_adapter, is_branch, named_as
from peft_jax.io.files.atomic import sync
from peft_jax.io.files.safetensors import TensorStream, write_safetensors
from peft_jax.io.huggingface.agreement import TENSORS_FILE, both_names, check_config, without_names
from peft_jax.io.huggingface.config import digest, renamed_config
from peft_jax.io.huggingface.keys import Placement, Tensor, collected
from peft_jax.io.huggingface.metadata import Metadata
from peft_jax.io.huggingface.module_names import Renames
from peft_jax.io.huggingface.nesting import Placed

StrPath = str | os.PathLike[str]
Arrays = dict[str, Any]


def save_adapter(
    path: StrPath,
    lora: Any,
    *,
    config: LoraConfig,
    specs: Mapping[str, LoraSpec | LayerSpec],
    renames: Mapping[str, str] | None = None,
    adapter_name: str | None = None,
) -> None:
    """Writes an adapter as Hugging Face's peft does, whose ``PeftModel.from_pretrained`` reads it.

    The directory gets ``adapter_config.json`` and ``adapter_model.safetensors``. There
    ``base_model.model.<name>.lora_A.weight (r, in)`` and ``lora_B.weight (out, r)`` are ``a`` and
    ``b`` transposed, axes joined where a layer has several inputs or outputs: those in the order of
    the kernel, these in that of the layer's output. Likewise for convolutions (``(r, in,
    *window)``, ``(out, r, 1, ...)``), embeddings (``lora_embedding_A (r, vocabulary)``), DoRA
    (``lora_magnitude_vector``), ``lora_bias`` (``lora_B.bias``), trained rows of embeddings, and
    parameters of experts (``(experts * r, in)``, ``(out, r * experts)``). Parameters that are
    trained whole lie in ``lora`` at their own paths; there a kernel is ``weight``, transposed.

    ``renames`` is a table from our paths to their names::

      {"layers_{}": "model.layers.{}", "attn/q": "self_attn.q_proj"}

    Keys are runs of parts of a path, slashes between them; values are what stands there in dotted
    names. At each place the longest run that matches counts; what none matches stays. ``{}``
    stands for a number or any other text within a part, and goes over in order. Layers that are
    stacked in one array (``nn.scan``) have a tensor each there: their value has one ``{}`` more
    than the key, behind the others, for the number of the layer: ``{"layers":
    "model.layers.{}"}``. A key may end in the name of a parameter, for a module that has several,
    or a parameter that is named otherwise there: ``{"norm/gain": "norm.weight"}``.

    The config is written in their names: where those differ from ours, or it says ``all-linear``,
    the modules are listed by their whole names. ``inference_mode`` is True, as in peft's files.
    Several ``target_parameters`` of one module are given in the order in which torch's module
    registers them. The specs travel in the file's metadata.

    Both files are complete before they go to their place, a new directory at once. In an old
    directory they are replaced one after the other; a mixed pair is told by `load_adapter`.

    Args:
      path: of the directory; other files in it stay.
      lora: adapters, and maybe whole parameters, in a tree, of any float dtype, which is kept.
      config: that the adapters were made by.
      specs: of the adapters, from `lora_specs`; and for whole weights of three or more axes, their
        `LayerSpec` too (``{**peft.lora_specs(...), **peft.layer_specs(...)}``).
      renames: see above.
      adapter_name: which adapters of the tree to save; None: there are those of one name alone.
        The files do not hold the name.

    Raises:
      ValueError: where there are no adapters; where arrays, specs and config disagree, so that the
        scaling would be another on the way back; where a layer has no such layout, as with a
        matrix of its own for each head; where names meet or renames match nothing.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"save_adapter takes a LoraConfig, got {type(config).__name__}.")
    adapters, whole, name = _contents(lora, adapter_name)
    named = without_names(specs, name)
    _check_specs(adapters, named)
    table = Renames(renames)
    placement = Placement(config, False, table, named)
    for place, arrays in adapters.items():
        placement.adapter(place, {leaf: np.shape(array) for leaf, array in arrays.items()})
    for place, array in whole.items():
        placement.whole(place, np.shape(array))
    tensors = placement.tensors()
    table.check_used()
    check_config(config, placement.items, theirs=False)
    arrays = {
        f"{place}/{leaf}": array for place, own in adapters.items() for leaf, array in own.items()
    } | whole
    _check_arrays(arrays, placement.items)
    written = dataclasses.replace(
        renamed_config(config, *both_names(placement.items, to_theirs=True)), inference_mode=True
    )
    metadata = Metadata(
        {"/".join(item.path): _whole_spec(item) for item in placement.items if item.spec},
        {place: (np.shape(array), _layer_spec(named, place)) for place, array in whole.items()},
        table.table,
        digest(written),
    )
    streams = {key: _stream(tensor, arrays) for key, tensor in tensors.items()}
    with _replaced_directory(path) as directory:
        write_safetensors(directory / TENSORS_FILE, streams, metadata.to_texts())
        written.save_pretrained(directory)


def _host(leaf: Any) -> np.ndarray[Any, Any]:
    return np.asarray(jax.device_get(meta.unbox(leaf)))


def _contents(lora: Any, adapter_name: str | None) -> tuple[dict[str, Arrays], Arrays, str]:
    """Adapters of one name by nameless path, whole parameters, and that name, of a tree."""
    found: list[tuple[tuple[str, ...], str, Arrays]] = []
    whole: Arrays = {}

    def walk(tree: Any, path: tuple[str, ...]) -> None:
        if as_stored(meta.unbox(tree)) is not None:
            raise ValueError(
                f"'{'/'.join(path)}' is stored in few bits; files of adapters hold floats. Take "
                "the adapters alone (`peft.split_params`)."
            )
        if not is_branch(tree):
            whole["/".join(path)] = _host(tree)
            return
        for key, value in children(tree):
            if isinstance(tree, Mapping) and is_adapter(key, value):
                arrays = {leaf: _host(array) for leaf, array in value.items()}
                found.append(((*path, key.partition(".")[0]), named_as(key), arrays))
            else:
                walk(value, (*path, str(key)))

    walk(lora, ())
    names = sorted({name for _, name, _ in found})
    if not found or (adapter_name is not None and adapter_name not in names):
        raise ValueError(
            f"save_adapter: the tree holds no adapter"
            f"{'' if adapter_name is None else f' named {adapter_name!r}'}; there are {names}. "
            "Take `lora` from `peft.split_params`."
        )
    if adapter_name is None and len(names) > 1:
        raise ValueError(f"save_adapter: the tree holds adapters {names}; choose by adapter_name.")
    chosen = names[0] if adapter_name is None else adapter_name
    adapters = {"/".join(path): arrays for path, name, arrays in found if name == chosen}
    return adapters, whole, chosen


def _check_specs(adapters: Mapping[str, Arrays], specs: Mapping[str, Any]) -> None:
    known = [path for path, spec in specs.items() if isinstance(spec, LoraSpec)]
    errors = []
    for path in sorted(set(adapters) - set(known)):
        close = difflib.get_close_matches(path, known, 2)
        errors.append(f"'{path}' has no spec (close: {close})")
    errors += [f"'{path}' has no arrays" for path in sorted(set(known) - set(adapters))]
    collected(errors, "adapters and specs are not of one model (`peft.lora_specs`)")


def _check_arrays(arrays: Arrays, items: list[Placed]) -> None:
    """Every array is of floats, and has the shape that its layout says."""
    errors, left = [], set(arrays)
    for item in items:
        for layout in item.layouts:
            path = "/".join((*item.path, layout.leaf) if item.spec else item.path)
            left.discard(path)
            shape = item.stack.lengths + layout.our_shape
            if path not in arrays:
                errors.append(f"'{path}' is missing")
            elif not jnp.issubdtype(arrays[path].dtype, jnp.floating):
                errors.append(f"'{path}' is of {arrays[path].dtype}, and no float")
            elif _layers_first(item, arrays[path]).shape != shape:
                errors.append(f"'{path}' has shape {np.shape(arrays[path])}, not that of its spec")
    errors += [f"'{path}' is not in its spec" for path in sorted(left)]
    collected(errors, "arrays are not those that the specs speak of (`peft.lora_specs`)")


def _layers_first(item: Placed, array: Any) -> Any:
    return item.stack.first(array) if array.ndim >= len(item.stack.axes) else array


def _stream(tensor: Tensor, arrays: Arrays) -> TensorStream:
    item, layout = tensor.item, tensor.layout
    array = arrays["/".join((*item.path, layout.leaf) if item.spec else item.path)]

    def chunks() -> Iterator[Any]:
        layers = _layers_first(item, array).reshape((-1, *layout.our_shape))
        yield layout.to_theirs(layers[tensor.layer])

    return TensorStream(array.dtype, layout.their_shape, chunks)


def _whole_spec(item: Placed) -> LoraSpec:
    """The spec, with the shape of the parameter."""
    assert item.spec is not None
    if item.spec.shape is not None or item.spec.variant == "tokens":
        return item.spec
    sizes = {k: v for layout in item.layouts for k, v in layout.sizes.items()}
    shape = item.stack.lengths + tuple(sizes[c] for c in item.spec.letters[2])
    return dataclasses.replace(
        item.spec, shape=item.stack.back(np.broadcast_to(np.empty(()), shape)).shape
    )


def _layer_spec(specs: Mapping[str, Any], path: str) -> LayerSpec | None:
    spec = specs.get(path)
    return spec if isinstance(spec, LayerSpec) else None


@contextlib.contextmanager
def _replaced_directory(path: StrPath) -> Iterator[Path]:
    """A directory to write in, whose files take their places where the block ends without an error.

    A new directory appears at once; in an old one files are replaced one by one.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"save_adapter: {str(path)!r} is no directory.")
    is_new = not path.exists()
    above = path.parent if is_new else path
    above.mkdir(parents=True, exist_ok=True)
    temporary = above / f".{path.name[:100]}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        if is_new:
            os.replace(temporary, path)
        else:
            _replace_files(temporary, path)
        sync(above)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_files(source: Path, target: Path) -> None:
    """Moves both files over the old ones, or neither: an error puts the first one back."""
    names = [TENSORS_FILE, CONFIG_FILE]
    if _same(source / CONFIG_FILE, target / CONFIG_FILE):
        names.remove(CONFIG_FILE)
    old = {name: source / f"old_{name}" for name in names if (target / name).exists()}
    for name, kept in old.items():
        shutil.copy2(target / name, kept)
    moved = []
    try:
        for name in names:
            os.replace(source / name, target / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            if name in old:
                os.replace(old[name], target / name)
            else:
                (target / name).unlink()
        raise


def _same(file: Path, other: Path) -> bool:
    return other.is_file() and file.read_bytes() == other.read_bytes()
