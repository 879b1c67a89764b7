"""The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles.

Hussain, Zaki, Subramanian, KDD 2023. https://arxiv.org/abs/2306.01705

Stochastically subsampled attention (SSA): in every training step and layer each query sees only N/s of the N sources,
drawn at random, which makes attention s times cheaper and regularises; afterwards attention is dense, or the
predictions of several sampled sub-models are averaged.

The rooms: ``_subsets`` (which sources a window of queries sees), ``_layer`` (attention), ``_convert`` (models of
torch's), ``_training``, ``_ensemble`` (sub-models together, and their probe); each with the prefix
``_stochastic_subsampled_attention``.
"""

from provenn.nn._stochastic_subsampled_attention_convert import convert_to_ssa
from provenn.nn._stochastic_subsampled_attention_ensemble import PathwayReport, SubEnsemble, pathway_probe
from provenn.nn._stochastic_subsampled_attention_layer import SubsampledAttention
from provenn.nn._stochastic_subsampled_attention_training import SubsampledTraining

__all__ = [
    "PathwayReport",
    "SubEnsemble",
    "SubsampledAttention",
    "SubsampledTraining",
    "convert_to_ssa",
    "pathway_probe",
]
