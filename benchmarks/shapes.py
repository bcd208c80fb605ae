"""The two models that both sides build. Without imports, so that any interpreter reads it."""

# gelu: nanoGPT's own form in its own case, this project's default in the other.
SHAPES = {
    1: {"D": 128, "L": 4, "H": 4, "T": 64, "B": 12, "V": 65, "gelu": "erf"},
    2: {"D": 256, "L": 6, "H": 4, "T": 256, "B": 8, "V": 256, "gelu": "tanh"},
}
