"""2-D DICOM images: shown as a display would show them; headers are checked before pixels are read."""

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    BasicTextSRStorage,
    ComputedRadiographyImageStorage,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
    SegmentationStorage,
)
from tests.site_client.dicoms import PATIENT, dataset, save, slice_of

from invcoss_common.errors import UnreadableFile
from invcoss_common.modality import MODALITIES
from invcoss_site.ingest import read_samples
from invcoss_site.ingest.dicom import read_header
from invcoss_site.ingest.values import model_values

XRAY, PATHOLOGY = MODALITIES["xray"], MODALITIES["pathology"]
YY, XX = np.mgrid[:40, :50]
FILM = (100 + 40 * YY + 25 * XX).astype(np.uint16)  # 100 to 2885, of 12 bits
COLOUR = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def film(pixels=FILM, **tags):
    return dataset(pixels, bits_stored=12, sop=ComputedRadiographyImageStorage, **tags)


def values_of(path, modality=XRAY):
    (sample,) = read_samples([path], modality)
    return model_values(sample, modality)


def stretched(pixels):
    return (pixels.astype(float) - pixels.min()) / (pixels.max() - pixels.min())


@pytest.mark.parametrize(
    ("syntax", "error"),
    [
        (None, 0),
        (RLELossless, 0),
        (JPEGLossless, 0),
        (JPEGLosslessSV1, 0),
        (JPEGLSLossless, 0),
        (JPEG2000Lossless, 0),
        (JPEGExtended12Bit, 8),
        (JPEGLSNearLossless, 2),
    ],
)
def test_a_film_is_the_same_in_every_compression(tmp_path, syntax, error):
    values = values_of(save(tmp_path / "a.dcm", film(), syntax))
    assert values.shape == (1, 40, 50)
    np.testing.assert_allclose(values[0], stretched(FILM), atol=(2 * error + 0.001) / np.ptp(FILM))


def test_eight_bit_jpeg_colour_and_palette(tmp_path):
    grey = dataset((FILM >> 4).astype(np.uint8))
    np.testing.assert_allclose(
        values_of(save(tmp_path / "a.dcm", grey, JPEGBaseline8Bit))[0], (FILM >> 4) / 255, atol=0.02
    )
    rgb = save(tmp_path / "rgb.dcm", dataset(COLOUR))
    np.testing.assert_allclose(values_of(rgb, PATHOLOGY), COLOUR.transpose(2, 0, 1) / 255, atol=1e-6)
    assert values_of(rgb).shape == (1, 40, 50)
    indices = (XX % 4).astype(np.uint8)
    palette = dataset(indices, PhotometricInterpretation="PALETTE COLOR")
    for number, colour in enumerate(("Red", "Green", "Blue")):
        setattr(palette, f"{colour}PaletteColorLookupTableDescriptor", [4, 0, 16])
        table = np.array([0, 60, 120, 255], np.uint16) * 257 // (number + 1)
        setattr(palette, f"{colour}PaletteColorLookupTableData", table.tobytes())
    expected = np.stack([np.array([0, 60, 120, 255])[indices] / 255 / n for n in (1, 2, 3)])
    np.testing.assert_allclose(values_of(save(tmp_path / "p.dcm", palette), PATHOLOGY), expected, atol=0.01)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_other_encodings_of_plain_pixels(tmp_path, syntax):
    data = film()
    data.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        data.PixelData = FILM.astype(">u2").tobytes()
    save(tmp_path / "a.dcm", data)
    np.testing.assert_allclose(values_of(tmp_path / "a.dcm")[0], stretched(FILM), atol=1e-5)


def test_monochrome1_is_turned_round(tmp_path):
    values = values_of(save(tmp_path / "a.dcm", film(PhotometricInterpretation="MONOCHROME1")))
    np.testing.assert_allclose(values[0], 1 - stretched(FILM), atol=1e-5)


def test_the_files_own_window_says_what_is_black_and_white(tmp_path):
    window = {"WindowCenter": 1000, "WindowWidth": 1001}
    expected = ((FILM.astype(float) - 500) / 1000).clip(0, 1)
    values = values_of(save(tmp_path / "a.dcm", film(**window)))
    np.testing.assert_allclose(values[0], expected, atol=0.002)
    turned = values_of(save(tmp_path / "b.dcm", film(PhotometricInterpretation="MONOCHROME1", **window)))
    np.testing.assert_allclose(turned[0], 1 - expected, atol=0.002)
    wide = values_of(save(tmp_path / "c.dcm", film(WindowCenter=4096, WindowWidth=8193)))
    np.testing.assert_allclose(wide[0], FILM / 8192, atol=0.002), "not stretched to what the picture happens to hold"


def test_a_lookup_table_is_applied(tmp_path):
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 16], (np.arange(4096) ** 2 // 256).astype(np.uint16).tobytes()
    values = values_of(save(tmp_path / "a.dcm", film(VOILUTSequence=[table])))
    np.testing.assert_allclose(values[0], FILM.astype(float) ** 2 / 256 / 65535, atol=0.001)


def test_padding_is_black_and_takes_no_part_in_the_range(tmp_path):
    pixels = FILM.copy()
    pixels[:, :10] = 4000
    tags = {"PixelPaddingValue": 4000, "PhotometricInterpretation": "MONOCHROME1"}
    values = values_of(save(tmp_path / "a.dcm", film(pixels, **tags)))[0]
    assert values[:, :10].max() == 0
    np.testing.assert_allclose(values[:, 10:], 1 - stretched(FILM[:, 10:]), atol=1e-5)


def test_a_slice_used_as_a_picture_is_warned_of(tmp_path):
    (sample,) = read_samples([save(tmp_path / "a.dcm", slice_of(FILM, (0, 0, 0)))], XRAY)
    assert [warned.kind for warned in sample.warnings] == ["dimensions"]


def edited(path, edit):
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes(edit(content)))


def bad_dicoms(folder):
    """Damaged and odd files and, for each, the kind and the words of its refusal."""
    save(folder / "good.dcm", film())
    (folder / "empty.dcm").write_bytes(b"")
    (folder / "text.dcm").write_text("hello, world! " * 20)
    data = film()
    del data.PixelData
    save(folder / "no-pixels.dcm", data)
    save(folder / "short.dcm", film(PixelData=FILM.tobytes()[:1200]))
    save(folder / "cut.dcm", film())
    edited(folder / "cut.dcm", lambda content: content[:-1000])
    save(folder / "cut-rle.dcm", film(), RLELossless)
    edited(folder / "cut-rle.dcm", lambda content: content[:-400])
    save(folder / "header.dcm", film())
    edited(folder / "header.dcm", lambda content: content[: content.index(b"\x28\x00\x10\x00")])
    for name, side in (("huge.dcm", 60000), ("large.dcm", 15000)):
        data = film()
        data.compress(RLELossless)
        data.Rows = data.Columns = side
        save(folder / name, data)
    save(folder / "frames.dcm", dataset(np.stack([FILM, FILM]), NumberOfFrames=2))
    save(folder / "mask.dcm", dataset(FILM, sop=SegmentationStorage))
    report = dataset(FILM, sop=BasicTextSRStorage)
    for tag in ("PixelData", "Rows", "Columns"):
        delattr(report, tag)
    save(folder / "report.dcm", report)
    save(folder / "lossless.dcm", film(), JPEGLosslessSV1)
    end = b"\xff\xd9"
    edited(folder / "lossless.dcm", lambda content: content.replace(end, b"\0\0"))
    # A frame that claims another size than the header is not decoded.
    save(folder / "liar.dcm", film(), JPEGLosslessSV1)
    size = (40).to_bytes(2, "big") + (50).to_bytes(2, "big")
    edited(folder / "liar.dcm", lambda content: content.replace(size, b"\xea\x60\xea\x60", 1))
    data = film()
    data.file_meta.TransferSyntaxUID = HTJ2KLossless
    data.PixelData = b"\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\x00\xe0\x04\0\0\0abcd\xfe\xff\xdd\xe0\0\0\0\0"
    data["PixelData"].is_undefined_length = True
    save(folder / "rare.dcm", data)
    save(folder / "window.dcm", film(WindowCenter=100, WindowWidth=0.5))
    return {
        "empty.dcm": ("empty", "file is empty"),
        "text.dcm": ("not-this-format", r"not a DICOM file \(looks like text\)"),
        "no-pixels.dcm": ("no-image", "no image in this file"),
        "short.dcm": ("truncated", "1,200 bytes of pixels of 4,000"),
        "cut.dcm": ("truncated", "3,000 bytes of pixels of 4,000"),
        "cut-rle.dcm": ("truncated", "file is incomplete"),
        "header.dcm": ("truncated", "ends within its header"),
        "huge.dcm": ("too-large", "claims 60000 x 60000"),
        "large.dcm": ("too-large", "million pixels"),
        "frames.dcm": ("dimensions", "2 frames in one file"),
        "mask.dcm": ("no-image", "Segmentation Storage"),
        "report.dcm": ("no-image", "Basic Text SR"),
        "lossless.dcm": ("damaged", "are damaged"),
        "liar.dcm": ("damaged", "are damaged"),
        "rare.dcm": ("not-supported", "High-Throughput JPEG 2000"),
        "window.dcm": ("damaged", "window or lookup table"),
    }


def test_bad_files_are_refused_by_name_and_reason_and_without_the_patient(tmp_path):
    for name, (kind, reason) in bad_dicoms(tmp_path).items():
        with pytest.raises(UnreadableFile, match=reason) as caught:
            read_samples([tmp_path / name], XRAY)
        text = str(caught.value)
        assert caught.value.kind == kind, name
        assert name in text
        assert "\n" not in text
        assert PATIENT not in text
        assert "Doe" not in text
    assert values_of(tmp_path / "good.dcm").shape == (1, 40, 50)


def test_a_header_is_read_without_its_pixels(tmp_path, monkeypatch):
    save(tmp_path / "a.dcm", film())
    monkeypatch.setattr("invcoss_site.ingest.dicom.pydicom.dcmread", None)  # a call would fail
    assert "PixelData" not in read_header(tmp_path / "a.dcm")
