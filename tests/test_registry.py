from __future__ import annotations

import pytest

from edgekd.errors import EdgekdError
from edgekd.targets.registry import TARGETS, get_target


def test_names_are_their_keys() -> None:
    assert all(get_target(name).name == name for name in TARGETS)


def test_typo_gets_a_suggestion() -> None:
    with pytest.raises(EdgekdError, match='There is no target "onnxruntme"') as caught:
        get_target("onnxruntme")
    assert caught.value.hint == 'Did you mean "onnxruntime"?'
