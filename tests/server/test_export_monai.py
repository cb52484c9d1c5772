"""The MONAI bundles: MONAI's own checks pass, without a network, and a bundle's features of a file are ours."""

from __future__ import annotations

import json
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, verify_metadata, verify_net_in_out
from PIL import Image
from safetensors.torch import load_file
from tests.server.exports import MODALITIES, source_of, tokens_of

from invcoss_common.canonical import sha256_file
from invcoss_server.export.folder import export
from invcoss_server.export.monai import SCHEMA
from invcoss_site.ingest import read_samples
from invcoss_site.ingest.values import model_values, resample

pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning")  # MONAI lacks a reader
TOLERANCE = 1e-5
# What MONAI's schema of metadata asks for, in our words: MONAI fetches its own from SCHEMA where no file is given.
TENSOR = {
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
}
TENSORS = {"type": "object", "minProperties": 1, "additionalProperties": {"type": "object", **TENSOR}}
TEXTS = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors")
METADATA = {
    "type": "object",
    "required": [*TEXTS, "copyright", "required_packages_version", "network_data_format"],
    "properties": {
        **{name: {"type": "string"} for name in (*TEXTS, "copyright", "name", "intended_use")},
        **{name: {"type": "object"} for name in ("required_packages_version", "changelog")},
        "references": {"type": "array", "items": {"type": "string"}},
        "network_data_format": {
            "required": ["inputs", "outputs"],
            "properties": {"inputs": TENSORS, "outputs": TENSORS},
        },
    },
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return source_of(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def bundles(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out"
    export(source, out, ("monai",), site_names=True)
    return out / "monai"


@pytest.fixture
def bundle(request, bundles, monkeypatch):
    """One bundle, as a program sees it that has its folder on the path."""
    folder = bundles / request.param
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the bundle stays as it was exported
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
        del sys.modules[name]


@pytest.mark.parametrize("bundle", MODALITIES, indirect=True)
def test_monai_verifies_metadata_and_network(bundle, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(METADATA))
    metadata, inference = (str(bundle / "configs" / f"{name}.json") for name in ("metadata", "inference"))
    here = {"filepath": str(schema), "hash_val": sha256_file(schema), "hash_type": "sha256"}
    verify_metadata(meta_file=metadata, **here)
    verify_net_in_out("network_def", meta_file=metadata, config_file=inference, device="cpu")
    spoilt = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert spoilt["schema"] == SCHEMA
    del spoilt["network_data_format"]["inputs"]["image"]["dtype"]
    (tmp_path / "spoilt.json").write_text(json.dumps(spoilt))
    with pytest.raises(ValueError, match="Failed validating"):
        verify_metadata(meta_file=str(tmp_path / "spoilt.json"), **here)


def write_image(modality: str, folder) -> None:
    """One file of the modality in its folder, of another size and with other axes than the model's."""
    rng = np.random.default_rng(3)
    folder.mkdir()
    if modality in ("xray", "pathology"):
        shape = (90, 130) if modality == "xray" else (90, 130, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / "one.png")
        return
    values = rng.normal(-300, 500, (40, 36, 20)) if modality == "ct" else np.abs(rng.normal(0, 90, (40, 36, 20)))
    values[:4] = 0 if modality == "mri" else -1000
    affine = np.diag([-1.5, 1.5, 3.0, 1.0])
    nib.save(nib.Nifti1Image(values.astype(np.float32), affine), folder / "one.nii.gz")


@pytest.mark.parametrize("bundle", MODALITIES, indirect=True)
def test_a_bundle_has_our_features_of_a_file(bundle, source, tmp_path):
    modality = bundle.name
    write_image(modality, tmp_path / "images")
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    parser.read_meta(str(bundle / "configs" / "metadata.json"))
    changes = {"bundle_root": str(bundle), "dataset_dir": str(tmp_path / "images"), "device": "cpu"}
    parser.update(pairs={**changes, "output": str(tmp_path / "features.safetensors")})
    parser.get_parsed_content("run")
    found = load_file(tmp_path / "features.safetensors")["tokens"]

    row, geometry = source.row(modality), source.geometry(modality)
    (sample,) = read_samples(sorted((tmp_path / "images").iterdir()), row)
    image = model_values(sample, row)  # as the sites do it
    if geometry.ndim == 2:
        image = image[:, :, 20:110]  # the square in the middle
    image = resample(np.ascontiguousarray(image), geometry.size)
    ours = tokens_of(source, modality, torch.from_numpy(image)[None])
    assert found.shape == ours.shape == (1, 1 + geometry.tokens, 128)
    assert float((found - ours).abs().max()) <= TOLERANCE


def test_a_bundle_holds_what_one_must_and_no_pickle(bundles):
    assert sorted(path.name for path in bundles.iterdir()) == sorted(MODALITIES)
    for folder in bundles.iterdir():
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert files == {
            "LICENSE",
            "configs/inference.json",
            "configs/metadata.json",
            "docs/README.md",
            "models/model.safetensors",
            "scripts/__init__.py",
            "scripts/encoder.py",
            "scripts/features.py",
            "scripts/preprocess.py",
        }
        assert "python -m monai.bundle run" in (folder / "docs" / "README.md").read_text()
