"""Model weights as safetensors, checked strictly against the schema (name, shape, dtype) of the model.

Files are written from and read into the tensors themselves, one at a time, so that a model is in memory once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from invcoss_common.canonical import new_file
from invcoss_common.config import WireDtype
from invcoss_common.errors import WeightsError
from invcoss_common.modality import Geometry, ModelShape
from invcoss_common.model import MultiModalMAE, build_model

Schema = dict[str, tuple[tuple[int, ...], torch.dtype]]

_IMPOSSIBLE = (TypeError, RuntimeError)  # torch's, for the shape of a tensor without values, such as (0, 2^63)
DTYPES: dict[WireDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def schema_of(tensors: Mapping[str, Tensor]) -> Schema:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Serialise tensors; equal tensors give equal bytes. No metadata is written: it could carry anything."""
    return save(_plain(tensors))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `path` at once, with the very bytes of `tensors_to_bytes`, which are never in memory."""
    with new_file(path) as draft:
        save_file(_plain(tensors), draft)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}


def tensors_from_bytes(data: bytes, schema: Schema) -> dict[str, Tensor]:
    """Parse tensors that must fit `schema` exactly and be finite; raises WeightsError naming the first offence."""
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, *_IMPOSSIBLE) as error:  # KeyError: a number type that torch does not have
        raise WeightsError(f"not a safetensors file of known types: {str(error)[:300]!r}") from None
    check_tensors(tensors, schema)
    return tensors


def check_file(path: Path, schema: Schema, max_norm: float = math.inf) -> None:
    """Raise WeightsError unless the file holds exactly the tensors of `schema`, finite, and no metadata.

    No floating-point tensor may have a norm above `max_norm`. One tensor is in memory at a time. Metadata are refused
    because they could carry anything.
    """
    with _reading(path) as tensors:
        check_tensors(tensors, schema, max_norm)


@contextmanager
def _reading(path: Path) -> Iterator[_Tensors]:
    try:
        yield _Tensors(path)
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a safetensors file: {str(error)[:300]!r}") from None
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({error.strerror or error})") from None


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a file without metadata, by name, each read when it is asked for.

    The file is opened for each: the pages of an open one stay in memory, at last all of them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:
            if file.metadata():
                raise WeightsError(f"{path}: carries metadata beside its tensors; save it without")
            self.names = set(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            try:
                tensor: Tensor = file.get_tensor(name)
            except _IMPOSSIBLE:
                raise WeightsError(f"{self.path}: tensor {name[:64]!r} has a shape that no tensor can have") from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def check_tensors(tensors: Mapping[str, Tensor], schema: Schema, max_norm: float = math.inf) -> None:
    """Raise WeightsError unless names, shapes and types equal the schema's, all is finite, and no norm too large."""
    if missing := sorted(schema.keys() - tensors.keys()):
        raise WeightsError(
            f"tensor '{missing[0]}' is missing ({len(missing)} in all); were these weights made by this plan?"
        )
    if extra := sorted(tensors.keys() - schema.keys()):
        raise WeightsError(f"{len(extra)} tensor(s) that the model does not have, such as {extra[0][:64]!r}")
    for name, (shape, dtype) in schema.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise WeightsError(
                f"tensor '{name}' is {tuple(tensor.shape)} {tensor.dtype}; the model needs {shape} {dtype}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"tensor '{name}' holds NaN or infinite values; the training that made it went wrong")
        if tensor.is_floating_point() and max_norm < math.inf:
            norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float32))
            if not norm <= max_norm:
                raise WeightsError(f"tensor '{name}' has norm {norm:g}; more than {max_norm:g} is no trained model's")


def model_to_bytes(model: MultiModalMAE, dtype: WireDtype = "float32") -> bytes:
    """The model's weights, every tensor rounded to `dtype`."""
    return tensors_to_bytes(_rounded(model.state_dict(), dtype))


def write_model(path: Path, model: MultiModalMAE, dtype: WireDtype = "float32") -> None:
    """Write `path` with the bytes of `model_to_bytes`."""
    write_tensors(path, _rounded(model.state_dict(), dtype))


def recast_file(source: Path, path: Path, dtype: WireDtype) -> None:
    """Write `path` with the weights of the checked file `source` as `dtype`."""
    with _reading(source) as tensors:
        write_tensors(path, _rounded(tensors, dtype))


def _rounded(tensors: Mapping[str, Tensor], dtype: WireDtype) -> dict[str, Tensor]:
    return {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}


def model_schema(shape: ModelShape, families: Iterable[Geometry], dtype: WireDtype = "float32") -> Schema:
    """Names, shapes and types of the model's tensors as `dtype`; no memory is taken for values."""
    with torch.device("meta"):
        return _schema(build_model(shape, families, seed=0), dtype)


def model_from_bytes(
    data: bytes, shape: ModelShape, families: Iterable[Geometry], dtype: WireDtype = "float32"
) -> MultiModalMAE:
    """The model of this shape, in float32, from weights in `dtype`; raises WeightsError when they don't fit."""
    model = build_model(shape, families, seed=0)
    model.load_state_dict(tensors_from_bytes(data, _schema(model, dtype)))
    return model


def read_model(
    path: Path, shape: ModelShape, families: Iterable[Geometry], dtype: WireDtype = "float32"
) -> MultiModalMAE:
    """`model_from_bytes` of a file, of which one tensor is in memory at a time."""
    model = build_model(shape, families, seed=0)
    with _reading(path) as tensors:
        check_tensors(tensors, _schema(model, dtype))
        for name, weights in model.state_dict().items():  # they share their memory with the model's parameters
            weights.copy_(tensors[name])
    return model


def round_weights(model: MultiModalMAE, dtype: WireDtype) -> None:
    """Round every weight in place to a value that `dtype` has, so that the model is the one that will travel."""
    for tensor in model.state_dict().values():  # they share their memory with the model's parameters
        tensor.copy_(tensor.to(DTYPES[dtype]))


def _schema(model: MultiModalMAE, dtype: WireDtype) -> Schema:
    return {name: (shape, DTYPES[dtype]) for name, (shape, _) in schema_of(model.state_dict()).items()}
