"""One contract for all encoders of sequences, and for each what it computes, by a second way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kinds import ENCODER_PARAMETERS
from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import build_feature
from trec_twotower.config.model import EncoderSpec, build_encoder
from trec_twotower.data.loading.batch import JaggedLookup
from trec_twotower.errors import ConfigError
from trec_twotower.model.sequence_encoders import (
    ENCODERS,
    Heads,
    Routing,
    SelfAttention,
    SequenceEncoder,
    SequenceInput,
    StepDropout,
    turned,
)

DIM, LONGEST = 8, 12
CASES: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in ENCODERS},
    "heads, one": {"kind": "heads", "heads": 1},
    "gru, two layers": {"kind": "gru", "layers": 2},
    "cnn, wide": {"kind": "cnn", "layers": 3, "width": 4},
    "transformer, rotary": {"kind": "transformer", "positions": "rotary"},
    "transformer, both ways": {"kind": "transformer", "causal": False, "layers": 2},
    "routing, once": {"kind": "routing", "iterations": 1, "interests": 2},
    "hierarchical, short": {"kind": "hierarchical", "segment": 2},
    "hierarchical, transformer": {"kind": "hierarchical", "segment": 3, "over": "transformer"},
}
BLIND_TO_ORDER = ("mean", "attention", "routing")
LENGTHS = [3, 0, LONGEST, 1, 7]


@pytest.fixture(params=CASES)
def encoder(request) -> SequenceEncoder:
    """With weights that are no longer those of the start, where some are zero."""
    torch.manual_seed(1)
    spec = build_encoder(**CASES[request.param])
    made = ENCODERS[spec.kind](spec, DIM, LONGEST)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return made.eval()


def steps_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    return torch.randn(sum(lengths), DIM, generator=torch.Generator().manual_seed(2)), torch.tensor(lengths)


def shape_of(encoder: SequenceEncoder, num_rows: int) -> tuple[int, ...]:
    """Of what it makes: a vector a row, or several."""
    interests = {Routing: lambda: len(encoder.start_MD), SelfAttention: lambda: encoder.outward.out_features}
    several = interests.get(type(encoder))
    return (num_rows, DIM) if several is None else (num_rows, several(), DIM)


def close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, atol=1e-5)


def test_there_is_an_encoder_for_every_word():
    assert set(ENCODERS) == set(ENCODER_PARAMETERS) == {case["kind"] for case in CASES.values()}


def test_a_row_becomes_what_it_becomes_alone(encoder):
    """Nothing of the other rows, nor of padding, gets into a row's vector."""
    step_ND, length_B = steps_of(LENGTHS)
    vector_BD = encoder(step_ND, length_B)
    assert vector_BD.shape == shape_of(encoder, len(LENGTHS)) and vector_BD.isfinite().all()
    for row, part in enumerate(step_ND.split(LENGTHS)):
        assert close(encoder(part, length_B[row : row + 1])[0], vector_BD[row])


def test_no_steps_are_the_zero_vector_and_no_rows_are_no_vectors(encoder):
    step_ND, length_B = steps_of(LENGTHS)
    assert not encoder(step_ND, length_B)[1].any() and encoder(step_ND, length_B)[3].any()
    assert not encoder(step_ND[:0], torch.tensor([0, 0])).any()
    assert encoder(step_ND[:0], length_B[:0]).shape == shape_of(encoder, 0)


def test_order_counts_where_it_should_and_not_where_it_should_not(encoder, request):
    step_ND, length_B = steps_of([6])
    turned_round = encoder(step_ND.flip(0), length_B)
    is_blind = request.node.callspec.params["encoder"].split(",")[0] in BLIND_TO_ORDER
    assert close(turned_round, encoder(step_ND, length_B)) == is_blind


def test_every_step_is_seen_and_sends_its_gradient_back(encoder):
    step_ND, length_B = steps_of(LENGTHS)
    step_ND.requires_grad_(True)
    wish_BD = torch.randn(shape_of(encoder, len(LENGTHS)), generator=torch.Generator().manual_seed(3))
    (encoder(step_ND, length_B) * wish_BD).sum().backward()
    assert step_ND.grad is not None and step_ND.grad.isfinite().all()
    assert (step_ND.grad.abs().sum(1) > 0).all()
    idle = [name for name, weight in encoder.named_parameters() if weight.grad is None]
    assert not idle, "a weight without gradient leaves the other ranks waiting"


def test_gradients_are_those_of_differences(encoder):
    step_ND, length_B = steps_of([2, 0, 5])
    encoder.double()
    assert torch.autograd.gradcheck(lambda steps: encoder(steps, length_B), step_ND.double().requires_grad_(True))


def test_no_rows_and_no_steps_still_reach_every_weight(encoder):
    """A rank without rows takes part in the sum of gradients."""
    steps = torch.zeros(0, DIM, requires_grad=True)
    encoder(steps, torch.zeros(0, dtype=torch.long)).sum().backward()
    assert all(weight.grad is not None for weight in encoder.parameters())


# Each by a second way


def test_heads_equal_the_formula_written_out():
    """softmax over a row's ages of w[h, age], part by part, then h + W h."""
    torch.manual_seed(0)
    heads = Heads(build_encoder(kind="heads", heads=4), DIM, LONGEST)
    with torch.no_grad():
        heads.log_weight_AH += torch.randn(LONGEST, 4)
        heads.mix.weight += torch.randn(DIM, DIM)
    step_ND, length_B = steps_of(LENGTHS)
    for row, part_LD in enumerate(step_ND.split(LENGTHS)):
        expected = torch.zeros(DIM)
        for head in range(4):
            own = slice(2 * head, 2 * head + 2)
            newest_first = part_LD.flip(0)[:, own]
            weight_L = heads.log_weight_AH[: len(part_LD), head].softmax(0)
            expected[own] = (weight_L[:, None] * newest_first).sum(0)
        expected = expected + heads.mix.weight @ expected
        assert close(heads(step_ND, length_B)[row], expected)


def test_heads_start_from_short_to_long_memory_with_nothing_mixed():
    """Rates from `fastest` to `slowest` in equal ratios: the first head is nearly the newest step, the last a mean."""
    heads = Heads(build_encoder(kind="heads", heads=4, fastest=8.0, slowest=0.001), DIM, LONGEST)
    assert torch.allclose(-heads.log_weight_AH[1], torch.tensor([8.0, 0.4, 0.02, 0.001]), rtol=1e-5)
    assert torch.allclose(heads.log_weight_AH[5], 5 * heads.log_weight_AH[1])
    step_ND, length_B = steps_of([LONGEST])
    made = heads(step_ND, length_B)[0]
    assert torch.allclose(made[:2], step_ND[-1, :2], atol=2e-3)
    assert torch.allclose(made[6:], step_ND[:, 6:].mean(0), atol=2e-2)


def test_a_causal_transformer_equals_torchs_own_layer():
    """Without places: pre-norm blocks, the newest step after a last normalisation."""
    torch.manual_seed(0)
    spec = build_encoder(kind="transformer", heads=2)
    encoder = ENCODERS["transformer"](spec, DIM, LONGEST).eval()
    layer = torch.nn.TransformerEncoderLayer(
        DIM, 2, 4 * DIM, 0.0, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    with torch.no_grad():
        encoder.place.zero_()
        block = encoder.blocks[0]
        for mine, theirs in (
            (block.inward.weight, layer.self_attn.in_proj_weight),
            (block.inward.bias, layer.self_attn.in_proj_bias),
            (block.outward.weight, layer.self_attn.out_proj.weight),
            (block.outward.bias, layer.self_attn.out_proj.bias),
            (block.wide[0].weight, layer.linear1.weight),
            (block.wide[0].bias, layer.linear1.bias),
            (block.wide[2].weight, layer.linear2.weight),
            (block.wide[2].bias, layer.linear2.bias),
        ):
            mine.copy_(theirs)
    step_ND, length_B = steps_of([5])
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
    expected = encoder.last(layer(step_ND[None], src_mask=mask, is_causal=True)[0, -1])
    assert torch.allclose(encoder(step_ND, length_B)[0], expected, atol=1e-5)


@pytest.mark.parametrize("is_causal", [True, False])
@torch.no_grad()
def test_a_rotary_transformer_equals_the_block_written_out(is_causal):
    """Each query and key as complex numbers, turned by place times rate; scores, softmax and means one by one."""
    torch.manual_seed(0)
    heads, width = 2, DIM // 2
    spec = build_encoder(kind="transformer", heads=heads, positions="rotary", causal=is_causal)
    encoder = ENCODERS["transformer"](spec, DIM, LONGEST).eval()
    [block] = encoder.blocks
    for weight in encoder.parameters():
        weight.add_(0.3 * torch.randn_like(weight))
    assert encoder.place is None
    step_ND, length_B = steps_of(LENGTHS)
    made_BD = encoder(step_ND, length_B)
    for row, step_LD in enumerate(step_ND.split(LENGTHS)):
        query_LD, key_LD, value_LD = (
            block.before_attention(step_LD) @ block.inward.weight.T + block.inward.bias
        ).split(DIM, dim=1)
        rate_P = torch.tensor([10_000.0 ** (-pair / (width // 2)) for pair in range(width // 2)])

        def as_complex(vector: Tensor, place: int, rate_P: Tensor = rate_P) -> Tensor:
            return torch.complex(*vector.split(width // 2)) * torch.polar(torch.ones(width // 2), place * rate_P)

        out_LD = torch.zeros_like(step_LD)
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            for at in range(len(step_LD)):
                seen = range(at + 1 if is_causal else len(step_LD))
                query = as_complex(query_LD[at, own], at)
                score = [
                    (query * as_complex(key_LD[other, own], other).conj()).sum().real / width**0.5 for other in seen
                ]
                weight = torch.stack(score).softmax(0)
                out_LD[at, own] = sum(weight[other] * value_LD[other, own] for other in seen)
        state_LD = step_LD + out_LD @ block.outward.weight.T + block.outward.bias
        state_LD = encoder.last(state_LD + block.wide(block.before_wide(state_LD)))
        if len(state_LD):
            assert close(made_BD[row], state_LD[-1] if is_causal else state_LD.mean(0))


@pytest.mark.parametrize("width", [1, 4, 5])
def test_products_of_turned_vectors_depend_on_distances_alone(rng, width):
    """Of an odd width, too, whose last number stands as it is."""
    query, key = (torch.from_numpy(rng.normal(size=width)) for _ in range(2))

    def product(one: float, other: float) -> float:
        return float(turned(query[None], torch.tensor([one])) @ turned(key[None], torch.tensor([other])).T)

    assert product(0.0, 0.0) == pytest.approx(float(query @ key))
    assert product(3.0, 1.0) == pytest.approx(product(7.0, 5.0))
    assert (product(3.0, 1.0) == pytest.approx(product(3.0, 2.0))) == (width == 1)


@torch.no_grad()
def test_routing_equals_capsules_written_out():
    """Steps choose among interests by softmax, interests are squashed sums, and steps choose again by agreement."""
    torch.manual_seed(0)
    encoder = Routing(build_encoder(kind="routing", interests=3, iterations=2), DIM, LONGEST)
    step_ND, length_B = steps_of(LENGTHS)
    for row, part_LD in enumerate(step_ND.split(LENGTHS)):
        seen_LD = part_LD @ encoder.shared.weight.T
        logit_LM = torch.tensor([[float(seen_D @ start_D) for start_D in encoder.start_MD] for seen_D in seen_LD])
        for _ in range(2):
            interests = []
            for m in range(3):
                total = sum((logit_L.softmax(0)[m] * seen_D for logit_L, seen_D in zip(logit_LM, seen_LD, strict=True)),
                            torch.zeros(DIM))  # fmt: skip
                length = total.norm()
                interests.append(length**2 / (1 + length**2) * total / length if len(part_LD) else total)
            if len(part_LD):
                logit_LM = logit_LM + seen_LD @ torch.stack(interests).T
        assert close(encoder(step_ND, length_B)[row], torch.stack(interests))


def test_self_attention_equals_the_weighted_means_written_out():
    torch.manual_seed(0)
    encoder = SelfAttention(build_encoder(kind="self_attention", interests=2), DIM, LONGEST)
    with torch.no_grad():
        encoder.place_AD += torch.randn(LONGEST, DIM)
    step_ND, length_B = steps_of(LENGTHS)
    for row, part_LD in enumerate(step_ND.split(LENGTHS)):
        placed_LD = part_LD + encoder.place_AD[: len(part_LD)].flip(0)  # the newest step has place 0
        weight_LM = encoder.outward(torch.tanh(encoder.inward(placed_LD))).softmax(0)
        expected = torch.stack([(weight_LM[:, m, None] * part_LD).sum(0) for m in range(2)])
        assert close(encoder(step_ND, length_B)[row], expected)


def test_step_dropout_keeps_the_mean_and_a_share_of_the_numbers_as_torchs_does():
    torch.manual_seed(0)
    ones = torch.ones(1001, 33)
    ours, torchs = StepDropout(0.6)(ones), torch.nn.Dropout(0.6)(ones)
    assert sorted(ours.unique().tolist()) == pytest.approx([0.0, 256 / 102])  # .6 is 154 / 256, nearly
    for dropped in (ours, torchs):
        is_zero = (dropped == 0).float()
        assert float(is_zero.mean()) == pytest.approx(0.6, abs=0.01)
        assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)
        assert float((is_zero[:, 0] * is_zero[:, 1]).mean()) == pytest.approx(0.36, abs=0.05)  # independent columns
    assert StepDropout(0.6).eval()(ones).equal(ones) and StepDropout(0.0)(ones).equal(ones)


def test_turned_products_depend_on_distances_alone():
    query, key = torch.randn(2, 6, generator=torch.Generator().manual_seed(4))
    place_L = torch.tensor([0, 3, 7, 10])
    query_LP, key_LP = turned(query.expand(4, 6), place_L), turned(key.expand(4, 6), place_L)
    product_LL = query_LP @ key_LP.T
    assert torch.allclose(product_LL[0, 1], product_LL[2, 3], atol=1e-5)  # both three apart
    assert not torch.allclose(product_LL[0, 1], product_LL[1, 0], atol=1e-3)
    assert torch.allclose(query_LP.norm(dim=1), query.norm().expand(4), atol=1e-5)


def test_segments_are_counted_from_the_newest_step():
    """Of seven steps by threes: one, three, three; the outer unit reads three states."""
    torch.manual_seed(0)
    encoder = ENCODERS["hierarchical"](build_encoder(kind="hierarchical", segment=3), DIM, LONGEST)
    step_ND, length_B = steps_of([7])
    states = torch.cat([encoder.within(part, torch.tensor([len(part)])) for part in step_ND.split([1, 3, 3])])
    assert close(encoder(step_ND, length_B), encoder.over(states, torch.tensor([3])))


def test_a_convolution_sees_its_past_alone():
    encoder = ENCODERS["cnn"](build_encoder(kind="cnn", layers=1, width=2), DIM, LONGEST)
    step_ND, length_B = steps_of([4])
    [layer] = encoder.layers
    before_ND = torch.cat([torch.zeros(1, DIM), step_ND[:-1]])
    old, own = layer.weight[:, :, 0], layer.weight[:, :, 1]
    step_out = step_ND + F.relu(before_ND @ old.T + step_ND @ own.T + layer.bias)
    assert close(encoder(step_ND, length_B)[0], step_out[-1] + step_out.mean(0))


def next_found(spec: EncoderSpec, items: int = 12, rows: int = 200, steps: int = 6) -> float:
    """What is taken next depends on the newest step alone; how many of a half that was not trained on find it."""
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(items, (2 * rows, steps), generator=generator)
    target, length = (history[:, -1] + 1) % items, torch.full((rows,), steps)
    torch.manual_seed(0)
    encoder, last = ENCODERS[spec.kind](spec, DIM, steps), torch.nn.Linear(DIM, items)
    table = torch.nn.Parameter(torch.randn(items, DIM))
    optimizer = torch.optim.Adam([*encoder.parameters(), *last.parameters(), table], lr=0.05)

    def logits(part: Tensor) -> Tensor:
        return last(encoder(F.embedding(part, table).flatten(0, 1), length))

    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(logits(history[:rows]), target[:rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((logits(history[rows:]).argmax(1) == target[rows:]).float().mean())


def test_encoders_that_know_order_solve_a_world_of_the_newest_step():
    """The mean cannot tell which of six steps was the last."""
    mean = next_found(build_encoder(kind="mean"))
    found = {
        kind: next_found(build_encoder(kind=kind)) for kind in ("heads", "gru", "cnn", "transformer", "hierarchical")
    }
    assert all(each > mean + 0.4 for each in found.values()), (found, mean)


def told_apart(feature: FeatureSpec, listed: JaggedLookup, target: Tensor, items: int) -> float:
    """How many of a half that was not trained on find their target among the items of their steps."""
    torch.manual_seed(0)
    reader, last = SequenceInput(feature, DIM), torch.nn.Linear(DIM, items)
    table = torch.nn.Parameter(torch.randn(items, DIM))
    optimizer = torch.optim.Adam([*reader.parameters(), *last.parameters(), table], lr=0.05)
    half = len(target) // 2
    halves = []
    for part in (slice(half), slice(half, None)):
        steps = listed.length[part].sum()
        parts = [None if each is None else each.split([steps, len(each) - steps]) for each in
                 (listed.place, listed.gap, listed.action)]  # fmt: skip
        number = 0 if part.start is None else 1
        place, gap, action = (None if each is None else each[number] for each in parts)
        halves.append(JaggedLookup(listed.length[part], place=place, gap=gap, action=action))

    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(last(reader(table, halves[0])), target[:half]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((last(reader(table, halves[1])).argmax(1) == target[half:]).float().mean())


@pytest.mark.parametrize("beside", ["times", "actions"])
def test_attention_to_what_stands_beside_a_step_solves_a_world_of_marked_steps(beside):
    """One of five steps comes after a long gap, or was another act, and its item is what counts.

    Items alone cannot tell which, and a mean of items and marks cannot tell whose mark it was.
    """
    generator = torch.Generator().manual_seed(7)
    rows, steps, items = 800, 5, 10
    item_BL = torch.stack([torch.randperm(items, generator=generator)[:steps] for _ in range(rows)])
    at_B = torch.randint(steps, (rows,), generator=generator)
    mark_BL = torch.where(torch.arange(steps) == at_B[:, None], 9, 3)
    length_B = torch.full((rows,), steps)
    marked = JaggedLookup(length_B, place=item_BL.flatten(), gap=mark_BL.flatten(), action=mark_BL.flatten())
    target = item_BL[torch.arange(rows), at_B]

    def found(kind: str, **marks: str) -> float:
        spec = {"name": "h", "kind": "sequence", "table": "t", "max_length": steps, "encoder": {"kind": kind}}
        return told_apart(build_feature(**spec, **marks), marked, target, items)

    told, untold, mean = found("attention", **{beside: "marks"}), found("attention"), found("mean", **{beside: "marks"})
    assert max(untold, mean) < 0.35 and told > 0.9, (told, untold, mean)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "mean", "heads": 2}, "is of kind .mean., which has no heads: remove it"),
        ({"kind": "gru", "segment": 2}, "is of kind .gru., which has no segment: remove it"),
        ({"kind": "grn"}, "kind"),
        ({"kind": "routing", "interests": 1}, "'interests' is 1: input should be greater than or equal to 2"),
        ({"kind": "gru", "layer": 2}, "nearest: 'layers'"),
    ],
)
def test_what_an_encoder_does_not_know_is_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        build_encoder(**values)
