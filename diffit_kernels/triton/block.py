"""The second half of a block in inference."""

from __future__ import annotations

from torch import Tensor

from diffit_kernels.problem import AddLayerNormProblem, MLPProblem
from diffit_kernels.triton.add_layer_norm import add_layer_norm
from diffit_kernels.triton.mlp import add_mlp, adds_in_place, mlp


def add_layer_norm_mlp(
    norm: AddLayerNormProblem,
    perceptron: MLPProblem,
    x: Tensor,
    y: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
) -> Tensor:
    """``s + mlp(layer_norm(s))`` with ``s = x + y``.

    PyTorch's product can be added to s in place, but not with a bias as well: the norm adds that
    to s before it is rounded, so that there is one rounding less than in the formula.
    """
    if norm.dtype == perceptron.dtype and adds_in_place(perceptron, x.device):
        s, normed = add_layer_norm(norm, x, y, eps, fc2_bias)
        return add_mlp(s, normed, fc1_weight, fc1_bias, fc2_weight)
    s, normed = add_layer_norm(norm, x, y, eps)
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    result, _ = mlp(perceptron, normed, *weights, s, save_hidden=False)
    return result
