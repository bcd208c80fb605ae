"""nanoGPT's decoder and its training loop in PyTorch eager: the peer of both benchmarks.

It runs under whatever interpreter has PyTorch, so it imports nothing else, of this project only
shapes.py beside it, and takes its settings by argparse.

    peer_torch.py step --shape 1 --precision float32
    peer_torch.py train --text FILE --precision float32 --seed 0 --out DIRECTORY
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from shapes import SHAPES
from turns import serve

PRECISIONS = ("float32", "bf16-autocast", "bf16-pure")


class Block(nn.Module):
    def __init__(self, D, H, gelu):
        super().__init__()
        self.H, self.gelu = H, gelu
        self.ln_1, self.ln_2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x):
        B, T, D = x.shape
        heads = self.qkv(self.ln_1(x)).split(D, dim=2)
        q, k, v = (a.view(B, T, self.H, D // self.H).transpose(1, 2) for a in heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, D))
        hidden = F.gelu(self.up(self.ln_2(x)), approximate=self.gelu)
        return x + self.down(hidden)


class Decoder(nn.Module):
    """GPT-2 without biases and dropout, the readout tied; initialised as in nanoGPT."""

    def __init__(self, D, L, H, T, V, gelu):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(T, D)
        self.blocks = nn.ModuleList(
            [Block(D, H, {"erf": "none"}.get(gelu, gelu)) for _ in range(L)]
        )
        self.ln = nn.LayerNorm(D, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * L) if residual else 0.02)

    def forward(self, x, y, reduction="mean"):
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        logits = F.linear(self.ln(h), self.tokens.weight)
        return F.cross_entropy(
            logits.view(-1, logits.shape[-1]), y.reshape(-1), ignore_index=-1, reduction=reduction
        )


class Trainer:
    """One training step of a precision: forward, backward, clip to 1, fused AdamW."""

    def __init__(self, model, precision: str):
        self.model = model.to(torch.bfloat16) if precision == "bf16-pure" else model
        self.autocast = precision == "bf16-autocast"
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)

    def loss(self, x, y, reduction="mean"):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            return self.model(x, y, reduction)

    def step(self, x, y):
        loss = self.loss(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


# --- Steps on random tokens, driven by interleave.py --------------------------------------------


def time_steps(args) -> None:
    shape = dict(SHAPES[args.shape])
    shape["gelu"] = args.gelu or shape["gelu"]
    B, T, V = shape.pop("B"), shape["T"], shape["V"]
    torch.manual_seed(0)
    trainer = Trainer(Decoder(**shape), args.precision)
    data = [torch.randint(0, V, (B, T + 1)) for _ in range(8)]
    batches = [(b[:, :-1].contiguous(), b[:, 1:].contiguous()) for b in data]
    done = 0

    def run(steps):
        nonlocal done
        for _ in range(steps):
            loss = trainer.step(*batches[done % len(batches)])
            done += 1
        return float(loss)

    serve(run)


# --- nanoGPT's run ------------------------------------------------------------------------------

STEPS, WARMUP, LR, MIN_LR = 2000, 100, 1e-3, 1e-4
EVAL_EVERY, EVAL_BATCHES = 250, 20


def learning_rate(step: int, steps: int) -> float:
    if step < WARMUP:
        return LR * (step + 1) / (WARMUP + 1)
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return MIN_LR + 0.5 * (1 + math.cos(math.pi * done)) * (LR - MIN_LR)


def read(path: str):
    """(ids of the first nine tenths, ids of the rest, vocabulary size), one id a character."""
    text = Path(path).read_bytes().decode()
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = torch.tensor([ids[c] for c in text])
    cut = int(0.9 * len(text))
    return tokens[:cut], tokens[cut:], len(ids)


def crops(tokens, B, T):
    starts = torch.randint(len(tokens) - T, (B,)).tolist()
    x = torch.stack([tokens[i : i + T] for i in starts])
    return x, torch.stack([tokens[i + 1 : i + 1 + T] for i in starts])


@torch.no_grad()
def whole_loss(trainer, tokens, B, T):
    """(mean loss over every label of `tokens` but the first, their number): windows in order."""
    n, total = len(tokens) - 1, 0.0
    windows = math.ceil(n / T)
    x, y = torch.zeros(windows * T, dtype=torch.long), torch.full((windows * T,), -1)
    x[:n], y[:n] = tokens[:-1], tokens[1:]
    x, y = x.view(windows, T), y.view(windows, T)
    for i in range(0, windows, B):
        total += float(trainer.loss(x[i : i + B], y[i : i + B], "sum"))
    return total / n, n


@torch.no_grad()
def sampled_loss(trainer, tokens, B, T):
    return (
        sum(float(trainer.loss(*crops(tokens, B, T))) for _ in range(EVAL_BATCHES)) / EVAL_BATCHES
    )


def train(args) -> None:
    shape = dict(SHAPES[1])
    B, T = shape.pop("B"), shape["T"]
    training, held_out, shape["V"] = read(args.text)
    torch.manual_seed(args.seed)
    trainer = Trainer(Decoder(**shape), args.precision)
    best, seconds, timed = math.inf, 0.0, 0
    for step in range(args.steps + 1):
        if step % EVAL_EVERY == 0 or step == args.steps:
            sampled_loss(trainer, training, B, T)
            loss = sampled_loss(trainer, held_out, B, T)
            print(f"step {step}: validation loss {loss:.4f} ({EVAL_BATCHES} batches)", flush=True)
            if loss < best and step:
                best = loss
                state = {"model": trainer.model.state_dict()}
                torch.save(
                    state | {"optimizer": trainer.optimizer.state_dict()}, args.out / "ckpt.pt"
                )
        if step == args.steps:
            break
        begin = time.perf_counter()
        for group in trainer.optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        loss = float(trainer.step(*crops(training, B, T)))
        if step:  # the first one sets things up
            seconds, timed = seconds + time.perf_counter() - begin, timed + 1
    begin = time.perf_counter()
    final, n = whole_loss(trainer, held_out, B, T)
    result = {"steps_per_second": timed / seconds, "val_loss": final, "val_tokens": n}
    result["final_eval_seconds"] = time.perf_counter() - begin
    (args.out / "result.json").write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("step", "train"))
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--shape", type=int, choices=SHAPES, default=1)
    parser.add_argument("--gelu", choices=("erf", "tanh"))
    parser.add_argument("--text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    (time_steps if args.what == "step" else train)(args)


if __name__ == "__main__":
    main()
