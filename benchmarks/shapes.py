"""The two models that both sides build. Imports nothing by itself: any interpreter reads it."""

# gelu: nanoGPT's own form in its own case, this project's default in the other.
SHAPES = {
    1: {"D": 128, "L": 4, "H": 4, "T": 64, "B": 12, "V": 65, "gelu": "erf"},
    2: {"D": 256, "L": 6, "H": 4, "T": 256, "B": 8, "V": 256, "gelu": "tanh"},
}


def config_of(shape: dict, dtype: str, devices: int):
    """configs/nanogpt_char.py with the sizes of a shape."""
    from configs import nanogpt_char

    config = nanogpt_char.get_config()
    model = config.model
    model.d_model, model.n_layers, model.n_heads = shape["D"], shape["L"], shape["H"]
    model.gelu, model.dtype = shape["gelu"], dtype
    config.data.seq_len, config.train.batch_size = shape["T"], shape["B"]
    config.train.steps, config.mesh.cpu_devices = 100_000, devices
    return config
