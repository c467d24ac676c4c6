"""Linear layers with float32 weights packed for the CPU.

torch's own product packs its weights again at each call. The compiled operators keep them in blocks of outputs: on two
Zen 4 cores the products of all layers of SmolLM2-135M take 0.63, 0.72, 0.82 and 0.98 of the time of oneDNN's packed
ones for 8, 16, 32 and 256 rows. Without a compiler oneDNN packs them. The choice follows from the machine alone,
without measuring, so that a restart on a busy machine gives the same answers to the last bit. Packed weights are a
copy; the plain ones are mapped from their file, so the system can drop their pages.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from core.engine.cpu.compiled import compiled, in_blocks


class PackedLinear(nn.Module):
    """y = W x + b with W (out, in) packed. A row's result depends on that row alone."""

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None) -> None:
        """W is the weights concatenated along the outputs."""
        super().__init__()
        whole = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
        self.out_features, self.in_features = whole.shape
        self.operators = compiled()
        self.bias = None if bias is None else bias.detach()
        self.packed: Tensor
        if self.operators is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(whole.contiguous(), None)
        else:
            self.packed = in_blocks(whole.detach(), self.operators.float_block)

    def forward(self, x: Tensor) -> Tensor:
        if self.operators is None:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            return y
        flat = x.reshape(-1, self.in_features).contiguous()
        y = self.operators.float_matmul(flat, self.packed, self.bias, self.out_features)
        return y.view(*x.shape[:-1], self.out_features)


def packable(linear: nn.Module) -> bool:
    """Whether a packed copy of the linear's weights can run here."""
    if type(linear) is not nn.Linear:
        return False
    onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch does not type it
    is_plain = linear.weight.device.type == "cpu" and linear.weight.dtype is torch.float32
    return is_plain and (onednn or compiled() is not None)
