"""EvoNorm in place of batch norm and the activation behind it, in a model that exists."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import _assert_is_none
from torch.nn import functional

from provenn.core.experiment.checks import check_choice
from provenn.nn._evonorm_layer import KINDS, EvoNorm2d

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU)
_FUNCTIONS: tuple[Any, ...] = (
    functional.relu, functional.relu6, functional.silu, torch.relu, torch.relu_, functional.relu_,
)  # fmt: skip
_METHODS = ("relu", "relu_")
LEAVES = (EvoNorm2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *ACTIVATIONS)


def replace_norm_act(
    model: nn.Module, kind: str = "B0", groups: int = 32, group_size: int | None = None, eps: float | None = None
) -> nn.Module:
    """Return a copy of a model with an :class:`EvoNorm2d` wherever ``nn.BatchNorm2d`` feeds an activation.

    Which batch norm feeds which activation is read off the model's data flow by ``torch.fx``, so it does not matter
    whether they stand side by side or a block's ``forward`` brings them together. Activations are ReLU, ReLU6 and
    SiLU, as modules or as functions; of a pair the activation goes. A batch norm that feeds anything else, as at the
    end of a residual branch, becomes ``EvoNorm2d(apply_act=False)``, which is γ x + β.

    Kept: γ and β and whether they are trained, for the B kinds the running variance, momentum, ε (unless given),
    device, type and mode; a module used twice is still one. Not kept: the running mean, as nothing is centred; the
    function, as no EvoNorm layer equals a batch norm with an activation (train, or fine-tune); and hooks on what is
    replaced. v₁ starts at 1. A batch norm without running statistics starts with a running variance of 1. Subclasses
    of ``nn.BatchNorm2d``, and batch norms that ``forward`` does not call, stay as they are.

    A module whose ``forward`` calls an activation as a function behind a batch norm, or one activation module for
    pairs and for other things, becomes an ``fx.GraphModule`` of the same children without those calls; parts that its
    ``forward`` does not use are not in it, hooks on it neither, and an argument that is ``None`` in all its calls stays
    unread. All other modules keep their class.

    Args:
        model: A model, or an ``nn.BatchNorm2d`` itself. Left as it is.
        kind: As in :class:`EvoNorm2d`.
        groups: As in :class:`EvoNorm2d`.
        group_size: As in :class:`EvoNorm2d`.
        eps: As in :class:`EvoNorm2d`; ``None`` keeps each batch norm's own.

    Returns:
        The converted copy.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: The model has no ``nn.BatchNorm2d``; its ``forward`` cannot be traced, as its control flow depends
            on values; a batch norm is called twice, once with an activation behind it and once without; a ``forward``
            that must be rewritten differs between training and eval mode, or with and without an optional argument
            that is sometimes given; groups do not divide some layer's channels; or an unknown ``kind``.

    Cost: memory of the copy; the model is traced, not run.

    Source: arXiv 2004.02967: EvoNorm in place of BN-ReLU, the affine map where no activation follows.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("kind", kind, KINDS)
    root = copy.deepcopy(model)
    if type(root) is nn.BatchNorm2d:
        return _converted(root, False, kind, groups, group_size, eps)
    flow = _Flow.of(root)
    if not flow.norms:
        raise ValueError(f"model must call at least one nn.BatchNorm2d, got {type(model).__name__} without")
    make = partial(_converted, kind=kind, groups=groups, group_size=group_size, eps=eps)
    made: dict[nn.Module, nn.Module] = {norm: make(norm, _is_paired(norm, acts)) for norm, acts in flow.norms.items()}
    gone = {act for acts in flow.norms.values() for act in acts if act is not None}
    spared = {module for node, module in flow.activations.items() if node not in gone}
    silenced = {module for module in flow.activations.values() if module is not None and module not in spared}
    made.update((module, nn.Identity()) for module in silenced)
    _put(root, made)
    left = [node for node, module in flow.activations.items() if module not in silenced]
    callers = {flow.callers[node] for node in left if node in gone}
    for owner in reversed([module for module in root.modules() if module in callers]):  # inner ones first
        drop = [node in gone for node in left if flow.callers[node] is owner]
        rewritten = _rewritten(owner, drop, flow.absent.get(owner))
        if owner is root:
            return rewritten
        _put(root, {owner: rewritten})
    return root


@dataclass
class _Flow:
    """Who calls what.

    Args:
        norms: For every batch norm, for each of its calls, the activation that alone takes its output, or ``None``.
        activations: The calls of activations in their order, with the module, or ``None`` for a function.
        callers: The module whose ``forward`` made a call.
        absent: For every module that was entered, for each of its calls, the arguments that were ``None``.
    """

    norms: dict[nn.BatchNorm2d, list[fx.Node | None]] = field(default_factory=dict)
    activations: dict[fx.Node, nn.Module | None] = field(default_factory=dict)
    callers: dict[fx.Node, nn.Module] = field(default_factory=dict)
    absent: dict[nn.Module, list[set[str]]] = field(default_factory=dict)

    @classmethod
    def of(cls, root: nn.Module) -> _Flow:
        tracer = _Tracer()
        graph = _traced(tracer, root)
        flow = cls(callers=tracer.callers, absent=tracer.absent)
        for node in graph.nodes:
            module = _module_of(node, root)
            if type(module) is nn.BatchNorm2d:
                users = list(node.users)
                pair = len(users) == 1 and _is_activation(users[0], root)
                flow.norms.setdefault(module, []).append(users[0] if pair else None)
            elif _is_activation(node, root):
                flow.activations[node] = module
        return flow


class _Tracer(fx.Tracer):
    """A tracer that remembers whose ``forward`` made each node, and looks through decorators that check signatures.

    What checks a signature refuses the stand-ins that tracing passes in place of tensors.

    Args:
        shallow: Whether to stop at all children of the root.
    """

    def __init__(self, shallow: bool = False) -> None:
        super().__init__()
        self.callers: dict[fx.Node, nn.Module] = {}
        self.absent: dict[nn.Module, list[set[str]]] = {}
        self._shallow = shallow
        self._inside: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Stop at torch's own modules and at kinds of them, or at all."""
        return self._shallow or isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Enter a module, by its own forward."""
        if self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)
        plain = inspect.unwrap(type(m).forward)
        given = inspect.signature(plain).bind(m, *args, **kwargs)
        given.apply_defaults()
        self.absent.setdefault(m, []).append({name for name, value in given.arguments.items() if value is None})
        self._inside.append(m)
        try:
            return plain(m, *args, **kwargs)
        finally:
            self._inside.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Note the caller."""
        node = super().create_node(*args, **kwargs)
        self.callers[node] = self._inside[-1] if self._inside else self.root
        return node


def _traced(tracer: _Tracer, root: nn.Module, absent: Iterable[str] = ()) -> fx.Graph:
    kind = type(root)
    plain = type(kind.__name__, (kind,), {"forward": inspect.unwrap(kind.forward), "__module__": kind.__module__})
    root.__class__ = plain  # the tracer calls the root's class's forward, decorators and all
    try:
        return tracer.trace(root, dict.fromkeys(absent))
    except Exception as error:  # what a forward does with the stand-ins, and so what it raises, is open
        raise ValueError(
            f"model must have a forward that torch.fx can trace; convert the blocks that have, one by one "
            f"({type(error).__name__}: {error})"
        ) from error
    finally:
        root.__class__ = kind


def _module_of(node: fx.Node, root: nn.Module) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_activation(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(_module_of(node, root), ACTIVATIONS)
    return node.target in (_METHODS if node.op == "call_method" else _FUNCTIONS if node.op == "call_function" else ())


def _is_paired(norm: nn.BatchNorm2d, activations: list[fx.Node | None]) -> bool:
    paired = {activation is not None for activation in activations}
    if len(paired) > 1:
        raise ValueError(f"model must not call one batch norm both with and without an activation behind it: {norm}")
    return paired.pop()


def _converted(
    norm: nn.BatchNorm2d, apply_act: bool, kind: str, groups: int, group_size: int | None, eps: float | None
) -> EvoNorm2d:
    reference: Tensor | None = norm.weight if norm.affine else norm.running_mean
    layer = EvoNorm2d(
        norm.num_features,
        kind,
        groups=groups,
        group_size=group_size,
        eps=norm.eps if eps is None else eps,
        momentum=0.1 if norm.momentum is None else norm.momentum,
        apply_act=apply_act,
        device=None if reference is None else reference.device,
        dtype=None if reference is None else reference.dtype,
    )
    with torch.no_grad():
        for name in ("weight", "bias"):
            old, new = getattr(norm, name), getattr(layer, name)
            if old is not None:
                new.copy_(old)
            new.requires_grad_(old is not None and old.requires_grad)
        if layer.running_var is not None and norm.running_var is not None:
            layer.running_var.copy_(norm.running_var)
    return layer.train(norm.training)


def _rewritten(owner: nn.Module, drop: list[bool], absent: list[set[str]] | None) -> fx.GraphModule:
    """Return an owner's forward as a graph over its children, without some of the activations that it calls.

    Args:
        owner: The module.
        drop: For every activation in the order of calls, over all calls of the owner, whether it goes.
        absent: For each of these calls the arguments that were ``None``; ``None`` for the model itself, whose calls
            are not known.
    """
    name = type(owner).__name__
    never = _never_given(owner, absent)
    graph = _shallow(owner, never)
    if str(graph) != str(_shallow(owner, never, other_mode=True)):
        raise ValueError(f"model must not have a {name} that calls activations by its mode, training or eval")
    activations = [node for node in graph.nodes if _is_activation(node, owner)]
    calls = [drop[start : start + len(activations)] for start in range(0, len(drop), len(activations))]
    if any(call != calls[0] for call in calls):
        raise ValueError(f"model must not use one {name} where its activations follow batch norms and where not")
    for node, goes in zip(activations, calls[0], strict=True):
        if goes:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
    return fx.GraphModule(owner, graph, name)


def _never_given(owner: nn.Module, absent: list[set[str]] | None) -> set[str]:
    """Return the arguments that are ``None`` in every call; what a forward does with others is traced."""
    if absent is None:
        parameters = inspect.signature(inspect.unwrap(type(owner).forward)).parameters.values()
        absent = [set(), {one.name for one in parameters if one.default is None}]
    never, sometimes = set.intersection(*absent), set.union(*absent)
    for name in sorted(sometimes - never):
        if _program(_shallow(owner, never), name) != _program(_shallow(owner, never | {name}), name):
            raise ValueError(
                f"model must not have a {type(owner).__name__} whose forward does other things where {name} is None"
            )
    return never


def _program(graph: fx.Graph, absent: str) -> list[Any]:
    """Return what a graph does with ``None`` for an argument, whatever its nodes are called."""
    place = {node: None if node.target == absent else f"%{index}" for index, node in enumerate(graph.nodes)}
    return [(node.op, node.target, fx.node.map_arg((node.args, node.kwargs), place.get)) for node in graph.nodes]


def _shallow(owner: nn.Module, absent: set[str], other_mode: bool = False) -> fx.Graph:
    mode = owner.training
    owner.training = mode != other_mode
    try:
        graph = _traced(_Tracer(shallow=True), owner, absent)
    finally:
        owner.training = mode
    for node in list(graph.nodes):
        if node.target is _assert_is_none:  # what torch.fx adds here can neither be pickled nor traced again
            placeholder = node.all_input_nodes[0]
            graph.erase_node(node)
            placeholder.target = str(placeholder.target).rpartition("_")[0]  # torch.fx has numbered it
    return graph


def _put(root: nn.Module, made: dict[nn.Module, nn.Module]) -> None:
    for module in list(root.modules()):
        for name, child in list(module._modules.items()):  # named_children would leave out a module's second name
            if child in made:
                setattr(module, name, made[child])
