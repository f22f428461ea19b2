"""The cases of the verification: coverage, and equality on all machines."""

from __future__ import annotations

import itertools

import pytest
import torch

from vispruner_cuda import _checks
from vispruner_cuda.verification import OPERATORS, Case, cases, inputs, select
from vispruner_cuda.verification.cases import DTYPES, QUICK_COST

ALL = cases()
QUICK = select(ALL, quick=True)


def test_all_cases_differ() -> None:
    assert len(set(ALL)) == len(ALL)
    assert all(Case.from_data(case.data()) == case for case in ALL)


@pytest.mark.parametrize("of", [ALL, QUICK], ids=["all", "quick"])
def test_every_operator_and_dtype(of: list[Case]) -> None:
    covered = {
        (case.operator, case.attention_dtype if case.operator == "topk" else case.dtype)
        for case in of
    }
    assert covered == set(itertools.product(OPERATORS, DTYPES))


@pytest.mark.parametrize(
    "residual", [234, 479, 544, 576, 577, 1024, 1025, 1096, 2188, 4096, 4097, 4564]
)
def test_sizes_at_which_kernels_change(residual: int) -> None:
    """Residual tokens of an image, alone and packed."""
    for operator in ("dedup", "prune", "prune_varlen"):
        assert any(c.residual == residual for c in ALL if c.operator == operator), operator


def test_kinds_and_layouts() -> None:
    pruned = [case for case in ALL if case.operator in ("prune", "prune_varlen")]
    for dtype in DTYPES:
        some = [case for case in pruned if case.dtype == dtype]
        assert {case.features for case in some} == set(inputs.FEATURES)
        assert {case.layout for case in some} == set(inputs.LAYOUTS)
    assert {case.attention for case in pruned} == set(inputs.ATTENTION)
    assert {1, 8, 1000} <= {case.step for case in pruned}
    assert {0.0, 1.0} <= {case.important_ratio for case in pruned}


def test_packed_images() -> None:
    packed = [case.tokens for case in ALL if case.operator == "prune_varlen"]
    assert any(len(tokens) > 48 and 0 in tokens and 1 in tokens for tokens in packed)
    assert () in packed


def test_received_attention() -> None:
    some = [case for case in ALL if case.operator == "received_attention"]
    wanted = itertools.product((1, 40, 64, 72, 80, 128, 240, 256), DTYPES, (False, True))
    found = {(c.channels, c.dtype, c.lse) for c in some if max(c.tokens, default=0) > 64}
    assert set(wanted) <= found
    assert max(case.channels for case in some) == _checks.MAX_HEAD_DIM


def test_cls_attention_of_13000_tokens() -> None:
    assert any(
        case.tokens == (13000,) and case.dtype == "float32"
        for case in ALL
        if case.operator == "cls_attention"
    )


def test_longer_images_come_later() -> None:
    """A launch can fail as long as no larger one of its kernel has come before."""
    of_234 = next(i for i, case in enumerate(ALL) if case.residual == 234)
    assert max(case.residual for case in ALL[:of_234]) < 234
    large = [case.residual for case in ALL if case.operator == "dedup"]
    assert max(large[: large.index(2188)]) < 2188


def test_selection() -> None:
    assert len(QUICK) < len(ALL) / 4
    assert all(case.cost <= QUICK_COST for case in QUICK)
    cheap = select(ALL, most_cost=1.0)
    assert cheap == [case for case in ALL if case.cost <= 1.0]
    assert len(cheap) > 200
    assert select(ALL, most_cost=1.0, quick=True)[0] in cheap


def test_costs() -> None:
    """In millions of operations: the loop of LLaVA-1.5's shape takes 20 of them."""
    llava = Case("prune", (576,), 1024, 16, 64, dtype="float16")
    assert 20 < llava.cost < 200
    assert Case("prune", (576,) * 8, 1024, 16, 64).cost == pytest.approx(8 * llava.cost)
    assert Case("prune", (10,), 4, None, 20).cost < 0.1


def test_integers_are_the_same_everywhere() -> None:
    assert inputs.integers((2, 3), 7).tolist() == [
        [1249439647, 144595966, 1020038547],
        [1928756144, 1946894984, 1666863844],
    ]
    x = inputs.integers((100_000,), 3)
    assert int(x.min()) >= 0
    assert int(x.max()) < 2**31 - 1
    assert len(x.unique()) > 99_900
    assert abs((x % 1000).double().mean().item() - 499.5) < 5


@pytest.mark.parametrize("kind", inputs.FEATURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_features(kind: str, dtype: torch.dtype) -> None:
    x = inputs.features(kind, (2, 50, 9), dtype, 5)
    assert x.shape == (2, 50, 9)
    assert x.dtype == dtype
    finite = torch.isfinite(x).all(dim=-1)
    if kind == "non_finite":
        assert 10 < int(finite.sum()) < 90
        assert x.isnan().any()
        assert (x == float("inf")).any()
        assert (x == float("-inf")).any()
    else:
        assert finite.all()
    if kind == "tiny" and dtype == torch.float32:
        peaks = x.abs().amax(-1)
        assert (peaks < 1e-38).any()
        assert (peaks == 1e-30).any()
        assert (peaks > 1e-30).any()
    if kind == "huge":
        assert x.abs().max() > torch.finfo(dtype).max / 2
    if kind in ("normal", "clustered", "smooth") and dtype == torch.float32:
        # The low bits of a float32 are used: one that is cut to 16 bits differs.
        assert not torch.equal(x, x.bfloat16().float())
        assert not torch.equal(x, x.half().float())


@pytest.mark.parametrize("layout", inputs.HEAD_LAYOUTS)
def test_layouts_hold_the_same_values(layout: str) -> None:
    x = inputs.normal((3, 4, 5, 6), 1)
    for tokens in (1, 2):
        y = inputs.laid_out(x, layout, tokens)
        assert torch.equal(x, y)
        changed = y.stride() != x.stride() or y.data_ptr() % 16 != 0
        assert changed == (layout != "contiguous")


def test_texts_say_what_the_call_is() -> None:
    text = str(Case("prune", (196,), 64, 2, 26, dtype="float16"))
    assert text == "prune: 1 x 196 tokens, channels=64, heads=2, k=26, dtype=float16"
    assert len(str(Case("topk", (3,) * 1000, 1))) < 80
    packed = Case("prune_varlen", tuple(i % 40 for i in range(130)))
    assert str(packed).startswith("prune_varlen: 130 images of up to 39 tokens")
