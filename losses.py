"""The distillation loss of DistilHuBERT (arXiv:2110.01900), per prediction head.

Needs torch alone.
"""

import torch
import torch.nn.functional as F


def distillation_loss(predictions, targets, valid=None, cosine_weight=1.0):
    """L1 plus weighted cosine loss, mean over heads, in float32.

    predictions[head], targets[head]: (batch, frames, dim of that head).
    valid: (batch, frames) bool, False for frames that do not count, or None if all count.
    Returns (loss, l1, cosine): the scalar loss, and both terms per head, (heads,), detached.
    """
    terms = [head_loss(p, t, valid) for p, t in zip(predictions, targets, strict=True)]
    l1, cosine = (torch.stack(term) for term in zip(*terms))
    return (l1 + cosine_weight * cosine).mean(), l1.detach(), cosine.detach()


def head_loss(prediction, target, valid=None):
    """The terms (L1, cosine) of one head, two scalars; 0 without a valid frame.

    L1: mean over frames and dims of |prediction - target|.
    cosine: mean over frames of -log sigmoid(cosine similarity); 0.31 for parallel vectors,
        0.69 for orthogonal and 1.31 for opposite ones.
    """
    prediction, target = prediction.float(), target.float()
    if valid is not None:  # masked_fill, since boolean indexing would force a GPU sync
        prediction = prediction.masked_fill(~valid[..., None], 0)
        target = target.masked_fill(~valid[..., None], 0)
    l1 = (prediction - target).abs().mean(-1)
    cosine = -F.logsigmoid(F.cosine_similarity(prediction, target, dim=-1))
    if valid is None:
        return l1.mean(), cosine.mean()
    frames = valid.sum().clamp(min=1)
    return l1.sum() / frames, cosine.masked_fill(~valid, 0).sum() / frames
