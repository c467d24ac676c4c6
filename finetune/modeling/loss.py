"""Cross-entropy summed over the supervised tokens of a batch, computed in chunks.

The output layer is 21% of a small model's arithmetic and most of its memory. Only supervised positions go through it,
and each chunk's gradient is taken at once, so at most one chunk of logits exists.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import JobError
from finetune.data.batches import Batch
from finetune.modeling import matmul

CHUNK = 128  # supervised positions at a time: 25 MB of float32 logits at a vocabulary of 49,152


class Scorer(nn.Module):
    """A causal language model that returns the summed loss of a batch instead of logits."""

    def __init__(self, model: Any, *, in_bfloat16: bool = False) -> None:
        """Raises JobError unless the logits are one linear layer over the last hidden state."""
        super().__init__()
        self.model = model
        self.in_bfloat16 = in_bfloat16
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear:
            kind = type(model).__name__
            raise JobError("training.why_untrainable", f"{kind} has no linear output layer", model=kind)
        self._check_head()

    def forward(self, batch: Batch) -> Tensor:
        """Sum of -log p over the supervised tokens, in float32. The mean is this divided by `batch.supervised`."""
        # (B, T-1, D); position t predicts token t + 1
        hidden = self._hidden(batch.ids, batch.attention, batch.positions)[:, :-1]
        chosen = batch.taught[:, 1:]
        head = self.model.get_output_embeddings()
        with self._autocast():
            total: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]  # torch types no apply
                hidden[chosen], batch.ids[:, 1:][chosen], head.weight, head.bias
            )
        return total

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> Tensor:
        """-log p of each supervised token (N,), in float32, row by row."""
        hidden = self._hidden(batch.ids, batch.attention, batch.positions)[:, :-1]
        chosen = batch.taught[:, 1:]
        hidden, targets = hidden[chosen], batch.ids[:, 1:][chosen]
        head = self.model.get_output_embeddings()
        with self._autocast():
            parts = [
                nn.functional.cross_entropy(
                    matmul.forward(hidden[part], head.weight, head.bias).float(), targets[part], reduction="none"
                )
                for part in _chunks(len(hidden))
            ]
        return torch.cat(parts)

    def _hidden(self, ids: Tensor, attention: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        backbone = getattr(self.model, self.model.base_model_prefix)
        with self._autocast():
            out = backbone(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _autocast(self) -> torch.autocast:
        """bfloat16 products for master weights in float32 (`in_bfloat16`)."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.in_bfloat16)

    @torch.no_grad()
    def _check_head(self) -> None:
        """Refuse models that scale or cap their logits after the output layer."""
        ids = torch.arange(4, device=self.model.device)[None] % self.model.config.get_text_config().vocab_size
        was_training = self.model.training
        self.model.eval()
        ours = self.model.get_output_embeddings()(self._hidden(ids))
        theirs = self.model(input_ids=ids, use_cache=False).logits
        self.model.train(was_training)
        if not torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3):
            kind = type(self.model).__name__
            detail = f"{kind} scales or caps its logits, which cannot be trained yet"
            raise JobError("training.why_untrainable", detail, model=kind)


class _HeadLoss(torch.autograd.Function):
    """hidden (N, D), targets (N,), weight (V, D), bias (V,) or None -> the summed cross-entropy, in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wanted = ctx.needs_input_grad
        grads = [
            None if given is None or not wanted[at] else torch.zeros_like(given)
            for at, given in ((0, hidden), (2, weight), (3, bias))
        ]
        for part in _chunks(len(hidden)):
            logits = matmul.forward(hidden[part], weight, bias).float()  # (C, V)
            log_p = torch.log_softmax(logits, dim=-1)
            total -= log_p.gather(1, targets[part, None]).sum()
            p = log_p.exp_()
            p[torch.arange(len(p), device=p.device), targets[part]] -= 1.0  # d loss / d logits = softmax - one-hot
            _add_gradients(grads, part, p, hidden, weight)
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight, of_bias = (None if grad is None else grad.mul_(grads[0]) for grad in ctx.grads)
        return of_hidden, None, of_weight, of_bias


def _chunks(count: int) -> list[slice]:
    """Chunks of equal size, since each reads all weights, however few positions it has."""
    size = math.ceil(count / max(1, math.ceil(count / CHUNK)))
    return [slice(start, start + size) for start in range(0, count, size)] if count else []


def _add_gradients(grads: list[Tensor | None], part: slice, p: Tensor, hidden: Tensor, weight: Tensor) -> None:
    of_hidden, of_weight, of_bias = grads
    if of_hidden is not None:
        of_hidden[part] = matmul.backward(p.to(weight.dtype), weight)
    if of_weight is not None:
        of_weight += p.T.to(hidden.dtype) @ hidden[part]
    if of_bias is not None:
        of_bias += p.sum(0)
