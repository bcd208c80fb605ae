"""Documents out of tables: Parquet files, Hugging Face datasets and TFDS, read as streams.

Nothing is held but a batch of rows. No code that a dataset brings is run.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from lmscale_jax.errors import InputError

_ROWS = 1024


def missing(package: str, extra: str, source: str) -> InputError:
    return InputError(
        f"data.source={source!r} needs the package {package}; pip install 'lmscale_jax[{extra}]', "
        f"or data.source='stdlib' (configs/llama_100m.py:embedded) needs none"
    )


def parquet_values(path: Path, field: str) -> Iterator:
    """The values of one column, row by row.

    Raises InputError: no Parquet file, a damaged one, or none with that column.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise missing("pyarrow", "hf", "parquet") from None
    try:
        table = parquet.ParquetFile(path)
        _check_field(field, table.schema_arrow.names, f"data.path={path}")
        for batch in table.iter_batches(batch_size=_ROWS, columns=[field]):
            yield from batch.column(0).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        said = str(error).splitlines()[0]
        raise InputError(
            f"data.path={path}: not a readable Parquet file ({said}); fetch or write it again"
        ) from None


def local_dataset(data_cfg) -> Path | None:
    """The directory of a Hugging Face dataset that lies here; None for a name on the hub."""
    path = Path(data_cfg.path).expanduser()
    return path if path.is_dir() else None


def dataset_values(data_cfg) -> Iterator:
    """The values of data.field of a Hugging Face dataset: a directory that save_to_disk wrote, one
    of Parquet, Arrow or JSON files, or a name on the hub, which is streamed.

    Raises InputError: not there, not reachable, no such split or field.
    """
    try:
        import datasets
    except ImportError:
        raise missing("datasets", "hf", "hf") from None
    datasets.disable_progress_bars()
    # Its warnings at each of five attempts say what our one line says.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    where = f"data.path={data_cfg.path}"
    rows = _open_dataset(datasets, data_cfg, where)
    names = rows.column_names
    if names is not None:
        _check_field(data_cfg.field, names, where)
    try:
        for row in rows:
            if names is None:
                _check_field(data_cfg.field, list(row), where)
                names = list(row)
            yield row[data_cfg.field]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = str(error).splitlines()[0]
        raise InputError(f"{where}: reading it ended with: {said}") from None


def _open_dataset(datasets, data_cfg, where: str):
    local, split = local_dataset(data_cfg), data_cfg.rows
    try:
        if local and ((local / "state.json").exists() or (local / "dataset_dict.json").exists()):
            found = datasets.load_from_disk(str(local))
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise InputError(
                        f"config.data.rows={split!r}: {local} has the splits {', '.join(found)}"
                    )
                return found[split]
            return found
        return datasets.load_dataset(
            str(local or data_cfg.path), name=data_cfg.subset or None, split=split,
            revision=data_cfg.revision or None, streaming=True,
        )  # fmt: skip
    except datasets.exceptions.DatasetNotFoundError as error:
        said = str(error).splitlines()[0]
        raise InputError(
            f"{where}: {said}; log in with `hf auth login` and accept its licence if it is gated, "
            f"or name a directory that holds a copy"
        ) from None
    except ValueError as error:  # an unknown split or subset
        raise InputError(f"{where}: {str(error).splitlines()[0]}") from None
    except Exception as error:
        # Offline, the hub's client raises errors of several libraries.
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if local:
            raise InputError(f"{where}: no readable dataset there ({said})") from None
        raise InputError(
            f"{where}: the hub cannot be reached ({said}); name a directory that holds a copy, or "
            f"data.source='stdlib' (of the named configs, configs/llama_100m.py:embedded) needs no "
            f"network"
        ) from None


def tfds_values(data_cfg) -> Iterator:
    """The values of data.field of a TFDS dataset that is prepared as ArrayRecord; without
    TensorFlow.

    Raises InputError: not prepared here, another format, no such split or field.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise missing("tensorflow-datasets", "tfds", "tfds") from None
    where = f"data.path={data_cfg.path}"
    folder = data_cfg.directory or None
    try:
        builder = tfds.builder(data_cfg.path, data_dir=folder)
        rows = builder.as_data_source(split=data_cfg.rows)
    except Exception as error:  # TFDS raises errors of many kinds, some of several paragraphs
        said = str(error).strip().splitlines()
        raise InputError(
            f"{where}: no TFDS dataset to read ({said[0] if said else type(error).__name__}); "
            f"prepare it with tfds.builder(name).download_and_prepare(file_format='array_record') "
            f"and name its directory as data.directory"
        ) from None
    features = builder.info.features
    _check_field(data_cfg.field, list(features), where)
    for row in rows:
        value = row[data_cfg.field]
        yield value.decode("utf-8", "strict") if isinstance(value, bytes) else value


def _check_field(field: str, names: list[str], where: str) -> None:
    if field not in names:
        raise InputError(
            f"{where}: no field {field!r}; set data.field to one that is there: {', '.join(names)}"
        )
