"""What is remembered of earlier steps: vectors of their candidates, and how often an item was one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trec_twotower.model.cross_batch_memory import CrossBatchMemory
from trec_twotower.model.losses import LOSSES, Pairs, Relations
from trec_twotower.model.losses.streaming_log_q import RATE, StreamingLogQ
from trec_twotower.ops.hashing import hash_to_bucket

NUM_ITEMS, DIM = 40, 3
CPU = torch.device("cpu")


def step_of(rng, log_p_I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Relations, Pairs]:
    """Vectors, keys, log p and relations of a step with some candidates, of which some are positives only."""
    key_C = torch.from_numpy(np.flatnonzero(rng.random(NUM_ITEMS) < log_p_I.exp().numpy()))
    item_CD = torch.from_numpy(rng.standard_normal((len(key_C), DIM)).astype(np.float32))
    row = torch.arange(6)
    column = torch.from_numpy(rng.integers(0, max(len(key_C), 1), 6))
    relations = Relations(
        positive=Pairs(row, column),
        known=Pairs(row, column),
        log_q_C=0.5 * log_p_I[key_C],
        is_negative_C=torch.from_numpy(rng.random(len(key_C)) < 0.8),
    )
    listed = Pairs(torch.from_numpy(rng.integers(0, 6, 50)), torch.from_numpy(rng.integers(0, 99, 50)))
    return item_CD, key_C, log_p_I[key_C], relations, listed


@pytest.mark.parametrize("size", [25, 40, 64, 500])
def test_the_queue_holds_the_last_whole_steps_each_item_as_it_was_last(rng, size):
    """Step by step against lists in plain Python: vectors, known pairs, corrections, and which columns stand."""
    log_p_I = torch.linspace(-3, -0.2, NUM_ITEMS)
    queue = CrossBatchMemory(size, DIM, 0.5, CPU)
    steps: list[dict[int, tuple[list[float], float]]] = []
    held_most = 0
    for _ in range(60):
        item_CD, key_C, log_p_C, relations, listed = step_of(rng, log_p_I)
        column_CD, both = queue.extend(item_CD, key_C, log_p_C, relations, listed)

        whole, places = [], 0
        for step in reversed(steps):
            places += len(step)
            if places > size:
                break
            whole.append(step)
        held: dict[int, tuple[list[float], float]] = {}
        for step in reversed(whole):
            held |= step
        now = {int(key) for key, stands in zip(key_C, relations.is_negative_C, strict=True) if stands}
        wanted = {key: held[key] for key in sorted(held) if key not in now}
        held_most = max(held_most, len(whole))

        first = len(key_C)
        assert torch.equal(column_CD[:first], item_CD)
        assert column_CD[first:].tolist() == [vector for vector, _ in wanted.values()]
        assert both.is_negative_C.tolist() == [*relations.is_negative_C.tolist(), *[True] * len(wanted)]
        times = 1 + len(whole)
        p = np.exp([*log_p_I[key_C].tolist(), *(log_p for _, log_p in wanted.values())])
        p_of_set = 1 - (1 - p) ** times
        # Half of log p is corrected without the queue. What the queue adds to the probability is corrected in full.
        np.testing.assert_allclose(both.log_q_C.tolist(), np.log(p_of_set / p * p**0.5), rtol=1e-4, atol=1e-6)
        stands = np.array([*relations.is_negative_C.tolist(), *[False] * len(wanted)])
        np.testing.assert_allclose(both.push_C.tolist(), np.where(stands, p_of_set / p, 1), rtol=1e-4)
        found = set(zip(both.known.row_P.tolist(), both.known.column_P.tolist(), strict=True))
        keys = list(wanted)
        pairs = set(zip(listed.row_P.tolist(), listed.column_P.tolist(), strict=True))
        assert found == set(zip(relations.known.row_P.tolist(), relations.known.column_P.tolist(), strict=True)) | {
            (row, first + keys.index(key)) for row, key in pairs if key in wanted
        }
        assert both.positive is relations.positive

        queue.push(item_CD, key_C, log_p_C, relations.is_negative_C)
        steps.append(
            {
                int(key): (vector.tolist(), float(log_p_I[key]))
                for key, vector, stands in zip(key_C, item_CD, relations.is_negative_C, strict=True)
                if stands
            }
        )
    assert held_most >= (2 if size > 25 else 1)


def test_an_item_is_in_the_set_as_often_as_its_correction_says(rng):
    """Items that come with known probabilities, and six or so steps in the queue: five standard errors, .03 for those.

    Steps differ in size, so how many are held has to do with what they hold.
    """
    log_p_I = torch.linspace(-4, -0.5, NUM_ITEMS)
    queue = CrossBatchMemory(60, DIM, 1.0, CPU)
    none = Pairs(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    seen, expected, steps = np.zeros(NUM_ITEMS), np.zeros(NUM_ITEMS), 4_000
    for _ in range(steps):
        key_C = torch.from_numpy(np.flatnonzero(rng.random(NUM_ITEMS) < log_p_I.exp().numpy()))
        item_CD = key_C[:, None].expand(-1, DIM).float()  # a vector says whose it is
        column_CD, _ = queue.extend(item_CD, key_C, log_p_I[key_C], Relations(none, none), none)
        items = column_CD[:, 0].long().tolist()
        assert len(items) == len(set(items))
        seen[items] += 1
        held = int((queue.is_first_Q & (queue.first_Q >= queue.count - queue.size)).sum())
        expected += 1 - (1 - log_p_I.exp().numpy()) ** (1 + held)
        queue.push(item_CD, key_C, log_p_I[key_C], None)
    share, expected = seen / steps, expected / steps
    # A queue of T steps holds the same item for T + 1 steps in a row, so that as many fewer of them are independent.
    error = np.sqrt(expected * (1 - expected) / steps * 8)
    assert (np.abs(share - expected) < 5 * error + 0.03).all()
    assert expected.std() > 0.2


def test_a_loss_beside_the_queue_is_that_of_all_columns_written_out(rng):
    """No gradient goes into what is kept; the negatives' part of a candidate's gradient is multiplied by its push."""
    log_p_I = torch.linspace(-3, -0.2, NUM_ITEMS)
    queue = CrossBatchMemory(200, DIM, 0.5, CPU)
    for _ in range(5):
        item_CD, key_C, log_p_C, relations, listed = step_of(rng, log_p_I)
        user_BD = torch.from_numpy(rng.standard_normal((6, DIM)).astype(np.float32)).requires_grad_()
        item_CD.requires_grad_()
        column_CD, both = queue.extend(item_CD, key_C, log_p_C, relations, listed)
        loss = LOSSES["softmax"](user_BD, column_CD, both, temperature=0.5)
        slow_user_BD, slow_CD = (each.detach().clone().requires_grad_() for each in (user_BD, item_CD))
        slow_column_CD = torch.cat([slow_CD, column_CD[len(item_CD) :].detach()])
        pushed_CD = both.push_C[:, None] * slow_column_CD + (1 - both.push_C[:, None]) * slow_column_CD.detach()
        own_BC = slow_user_BD @ slow_column_CD.T / 0.5 - both.log_q_C
        logit_BC = slow_user_BD @ pushed_CD.T / 0.5 - both.log_q_C
        shut = torch.zeros_like(logit_BC, dtype=torch.bool)
        shut[both.known.row_P, both.known.column_P] = True
        shut |= ~both.is_negative_C
        total = torch.zeros(())
        for row, column in zip(both.positive.row_P.tolist(), both.positive.column_P.tolist(), strict=True):
            mine = own_BC[row, column]
            total = total + torch.logsumexp(torch.cat([mine[None], logit_BC[row][~shut[row]]]), 0) - mine
        assert loss.item() == pytest.approx(total.item(), rel=1e-5)
        wanted = torch.autograd.grad(total, (slow_user_BD, slow_CD))
        for one, other in zip(torch.autograd.grad(loss, (user_BD, item_CD)), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        queue.push(item_CD, key_C, log_p_C, relations.is_negative_C)
        assert not any(buffer.requires_grad for buffer in queue.buffers())


def test_items_are_pushed_as_by_the_softmax_over_the_whole_catalogue():
    """One user, items drawn with known probabilities p, vectors that stay as they are, a queue of some ten steps.

    The full softmax pushes item j with P(j) u. In expectation over steps, so must the candidates of a step, of which
    item j is one with probability p_j only: without push_C it would be some p_j times that.
    """
    num_steps, temperature = 1_500, 0.5
    rng = np.random.default_rng(3)
    log_p_I = torch.linspace(-4, -0.5, NUM_ITEMS)
    item_ID = torch.from_numpy(rng.standard_normal((NUM_ITEMS, DIM)).astype(np.float32))
    user_D = torch.from_numpy(rng.standard_normal(DIM).astype(np.float32))
    item_ID[0] = -user_D  # the positive, whose own share is small
    none = Pairs(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    own = Pairs(torch.tensor([0]), torch.tensor([0]))
    queue = CrossBatchMemory(120, DIM, 1.0, CPU)
    total_ID = torch.zeros(num_steps, NUM_ITEMS)
    for step in range(num_steps):
        drawn = np.flatnonzero(rng.random(NUM_ITEMS - 1) < log_p_I[1:].exp().numpy()) + 1
        key_C = torch.from_numpy(np.concatenate([[0], drawn]))
        item_CD = item_ID[key_C].requires_grad_()
        relations = Relations(own, own, is_negative_C=key_C > 0)
        column_CD, both = queue.extend(item_CD, key_C, log_p_I[key_C], relations, none)
        loss = LOSSES["softmax"](user_D[None], column_CD, both, temperature=temperature)
        (slope_CD,) = torch.autograd.grad(loss, item_CD)
        total_ID[step, key_C] = slope_CD @ user_D / (user_D @ user_D)
        queue.push(item_CD, key_C, log_p_I[key_C], key_C > 0)
    wanted_I = torch.softmax(item_ID @ user_D / temperature, 0)[1:] / temperature
    found_I, error_I = total_ID[200:, 1:].mean(0), total_ID[200:, 1:].std(0) / (num_steps - 200) ** 0.5
    assert ((found_I - wanted_I).abs() < 5 * error_I + 0.1 * wanted_I).all()
    assert found_I.sum() == pytest.approx(wanted_I.sum().item(), rel=0.05)


def test_a_queue_that_was_saved_goes_on_as_it_would_have(rng):
    log_p_I = torch.linspace(-3, -0.2, NUM_ITEMS)
    queue, other = CrossBatchMemory(50, DIM, 0.5, CPU), CrossBatchMemory(50, DIM, 0.5, CPU)
    steps = [step_of(rng, log_p_I) for _ in range(30)]
    for number, (item_CD, key_C, log_p_C, relations, listed) in enumerate(steps):
        if number == 17:
            other.load_state_dict(queue.state_dict())
        if number >= 17:
            found, wanted = (each.extend(item_CD, key_C, log_p_C, relations, listed) for each in (other, queue))
            assert torch.equal(found[0], wanted[0]) and torch.equal(found[1].log_q_C, wanted[1].log_q_C)
            other.push(item_CD, key_C, log_p_C, relations.is_negative_C)
        queue.push(item_CD, key_C, log_p_C, relations.is_negative_C)
    queue.forget()
    item_CD, key_C, log_p_C, relations, listed = steps[0]
    column_CD, alone = queue.extend(item_CD, key_C, log_p_C, relations, listed)
    assert torch.equal(column_CD, item_CD)
    torch.testing.assert_close(alone.log_q_C, relations.log_q_C)
    torch.testing.assert_close(alone.push_C, torch.ones_like(log_p_C))


def test_what_a_history_holds_is_found_by_the_low_half_of_its_key(rng):
    """Against a loop: keys of 63 bits, of which some share the upper or the lower 32."""
    key_C = torch.unique(torch.from_numpy(rng.integers(0, 7, 30) << 32 | rng.integers(0, 2**32, 30)))
    key_C = torch.cat([key_C, key_C[:3] ^ (1 << 62)])
    queue = CrossBatchMemory(99, DIM, 0.0, CPU)
    none = Pairs(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    no_relations = Relations(positive=none, known=none)
    never = torch.full((len(key_C),), -1.0)
    queue.push(torch.zeros(len(key_C), DIM), key_C, never, None)
    exact, halves = key_C[[0, 4, 31]], key_C[[5, 9, 9]] & (2**32 - 1)
    listed = Pairs(torch.arange(8), torch.cat([exact, exact[:1] ^ 1, ~halves, ~(halves[:1] ^ 1)]))
    _, both = queue.extend(torch.empty(0, DIM), key_C[:0], never[:0], no_relations, listed)
    held = sorted(key_C.tolist())
    wanted = {(row, held.index(key)) for row, key in enumerate(exact.tolist())}
    for row, half in enumerate(halves.tolist(), 4):
        wanted |= {(row, place) for place, key in enumerate(held) if key % 2**32 == half}
    assert set(zip(both.known.row_P.tolist(), both.known.column_P.tolist(), strict=True)) == wanted


def test_of_a_step_without_room_so_many_are_kept_evenly(rng):
    """Of 40 candidates in 25 places, each is there in 25 of 40 steps (five standard errors), with that in its log q."""
    p_I = torch.linspace(0.05, 0.9, NUM_ITEMS)
    queue, again = CrossBatchMemory(25, DIM, 1.0, CPU), CrossBatchMemory(25, DIM, 1.0, CPU)
    seen, steps = np.zeros(NUM_ITEMS), 2_000
    key_C = torch.arange(NUM_ITEMS)
    for _ in range(steps):
        for each in (queue, again):
            each.push(key_C[:, None].expand(-1, DIM).float(), key_C, p_I.log(), None)
        assert torch.equal(queue.key_Q, again.key_Q)
        held = queue.key_Q[queue.key_Q >= 0]
        assert len(held) == 25 and torch.equal(queue.vector_QD[queue.key_Q >= 0][:, 0].long(), held)
        torch.testing.assert_close(queue.log_p_Q[queue.key_Q >= 0], (p_I[held] * 25 / 40).log())
        seen[held] += 1
    assert (np.abs(seen / steps - 25 / 40) < 5 * math.sqrt(25 / 40 * 15 / 40 / steps)).all()


# Streaming frequencies


def test_the_mean_gap_is_what_a_loop_makes_of_it(rng):
    """Against the recursion in plain Python, with collisions in both hashes, and items that never come."""
    frequency, slots = StreamingLogQ(CPU, slots=16), 16
    last, gap, times = ({} for _ in range(3))
    for step in range(1, 400):
        key_C = np.flatnonzero(rng.random(NUM_ITEMS) < 0.3)
        stands = rng.random(len(key_C)) < 0.7
        found = frequency(torch.from_numpy(key_C), torch.from_numpy(stands))
        before = dict(last), dict(gap), dict(times)
        for number in range(2):
            for slot in set(hash_to_bucket(key_C[stands], slots, number).tolist()):
                place = (number, slot)
                times[place] = before[2].get(place, 0) + 1
                old = before[1].get(place, 0.0)
                gap[place] = old + max(1 / times[place], RATE) * (step - before[0].get(place, 0) - old)
                last[place] = step
        for key, log_p in zip(key_C, found.tolist(), strict=True):
            places = [(number, int(hash_to_bucket(np.array([key]), slots, number)[0])) for number in range(2)]
            wanted = max(gap[place] if place in gap else step + 1 for place in places)
            assert log_p == pytest.approx(-math.log(wanted), rel=1e-4, abs=1e-6)


def test_the_estimate_comes_to_the_probability_with_which_items_come(rng):
    """Within five standard errors of a mean of so many gaps, which are 1 / p each, give or take sqrt(1 - p) of it."""
    frequency, steps = StreamingLogQ(CPU, slots=1 << 12), 3_000
    p_I = np.geomspace(0.02, 1.0, NUM_ITEMS)
    for _ in range(steps):
        frequency(torch.from_numpy(np.flatnonzero(rng.random(NUM_ITEMS) < p_I)), None)
    frequency.eval()
    found = frequency(torch.arange(NUM_ITEMS), None).exp().numpy()
    averaged = np.minimum(p_I * steps, 2 / RATE)  # a moving mean of that rate is worth so many
    error = np.sqrt((1 - p_I) / averaged)
    assert (np.abs(np.log(found / p_I)) <= 5 * error + 1e-6).all()
    assert np.abs(np.log(found / p_I)).mean() < 0.1
    assert frequency(torch.tensor([NUM_ITEMS + 5]), None).exp().item() == pytest.approx(1 / (steps + 1), rel=1e-5)


def test_items_that_share_a_slot_in_one_hash_are_told_apart_by_the_other(rng):
    buckets = np.stack([hash_to_bucket(np.arange(NUM_ITEMS), 16, number) for number in range(2)])
    often, rarely = next(
        (one, other)
        for one in range(NUM_ITEMS)
        for other in range(one + 1, NUM_ITEMS)
        if buckets[0, one] == buckets[0, other] and buckets[1, one] != buckets[1, other]
    )
    frequency = StreamingLogQ(CPU, slots=16)
    for step in range(1_000):
        frequency(torch.tensor([often] if step % 50 else [often, rarely]), None)
    frequency.eval()
    found = frequency(torch.tensor([often, rarely]), None).exp().tolist()
    assert found == [pytest.approx(1.0), pytest.approx(20 / 951, rel=1e-4)]  # it came 20 times up to step 951


def test_evaluation_counts_no_step():
    frequency = StreamingLogQ(CPU, slots=16).eval()
    frequency(torch.tensor([3]), None)
    assert not any(bool(buffer.any()) for buffer in frequency.buffers())
