"""A small network that learns faces of 28 people, judged by telling apart 12 others."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from provenn.claims.losses._sface_faces import EMBEDDING, Faces, augmented, load_faces, network
from provenn.compare.loss_task import Learning, LossTask
from provenn.compare.task import LogUniform
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import minibatches
from provenn.losses import mirror_embedding, verification_report

KNOWN, HELD_BACK, UNSEEN = 28, 6, 12
BATCH, FAR = 28, 1e-2


def learnings(seed: int, device: str, tuning: bool, data: str = "orl_faces") -> list[Learning]:
    """Return the network; the seed decides the people, the weights and the order."""
    faces = load_faces(data, KNOWN + UNSEEN, device)
    people = torch.randperm(KNOWN + UNSEEN, generator=generator(seed, "people")).to(device)
    known, unseen = people[:KNOWN], people[KNOWN:]
    if tuning:
        known, unseen = known[:-HELD_BACK], known[-HELD_BACK:]
    with seeded(seed, "weights"):
        model = network().to(device)
    offers = {"in_features": EMBEDDING, "num_classes": len(known)}
    score = partial(_true_accept_rate, faces=faces.of(unseen))
    return [Learning(model, partial(_batches, faces.of(known), seed), score, offers)]


def _batches(faces: Faces, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    draws = generator(seed, "augmentation", epoch)
    order = generator(seed, "order", epoch)
    for images, people in minibatches((faces.images, faces.people), BATCH, order):
        yield augmented(images, draws), people


def _true_accept_rate(model: nn.Module, faces: Faces) -> float:
    return verification_report(mirror_embedding(model, faces.images), faces.people, fars=(FAR,)).tar(FAR)


class LinearSoftmax(nn.Module):
    """Cross-entropy of a linear classifier on the embeddings.

    Args:
        in_features: Size of an embedding.
        num_classes: Number of people.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(in_features, num_classes)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of embeddings and people."""
        return nn.functional.cross_entropy(self.classifier(embeddings), labels)


TASK = LossTask(
    name="small-face-verification",
    summary="four convolutions on 28 people of ORL faces, 40 epochs of batch 28 by Adam; verified on 12 unseen people",
    kinds={"losses": {"lr": LogUniform(1e-4, 1e-1)}},
    learnings=learnings,
    epochs=40,
    metric="true accept rate at false accept rate 1e-2",
    references={"softmax": LinearSoftmax},
    asks=("in_features", "num_classes"),
)
