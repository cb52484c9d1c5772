"""Looks for what names a person in files that should be de-identified: DICOM tags, free text, names of files.

It is a heuristic. It finds what was forgotten; it can't show that nothing was. DICOM elements are judged after the
Basic Application Level Confidentiality Profile (DICOM PS3.15, annex E). A sign never holds the value it was found in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Literal, NamedTuple

import nibabel as nib
import pydicom
import tifffile
from PIL import ExifTags, Image
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

Level = Literal["identity", "suspicion"]


class Sign(NamedTuple):
    """Something that names a person, or may: in which element, field or name (`where`), and what it looks like."""

    level: Level
    where: str
    what: str


# Keywords of elements that say who somebody is: patient, family, physicians, operators, and numbers that lead to them.
_IDENTITY = """
PatientName PatientID PatientBirthDate PatientBirthTime PatientBirthName PatientMotherBirthName
PatientBirthDateInAlternativeCalendar PatientDeathDateInAlternativeCalendar IssuerOfPatientID OtherPatientIDs
OtherPatientNames OtherPatientIDsSequence PatientAddress PatientTelephoneNumbers PatientTelecomInformation
PatientInsurancePlanCodeSequence MilitaryRank BranchOfService MedicalRecordLocator ResponsiblePerson
ResponsibleOrganization ReferencedPatientPhotoSequence AccessionNumber AdmissionID IssuerOfAdmissionID
ServiceEpisodeID InsurancePlanIdentification CurrentPatientLocation PatientInstitutionResidence
ReferringPhysicianName ReferringPhysicianAddress ReferringPhysicianTelephoneNumbers
ReferringPhysicianIdentificationSequence ConsultingPhysicianName ConsultingPhysicianIdentificationSequence
PerformingPhysicianName PerformingPhysicianIdentificationSequence NameOfPhysiciansReadingStudy
PhysiciansReadingStudyIdentificationSequence PhysiciansOfRecord PhysiciansOfRecordIdentificationSequence
OperatorsName OperatorIdentificationSequence RequestingPhysician ScheduledPerformingPhysicianName
NamesOfIntendedRecipientsOfResults IntendedRecipientsOfResultsIdentificationSequence OrderEnteredBy
OrderEntererLocation OrderCallbackPhoneNumber OrderCallbackTelecomInformation PersonAddress PersonTelephoneNumbers
PersonTelecomInformation PersonIdentificationCodeSequence PlacerOrderNumberImagingServiceRequest
FillerOrderNumberImagingServiceRequest RequestedProcedureID DistributionAddress HumanPerformerOrganization
"""
IDENTITY = frozenset(_IDENTITY.split())

# Keywords of elements that narrow it down: the place, the machine, the day, circumstances of life.
_INDIRECT = """
InstitutionName InstitutionAddress InstitutionalDepartmentName InstitutionCodeSequence StationName DeviceSerialNumber
PerformedStationName ScheduledStationName PerformedLocation GantryID PlateID DetectorID StudyID
PerformedProcedureStepID ScheduledProcedureStepID EthnicGroup Occupation PatientReligiousPreference
CountryOfResidence RegionOfResidence MedicalAlerts Allergies AdditionalPatientHistory PatientComments ImageComments
StudyComments RequestedProcedureComments ImagingServiceRequestComments VisitComments ReasonForStudy
"""
INDIRECT = frozenset(_INDIRECT.split())

_PLACEHOLDER = re.compile(r"[\W_0xX]*|\W*(anon|anonym|de-?id|removed|none|unknown|redacted|pseudo|n/?a\b).*", re.I)
_TEXT_VRS = ("LO", "LT", "SH", "ST", "UC", "UT")
_DATE_VRS = ("DA", "DT")
_MODIFIED = ("MODIFIED", "REMOVED")
_OLDEST = 89  # years: HIPAA's Safe Harbor takes higher ages for identifying

_YEAR = r"(?:19|20)\d\d"
_MONTH, _DAY = r"(?:0[1-9]|1[0-2])", r"(?:0[1-9]|[12]\d|3[01])"
_TEXTS: dict[str, re.Pattern[str]] = {
    "a name written with ^": re.compile(r"[^\W\d_]{2,}\^[^\W\d_]"),
    "a title before a name": re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|Herr|Frau|Mme)\b\.? ?[A-ZÀ-Ý][a-zà-ÿ]+"),
    "a number called a patient's": re.compile(
        r"(?<![a-z])(?:mrn|dob|ssn|accession|pat(?:ient)?[ _-]?(?:id|no|nr|num(?:ber)?))[\s:#=._-]*[a-z]{0,3}\d{3}",
        re.I,
    ),
    "a date": re.compile(
        rf"(?<![\d.]){_YEAR}([-./_]?){_MONTH}\1{_DAY}(?!\d)|(?<![\d.])(?:\d?\d)([./-])\d?\d\2(?:{_YEAR})(?!\d)"
    ),
    "a long number": re.compile(r"(?<![\d.])\d{7,}(?!\d|\.\d)"),
    "an e-mail address": re.compile(r"[\w.+-]+@[\w-]+\.\w"),
    "a telephone number": re.compile(r"(?<!\d)\(?\d{3}\)?[-. ]\d{3}[-. ]\d{4}(?!\d)"),
}
_HASH = re.compile(r"(?=[0-9]*[a-f])[0-9a-f]{16,}", re.I)
_FIELDS = ("comment", "Comment", "Description", "Title", "Author", "Source", "XML:com.adobe.xmp", "xmp")  # of pictures
_CERTAIN = ("a name written with ^", "a number called a patient's")


def signs_in_text(where: str, text: str) -> Iterator[Sign]:
    """What in a free text looks like a name, a date of a person, or a number of a record."""
    plain = _HASH.sub(" ", text)
    for what, pattern in _TEXTS.items():
        if pattern.search(plain):
            yield Sign("identity" if what in _CERTAIN else "suspicion", where, what)


def signs_in_name(name: PurePath) -> Iterator[Sign]:
    """The same for the path of a file within its folder."""
    for part in (*name.parts[:-1], name.name.split(".")[0] if not _is_uid(name.stem) else ""):
        yield from signs_in_text("name of file or folder", part)


def _is_uid(text: str) -> bool:
    return re.fullmatch(r"\d+(\.\d+){3,}", text) is not None


def signs_in_file(path: Path) -> set[Sign]:
    """The signs in the header of an image file of any format that is read; a damaged file has none."""
    try:
        with path.open("rb") as file:
            head = file.read(132)
        if head[128:] == b"DICM":
            return set(signs_in_dicom(pydicom.dcmread(path, stop_before_pixels=True)))
        if path.name.lower().endswith((".nii", ".nii.gz")):
            return set(_in_nifti(path))
        found = set(_in_picture(path)) if head[:2] not in (b"II", b"MM") else set(_in_tiff(path))
    except Exception:  # any library, of damaged bytes: the readers say what is wrong with the file
        return set()
    return found


def signs_in_dicom(dataset: Dataset) -> Iterator[Sign]:
    """The signs in a data set and the sequences in it, pixels not looked at."""
    removed = str(dataset.get("PatientIdentityRemoved", "")).upper() == "YES"
    undated = str(dataset.get("LongitudinalTemporalInformationModified", "")).upper() in _MODIFIED
    if str(dataset.get("BurnedInAnnotation", "")).upper() == "YES":
        yield Sign("identity", "BurnedInAnnotation", "the file says that text is burnt into its pixels")
    if str(dataset.get("RecognizableVisualFeatures", "")).upper() == "YES":
        yield Sign("identity", "RecognizableVisualFeatures", "the file says that a face can be recognised")
    for element in dataset.iterall():
        try:
            yield from _in_element(element, removed, undated)
        except Exception:  # a damaged value of one element
            yield Sign("suspicion", _name(element), "a value that can't be read")


def _in_element(element: DataElement, removed: bool, undated: bool) -> Iterator[Sign]:
    keyword, vr = element.keyword, element.VR
    if element.tag.group & 0xFF01 == 0x6000 and element.tag.element == 0x3000:
        yield Sign("suspicion", "OverlayData", "graphics drawn over the image, which may hold text")
    if element.value is None or (vr != "SQ" and _empty(element)) or (vr == "SQ" and not element.value):
        return
    text = str(element.value)
    if keyword in ("PatientName", "PatientID") and removed:
        return  # pseudonyms, by the file's own word
    if keyword in IDENTITY or vr == "PN":
        yield Sign("identity", keyword or _name(element), "has a value")
    elif keyword in INDIRECT:
        yield Sign("suspicion", keyword, "has a value")
    elif vr in _DATE_VRS and not undated:
        yield Sign("suspicion", keyword or _name(element), "has a date")
    elif vr == "AS" and text[:3].isdigit() and text.endswith("Y") and int(text[:3]) > _OLDEST:
        yield Sign("suspicion", keyword, f"an age above {_OLDEST} years")
    elif element.tag.is_private and vr in (*_TEXT_VRS, "UN", "OB") and not element.tag.is_private_creator:
        yield Sign("suspicion", "private elements", "have values that nobody but the vendor knows")
    if vr in _TEXT_VRS:
        yield from signs_in_text(_name(element), text)


def _empty(element: DataElement) -> bool:
    """Whether an element has no value, or one that stands for none."""
    value = element.value
    if isinstance(value, bytes):
        return not value.strip(b"\0 ")
    return _PLACEHOLDER.fullmatch(str(value).strip()) is not None


def _name(element: DataElement) -> str:
    return element.keyword or ("private elements" if element.tag.is_private else str(element.tag))


def _in_nifti(path: Path) -> Iterator[Sign]:
    header = nib.load(path).header
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        if field in header:
            yield from signs_in_text(f"NIfTI header, {field}", bytes(header[field].item()).decode("latin-1"))
    if len(header.extensions):
        yield Sign("suspicion", "NIfTI extensions", "may hold a DICOM header or comments")


def _in_picture(path: Path) -> Iterator[Sign]:
    with Image.open(path) as image:
        fields = {key: value for key, value in image.info.items() if key not in ("icc_profile", "exif")}
        exif = image.getexif()
    for key, value in fields.items():
        yield from signs_in_text(f"picture's field {key}" if key in _FIELDS else "a picture's field", _as_text(value))
    if exif.get_ifd(ExifTags.IFD.GPSInfo):
        yield Sign("suspicion", "EXIF", "a place (GPS)")
    for value in (*exif.values(), exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, "")):
        yield from signs_in_text("EXIF", _as_text(value))


def _as_text(value: object) -> str:
    return value.replace(b"\0", b"").decode("latin-1") if isinstance(value, bytes) else str(value)


def _in_tiff(path: Path) -> Iterator[Sign]:
    with tifffile.TiffFile(path) as file:
        for page in file.pages:
            for name in ("ImageDescription", "Artist", "DocumentName", "HostComputer"):
                if tag := page.tags.get(name):
                    yield from signs_in_text(f"TIFF tag {name}", str(tag.value))
        if any(series.name.lower() in ("label", "macro") for series in file.series):
            yield Sign("identity", "slide label", "a photograph of the slide's label is in the file")
