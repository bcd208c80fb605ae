"""Streams documents from tables: Parquet files, Hugging Face datasets and TFDS.

Memory holds one batch of rows. No code of a dataset is run.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from lmscale_jax.errors import InputError
from lmscale_jax.files import user_path

_ROWS = 1024


def need_package(package: str, extra: str, source: str) -> InputError:
    """Returns the error for a source whose package is not installed."""
    return InputError(
        f"data.source={source!r} needs the package {package}; pip install 'lmscale_jax[{extra}]', "
        f"or data.source='stdlib' (configs/llama_100m.py:embedded) needs none"
    )


def parquet_values(path: Path, field: str) -> Iterator:
    """Yields the values of one column, row by row.

    Raises:
        InputError: not a Parquet file, a damaged one, or one without that column.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise need_package("pyarrow", "hf", "parquet") from None
    try:
        table = parquet.ParquetFile(path)
        _check_field(field, table.schema_arrow.names, f"data.path={path}")
        for batch in table.iter_batches(batch_size=_ROWS, columns=[field]):
            yield from batch.column(0).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(
            f"data.path={path}: not a readable Parquet file ({_first_line(error)}); fetch or write "
            f"it again"
        ) from None


def local_dataset(data_cfg) -> Path | None:
    """Returns the directory of a local Hugging Face dataset; None for a name on the hub."""
    path = user_path(data_cfg.path)
    return path if path.is_dir() else None


def dataset_values(data_cfg) -> Iterator:
    """Yields the values of data.field of a Hugging Face dataset.

    That is a directory that save_to_disk wrote, a directory of Parquet, Arrow or JSON files, or a
    name on the hub, which is streamed.

    Raises:
        InputError: the dataset cannot be found or reached, or lacks the split or field.
    """
    try:
        import datasets
    except ImportError:
        raise need_package("datasets", "hf", "hf") from None
    datasets.disable_progress_bars()
    # It warns at each of five attempts; our error message is enough.
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
        raise InputError(f"{where}: cannot be read to its end ({_first_line(error)})") from None


def _open_dataset(datasets, data_cfg, where: str):
    """Opens the split data.rows of a local dataset or of one on the hub. Raises InputError."""
    local, split = local_dataset(data_cfg), data_cfg.rows
    try:
        if local and ((local / "state.json").exists() or (local / "dataset_dict.json").exists()):
            dataset = datasets.load_from_disk(str(local))
            if not isinstance(dataset, datasets.DatasetDict):
                return dataset
            if split not in dataset:
                raise InputError(
                    f"config.data.rows={split!r}: {local} has the splits {', '.join(dataset)}"
                )
            return dataset[split]
        return datasets.load_dataset(
            str(local or data_cfg.path), name=data_cfg.subset or None, split=split,
            revision=data_cfg.revision or None, streaming=True,
        )  # fmt: skip
    except datasets.exceptions.DatasetNotFoundError as error:
        raise InputError(
            f"{where}: {_first_line(error)}; log in with `hf auth login` and accept its licence if "
            f"it is gated, or name a directory that holds a copy"
        ) from None
    except ValueError as error:  # an unknown split or subset
        raise InputError(f"{where}: {_first_line(error)}") from None
    except Exception as error:  # offline, the hub's client raises errors of several libraries
        reason = f"{type(error).__name__}: {_first_line(error)}"
        if local:
            raise InputError(f"{where}: no readable dataset there ({reason})") from None
        raise InputError(
            f"{where}: the hub cannot be reached ({reason}); name a directory that holds a copy, "
            f"or use data.source='stdlib' (a named config: configs/llama_100m.py:embedded)"
        ) from None


def tfds_values(data_cfg) -> Iterator:
    """Yields the values of data.field of a TFDS dataset, without TensorFlow.

    The dataset must be prepared as ArrayRecord.

    Raises:
        InputError: the dataset is not prepared or has another format, or lacks the split or field.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise need_package("tensorflow-datasets", "tfds", "tfds") from None
    where = f"data.path={data_cfg.path}"
    folder = data_cfg.directory or None
    try:
        builder = tfds.builder(data_cfg.path, data_dir=folder)
        rows = builder.as_data_source(split=data_cfg.rows)
    except Exception as error:  # TFDS raises errors of many kinds, some of several paragraphs
        reason = _first_line(error) or type(error).__name__
        raise InputError(
            f"{where}: no TFDS dataset to read ({reason}); "
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
            f"{where}: no field {field!r}; set data.field to one of: {', '.join(names)}"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
