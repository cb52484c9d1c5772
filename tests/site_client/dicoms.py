"""Writes small DICOM files: slices, series, enhanced multi-frame volumes, in every compression that is read."""

from io import BytesIO

import imagecodecs
import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
    generate_uid,
)

PATIENT = "Doe-12345"
AXIAL = (1, 0, 0, 0, 1, 0)


def baseline(pixels):
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def lossless(predictor):
    return lambda pixels: imagecodecs.jpeg8_encode(pixels, lossless=True, bitspersample=12, predictor=predictor)


ENCODERS = {
    JPEGBaseline8Bit: baseline,
    JPEGExtended12Bit: lambda pixels: imagecodecs.jpeg8_encode(pixels, level=98, bitspersample=12),
    JPEGLossless: lossless(6),
    JPEGLosslessSV1: lossless(1),
    JPEGLSLossless: imagecodecs.jpegls_encode,
    JPEGLSNearLossless: lambda pixels: imagecodecs.jpegls_encode(pixels, level=2),
    JPEG2000Lossless: lambda pixels: imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", reversible=True, level=0),
}


def dataset(pixels, *, bits_stored=None, sop=CTImageStorage, **tags):
    """A data set of `pixels` (rows, columns) or (rows, columns, 3), uint8, uint16 or int16, with further `tags`."""
    result = Dataset()
    result.file_meta = FileMetaDataset()
    result.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    result.SOPClassUID, result.SOPInstanceUID = sop, generate_uid()
    result.file_meta.MediaStorageSOPClassUID = sop
    result.file_meta.MediaStorageSOPInstanceUID = result.SOPInstanceUID
    result.PatientID, result.PatientName = PATIENT, "Doe^Jane"
    result.StudyInstanceUID = "1.2.3"
    result.Rows, result.Columns = pixels.shape[-2:] if pixels.shape[-1] != 3 else pixels.shape[:2]
    result.SamplesPerPixel = 3 if pixels.shape[-1] == 3 else 1
    if result.SamplesPerPixel == 3:
        result.PlanarConfiguration = 0
    result.PhotometricInterpretation = "RGB" if result.SamplesPerPixel == 3 else "MONOCHROME2"
    result.BitsAllocated = 8 * pixels.dtype.itemsize
    result.BitsStored = bits_stored or result.BitsAllocated
    result.HighBit = result.BitsStored - 1
    result.PixelRepresentation = int(pixels.dtype.kind == "i")
    result.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(result, name, value)
    return result


def save(path, data, syntax=None):
    """Write a data set, compressed if `syntax` says so."""
    if syntax == RLELossless:
        data.compress(RLELossless, generate_instance_uid=False)
    elif syntax:
        frame = ENCODERS[syntax](np.frombuffer(data.PixelData, f"u{data.BitsAllocated // 8}").reshape(data.Rows, -1))
        data.PixelData = encapsulate([frame])
        data["PixelData"].VR = "OB"
        data["PixelData"].is_undefined_length = True
        data.file_meta.TransferSyntaxUID = syntax
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def slice_of(pixels, position, *, orientation=AXIAL, spacing=(1.0, 1.0), series="1.2.3.4", **tags):
    """A data set that is one slice of a volume; CT values with the usual offset of 1024."""
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    place = {"ImagePositionPatient": list(position), "ImageOrientationPatient": list(orientation)}
    return dataset(pixels, PixelSpacing=list(spacing), SeriesInstanceUID=series, **rescale, **place, **tags)


def save_series(folder, volume, *, step=(0.0, 0.0, 2.0), syntax=None, **tags):
    """Write slices (rows, columns) of `volume`, each `step` mm after the one before, last first; return the files."""
    files = []
    for number, pixels in enumerate(volume):
        position = np.round(number * np.array(step), 4).tolist()
        files.append(save(folder / f"{len(volume) - number:03}.dcm", slice_of(pixels, position, **tags), syntax))
    return sorted(files)


def enhanced(volume, *, step_mm=2.0, spacing=(1.0, 1.5), slopes=None):
    """One multi-frame data set of `volume`: frames from head to feet, a slope for each, the rest shared."""
    data = dataset(volume, sop=EnhancedMRImageStorage, NumberOfFrames=len(volume), SeriesInstanceUID="1.2.3.5")
    shared, measures, along = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = list(spacing)
    along.ImageOrientationPatient = list(AXIAL)
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [along]
    data.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for number in range(len(volume)):
        frame, place, units = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [0.0, 0.0, -step_mm * number]
        units.RescaleSlope, units.RescaleIntercept = (slopes or [1] * len(volume))[number], 0
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [place], [units]
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = frames
    return data
