"""Signs of identity in headers, free texts and names; no sign ever holds the value that it was found in."""

from pathlib import PurePath

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset
from tests.site_client.dicoms import dataset, save

from invcoss_site.deidentify import signs_in_dicom, signs_in_file, signs_in_name, signs_in_text

GREY = np.arange(1200, dtype=np.uint16).reshape(30, 40)
SECRETS = ("Meier", "Anna", "1961", "4711", "Kantonsspital", "Genf")


def found(signs):
    """Signs as (level, where, what), after looking that none has a value in it."""
    signs = {tuple(one) for one in signs}
    for secret in SECRETS:
        assert not [one for one in signs if secret.lower() in " ".join(one).lower()]
    return signs


def dicom(**tags):
    data = dataset(GREY, **tags)
    for name in ("PatientName", "PatientID"):
        if name not in tags:
            delattr(data, name)
    return data


def identity(where):
    return "identity", where, "has a value"


def test_elements_that_say_who_somebody_is():
    data = dicom(PatientName="Meier^Anna", PatientID="4711", AccessionNumber="4711", OperatorsName="Meier")
    assert found(signs_in_dicom(data)) == set(
        map(identity, ("PatientName", "PatientID", "AccessionNumber", "OperatorsName"))
    )


def test_elements_that_narrow_it_down_and_dates_are_suspicions():
    data = dicom(
        InstitutionName="Kantonsspital Genf", DeviceSerialNumber="4711", StudyDate="19610312", PatientAge="093Y"
    )
    assert found(signs_in_dicom(data)) == {
        ("suspicion", "InstitutionName", "has a value"),
        ("suspicion", "DeviceSerialNumber", "has a value"),
        ("suspicion", "StudyDate", "has a date"),
        ("suspicion", "PatientAge", "an age above 89 years"),
    }


@pytest.mark.parametrize("value", ["", "ANON", "Anonymous", "anon^4", "XXXX", "removed", "0"])
def test_what_stands_for_nothing_is_no_sign(value):
    assert not found(signs_in_dicom(dicom(PatientName=value, PatientAge="045Y", AccessionNumber=value)))


def test_pseudonyms_and_moved_dates_are_taken_at_the_files_word():
    tags = {"PatientName": "S-04", "PatientID": "S-04", "StudyDate": "20200101"}
    assert len(found(signs_in_dicom(dicom(**tags)))) == 3
    removed = {"PatientIdentityRemoved": "YES", "LongitudinalTemporalInformationModified": "MODIFIED"}
    assert not found(signs_in_dicom(dicom(**tags, **removed)))
    others = dicom(**tags, **removed, OtherPatientIDs="4711", PatientBirthName="Meier")
    assert found(signs_in_dicom(others)) == {identity("OtherPatientIDs"), identity("PatientBirthName")}


def test_sequences_and_private_elements_are_searched():
    request, data = Dataset(), dicom()
    request.RequestingPhysician = "Meier^Anna"
    data.RequestAttributesSequence = [request]
    block = data.private_block(0x0029, "VENDOR", create=True)
    block.add_new(0x10, "LO", "MRN: 4711")
    assert found(signs_in_dicom(data)) == {
        identity("RequestingPhysician"),
        ("suspicion", "private elements", "have values that nobody but the vendor knows"),
        ("identity", "private elements", "a number called a patient's"),
    }


def test_free_text_and_what_a_file_says_of_its_pixels():
    data = dicom(StudyDescription="Thorax Meier^Anna", BurnedInAnnotation="YES", RecognizableVisualFeatures="YES")
    data.add_new(0x60003000, "OW", b"\1\2")
    assert {(level, where) for level, where, _ in found(signs_in_dicom(data))} == {
        ("identity", "StudyDescription"),
        ("identity", "BurnedInAnnotation"),
        ("identity", "RecognizableVisualFeatures"),
        ("suspicion", "OverlayData"),
    }


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("Meier^Anna", "a name written with ^"),
        ("seen by Dr. Meier", "a title before a name"),
        ("patient id 4711", "a number called a patient's"),
        ("born 12.03.1961", "a date"),
        ("1961-03-12", "a date"),
        ("case 47110815", "a long number"),
        ("anna.meier@genf.ch", "an e-mail address"),
        ("(022) 471-4711", "a telephone number"),
    ],
)
def test_words_of_free_texts(text, what):
    signs = found(signs_in_text("a text", text))
    assert {one[2] for one in signs} == {what}


@pytest.mark.parametrize("text", ["T1w 3.5 mm", "CHEST PA", "0.1234567 mm", "3f" * 16, "hippocampus_001", "TE 12.5"])
def test_plain_texts_have_no_sign(text):
    assert not found(signs_in_text("a text", text))


def test_names_of_files_and_folders():
    assert {what for _, _, what in found(signs_in_name(PurePath("MEIER^ANNA/19610312/a.dcm")))} == {
        "a name written with ^",
        "a date",
        "a long number",
    }
    assert not found(signs_in_name(PurePath("sub-01/anat/1.2.840.113619.2.55.3.dcm")))
    assert not found(signs_in_name(PurePath("xray-0001.png")))


def test_headers_of_nifti_files(tmp_path):
    image = nib.Nifti1Image(GREY[None], np.eye(4))
    image.header["descrip"] = b"Meier^Anna"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Kantonsspital"))
    nib.save(image, tmp_path / "a.nii.gz")
    assert found(signs_in_file(tmp_path / "a.nii.gz")) == {
        ("identity", "NIfTI header, descrip", "a name written with ^"),
        ("suspicion", "NIfTI extensions", "may hold a DICOM header or comments"),
    }
    nib.save(nib.Nifti1Image(GREY[None], np.eye(4)), tmp_path / "plain.nii")
    assert not signs_in_file(tmp_path / "plain.nii")


def test_fields_of_pictures(tmp_path):
    picture = Image.fromarray(GREY.astype(np.uint8))
    exif = Image.Exif()
    exif[0x013B], exif[0x8825] = "Dr. Meier", {1: "N", 2: (46.0, 12.0, 0.0)}
    picture.save(tmp_path / "a.jpg", exif=exif, comment="MRN 4711")
    assert found(signs_in_file(tmp_path / "a.jpg")) == {
        ("suspicion", "EXIF", "a place (GPS)"),
        ("suspicion", "EXIF", "a title before a name"),
        ("identity", "picture's field comment", "a number called a patient's"),
    }
    words = PngImagePlugin.PngInfo()
    words.add_text("Anna Meier", "born 12.03.1961")
    picture.save(tmp_path / "a.png", pnginfo=words)
    assert found(signs_in_file(tmp_path / "a.png")) == {("suspicion", "a picture's field", "a date")}
    tifffile.imwrite(tmp_path / "a.tif", GREY, description="Meier^Anna")
    assert found(signs_in_file(tmp_path / "a.tif")) == {
        ("identity", "TIFF tag ImageDescription", "a name written with ^")
    }


def test_a_damaged_file_has_no_sign_and_a_whole_dicom_file_has_its(tmp_path):
    whole = save(tmp_path / "a.dcm", dicom(PatientName="Meier^Anna"))
    assert found(signs_in_file(whole)) == {identity("PatientName")}
    (tmp_path / "b.dcm").write_bytes(whole.read_bytes()[:200])
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    (tmp_path / "d.nii.gz").write_bytes(b"\x1f\x8b")
    for name in ("b.dcm", "c.png", "d.nii.gz"):
        found(signs_in_file(tmp_path / name))
