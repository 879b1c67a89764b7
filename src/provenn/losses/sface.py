"""SFace: Sigmoid-Constrained Hypersphere Loss for Robust Face Recognition.

Zhong, Deng, Hu, Zhao, Li, Wen, IEEE TIP 2021. https://arxiv.org/abs/2205.12010

With θ_j the angle between an embedding and the centre of class j, y its own class, and brackets without a gradient:

    L = −[r_intra(θ_y)] cos θ_y + Σ_{j≠y} [r_inter(θ_j)] cos θ_j
    r_intra(θ) = s / (1 + e^{−k(θ − a)}),  r_inter(θ) = s / (1 + e^{k(θ − b)})

The rooms: ``_sface_heads`` (what all heads share), ``_sface_rescale`` (this loss, and other curves in its place),
``_sface_margins`` (the softmax heads it is compared with), ``_sface_curves`` (any head as a re-scaler of gradients),
``_sface_trainer`` and ``_sface_backbone`` (the training recipe), ``_sface_verification`` (how embeddings are judged),
``_sface_noise`` (wrong labels and bad images).
"""

from provenn.losses._sface_backbone import embedding_layer, improved_resnet, scale_pixels
from provenn.losses._sface_curves import gradient_curves
from provenn.losses._sface_margins import ArcFaceLoss, CosFaceLoss, NormFaceLoss, SphereFaceLoss
from provenn.losses._sface_noise import blur_images, class_outliers, flip_labels, occlude_images
from provenn.losses._sface_rescale import (
    ConstantRescale,
    LinearRescale,
    PiecewiseRescale,
    RescaledLoss,
    SFaceLoss,
    SigmoidRescale,
)
from provenn.losses._sface_trainer import FaceTrainer, random_mirror
from provenn.losses._sface_verification import (
    identification_rate,
    mirror_embedding,
    pair_report,
    verification_report,
)

__all__ = [
    "ArcFaceLoss",
    "ConstantRescale",
    "CosFaceLoss",
    "FaceTrainer",
    "LinearRescale",
    "NormFaceLoss",
    "PiecewiseRescale",
    "RescaledLoss",
    "SFaceLoss",
    "SigmoidRescale",
    "SphereFaceLoss",
    "blur_images",
    "class_outliers",
    "embedding_layer",
    "flip_labels",
    "gradient_curves",
    "identification_rate",
    "improved_resnet",
    "mirror_embedding",
    "occlude_images",
    "pair_report",
    "random_mirror",
    "scale_pixels",
    "verification_report",
]
