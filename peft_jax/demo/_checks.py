"""An adapter in a file, and what the demo checks before it is content."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import save_file

import peft_jax as peft
from peft_jax.demo._adaptation import Adaptation, Specs
from peft_jax.demo._digits import Digits
from peft_jax.demo._training import Params

TOLERANCE = 1e-5  # of fused logits, relative to the largest


def write_adapter(path: Path, lora: Params, specs: Specs) -> None:
    """Writes the adapter's arrays by their slashed paths, and with them what arrays cannot say."""
    flat = traverse_util.flatten_dict(lora, sep="/")
    described = json.dumps({name: spec.to_dict() for name, spec in specs.items()})
    arrays = {name: np.asarray(array) for name, array in flat.items()}
    save_file(arrays, path, metadata={"specs": described})


def read_adapter(path: Path) -> tuple[Params, Specs]:
    """The inverse of `write_adapter`."""
    with safe_open(path, framework="numpy") as file:
        names = file.keys()
        arrays = {name: file.get_tensor(name) for name in names}
        described = json.loads(file.metadata()["specs"])
    specs = {name: peft.LoraSpec.from_dict(spec) for name, spec in described.items()}
    return traverse_util.unflatten_dict(arrays, sep="/"), specs


def check_fusing(adaptation: Adaptation, digits: Digits) -> str:
    """Checks that the plain model on fused parameters answers as the adapted model does."""
    base, lora = adaptation.base, adaptation.lora
    params = peft.merge_params(lora.frozen, lora.trainable)
    fused = peft.fuse_params(params, specs=adaptation.specs)
    plain = dataclasses.replace(base, trainable=fused).answers(digits)
    adapted = lora.answers(digits)
    difference = np.abs(plain - adapted).max() / np.abs(adapted).max()
    same = (plain.argmax(-1) == adapted.argmax(-1)).all()
    if not same or difference > TOLERANCE:
        raise SystemExit(f"The fused model answers differently: logits by {difference:.1e}.")
    return f"fused into the plain model: same classes, logits within {difference:.0e} (relative)"


def check_saving(path: Path, adaptation: Adaptation, digits: Digits) -> str:
    """Saves the adapter, loads it back, and checks that it answers as before."""
    lora = adaptation.lora
    write_adapter(path, lora.trainable, adaptation.specs)
    loaded, specs = read_adapter(path)
    answers = dataclasses.replace(lora, trainable=loaded).answers(digits)
    if specs != adaptation.specs or not np.array_equal(answers, lora.answers(digits)):
        raise SystemExit(f"The adapter loaded from {path} is not the one that was saved.")
    return f"saved and loaded back, same answers: {path} ({path.stat().st_size / 1024:.0f} KiB)"
