"""Which old layer each layer comes from, and when it was born."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_sparkling.errors import ConfigError, PlanError
from ds_sparkling.spec.layers import (
    LayerGrowth,
    birth_in,
    is_new,
    layer_births,
    layer_sources,
    renumbered,
    source_of,
)
from ds_sparkling.spec.strategy import LayerOrder, Layers

orders = st.sampled_from([*LayerOrder])
counts = st.tuples(st.integers(1, 12), st.integers(1, 20)).map(lambda few: (few[0], few[0] + few[1]))


@pytest.mark.parametrize(
    ("order", "sources"),
    [
        (LayerOrder.STACK, (0, 1, 2, 3, 0, 1)),
        (LayerOrder.INTERPOSE, (0, 0, 1, 2, 2, 3)),
        (LayerOrder.MIDDLE, (0, 1, 2, 1, 2, 3)),
        (LayerOrder.LAST, (0, 1, 2, 3, 3, 3)),
        ((0, 3, 1, 1, 2, 0), (0, 3, 1, 1, 2, 0)),
    ],
)
def test_six_layers_of_four(order: LayerOrder | tuple[int, ...], sources: tuple[int, ...]) -> None:
    assert layer_sources("depth", 4, 6, order) == sources


@given(counts, orders)
def test_every_old_layer_goes_on_once_and_in_order(few_many: tuple[int, int], order: LayerOrder) -> None:
    few, many = few_many
    growth = LayerGrowth("depth", many, "blocks", layer_sources("depth", few, many, order))
    assert len(growth.sources) == many
    assert [source for source, new in zip(growth.sources, growth.new, strict=True) if not new] == [*range(few)]


@pytest.mark.parametrize(
    ("after", "sources", "message"),
    [
        (3, (0, 1), "has 2 entries; depth grows to 3, so it needs 3"),
        (3, (0, 1, 2), "names layer 2; there are 2, from 0 on"),
        (3, (0, 0, 0), "lacks layer 1, which would be lost"),
        (2, LayerOrder.STACK, "depth: 2 -> 2 layers; a growth adds layers"),
    ],
)
def test_sources_that_cannot_be(after: int, sources: LayerOrder | tuple[int, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        layer_sources("depth", 2, after, sources)


@pytest.mark.parametrize("sources", ["stacked", [], [-1], [True], [0.0], {"0": 1}, None, 3])
def test_sources_in_json(sources: object) -> None:
    with pytest.raises(ConfigError, match=r"^layers\.sources must be 'stack', 'interpose', 'middle', 'last' or a list"):
        Layers.from_dict({"sources": sources}, "layers")
    assert Layers.from_dict({"sources": [0, 0]}).to_dict()["sources"] == [0, 0]
    assert Layers.from_dict({"sources": "last"}).sources is LayerOrder.LAST


def test_names_after_a_growth() -> None:
    names = ["embed", "a.0.w", "a.0.b", "a.1.w", "a.1.b", "b.0.w", "head.10.w"]
    layers = [LayerGrowth("few", 3, "a", (0, 1, 0)), LayerGrowth("more", 2, "b", (0, 0))]
    wide = renumbered(names, layers)
    assert wide == ["embed", "a.0.w", "a.0.b", "a.1.w", "a.1.b", "a.2.w", "a.2.b", "b.0.w", "b.1.w", "head.10.w"]
    assert [source_of(name, layers) for name in wide[5:]] == ["a.0.w", "a.0.b", "b.0.w", "b.0.w", "head.10.w"]
    assert [name for name in wide if is_new(name, layers)] == ["a.2.w", "a.2.b", "b.1.w"]
    with pytest.raises(PlanError, match=r"a\.3\.w: a is planned to have 3 layers"):
        source_of("a.3.w", layers)


@given(st.lists(st.tuples(st.integers(1, 3), orders), min_size=1, max_size=4))
def test_births_follow_layers_through_growths(steps: list[tuple[int, LayerOrder]]) -> None:
    """Of every layer as it is at the end: the growth that it was first there after."""
    history, alive, counter = [], [(0, 0), (0, 1)], itertools.count(2)  # (birth, who it is)
    for number, (more, order) in enumerate(steps, start=1):
        sources = layer_sources("depth", len(alive), len(alive) + more, order)
        history.append({"blocks": sources})
        seen: set[int] = set()
        made = []
        for source in sources:
            made.append((number, next(counter)) if source in seen else alive[source])
            seen.add(source)
        alive = made
    births = layer_births(history)
    assert births == {"blocks": tuple(birth for birth, _ in alive)}
    assert birth_in(f"blocks.{len(alive) - 1}.w", births) == alive[-1][0]
    assert birth_in("blocks_of.0.w", births) == 0
