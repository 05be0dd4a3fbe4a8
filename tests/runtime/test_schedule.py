from hypothesis import given
from hypothesis import strategies as st

from v4graph_runtime.serving.schedule import MOST_PADDING, Run, plan, shares, whole

PENDING = st.dictionaries(st.integers(0, 15), st.integers(1, 3000), min_size=1)


def fed(runs: list[Run]) -> dict[int, int]:
    return {slot: count for run in runs for slot, count in zip(run.slots, run.counts, strict=True) if count}


def test_what_short_prompts_leave_goes_to_longer_ones() -> None:
    assert shares({0: 1000, 1: 10, 2: 1000}, 512) == {1: 10, 0: 251, 2: 251}
    assert shares({0: 5, 1: 6}, 512) == {0: 5, 1: 6}


def test_every_prompt_goes_on_however_many_there_are() -> None:
    assert set(shares(dict.fromkeys(range(40), 9), 8).values()) == {1}


def test_outputs_run_together_and_before_prompts() -> None:
    runs = plan({0: 1, 1: 900, 2: 1, 5: 1}, 512, dict.fromkeys(range(6), 10_000))
    assert runs == [Run(range(6), (1, 0, 1, 0, 0, 1)), Run(range(1, 2), (512,))]


def test_neighbours_with_as_many_tokens_run_together() -> None:
    runs = plan({0: 900, 1: 900, 2: 900}, 300, dict.fromkeys(range(3), 10_000))
    assert runs == [Run(range(3), (100, 100, 100))]
    runs = plan({0: 4, 1: 500, 7: 500}, 512, dict.fromkeys(range(8), 10_000))
    assert [run.slots for run in runs] == [range(1), range(1, 2), range(7, 8)]


def test_no_chunk_is_longer_than_its_slot_allows() -> None:
    assert plan({0: 900}, 512, {0: 100}) == [Run(range(1), (100,))]


@given(pending=PENDING, tokens=st.integers(1, 1000))
def test_a_step_brings_every_slot_on_within_its_budget(pending: dict[int, int], tokens: int) -> None:
    runs = plan(pending, tokens, dict.fromkeys(pending, 512))
    counts = fed(runs)
    assert set(counts) == set(pending)
    assert all(1 <= counts[slot] <= min(pending[slot], 512) for slot in pending)
    reading = sum(counts[slot] for slot in pending if pending[slot] > 1)
    assert reading <= max(tokens, sum(count > 1 for count in pending.values()))
    for run in runs:
        assert max(run.counts) == 1 or sum(run.counts) >= (1 - MOST_PADDING) * run.rows
    joined = whole(runs, 16)
    assert fed([joined]) == counts
    assert joined.slots == range(16)
