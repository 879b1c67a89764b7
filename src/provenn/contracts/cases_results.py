"""Cases of what computes something whose truth can be checked afterwards: attacks, solvers, samplers, runtimes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from provenn.contracts.case import Case, Inputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def attack_with_method(attack: Any, model: nn.Module, inputs: Inputs, generator: torch.Generator) -> Any:
    """Call ``attack.attack(model, *inputs, generator=generator)``."""
    return attack.attack(model, *inputs, generator=generator)


def adversarial_of(result: Any) -> Any:
    """Return ``result.adversarial``."""
    return result.adversarial


def success_of(result: Any) -> Any:
    """Return ``result.success``."""
    return result.success


def skipped_of(result: Any) -> Any:
    """Return ``result.skipped``."""
    return result.skipped


def scores_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return ``model(inputs[0])``."""
    scores: Tensor = model(inputs[0])
    return scores


def is_misclassified(scores: Tensor, inputs: Inputs) -> Tensor:
    """Return for every sample whether its largest score is at another class than its label, ``inputs[1]``."""
    wrong: Tensor = scores.argmax(dim=-1) != inputs[1]
    return wrong


@dataclass(frozen=True)
class AttackCase(Case):
    """A case of an attack: model and inputs in, changed inputs out, with flags of success.

    Samples that the model gets wrong before the attack are skipped: returned as they are, flagged, no success.

    Args:
        make: Builds the attack.
        model: Builds a small model, with dropout or batch statistics, so that its mode matters.
        inputs: ``inputs(generator, dtype, batch)`` returns the arguments beside the model, for ``batch`` samples: the
            inputs to attack first, then the labels, then what else there is.
        budget: How far ``distance`` may go.
        distance: The norm of the change of every sample that is bounded by ``budget``: the largest change, the
            Euclidean length, the sum of magnitudes, or the number of changed entries; or
            ``distance(model, inputs, adversarial)``, which returns a number a sample.
        attack: ``attack(attack, model, inputs, generator)`` returns the result; default
            ``attack.attack(model, *inputs, generator=generator)``.
        scores: ``scores(model, inputs)`` returns the scores of the classes, a row a sample; default
            ``model(inputs[0])``.
        success: ``success(scores, inputs)`` returns for every sample whether the attack succeeded, given the scores
            of what it returned; default: misclassified.
        adversarial: Reads what the attack made from the result; default ``result.adversarial``.
        succeeded: Reads the flags of success; default ``result.success``.
        skipped: Reads the flags of skipped samples; default ``result.skipped``.
        box: The bounds of every entry of an input; ``None`` if it has none.
        batch: Samples in a batch.
        random: Whether another seed gives another result.
        random_reason: Why not.
        independent_samples: Whether a sample's result depends on no other sample in the batch. An attack that draws
            random numbers keeps this only with the noise off: a second case.
        independent_samples_reason: Why not.
        empty_batch: Whether a batch of no samples works.
        empty_batch_reason: Why not.
    """

    kind: ClassVar[str] = "attack"

    make: Callable[..., Any]
    model: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator, torch.dtype, int], Inputs]
    budget: float
    distance: Literal["linf", "l2", "l1", "l0"] | Callable[[nn.Module, Inputs, Tensor], Tensor] = "linf"
    attack: Callable[[Any, nn.Module, Inputs, torch.Generator], Any] = attack_with_method
    scores: Callable[[nn.Module, Inputs], Tensor] = scores_of
    success: Callable[[Tensor, Inputs], Tensor] = is_misclassified
    adversarial: Callable[[Any], Any] = adversarial_of
    succeeded: Callable[[Any], Any] = success_of
    skipped: Callable[[Any], Any] = skipped_of
    box: tuple[float, float] | None = (0.0, 1.0)
    batch: int = 6
    random: bool = True
    random_reason: str = ""
    independent_samples: bool = True
    independent_samples_reason: str = ""
    empty_batch: bool = True
    empty_batch_reason: str = ""


def solve_with_method(solver: Any, problem: Any) -> Any:
    """Call ``solver.solve(problem)``."""
    return solver.solve(problem)


def unknown_of(solution: Any) -> Any:
    """Return ``solution.x``."""
    return solution.x


def certificate_of(solution: Any) -> Any:
    """Return ``solution.certificate``."""
    return solution.certificate


def converged_of(solution: Any) -> bool:
    """Return ``solution.converged``."""
    return bool(solution.converged)


@dataclass(frozen=True)
class KnownProblem:
    """A problem whose answer is known.

    Args:
        name: What it is, such as ``"a zero right-hand side"``.
        problem: Builds the problem.
        answer: Returns the answer: a tensor, numbers, or words.
        tolerance: Largest error, absolute and relative to the answer.
    """

    name: str
    problem: Callable[[], Any]
    answer: Callable[[], Any]
    tolerance: float = 1e-6


@dataclass(frozen=True)
class RefusedProblem:
    """A problem that has no answer: infeasible, unbounded, singular, not positive definite.

    Args:
        name: What it is.
        problem: Builds the problem.
        words: What the error's message must say, such as ``"infeasible"``.
        error: The error that solving it must raise.
    """

    name: str
    problem: Callable[[], Any]
    words: str
    error: type[Exception] = ValueError


@dataclass(frozen=True)
class SolverCase(Case):
    """A case of a solver: problem in, solution with a certificate out.

    Args:
        make: ``make(**overrides)`` builds the solver.
        known: Problems with known answers, degenerate ones that have an answer among them.
        refused: Problems that must be refused by name.
        certificate: ``certificate(problem, solution)`` computes fields of the certificate anew, by other means, from
            the problem and the answer alone.
        early_stop: Overrides with which the solver stops before it has solved the first known problem.
        tolerance: Largest relative error of the certificate.
        solve: ``solve(solver, problem)``; default ``solver.solve(problem)``.
        answer: Reads the answer; default ``solution.x``.
        read_certificate: Reads the certificate; default ``solution.certificate``.
        converged: Reads whether the problem counts as solved; default ``solution.converged``.
        deterministic: Whether the same problem gives the same solution bit by bit, whatever torch's global seed.
        deterministic_reason: Why not.
    """

    kind: ClassVar[str] = "solver"

    make: Callable[..., Any]
    known: tuple[KnownProblem, ...]
    refused: tuple[RefusedProblem, ...]
    certificate: Callable[[Any, Any], Mapping[str, Any]]
    early_stop: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-6
    solve: Callable[[Any, Any], Any] = solve_with_method
    answer: Callable[[Any], Any] = unknown_of
    read_certificate: Callable[[Any], Any] = certificate_of
    converged: Callable[[Any], bool] = converged_of
    deterministic: bool = True
    deterministic_reason: str = ""


def sample_with_method(sampler: Any, count: int, generator: torch.Generator | None) -> Any:
    """Call ``sampler.sample(count, generator=generator)``."""
    return sampler.sample(count, generator=generator)


@dataclass(frozen=True)
class Expectation:
    """A known expectation under the law that is sampled.

    Args:
        name: What it is, such as ``"second moments"``.
        of: ``of(samples)`` maps samples to numbers (samples, components).
        value: ``value()`` returns their expectation (components).
        bias: How far the sampler's own law may be off, by its discretisation say.
    """

    name: str
    of: Callable[[Tensor], Tensor]
    value: Callable[[], Tensor]
    bias: float = 0.0


@dataclass(frozen=True)
class SamplerCase(Case):
    """A case of a sampler: ``sample(n, generator=...)`` draws n samples.

    Args:
        make: Builds the sampler of a law whose moments are known.
        shape: The shape of one sample.
        expectations: What is known of the law, mean and second moments at least. Right samplers fail with a
            probability of one in a million.
        sample: ``sample(sampler, n, generator)``; default ``sampler.sample(n, generator=generator)``.
        calls: Calls that the expectations are estimated from.
        count: Samples of each of them.
        independent: Whether the samples of one call are independent of one another.
        independent_reason: Why not.
        default_generator: Whether without a generator it draws from torch's global one.
        default_generator_reason: Why not.
    """

    kind: ClassVar[str] = "sampler"

    make: Callable[..., Any]
    shape: tuple[int, ...]
    expectations: tuple[Expectation, ...]
    sample: Callable[[Any, int, torch.Generator | None], Any] = sample_with_method
    calls: int = 32
    count: int = 256
    independent: bool = True
    independent_reason: str = ""
    default_generator: bool = True
    default_generator_reason: str = ""


def step_by_autograd(model: Any, inputs: Inputs) -> tuple[Any, Mapping[str, Tensor]]:
    """Call the model, go backward from a fixed projection of its output, and return output and gradients."""
    from provenn.contracts._modules import projection  # cases load no torch

    model.zero_grad(set_to_none=True)
    output = model(*inputs)
    projection(output).backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


def close_with_method(runtime: Any) -> None:
    """Call ``runtime.close()``."""
    runtime.close()


@dataclass(frozen=True)
class RuntimeCase(Case):
    """A case of a runtime: the same numbers as plain execution, and no harm done when a part of it fails.

    Args:
        make: ``make(module)`` builds the runtime over a plain module.
        plain: Builds the plain module: what it computes is what the runtime must compute.
        inputs: ``inputs(generator)`` returns the arguments of one call.
        step: ``step(runtime, inputs)`` returns the output of one step, and the gradients by the names of the plain
            module's parameters (none: an empty dict). Default: call, then backward by autograd from a fixed projection
            of the output; a runtime that autograd does not reach brings its own loss, here and in ``plain_step``.
        plain_step: ``plain_step(module, inputs)`` returns the same of the plain module.
        tolerance: Largest error of outputs and gradients, relative to ``max(1, largest magnitude)``.
        backward: Whether it computes gradients.
        backward_reason: Why not.
        close: ``close(runtime)`` ends it and may be called twice; default ``runtime.close()``.
        workers: ``workers(runtime)`` returns the process ids of the workers by the names that errors use.
        faulty: ``faulty(stage)`` builds the runtime with a module of the suite's as what one of its workers runs, with
            inputs as ``inputs`` gives them. The runtime gives up on it after ``timeout``.
        timeout: Seconds after which the runtime that ``faulty`` builds gives up.

    A runtime without workers excludes ``worker_killed``; one that runs no modules of the user's in them excludes
    ``stage_raises`` and ``stage_hangs`` too.
    """

    kind: ClassVar[str] = "runtime"

    make: Callable[[nn.Module], Any]
    plain: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Inputs]
    step: Callable[[Any, Inputs], tuple[Any, Mapping[str, Tensor]]] = step_by_autograd
    plain_step: Callable[[Any, Inputs], tuple[Any, Mapping[str, Tensor]]] = step_by_autograd
    tolerance: float = 1e-6
    backward: bool = True
    backward_reason: str = ""
    close: Callable[[Any], None] = close_with_method
    workers: Callable[[Any], Mapping[str, int]] | None = None
    faulty: Callable[[nn.Module], Any] | None = None
    timeout: float = 5.0
