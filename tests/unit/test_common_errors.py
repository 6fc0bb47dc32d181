"""common/errors.py: one kind of error, told in one way."""

from __future__ import annotations

import pytest

from common import errors
from common.errors import CertsError, UserError


def test_every_rooms_error_is_of_the_one_kind():
    kinds = [one for one in vars(errors).values() if isinstance(one, type)]
    assert len(kinds) == 7
    assert all(issubclass(kind, UserError) for kind in kinds)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CertsError("expected a, found b", "do c"), "error: expected a, found b\nhint: do c\n"),
        (CertsError("expected a, found b"), "error: expected a, found b\n"),
    ],
)
def test_an_error_is_told_as_one_line_and_a_hint(capsys, error, told):
    assert errors.tell(error) == 1
    assert capsys.readouterr().err == told
