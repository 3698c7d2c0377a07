"""Find the repeated blocks and the routers in a model of any kind."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ds_sparkling.spec.autoep import BlockNames


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The elements of every ``nn.ModuleList`` that isn't inside another one, by path.

    Only elements that are made of parts themselves: a list of plain maps (heads, embeddings) isn't the model's depth.
    """
    return dict(_blocks("", model))


def _blocks(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if not isinstance(child, nn.ModuleList):
            yield from _blocks(f"{path}.", child)
            continue
        for index, block in child.named_children():
            if any(True for part in block.children() for _ in part.children()):
                yield f"{path}.{index}", block


def routers(model: nn.Module, names: BlockNames) -> dict[str, nn.Module]:
    """The modules that route tokens, by the path of the block that they are in.

    A router stands beside the experts in their parent, and has a weight with one row per expert, of its own or of a
    linear map inside (:func:`router_map`). The path is that of the repeated block if it has one router only, and that
    of the router's parent otherwise.
    """
    blocks = repeated_blocks(model)
    found: dict[str, list[tuple[str, nn.Module]]] = {}
    for path, parent in model.named_modules():
        if not isinstance(getattr(parent, names.experts, None), nn.Module):
            continue
        for name in ("router", names.router):  # AutoEP's, which may have put an alias at the other
            router = getattr(parent, name, None)
            if isinstance(router, nn.Module) and router_map(router) is not None:
                block = next((block for block in blocks if f"{path}.".startswith(f"{block}.")), path)
                found.setdefault(block, []).append((path, router))
                break
    return {block if len(inside) == 1 else path: router for block, inside in found.items() for path, router in inside}


def router_map(router: nn.Module) -> nn.Module | None:
    """The module that makes a router's logits: the router itself, or the ``gate`` inside AutoEP's."""
    for module in (router, getattr(router, "gate", None)):
        if isinstance(module, nn.Module) and isinstance(getattr(module, "weight", None), nn.Parameter):
            return module
    return None
