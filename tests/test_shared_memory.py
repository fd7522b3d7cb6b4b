"""The collectives of ranks that share a machine's memory: gloo's results, and an end to waiting."""

from __future__ import annotations

import json
import sys

import pytest

from tests.ranks.launch import torchrun
from trec_twotower.distributed.ranks import _shared_memory
from trec_twotower.errors import ConfigError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has the memory that is shared")


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_collectives_give_what_gloos_give(num_ranks, tmp_path):
    """Of no numbers, few and many; sums of floats come out with the same bits on all ranks."""
    code, said = torchrun(num_ranks, "tests.ranks.collectives", tmp_path / "out.json")
    assert code == 0, said
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["different"] == [[]] * num_ranks
    assert len(set(found["sums"])) == 1


def test_a_word_that_names_no_exchange_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("TREC_TWOTOWER_EXCHANGE", "tcp")
    with pytest.raises(ConfigError, match="TREC_TWOTOWER_EXCHANGE is 'tcp': set it to gloo, or unset it"):
        _shared_memory(2, 1)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("dies", "Connection closed by rank 1"),
        ("sleeps", "Connection to rank 1: it did not answer within 1 s"),
    ],
)
def test_a_rank_that_does_not_come_is_named(how, expected, tmp_path):
    code, said = torchrun(2, "tests.ranks.lonely", tmp_path / "said", how)
    assert code == 0, said
    assert (tmp_path / "said").read_text() == expected
