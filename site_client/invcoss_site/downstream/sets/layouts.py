"""How the nine published sets lie on disk: as distributed, and as the published preparation leaves them."""

from __future__ import annotations

from pathlib import Path

from invcoss_common.errors import DataError
from invcoss_site.downstream.task import TASKS

LAYOUTS = {
    "pubmed20k": """\
PubMed_20k_RCT/{train,dev,test}.txt     the variant that keeps numbers, without "@"
    ###24293578                         an abstract
    OBJECTIVE<TAB>To investigate ...    a sentence a line
    (blank)                             its end""",
    "chestxr": """\
Chest_XR/{train,validation}/{covid,normal,pneumonia}/*""",
    "qatav2": """\
QaTa-COV19-v2/{Train Set,Test Set}/Images/<name>.png
QaTa-COV19-v2/{Train Set,Test Set}/Ground-truths/mask_<name>.png
QaTa-COV19-v2/{train,val,test}.txt      optional: published lists, a <name>.png a line""",
    "ricord": """\
MIDRC-RICORD-{1A,1B}/MIDRC-RICORD-{1A,1B}-<patient>/<study>/<series>/*.dcm      as distributed, or
RICORD_nii/MIDRC-RICORD-{1A,1B}/ID<patient>_date<mm-dd-yyyy>_<series>.nii.gz    converted, or
RICORD_nii_resize/... the same names                                            192 x 192 x 64
RICORD_{train,val,test}.txt     a line: RICORD_nii/... <0 or 1>; data_split/ of yeerwen/MedCoSS has them""",
    "lits": """\
**/volume-<i>.nii and **/segmentation-<i>.nii, i = 0 to 130                 as distributed, or
Task100_MOTS/nnUNetData_plans_v2.1_stage1/liver_<i>.npz                     prepared by nnU-Net v1
(the .pkl files beside them are never opened)""",
    "vs": """\
<patient>/vs_gk_t1_refT1.nii.gz and <patient>/vs_gk_seg_refT1.nii.gz        converted by KCL-BMEIS/VS_Seg, or
Task061_VSseg/{imagesTr/<patient>_0000.nii.gz,labelsTr/<patient>.nii.gz,dataset.json}   nnU-Net's raw folder, or
Task061_VSseg/nnUNetData_plans_v2.1_stage1/<patient>.npz                    prepared by nnU-Net v1, with
Task061_VSseg/VSseg_{train,test}.txt (or dataset.json)
(the .pkl files beside them are never opened)""",
    "la": """\
Training Set/<id>/lgemri.nrrd and laendo.nrrd                               as distributed, or
2018LA_Seg_Training Set/<id>/mri_norm2.h5                                   prepared by UA-MT
train.list and test.list        an id a line; data/ of yulequan/UA-MT has them""",
    "nct-crc-he": """\
NCT_CRC_HE/{NCT-CRC-HE-100K,CRC-VAL-HE-7K}/{ADI,BACK,DEB,LYM,MUC,MUS,NORM,STR,TUM}/*.tif""",
    "glas": """\
Warwick_QU_Dataset/{train,testA,testB}_<i>.bmp, ..._anno.bmp and Grade.csv  as distributed, or
Glas/{train,test}/{images,labels}/<name>.png and Grade.csv                  prepared, 512 x 512""",
}


def wrong_folder(name: str, data: Path, why: str) -> DataError:
    """The error for a folder that is not the set `name`: what is missing, and how it should look."""
    return DataError(f"{data}: not {TASKS[name].title} as expected: {why}. The folder must hold:\n{LAYOUTS[name]}")


def inside(data: Path, *names: str) -> Path:
    """`data`, or the first of `names` in it that is a folder: people give either."""
    return next((data / name for name in names if (data / name).is_dir()), data)


def entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted by name, without hidden files."""
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)
