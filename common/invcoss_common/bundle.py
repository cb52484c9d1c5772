"""The Flower app bundle of a federation: configuration and no code, the same text on both sides (docs/adr/0005).

Flower would run the code of a bundle in place of what a site has installed. The coordinator sends this text; a site's
launcher compares what arrives with its own copy of it and refuses anything else.
"""

from __future__ import annotations

import io
import json
import struct
import tomllib
import zipfile
import zlib

from invcoss_common.errors import BundleRefused

MAX_BYTES = 64 << 10
MANIFEST = ".info/CONTENT"  # Flower adds the digests of the files

_TEXT = """\
[project]
name = "{name}"
version = "1.0.0"
description = "Configuration only; the code is installed on both sides"
license = {{ text = "Apache-2.0" }}
[tool.flwr.app]
publisher = "invcoss"
fab-include = ["/pyproject.toml"]
[tool.flwr.app.components]
serverapp = "invcoss_server.app:app"
clientapp = "invcoss_site.app:app"
[tool.flwr.app.config]
"""


def bundle_text(name: str, config: dict[str, str]) -> str:
    """The pyproject.toml of a bundle `name` with the keys of `config`; a JSON string is a TOML string too."""
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in config.items()]
    return _TEXT.format(name=name) + "".join(lines)


FEDERATION = bundle_text("invcoss-federation", {"run": ""})


def check_bundle(data: bytes) -> None:
    """Raise BundleRefused unless `data` is the bundle of a federation: that text, and no other file."""
    if len(data) > MAX_BYTES:
        raise BundleRefused(f"the app bundle has {len(data)} bytes; one that carries configuration only has far fewer")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = archive.infolist()
            if sum(file.file_size for file in files) > MAX_BYTES:
                raise BundleRefused("the app bundle unpacks to more than one that carries configuration only")
            if {file.compress_type for file in files} - {zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED}:
                raise BundleRefused("the app bundle is packed in another way than bundles are")  # and without bound
            others = len({file.filename for file in files} - {"pyproject.toml", MANIFEST})
            with archive.open("pyproject.toml") as packed:
                text = packed.read(MAX_BYTES).decode()  # all of it at once would be unpacked whatever its size
    except (zipfile.BadZipFile, zlib.error, LookupError, ValueError, RuntimeError, EOFError, OSError, struct.error):
        raise BundleRefused("the app bundle can't be read") from None
    if others:
        raise BundleRefused(f"the app bundle carries {others} files besides its configuration; code is never accepted")
    try:
        same = tomllib.loads(text) == tomllib.loads(FEDERATION)
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise BundleRefused("the app bundle is not the one of the software that was reviewed and installed here")
