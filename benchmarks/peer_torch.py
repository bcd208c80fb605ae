"""Decoders and nanoGPT's training loop in PyTorch: the peer of the benchmarks.

It runs under whatever interpreter has PyTorch, so it imports nothing else, of this project only
shapes.py and turns.py beside it, and takes its settings by argparse. It takes a GPU where PyTorch
sees one.

    peer_torch.py step --shape 1 --precision float32 [--compile default]
    peer_torch.py product --size 2048 --precision float32
    peer_torch.py loss --shape JSON --weights FILE
    peer_torch.py train --text FILE --precision float32 --seed 0 --out DIRECTORY
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from shapes import SHAPES, whole
from turns import serve

PRECISIONS = ("float32", "bf16-autocast", "bf16-pure")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5


class Rms(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, EPS)


def norm(shape):
    if shape["norm"] == "rmsnorm":
        return Rms(shape["D"])
    return nn.LayerNorm(shape["D"], bias=shape["bias"], eps=EPS)


def rope(T, size, theta=1e4):
    """Cosines and sines, [T, size]: channel i turns with channel i + size / 2."""
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angle = torch.outer(torch.arange(T, dtype=torch.float32), frequency).repeat(1, 2)
    return angle.cos().to(DEVICE), angle.sin().to(DEVICE)


def rotate(x, tables):
    cos, sin = tables
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


def block_mask(shape, window):
    """FlexAttention's mask within documents and a window in units of tokens, as ours has them."""
    unit, document, T = shape["unit"], shape["document"], shape["T"]

    def visible(b, h, q, k):
        near = q // unit - k // unit < window
        return (q >= k) & near & (q // document == k // document)

    return flex.create_block_mask(visible, None, None, T, T, device=DEVICE)


class Block(nn.Module):
    """q, k and v are one product, and so are the gate and the hidden values of a gated MLP.

    `window`: units of tokens that a query sees, of shapes that have "windows"; then attention is
    FlexAttention.
    """

    def __init__(self, shape, window=None):
        super().__init__()
        D, H, K, hidden, bias = (shape[name] for name in ("D", "H", "K", "F", "bias"))
        self.H, self.K, self.gated = H, K, shape["mlp"] == "swiglu"
        self.gelu = {"erf": "none"}.get(shape["gelu"], shape["gelu"])
        self.squared = shape["mlp"] == "relu2"
        self.mask = None if window is None else block_mask(shape, window)
        self.sizes = [D, D // H * K, D // H * K]
        self.ln_1, self.ln_2 = norm(shape), norm(shape)
        self.qkv, self.out = nn.Linear(D, sum(self.sizes), bias=bias), nn.Linear(D, D, bias=bias)
        self.up = nn.Linear(D, hidden * (2 if self.gated else 1), bias=bias)
        self.down = nn.Linear(hidden, D, bias=bias)

    def forward(self, x, tables):
        B, T, D = x.shape
        heads = self.qkv(self.ln_1(x)).split(self.sizes, dim=2)
        q, k, v = (a.view(B, T, -1, D // self.H).transpose(1, 2) for a in heads)
        if tables is not None:
            q, k = rotate(q, tables), rotate(k, tables)
        grouped = self.K != self.H
        if self.mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            q, k = q.to(v.dtype), k.to(v.dtype)
            y = flex.flex_attention(q, k, v, block_mask=self.mask, enable_gqa=grouped)
        x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, D))
        hidden = self.up(self.ln_2(x))
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        elif self.squared:
            hidden = F.relu(hidden).square()
        else:
            hidden = F.gelu(hidden, approximate=self.gelu)
        return x + self.down(hidden)


class Decoder(nn.Module):
    """GPT-2 or Llama, without dropout; initialised as in nanoGPT."""

    def __init__(self, shape):
        super().__init__()
        shape = whole(shape)
        D, L, V = shape["D"], shape["L"], shape["V"]
        self.tokens = nn.Embedding(V, D)
        learned = shape["positions"] == "learned"
        self.positions = nn.Embedding(shape["P"], D) if learned else None
        self.tables = None if learned else rope(shape["T"], D // shape["H"])
        windows = shape.get("windows") or [None] * L
        self.blocks = nn.ModuleList([Block(shape, window) for window in windows])
        self.ln = norm(shape)
        self.readout = nn.Linear(D, V, bias=False) if shape["head"] == "untied" else None
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * L) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x, y, reduction="mean"):
        h = self.tokens(x)
        if self.positions is not None:
            h = h + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h, self.tables)
        readout = self.tokens if self.readout is None else self.readout
        logits = F.linear(self.ln(h), readout.weight)
        return F.cross_entropy(
            logits.view(-1, logits.shape[-1]), y.reshape(-1), ignore_index=-1, reduction=reduction
        )


class Trainer:
    """One training step of a precision: forward, backward, clip to 1, fused AdamW.

    `compiled`: a mode of torch.compile for forward and loss, whose backward pass follows, or None.
    The optimizer's fused kernel stays as it is: it is one call already.
    """

    def __init__(self, model, precision: str, compiled: str | None = None):
        model = model.to(DEVICE)
        self.model = model.to(torch.bfloat16) if precision == "bf16-pure" else model
        self.autocast = precision == "bf16-autocast"
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
        self.call = torch.compile(model, mode=compiled, dynamic=False) if compiled else model

    def loss(self, x, y, reduction="mean"):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=self.autocast):
            return self.call(x, y, reduction)

    def step(self, x, y):
        loss = self.loss(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def facts() -> dict:
    gpu = DEVICE.type == "cuda"
    kind = torch.cuda.get_device_name() if gpu else "cpu"
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
    device = {"platform": DEVICE.type, "kind": kind, "count": 1}
    return {"device": device, "memory": {"peak": peak}, "torch": torch.__version__}


# --- Steps on random tokens, driven by interleave.py --------------------------------------------


def shape_of(args) -> dict:
    shape = SHAPES[int(args.shape)] if args.shape.isdigit() else json.loads(args.shape)
    return shape | ({"gelu": args.gelu} if args.gelu else {})


def time_steps(args) -> None:
    shape = shape_of(args)
    B, T, V = shape["B"], shape["T"], shape["V"]
    torch.manual_seed(0)
    if DEVICE.type == "cuda":  # as XLA multiplies float32 on a GPU by default
        torch.set_float32_matmul_precision("high")
    trainer = Trainer(Decoder(shape), args.precision, args.compile)
    data = [torch.randint(0, V, (B, T + 1)).to(DEVICE) for _ in range(8)]
    batches = [(b[:, :-1].contiguous(), b[:, 1:].contiguous()) for b in data]
    done = 0

    def run(steps):
        nonlocal done
        for _ in range(steps):
            loss = trainer.step(*batches[done % len(batches)])
            done += 1
        return float(loss)

    serve(run, facts)


def time_product(args) -> None:
    """A bare product of two square matrices, again and again."""
    dtype = torch.float32 if args.precision == "float32" else torch.bfloat16
    if DEVICE.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    a, b = (torch.randn(args.size, args.size).to(DEVICE, dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run(steps):
        for _ in range(steps):
            torch.matmul(a, b, out=out)
        return float(out[0, 0])

    serve(run, lambda: facts() | {"flops": 2 * args.size**3})


def print_loss(args) -> None:
    """The loss of given weights and tokens, and the norm of its gradient, in float32."""
    inputs = json.loads(Path(args.weights).read_text())
    model = Decoder(shape_of(args))
    model.load_state_dict({name: torch.tensor(x) for name, x in inputs["weights"].items()})
    trainer = Trainer(model, "float32", args.compile)
    x, y = (torch.tensor(inputs[name], device=DEVICE) for name in ("tokens", "targets"))
    loss = trainer.loss(x, y)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    print(json.dumps({"loss": float(loss), "grad_norm": float(norm)}))


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
    tokens = torch.tensor([ids[c] for c in text], device=DEVICE)
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
    x = torch.zeros(windows * T, dtype=torch.long, device=DEVICE)
    y = torch.full((windows * T,), -1, device=DEVICE)
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
    B, T = shape["B"], shape["T"]
    training, held_out, shape["V"] = read(args.text)
    torch.manual_seed(args.seed)
    trainer = Trainer(Decoder(shape), args.precision)
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
    jobs = {"step": time_steps, "product": time_product, "loss": print_loss, "train": train}
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=jobs)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--shape", default="1", help="its number, or the shape as JSON")
    parser.add_argument("--compile", help="mode of torch.compile; none by default")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--weights")
    parser.add_argument("--gelu", choices=("erf", "tanh"))
    parser.add_argument("--text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    jobs[args.what](args)


if __name__ == "__main__":
    main()
