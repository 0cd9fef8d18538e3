"""Every cell of the support matrix does what README says; see `support_matrix`."""

import pytest
import support_matrix as matrix


def check_all(cells):
    """Checks cells of one kind, which share programs, and reports all that fail."""
    assert cells
    failed = []
    for cell in cells:
        try:
            matrix.check(cell)
        except (Exception, pytest.fail.Exception) as error:
            failed.append(f"{cell}: {type(error).__name__}: {error}")
    assert not failed, "\n".join([f"{len(failed)} of {len(cells)} cells fail:", *failed])


# Whose pairs `make test` checks; `make test-slow` checks every cell of all kinds.
QUICK = ("`target_parameters` of any module",)


@pytest.mark.parametrize("kind", QUICK)
def test_all_pairs(kind):
    check_all([cell for cell in matrix.pairwise() if cell.kind == kind])


@pytest.mark.minutes
@pytest.mark.slow
@pytest.mark.parametrize("kind", matrix.KINDS)
def test_all_cells(kind):
    check_all([cell for cell in matrix.CELLS if cell.kind == kind])


def test_the_short_run_has_every_pair_that_the_matrix_has():
    short, whole = (
        set().union(*map(matrix.pairs, cells)) for cells in (matrix.pairwise(), matrix.CELLS)
    )
    assert short == whole


def test_every_reason_is_one():
    found = {matrix.first_reason(cell) for cell in matrix.CELLS} - {None}
    assert found == set(matrix.REASONS)


def test_readme_shows_the_matrix():
    assert matrix.in_readme() == matrix.render(), (
        "README.md and the support matrix differ. Run `python tests/support_matrix.py --write`."
    )
