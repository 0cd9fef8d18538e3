"""The einsum language: what follows from an equation holds for every equation."""

import dataclasses
import json
import math
import string

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peft_jax import LoraSpec
from peft_jax._spec import (
    conv_equation,
    dense_general_equation,
    normalize_axes,
    parse_equation,
    stacked,
    unused_letter,
    weight_equation,
)

KNOWN = {
    # equation: contracted, batch, produced
    "...i,io->...o": ("i", "", "o"),
    "BTNH,NHD->BTD": ("NH", "", "D"),
    "BTD,NDH->BTNH": ("D", "", "NH"),
    "BTGI,GIO->BTGO": ("I", "G", "O"),
    "...d,dnh->...nh": ("d", "", "nh"),
    "bi,iok->bo": ("i", "", "ok"),
    "i,i->": ("i", "", ""),
    "bt,d->btd": ("", "", "d"),
    "...r,ro->...o": ("r", "", "o"),
}


@pytest.mark.parametrize("equation", KNOWN)
def test_groups_of_known_equations(equation):
    parsed = parse_equation(equation)
    assert (parsed.contracted, parsed.batch, parsed.produced) == KNOWN[equation]
    assert str(parsed) == equation
    assert parse_equation(f"  {equation.replace(',', ' , ')} ") == parsed


def test_shapes_of_known_layers():
    def shapes(equation, sizes, **kwargs):
        return parse_equation(equation).low_rank(**kwargs).shapes(sizes, 2)

    assert shapes("BTNH,NHD->BTD", {"N": 3, "H": 4, "D": 5}) == ((3, 4, 2), (2, 5))
    assert shapes("BTD,NDH->BTNH", {"N": 3, "D": 4, "H": 5}) == ((4, 2), (2, 3, 5))
    assert shapes("BTGI,GIO->BTGO", {"G": 3, "I": 4, "O": 5}) == ((3, 4, 2), (2, 5))
    both = shapes("BTGI,GIO->BTGO", {"G": 3, "I": 4, "O": 5}, batch_in_b=True)
    assert both == ((3, 4, 2), (3, 2, 5))
    assert shapes("bi,iok->bo", {"i": 3, "o": 4, "k": 5}) == ((3, 2), (2, 4, 5))


@st.composite
def layers(draw):
    """An equation in any order of its letters, with the sizes of its axes."""
    letters = draw(st.permutations("abcdefgrst"))
    counts = [draw(st.integers(0, 2)) for _ in range(5)]
    taken = iter(letters)
    contracted, batch, produced, free, alone = (
        [next(taken) for _ in range(count)] for count in counts
    )
    kernel = contracted + batch + produced + alone
    assume(kernel)
    ellipsis = ["..."] if draw(st.booleans()) else []
    parts = (contracted + batch + free + ellipsis, kernel, batch + produced + free + ellipsis)
    inputs, kernel, outputs = ("".join(draw(st.permutations(part))) for part in parts)
    sizes = {letter: draw(st.integers(1, 3)) for letter in letters}
    return f"{inputs},{kernel}->{outputs}", sizes


def array(rng, letters, sizes):
    """Small whole numbers, so that sums are exact in any order."""
    head, ellipsis, tail = letters.partition("...")
    shape = [sizes[c] for c in head] + [2, 1] * bool(ellipsis) + [sizes[c] for c in tail]
    return rng.integers(-3, 4, shape).astype(float)


@settings(max_examples=150, deadline=None)
@given(layers(), st.integers(1, 3), st.booleans(), st.integers(0, 2**32 - 1))
def test_low_rank_is_the_layer_with_the_delta_as_its_kernel(layer, rank, batch_in_b, seed):
    equation, sizes = layer
    rng = np.random.default_rng(seed)
    parsed = parse_equation(equation)
    low_rank = parsed.low_rank(batch_in_b=batch_in_b)
    shape_a, shape_b = low_rank.shapes({c: sizes[c] for c in parsed.kernel}, rank)
    known = {**sizes, low_rank.rank: rank}
    a, b = array(rng, low_rank.a, known), array(rng, low_rank.b, known)
    assert (a.shape, b.shape) == (shape_a, shape_b)
    x = array(rng, parsed.inputs, sizes)
    delta = np.einsum(low_rank.delta, a, b)
    assert delta.shape == tuple(sizes[c] for c in parsed.kernel)
    product = np.einsum(low_rank.second, np.einsum(low_rank.first, x, a), b)
    np.testing.assert_array_equal(product, np.einsum(equation, x, delta))


@settings(max_examples=100, deadline=None)
@given(layers())
def test_layout_of_both_arrays(layer):
    parsed = parse_equation(layer[0])
    low_rank = parsed.low_rank()
    inputs = [c for c in parsed.kernel if c in parsed.contracted + parsed.batch]
    assert low_rank.a == "".join(inputs) + low_rank.rank
    assert low_rank.b == low_rank.rank + parsed.produced
    both = parsed.low_rank(batch_in_b=True)
    assert both.a == low_rank.a
    assert both.b == parsed.batch + low_rank.rank + parsed.produced
    assert sorted(parsed.contracted + parsed.batch + parsed.produced) == sorted(parsed.kernel)


@settings(max_examples=100, deadline=None)
@given(layers(), st.booleans())
def test_the_spec_of_an_equation_names_every_axis_of_the_kernel(layer, batch_in_b):
    parsed = parse_equation(layer[0])
    low_rank = parsed.low_rank(batch_in_b=batch_in_b)
    spec = LoraSpec("kernel", low_rank.delta, 2)
    assert spec.letters == (low_rank.a, low_rank.b, parsed.kernel)
    assert sorted(sum(spec.matrix_axes, ())) == list(range(len(parsed.kernel)))
    batch, inputs, outputs = ("".join(parsed.kernel[i] for i in axes) for axes in spec.matrix_axes)
    assert outputs == parsed.produced
    assert set(batch) == set(parsed.batch if batch_in_b else "")
    assert set(inputs) == set(parsed.contracted + ("" if batch_in_b else parsed.batch))
    assert dataclasses.replace(spec, equation=stacked(spec.equation)).letters == spec.letters
    assert stacked(stacked(spec.equation)) == stacked(spec.equation)


REFUSED = {
    "...i,io": "names its output",
    "i,io->o->o": "names its output",
    "io->o": "two operands, input and kernel, not 1",
    "a,b,c->abc": "two operands, input and kernel, not 3",
    "...i,...io->...o": "may not hold an ellipsis",
    "bi,ii->b": "stands twice in the kernel",
    "bi,io->bb": "stands twice in the output",
    "bi,io->bz": "stands in no operand",
    "bi,io->...o": "ellipsis that the input lacks",
    "b1,1o->bo": "named by letters",
    "..i,io->..o": "named by letters",
    "......i,io->o": "named by letters",
    "bi,->b": "without axes",
    "": "names its output",
}


@pytest.mark.parametrize(("equation", "rule"), REFUSED.items())
def test_refused_equations(equation, rule):
    with pytest.raises(ValueError, match=rule):
        parse_equation(equation)


@pytest.mark.parametrize("equation", [None, 3, ("i", "io")])
def test_an_equation_is_a_string(equation):
    with pytest.raises(ValueError, match="is a string"):
        parse_equation(equation)


def test_an_equation_that_uses_every_letter_is_refused():
    letters = string.ascii_letters
    with pytest.raises(ValueError, match="none is left for the rank"):
        parse_equation(f"{letters},{letters}->").low_rank()
    assert unused_letter("abc") == "r"
    assert unused_letter("r") not in "r"


def test_sizes_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"'BTNH,NHD->BTD' has 3 axes.*shape \(4, 5\) has 2"):
        parse_equation("BTNH,NHD->BTD").sizes((4, 5))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_dense_general_equation_is_the_dot_general_of_flax(data):
    ndim = data.draw(st.integers(1, 5))
    axes = data.draw(st.permutations(range(ndim)))
    contracted = data.draw(st.integers(1, ndim))
    batch = sorted(axes[contracted : contracted + data.draw(st.integers(0, 2))])
    axis = axes[:contracted]  # in any order: Flax sorts them
    features = data.draw(st.integers(1, 2))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=ndim, max_size=ndim))
    signs = st.sampled_from((0, -ndim))
    equation = dense_general_equation(
        ndim,
        [i + data.draw(signs) for i in axis],
        [i + data.draw(signs) for i in batch],
        features,
    )
    parsed = parse_equation(equation)
    assert [parsed.inputs.index(c) for c in parsed.batch] == batch
    assert [parsed.inputs.index(c) for c in parsed.contracted] == sorted(axis)
    known = dict(zip(parsed.inputs, sizes, strict=True)) | dict.fromkeys(parsed.produced, 2)
    rng = np.random.default_rng(0)
    x, kernel = array(rng, parsed.inputs, known), array(rng, parsed.kernel, known)
    free = [i for i in range(ndim) if i not in axis and i not in batch]
    order = [*batch, *free, *sorted(axis)]
    lead = [math.prod(sizes[i] for i in group) for group in (batch, free, sorted(axis))]
    matrices = x.transpose(order).reshape(lead) @ kernel.reshape(lead[0], lead[2], -1)
    expected = matrices.reshape([sizes[i] for i in (*batch, *free)] + [2] * features)
    np.testing.assert_array_equal(np.einsum(equation, x, kernel), expected)


def test_axes_outside_of_the_input_are_refused():
    with pytest.raises(ValueError, match="Axis 3 does not exist in an input of 3 axes"):
        normalize_axes((0, 3), 3)
    assert normalize_axes(-1, 3) == (2,)
    with pytest.raises(ValueError, match="exceed the alphabet"):
        dense_general_equation(50, -1, (), 5)


@pytest.mark.parametrize("window", range(4))
def test_convolutions_at_one_place(window):
    parsed = parse_equation(conv_equation(window))
    assert len(parsed.contracted) == window + 1
    assert len(parsed.produced) == 1
    assert parsed.kernel == parsed.contracted + parsed.produced


@pytest.mark.parametrize("ndim", [2, 3, 5])
def test_weights_of_which_nothing_is_known(ndim):
    parsed = parse_equation(weight_equation(ndim))
    assert parsed.produced == parsed.kernel[-1]
    assert parsed.contracted == parsed.kernel[:-1]
    assert len(parsed.kernel) == ndim


# --- LoraSpec ------------------------------------------------------------------------------------

SPECS = st.builds(
    LoraSpec,
    param=st.none() | st.text(min_size=1),
    equation=st.sampled_from(["ir,ro->io", "...ir,...ro->...io", "nhr,rd->nhd", "gir,gro->gio"]),
    rank=st.integers(1, 1000),
    scaling=st.floats(allow_nan=False, allow_infinity=False),
    alpha=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)
STACKED_SPECS = st.builds(
    dataclasses.replace,
    SPECS,
    equation=st.just("...ir,...ro->...io"),
    stack_axes=st.lists(st.integers(-3, 3), max_size=3).map(tuple),
)


@settings(max_examples=100, deadline=None)
@given(SPECS | STACKED_SPECS)
def test_specs_come_back_from_json(spec):
    again = LoraSpec.from_dict(json.loads(json.dumps(spec.to_dict(), allow_nan=False)))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.to_dict() == spec.to_dict()


def test_stack_axes_of_numpy_are_json_too():
    spec = LoraSpec("kernel", "...ir,...ro->...io", 4, 0.5, 2, stack_axes=(np.int64(1),))
    assert json.loads(json.dumps(spec.to_dict()))["stack_axes"] == [1]


BAD = {
    "rank zero": {"rank": 0},
    "rank below zero": {"rank": -1},
    "rank of a float": {"rank": 2.0},
    "rank of a bool": {"rank": True},
    "scaling of nan": {"scaling": math.nan},
    "scaling of infinity": {"scaling": math.inf},
    "scaling of text": {"scaling": "1"},
    "scaling of a bool": {"scaling": True},
    "alpha of text": {"alpha": "1"},
    "alpha of nan": {"alpha": math.nan},
    "param of a number": {"param": 3},
    "unknown variant": {"variant": "vera"},
    "no arrow": {"equation": "ir,ro"},
    "one operand": {"equation": "ir->i"},
    "no shared letter": {"equation": "i,o->io"},
    "two shared letters": {"equation": "irs,rso->io"},
    "a lost letter": {"equation": "ir,ro->i"},
    "a stray letter": {"equation": "ir,ro->ioz"},
    "a repeated letter": {"equation": "iir,ro->io"},
    "a repeated kernel letter": {"equation": "ir,ro->iio"},
    "an ellipsis in one operand": {"equation": "...ir,ro->...io"},
    "an ellipsis inside": {"equation": "i...r,r...o->i...o"},
    "no text": {"equation": None},
    "stack axes of text": {"stack_axes": ("0",)},
    "stack axes of floats": {"stack_axes": (0.5,)},
    "a stack axis alone": {"stack_axes": 0},
    "a stack axis of an equation without a stack": {"stack_axes": (0,)},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_bad_specs_are_refused_with_field_and_value(change):
    (field,) = change
    fields = {"param": "kernel", "equation": "ir,ro->io", "rank": 2} | change
    with pytest.raises(ValueError, match=rf"LoraSpec.{field}\b"):
        LoraSpec(**fields)
    with pytest.raises(ValueError, match=rf"LoraSpec.{field}\b"):
        LoraSpec.from_dict(fields)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"param": "kernel", "equation": "ir,ro->io"}, "missing: .'rank'"),
        ({"param": "kernel", "equation": "ir,ro->io", "rank": 1, "r": 1}, "unknown here: .'r'"),
        ({}, "missing: .'equation', 'param', 'rank'"),
        (["param"], "LoraSpec"),
        (None, "LoraSpec"),
    ],
)
def test_data_that_is_no_spec_is_refused(data, named):
    with pytest.raises(ValueError, match=named):
        LoraSpec.from_dict(data)
