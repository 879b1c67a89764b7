"""A Critical Review of Recurrent Neural Networks for Sequence Learning.

Lipton, Berkowitz, Elkan, 2015. https://arxiv.org/abs/1506.00019

The networks, the ways to train them and the measures that the survey goes through, under one interface: inputs
(batch, time, features) and a mask in, outputs and the state after the last step out, or one step at a time:

    outputs, state = cell(x, state, mask)
    output, state = cell.step(x_t, state)

The rooms: ``_rnn_review_base`` (the interface and its loop over time), ``_rnn_review_simple`` (Elman, Jordan),
``_rnn_review_gated`` (LSTM, GRU), ``_rnn_review_bidirectional``, ``_rnn_review_ntm`` (neural Turing machine),
``_rnn_review_sequence`` (what goes in and comes out), ``_rnn_review_training`` (back-propagation through time),
``_rnn_review_gradients`` (real-time recurrent learning, gradient penalty), ``_rnn_review_flow`` (a probe),
``_rnn_review_tasks``, ``_rnn_review_bleu``.
"""

from provenn.nn._rnn_review_bidirectional import BiRNN
from provenn.nn._rnn_review_bleu import bleu
from provenn.nn._rnn_review_flow import GradientFlow, gradient_flow
from provenn.nn._rnn_review_gated import GRU, PeepholeLSTM
from provenn.nn._rnn_review_gradients import gradient_norm_penalty, rtrl_gradient
from provenn.nn._rnn_review_ntm import NTMCell
from provenn.nn._rnn_review_sequence import SequenceModel
from provenn.nn._rnn_review_simple import ElmanRNN, JordanRNN
from provenn.nn._rnn_review_tasks import SequenceTask, adding, copy, delayed_xor, embedded_reber, temporal_order
from provenn.nn._rnn_review_training import TBPTT, TBPTTResult

__all__ = [
    "GRU",
    "TBPTT",
    "BiRNN",
    "ElmanRNN",
    "GradientFlow",
    "JordanRNN",
    "NTMCell",
    "PeepholeLSTM",
    "SequenceModel",
    "SequenceTask",
    "TBPTTResult",
    "adding",
    "bleu",
    "copy",
    "delayed_xor",
    "embedded_reber",
    "gradient_flow",
    "gradient_norm_penalty",
    "rtrl_gradient",
    "temporal_order",
]
