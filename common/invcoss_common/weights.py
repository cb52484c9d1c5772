"""Model weights as safetensors bytes, checked strictly against the schema (name, shape, dtype) of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from invcoss_common.errors import WeightsError
from invcoss_common.modality import Geometry, ModelShape
from invcoss_common.model import MultiModalMAE, build_model

Schema = dict[str, tuple[tuple[int, ...], torch.dtype]]


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


def model_to_bytes(model: MultiModalMAE) -> bytes:
    return tensors_to_bytes(model.state_dict())


def model_from_bytes(data: bytes, shape: ModelShape, families: Iterable[Geometry]) -> MultiModalMAE:
    """The model of this shape with the weights in `data`; raises WeightsError when they don't fit."""
    model = build_model(shape, families, seed=0)
    model.load_state_dict(tensors_from_bytes(data, schema_of(model.state_dict())))
    return model
