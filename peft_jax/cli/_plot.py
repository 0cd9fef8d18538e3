"""A picture of norms and spectra, layer by layer."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax._numerics import norm, product_spectrum, weight_spectrum
from peft_jax.cli._screen import Progress, in_order, printable
from peft_jax.io.checkpoints.read import Checkpoint, is_float
from peft_jax.io.files.atomic import new_output
from peft_jax.io.files.formats import Array
from peft_jax.io.huggingface.pairs import HuggingFaceAdapter

_MOST_BARS = 48  # layers that have a bar, and a name, of their own
_MOST_VALUES = 256  # singular values of a weight that are drawn
_LONGEST_NAME = 48
_FLOOR = 1e-8  # of the largest singular value: what lies below is rounding
_MARKERS = "osD^vP*X"


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """One matrix.

    Attributes:
      name: of its layer.
      norm: of Frobenius.
      values: its singular values, largest first.
    """

    name: str
    norm: float
    values: Array

    @property
    def kind(self) -> str:
        """The last part of the name, without an index: layers of one kind share it."""
        return re.sub(r"_\d+$", "", self.name.replace("/", ".").rpartition(".")[2])


def check_plot(path: Path) -> None:
    """Refuses before any work is done what could not be drawn.

    Raises:
      ValueError: where matplotlib is missing, or does not know the kind of file.
    """
    try:
        importlib.import_module("matplotlib")
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "--plot needs matplotlib. Install it by `pip install 'peft_jax[demo]'`."
        ) from error
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(
            f"--plot {str(path)!r}: name a file that ends in .png (or {sorted(known)})."
        )


def draw_adapter(adapter: HuggingFaceAdapter, path: Path) -> None:
    """Draws what an adapter adds to each layer."""
    spectra = []
    for module in in_order(adapter.modules.values(), lambda module: module.name):
        if "a" in module.arrays:
            if not all(np.all(np.isfinite(factor)) for factor in module.factors):
                raise ValueError(f"{module.name!r} holds NaN or infinity, which has no spectrum.")
            values = product_spectrum(*module.factors)
            spectra.append(Spectrum(module.name, float(np.linalg.norm(values)), values))
    _draw(spectra, path, "the change", "ΔW")


def draw_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Draws the matrices of a checkpoint."""
    _draw(list(_weights(checkpoint)), path, "the weight", "W")


def _weights(checkpoint: Checkpoint) -> Iterator[Spectrum]:
    names = [
        name
        for name in in_order(checkpoint.names)
        if len(checkpoint.shape(name)) == 2 and is_float(checkpoint.dtype(name))
    ]
    with Progress("inspect: decompose", sum(map(checkpoint.nbytes, names))) as progress:
        for name in names:
            matrix = checkpoint.read(name)
            if not np.all(np.isfinite(matrix.astype(np.float32))):
                raise ValueError(f"{name!r} holds NaN or infinity, which has no spectrum.")
            layer = checkpoint.separator.join(checkpoint.path_of(name)[:-1]) or name
            yield Spectrum(layer, norm(matrix), weight_spectrum(matrix, _MOST_VALUES))
            progress.update(checkpoint.nbytes(name))


def _draw(spectra: Sequence[Spectrum], path: Path, what: str, symbol: str) -> None:
    if not spectra:
        raise ValueError("--plot: there is no matrix of floats to draw.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    few = len(spectra) <= _MOST_BARS
    height = max(4.5, 0.24 * len(spectra) + 1.6) if few else 6.5
    figure = Figure(figsize=(14, height), layout="constrained")
    FigureCanvasAgg(figure)
    norms, lines = figure.subplots(1, 2, width_ratios=(1, 1.1))
    kinds = list(dict.fromkeys(spectrum.kind for spectrum in spectra))
    styles = {kind: _style(place, len(kinds)) for place, kind in enumerate(kinds)}
    (_bars if few else _series)(norms, spectra, styles)
    norms.set_title(f"Norm of {what} of each layer")
    (_spectra if few else _bands)(lines, spectra, styles)
    lines.set_title(f"Singular values of {what}")
    lines.set_ylabel(f"singular value of {symbol} (log scale)")
    label_norms = norms.set_xlabel if few else norms.set_ylabel
    label_norms(f"Frobenius norm of {symbol}")
    with new_output(path) as place:
        figure.savefig(place, dpi=130)


def _style(place: int, count: int) -> dict[str, Any]:
    from matplotlib import colormaps

    palette = colormaps["tab10" if count <= 10 else "tab20"]
    return {"color": palette(place % palette.N), "marker": _MARKERS[place % len(_MARKERS)]}


def _short(name: str) -> str:
    name = printable(name).replace("$", r"\$")
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def _bars(axes: Any, spectra: Sequence[Spectrum], styles: dict[str, Any]) -> None:
    """A bar for each layer, the first on top."""
    places = range(len(spectra))
    colors = [styles[spectrum.kind]["color"] for spectrum in spectra]
    bars = axes.barh(places, [spectrum.norm for spectrum in spectra], color=colors, height=0.7)
    axes.bar_label(bars, [f"{spectrum.norm:.3g}" for spectrum in spectra], padding=3, fontsize=8)
    axes.set_yticks(places, [_short(spectrum.name) for spectrum in spectra], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    axes.spines[["top", "right"]].set_visible(False)


def _series(axes: Any, spectra: Sequence[Spectrum], styles: dict[str, Any]) -> None:
    """Where there are many layers, a line for each kind, from the first layer to the last."""
    for kind, style in styles.items():
        sizes = [spectrum.norm for spectrum in spectra if spectrum.kind == kind]
        axes.plot(range(len(sizes)), sizes, label=_short(kind), markersize=4, **style)
    axes.set_xlabel("layer, counted within its kind")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=1 + len(styles) // 12)


def _spectra(axes: Any, spectra: Sequence[Spectrum], styles: dict[str, Any]) -> None:
    """A line for each layer, a color for each kind."""
    seen = set()
    longest = max(len(spectrum.values) for spectrum in spectra)
    for spectrum in spectra:
        label = None if spectrum.kind in seen else _short(spectrum.kind)
        seen.add(spectrum.kind)
        style = styles[spectrum.kind] | ({} if longest <= 64 else {"marker": None})
        kept = _kept(spectrum)
        places = range(1, len(kept) + 1)
        axes.plot(places, kept, label=label, linewidth=1.2, markersize=4, alpha=0.75, **style)
    _finish(axes, longest, len(styles))


def _bands(axes: Any, spectra: Sequence[Spectrum], styles: dict[str, Any]) -> None:
    """Where there are many layers, of each kind the median, and the range of all in pale."""
    longest = max(len(spectrum.values) for spectrum in spectra)
    for kind, style in styles.items():
        own = [_kept(spectrum) for spectrum in spectra if spectrum.kind == kind]
        columns = [[v[i] for v in own if len(v) > i] for i in range(max(map(len, own)))]
        if not columns:
            continue
        places, color = range(1, len(columns) + 1), style["color"]
        axes.fill_between(
            places, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.12
        )
        label = f"{_short(kind)}: median of {len(own)}"
        axes.plot(places, list(map(np.median, columns)), label=label, markersize=4, **style)
    _finish(axes, longest, len(styles))


def _kept(spectrum: Spectrum) -> Array:
    """The singular values that are more than rounding."""
    values = spectrum.values
    return np.asarray(values[values > _FLOOR * values.max(initial=0)])


def _finish(axes: Any, longest: int, kinds: int) -> None:
    axes.set_xlabel("index")
    if not any(len(line.get_xdata()) for line in axes.get_lines()):
        axes.text(0.5, 0.5, "all are zero", ha="center", transform=axes.transAxes)
        return
    axes.set_yscale("log")
    if longest <= 20:
        axes.set_xticks(range(1, longest + 1))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncols=1 + kinds // 16)
