"""Nothing in deploy/ is out of step: commands and options exist, files parse, and what they promise holds."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from invcoss_server.cli import app as server_app
from invcoss_site.cli import app as site_app
from invcoss_site.home import write_home

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(file for file in DEPLOY.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
TEXTS = {file.relative_to(DEPLOY).as_posix(): file.read_text("utf-8") for file in FILES}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
APPS = {name: typer.main.get_command(app) for name, app in (("server", server_app), ("site", site_app))}
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def load(name: str):
    """A script of deploy/ as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, DEPLOY / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documents(name: str) -> list[dict]:
    return [document for document in yaml.safe_load_all(TEXTS[name]) if document]


def used_commands(text: str) -> list[tuple[str, str, list[str], str]]:
    """(server or site, sub-command, options, rest of the line) of every command in a text, also in a YAML list."""
    found = re.finditer(r"invcoss-(server|site)[ ,]+(?!invcoss)([a-z][a-z-]+)([^\n]*)", text)
    return [(m[1], m[2], re.findall(r"(?<!\S)--[a-z-]+", m[3].replace(",", " ")), m[3]) for m in found]


# Commands and versions


def test_every_command_and_option_exists():
    used = [(name, *one) for name, text in TEXTS.items() for one in used_commands(text)]
    assert {("server", "start"), ("site", "start"), ("site", "join"), ("server", "init")} <= {one[1:3] for one in used}
    for name, which, command, options, _ in used:
        assert command in APPS[which].commands, f"{name}: invcoss-{which} has no {command}"
        known = {option for parameter in APPS[which].commands[command].params for option in parameter.opts}
        assert set(options) <= known, f"{name}: invcoss-{which} {command} has no {set(options) - known}"


def test_every_part_exists():
    parts = {m[1] for text in TEXTS.values() for m in re.finditer(r"--part[ ,]+(\w+)", text)}
    (option,) = (p for p in APPS["site"].commands["start"].params if "--part" in p.opts)
    assert parts == {"agent", "network"} <= set(option.type.choices)


def test_versions_agree_with_pyproject():
    pattern = r"invcoss[:-](\d+\.\d+\.\d+)|newTag: (\d+\.\d+\.\d+)"
    found = {name: {a or b for a, b in re.findall(pattern, text)} for name, text in TEXTS.items()}
    assert {name for name, versions in found.items() if versions} > {"compose/site.yaml", "docker/Dockerfile"}
    assert set().union(*found.values()) == {VERSION}


def test_links_between_the_documents_lead_somewhere():
    for name, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)#]+)", text) if name.endswith(".md") else ():
            assert ((DEPLOY / name).parent / target).exists(), f"{name}: {target}"


# Docker and Compose


def test_the_image_does_not_run_as_root_and_fetches_nothing_by_hand():
    text = TEXTS["docker/Dockerfile"]
    lines = [line for line in text.replace("\\\n", " ").splitlines() if not line.startswith("#")]
    of = {word: [line for line in lines if line.startswith(word + " ")] for word in ("FROM", "USER", "COPY", "CMD")}
    bases = {line.split()[1] for line in of["FROM"]}
    assert bases == {"python:3.11-slim-bookworm", "cpu"}
    assert [line.split()[-1] for line in of["FROM"]] == ["builder", "cpu", "cuda"]
    assert of["USER"] == ["USER 10001:10001"]
    assert all(json_form.split(None, 1)[1].startswith("[") for json_form in of["CMD"])
    assert not re.search(r"\b(curl|wget|sudo|apt-get|ADD)\b|chmod 777|:latest", text)
    assert "HEALTHCHECK" in text and "STOPSIGNAL SIGTERM" in text and "FLWR_TELEMETRY_ENABLED=0" in text
    sent = {line.removeprefix("!") for line in TEXTS["docker/Dockerfile.dockerignore"].splitlines() if line[:1] == "!"}
    assert {line.split()[1] for line in of["COPY"] if "--from" not in line} <= sent
    assert {"pyproject.toml", "README.md", "LICENSE", "common", "server", "site_client", "wheels"} <= sent


def test_health_is_that_every_program_of_the_service_runs(tmp_path):
    healthy = load("docker/healthy.py")
    start = [
        "/x/docker-init",
        "--",
        "/opt/python",
        "/opt/bin/invcoss-site",
        "start",
        str(tmp_path),
        "--part",
        "network",
    ]
    assert healthy.missing(start) == {"supernode", "superexec"}
    pids = tmp_path / "network.pids"
    pids.write_text(f'{{"supernode": {os.getpid()}}}')
    assert healthy.missing(start) == {"superexec"}
    pids.write_text(f'{{"supernode": {os.getpid()}, "superexec": {os.getpid()}}}')
    assert healthy.missing(start) == set()
    assert healthy.missing(start, proc=tmp_path) == {"supernode", "superexec"}
    assert healthy.missing(["invcoss-server", "start", str(tmp_path)]) == {"superlink", "superexec", "gate"}
    assert healthy.missing(["invcoss-site", "check-data", "/images"]) == set()


def test_health_knows_the_programs_of_the_services():
    programs = load("docker/healthy.py").PROGRAMS
    for names, file in ((("service",), "server/invcoss_server"), (("agent", "network"), "site_client/invcoss_site")):
        source = (ROOT / file / "service.py").read_text("utf-8")
        assert set().union(*(programs[name] for name in names)) == set(re.findall(r'Program\("(\w+)"', source))
    assert programs["all"] == programs["agent"] | programs["network"]


COMPOSE_KEYS = {
    *(
        "image",
        "pull_policy",
        "command",
        "init",
        "restart",
        "stop_grace_period",
        "ports",
        "sysctls",
        "volumes",
        "tmpfs",
    ),
    *("read_only", "shm_size", "cap_drop", "security_opt", "pids_limit", "logging", "network_mode", "group_add"),
}


@pytest.mark.parametrize("name", ["compose/coordinator.yaml", "compose/site.yaml"])
def test_compose_services_are_confined(name):
    (file,) = documents(name)
    assert set(file) - {"x-both"} == {"name", "services", "volumes"}
    for service in file["services"].values():
        assert set(service) <= COMPOSE_KEYS
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["init"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["pull_policy"] == "never" and service["restart"] == "unless-stopped"
        named = [volume.split(":")[0] for volume in service["volumes"] if isinstance(volume, str)]
        assert set(named) <= set(file["volumes"])


def test_compose_network_part_sees_no_images_and_agent_no_network():
    services = documents("compose/site.yaml")[0]["services"]
    assert services["network"]["volumes"] == ["site:/site"]
    assert "ports" not in services["network"] and "ports" not in services["agent"]
    assert services["agent"]["network_mode"] == "none"
    (images,) = (volume for volume in services["agent"]["volumes"] if isinstance(volume, dict))
    assert images["read_only"] and images["target"] == "/images"
    assert "cache:/site/cache" in services["agent"]["volumes"]


@pytest.mark.parametrize("name", ["coordinator", "site"])
def test_compose_gpu_files_change_a_service_that_there_is(name):
    (file,), (gpu,) = documents(f"compose/{name}.yaml"), documents(f"compose/{name}-gpu.yaml")
    assert set(gpu["services"]) <= set(file["services"])
    assert all(set(service) == {"image", "deploy"} for service in gpu["services"].values())


# Kubernetes


@pytest.mark.parametrize("name", ["coordinator", "site"])
def test_pods_meet_the_restricted_standard_and_mount_what_there_is(name):
    kinds = {document["kind"]: document for document in documents(f"kubernetes/{name}/{name}.yaml")}
    workload = kinds["StatefulSet"]["spec"]
    labels, pod = workload["template"]["metadata"]["labels"], workload["template"]["spec"]
    assert workload["selector"]["matchLabels"] == labels == kinds["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    volumes = {v["name"] for v in pod["volumes"]} | {v["metadata"]["name"] for v in workload["volumeClaimTemplates"]}
    for container in pod["initContainers"] + pod["containers"]:
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert all("livenessProbe" in container for container in pod["containers"])


def test_pod_of_a_site_keeps_the_images_from_its_network_part():
    (pod,) = (
        d["spec"]["template"]["spec"] for d in documents("kubernetes/site/site.yaml") if d["kind"] == "StatefulSet"
    )
    containers = {container["name"]: container for container in pod["initContainers"] + pod["containers"]}
    mounts = {name: {mount["name"] for mount in one["volumeMounts"]} for name, one in containers.items()}
    assert mounts["network"] == mounts["join"] == {"site", "tmp-network"}
    assert {"images", "cache"} <= mounts["agent"]
    assert all(m["readOnly"] for m in containers["agent"]["volumeMounts"] if m["name"] == "images")
    assert pod["shareProcessNamespace"] is False


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here")
@pytest.mark.parametrize("name", ["coordinator", "site"])
def test_kustomize_builds(name):
    build = ["kubectl", "kustomize", DEPLOY / "kubernetes" / name]
    built = subprocess.run(build, check=True, capture_output=True, text=True).stdout
    images = re.findall(r"image: (\S+)", built)
    assert set(images) == {f"invcoss:{VERSION}-cpu"}


# systemd


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_units_verify(tmp_path):
    here = Path(sys.executable).parent
    for unit in UNITS:
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/invcoss/bin", str(here)))
    (tmp_path / "invcoss-site-network.service.d").mkdir()
    shutil.copy(DEPLOY / "systemd" / "images.conf", tmp_path / "invcoss-site-network.service.d")
    verify = ["systemd-analyze", "verify", "--man=no", *sorted(tmp_path.glob("*.service"))]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_units_are_confined():
    texts = {unit.stem: unit.read_text().splitlines() for unit in UNITS}
    assert len(texts) == 3
    for lines in texts.values():
        assert {"ProtectSystem=strict", "NoNewPrivileges=yes", "ProtectHome=yes", "PrivateTmp=yes"} <= set(lines)
        assert {"Restart=always", "RestartSec=5", "KillMode=mixed", "SystemCallFilter=~@privileged"} <= set(lines)
    agent, network = texts["invcoss-site-agent"], texts["invcoss-site-network"]
    assert {"PrivateNetwork=yes", "IPAddressDeny=any", "DevicePolicy=closed", "PrivateUsers=yes"} <= set(agent)
    assert {"InaccessiblePaths=/var/lib/invcoss-site/cache", "PrivateDevices=yes", "PrivateUsers=yes"} <= set(network)


def test_network_unit_does_not_start_where_it_can_read_images(tmp_path):
    text = TEXTS["systemd/invcoss-site-network.service"].replace("\\\n", " ")
    code = re.search(r'^ExecStartPre=/opt/invcoss/bin/python -I -c "(.*)"$', text, re.MULTILINE)[1]
    code = code.replace("/var/lib/invcoss-site", str(tmp_path / "site"))
    write_home(tmp_path / "site", "north", tmp_path / "images")
    check = [sys.executable, "-I", "-c", code]
    assert subprocess.run(check, check=False).returncode == 0
    (tmp_path / "images").mkdir()
    refused = subprocess.run(check, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and str(tmp_path / "images") in refused.stderr


# Bundle


def bundle_folder(folder: Path) -> Path:
    (folder / "wheels").mkdir(parents=True)
    (folder / "wheels" / "a_b-1.0+cpu-py3-none-any.whl").write_bytes(b"not really a wheel")
    (folder / "PLATFORM").write_text("none\n")
    shutil.copy(DEPLOY / "bundle" / "install.sh", folder)
    return folder


def test_the_same_files_give_the_same_bundle(tmp_path):
    make = load("bundle/make_bundle.py")
    for one in ("one", "two"):
        folder = bundle_folder(tmp_path / one / "invcoss-0")
        make._write_checksums(folder)
        make._pack(folder, tmp_path / f"{one}.tar.gz")
    assert (tmp_path / "one.tar.gz").read_bytes() == (tmp_path / "two.tar.gz").read_bytes()
    pinned = (tmp_path / "one" / "invcoss-0" / "requirements.txt").read_text()
    assert re.fullmatch(r"a-b==1\.0\+cpu --hash=sha256:[0-9a-f]{64}\n", pinned)
    assert "install.sh" in (tmp_path / "one" / "invcoss-0" / "SHA256SUMS").read_text()


def test_install_refuses_another_platform_and_a_changed_file(tmp_path):
    folder, target = bundle_folder(tmp_path / "bundle"), tmp_path / "venv"
    load("bundle/make_bundle.py")._write_checksums(folder)
    install = [folder / "install.sh", target]
    env = {**os.environ, "PYTHON": sys.executable}
    refused = subprocess.run(install, env=env, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "this bundle is for none" in refused.stderr
    (folder / "wheels" / "a_b-1.0+cpu-py3-none-any.whl").write_bytes(b"something else")
    refused = subprocess.run(install, env=env, capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and "FAILED" in refused.stdout
    assert not target.exists()


def test_install_takes_nothing_from_elsewhere():
    text = TEXTS["bundle/install.sh"]
    assert "--no-index" in text and "--require-hashes" in text and "--isolated" in text
