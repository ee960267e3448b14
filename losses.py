"""The distillation loss of DistilHuBERT (arXiv:2110.01900), per prediction head.

Needs torch alone.
"""

import torch
import torch.nn.functional as F


def distillation_loss(predictions, targets, cosine_weight=1.0):
    """L1 plus weighted cosine loss, mean over heads, in float32.

    predictions[head], targets[head]: (batch, frames, dim of that head).
    Returns (loss, l1, cosine): the scalar loss, and both terms per head, (heads,), detached.
    """
    terms = [head_loss(p, t) for p, t in zip(predictions, targets, strict=True)]
    l1, cosine = (torch.stack(term) for term in zip(*terms))
    return (l1 + cosine_weight * cosine).mean(), l1.detach(), cosine.detach()


def head_loss(prediction, target):
    """The terms (L1, cosine) of one head, two scalars.

    L1: mean over frames and dims of |prediction - target|.
    cosine: mean over frames of -log sigmoid(cosine similarity); 0.31 for parallel vectors,
        0.69 for orthogonal and 1.31 for opposite ones.
    """
    prediction, target = prediction.float(), target.float()
    l1 = (prediction - target).abs().mean(-1)
    cosine = -F.logsigmoid(F.cosine_similarity(prediction, target, dim=-1))
    return l1.mean(), cosine.mean()
