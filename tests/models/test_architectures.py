"""models/architectures.py: what is said of each architecture is true of the code and of the tests."""

from __future__ import annotations

from moe_lab.models import checkpoint_config
from moe_lab.models.architectures import ARCHITECTURES, of_type
from tests.models.checkpoints import KINDS
from tests.models.test_checkpoint_mistakes import MISTAKES

OLDER = {"olmoe", "mixtral", "qwen2_moe", "qwen3_moe"}


def test_they_are_those_that_can_be_read() -> None:
    """Each once."""
    types = [each.model_type for each in ARCHITECTURES]
    assert sorted(types) == sorted(checkpoint_config._ARCHITECTURES)
    assert all(of_type(each.model_type) is each for each in ARCHITECTURES) and of_type("jamba") is None


def test_those_that_are_compared_with_transformers_say_so() -> None:
    """By being among the tests' kinds of checkpoints; of the newer ones five single mistakes are planted."""
    compared = {each.model_type for each in ARCHITECTURES if "against transformers" in each.tested}
    assert compared == set(KINDS)
    assert {each.model_type for each in ARCHITECTURES} - compared == {"kimi_k2"}
    assert set(MISTAKES) == compared - OLDER
    assert all(len(planted) >= 5 for planted in MISTAKES.values())
