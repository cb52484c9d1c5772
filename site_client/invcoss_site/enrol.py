"""Enrolment at a site: its folder and keys, its request to the coordinator, and the join file that answers it.

ROOT/keys/      node node.pub       the Flower node's key: the coordinator knows the site by it
                signing.pem         the Ed25519 key that signs what the site sends
ROOT/policy.toml                    what the site allows, to be read and set by the hospital
ROOT/enrolment-request.json         for the operator; public keys only
ROOT/join.json ROOT/ca.crt          from the operator; who the coordinator is
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from invcoss_common.canonical import new_folder, write_atomic
from invcoss_common.enrolment import (
    EnrolmentRequest,
    JoinFile,
    check_name,
    open_signed,
    read_enrolment_file,
    sign_request,
    write_enrolment_file,
)
from invcoss_common.errors import CredentialError, DataError
from invcoss_common.keys import (
    check_fingerprint,
    generate_ec_key,
    generate_signing_key,
    key_digest,
    load_ec_key,
    load_signing_key,
    public_text,
    save_key,
    save_node_key,
)
from invcoss_common.modality import MODALITIES, lookup
from invcoss_site.home import load_home, write_home
from invcoss_site.policy import write_policy

TRIAL_CASES = 60


def init_site(root: Path, name: str, data: Path) -> EnrolmentRequest:
    """Make a site's folder, keys and enrolment request; `data` is the folder of images.

    A `site.toml` that is there stays as it is, if it has the same name and data, as does a `policy.toml`. A kill at any
    instant leaves no keys, and the same call again makes them. Raises CredentialError when there are keys already,
    DataError when there is no folder `data` or `site.toml` says otherwise.
    """
    check_name(name)
    if not data.is_dir():
        raise DataError(f"{data}: no such folder; --data must name the folder of the site's images")
    root = root.resolve()
    keys = root / "keys"
    try:
        with new_folder(keys) as draft:
            _write_settings(root, name, data.resolve())
            write_policy(root)
            node, signing = generate_ec_key(), generate_signing_key()
            save_node_key(node, draft / "node")
            write_atomic(draft / "node.pub", f"{public_text(node.public_key())}\n".encode())
            save_key(signing, draft / "signing.pem")
            request = sign_request(name, public_text(node.public_key()), signing)
            write_enrolment_file(request, root / "enrolment-request.json")
    except FileExistsError:
        raise CredentialError(
            f"{keys} exists, and keys are never overwritten; to make new ones, move this folder away first"
        ) from None
    except BlockingIOError:
        raise CredentialError(f"{root}: another init is running here") from None
    except OSError as error:
        raise CredentialError(f"{root}: can't make the site's folder here ({error.strerror})") from None
    return request


def make_trial_images(root: Path, modality: str, name: str) -> Path:
    """Make phantoms of a modality, other ones for another `name`, in a folder under `root`, unless they are there."""
    from invcoss_common.phantoms import write_phantoms  # here, because joining needs none of it
    from invcoss_common.seeds import derive_seed

    lookup(modality, MODALITIES)
    folder = root / "images"
    if not folder.exists():
        draft = root / ".images.unfinished"
        shutil.rmtree(draft, ignore_errors=True)
        write_phantoms(draft, modality, TRIAL_CASES, derive_seed(0, "phantoms", name))
        draft.replace(folder)
    return folder


def join(root: Path, data: bytes, heard: str | None = None) -> JoinFile:
    """Check a join file against this site's name and keys, and keep it as `join.json` and `ca.crt`.

    `heard` is the fingerprint of the coordinator's key as the operator read it out. Raises CredentialError when the
    file is altered, for another site or for other keys, comes from another coordinator than the one joined before, or
    its certificate is not that of an authority, or not valid now.
    """
    opened = open_signed(JoinFile, data)
    if heard is not None:
        check_fingerprint(heard, opened.coordinator_key_sha256, "the coordinator")
    _check_meant_for(root, opened)
    check_authority(load_authority(opened))
    if (root / "join.json").exists():
        before = read_join(root / "join.json")  # the keys that it names may be old
        if before.coordinator_key != opened.coordinator_key:
            raise CredentialError(
                f"this site joined consortium '{before.consortium}' of another coordinator; "
                f"if it shall change over, move {root / 'join.json'} away first"
            )
    try:
        write_atomic(root / "ca.crt", opened.ca_certificate.encode(), mode=0o644)
        write_atomic(root / "join.json", data, mode=0o644)
    except OSError as error:
        raise CredentialError(f"{root}: can't write the join file here ({error.strerror})") from None
    return opened


def load_join(root: Path) -> JoinFile:
    """The join file that this site keeps, verified again; raises CredentialError."""
    opened = read_join(root / "join.json")
    _check_meant_for(root, opened)
    return opened


def load_authority(opened: JoinFile) -> x509.Certificate:
    """The consortium's CA certificate of a join file; raises CredentialError unless it is that of an authority."""
    try:
        ca = x509.load_pem_x509_certificate(opened.ca_certificate.encode())
        ca.verify_directly_issued_by(ca)
        is_ca = ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        is_ca = is_ca and ca.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except (
        ValueError,
        TypeError,
        InvalidSignature,
        UnsupportedAlgorithm,
        x509.ExtensionNotFound,
        x509.DuplicateExtension,
    ):
        is_ca = False
    if not is_ca:
        raise CredentialError(
            "the certificate in the join file is not that of an authority; ask the operator for a new join file"
        )
    return ca


def check_authority(ca: x509.Certificate) -> None:
    """Raise CredentialError unless the consortium's authority is valid now, by this machine's clock."""
    now = datetime.now(UTC)
    if now < ca.not_valid_before_utc:
        raise CredentialError(
            f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC, but the consortium was made on "
            f"{ca.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: the clock is slow; "
            "the site's IT must set it (NTP), then try again"
        )
    if now > ca.not_valid_after_utc:
        raise CredentialError(
            f"the consortium's authority ended on {ca.not_valid_after_utc:%Y-%m-%d}; the operator must make a new "
            "consortium and send a new join file (or, if that date is to come, the site's IT must set the clock)"
        )


def _write_settings(root: Path, name: str, data: Path) -> None:
    if not (root / "site.toml").exists():
        write_home(root, name, data)
        return
    home = load_home(root)
    if (home.name, home.data) != (name, data):
        raise DataError(
            f"{root / 'site.toml'} is of site '{home.name}' with the images in {home.data}; "
            "give the same --name and --data, or change the file"
        )


def read_join(path: Path) -> JoinFile:
    """The join file in `path`, its own signature verified; raises CredentialError."""
    if not path.exists():
        raise CredentialError(f"{path}: this site has not joined; invcoss-site join stores the operator's file")
    try:
        return open_signed(JoinFile, read_enrolment_file(path))
    except CredentialError as error:
        raise CredentialError(f"{path}: {error}; move this one away before you join again") from None


def _check_meant_for(root: Path, opened: JoinFile) -> None:
    name = load_home(root).name
    if opened.site != name:
        raise CredentialError(f"this join file is for site '{opened.site}', and this is '{name}'; ask for your own")
    node, signing = load_ec_key(root / "keys" / "node"), load_signing_key(root / "keys" / "signing.pem")
    if (opened.node_key_sha256, opened.signing_key_sha256) != (
        key_digest(node.public_key()),
        key_digest(signing.public_key()),
    ):
        raise CredentialError(
            "this join file is for other keys of this site; send enrolment-request.json to the operator again"
        )
