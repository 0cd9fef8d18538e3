"""Files for a runtime: weights as safetensors, encodings as JSON in AIMET's schema 1.0.0."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import meta

from peft_jax._model import adapter_names, get_adapter, rename_adapter, without_adapters
from peft_jax._numerics import as_stored
from peft_jax._spec import LayerSpec
from peft_jax._trees import DEFAULT, children, is_branch, named_as
from peft_jax.io.files.atomic import replacing, replacing_both
from peft_jax.io.files.safetensors import SafetensorsFile, write_safetensors
from peft_jax.quantsim._encoding import Encoding, check_grid, flattened, nested
from peft_jax.quantsim._metadata import (
    ADAPTER_KEY,
    AdapterMetadata,
    check_metadata,
    nameless,
    scalings_text,
)
from peft_jax.quantsim._quantizer import LARGEST, Quantizer
from peft_jax.quantsim._sites import Site
from peft_jax.quantsim._to_integers import integer_params

VERSION, PART = "1.0.0", "part"
_ENC_TYPES = {"tensor": "PER_TENSOR", "channel": "PER_CHANNEL", "block": "PER_BLOCK"}


def export_base(
    directory: str | os.PathLike[str],
    params: Any,
    encodings: Any,
    *,
    prefix: str = "base",
    integers: bool = False,
    specs: Mapping[str, LayerSpec] | None = None,
) -> tuple[Path, Path]:
    """Writes the base's weights and its encodings, the same whatever adapters are there.

    ``<prefix>.safetensors`` holds the parameters under their slashed paths, stored values as
    `quantize_checkpoint` names them; ``<prefix>.encodings`` is JSON in the schema of AIMET:
    ``version`` 1.0.0, ``activation_encodings`` and ``param_encodings``, each a list of ``name``,
    ``dtype``, ``bw``, ``enc_type``, ``is_sym``, ``scale`` and ``offset`` (and ``block_size``), with
    ``value = (code + offset) * scale`` for codes from 0. Scales of channels and blocks are listed
    row after row of `Encoding.scale`.

    Args:
      directory: where both go; it has to exist.
      params: of the model.
      encodings: from `compute_encodings`.
      prefix: of the names of the files.
      integers: whether weights that have an encoding are written as integers; see `integer_params`.
      specs: from `layer_specs`, for `integer_params`.

    Returns:
      The paths of both files.

    Raises:
      ValueError: where there is nothing of the base among the encodings; nothing is written.
    """
    own = {path: e for path, e in flattened(encodings) if not e.of_adapter}
    base = without_adapters(params)
    if not own:
        raise ValueError(
            "There are no encodings of the base to export. Compute them first, by "
            "`quantsim.compute_encodings`."
        )
    _check_places(base, own)
    weights = integer_params(base, nested(own), specs=specs) if integers else base
    return _written(directory, prefix, dict(tensors_of(weights)), own, {PART: "base"})


def export_adapter(
    directory: str | os.PathLike[str],
    params: Any,
    encodings: Any,
    *,
    prefix: str,
    adapter_name: str = DEFAULT,
    metadata: AdapterMetadata | None = None,
) -> tuple[Path, Path]:
    """Writes an adapter's weights and its encodings, as `export_base` does the base's.

    Tensors lie under their slashed paths, without the adapter's name (``.../lora/a``).

    Args:
      directory: where both files go; it has to exist.
      params: of the model, or of adapters alone.
      encodings: from `compute_encodings`; those of the base are left out.
      prefix: of the names of the files.
      adapter_name: of the adapter.
      metadata: of the model's adapters: the adapter has to conform, and its scalings go along.

    Returns:
      The paths of both files.

    Raises:
      ValueError: where there is no such adapter, or one of its layers has no encodings; nothing is
        written.
    """
    names = adapter_names(params)
    if adapter_name not in names:
        raise ValueError(f"There is no adapter {adapter_name!r} to export, but {[*names]}.")
    lora = get_adapter(params, adapter_name)
    own = {
        nameless(path): encoding
        for path, encoding in flattened(encodings)
        if encoding.of_adapter and _is_of(path, adapter_name)
    }
    tensors = dict(tensors_of(lora))
    layers = {path.rpartition("/")[0] for path in tensors if path.endswith("/a")}
    bare = sorted(layers - {path.rpartition("/")[0] for path in own})
    if not own or bare:
        raise ValueError(
            f"The adapter {adapter_name!r} has no encodings{f' at {bare[:5]}' * bool(own)}: it "
            "cannot be exported before `quantsim.compute_encodings` ran with it, enabled."
        )
    _check_places(lora, {path: e for path, e in own.items() if e.of_parameter})
    texts = {PART: "adapter"}
    if metadata is not None:
        check_metadata("export_adapter", metadata)
        metadata.check(rename_adapter(lora, adapter_name), adapter_name)
        texts[ADAPTER_KEY] = scalings_text(metadata.layers(adapter_name))
    return _written(directory, prefix, tensors, own, texts)


def load_encodings(
    path: str | os.PathLike[str], sites: Mapping[str, Site], *, adapter_name: str = DEFAULT
) -> Any:
    """Encodings from a file in AIMET's schema 1.0.0; inverse of the exports.

    Args:
      path: of the file.
      sites: from `find_sites`: the shapes of scales, which the schema does not know, and the
        quantizers with which the file has to agree.
      adapter_name: of the adapter in the model whose encodings the file may hold.

    Returns:
      A tree of encodings, none of them frozen.

    Raises:
      ValueError: with the file and the name: where it is no such file, an entry is about no site,
        or says another bitwidth, symmetry, type or number of scales.
    """
    if not isinstance(sites, Mapping) or not all(isinstance(s, Site) for s in sites.values()):
        raise ValueError("load_encodings takes sites from `quantsim.find_sites(sim, *inputs)`.")
    places = {
        nameless(place) if site.spec.of_adapter else place: place
        for place, site in sites.items()
        if not site.spec.of_adapter or _is_of(place, adapter_name)
    }
    try:
        data = json.loads(Path(path).read_bytes())
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise ValueError(f"no encodings of version {VERSION}")
        found: dict[str, Encoding] = {}
        for key in ("activation_encodings", "param_encodings"):
            entries = data.get(key)
            if not isinstance(entries, list):
                raise ValueError(f"{key!r} is no list")
            for entry in entries:
                name = str(entry.get("name")) if isinstance(entry, dict) else str(None)
                if name not in places or places[name] in found:
                    raise ValueError(
                        f"{key!r} has an entry named {name!r}, which is "
                        f"{'there twice' if name in places else 'about no site of this model'}"
                    )
                site = sites[places[name]]
                found[places[name]] = _read(name, entry, site, key == "param_encodings")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)!r} cannot be read: {error}.") from error
    return nested(found)


# --- Tensors -------------------------------------------------------------------------------------


def tensors_of(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a tree by their slashed paths; stored values under the name of their layout."""
    tree = meta.unbox(tree)
    stored = as_stored(tree)
    if stored is not None:
        yield "/".join((*path, str(stored.layout))), np.asarray(stored.array)
    elif is_branch(tree):
        for key, value in children(tree):
            yield from tensors_of(value, (*path, str(key)))
    else:
        yield "/".join(path), np.asarray(tree)


def _check_places(tree: Any, encodings: Mapping[str, Encoding]) -> None:
    """Refuses encodings of parameters that are not there, or that have long left their grid."""
    arrays = dict(tensors_of(tree))
    shapes = {path: array.shape for path, array in arrays.items()}
    for path, encoding in encodings.items():
        if not encoding.of_parameter:
            continue
        check_grid(path, encoding)
        scale = tuple(np.shape(encoding.scale))
        shape = shapes.get(path)
        if (
            shape is None
            or len(shape) != len(scale)
            or any(n % m for n, m in zip(shape, scale, strict=True))
        ):
            raise ValueError(
                f"The encoding of '{path}' has scales of shape {scale}, but the parameters have "
                f"{'nothing there' if shape is None else f'shape {shape}'}. Export the parameters "
                "that the encodings were computed with."
            )
        _check_reach(path, arrays[path], encoding)


def _check_reach(path: str, array: np.ndarray, encoding: Encoding) -> None:
    """Refuses weights that reach twice as far as a grid that was made to hold them all."""
    quantizer = encoding.quantizer
    if not quantizer.is_calibrated or quantizer.calibration != "min_max" or not array.size:
        return
    reach = float(np.max(np.abs(array.astype(np.float32))))
    end = float(np.max(np.abs(np.asarray([encoding.min, encoding.max]))))
    if reach > 2 * end:
        raise ValueError(
            f"'{path}' reaches {reach:.4g}, but its grid ends at {end:.4g}: it was computed for "
            "other weights. Compute encodings anew, by `quantsim.compute_encodings`."
        )


def _is_of(path: str, adapter_name: str) -> bool:
    """Whether a path is of an array of the adapter of this name."""
    return named_as(path.split("/")[-2]) == adapter_name


# --- Encodings -----------------------------------------------------------------------------------


def _written(
    directory: str | os.PathLike[str],
    prefix: str,
    tensors: Mapping[str, np.ndarray],
    encodings: Mapping[str, Encoding],
    texts: Mapping[str, str],
) -> tuple[Path, Path]:
    """Both files, or none."""
    if not isinstance(prefix, str) or not prefix or Path(prefix).name != prefix or "\0" in prefix:
        raise ValueError(f"A prefix is the beginning of a file's name, got {prefix!r}.")
    if not isinstance(directory, str | os.PathLike) or not Path(directory).is_dir():
        raise ValueError(f"{directory!r} is no directory. Make it first.")
    weights = Path(directory) / f"{prefix}.safetensors"
    document = Path(directory) / f"{prefix}.encodings"
    _refuse_other_part(weights, texts[PART])
    data = {
        "version": VERSION,
        "activation_encodings": _entries(encodings, of_parameters=False),
        "param_encodings": _entries(encodings, of_parameters=True),
    }
    text = json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with replacing_both(weights, document) as (new_weights, new_document):
        write_safetensors(new_weights, tensors, texts)
        with replacing(new_document) as file:
            file.write(text.encode())
    return weights, document


def _refuse_other_part(path: Path, part: str) -> None:
    """An adapter does not take the base's place, nor the other way round."""
    if not path.exists():
        return
    with SafetensorsFile(path) as file:
        found = file.metadata.get(PART)
    if found != part:
        raise ValueError(
            f"{str(path)!r} holds {f'the {found}' * bool(found) or 'something else'}, not the "
            f"{part}. Choose another prefix, or remove it."
        )


def _entries(encodings: Mapping[str, Encoding], *, of_parameters: bool) -> list[dict[str, Any]]:
    return [
        _entry(path, encodings[path])
        for path in sorted(encodings)
        if encodings[path].of_parameter == of_parameters
    ]


def _entry(path: str, encoding: Encoding) -> dict[str, Any]:
    check_grid(path, encoding)
    scale = np.asarray(encoding.scale, np.float32)
    offset = np.rint(np.asarray(encoding.offset, np.float32)).astype(np.int64)
    entry = {
        "name": path,
        "dtype": "INT",
        "bw": encoding.bitwidth,
        "enc_type": _enc_type(encoding.quantizer, scale.size),
        "is_sym": encoding.symmetric,
        "scale": [float(value) for value in scale.ravel()],
        "offset": [int(value) for value in offset.ravel()],
    }
    if entry["enc_type"] == "PER_BLOCK":
        entry["block_size"] = encoding.quantizer.block_size
    return entry


def _enc_type(quantizer: Quantizer, scales: int) -> str:
    """Layers of a stack that have a scale each are channels of one tensor."""
    if quantizer.granularity == "tensor" and scales > 1:
        return _ENC_TYPES["channel"]
    return _ENC_TYPES[quantizer.granularity]


def _read(name: str, entry: Mapping[str, Any], site: Site, of_parameter: bool) -> Encoding:
    quantizer = site.quantizer
    count = int(np.prod(site.shape))
    expected = {
        "dtype": "INT",
        "bw": quantizer.bitwidth,
        "is_sym": quantizer.symmetric,
        "enc_type": _enc_type(quantizer, count),
    }
    if quantizer.granularity == "block":
        expected["block_size"] = quantizer.block_size
    for field, value in expected.items():
        if entry.get(field) != value or type(entry[field]) is not type(value):
            raise ValueError(
                f"{name!r} says {field} {entry.get(field)!r}, but the model simulates it with "
                f"{value!r}"
            )
    if of_parameter != site.spec.of_parameter:
        raise ValueError(f"{name!r} is in the wrong list")
    leaves = []
    for field in ("scale", "offset"):
        values = entry.get(field)
        if not isinstance(values, list) or len(values) != count:
            raise ValueError(f"{name!r} has not the {count} numbers of {field!r} that it needs")
        kinds = (int, float) if field == "scale" else (int,)
        if not all(type(value) in kinds and abs(value) < LARGEST for value in values):
            raise ValueError(f"{name!r} has in {field!r} what is no number of the kind")
        leaves.append(jnp.asarray(np.asarray(values, np.float32).reshape(site.shape)))
    spec = site.spec
    encoding = Encoding(leaves[0], leaves[1], quantizer, spec.of_parameter, spec.of_adapter)
    check_grid(name, encoding)
    return encoding
