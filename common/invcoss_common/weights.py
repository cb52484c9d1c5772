"""Model weights as safetensors bytes, checked strictly against the schema (name, shape, dtype) of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from invcoss_common.config import WireDtype
from invcoss_common.errors import WeightsError
from invcoss_common.modality import Geometry, ModelShape
from invcoss_common.model import MultiModalMAE, build_model

Schema = dict[str, tuple[tuple[int, ...], torch.dtype]]

DTYPES: dict[WireDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def schema_of(tensors: Mapping[str, Tensor]) -> Schema:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Serialise tensors; equal tensors give equal bytes. No metadata is written: it could carry anything."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())})


def tensors_from_bytes(data: bytes, schema: Schema) -> dict[str, Tensor]:
    """Parse tensors that must fit `schema` exactly and be finite; raises WeightsError naming the first offence."""
    try:
        tensors = load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a number type that torch does not have
        raise WeightsError(f"not a safetensors file of known types: {str(error)!r}") from None
    check_tensors(tensors, schema)
    return tensors


def check_file(path: Path, schema: Schema) -> None:
    """Raise WeightsError unless the file holds exactly the tensors of `schema`, finite, and no metadata.

    One tensor is in memory at a time. Metadata are refused because they could carry anything.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata():
                raise WeightsError(f"{path}: carries metadata beside its tensors; save it without")
            check_tensors(_Tensors(file), schema)
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a safetensors file: {error}") from None
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({error.strerror or error})") from None


class _Tensors(Mapping[str, Tensor]):
    """The tensors of an open file by name, each read when it is asked for."""

    def __init__(self, file: safe_open) -> None:
        self.file = file
        self.names = set(file.keys())  # type: ignore[no-untyped-call]

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self.file.get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def check_tensors(tensors: Mapping[str, Tensor], schema: Schema) -> None:
    """Raise WeightsError unless names, shapes and types equal the schema's and every value is finite."""
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


def model_to_bytes(model: MultiModalMAE, dtype: WireDtype = "float32") -> bytes:
    """The model's weights, every tensor rounded to `dtype`."""
    return tensors_to_bytes({name: tensor.to(DTYPES[dtype]) for name, tensor in model.state_dict().items()})


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


def round_weights(model: MultiModalMAE, dtype: WireDtype) -> None:
    """Round every weight in place to a value that `dtype` has, so that the model is the one that will travel."""
    for tensor in model.state_dict().values():  # they share their memory with the model's parameters
        tensor.copy_(tensor.to(DTYPES[dtype]))


def _schema(model: MultiModalMAE, dtype: WireDtype) -> Schema:
    return {name: (shape, DTYPES[dtype]) for name, (shape, _) in schema_of(model.state_dict()).items()}
