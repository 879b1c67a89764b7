"""SuSana Distancia is all you need: class separability in metric learning by two distance-based losses.

2023. https://arxiv.org/abs/2305.09062

Two losses on the embeddings of a few-shot episode: a triplet loss of queries and class prototypes, and −log of the ICNN
score, which rates by nearest neighbours how compact classes are and how far apart:

    ℓ(q) = max(0, d(q, c_y) − min_{k≠y} d(q, c_k) + m),      ℓ = −log ½((λ_same + λ_diff)/2 + γ)
"""

from provenn.losses._susana_losses_episodes import Episode, EpisodeLoss, EpisodeSampler
from provenn.losses._susana_losses_icnn import ICNNLoss, icnn_score
from provenn.losses._susana_losses_trainer import EpisodeAccuracy, ProtoNetTrainer, ProtoNetTraining, conv4
from provenn.losses._susana_losses_triplet import ProtoTripletLoss

__all__ = [
    "Episode",
    "EpisodeAccuracy",
    "EpisodeLoss",
    "EpisodeSampler",
    "ICNNLoss",
    "ProtoNetTrainer",
    "ProtoNetTraining",
    "ProtoTripletLoss",
    "conv4",
    "icnn_score",
]
