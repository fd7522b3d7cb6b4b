import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trec_twotower.errors import ConfigError
from trec_twotower.ops.ragged import Ragged
from trec_twotower.serving.business_rules import Rules, apply_rules


def shown(score, item_row, k, rules):
    _, item_row_BK = apply_rules(np.array(score, dtype=np.float32), np.array(item_row), k, rules)
    return item_row_BK.tolist()


def test_without_rules_the_best_k_stay_as_they_are():
    score, item_row = apply_rules(np.array([[3.0, 2.0, 1.0]]), np.array([[7, 4, 9]]), 2, Rules())
    assert score.tolist() == [[3.0, 2.0]] and item_row.tolist() == [[7, 4]]


def test_excluded_items_are_hidden_from_their_own_user_only():
    rules = Rules(exclude=Ragged.from_lists([[4], []]))
    assert shown([[3, 2, 1], [3, 2, 1]], [[7, 4, 9], [7, 4, 9]], 2, rules) == [[7, 9], [7, 4]]


def test_hidden_items_are_shown_to_nobody():
    hidden_I = np.array([False, True, False])
    assert shown([[3, 2, 1], [3, 2, 1]], [[0, 1, 2], [1, 2, 0]], 3, Rules(hidden_I=hidden_I)) == [
        [0, 2, -1],
        [2, 0, -1],
    ]


def test_a_boost_moves_an_item_up_and_is_in_its_score():
    boost_I = np.array([0.0, 0.0, 1.5])
    score, item_row = apply_rules(np.array([[3.0, 2.0, 1.0]]), np.array([[0, 1, 2]]), 3, Rules(boost_I=boost_I))
    assert item_row.tolist() == [[0, 2, 1]] and score.tolist() == [[3.0, 2.5, 2.0]]


def test_groups_are_limited_and_items_in_none_are_not():
    rules = Rules(group_I=np.array([0, 0, 0, 1, -1, -1, -1]), max_per_group=2)
    assert shown([[9, 8, 7, 6, 5, 4, 3]], [[0, 4, 1, 2, 5, 3, 6]], 6, rules) == [[0, 4, 1, 5, 3, 6]]


def test_a_hidden_item_takes_no_place_in_its_group():
    rules = Rules(exclude=Ragged.from_lists([[0]]), group_I=np.array([0, 0, 1]), max_per_group=1)
    assert shown([[3, 2, 1]], [[0, 1, 2]], 2, rules) == [[1, 2]]


def test_equal_scores_come_by_item_row():
    assert shown([[1, 2, 1, 2]], [[3, 1, 0, 2]], 4, Rules()) == [[1, 2, 0, 3]]


def test_an_item_given_twice_is_shown_once_by_its_better_score():
    score, item_row = apply_rules(np.array([[1.0, 5.0, 3.0]]), np.array([[2, 6, 2]]), 3, Rules())
    assert item_row.tolist() == [[6, 2, -1]] and score.tolist() == [[5.0, 3.0, -np.inf]]


def test_rows_of_no_items_stay_empty():
    rules = Rules(hidden_I=np.zeros(0, bool), boost_I=np.zeros(0), group_I=np.zeros(0, int), max_per_group=1)
    assert shown([[-np.inf, -np.inf]], [[-1, -1]], 3, rules) == [[-1, -1, -1]]


def test_rules_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="lack group_I"):
        Rules(max_per_group=2)
    with pytest.raises(ConfigError, match="max_per_group is 0"):
        Rules(group_I=np.zeros(3, int), max_per_group=0)
    with pytest.raises(ConfigError, match=r"'boost_I': 3, 'group_I': 2"):
        Rules(boost_I=np.zeros(3), group_I=np.zeros(2, int), max_per_group=1)
    with pytest.raises(ConfigError, match=r"\(1, 2\) against item rows of shape \(1, 3\)"):
        apply_rules(np.zeros((1, 2)), np.zeros((1, 3), int), 1, Rules())


def rules_written_out(score, item_row, k, exclude, hidden, boost, group, max_per_group):
    entries = [(s + boost[i], i) for s, i in zip(score, item_row, strict=True) if i >= 0]
    chosen, per_group = [], {}
    for boosted, item in sorted(entries, key=lambda entry: (-entry[0], entry[1])):
        if item in exclude or hidden[item] or any(item == other for _, other in chosen):
            continue
        if group[item] >= 0 and per_group.get(group[item], 0) == max_per_group:
            continue
        per_group[group[item]] = per_group.get(group[item], 0) + 1
        chosen.append((boosted, item))
    chosen = chosen[:k] + [(-np.inf, -1)] * max(0, k - len(chosen))
    return [list(column) for column in zip(*chosen, strict=True)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rules_equal_a_loop_over_users(data):
    num_items, num_users, width = 8, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 10))
    per_item = {"min_size": num_items, "max_size": num_items}
    halves = st.integers(-6, 6).map(lambda value: value / 2)  # ties are frequent and sums are exact
    rows = {"min_size": width, "max_size": width}
    score = [data.draw(st.lists(halves, **rows)) for _ in range(num_users)]
    item_row = [data.draw(st.lists(st.integers(-1, num_items - 1), **rows)) for _ in range(num_users)]
    exclude = [data.draw(st.lists(st.integers(0, num_items - 1), max_size=3)) for _ in range(num_users)]
    hidden = data.draw(st.lists(st.booleans(), **per_item))
    boost = data.draw(st.lists(halves, **per_item))
    group = data.draw(st.lists(st.integers(-1, 2), **per_item))
    max_per_group, k = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 10))
    rules = Rules(
        exclude=Ragged.from_lists(exclude),
        hidden_I=np.array(hidden),
        boost_I=np.array(boost),
        group_I=np.array(group),
        max_per_group=max_per_group,
    )
    score_BK, item_row_BK = apply_rules(np.array(score, dtype=np.float32), np.array(item_row), k, rules)
    assert score_BK.dtype == np.float32
    for user in range(num_users):
        assert [score_BK[user].tolist(), item_row_BK[user].tolist()] == rules_written_out(
            score[user], item_row[user], k, exclude[user], hidden, boost, group, max_per_group
        )
