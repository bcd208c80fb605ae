"""The parts of a training step in PyTorch eager, forward and backward: milliseconds as JSON.

pieces_torch.py --precision float32
"""

import argparse
import json

import torch
import torch.nn.functional as F
from shapes import GPT2_WITHOUT_READOUT, SHAPES
from turns import timed


def both_ways(function, *inputs, autocast: bool = False):
    """Forward and backward of `function` with a gradient of ones."""
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(*leaves)
        gradient = torch.ones_like(y)
        torch.autograd.grad(y, [x for x in leaves if x.requires_grad], gradient)

    return run


def pieces(shape: dict, precision: str) -> dict[str, float]:
    D, T, B, H, V = (shape[name] for name in "DTBHV")
    N, autocast = B * T, precision == "bfloat16"

    def product(I, O):  # noqa: E741
        return timed(both_ways(F.linear, torch.randn(N, I), torch.randn(O, I), autocast=autocast))

    def attention(qkv_NxD3):
        q, k, v = (
            a.view(B, T, H, D // H).transpose(1, 2) for a in qkv_NxD3.view(B, T, 3 * D).split(D, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).contiguous().view(N, D)

    def loss(x, w, y):
        return F.cross_entropy(F.linear(x, w), y)

    half = torch.bfloat16 if autocast else torch.float32
    form = {"erf": "none"}.get(shape["gelu"], shape["gelu"])
    size = shape["L"] * 12 * D * D
    weights = [torch.randn(D, D, requires_grad=True) for _ in range(size // D // D)]
    for w in weights:
        w.grad = torch.randn_like(w)
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)

    def update():
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    return {
        "q, k and v": product(D, 3 * D),
        "output projection": product(D, D),
        "MLP up": product(D, 4 * D),
        "MLP down": product(4 * D, D),
        "attention": timed(both_ways(attention, torch.randn(N, 3 * D, dtype=half))),
        "GELU": timed(
            both_ways(lambda x: F.gelu(x, approximate=form), torch.randn(N, 4 * D, dtype=half))
        ),
        "norm": timed(
            both_ways(lambda x, s: F.layer_norm(x, (D,), s), torch.randn(N, D), torch.randn(D))
        ),
        "readout and loss": timed(
            both_ways(
                loss,
                torch.randn(N, D),
                torch.randn(V, D),
                torch.randint(V, (N,)),
                autocast=autocast,
            )
        ),
        "clip and AdamW": timed(update),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    precision = parser.parse_args().precision
    print(json.dumps({n: pieces(SHAPES[n], precision) for n in GPT2_WITHOUT_READOUT}))
