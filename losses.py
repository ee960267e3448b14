"""The distillation loss of DistilHuBERT (arXiv:2110.01900), one term a prediction head.

Works alone, with nothing but torch.
"""

import torch
import torch.nn.functional as F


def distillation_loss(predictions, targets, valid=None, cosine_weight=1.0):
    """L1 plus weighted cosine loss, mean over heads, in float32 whatever the inputs are.

    predictions[head], targets[head]: (batch, frames, dim of that head).
    valid: (batch, frames) bool, True for the frames that count; None: all do.
    Returns (loss, l1, cosine): a scalar to differentiate, and both terms of every head, (heads,) each, with
        loss = mean over heads of l1 + cosine_weight * cosine.
    """
    terms = [head_loss(p, t, valid) for p, t in zip(predictions, targets, strict=True)]
    l1, cosine = (torch.stack(term) for term in zip(*terms))
    return (l1 + cosine_weight * cosine).mean(), l1.detach(), cosine.detach()


def head_loss(prediction, target, valid=None):
    """The two terms of one head, each a scalar: (L1, cosine).

    L1: mean over frames and dims of |prediction - target|.
    cosine: mean over frames of -log sigmoid(cosine similarity): 0.31 where they point the same way, 0.69 at right
        angles, 1.31 where they are opposite.
    Without a single valid frame both are 0.
    """
    prediction, target = prediction.float(), target.float()
    if valid is not None:  # filled, not indexed: how many frames that leaves a GPU would have to tell the host
        outside = ~valid[:, :, None]
        prediction, target = prediction.masked_fill(outside, 0), target.masked_fill(outside, 0)
    l1 = (prediction - target).abs().mean(-1)
    cosine = -F.logsigmoid(F.cosine_similarity(prediction, target, dim=-1))
    if valid is None:
        return l1.mean(), cosine.mean()
    count = valid.sum().clamp(min=1)
    return l1.sum() / count, cosine.masked_fill(~valid, 0).sum() / count
