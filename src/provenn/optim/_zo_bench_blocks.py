"""Blocks of parameters: by a rule from a model's structure, and checked to be a partition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice

LEVELS = ("transformer-block", "mlp-attn", "linear")


def parameter_blocks(model: nn.Module, level: str = "linear") -> list[list[nn.Parameter]]:
    """Group a model's trainable parameters into blocks, from the input on.

    Args:
        model: Its structure decides.
        level: ``"linear"``: every module that holds parameters itself is a block. ``"mlp-attn"``: every child of a
            repeated block (an entry of a :class:`torch.nn.ModuleList`) is one, an attention or one layer of a
            perceptron, say. ``"transformer-block"``: the repeated blocks are. What lies outside of the lists goes by
            the module that holds it, as embeddings and final norms do.

    Returns:
        Blocks that hold each trainable parameter once; a tied one in the block that comes first.

    Raises:
        ValueError: ``level`` is unknown, or the model has no trainable parameter.

    Source: arXiv 2402.11592, section on block-wise ZO; the levels are those of the authors' code.
    """
    check_choice("level", level, LEVELS)
    seen: set[int] = set()
    blocks = []
    for held in _walk(model, level):
        block = [one for one in held if one.requires_grad and id(one) not in seen]
        seen.update(map(id, block))
        if block:
            blocks.append(block)
    if not blocks:
        raise ValueError(f"model must have a trainable parameter, got {type(model).__name__} without one")
    return blocks


def _walk(module: nn.Module, level: str) -> Iterator[list[nn.Parameter]]:
    yield list(module.parameters(recurse=False))
    for child in module.children():
        if level == "linear" or not isinstance(module, nn.ModuleList):
            yield from _walk(child, level)
        elif level == "transformer-block":
            yield list(child.parameters())
        else:
            yield list(child.parameters(recurse=False))
            yield from (list(part.parameters()) for part in child.children())


def checked_blocks(blocks: Iterable[Iterable[Tensor]], tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return blocks as lists, if they hold every tensor exactly once.

    Args:
        blocks: The blocks.
        tensors: What they must partition.

    Raises:
        ValueError: A tensor is missing, comes twice, or is none of these.
    """
    found = [list(block) for block in blocks]
    held = [id(one) for block in found for one in block]
    counts = {one: held.count(one) for one in held}
    missing = sum(id(one) not in counts for one in tensors)
    repeated = sum(count > 1 for count in counts.values())
    strange = len(counts.keys() - {id(one) for one in tensors})
    if missing or repeated or strange or not all(found):
        raise ValueError(
            "blocks must hold every parameter exactly once and none be empty, got"
            f" {missing} missing, {repeated} repeated and {strange} that params do not hold"
        )
    return found
