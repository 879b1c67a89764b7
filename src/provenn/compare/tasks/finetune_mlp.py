"""A pretrained perceptron fine-tuned on rotated MNIST: zeroth-order against first-order methods, at equal cost."""

from collections.abc import Callable

from torch import Tensor, nn

from provenn.claims.optim._rotated_digits import SMALL, SMOKE, FineTuning, cross_entropy, fine_tuning
from provenn.compare.counted_task import CountedTask, LossProblem
from provenn.compare.task import LogUniform
from provenn.core.experiment.training import accuracy

__all__ = ["SIZES", "SMOKE", "TASK", "problem"]

SIZES = SMALL
BATCH = 32


def problem(seed: int, device: str, tuning: bool) -> LossProblem:
    """Return the network as pretraining left it, and batches of rotated images."""
    task = fine_tuning(SIZES, seed, device)
    held = task.validation if tuning else task.test

    def measure(model: nn.Module) -> float:
        return accuracy(model, *held)

    return LossProblem(task.model(), cross_entropy, _stream(task, seed), measure)


def _stream(task: FineTuning, seed: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Return a function of the step that keeps the step's batch for as long as the step lasts."""
    batches, drawn = task.batches(seed, BATCH), list[tuple[Tensor, ...]]()
    count = 0

    def batch(step: int) -> tuple[Tensor, ...]:
        nonlocal count
        while count <= step:
            drawn[:] = [next(batches)]
            count += 1
        return drawn[0]

    return batch


TASK = CountedTask(
    name="finetune-mlp",
    summary=(
        "perceptron 784–128–128–10, pretrained on 10 000 upright MNIST images, on 512 turned by 25°, batch 32, the "
        "cost of 1000 gradients"
    ),
    kinds={"optim": {"lr": LogUniform(1e-5, 1.0)}},
    problem=problem,
    evaluations=1000,
    metric="accuracy",
    maximize=True,
)
