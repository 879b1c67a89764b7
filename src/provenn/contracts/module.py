"""The suite of modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from provenn.contracts import _modules as shared
from provenn.contracts._bounds import check_convexity, check_forms, check_lipschitz
from provenn.contracts._modules import BATCH, build, call, inputs_of, with_gradients
from provenn.contracts.case import Inputs, ModuleCase
from provenn.contracts.suite import check_part, expect
from provenn.contracts.watch import error_between, generator, mapped, plain_signatures, same, seeded, tensors_in


def exercise(case: ModuleCase) -> Callable[[], object]:
    """Return a call that builds the module, and goes forward and backward in training mode."""
    inputs = with_gradients(inputs_of(case, torch.float32))

    def act() -> None:
        shared.projection(case.make()(*inputs)).backward()

    return act


def check_gradients(case: ModuleCase) -> None:
    """In training mode output and gradients are finite, and every trainable parameter gets a gradient."""
    module, inputs = build(case).train(), with_gradients(inputs_of(case))
    shared.expect_gradients(module, call(module, inputs), tensors_in(inputs), "in training mode")


def check_gradcheck(case: ModuleCase) -> None:
    """Gradients by inputs and parameters agree with finite differences in float64 and eval mode."""
    inputs = with_gradients(inputs_of(case))
    shared.expect_gradcheck(build(case), inputs, [t for t in tensors_in(inputs) if shared.is_continuous(t)])


def _check_precision(case: ModuleCase, dtype: torch.dtype, tolerance: float) -> None:
    inputs = inputs_of(case)
    expected = call(build(case), inputs)
    narrow = mapped(inputs, lambda t: t.to(dtype) if t.is_floating_point() else t)
    error = error_between(call(build(case, dtype), tuple(narrow)), expected)
    expect(error <= tolerance, f"they differ by {error:.3g}, the case allows {tolerance:g}")


def check_float32(case: ModuleCase) -> None:
    """The output in float32 agrees with that in float64 to the case's tolerance."""
    _check_precision(case, torch.float32, case.float32_tolerance)


def check_bfloat16(case: ModuleCase) -> None:
    """The output in bfloat16 agrees with that in float64 to the case's tolerance."""
    _check_precision(case, torch.bfloat16, case.bfloat16_tolerance)


def check_dtype(case: ModuleCase) -> None:
    """module.to(dtype) converts everything: parameters, buffers, and so the output."""
    for dtype in (torch.float64, torch.bfloat16):
        with seeded(0):
            module = case.make().to(dtype).eval()
        kept = [name for name, t in module.state_dict().items() if t.is_floating_point() and t.dtype != dtype]
        expect(not kept, f"after .to({dtype}) {', '.join(kept)} have another dtype")
        found = {t.dtype for t in tensors_in(call(module, inputs_of(case, dtype))) if t.is_floating_point()}
        expect(found <= {dtype}, f"for {dtype} the outputs are {found}")


def check_eval_deterministic(case: ModuleCase) -> None:
    """In eval mode the same inputs give the same output bit by bit, whatever came before."""
    module, inputs = build(case), inputs_of(case)
    first = [t.detach().clone() for t in tensors_in(call(module, inputs, seed=1))]
    call(module, inputs_of(case, seed=1))
    again = [t.detach() for t in tensors_in(call(module, inputs, seed=2))]
    expect(same(first, again), f"two calls differ by {error_between(first, again):.3g}")


def check_training_equals_eval(case: ModuleCase) -> None:
    """The output is the same in training and in eval mode."""
    inputs = inputs_of(case)
    error = error_between(call(build(case).train(), inputs), call(build(case), inputs))
    expect(error < 1e-9, f"they differ by {error:.3g}; declare training_equals_eval=False with the reason")


def _batched(case: ModuleCase, tensor: Tensor, batch: int = BATCH) -> bool:
    return tensor.dim() > case.batch_dim and tensor.shape[case.batch_dim] == batch


def check_independent_samples(case: ModuleCase) -> None:
    """In eval mode a sample's output is the same alone as among others."""
    module, inputs = build(case), inputs_of(case)
    together = [t for t in tensors_in(call(module, inputs)) if _batched(case, t)]
    expect(together, f"no output has {BATCH} samples along dimension {case.batch_dim}")

    def sample(tensor: Tensor, index: int) -> Tensor:
        return tensor.narrow(case.batch_dim, index, 1) if _batched(case, tensor) else tensor

    for index in range(BATCH):
        one: Inputs = tuple(mapped(inputs, partial(sample, index=index)))
        alone = [t for t in tensors_in(call(module, one)) if _batched(case, t, 1)]
        error = error_between(alone, [sample(t, index) for t in together])
        expect(error < 1e-9, f"sample {index} alone differs by {error:.3g}")


def check_empty_batch(case: ModuleCase) -> None:
    """A batch of no samples gives an output of no samples, of the usual shape, and finite gradients."""
    module = build(case)
    output = call(module, case.inputs(generator(0), torch.float64, 0))
    shapes = [tuple(t.shape) for t in tensors_in(output)]
    usual = []
    for tensor in tensors_in(call(module, inputs_of(case))):
        shape = list(tensor.shape)
        if _batched(case, tensor):
            shape[case.batch_dim] = 0
        usual.append(tuple(shape))
    expect(shapes == usual, f"the shapes are {shapes}, not {usual}")
    if any(t.requires_grad for t in tensors_in(output)):
        shared.projection(output).backward()
    bad = [name for name, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    expect(not bad, f"the gradients of {', '.join(bad)} are not finite")


def check_compile(case: ModuleCase) -> None:
    """torch.compile takes the module as one graph, which gives the same output and gradients."""
    module = build(case)
    torch.compiler.reset()
    with plain_signatures():
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        for seed in (0, 1):
            results = []
            for forward in (module, compiled):
                given = with_gradients(inputs_of(case, seed=seed))
                module.zero_grad()
                output = call(forward, given)
                shared.projection(output).backward()
                gradients = [p.grad for p in module.parameters()] + [t.grad for t in tensors_in(given)]
                results.append([*tensors_in(output), *(g.clone() for g in gradients if g is not None)])
            error = error_between(results[1], results[0])
            expect(error < 1e-9, f"outputs and gradients differ by {error:.3g}")


def check_export(case: ModuleCase) -> None:
    """torch.export takes the module, and its program gives the same output on other values and fewer samples."""
    module, inputs = build(case), inputs_of(case)
    free = torch.export.ShapesCollection()
    for tensor in tensors_in(inputs):
        if _batched(case, tensor):
            free[tensor] = {case.batch_dim: torch.export.Dim.AUTO}
    with plain_signatures(), torch.no_grad():
        with seeded(0):
            program = torch.export.export(module, inputs, dynamic_shapes=free.dynamic_shapes(module, inputs)).module()
        for seed, batch in ((0, BATCH), (1, BATCH), (1, BATCH - 1)):
            inputs = case.inputs(generator(seed), torch.float64, batch)
            error = error_between(call(program, inputs), call(module, inputs))
            expect(error < 1e-9, f"the outputs of {batch} samples differ by {error:.3g}")


def check_autocast(case: ModuleCase) -> None:
    """Under torch.autocast a float32 module gives outputs near its usual ones, and finite gradients in float32."""
    module, inputs = build(case, torch.float32), inputs_of(case, torch.float32)
    expected = call(module, inputs)
    given = with_gradients(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output = call(module, given)
    error = error_between(output, expected)
    expect(
        error <= case.bfloat16_tolerance,
        f"the outputs differ by {error:.3g}, the case allows {case.bfloat16_tolerance}",
    )
    shared.expect_gradients(module, output, tensors_in(given), "under autocast")
    wrong = [name for name, p in module.named_parameters() if p.grad is not None and p.grad.dtype != p.dtype]
    expect(not wrong, f"the gradients of {', '.join(wrong)} have another dtype than they")


def check_symmetries(case: ModuleCase) -> None:
    """The declared symmetries hold."""
    module, inputs = build(case), inputs_of(case)
    for symmetry in case.symmetries:
        changed = symmetry.before(inputs)
        expect(not same(tensors_in(changed), tensors_in(inputs)), f"{symmetry.name}: before() changes no input")
        error = error_between(call(module, changed), symmetry.after(call(module, inputs)))
        expect(error <= symmetry.tolerance, f"{symmetry.name} is broken by {error:.3g}")


def check_causality(case: ModuleCase) -> None:
    """Along causal_dim outputs depend on no later input."""
    if case.causal_dim is None:
        return
    dim, module, inputs = case.causal_dim, build(case), inputs_of(case)
    length = next(t.shape[dim] for t in tensors_in(inputs) if t.dim() > dim)
    expect(length > 1, f"the case's inputs have the length {length} along dimension {dim}")
    noise = generator(3)

    def disturbed(tensor: Tensor, start: int) -> Tensor:
        if tensor.dim() <= dim or tensor.shape[dim] != length:
            return tensor
        changed = tensor.clone()
        tail = changed.narrow(dim, start, length - start)
        if tensor.is_floating_point():
            tail += torch.randn(tail.shape, generator=noise, dtype=tensor.dtype)
        else:
            tail.copy_(tail.flip(case.batch_dim))
        return changed

    expected = [t for t in tensors_in(call(module, inputs)) if t.dim() > dim and t.shape[dim] == length]
    expect(expected, f"no output has the length {length} along dimension {dim}")
    for start in range(1, length):
        later = mapped(inputs, partial(disturbed, start=start))
        found = [t for t in tensors_in(call(module, later)) if t.dim() > dim and t.shape[dim] == length]
        error = error_between([t.narrow(dim, 0, start) for t in found], [t.narrow(dim, 0, start) for t in expected])
        expect(error < 1e-9, f"inputs from position {start} on change earlier outputs by {error:.3g}")
        effect = error_between(found, expected)
        expect(effect > 0, f"inputs from position {start} on change nothing at all")


def check_meta(case: ModuleCase) -> None:
    """Under torch.device("meta") it is built without storage, and takes the state of a real one."""
    with torch.device("meta"):
        module = case.make()
    real = [name for name, t in module.state_dict().items() if t.device.type != "meta"]
    expect(not real, f"{', '.join(real)} are not on the meta device")
    module.load_state_dict(build(case).state_dict(), assign=True)


CHECKS: dict[str, Callable[[ModuleCase], None]] = {
    "gradients": check_gradients,
    "gradcheck": check_gradcheck,
    "float32": check_float32,
    "bfloat16": check_bfloat16,
    "dtype": check_dtype,
    "eval_deterministic": check_eval_deterministic,
    "training_equals_eval": check_training_equals_eval,
    "independent_samples": check_independent_samples,
    "empty_batch": check_empty_batch,
    "state_dict": shared.check_state_dict,
    "copies": shared.check_copies,
    "inputs_untouched": shared.check_inputs_untouched,
    "compile": check_compile,
    "export": check_export,
    "autocast": check_autocast,
    "symmetries": check_symmetries,
    "causality": check_causality,
    "forms": check_forms,
    "convexity": check_convexity,
    "lipschitz": check_lipschitz,
    "meta": check_meta,
    "device": shared.check_device,
}


def check_module(case_or_make: ModuleCase | Callable[..., nn.Module], **options: Any) -> None:
    """Hold a module to the contract of its kind.

    Args:
        case_or_make: A case, or what builds the module; then ``inputs`` comes with the options.
        **options: Fields of :class:`~provenn.contracts.ModuleCase`; ``part`` defaults to the factory's own name.

    Raises:
        ContractError: At least one check fails; the message lists all that do.
    """
    check_part(ModuleCase, case_or_make, options)
