"""Turns linear layers of other classes into nn.Linear.

GPT-2 and relatives store weights transposed (transformers' Conv1D), Falcon has a class of its own. As nn.Linear they
can carry adapters, be quantized and be trained like all others.
"""

from typing import Any

from torch import Tensor, nn


def make_plain(module: nn.Module) -> None:
    """Replace the layers in place. Results stay the same; Conv1D's weights change names and shapes."""
    from transformers.pytorch_utils import Conv1D

    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            theirs: Any = child
            if type(child) is Conv1D:
                setattr(parent, name, _linear(theirs.weight.T.contiguous(), theirs.bias))
            elif type(child).__name__ == "FalconLinear":
                setattr(parent, name, _linear(theirs.weight, theirs.bias))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """weight (out, in)."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias, requires_grad=False)
    return plain
