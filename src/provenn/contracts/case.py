"""Cases: what a test says of a part so that a suite can hold the part to its kind's contract.

A case is data and factories, one frozen dataclass a kind. The factories must not seed any random number generator:
the suites do, and they watch who else does. Where a check cannot apply to a legitimate part, the case says so with
a reason in words (``excluded={"check": "reason"}``), which is shown wherever the result is shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

Inputs = tuple[Any, ...]
"""Positional arguments of one call."""


@dataclass(frozen=True)
class BadInput:
    """A call that must be refused.

    Args:
        argument: The argument's name; the error's message must contain it as a word.
        call: Makes the call.
        error: The error that the call must raise; ``ValueError`` or ``TypeError``.
    """

    argument: str
    call: Callable[[], object]
    error: type[Exception] = ValueError


@dataclass(frozen=True)
class Case:
    """Base of every case.

    Args:
        part: The part's public dotted name, such as ``"provenn.optim.DiffGrad"``.
        bad_input: Calls that must be refused; at least one, or a reason.
        bad_input_reason: Why no input can be bad.
        excluded: Checks that do not apply to this part: name to reason.
        label: Tells cases of the same part apart.

    Raises:
        ValueError: ``part`` has no dot, or an option is declared away without its reason.
    """

    kind: ClassVar[str] = ""

    part: str
    bad_input: tuple[BadInput, ...] = field(default=(), kw_only=True)
    bad_input_reason: str = field(default="", kw_only=True)
    excluded: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    label: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if "." not in self.part:
            raise ValueError(f"part must be a dotted public name, got {self.part!r}")
        for name, reason in self.excluded.items():
            if not reason.strip():
                raise ValueError(f"excluded: {self.part} excludes the check {name!r} without a reason")
        for option in dataclasses.fields(self):
            reason_name = f"{option.name}_reason"
            if getattr(self, option.name) is False and not getattr(self, reason_name, "not asked for").strip():
                raise ValueError(f"{reason_name}: {self.part} declares {option.name}=False without a reason")

    @property
    def name(self) -> str:
        """The part's name, with the label if the case has one."""
        return f"{self.part}[{self.label}]" if self.label else self.part

    @property
    def declared_away(self) -> dict[str, str]:
        """Checks that this case switches off, with the reasons: ``excluded``, and options that are ``False``.

        An option such as ``compile=False`` switches off the check of the same name.
        """
        options = {
            option.name: getattr(self, f"{option.name}_reason")
            for option in dataclasses.fields(self)
            if getattr(self, option.name) is False and hasattr(self, f"{option.name}_reason")
        }
        return {**options, **self.excluded}


@dataclass(frozen=True)
class OptimizerCase(Case):
    """A case of a :class:`torch.optim.Optimizer`.

    Args:
        make: ``make(params, **overrides)`` builds the optimizer over parameters or groups of them.
        sparse: Whether sparse gradients work, or raise an error that says "sparse".
        foreach: Whether ``foreach`` is an argument.
        closure: Whether ``step`` works without a closure. A closure that the suite passes evaluates the loss, and
            also the gradients where gradients are enabled when it is called.
        step_size: The option of a parameter group that scales the step.
        quadratic: Overrides for the convex quadratic (condition number 10).
        quadratic_steps: Steps after which the quadratic must be down to 1 % of its first value.
        rosenbrock: Overrides for Rosenbrock's function from (-1.2, 1).
        rosenbrock_steps: Steps after which Rosenbrock's function must be down from 24.2 to 4.84.
        warmup_steps: Steps after which the state no longer grows (a window of past gradients, say, is full).
    """

    kind: ClassVar[str] = "optimizer"

    make: Callable[..., torch.optim.Optimizer]
    sparse: Literal["supported", "raises"] = "raises"
    foreach: bool = False
    closure: Literal["optional", "required"] = "optional"
    step_size: str = "lr"
    quadratic: Mapping[str, Any] = field(default_factory=dict)
    quadratic_steps: int = 200
    rosenbrock: Mapping[str, Any] = field(default_factory=dict)
    rosenbrock_steps: int = 1000
    warmup_steps: int = 5


@dataclass(frozen=True)
class Minimum:
    """Where a loss is smallest.

    Args:
        inputs: Returns the call's arguments at a minimum, in float64.
        value: The loss there.
        tolerance: Largest absolute error of ``value``.
    """

    inputs: Callable[[], Inputs]
    value: float
    tolerance: float = 1e-6


@dataclass(frozen=True)
class LossCase(Case):
    """A case of a loss: an ``nn.Module`` whose call returns a scalar.

    Args:
        make: ``make(**overrides)`` builds the loss.
        inputs: ``inputs(generator, dtype)`` returns the call's arguments for a small batch, the first of them a
            floating-point tensor of that dtype that the loss is differentiated by.
        minimum: Where the loss is smallest, if it is known.
        extremes: Each returns the arguments of a call at which value and gradient must stay finite: ±1e4, ties, one
            class, one sample. At least one, or ``excluded={"extremes": "reason"}``.
        reductions: Whether ``reduction`` is ``"none"``, ``"mean"`` or ``"sum"``; ``False`` for losses of a whole set.
        reductions_reason: Why not.
        float32_tolerance: Largest error of float32 against float64, relative to ``max(1, |value|)``.
    """

    kind: ClassVar[str] = "loss"

    make: Callable[..., nn.Module]
    inputs: Callable[[torch.Generator, torch.dtype], Inputs]
    minimum: Minimum | None = None
    extremes: tuple[Callable[[], Inputs], ...] = ()
    reductions: bool = True
    reductions_reason: str = ""
    float32_tolerance: float = 1e-5


@dataclass(frozen=True)
class Symmetry:
    """A promise ``module(*before(inputs)) == after(module(*inputs))``, checked in float64 and eval mode.

    Args:
        name: What the symmetry is, such as ``"permutation of the nodes"``.
        before: Maps the tuple of inputs to the transformed tuple.
        after: Maps the output to the transformed output.
        tolerance: Largest error, relative to ``max(1, largest magnitude of the output)``.
    """

    name: str
    before: Callable[[Inputs], Inputs]
    after: Callable[[Any], Any]
    tolerance: float = 1e-9


@dataclass(frozen=True)
class Form:
    """Another way to the module's output, which must agree to 1e-10 in float64 and 1e-5 in float32.

    Args:
        name: What it is, such as ``"recurrent"``.
        evaluate: ``evaluate(module, inputs)`` returns the output computed that way.
        float64_tolerance: Largest error, relative to ``max(1, largest magnitude of the output)``.
        float32_tolerance: Likewise.
    """

    name: str
    evaluate: Callable[[nn.Module, Inputs], Any]
    float64_tolerance: float = 1e-10
    float32_tolerance: float = 1e-5


@dataclass(frozen=True)
class ModuleCase(Case):
    """A case of a ``torch.nn.Module``.

    Args:
        make: ``make(**overrides)`` builds a small module.
        inputs: ``inputs(generator, dtype, batch)`` returns the arguments of ``forward`` for ``batch`` samples;
            floating-point tensors are of that dtype.
        float32_tolerance: Largest error of float32 against float64, relative to ``max(1, largest magnitude)``.
        bfloat16_tolerance: Likewise of bfloat16.
        batch_dim: The dimension of the samples, in inputs and outputs. A tensor whose size there is not ``batch`` is
            shared by all samples.
        independent_samples: Whether in eval mode a sample's output depends on no other sample.
        independent_samples_reason: Why not.
        training_equals_eval: Whether the output is the same in training mode; ``False`` with dropout or batch
            statistics.
        training_equals_eval_reason: Why not.
        symmetries: The symmetries that the module promises.
        causal_dim: The dimension along which an output depends on no later input; ``None`` if nothing is promised.
        forms: Other ways to compute the output: step by step, by convolution, ...
        convex: Whether every element of the output is a convex function of the inputs.
        lipschitz: ``lipschitz(module, inputs)`` returns a bound of the change of the output by that of the inputs, both
            in the Euclidean norm of all their elements; ``None`` if nothing is promised.
        compile: Whether ``torch.compile(fullgraph=True)`` works.
        compile_reason: Why not.
        export: Whether ``torch.export`` works, with any number of samples.
        export_reason: Why not.
        autocast: Whether the module works under ``torch.autocast``, to ``bfloat16_tolerance``.
        autocast_reason: Why not.
        empty_batch: Whether a batch of no samples works.
        empty_batch_reason: Why not.
    """

    kind: ClassVar[str] = "module"

    make: Callable[..., nn.Module]
    inputs: Callable[[torch.Generator, torch.dtype, int], Inputs]
    float32_tolerance: float = 1e-4
    bfloat16_tolerance: float = 5e-2
    batch_dim: int = 0
    independent_samples: bool = True
    independent_samples_reason: str = ""
    training_equals_eval: bool = True
    training_equals_eval_reason: str = ""
    symmetries: tuple[Symmetry, ...] = ()
    causal_dim: int | None = None
    forms: tuple[Form, ...] = ()
    convex: bool = False
    lipschitz: Callable[[nn.Module, Inputs], float] | None = None
    compile: bool = True
    compile_reason: str = ""
    export: bool = True
    export_reason: str = ""
    autocast: bool = True
    autocast_reason: str = ""
    empty_batch: bool = True
    empty_batch_reason: str = ""


def compress_with_method(compressor: Any, model: nn.Module) -> tuple[nn.Module, Any]:
    """Call ``compressor.compress(model)``, which returns the model and its report."""
    smaller, report = compressor.compress(model)
    return smaller, report


@dataclass(frozen=True)
class CompressorCase(Case):
    """A case of a compressor: model and budget in, smaller plain model and report out.

    Args:
        make: Builds the compressor with its budget.
        model: Builds a small model; of torch's own modules only, so that the output can be loaded without the tests.
        example_inputs: ``example_inputs(generator)`` returns the arguments of one call of the model.
        budget: The largest share of the original that may be left: any of ``"params"``, ``"nonzero"``, ``"macs"``
            and ``"bytes"`` to a number in (0, 1].
        compress: ``compress(compressor, model)`` returns the smaller model and the report;
            default ``compressor.compress(model)``.
        counts: How to read a count from the report, by measure; default the attribute of that name. ``"params"``
            counts the elements of all parameters, ``"nonzero"`` those that are not zero, ``"macs"`` the
            multiply-accumulates of one call on the example inputs, ``"bytes"`` the storage of parameters and buffers.
        plain_output: Whether the output consists of torch's own modules and loads without provenn.
        plain_output_reason: Why not.
        export: Whether the output goes through ``torch.export``.
        export_reason: Why not.
    """

    kind: ClassVar[str] = "compressor"

    make: Callable[..., Any]
    model: Callable[[], nn.Module]
    example_inputs: Callable[[torch.Generator], Inputs]
    budget: Mapping[str, float]
    compress: Callable[[Any, nn.Module], tuple[nn.Module, Any]] = compress_with_method
    counts: Mapping[str, Callable[[Any], float]] = field(default_factory=dict)
    plain_output: bool = True
    plain_output_reason: str = ""
    export: bool = True
    export_reason: str = ""


@dataclass(frozen=True)
class ProbeCase(Case):
    """A case of a probe: model and data in, frozen report out.

    Args:
        run: ``run(model, data)`` runs the probe and returns its report.
        model: Builds a small model. A probe of data alone builds any model, leaves it alone, and excludes
            ``model_restored_after_error``.
        data: ``data(generator)`` returns what the probe looks at.
        brute_force: ``brute_force(model, data)`` returns fields of the report computed another way.
        tolerance: Largest relative error between the two.
        plot: Whether the report has a plot.
        plot_reason: Why not.
    """

    kind: ClassVar[str] = "probe"

    run: Callable[[nn.Module, Any], Any]
    model: Callable[[], nn.Module]
    data: Callable[[torch.Generator], Any]
    brute_force: Callable[[nn.Module, Any], Mapping[str, Any]]
    tolerance: float = 1e-6
    plot: bool = True
    plot_reason: str = ""


@dataclass(frozen=True)
class EstimatorCase(Case):
    """A case of a scikit-learn estimator.

    Args:
        make: ``make(**overrides)`` builds the estimator, small enough to be fitted a hundred times.

    ``excluded`` also takes the names of scikit-learn's own checks (``check_...``): those are run, and must fail.
    """

    kind: ClassVar[str] = "estimator"

    make: Callable[..., Any]


@dataclass(frozen=True)
class FunctionCase(Case):
    """A case of a plain function or class, or of a part whose kind has no suite: the common checks alone.

    Args:
        call: Uses the part once, as its users would, and returns what it returns.
    """

    kind: ClassVar[str] = "function"

    call: Callable[[], object]
