"""Which dimensions move with which widths, alone or together, and what moves by no rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ds_sparkling.discovery.moves import Move, find_moves
from ds_sparkling.errors import PlanError

HIDDEN, HEADS, SHARED = "hidden_size", "num_attention_heads", "num_key_value_heads"


class Sized(nn.Module):
    """Parameters of given shapes."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))


# -- what moves ----------------------------------------------------------------------------------------------------


def test_a_dimension_that_is_a_multiple_of_a_width_moves_with_it() -> None:
    def build_model(h: int, i: int) -> nn.Module:
        return Sized(up=(3 * i, h), down=(h, i), same=(i + 0, 8), fixed=(8, 12), scalar=())

    assert find_moves(build_model, {"h": 8, "i": 4}) == {
        ("up", 0): Move((("i", 3),)),
        ("up", 1): Move((("h", 1),)),
        ("down", 0): Move((("h", 1),)),
        ("down", 1): Move((("i", 1),)),
        ("same", 0): Move((("i", 1),)),
    }


def test_only_axes_that_are_asked_for_move() -> None:
    def build_model(h: int = 8, i: int = 4) -> nn.Module:
        return Sized(up=(i, h))

    assert find_moves(build_model, {"h": 8}) == {("up", 1): Move((("h", 1),))}


def test_an_axis_may_move_nothing_beside_one_that_does() -> None:
    """A size that others follow from; whether it may grow along is the plan's to say."""
    assert find_moves(lambda h, heads: Sized(w=(3, h)), {"h": 8, "heads": 2}) == {("w", 1): Move((("h", 1),))}


def test_a_size_of_hidden_over_heads_times_shared_heads_belongs_to_the_shared_heads() -> None:
    """A norm over all keys of a model whose head size follows from the others."""

    def build_model(**widths: int) -> nn.Module:
        head_dim = widths[HIDDEN] // widths[HEADS]
        return Sized(q=(widths[HEADS] * head_dim, widths[HIDDEN]), k=(widths[SHARED] * head_dim, 3))

    for widths in ({HIDDEN: 32, HEADS: 4, SHARED: 2}, {HIDDEN: 32, HEADS: 4, SHARED: 4}):
        moves = find_moves(build_model, widths)
        assert moves["k", 0] == Move(((SHARED, 8),), coupled=True)
        assert moves["q", 0] == moves["q", 1] == Move(((HIDDEN, 1),))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("whole", "parts", "taken"), Move((("taken", 4),), coupled=True)),
        (("whole", "n_head", "taken"), Move((("n_head", 2),), coupled=True)),
        (("whole", "n_head", "n_kv_head"), Move((("n_kv_head", 4),), coupled=True)),
        (("whole", "n_kv_head", "n_head"), Move((("n_kv_head", 2),), coupled=True)),
    ],
)
def test_what_several_axes_make_belongs_to_heads_and_else_to_the_narrowest(
    names: tuple[str, str, str], expected: Move
) -> None:
    whole, parts, taken = names
    made = find_moves(lambda **w: Sized(w=(w[whole] // w[parts] * w[taken],)), {whole: 16, parts: 4, taken: 2})
    assert made == {("w", 0): expected}


def test_an_axis_that_can_not_double_alone_doubles_beside_others() -> None:
    """More key/value heads than query heads can't be built."""

    def build_model(**widths: int) -> nn.Module:
        assert widths[HEADS] % widths[SHARED] == 0, "query heads must share evenly"
        return Sized(q=(4 * widths[HEADS],), k=(4 * widths[SHARED],))

    moves = find_moves(build_model, {HEADS: 2, SHARED: 2})
    assert moves == {("q", 0): Move(((HEADS, 4),)), ("k", 0): Move(((SHARED, 4),))}


def test_what_stays_beside_multiples_is_told_from_them() -> None:
    """Latent attention: what a head's keys need of positions stays; and queries, keys and values of grouped heads."""

    def build_model(**widths: int) -> nn.Module:
        return Sized(
            latent=(widths["rank"] + 4,), qkv=(8 * widths[HEADS] + 16 * widths[SHARED], 3), q=(4 * widths[HEADS],)
        )

    moves = find_moves(build_model, {"rank": 8, HEADS: 4, SHARED: 2})
    assert moves == {
        ("latent", 0): Move((("rank", 1),), fixed=4),
        ("qkv", 0): Move(((HEADS, 8), (SHARED, 16))),
        ("q", 0): Move(((HEADS, 4),)),
    }
    assert str(moves["latent", 0]) == "1 times rank and 4 entries that stay"
    assert find_moves(lambda **widths: Sized(w=(widths["a"] + widths["b"],)), {"a": 1, "b": 2}) == {
        ("w", 0): Move((("a", 1), ("b", 1)))
    }


def test_a_size_that_stays_when_all_its_axes_double_moves_with_none() -> None:
    """Norms of queries and keys, of the hidden size over the heads."""
    made = find_moves(lambda **w: Sized(norm=(w[HIDDEN] // w[HEADS],), x=(w[HIDDEN],)), {HIDDEN: 8, HEADS: 2})
    assert made == {("x", 0): Move(((HIDDEN, 1),))}


def test_axes_that_are_valid_in_one_ratio_only_double_together() -> None:
    """Hidden size and heads of a state-space layer, which its config holds against each other."""

    def build_model(hidden: int, heads: int = 4, inner: int = 3) -> nn.Module:
        assert 2 * hidden == heads * 8, "the heads must make up twice the hidden size"
        return Sized(norm=(hidden,), mixed=(4 * hidden + 10 + heads, hidden), rate=(heads,), mlp=(inner,))

    moves = find_moves(build_model, {"hidden": 16, "heads": 4, "inner": 3})
    assert moves == {
        ("norm", 0): Move((("hidden", 1),), coupled=True),
        ("mixed", 0): Move((("heads", 17),), fixed=10, coupled=True),
        ("mixed", 1): Move((("hidden", 1),), coupled=True),
        ("rate", 0): Move((("heads", 1),), coupled=True),
        ("mlp", 0): Move((("inner", 1),)),
    }
    with pytest.raises(PlanError, match="the heads must make up twice the hidden size"):
        find_moves(build_model, {"hidden": 16})


def test_what_a_hint_tells_needs_no_rule() -> None:
    def build_model(width: int) -> nn.Module:
        return Sized(odd=(width * width,), even=(width,))

    with pytest.raises(PlanError, match="odd: dimension 0"):
        find_moves(build_model, {"width": 4})
    assert find_moves(build_model, {"width": 4}, {"odd"}) == {("even", 0): Move((("width", 1),))}


# -- what can't grow -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "named"),
    [
        pytest.param(lambda w: w + 1 + w // 12, "part: dimension 0 of size 5 goes from 5 to 9", id="bends further on"),
        pytest.param(lambda w: w * w, "part: dimension 0 of size 16 goes from 16 to 64", id="a square"),
        pytest.param(lambda w: 64 // w, "part: dimension 0 of size 16 goes from 16 to 8", id="shrinks"),
        pytest.param(lambda w: -(-w // 3) * 3, "part: dimension 0 of size 6 goes from 6 to 9", id="rounded up"),
        pytest.param(lambda w: 8 * w // 3, "part: dimension 0 of size 10 goes from 10 to 21", id="no whole multiple"),
    ],
)
def test_what_moves_by_no_multiple_is_refused_by_name(size: Callable[[int], int], named: str) -> None:
    with pytest.raises(PlanError, match=named) as refused:
        find_moves(lambda width: Sized(part=(size(width),)), {"width": 4})
    assert "width goes from 4 to 8" in str(refused.value)
    assert "let their number grow along" in str(refused.value)


def test_heads_that_are_no_multiple_get_no_advice_to_grow_heads() -> None:
    with pytest.raises(PlanError, match="only multiples") as refused:
        find_moves(lambda n_head: Sized(q=(8 * n_head - 4,)), {"n_head": 2})
    assert "grow along" not in str(refused.value)


def test_a_share_of_a_width_is_refused_with_what_would_grow() -> None:
    def grouped(count: int | None) -> Callable[[int], nn.Module]:
        return lambda width: nn.Conv1d(width, width, 3, groups=count or width // 4)

    with pytest.raises(PlanError, match=r"dimension 1 of size 4 is a share of width .16., as of 4 groups.*follow"):
        find_moves(grouped(4), {"width": 16})
    assert ("weight", 1) not in find_moves(grouped(None), {"width": 16})


def test_a_product_of_two_axes_is_refused() -> None:
    """If both doubled, it would grow fourfold."""
    with pytest.raises(PlanError, match=r"w: dimension 0 changes with heads and head_dim"):
        find_moves(lambda heads, head_dim: Sized(w=(heads * head_dim,)), {"heads": 2, "head_dim": 4})


def test_axes_that_move_nothing_are_refused() -> None:
    with pytest.raises(PlanError, match="no parameter changes with 'rope_theta', 'depth'"):
        find_moves(lambda rope_theta, depth: nn.Linear(2, 3), {"rope_theta": 10, "depth": 3})


def test_an_axis_that_adds_parameters_is_refused() -> None:
    def build_model(layers: int) -> nn.Module:
        return nn.Sequential(*[nn.Linear(3, 3) for _ in range(layers)])

    with pytest.raises(PlanError, match="changing layers changes which parameters"):
        find_moves(build_model, {"layers": 2})


def test_a_model_that_can_not_be_widened_is_named_with_its_widths() -> None:
    def build_model(width: int) -> nn.Module:
        if width > 4:
            raise ValueError("too wide for us")
        return nn.Linear(width, 3)

    with pytest.raises(PlanError, match=r"'width': 8.*ValueError: too wide for us"):
        find_moves(build_model, {"width": 4})


# -- buffers -------------------------------------------------------------------------------------------------------


class WithBuffer(nn.Module):
    def __init__(self, width: int, size: int, *, persistent: bool) -> None:
        super().__init__()
        self.map = nn.Linear(width, 3)
        self.register_buffer("table", torch.zeros(size), persistent=persistent)


def test_a_buffer_of_the_models_state_moves_as_a_parameter_does() -> None:
    def build_model(width: int) -> nn.Module:
        return nn.ModuleDict({"part": WithBuffer(width, 2 * width, persistent=True)})

    assert find_moves(build_model, {"width": 4}) == {
        ("part.map.weight", 1): Move((("width", 1),)),
        ("part.table", 0): Move((("width", 2),)),
    }
    with pytest.raises(PlanError, match=r"part\.table: dimension 0 of size 16"):
        find_moves(lambda width: nn.ModuleDict({"part": WithBuffer(width, width**2, persistent=True)}), {"width": 4})


@pytest.mark.parametrize(("sized", "persistent"), [(True, False), (False, True), (False, False)])
def test_buffers_that_the_model_makes_anew_or_that_stay_are_fine(sized: bool, persistent: bool) -> None:
    moves = find_moves(lambda width: WithBuffer(width, width if sized else 5, persistent=persistent), {"width": 4})
    assert moves == {("map.weight", 1): Move((("width", 1),))}
